"""JSON Lines by the block (jsonlines.org): one object per line, with the place of every one in the bytes.

No I/O and bounded memory. A line that is no JSON object is ``Bad``; a blank line is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any, Final

import msgspec

from flowlane.ports import Bad, Record
from flowlane.state import Position
from flowlane.streams.aligned import Aligned, Stretch, shown
from flowlane.streams.cutting import Chunk, Skip
from flowlane.streams.lines import MAX_LINE

_decoder: Final = msgspec.json.Decoder(dict[str, Any])
_REFUSED: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_BOM: Final = b"\xef\xbb\xbf"


class JsonRows:
    """The rows of one body from `start` on; fed from its beginning all the same (see ``CsvRows``)."""

    def __init__(self, start: Position = Position(), *, max_row: int = MAX_LINE) -> None:  # noqa: B008
        self._skip = Skip(start)
        self._row = start.row
        self._first = start.offset == 0  # line, which a byte order mark may stand before
        self._aligned = Aligned(max_row)

    @property
    def skipping(self) -> bool:
        """Whether the position to start from is still ahead."""
        return self._skip.active

    @property
    def ready(self) -> bool:
        """As ``CsvRows.ready``: there is no header to read."""
        return True

    def jump(self) -> None:
        """As ``CsvRows.jump``."""
        self._skip = Skip(Position())

    def feed(self, piece: bytes) -> Iterator[Chunk]:
        """The rows that `piece` completes; use them up before the next piece.

        Raises:
            Superseded: what is passed over is not what was read before.
        """
        for stretch in self._aligned.feed(self._skip.feed(piece)):
            yield self._stretch(stretch)

    def close(self) -> Iterator[Chunk]:
        """The input has ended: the last rows.

        Raises:
            Superseded: it ended before the position to start from.
        """
        self._skip.close()
        for stretch in self._aligned.close():
            yield self._stretch(stretch)

    def _stretch(self, stretch: Stretch) -> Chunk:
        first, self._first = self._first, False
        if stretch.kind == "lines":
            chunk = self._at_once(stretch.data)
            return self._one_by_one(stretch.data, first) if chunk is None else chunk
        bad: list[Record | Bad] = []
        if stretch.kind == "end":
            bad = [Bad(self._row, stretch.reason, stretch.raw)]
            self._row += 1
        return Chunk(stretch.data, bad, len(bad), [len(stretch.data)] * len(bad))

    def _at_once(self, data: bytes) -> Chunk | None:
        """The rows of `data` if each of its lines is one object; ``None``: look closer.

        The decoder itself would take two objects on a line, or one over two. But where every line begins
        with ``{`` and ends with ``}``, no object goes on from one line into the next (``} {`` stands in
        none), so that as many objects as lines are one in each.
        """
        count = data.count(b"\n") + (not data.endswith(b"\n"))
        end = b"}\r\n" if data.endswith(b"\r\n") else b"}\n" if data.endswith(b"\n") else b"}"
        if not data.startswith(b"{") or not data.endswith(end):
            return None
        if max(data.count(b"}\n{"), data.count(b"}\r\n{")) != count - 1:
            return None
        try:
            items = _decoder.decode_lines(data)
        except _REFUSED:
            return None
        if len(items) != count:
            return None
        self._row += count
        return Chunk(data, items)  # type: ignore[arg-type]  # a list of records is not written to

    def _one_by_one(self, data: bytes, first: bool) -> Chunk:
        items: list[Record | Bad] = []
        places: list[int] = []
        at = bad = 0
        for line in BytesIO(data):
            at += len(line)
            text = line.removeprefix(_BOM) if first else line
            first = False
            if text.strip():
                item = self._item(text)
                bad += isinstance(item, Bad)
                items.append(item)
                places.append(at)
        return Chunk(data, items, bad, places)

    def _item(self, line: bytes) -> Record | Bad:
        number = self._row
        self._row += 1
        try:
            return _decoder.decode(line)
        except msgspec.ValidationError as error:
            return Bad(number, f"not a JSON object: {error}", shown(line))
        except _REFUSED as error:
            return Bad(number, f"not JSON: {error}", shown(line))
