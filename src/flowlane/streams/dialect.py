"""How a CSV file is written: what RFC 4180 leaves open, and what may not be guessed."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from flowlane.errors import ConfigError

#: A row may be this long, in bytes: the longest stretch that is parsed in one go and held whole.
MAX_ROW: Final = 4 << 20

_FORBIDDEN: Final = frozenset("\r\n\0")


@dataclass(frozen=True)
class CsvFormat:
    """A CSV dialect. RFC 4180 by default: commas, double quotes (doubled inside a quoted field, which may
    hold line ends), a header, CRLF or LF.

    ``columns`` names the columns where there is no header, and renames them where there is one. A field that
    equals ``null`` and is not quoted is ``None`` (``null=None``: there is no such token); as PostgreSQL's
    ``COPY ... CSV`` has it, ``""`` in quotes is the empty text. ``quote=""``: quotes are characters like any
    other. ``escape``, where given, takes its meaning from the character behind it.

    Raises:
        ConfigError: the dialect contradicts itself, or its encoding has no fixed place for commas and lines.
    """

    delimiter: str = ","
    quote: str = '"'
    header: bool = True
    columns: Sequence[str] | None = None
    encoding: str = "utf-8"
    null: str | None = ""
    escape: str = ""
    max_row: int = MAX_ROW  #: bytes
    max_field: int = MAX_ROW  #: characters
    max_columns: int = 4096
    reading: dict[str, Any] = field(init=False, repr=False, compare=False)  #: for ``csv.reader``

    def __post_init__(self) -> None:
        _check_encoding(self.encoding)
        self._check_characters()
        if self.columns is not None:
            if isinstance(self.columns, str) or not isinstance(self.columns, Sequence):
                raise ConfigError(f"CSV columns={self.columns!r}: must be a list of names")
            object.__setattr__(self, "columns", tuple(self.columns))
            check_names(self.columns, self.max_columns, ConfigError)
        elif not self.header:
            raise ConfigError("a CSV without a header needs columns=[...]")
        for name in ("max_row", "max_field", "max_columns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"CSV {name}={getattr(self, name)!r}: must be at least 1")
        object.__setattr__(self, "reading", self._reading())

    def _check_characters(self) -> None:
        given: list[tuple[str, Any]] = [
            ("delimiter", self.delimiter),
            ("quote", self.quote),
            ("escape", self.escape),
        ]
        used: dict[str, str] = {}
        for name, value in given:
            if value == "" and name != "delimiter":
                continue
            if not isinstance(value, str) or len(value) != 1 or not value.isascii() or value in _FORBIDDEN:
                raise ConfigError(f"CSV {name}={value!r}: must be one ASCII character, and no line end")
            if value in used:
                raise ConfigError(f"CSV {name}={value!r}: is the {used[value]} already")
            used[value] = name
        if not isinstance(self.null, str | None):
            raise ConfigError(f"CSV null={self.null!r}: must be a text, or None")
        try:
            (self.null or "").encode(self.codec)
        except UnicodeEncodeError:
            raise ConfigError(f"CSV null={self.null!a}: cannot be written in {self.encoding}") from None
        for character in self.null or "":
            if character in used or character in _FORBIDDEN:
                raise ConfigError(f"CSV null={self.null!r}: must be free of {character!r}, which means more")

    def _reading(self) -> dict[str, Any]:
        return {
            "delimiter": self.delimiter,
            "quotechar": self.quote or None,
            "quoting": csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            "escapechar": self.escape or None,
            "doublequote": True,
            "strict": True,  # what follows a closing quote must be a delimiter or the row's end
        }

    @property
    def utf8(self) -> bool:
        """Whether a byte order mark may stand at the beginning (Unicode 15.0, section 23.8)."""
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")

    @property
    def codec(self) -> str:
        """The encoding without its byte order mark, which the parser takes off itself."""
        return "utf-8" if self.utf8 else self.encoding


def check_names(names: Sequence[object], limit: int, error: type[Exception]) -> None:
    """Raises:
    Exception: as `error` says: a name is empty or there twice, or there are more than `limit`.
    """
    if len(names) > limit:
        raise error(f"{len(names):,} columns, the limit is {limit:,}")
    seen: set[object] = set()
    for number, name in enumerate(names, 1):
        if not isinstance(name, str) or not name.strip():
            raise error(f"column {number} has no name: name the columns with columns=[...]")
        if name in seen:
            raise error(f"two columns are called {name!a}: name the columns with columns=[...]")
        seen.add(name)


def _check_encoding(name: Any) -> None:
    """Only encodings in which an ASCII byte is always that character: rows are found in bytes."""
    try:
        codec = codecs.lookup(name if isinstance(name, str) else "")
        if codec.name in ("utf-8", "utf-8-sig"):
            return
        plain = bytes(range(128)).decode(codec.name)
        whole = bytes(range(256)).decode(codec.name, "replace")
    except UnicodeDecodeError:
        plain = whole = ""
    except (LookupError, ValueError):
        raise ConfigError(f"CSV encoding={name!r}: there is no such encoding") from None
    if [ord(c) for c in plain] != list(range(128)) or len(whole) != 256:
        raise ConfigError(
            f"CSV encoding={name!r}: only UTF-8 and encodings of one byte per character can be cut into "
            "rows: convert the file"
        )
