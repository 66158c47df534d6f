"""Cutting decoded bytes into blocks of whole lines: no I/O, one copy, memory bounded by the longest line.

Only ``\\n`` ends a line (JSON Lines, section "Line Terminator"); it stays with its line, as does a ``\\r``
before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from flowlane.streams.preview import preview

#: A line may be this long. GH Archive has lines of more than 1 MB.
MAX_LINE: Final = 16 << 20


class Block(msgspec.Struct, frozen=True, gc=False):
    """Whole lines, [start, end) in decoded bytes; or, with a `reason`, one line that was left out."""

    start: int
    end: int
    data: bytes
    reason: str = ""


class Lines:
    """Cuts pieces into blocks of whole lines. However the input is cut into pieces, the lines are the same,
    and every byte is in exactly one block's [start, end)."""

    def __init__(self, *, start: int = 0, limit: int = MAX_LINE) -> None:
        self._start = start  # of the line that is not complete yet
        self._limit = limit
        self._carry = bytearray()  # of that line
        self._dropped = 0  # bytes of it that were not kept, once it is too long

    def feed(self, piece: bytes) -> Iterator[Block]:
        """The blocks that `piece` completes; use them up before feeding the next one."""
        at = 0
        while at < len(piece):
            # The last line end within the limit: all lines before it are short enough.
            room = self._limit - len(self._carry) - self._dropped
            cut = piece.rfind(b"\n", at, at + max(room, 0) + 1) + 1 if not self._dropped else 0
            if cut:
                yield self._emit(piece[at:cut])
                at = cut
            elif len(piece) - at <= room and not self._dropped:
                self._carry += piece[at:]
                return
            else:
                end = piece.find(b"\n", at) + 1
                self._drop(piece[at : end or len(piece)])
                if end:
                    yield self._refuse()
                at = end or len(piece)

    def close(self) -> Iterator[Block]:
        """The last line, if it has no line end."""
        if self._dropped:
            yield self._refuse()
        elif self._carry:
            yield self._emit(b"")

    def _emit(self, data: bytes) -> Block:
        whole = bytes(self._carry) + data if self._carry else data
        start, self._start = self._start, self._start + len(whole)
        self._carry.clear()
        return Block(start, self._start, whole)

    def _drop(self, data: bytes) -> None:
        if not self._dropped:
            self._dropped = len(self._carry)
            self._carry += data[:64]
            del self._carry[64:]
        self._dropped += len(data)

    def _refuse(self) -> Block:
        head = bytes(self._carry)
        start, self._start = self._start, self._start + self._dropped
        reason = (
            f"a line of {self._dropped:,} bytes, the limit is {self._limit:,}: it begins with {preview(head)}"
        )
        self._carry.clear()
        self._dropped = 0
        return Block(start, self._start, head, reason)
