"""Cutting records into batches: by the policy and the source's own coordinates, and by nothing else.

Parsers hand over chunks, as it suits them; a batch ends with the record at whose end it holds ``Cut.rows`` of
them or spans ``Cut.size`` bytes, whichever comes first. So the batches are the same however the input was cut
into blocks, and from whichever batch's end one starts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from io import BytesIO
from itertools import accumulate

import msgspec

from flowlane.errors import Superseded
from flowlane.ports import Bad, Batch, Cut, Record
from flowlane.state import Position
from flowlane.streams.members import inflater


class Chunk(msgspec.Struct):
    """Decoded bytes and the rows found in them, in order; what lies behind the last row belongs to the next.

    ``ends`` tells where in ``data`` each item ends; ``None``: there is one item in each line.
    """

    data: bytes
    items: list[Record | Bad]
    bad: int = 0  #: how many of the items are
    ends: list[int] | None = None

    def boundaries(self) -> list[int]:
        """Where in ``data`` each item ends."""
        if self.ends is None:
            self.ends = list(accumulate(map(len, BytesIO(self.data))))
        return self.ends

    @property
    def last(self) -> int:
        """Where in ``data`` the last item ends; there is one."""
        return len(self.data) if self.ends is None else self.ends[-1]


class Cutter:
    """Chunks in, batches out. ``Batch.size`` is left to whoever knows what was read for it."""

    def __init__(self, cut: Cut, start: Position) -> None:
        self._cut = cut
        self._start = start
        self._row = start.row
        self._offset = start.offset  # of the end of what was fed, rows or not
        self._crc = start.crc  # of all bytes up to there
        self._crc32 = inflater().crc32  # isal's is 12 times as fast as zlib's
        self._records: list[Record] = []
        self._bad: list[Bad] = []
        self._end = start

    def feed(self, chunk: Chunk) -> Iterator[Batch]:
        """The batches that `chunk` completes; use them up before feeding the next one."""
        view = memoryview(chunk.data)
        at = taken = 0
        base = self._offset
        while taken < len(chunk.items):
            upto, full = self._fitting(chunk, base, taken)
            stop = chunk.last if upto == len(chunk.items) else chunk.boundaries()[upto - 1]
            self._take(chunk, taken, upto)
            self._crc = self._crc32(view[at:stop], self._crc)
            self._end = Position(base + stop, self._row, self._crc)
            at, taken = stop, upto
            if full:
                yield self._emit()
        self._crc = self._crc32(view[at:], self._crc)
        self._offset = base + len(view)

    def close(self) -> Iterator[Batch]:
        """The last batch, unless it would be empty."""
        if self._end.row > self._start.row:
            yield self._emit()

    def _fitting(self, chunk: Chunk, base: int, taken: int) -> tuple[int, bool]:
        """Up to which item the batch goes on, and whether that fills it."""
        count = len(chunk.items)
        upto = taken + self._cut.rows - (self._row - self._start.row)
        room = self._start.offset + self._cut.size - base  # a batch is full once it reaches this, in `data`
        if upto > count and chunk.last < room:
            return count, False
        by_size = bisect_left(chunk.boundaries(), room, taken) + 1
        upto = min(upto, by_size)
        return (upto, True) if upto <= count else (count, False)

    def _take(self, chunk: Chunk, first: int, upto: int) -> None:
        items = chunk.items[first:upto]
        self._row += len(items)
        if not chunk.bad:
            self._records += items  # type: ignore[arg-type]  # none of them is Bad
            return
        for item in items:
            if isinstance(item, Bad):
                self._bad.append(item)
            else:
                self._records.append(item)

    def _emit(self) -> Batch:
        batch = Batch(self._records, self._start, self._end, self._bad)
        self._records, self._bad = [], []
        self._start = self._end
        return batch


class Skip:
    """Passes over the bytes before a position, and proves that they are those that were read before."""

    def __init__(self, position: Position) -> None:
        self._goal = position
        self._left = position.offset
        self._crc = 0
        self._crc32 = inflater().crc32

    @property
    def active(self) -> bool:
        """Whether the position is still ahead."""
        return self._left > 0

    def feed(self, piece: bytes) -> bytes:
        """What of `piece` lies behind the position.

        Raises:
            Superseded: the bytes before it are other ones.
        """
        if not self._left:
            return piece
        passed = min(self._left, len(piece))
        self._crc = self._crc32(memoryview(piece)[:passed], self._crc)
        self._left -= passed
        if not self._left and self._crc != self._goal.crc:
            raise Superseded(f"its first {self._goal.offset:,} bytes are not those that were read before")
        return piece[passed:]

    def close(self) -> None:
        """Raises:
        Superseded: the end came before the position.
        """
        if self._left:
            raise Superseded(f"it ends before byte {self._goal.offset:,}, up to which it was read before")
