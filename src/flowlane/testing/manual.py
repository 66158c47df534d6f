"""A clock that a test moves by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TypeVar

T = TypeVar("T")


class ManualClock:
    """See ``clock.Clock``. Time stands still but for ``advance`` (and ``sleep``, which advances it)."""

    def __init__(self, start: datetime = datetime(2024, 1, 1, tzinfo=UTC), name: str = "t") -> None:
        self._start, self._name = start, name
        self._seconds = 0.0
        self._tokens = count(1)

    def advance(self, seconds: float) -> None:
        """It is `seconds` later."""
        self._seconds += seconds

    def set(self, seconds: float) -> None:
        """Somebody sets the wall clock forward, or back; the other one goes on as it did."""
        self._start += timedelta(seconds=seconds)

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._seconds)

    def monotonic(self) -> float:
        return self._seconds

    def random(self) -> float:
        return 0.5

    def token(self) -> str:
        return f"{self._name}{next(self._tokens)}"

    async def offload(self, work: Callable[[], T], *, waits: bool = False) -> T:
        return work()

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        await asyncio.sleep(0)
