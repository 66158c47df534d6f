"""Records as bytes: JSON Lines or CSV, packed into gzip members or zstd frames.

No I/O; the same bytes for the same records every time.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from typing import Any, Final, Protocol

import msgspec
import zstandard

from flowlane.ports import Record
from flowlane.streams.dialect import CsvFormat

#: Records encoded in one go: a few milliseconds without giving way to other threads.
STEP: Final = 256

_encoder: Final = msgspec.json.Encoder()
_REFUSED: Final = (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError, csv.Error)


class Encoder(Protocol):
    """Records to lines."""

    def encode(self, records: Sequence[Record]) -> bytes:
        """All of `records`.

        Raises:
            Exception: one of ``REFUSED``; encode them one by one to see which.
        """
        ...


def encoded(encoder: Encoder, records: Sequence[Record], refused: list[tuple[int, str]]) -> Iterator[bytes]:
    """`records` as lines, a step at a time; which cannot be written, and why, is added to `refused`."""
    for first in range(0, len(records), STEP):
        some = records[first : first + STEP]
        try:
            yield encoder.encode(some)
        except _REFUSED:
            yield b"".join(_each(encoder, some, first, refused))


def _each(
    encoder: Encoder, some: Sequence[Record], first: int, refused: list[tuple[int, str]]
) -> Iterator[bytes]:
    for number, record in enumerate(some, first):
        try:
            yield encoder.encode([record])
        except _REFUSED as error:
            refused.append((number, f"cannot be written: {error}"))


class JsonLines:
    """JSON Lines; `columns`, where given, are the only ones that a record may have."""

    def __init__(self, columns: Iterable[str] | None = None) -> None:
        self._columns = None if columns is None else frozenset(columns)

    def encode(self, records: Sequence[Record]) -> bytes:
        """See ``Encoder.encode``."""
        if self._columns is not None:
            for record in records:
                only(record, self._columns)
        return _encoder.encode_lines(records)


class CsvLines:
    """CSV under a header: text in quotes, numbers and null tokens without, so that an empty text and nothing
    can be told apart (see ``CsvFormat``). Lines end with CRLF (RFC 4180, section 2)."""

    def __init__(self, form: CsvFormat, columns: Sequence[str]) -> None:
        self._form = form
        self._columns = columns
        self._known = frozenset(columns)
        self._null = _Null(form.null or "")
        self._token = form.null  # which a value must not be taken for
        self._dialect: dict[str, Any] = {
            "delimiter": form.delimiter,
            "quotechar": form.quote or None,
            "escapechar": form.escape or None,
            "quoting": csv.QUOTE_NONNUMERIC if form.quote else csv.QUOTE_NONE,
            "lineterminator": "\r\n",
        }

    def header(self) -> bytes:
        """The first line."""
        return self._lines([self._columns])

    def encode(self, records: Sequence[Record]) -> bytes:
        """See ``Encoder.encode``."""
        if not self._columns:
            raise ValueError("a record without fields")
        for record in records:
            only(record, self._known)
        return self._lines([self._cell(record.get(column)) for column in self._columns] for record in records)

    def _lines(self, rows: Iterable[Sequence[Any]]) -> bytes:
        text = StringIO(newline="")
        csv.writer(text, **self._dialect).writerows(rows)
        return text.getvalue().encode(self._form.codec)

    def _cell(self, value: Any) -> Any:
        kind = type(value)
        if kind is not str and kind is not int and kind is not float:
            if value is None:
                return self._null
            plain = msgspec.to_builtins(value)
            value = plain if isinstance(plain, str) else _encoder.encode(plain).decode()
        if self._token and str(value) == self._token:
            if not self._form.quote:
                raise ValueError(f"{self._token!a} stands for no value, and without quotes for nothing else")
            return self._token  # as text, in quotes, where it is what it says
        return value


class _Null:
    """To ``csv.writer`` a number, which it does not quote."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __float__(self) -> float:
        raise TypeError("not a number after all")

    def __str__(self) -> str:
        return self._token


def only(record: Record, columns: frozenset[str]) -> None:
    """Raises:
    ValueError: `record` has a field that is none of `columns`.
    """
    if not record.keys() <= columns:
        new = next(name for name in record if name not in columns)
        raise ValueError(f"column {new!a} is not one of those that the object began with")


class Packer(Protocol):
    """Packs one batch."""

    def feed(self, data: bytes) -> bytes: ...
    def close(self) -> bytes: ...


class _Plain:
    def feed(self, data: bytes) -> bytes:
        return data

    def close(self) -> bytes:
        return b""


class _Deflate:
    """One gzip member (RFC 1952): without name, and with the time 0, which stands for none. By zlib and not
    by isal, so that the bytes do not depend on what happens to be installed."""

    def __init__(self) -> None:
        self._packing = zlib.compressobj(6, zlib.DEFLATED, 31)

    def feed(self, data: bytes) -> bytes:
        return self._packing.compress(data)

    def close(self) -> bytes:
        return self._packing.flush()


class _Frame:
    """One zstd frame with its checksum (RFC 8878, section 3.1.1)."""

    def __init__(self) -> None:
        self._packing = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()

    def feed(self, data: bytes) -> bytes:
        return self._packing.compress(data)

    def close(self) -> bytes:
        return self._packing.flush()


def packer(packing: str) -> Packer:
    """A new member or frame of the kind `packing` (``gz``, ``zst``, or none)."""
    return _Deflate() if packing == "gz" else _Frame() if packing == "zst" else _Plain()
