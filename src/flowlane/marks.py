"""How far the channel of a stage has come in time, as a sweep has to know it.

A channel does not know which units it holds. To put every unit again that has been waiting in it for long
would double it with each sweep. What was put before a moment, and is settled, is in it no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from flowlane.ports import Lag

#: One mark for each such part of the time that they span: few, however long that is.
_PART = 1 / 128


class Marks:
    """Where the partitions of one channel ended at moments of the wall clock (in seconds)."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, dict[int, int]]] = deque()

    def passed(self, lags: Sequence[Lag], now: float) -> float:
        """The latest moment known before which all that was put is settled, by how the channel stands `now`;
        0 if there is none yet, `now` if the channel does not say how much it holds."""
        open_ones = [lag for lag in lags if not lag.ended]
        if any(lag.records is None for lag in open_ones):
            behind = [lag.seconds for lag in open_ones if lag.seconds is not None]
            return now - max(behind) if len(behind) == len(open_ones) else now
        self._note(now, {lag.partition: lag.position + (lag.records or 0) for lag in open_ones})
        settled = {lag.partition: lag.position for lag in open_ones}
        for moment, ends in reversed(self._marks):
            if all(settled.get(partition, end) >= end for partition, end in ends.items()):
                while self._marks[0][0] < moment:
                    self._marks.popleft()
                return moment
        return 0.0

    def _note(self, now: float, ends: dict[int, int]) -> None:
        marks = self._marks
        if not marks or now - marks[-1][0] >= (now - marks[0][0]) * _PART or not any(ends.values()):
            marks.append((now, ends))
