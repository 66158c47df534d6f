"""Parcels on their way to a stream, in lines: of each line one is under way, the others wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from flowlane.ports import ChannelRecord

#: Entries in one call, at most (API reference of PutRecords).
CALL_RECORDS: Final = 500
#: Calls' worth that is prepared while others are under way.
_AHEAD: Final = 4


class Parcel(msgspec.Struct, eq=False, gc=False):
    """`records` as one `entry` of a call, of about `size` bytes, in order with whatever else is in their
    `line`. ``tries`` counts how often it was refused."""

    line: str
    entry: dict[str, Any]
    records: Sequence[ChannelRecord]
    size: int
    tries: int = 0


class Lines:
    """Parcels that are not stored yet: first come, first taken, but one of each line at a time.

    PutRecords goes on with the records that follow a failed one, so it keeps no order by itself (API
    reference): what has to stay in order is therefore never in one call, nor in two calls at once.
    """

    def __init__(self, call_bytes: int) -> None:
        self._call_bytes = call_bytes
        self._ready: deque[Parcel] = deque()
        self._bytes = 0  # of those that are ready
        self._count = self._size = 0  # of all that are not under way
        #: Of each line that has a parcel ready or under way, those behind it.
        self._behind: dict[str, deque[Parcel] | None] = {}

    def add(self, parcel: Parcel) -> None:
        """The last one of its line."""
        self._count += 1
        self._size += parcel.size
        line = parcel.line
        try:
            behind = self._behind[line]
        except KeyError:
            self._behind[line] = None
            self._set_ready(parcel)
            return
        if behind is None:
            self._behind[line] = behind = deque()
        behind.append(parcel)

    @property
    def full(self) -> bool:
        """Whether ``take`` gives about as much as one call may hold."""
        return len(self._ready) >= CALL_RECORDS or self._bytes >= self._call_bytes * 0.9

    @property
    def enough(self) -> bool:
        """Whether some calls' worth is in here, ready or not: what is prepared ahead is bounded."""
        return self._count >= _AHEAD * CALL_RECORDS or self._size >= _AHEAD * self._call_bytes

    def take(self) -> list[Parcel]:
        """The next call's; under way until each is ``stored`` or ``refused``. As large as a call may be at
        most, unless it is a single one."""
        call: list[Parcel] = []
        size = 0
        while self._ready and len(call) < CALL_RECORDS:
            size += self._ready[0].size
            if call and size > self._call_bytes:
                break
            call.append(self._ready.popleft())
        taken = sum([parcel.size for parcel in call])
        self._bytes -= taken
        self._size -= taken
        self._count -= len(call)
        return call

    def stored(self, parcel: Parcel) -> None:
        """The next one of its line may be taken."""
        behind = self._behind[parcel.line]
        if behind:
            self._set_ready(behind.popleft())
        else:
            del self._behind[parcel.line]

    def refused(self, parcel: Parcel) -> None:
        """It may be taken again."""
        self._count += 1
        self._size += parcel.size
        self._set_ready(parcel)

    def drain(self) -> dict[str, list[Parcel]]:
        """All that are not under way, by line, in order; they are not in here any more."""
        found: dict[str, list[Parcel]] = {}
        for parcel in self._ready:
            found[parcel.line] = [parcel]
        for line, behind in self._behind.items():
            found.setdefault(line, []).extend(behind or ())
        self._ready.clear()
        self._behind.clear()
        self._bytes = self._count = self._size = 0
        return found

    def _set_ready(self, parcel: Parcel) -> None:
        self._ready.append(parcel)
        self._bytes += parcel.size
