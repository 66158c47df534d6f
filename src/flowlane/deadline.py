"""Deadlines: how long this process may go on, and how an attempt says that it stopped for one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from flowlane.clock import Clock

#: Seconds that even what is waited for too late is given, so that what needs no waiting is done.
_MOMENT = 0.05
#: Seconds that one wait lasts at most where there is no end to wait for: timers take no infinity.
_LONG = 3600.0


class Interrupted(Exception):
    """The deadline is near and all that is done is logged: the unit goes on with another delivery.

    Not an error: raised at safe points through the handler, never counted as a failed attempt.
    """


class Deadline:
    """When this process must be done (``at``): moved closer by SIGTERM, known from the start in Lambda.

    Attempts stop at their next safe point once it is ``near``; what reaches none is cancelled when it is
    ``over``, and what has not ended even so is left behind when there is no ``rest``. Times are those of the
    engine's monotonic clock, in seconds.
    """

    __slots__ = ("_at", "_margin", "_waiting", "nears")

    def __init__(self, at: float = float("inf"), margin: float = 0.0) -> None:
        self._at = at
        self._margin = margin
        self._waiting: set[asyncio.Future[None]] = set()
        self.nears = at - margin  #: when it is near: what is handled in microseconds asks without a call

    @property
    def at(self) -> float:
        """When this process must be done. Whoever moves it (on the loop) sets the ``margin`` before."""
        return self._at

    @at.setter
    def at(self, at: float) -> None:
        self._at = at
        self.nears = at - self._margin
        for waiting in self._waiting:
            _wake(waiting)

    @property
    def margin(self) -> float:
        """Seconds before the end at which it is near."""
        return self._margin

    @margin.setter
    def margin(self, margin: float) -> None:
        self._margin = margin
        self.nears = self._at - margin

    def left(self, now: float) -> float:
        """Seconds until it is near."""
        return max(0.0, self.nears - now)

    def near(self, now: float) -> bool:
        """Whether less than the margin is left."""
        return now >= self.nears

    def over(self, now: float) -> bool:
        """Whether less than half the margin is left: enough to commit, not to go on."""
        return now >= self._at - self.margin / 2

    def rest(self, now: float) -> float:
        """Seconds until the process must answer, whatever has not ended."""
        return max(0.0, self._at - self.margin / 8 - now)

    async def comes(self, clock: Clock) -> None:
        """Return when it is near, however often it is moved until then."""
        loop = asyncio.get_running_loop()
        while left := self.left(clock.monotonic()):
            waiting: asyncio.Future[None] = loop.create_future()
            timer = loop.call_later(min(left, _LONG), _wake, waiting)
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)
                timer.cancel()

    async def wait(self, clock: Clock, futures: Iterable[asyncio.Future[Any]], most: float = 0.2) -> bool:
        """Wait until all `futures` are done or there is no rest, looking every `most` seconds whether the
        deadline was moved; whether they are. They are neither cancelled nor asked for their results."""
        pending = set(futures)
        left = 1.0
        while pending and left > 0:
            left = self.rest(clock.monotonic())
            _, pending = await asyncio.wait(pending, timeout=min(most, max(left, _MOMENT)))
        return not pending


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
