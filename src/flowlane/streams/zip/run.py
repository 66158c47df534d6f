"""Small members of a ZIP archive, many at a time: neighbours come out of one stretch of it.

What a request costs, or a hop into a thread, is worth far more bytes than such members have. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from flowlane.errors import Damaged, Refused
from flowlane.streams.zip.entry import Entry
from flowlane.streams.zip.member import HEADER, MAX_TAIL, Member

#: Bytes between two members that are read over: less work, and sooner there, than another request.
GAP: Final = 64 << 10
#: Bytes of an archive in one stretch, at most; unless one member alone has more.
SPAN: Final = 1 << 20
#: Stretches in a batch, which are read at once.
AT_ONCE: Final = 16
#: Bytes that the members of a batch come to, inflated; unless one member alone has more.
ROOM: Final = 4 << 20

Read = bytes | Damaged | Refused


@dataclass(slots=True)
class Stretch:
    """The bytes [start, end) of an archive, and the members in them that are wanted, in order."""

    start: int
    end: int
    entries: list[Entry]


def end_of(entry: Entry) -> int:
    """Where the bytes of `entry` have ended, whatever its local header says."""
    # The local header's own name and extra fields may be longer than those in the directory.
    longest = entry.offset + HEADER + MAX_TAIL + entry.packed
    return min(entry.limit or longest, longest)


def batches(entries: Iterable[Entry]) -> Iterator[list[Stretch]]:
    """Stretches with all of `entries`, which are in the order of their places; some to be read at once."""
    batch: list[Stretch] = []
    room = ROOM
    for entry in entries:
        end = end_of(entry)
        joins = bool(batch) and entry.offset - batch[-1].end <= GAP and end - batch[-1].start <= SPAN
        if batch and (entry.size > room or (not joins and len(batch) == AT_ONCE)):
            yield batch
            batch, room, joins = [], ROOM, False
        if joins:
            batch[-1].entries.append(entry)
            batch[-1].end = end
        else:
            batch.append(Stretch(entry.offset, end, [entry]))
        room -= entry.size
    if batch:
        yield batch


class Run:
    """Small members out of one stretch of an archive, fed from the first one's local header on; what lies
    between them is passed over. One that is damaged or refused spoils no other."""

    def __init__(self, entries: Iterable[Entry], *, password: str | bytes | None = None) -> None:
        """`entries` in order of their offsets, none of them at fault."""
        self._entries = iter(entries)
        self._password = password
        self._entry: Entry | None = None
        self._pieces: list[bytes] = []
        self._at = -1  # where in the archive the next block begins; -1: where the first member does
        self._next()

    @property
    def ended(self) -> bool:
        """Whether all members were given."""
        return self._entry is None

    def feed(self, block: bytes) -> Iterator[tuple[Entry, Read]]:
        """The members that `block` completes, each proven and whole, or with what is wrong with it; use them
        up before the next block."""
        first = self._at
        self._at = end = first + len(block)
        while (entry := self._entry) is not None and entry.offset < end:
            stop = end_of(entry)
            read = self._take(block[max(entry.offset - first, 0) : stop - first], stop <= end)
            if read is None:
                return
            self._next()
            yield entry, read

    def close(self) -> Iterator[tuple[Entry, Read]]:
        """Nothing more will come: the members that are cut, each with that."""
        while (entry := self._entry) is not None:
            read = self._take(b"", last=True)
            assert read is not None
            self._next()
            yield entry, read

    def _take(self, part: bytes, last: bool) -> Read | None:
        """The member, once `part` completes it, or is the `last` of it; ``None``: it goes on."""
        try:
            self._pieces += self._member.feed(part)
            if not (last or self._member.ended):
                return None
            self._member.close()
        except (Damaged, Refused) as error:
            return type(error)(str(error))  # not the one raised, whose traceback holds the block
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def _next(self) -> None:
        self._entry = next(self._entries, None)
        self._pieces = []
        if self._entry is not None:
            self._member = Member(self._entry, password=self._password)
            self._at = self._entry.offset if self._at < 0 else self._at
