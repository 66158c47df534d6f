"""Which records are in an object, and how they are packed, by its name."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from flowlane.errors import ConfigError, redact

Rows = Literal["csv", "jsonl"]
Packing = Literal["", "gz", "zst"]

_ROWS: Final[dict[str, Rows]] = {"csv": "csv", "jsonl": "jsonl", "json": "jsonl", "ndjson": "jsonl"}
_PACKINGS: Final[dict[str, Packing]] = {"gz": "gz", "zst": "zst"}
KNOWN: Final = "csv, jsonl (also json or ndjson), each alone or with .gz or .zst behind it"


class Kind(NamedTuple):
    """How rows are written, and how that is packed."""

    rows: Rows
    packing: Packing = ""

    def __str__(self) -> str:
        return f"{self.rows}.{self.packing}" if self.packing else self.rows


#: Each once, however many names say it.
_KINDS: Final = {
    (rows, packing): Kind(rows, packing) for rows in get_args(Rows) for packing in get_args(Packing)
}


def kind_of(url: str, given: str = "") -> Kind:
    """The kind that `given` says (``csv.gz``), or else the suffixes of the object at `url`.

    Raises:
        ConfigError: neither says one.
    """
    if not isinstance(given, str):
        raise ConfigError(f"format={given!r}: must be one of {KNOWN}")
    name = given or _path(url).rpartition("/")[2]
    kind = parse_kind("." + name.lower() if given else name.lower())
    if kind is None:
        what = f"format={given!r}" if given else f"the name of {redact(url)}"
        raise ConfigError(f"{what} does not say what rows are in it: give format=, known are {KNOWN}")
    return kind


def _path(url: str) -> str:
    """`url` without what does not name the object; only on the web is that a fragment, too."""
    if "://" not in url:
        return url
    if url.startswith(("http://", "https://")):
        return urlsplit(url).path
    return url.partition("?")[0]


def parse_kind(name: str) -> Kind | None:
    """The kind that the suffixes of `name` (in lower case) say, if they do."""
    head, _, suffix = name.rpartition(".")
    packing = _PACKINGS.get(suffix, "")
    if packing:
        _, _, suffix = head.rpartition(".") if "." in head else ("", "", "")
    rows = _ROWS.get(suffix) if "." in name else None
    return _KINDS[rows, packing] if rows else None


def stem_of(url: str) -> str:
    """The last segment of `url` without the suffixes that say its kind."""
    name = _path(url).rstrip("/").rpartition("/")[2]
    kind = parse_kind(name.lower())
    if kind is None:
        return name
    return name.rsplit(".", 2 if kind.packing else 1)[0]
