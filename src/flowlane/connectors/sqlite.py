"""``sqlite:///file.db?table=t&key=id``: tables of a SQLite file as sources and sinks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, get_args

from flowlane.connectors.database import Database, path_of, quoted
from flowlane.connectors.extract import SqliteSource
from flowlane.connectors.insert import SqliteSink
from flowlane.errors import ConfigError
from flowlane.ports import Environment, TableSpec

Schema = Literal["evolve", "freeze", "quarantine"]


@asynccontextmanager
async def open_source(
    uri: str, environment: Environment, *, table: str, key: str = ""
) -> AsyncIterator[SqliteSource]:
    """The rows of `table` in the order of `key` (one column or more, with commas); see ``SqliteSource``.

    Raises:
        ConfigError: there is no such file, or a name is none.
    """
    columns = _columns(table, key)
    yield SqliteSource(environment.clock, path_of(uri), table, columns)


@asynccontextmanager
async def open_sink(
    uri: str,
    environment: Environment,
    *,
    table: str = "",
    key: str = "",
    mode: str = "",
    schema: Schema = "evolve",
    into: TableSpec | None = None,
) -> AsyncIterator[SqliteSink]:
    """Rows into `table`, which is made if it is missing; see ``SqliteSink``.

    With a `key` (one column or more, with commas) rows replace those of the same key (``mode=upsert``, the
    default then); without one they are added (``mode=append``). A lane that learns of the table from data
    says all of that by `into`, instead.

    Raises:
        ConfigError: the file cannot be written, an option is wrong, or a name is none.
    """
    if into is not None:
        table, key, mode = _said_by(uri, into, table, key, mode)
    elif not table:
        raise ConfigError(f"{uri}: names no table: add ?table=")
    columns = _columns(table, key)
    if mode not in ("", "append", "upsert"):
        raise ConfigError(f"{uri}: mode={mode!r}: must be append or upsert")
    if mode == "upsert" and not columns:
        raise ConfigError(f"{uri}: mode=upsert needs a key=")
    if mode == "append" and columns:
        raise ConfigError(f"{uri}: mode=append has no use for key={key}: leave it out, or use mode=upsert")
    if schema not in get_args(Schema):
        raise ConfigError(f"{uri}: schema={schema!r}: must be {', '.join(get_args(Schema))}")
    types = into.types if into else ()
    spec = TableSpec(table, columns, "upsert" if columns else "append", schema, types)
    database = await Database.open(environment.clock, path_of(uri), write=True)
    try:
        yield SqliteSink(database, spec)
    finally:
        await database.close()


def _said_by(uri: str, into: TableSpec, *given: str) -> tuple[str, str, str]:
    """What `into` says, as the options that say it otherwise, none of which may be `given` too."""
    if any(given):
        raise ConfigError(
            f"{uri}: names a table, key or mode, and so does the lane: leave them out of the URI"
        )
    if into.mode == "upsert":
        return into.name, ",".join(into.key), "upsert"
    return into.name, "", "append"


def _columns(table: str, key: str) -> tuple[str, ...]:
    quoted(table, "table", ConfigError)
    columns = tuple(name.strip() for name in key.split(",")) if key else ()
    for name in columns:
        quoted(name, "key column", ConfigError)
    if len({name.lower() for name in columns}) < len(columns):
        raise ConfigError(f"key={key}: names a column twice")
    return columns
