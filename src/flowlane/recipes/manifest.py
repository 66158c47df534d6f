"""What an archive's files are, and the tables that their manifests declare: pure, over bytes and names.

A file's manifest is, the first that there is:

1. its sidecar, ``<stem>.json`` in the same folder: ``{"table": "orders", "partition_key": "id"}``, where the
   table is called as the stem unless it says otherwise;
2. a ``manifest.json`` in its folder, or in one above it, that covers it. Shapes::

       {"orders.csv": {...}, "old/orders.csv": {...}}     files, by their paths from the manifest's folder
       {"files": {"orders.csv": {...}}}                   the same
       {"files": [{"file": "orders.csv", ...}]}           the same, as a list
       {"tables": [{"table": "orders", "file": "orders.csv", ...}]}       "files": [...] for several;
       {"tables": {"orders": {...}}}                      without them: the files whose stem is the table
       {"table": "orders", "partition_key": "id"}         all files: parts of one table

What ``...`` stands for is the same everywhere: ``table``, ``partition_key``, ``sort_key`` (or ``range_key``),
the type of each, ``partition_key_type`` and so on (``S``, the default, ``N`` or ``B``), or both in one,
``{"name": "id", "type": "N"}``. Other fields are ignored, save other spellings of these (``partitionKey``): a
key that is overlooked would make another table.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, Literal, get_args

import msgspec

from flowlane.errors import Permanent
from flowlane.streams.kinds import Kind, parse_kind
from flowlane.streams.zip.entry import Entry

#: What SQLite, PostgreSQL (63 bytes) and DynamoDB all take for a name.
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}", re.ASCII)
_OURS: Final = ("_flowlane", "sqlite_", "pg_")
#: The manifest of a whole archive, or folder.
WHOLE: Final = "manifest.json"
#: Entries that are sorted in one step: some 10 microseconds each.
_STEP: Final = 256
#: So many folders above a file its manifest may be.
_DEPTH: Final = 64
_LITTER: Final = frozenset({"thumbs.db", "desktop.ini"})
_BOMS: Final = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
#: Other spellings of the fields, by their letters: what somebody who wrote them has meant.
_MEANT: Final = {
    "tablename": "table",
    "partitionkey": "partition_key",
    "partitionkeytype": "partition_key_type",
    "hashkey": "partition_key",
    "hashkeytype": "partition_key_type",
    "primarykey": "partition_key",
    "primarykeytype": "partition_key_type",
    "pk": "partition_key",
    "pktype": "partition_key_type",
    "sortkey": "sort_key",
    "sortkeytype": "sort_key_type",
    "sk": "sort_key",
    "sktype": "sort_key_type",
    "rangekey": "range_key",
    "rangekeytype": "range_key_type",
}
_FIELDS: Final = frozenset(
    {"table"} | {f"{role}_key{end}" for role in ("partition", "sort", "range") for end in ("", "_type")}
)

KeyType = Literal["S", "N", "B"]


class Key(msgspec.Struct, frozen=True, omit_defaults=True):
    """A column of a table's key, and its type: text, number or bytes."""

    name: str
    type: KeyType = "S"


class Declared(msgspec.Struct, frozen=True, omit_defaults=True):
    """The table that a file's rows are for, by its manifest; names that fit the pattern, and nothing more:
    whether the lane may write there is not said by the data. ``key`` is empty where none is declared."""

    table: str
    key: tuple[Key, ...] = ()


# ---------------------------------------------------------------------- one table


def declared(fields: Any, stem: str) -> Declared:
    """The table that the object `fields` declares, called as `stem` unless it says otherwise.

    Raises:
        Permanent: it declares none, in one line that says which field is wrong.
    """
    if not isinstance(fields, dict):
        raise Permanent(f"{_shown(fields)} is no object with a table and its key")
    for name in fields:
        meant = _MEANT.get(re.sub("[^a-z]", "", name.lower()), "")
        if meant and name not in _FIELDS:
            raise Permanent(f"field {_shown(name)} is not known: write {meant}")
    table = fields.get("table", stem)
    keys = [_key(fields, "partition_key")]
    sorts = [key for key in (_key(fields, "sort_key"), _key(fields, "range_key")) if key is not None]
    if len(sorts) > 1 and sorts[0] != sorts[1]:
        raise Permanent("sort_key and range_key are two names of one thing, and differ: write one of them")
    if sorts and keys[0] is None:
        raise Permanent("it has a sort_key and no partition_key: write both")
    key = tuple(key for key in (*keys, *sorts[:1]) if key is not None)
    if len({part.name.lower() for part in key}) < len(key):
        raise Permanent(f"partition_key and sort_key are both {key[0].name!a}: they must be two columns")
    return Declared(checked(table, "table"), key)


