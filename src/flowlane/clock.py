"""Time, chance and threads: the only place where flowlane asks the machine for them.

Simulation replaces the clock by a virtual one (``flowlane.testing``): no other module calls ``time``,
``random``, ``uuid`` or ``datetime.now``; a test checks that over the syntax trees.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    """Wall time for people, monotonic time for decisions, and chance for jitter."""

    def now(self) -> datetime:
        """The wall clock, in UTC. For schedules and records; never used to decide who holds a unit."""
        ...

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    def random(self) -> float:
        """A number in [0, 1), for jitter."""
        ...

    def token(self) -> str:
        """A short string that no other caller anywhere gets; the seed of event ids."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        ...

    async def offload(self, work: Callable[[], T], *, waits: bool = False) -> T:
        """Run `work`, which takes longer than the loop can stand, off the loop: it computes, or (`waits`)
        mostly waits for a disk."""
        ...


class SystemClock:
    """The machine's own clock, the operating system's randomness, and as many threads as there are cores."""

    _computing: ThreadPoolExecutor | None = None

    def now(self) -> datetime:
        return datetime.now(UTC)

    monotonic = staticmethod(time.monotonic)  # asked several times for each delivery

    def random(self) -> float:
        return random.random()

    def token(self) -> str:
        return os.urandom(8).hex()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def offload(self, work: Callable[[], T], *, waits: bool = False) -> T:
        if self._computing is None:
            # One core is left to the loop: with more threads computing than that, it waits for its turn.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            self._computing = ThreadPoolExecutor(max(1, cores - 1), thread_name_prefix="flowlane-compute")
        return await asyncio.get_running_loop().run_in_executor(None if waits else self._computing, work)


def rfc3339(moment: datetime) -> str:
    """`moment` as an RFC 3339 timestamp in UTC with millisecond precision, as CloudEvents wants it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
