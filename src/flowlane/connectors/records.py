"""Records in the objects of any store: opens ``file://``, ``https://``, ``s3://`` as sources and sinks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from flowlane.connectors.reading import StoreSource
from flowlane.connectors.writing import StoreSink
from flowlane.errors import ConfigError, redact
from flowlane.ports import Environment
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.kinds import kind_of

if TYPE_CHECKING:
    from flowlane.connectors.members import MemberSource
    from flowlane.streams.zip.entry import Entry, ZipLimits

Schema = Literal["evolve", "freeze", "quarantine"]

_YES: Final = frozenset({"1", "true", "yes", "on"})
_NO: Final = frozenset({"0", "false", "no", "off"})
_NAMED: Final = {"tab": "\t", "\\t": "\t", "none": "", "space": " "}
_LIMITS: Final = ("max_row", "max_field", "max_columns")


@asynccontextmanager
async def open_source(
    uri: str,
    environment: Environment,
    *,
    format: str = "",
    csv: CsvFormat | None = None,
    delimiter: str | None = None,
    quote: str | None = None,
    escape: str | None = None,
    header: str | bool | None = None,
    columns: str | Sequence[str] | None = None,
    encoding: str | None = None,
    null: str | None = None,
    member: str | None = None,
    entry: Entry | int | str | None = None,
    etag: str | None = None,
    verify: str | None = None,
    password: str | None = None,
    limits: ZipLimits | None = None,
) -> AsyncIterator[StoreSource | MemberSource]:
    """The rows of the objects at `uri`, a URL or (where the store can list) a pattern; with ``member`` (a
    name) or ``entry`` (an ``Entry``, an index or a name), of that one member of the ZIP archive at `uri`.

    What rows are in an object is said by its suffixes, or by ``format`` (``csv.gz``). ``csv`` is the dialect;
    the other options change it one by one, so that they can stand in a query: ``?delimiter=tab&header=no``.

    Of a member: ``etag`` pins the archive; ``verify="content"`` proves it before its first row goes out,
    ``"stream"`` while it is read; ``password`` (a secret reference) decrypts it; ``limits`` are those that it
    is refused by, and what all open members of this process may hold.

    Raises:
        ConfigError: an option is wrong, or the name does not say what rows are in it.
        Refused, Permanent, Damaged: as for ``open_member``, and of the archive as for ``Context.archive``.
    """
    changes = {
        "delimiter": delimiter,
        "quote": quote,
        "escape": escape,
        "header": header,
        "columns": columns,
        "encoding": encoding,
        "null": null,
    }
    form = _dialect(csv, changes)
    wanted = member if entry is None else entry
    if wanted is None:
        _refuse_of_members(etag=etag, verify=verify, password=password, limits=limits)
        yield StoreSource(await environment.connections.store(uri), environment.clock, uri, form, format)
        return
    if member is not None and entry is not None:
        raise ConfigError(f"{redact(uri)}: member= and entry= are two ways to name one: give one of them")
    from flowlane.connectors.members import open_member  # loaded by those who need it

    yield await open_member(
        uri,
        environment,
        wanted,
        etag=etag or "",
        verify="content" if verify is None else verify,
        password=password,
        limits=limits,
        format=format,
        form=form,
    )


@asynccontextmanager
async def open_sink(
    uri: str,
    environment: Environment,
    *,
    format: str = "",
    csv: CsvFormat | None = None,
    schema: Schema = "evolve",
) -> AsyncIterator[StoreSink]:
    """One object for each unit and split below `uri`, if it ends in a slash, and the one object `uri` if not.

    ``format`` says how rows are written: ``jsonl`` or ``csv``, alone or with ``.gz`` or ``.zst``; by default
    as the object's suffixes say, and in a folder ``jsonl.gz``.

    Raises:
        ConfigError: an option is wrong.
    """
    if schema not in get_args(Schema):
        raise ConfigError(f"{redact(uri)}: schema={schema!r}: must be {', '.join(get_args(Schema))}")
    kind = kind_of(uri, format or ("jsonl.gz" if uri.endswith("/") else ""))
    form = _dialect(csv, {})
    store = await environment.connections.store(uri)
    yield StoreSink(store, environment.clock, uri, kind, form, schema)


def _refuse_of_members(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name}= is about one member of an archive: name it by member= or entry=")


def _dialect(csv: CsvFormat | None, changes: Mapping[str, Any]) -> CsvFormat:
    form = CsvFormat() if csv is None else csv
    if not isinstance(form, CsvFormat):
        raise ConfigError(f"csv={form!r}: must be a CsvFormat(...)")
    given = {name: _value(name, value) for name, value in changes.items() if value is not None}
    if not given:
        return form
    return CsvFormat(**{name: getattr(form, name) for name in (*changes, *_LIMITS)} | given)


def _value(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value  # from a keyword, as ``CsvFormat`` has it
    if name == "columns":
        return [part.strip() for part in value.split(",")]
    if name == "header":
        if value.lower() not in _YES | _NO:
            raise ConfigError(f"header={value!r}: say yes or no")
        return value.lower() in _YES
    if name in ("delimiter", "quote", "escape"):
        return _NAMED.get(value.lower(), value)
    return value