def _key(fields: Mapping[str, Any], field: str) -> Key | None:
    """The part of the key that `field` declares; ``None`` without one."""
    name, type_ = fields.get(field), fields.get(f"{field}_type")
    if isinstance(name, dict):
        nested = name
        name = nested.get("name")
        if type_ is not None and nested.get("type", type_) != type_:
            raise Permanent(f"{field} has the type {_shown(nested.get('type'))} and {field}_type differs")
        type_ = nested.get("type", type_)
        if name is None:
            raise Permanent(f'{field} has no name: write {{"name": "id", "type": "S"}}')
    if name is None:
        if type_ is not None:
            raise Permanent(f"it has a {field}_type and no {field}: write both")
        return None
    if type_ is not None and type_ not in get_args(KeyType):
        raise Permanent(f"the type {_shown(type_)} of {field} is not known: write S, N or B")
    return Key(checked(name, field), type_ or "S")


def checked(name: Any, what: str) -> str:
    """`name`, which comes from data, if it may become an identifier.

    Raises:
        Permanent: it may not.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or name.lower().startswith(_OURS):
        raise Permanent(
            f"the {what} {_shown(name)} is no plain name: letters, digits and underscores, 63 at most, not "
            "beginning with a digit, _flowlane, sqlite_ or pg_"
        )
    return name


# ---------------------------------------------------------------------- whole manifests


def parsed(data: bytes) -> Any:
    """The JSON of a manifest, whichever Unicode encoding its byte order mark says.

    Raises:
        Permanent: it is none.
    """
    try:
        codec = next((codec for mark, codec in _BOMS if data.startswith(mark)), "")
        return msgspec.json.decode(data.decode(codec) if codec else data)
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise Permanent(f"it is no JSON ({error})") from None


class Whole:
    """A manifest of several files: what it says of each, and which it names.

    Raises:
        Permanent: it says nothing of any file.
    """

    def __init__(self, data: bytes) -> None:
        content = parsed(data)
        self.files: dict[str, Any] = {}  #: what is declared, by the file's path from the manifest's folder
        self.stems: dict[str, Any] = {}  #: by the table, for the files called so
        self.all: Any = None  #: for all files
        if not isinstance(content, dict):
            raise Permanent(f"{_shown(content)} is no object: see the shapes that a manifest may have")
        if isinstance(content.get("files"), dict | list):
            self._list(content["files"], "file")
        elif isinstance(content.get("tables"), dict | list):
            self._list(content["tables"], "table")
        elif not _FIELDS.isdisjoint(content):
            self.all = content
        else:
            self._list({name: each for name, each in content.items() if isinstance(each, dict)}, "file")
        if not self.files and not self.stems and self.all is None:
            raise Permanent("it names no file and no table: see the shapes that a manifest may have")

    def of(self, path: str, stem: str) -> Any:
        """What is declared for the file at `path` from the manifest's folder; ``None`` if nothing is."""
        own = self.files.get(path)
        return own if own is not None else self.stems.get(stem, self.all)

    def _list(self, content: dict[str, Any] | list[Any], by: Literal["file", "table"]) -> None:
        named: Iterable[tuple[str, Any]]
        if isinstance(content, dict):
            named = content.items()
        else:
            named = [(_named(fields, by), fields) for fields in content]
        for name, each in named:
            fields = dict(each) if isinstance(each, dict) else each
            if by == "file" or not isinstance(fields, dict):
                self._add(name, fields)
                continue
            if name:
                fields.setdefault("table", name)
            files = fields.get("files", [fields["file"]] if "file" in fields else [])
            if not files:
                self.stems[checked(name, "table")] = fields
            for file in files if isinstance(files, list) else [files]:
                self._add(file, fields)

    def _add(self, file: Any, fields: Any) -> None:
        if not isinstance(file, str) or not file:
            raise Permanent(f"it names {_shown(file)} as a file: write the path from its own folder")
        path = file.removeprefix("./")
        if path in self.files:
            raise Permanent(f"it names {_shown(path)} twice")
        self.files[path] = fields


