"""Deadlines: how long this process may go on, and how an attempt says that it stopped for one."""

from __future__ import annotations


class Interrupted(Exception):
    """The deadline is near and all that is done is logged: the unit goes on with another delivery.

    Not an error: raised at safe points through the handler, never counted as a failed attempt.
    """


class Deadline:
    """When this process must be done: moved closer by SIGTERM, known from the start in Lambda.

    Attempts stop at their next safe point once it is ``near``; what reaches none is cancelled when it is
    ``over``. Times are those of the engine's monotonic clock, in seconds.
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
