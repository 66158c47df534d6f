"""Cutting decoded bytes into stretches of whole lines, without losing sight of the lines that are too long.

Every byte comes out once and in order, those of a line that is too long too: the running checksum needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from flowlane.streams.preview import preview

_HEAD: Final = 1000


class Stretch(NamedTuple):
    """``lines``: whole lines; ``long``: a part of a line that is too long; ``end``: the last part of one,
    with what is to be said of it."""

    kind: Literal["lines", "long", "end"]
    data: bytes
    reason: str = ""
    raw: str = ""


class Aligned:
    """Cuts pieces into stretches. Only ``\\n`` ends a line, and stays with it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._carry = bytearray()  # of the line that is not complete yet
        self._long = 0  # bytes handed out of a line that is too long
        self._head = b""  # of that line

    def feed(self, piece: bytes) -> Iterator[Stretch]:
        """The stretches that `piece` completes; use them up before feeding the next one."""
        at = 0
        while at < len(piece):
            if self._long:
                end = piece.find(b"\n", at) + 1
                yield self._more(piece[at : end or len(piece)], ended=end > 0)
                at = end or len(piece)
                continue
            # Up to the last line end within the limit, every line is short enough.
            room = self._limit - len(self._carry)
            cut = piece.rfind(b"\n", at, at + room) + 1
            if cut:
                yield Stretch("lines", self._whole(piece[at:cut]))
                at = cut
            elif len(piece) - at <= room:
                self._carry += piece[at:]
                return
            else:
                yield self._begin(piece[at : at + room])
                at += room

    def close(self) -> Iterator[Stretch]:
        """The last line, if it has no line end."""
        if self._long:
            yield self._more(b"", ended=True)
        elif self._carry:
            yield Stretch("lines", self._whole(b""))

    def _whole(self, data: bytes) -> bytes:
        if self._carry:
            data = bytes(self._carry) + data
            self._carry.clear()
        return data

    def _begin(self, data: bytes) -> Stretch:
        whole = self._whole(data)
        self._long = len(whole)
        self._head = whole[:_HEAD]
        return Stretch("long", whole)

    def _more(self, data: bytes, *, ended: bool) -> Stretch:
        self._long += len(data)
        self._head += data[: _HEAD - len(self._head)]
        if not ended:
            return Stretch("long", data)
        reason = f"a line of {self._long:,} bytes, the limit is {self._limit:,}: {preview(self._head)}"
        self._long = 0
        return Stretch("end", data, reason, shown(self._head))


def shown(raw: bytes) -> str:
    """What `raw` looked like, for the quarantine: its beginning, readable whatever it is."""
    return raw[:_HEAD].decode("utf-8", "backslashreplace")