def _named(fields: Any, by: str) -> str:
    """The file or the table that `fields`, one of a list, are about; empty if only its files are said."""
    if not isinstance(fields, dict):
        raise Permanent(f'it lists {_shown(fields)}: write an object, {{"{by}": ..., "partition_key": ...}}')
    if by not in fields and not fields.keys() & {"file", "files"}:
        raise Permanent(f'it lists something without "{by}": write which {by} it is about')
    return str(fields.get(by, ""))


def by_sidecar(data: bytes, sidecar: str, path: str) -> Declared:
    """What the sidecar of that name, with the content `data`, declares for the file at `path`.

    Raises:
        Permanent: nothing that can be used.
    """
    with _told(sidecar):
        return declared(parsed(data), _base(stem_of(path)))


def by_whole(whole: Whole, manifest: str, path: str) -> Declared | None:
    """What `whole`, the manifest of that name, declares for the file at `path`; ``None`` if it does not cover
    it.

    Raises:
        Permanent: nothing that can be used.
    """
    stem = stem_of(path)
    with _told(manifest):
        found = whole.of(path.removeprefix(manifest[: -len(WHOLE)]), _base(stem))
        return None if found is None else declared(found, _base(stem))


@contextmanager
def _told(manifest: str) -> Iterator[None]:
    try:
        yield
    except Permanent as error:
        raise Permanent(f"its manifest {_shown(manifest)}: {error}") from None


# ---------------------------------------------------------------------- what is in an archive


class File(msgspec.Struct, frozen=True, gc=False):
    """A data file: its sidecars (one, or what nobody could choose from), and the manifests of folders that
    may cover it, nearest first. ``format``: how its rows are to be read where its name does not say."""

    entry: Entry
    sidecars: tuple[Entry, ...] = ()
    wholes: tuple[Entry, ...] = ()
    format: str = ""


class Contents(msgspec.Struct, frozen=True):
    """What is in an archive: files of data and manifests of folders; other files; how many entries are
    directories, or files that an operating system has left."""

    files: Sequence[File]
    wholes: Sequence[Entry]
    others: Sequence[Entry]
    directories: int = 0
    litter: int = 0


def sort_out(entries: Sequence[Entry], paths: Iterable[str] = (), stems: Iterable[str] = ()) -> Contents:
    """Tell data, manifests and the rest of `entries` apart, by their names alone.

    Data is what has a suffix of data, or a sidecar, or is named by the manifest of a folder: among `paths`,
    or without its suffixes among `stems`. ``x.json`` beside ``x.csv`` is its sidecar; without such a
    neighbour it is data if it is named, and nothing if not: it may be anything.
    """
    steps = sorting_out(entries, paths, stems)
    while (found := step(steps)) is None:
        pass
    return found


def step(steps: Generator[None, None, Contents]) -> Contents | None:
    """The next one of ``sorting_out``; what it comes to, once that is known."""
    try:
        return next(steps)
    except StopIteration as end:
        contents: Contents = end.value
        return contents


def sorting_out(
    entries: Sequence[Entry], paths: Iterable[str] = (), stems: Iterable[str] = ()
) -> Generator[None, None, Contents]:
    """As ``sort_out``, in steps of some milliseconds."""
    folders = _Folders(frozenset(paths), frozenset(stems))
    directories = 0
    plain: list[Entry] = []
    for number, entry in enumerate(entries):
        if number % _STEP == 0:
            yield
        if entry.kind == "directory":
            directories += 1
        elif not _is_litter(entry.name):
            folders.add(entry)
            plain.append(entry)
    folders.complete()
    files: list[File] = []
    others: list[Entry] = []
    for number, entry in enumerate(plain):
        if number % _STEP == 0:
            yield
        found = folders.file(entry)
        if found is not None:
            files.append(found)
        elif not folders.is_manifest(entry):
            others.append(entry)
    litter = len(entries) - len(plain) - directories
    wholes = [entry for found in folders.wholes.values() for entry in found]
    return Contents(files, wholes, others, directories, litter)


