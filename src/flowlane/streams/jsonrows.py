"""JSON Lines by the block (jsonlines.org): one object per line, with the place of every one in the bytes.

No I/O and bounded memory. A line that is no JSON object is ``Bad``; a blank line is none. A body that is one
array of objects is refused as a whole, however it is spread over lines: else each line would be ``Bad``, save
that of an object without a comma behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BytesIO
from typing import Any, Final

import msgspec

from flowlane.errors import Permanent
from flowlane.ports import Bad, Record
from flowlane.state import Position
from flowlane.streams.aligned import Aligned, Stretch, shown
from flowlane.streams.cutting import Chunk, Skip
from flowlane.streams.lines import MAX_LINE
from flowlane.streams.preview import preview

_decoder: Final = msgspec.json.Decoder(dict[str, Any])
_REFUSED: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_BOM: Final = b"\xef\xbb\xbf"
#: How an array of objects begins: on one line with the first of them, or on a line of its own.
_ARRAY: Final = re.compile(rb"\[[ \t]*(?:\{|\r?(?:\n|\Z))")


class JsonRows:
    """The rows of one body from `start` on; fed from its beginning all the same (see ``CsvRows``)."""

    def __init__(self, start: Position = Position(), *, max_row: int = MAX_LINE) -> None:  # noqa: B008
        self._skip = Skip(start)
        self._row = start.row
        self._first = start.offset == 0  # line, which a byte order mark may stand before
        self._begun = start.offset > 0  # whether a line that is not blank has come
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
            Permanent: the body is an array.
            Superseded: what is passed over is not what was read before.
        """
        for stretch in self._aligned.feed(self._skip.feed(piece)):
            yield self._stretch(stretch)

    def close(self) -> Iterator[Chunk]:
        """The input has ended: the last rows.

        Raises:
            Permanent: as for ``feed``.
            Superseded: it ended before the position to start from.
        """
        self._skip.close()
        for stretch in self._aligned.close():
            yield self._stretch(stretch)

    def _stretch(self, stretch: Stretch) -> Chunk:
        first, self._first = self._first, False
        if not self._begun:
            self._begin(stretch.data.removeprefix(_BOM) if first else stretch.data)
        if stretch.kind == "lines":
            chunk = self._at_once(stretch.data)
            return self._one_by_one(stretch.data, first) if chunk is None else chunk
        bad: list[Record | Bad] = []
        if stretch.kind == "end":
            bad = [Bad(self._row, stretch.reason, stretch.raw)]
            self._row += 1
        return Chunk(stretch.data, bad, len(bad), [len(stretch.data)] * len(bad))

    def _begin(self, data: bytes) -> None:
        """Refuse the body if `data`, its first lines or a part of one that is too long, begin an array."""
        data = data.lstrip()
        self._begun = bool(data)
        if _ARRAY.match(data):
            raise Permanent(
                "it is a JSON array, and not an object on each line: convert it to JSON Lines (jq -c '.[]'): "
                f"it begins with {preview(data)}"
            )

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
