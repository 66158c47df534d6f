"""Deadlines: how long this process may go on, and how an attempt says that it stopped for one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from flowlane.clock import Clock

#: Seconds that even what is waited for too late is given, so that what needs no waiting is done.
_MOMENT = 0.05


class Interrupted(Exception):
    """The deadline is near and all that is done is logged: the unit goes on with another delivery.

    Not an error: raised at safe points through the handler, never counted as a failed attempt.
    """


class Deadline:
    """When this process must be done: moved closer by SIGTERM, known from the start in Lambda.

    Attempts stop at their next safe point once it is ``near``; what reaches none is cancelled when it is
    ``over``, and what has not ended even so is left behind when there is no ``rest``. Times are those of the
    engine's monotonic clock, in seconds.
    """

    __slots__ = ("at", "margin")

    def __init__(self, at: float = float("inf"), margin: float = 0.0) -> None:
        self.at = at
        self.margin = margin

    def left(self, now: float) -> float:
        """Seconds until it is near."""
        return max(0.0, self.at - self.margin - now)

    def near(self, now: float) -> bool:
        """Whether less than the margin is left."""
        return now >= self.at - self.margin

    def over(self, now: float) -> bool:
        """Whether less than half the margin is left: enough to commit, not to go on."""
        return now >= self.at - self.margin / 2

    def rest(self, now: float) -> float:
        """Seconds until the process must answer, whatever has not ended."""
        return max(0.0, self.at - self.margin / 8 - now)

    async def wait(self, clock: Clock, futures: Iterable[asyncio.Future[Any]], most: float = 0.2) -> bool:
        """Wait until all `futures` are done or there is no rest, looking every `most` seconds whether the
        deadline was moved; whether they are. They are neither cancelled nor asked for their results."""
        pending = set(futures)
        left = 1.0
        while pending and left > 0:
            left = self.rest(clock.monotonic())
            _, pending = await asyncio.wait(pending, timeout=min(most, max(left, _MOMENT)))
        return not pending
