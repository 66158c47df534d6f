"""CSV by the block: RFC 4180 as Python's ``csv`` module reads it, with the place of every row in the bytes.

No I/O and bounded memory. Rows are parsed by the C module, a stretch of whole lines at a time. Where each row
takes one line, which the module itself tells, their places are those of the lines; only where it does not, or
where something is wrong, is the stretch gone through row by row. Nothing depends on how the input was cut:

* A row that is malformed, ragged or not in the encoding is ``Bad``, from its first line to where the module
  gave up; the next line begins the next row.
* A row that goes on for more than ``max_row`` bytes, or beyond the end of the input, has a quote that is not
  closed: its first line alone is ``Bad``, and the line behind it begins the next row.
* A blank line is no row.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from io import BytesIO, StringIO
from itertools import accumulate, chain
from typing import Any, Final, NoReturn

from flowlane.errors import Damaged, Permanent
from flowlane.ports import Bad, Record
from flowlane.state import Position
from flowlane.streams.aligned import Aligned, Stretch, shown
from flowlane.streams.cutting import Chunk, Skip
from flowlane.streams.dialect import CsvFormat, check_names
from flowlane.streams.nulls import Nulls
from flowlane.streams.preview import preview

_BOM: Final = b"\xef\xbb\xbf"
_UTF16: Final = (b"\xff\xfe", b"\xfe\xff")  # its byte order marks
_SURROGATE: Final = re.compile("[\udc80-\udcff]")
#: What the module says of a CR within a field, with an advice (another one from Python 3.13 on) for those who
#: call it; and what is said here.
_CR_SAID: Final = re.compile("new-line character seen in unquoted field.*")
_CR: Final = "a CR within a field that is not quoted: quote it, or end lines with LF"


class _More(Exception):
    """The module asks for another line than there are."""


class _End:
    """Follows the last line: so the module does not take the end of a stretch for that of the input."""

    def __iter__(self) -> _End:
        return self

    def __next__(self) -> NoReturn:
        raise _More


class CsvRows:
    """The rows of one CSV body from `start` on; the body is fed from its beginning all the same, because its
    header is there, and because what is passed over is checked."""

    def __init__(self, form: CsvFormat, start: Position = Position()) -> None:  # noqa: B008 - a constant
        self._form = form
        self._skip = Skip(start)
        self._row = start.row
        self._prologue: bytearray | None = bytearray()  # what was fed while the header is not complete
        self._columns: tuple[str, ...] = tuple(form.columns or ())
        self._aligned = Aligned(form.max_row)
        self._open = bytearray()  # lines of a row that is not complete yet
        self._patience = 0  # how long that may become before it is parsed again
        self._bounded = form.max_field >= form.max_row  # fields need no look of their own
        self._nulls = Nulls(form)
        if csv.field_size_limit() < form.max_row:
            csv.field_size_limit(form.max_row)  # the module knows one limit for all: raised, never lowered

    @property
    def skipping(self) -> bool:
        """Whether the position to start from is still ahead."""
        return self._skip.active

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns' names, once the header was read."""
        return self._columns

    @property
    def ready(self) -> bool:
        """Whether the beginning, which a position behind it may be gone on from by ``jump``, was read."""
        return self._prologue is None

    def jump(self) -> None:
        """What is fed next begins at the position to start from: what is before it was not fed, and whoever
        feeds answers for it. Only once ``ready`` and while ``skipping``."""
        self._skip = Skip(Position())

    def feed(self, piece: bytes) -> Iterator[Chunk]:
        """The rows that `piece` completes, and the bytes before them; use them up before the next piece.

        Raises:
            Permanent: the header is no header.
            Superseded: what is passed over is not what was read before.
        """
        if self._prologue is not None:
            self._prologue += piece
            yield from self._begin(last=False)
        else:
            yield from self._rest(piece)

    def close(self) -> Iterator[Chunk]:
        """The input has ended: the last rows.

        Raises:
            Damaged: there is not even a header.
            Permanent, Superseded: as for ``feed``.
        """
        if self._prologue is not None:
            yield from self._begin(last=True)
        self._skip.close()
        for stretch in self._aligned.close():
            yield from self._stretch(stretch)
        yield from self._lines(b"", last=True)

    # ------------------------------------------------------------------ the beginning

    def _begin(self, *, last: bool) -> Iterator[Chunk]:
        assert self._prologue is not None
        held = bytes(self._prologue)
        end = self._header_end(held, last)
        if end < 0:
            return
        self._prologue = None
        if not self._skip.active:
            yield Chunk(held[:end], [])
            held = held[end:]
        yield from self._rest(held)

    def _header_end(self, held: bytes, last: bool) -> int:
        """Where the byte order mark and the header in `held` end; -1: not in it."""
        mark = len(_BOM) if self._form.utf8 and held.startswith(_BOM) else 0
        if not last and self._form.utf8 and any(m != held and m.startswith(held) for m in (_BOM, *_UTF16)):
            return -1
        if self._form.utf8 and held.startswith(_UTF16):
            # To UTF-8 it is mostly NULs and ASCII: without a header to look at, they would do as values.
            raise Permanent(f"it is UTF-16: convert it to UTF-8: {preview(held)}")
        if not self._form.header:
            return mark
        whole = len(held) if last else held.rfind(b"\n") + 1
        data = held[mark:whole]
        end = self._read_header(data)
        if (len(held) if end is None else mark + end) > self._form.max_row:
            raise Permanent(f"no end of its CSV header within {self._form.max_row:,} bytes: {preview(held)}")
        if end is not None:
            return mark + end
        if not last:
            return -1
        if data.strip():
            raise Permanent(f"its CSV header does not end: {preview(data)}")
        raise Damaged("it is empty: there is not even a CSV header")

    def _read_header(self, data: bytes) -> int | None:
        lines = StringIO(data.decode(self._form.codec, "surrogateescape"), newline="\n")
        reader = csv.reader(chain(lines, _End()), **self._form.reading)
        row: list[str] = []
        try:
            while not row:
                row = next(reader)
        except _More:
            return None
        except csv.Error as error:
            if b"\r" in data and b"\n" not in data:
                raise Permanent(f"its lines end with CR alone: convert them to LF: {preview(data)}") from None
            raise Permanent(f"its CSV header is malformed ({error}): {preview(data)}") from None
        if any("\0" in name for name in row):
            raise Permanent(f"its CSV header is UTF-16, or no text: convert it to UTF-8: {preview(data)}")
        if any(map(_SURROGATE.search, row)):
            raise Permanent(
                f"its CSV header is not {self._form.encoding}: say what it is in encoding= of its CsvFormat: "
                f"{preview(data)}"
            )
        if not self._columns:
            check_names(row, self._form.max_columns, Permanent)
            self._columns = tuple(row)
        elif len(row) != len(self._columns):
            raise Permanent(
                f"its CSV header has {len(row)} columns, columns= names {len(self._columns)}: {preview(data)}"
            )
        return sum(map(len, BytesIO(data).readlines()[: reader.line_num]))

    # ------------------------------------------------------------------ the rows

    def _rest(self, piece: bytes) -> Iterator[Chunk]:
        for stretch in self._aligned.feed(self._skip.feed(piece)):
            yield from self._stretch(stretch)

    def _stretch(self, stretch: Stretch) -> Iterator[Chunk]:
        if stretch.kind == "lines":
            yield from self._lines(stretch.data, last=False)
            return
        yield from self._lines(b"", last=True)  # no row goes on through a line that is too long
        bad: list[Record | Bad] = []
        if stretch.kind == "end":
            bad = [Bad(self._row, stretch.reason, stretch.raw)]
            self._row += 1
        yield Chunk(stretch.data, bad, len(bad), [len(stretch.data)] * len(bad))

    def _lines(self, data: bytes, *, last: bool) -> Iterator[Chunk]:
        """Parse `data`, whole lines behind those of the row that is open; ``last``: that goes on no more."""
        chunk = None
        if self._open:
            self._open += data
            if len(self._open) < self._patience and not last:
                return
            data = bytes(self._open)
            self._open.clear()
        elif data:
            chunk = self._at_once(data) if data.strip(b"\r\n") else Chunk(data, [])
        if chunk is None and data:
            chunk, used = self._one_by_one(data, last)
            self._open += data[used:]
            self._patience = min(2 * len(self._open), self._form.max_row + 1)
        if chunk is not None and chunk.data:
            yield chunk

    def _at_once(self, data: bytes) -> Chunk | None:
        """The rows of `data` if each is one good line; ``None``: look closer."""
        form, null = self._form, self._form.null
        if null is not None and self._nulls.quoted_in(data):
            if self._nulls.plain_in(data):
                return None
            null = None
        try:
            reader = csv.reader(StringIO(data.decode(form.codec), newline="\n"), **form.reading)
            items = self._records(reader, null)
        except (csv.Error, UnicodeDecodeError, ValueError):
            return None  # the module is strict: a row without an end is an error; a ragged one is to zip
        if reader.line_num != len(items):
            return None
        self._row += len(items)
        return Chunk(data, items)

    def _records(self, reader: Any, null: str | None) -> list[Record | Bad]:
        columns = self._columns
        if not self._bounded:
            reader = map(self._narrow, reader)
        if null is None:
            return [dict(zip(columns, row, strict=True)) for row in reader]
        return [
            dict(zip(columns, [None if v == null else v for v in row] if null in row else row, strict=True))
            for row in reader
        ]

    def _one_by_one(self, data: bytes, last: bool) -> tuple[Chunk, int]:
        """The rows of `data`, and how much of it they and the blank lines among them take."""
        ends = [0, *accumulate(map(len, BytesIO(data)))]  # of the lines
        text = data.decode(self._form.codec, "surrogateescape")
        lines = list(StringIO(text, newline="\n"))
        columns, null, width = self._columns, self._form.null, len(self._columns)
        sound = text.isascii() or not _SURROGATE.search(text)
        items: list[Record | Bad] = []
        places: list[int] = []
        bad = used = 0
        for first, after, row, wrong in self._found(lines, ends, last):
            used = ends[after]
            if not row and not wrong:
                continue  # blank
            if not wrong and (len(row) != width or not sound or not self._bounded):
                wrong = self._fault(row, "".join(lines[first:after]))  # noqa: PLW2901 - what is wrong now
            places.append(used)
            if wrong:
                bad += 1
                items.append(Bad(self._row + len(items), wrong, shown(data[ends[first] : used])))
            elif null is not None and null in row:
                items.append(self._with_nulls(row, "".join(lines[first:after])))
            else:
                items.append(dict(zip(columns, row, strict=True)))
        self._row += len(items)
        return Chunk(data[:used], items, bad, places), used

    def _found(
        self, lines: list[str], ends: list[int], last: bool
    ) -> Iterator[tuple[int, int, list[str], str]]:
        """The rows in `lines`: the first line of each, the one behind it, its fields, and what is wrong."""
        at, limit = 0, self._form.max_row
        while at < len(lines):
            base, overlong = at, False
            reader = csv.reader(chain(lines[base:] if base else lines, _End()), **self._form.reading)
            while not overlong:
                first, row, wrong = at, [], ""
                try:
                    row = next(reader)
                except _More:
                    overlong = True
                except csv.Error as error:
                    wrong = _CR_SAID.sub(_CR, str(error))
                at = base + reader.line_num
                size = ends[at] - ends[first]
                if overlong and (first == at or (not last and size <= limit)):
                    return
                if overlong or size > limit:
                    overlong = True
                    at = first + 1
                    wrong = (
                        f"a row begins here that does not end (within {limit:,} bytes): is a quote left open?"
                    )
                yield first, at, row, wrong

    def _with_nulls(self, row: list[str], text: str) -> Record:
        null = self._form.null
        if self._nulls.quoted_in(text):
            told = self._nulls.quoted_fields(text)
            values = [None if v == null and not t else v for v, t in zip(row, told, strict=True)]
        else:
            values = [None if v == null else v for v in row]
        return dict(zip(self._columns, values, strict=True))

    def _fault(self, row: Sequence[str], text: str) -> str:
        if len(row) != len(self._columns):
            return f"{len(row)} fields, there are {len(self._columns)} columns"
        if not text.isascii() and _SURROGATE.search(text):
            return f"not {self._form.encoding}"
        longest = max(map(len, row))
        if longest > self._form.max_field:
            return f"a field of {longest:,} characters, the limit is {self._form.max_field:,}"
        return ""

    def _narrow(self, row: list[str]) -> list[str]:
        if row and max(map(len, row)) > self._form.max_field:
            raise ValueError("a field is longer than the limit")
        return row
