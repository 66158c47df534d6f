"""Records in the objects of any store: opens ``file://``, ``https://``, ``s3://`` as sources and sinks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, get_args

from flowlane.connectors.reading import StoreSource
from flowlane.connectors.writing import StoreSink
from flowlane.errors import ConfigError, redact
from flowlane.ports import Environment
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.kinds import kind_of

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
) -> AsyncIterator[StoreSource]:
    """The rows of the objects at `uri`, a URL or (where the store can list) a pattern.

    What rows are in an object is said by its suffixes, or by ``format`` (``csv.gz``). ``csv`` is the dialect;
    the other options change it one by one, so that they can stand in a query: ``?delimiter=tab&header=no``.

    Raises:
        ConfigError: an option is wrong, or the name does not say what rows are in it.
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
    source = StoreSource(
        await environment.connections.store(uri), environment.clock, uri, _dialect(csv, changes), format
    )
    yield source


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