class _Folders:
    """The files of an archive by folder and stem: ``add`` all of them, ``complete`` it, then ask."""

    def __init__(self, paths: frozenset[str], stems: frozenset[str]) -> None:
        self._paths = paths
        self._stems = stems
        # By path, see ``named_as_manifest``; shared by all files that they are beside. Names may repeat.
        self._json: dict[str, tuple[Entry, ...]] = {}
        self._again: dict[str, list[Entry]] = {}
        self._known: set[str] = set()  # stems (with their folders) of files whose suffix says what they are
        self._others: set[str] = set()
        self._parts: dict[str, tuple[str, Kind | None]] = {}  # stem and kind, by path
        self.wholes: dict[str, tuple[Entry, ...]] = {}  # by folder: "", or with a slash behind it

    def add(self, entry: Entry) -> None:
        path = entry.name
        stem, kind = self._parts[path] = _parted(path)
        if named := named_as_manifest(path):
            if named in self._json:
                self._again.setdefault(named, []).append(entry)
            else:
                self._json[named] = (entry,)
        elif kind is not None or path in self._paths:
            self._known.add(stem)
        else:
            self._others.add(stem)

    def complete(self) -> None:
        """All files are there: what is beside a ``manifest.*`` of data is its sidecar."""
        for path, more in self._again.items():
            self._json[path] += tuple(more)
        self.wholes = {
            path.removesuffix(WHOLE): found
            for path, found in self._json.items()
            if path.endswith(WHOLE) and _base(path) == WHOLE and not self._has_data(path)
        }

    def _has_data(self, path: str) -> bool:
        stem = path.removesuffix(".json")
        return stem in self._known or stem in self._others

    def is_manifest(self, entry: Entry) -> bool:
        """Whether it is the sidecar of a file, or the manifest of a folder."""
        named = named_as_manifest(entry.name)
        if not named or entry.name in self._paths:
            return False
        return self._has_data(named) or named.removesuffix(WHOLE) in self.wholes

    def file(self, entry: Entry) -> File | None:
        """`entry` as a file of data; ``None`` if it is none."""
        path = entry.name
        stem, kind = self._parts[path]
        is_json = bool(named_as_manifest(path))
        sidecars = () if is_json else self._json.get(f"{stem}.json", ())
        if is_json:
            is_data = path in self._paths or (stem in self._stems and not self.is_manifest(entry))
        else:
            known = sidecars or stem in self._stems
            is_data = bool(kind or path in self._paths or (known and stem not in self._known))
        if not is_data:
            return None
        above = islice(_above(path), _DEPTH) if self.wholes else ()
        wholes = tuple(self.wholes[folder][-1] for folder in above if folder in self.wholes)
        return File(entry, sidecars, wholes, "" if kind else "csv")


def _is_litter(path: str) -> bool:
    """Whether an operating system left it: it is neither data nor manifest, whatever else there is."""
    *folders, base = path.split("/")
    return "__MACOSX" in folders or base.startswith(".") or base.lower() in _LITTER


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def named_as_manifest(path: str) -> str:
    """`path`, as manifests are called, if it may be a manifest's; empty if not. Suffixes are told in any
    case, and so is ``manifest.json``."""
    folder, slash, base = path.rpartition("/")
    low = base.lower()
    if not low.endswith(".json"):
        return ""
    return folder + slash + (low if low == WHOLE else base[: -len(".json")] + ".json")


def stem_of(path: str) -> str:
    """`path` without the suffixes that say what is in it."""
    return _parted(path)[0]


def _parted(path: str) -> tuple[str, Kind | None]:
    """The stem of `path`, and the kind that its suffixes say."""
    folder, slash, base = path.rpartition("/")
    kind = parse_kind(base.lower())
    parts = base.rsplit(".", 2 if kind and kind.packing else 1)
    return folder + slash + (parts[0] or base), kind


def _above(path: str) -> Iterator[str]:
    """The folders that `path` is in, from the nearest on."""
    folder = path
    while folder:
        folder = folder.rstrip("/").rpartition("/")[0]
        folder += "/" if folder else ""
        yield folder


def _shown(value: Any) -> str:
    """`value`, which comes from data, fit for a message."""
    text = value if isinstance(value, str) else repr(value)
    return ascii(text[:80] + ("..." if len(text) > 80 else ""))
