"""``sqlite:///file.db?table=t&key=id``: tables of a SQLite database as sources and sinks.

The sink is transactional: a batch's rows, its position and the writer's token are one transaction, so a batch
is in the table once however often it is written, and a writer that was overtaken writes nothing more. They
stand in ``_flowlane_position``, beside the tables.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec

from flowlane.errors import ConfigError, Fenced, Permanent, Retryable
from flowlane.ports import Bad, Batch, Cut, Environment, Record, Split, TableSpec, UnitRef, Writer
from flowlane.state import Position

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_BUSY_SECONDS = 30.0
_PAGE = 1000
_GENERATION = "_flowlane_generation"
#: What a single row may be refused for; the others of its batch go on.
_REFUSED = (
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    sqlite3.DataError,
    OverflowError,
    UnicodeEncodeError,
    TypeError,
)
_POSITIONS = """
CREATE TABLE IF NOT EXISTS _flowlane_position (
    target TEXT, unit TEXT, split TEXT, token INTEGER,
    start INTEGER, row INTEGER, offset INTEGER, refused BLOB,
    PRIMARY KEY (target, unit)
) WITHOUT ROWID"""
T = TypeVar("T")


class _Database:
    """One connection in one thread of its own: SQLite has one writer, and the loop has none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flowlane-sqlite-table")
        self._connection: sqlite3.Connection | None = None

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` on the connection, in its thread; a cancelled caller waits until it is through, so that
        nobody finds a transaction half done."""
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._thread, self._guarded, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            with suppress(Exception):
                await running
            raise

    def _guarded(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._connection is None:
                self._connection = self._connect()
            return work(self._connection)
        except sqlite3.OperationalError as error:
            self._roll_back()
            if "locked" in str(error) or "busy" in str(error) or "full" in str(error):
                raise Retryable(f"{self.path}: {error}") from None
            raise ConfigError(f"cannot use {self.path}: {error}") from None
        except sqlite3.DatabaseError as error:
            self._roll_back()
            raise ConfigError(f"cannot use {self.path}: {error}") from None
        except BaseException:
            self._roll_back()
            raise

    def _connect(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder of {self.path}: {error.strerror}") from None
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    def _roll_back(self) -> None:
        if self._connection is not None and self._connection.in_transaction:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")

    async def close(self) -> None:
        """Close the connection and end the thread."""
        if self._connection is not None:
            await self.run(lambda connection: connection.close())
        self._thread.shutdown(wait=False)


@asynccontextmanager
async def _opened(uri: str) -> AsyncIterator[_Database]:
    path = unquote(uri.removeprefix("sqlite:///"))
    if not path or "\0" in path:
        raise ConfigError(
            f"{uri!r} names no file: write sqlite:///relative/path.db or sqlite:////absolute/path.db"
        )
    database = _Database(Path(path))
    try:
        yield database
    finally:
        await database.close()


def _identifier(name: str, what: str) -> str:
    """`name`, quoted, if it is one that any database would take."""
    if not _NAME.fullmatch(name) or name.startswith("_flowlane"):
        raise Permanent(
            f"{what} {name!r:.80} is no plain name (letters, digits, underscores): rename it in a map"
        )
    return f'"{name}"'


# --------------------------------------------------------------------------- source


@asynccontextmanager
async def open_source(
    uri: str, environment: Environment, *, table: str, key: str = ""
) -> AsyncIterator[SqliteSource]:
    """The rows of `table`, in the order of `key` (comma-separated columns); without one they come in that of
    their row ids and cannot be read in the same order twice."""
    async with _opened(uri) as database:
        yield SqliteSource(uri, database, table, tuple(filter(None, key.split(","))))


class SqliteSource:
    """See ``ports.Source``. One split: the table, as it stands when it is read."""

    def __init__(self, uri: str, database: _Database, table: str, key: tuple[str, ...]) -> None:
        self._uri = uri
        self._database = database
        self._table = _identifier(table, "table")
        self._order = ", ".join(_identifier(column, "key column") for column in key) or "rowid"
        self._replayable = bool(key)

    async def splits(self) -> AsyncGenerator[Split]:
        """See ``Source.splits``."""
        yield Split(id=self._table.strip('"'), url=self._uri, replayable=self._replayable)

    async def read(self, split: Split, position: Position, cut: Cut) -> AsyncGenerator[Batch]:
        """See ``Source.read``. ``offset`` counts rows, as ``row`` does."""
        cursor = await self._database.run(lambda connection: self._select(connection, position.row))
        names = [column[0] for column in cursor.description]
        batch = Batch([], position, position, [])
        try:
            while rows := await self._database.run(lambda _: cursor.fetchmany(_PAGE)):
                for row in rows:
                    batch.records.append(dict(zip(names, row, strict=True)))
                    batch.size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
                    if len(batch.records) >= cut.rows or batch.size >= cut.size:
                        yield _ended(batch)
                        batch = Batch([], batch.end, batch.end, [])
            if batch.records:
                yield _ended(batch)
        finally:
            await self._database.run(lambda _: cursor.close())

    def _select(self, connection: sqlite3.Connection, skip: int) -> sqlite3.Cursor:
        # The identifiers have passed _identifier; SQLite has no parameters for them.
        query = f"SELECT * FROM {self._table} ORDER BY {self._order} LIMIT -1 OFFSET ?"  # noqa: S608
        return connection.execute(query, (skip,))


def _ended(batch: Batch) -> Batch:
    row = batch.start.row + len(batch.records)
    batch.end = Position(row, row)
    return batch


# --------------------------------------------------------------------------- sink


@asynccontextmanager
async def open_sink(
    uri: str,
    environment: Environment,
    *,
    table: str,
    key: str = "",
    mode: str = "",
    schema: str = "evolve",
) -> AsyncIterator[SqliteSink]:
    """Rows into `table`, made if it is missing; with a `key` (comma-separated columns) they replace rows of
    the same key (``mode=upsert``, the default then), without one they are added."""
    columns = tuple(filter(None, key.split(",")))
    chosen = mode or ("upsert" if columns else "append")
    if chosen not in ("append", "upsert") or (chosen == "upsert" and not columns):
        raise ConfigError(f"{uri}: mode={mode!r} must be append, or upsert with a key=")
    if schema not in ("evolve", "freeze", "quarantine"):
        raise ConfigError(f"{uri}: schema={schema!r} must be evolve, freeze or quarantine")
    _identifier(table, "table")
    for column in columns:
        _identifier(column, "key column")
    spec = msgspec.convert({"name": table, "key": columns, "mode": chosen, "schema": schema}, TableSpec)
    async with _opened(uri) as database:
        yield SqliteSink(database, spec)


class SqliteSink:
    """See ``ports.Sink``."""

    def __init__(self, database: _Database, spec: TableSpec) -> None:
        self._database = database
        self._spec = spec

    def open(self, split: Split, unit: UnitRef, resume: str = "") -> AbstractAsyncContextManager[Writer]:
        """See ``Sink.open``; the position stands in the database, so there is nothing to resume by."""
        return self._open(split, unit)

    @asynccontextmanager
    async def _open(self, split: Split, unit: UnitRef) -> AsyncIterator[Writer]:
        writer = SqliteWriter(self._database, self._spec, split, unit)
        await writer.claim()
        yield writer


class SqliteWriter:
    """See ``ports.Writer``."""

    def __init__(self, database: _Database, spec: TableSpec, split: Split, unit: UnitRef) -> None:
        self._database = database
        self._table = _Table(spec, unit.generation)
        self._split = split
        self._unit = unit
        self._position: Position | None = None
        self._who = (spec.name, unit.stream)

    @property
    def position(self) -> Position | None:
        """See ``Writer.position``."""
        return self._position

    @property
    def resume(self) -> str:
        """See ``Writer.resume``: the database knows."""
        return ""

    async def claim(self) -> None:
        """Put the token down before anything is read: from now on earlier attempts are refused."""
        await self._database.run(self._claim)

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """See ``Writer.write``."""
        return await self._database.run(lambda connection: self._write(connection, batch))

    async def finish(self) -> None:
        """See ``Writer.finish``: every batch is visible already."""

    def _claim(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_POSITIONS)
        self._hold(connection)
        connection.execute("COMMIT")

    def _hold(self, connection: sqlite3.Connection) -> tuple[int, int, bytes] | None:
        """Refuse, or write the token down; where this split stands: start and end row of its last batch, and
        what was refused of that."""
        found = connection.execute(
            "SELECT token, split, start, row, offset, refused FROM _flowlane_position "
            "WHERE target = ? AND unit = ?",
            self._who,
        ).fetchone()
        token = self._unit.token
        if found is None:
            connection.execute(
                "INSERT INTO _flowlane_position (target, unit, split, token, start, row, offset) "
                "VALUES (?, ?, ?, ?, 0, 0, 0)",
                (*self._who, self._split.id, token),
            )
            return None
        if found[0] > token:
            raise Fenced(f"{self._unit.stream}: attempt {found[0]} writes to {self._who[0]} now, not {token}")
        connection.execute(
            "UPDATE _flowlane_position SET token = ? WHERE target = ? AND unit = ?", (token, *self._who)
        )
        if found[1] != self._split.id:
            return None
        self._position = Position(found[4], found[3])
        return found[2], found[3], found[5] or b"[]"

    def _write(self, connection: sqlite3.Connection, batch: Batch) -> list[Bad]:
        connection.execute("BEGIN IMMEDIATE")
        last = self._hold(connection)
        stands = last[1] if last else 0
        if last is not None and batch.end.row <= stands and (batch.end.row > batch.start.row or stands):
            connection.execute("COMMIT")
            return msgspec.json.decode(last[2], type=list[Bad]) if batch.start.row == last[0] else []
        if batch.start.row != stands:
            raise Permanent(
                f"{self._who[0]} stands at row {stands:,} of {self._split.url}, the batch begins at "
                f"{batch.start.row:,}: the table was replaced, or is not the one written before"
            )
        refused = self._table.write(connection, batch)
        connection.execute(
            "UPDATE _flowlane_position SET split = ?, start = ?, row = ?, offset = ?, refused = ? "
            "WHERE target = ? AND unit = ?",
            (
                self._split.id,
                batch.start.row,
                batch.end.row,
                batch.end.offset,
                msgspec.json.encode(refused),
                *self._who,
            ),
        )
        connection.execute("COMMIT")
        self._position = batch.end
        return refused


class _Table:
    """The target table: how a batch of records gets into it. Inside the writer's transaction."""

    def __init__(self, spec: TableSpec, generation: int) -> None:
        self._spec = spec
        self._generation = generation
        self._name = _identifier(spec.name, "table")

    def write(self, connection: sqlite3.Connection, batch: Batch) -> list[Bad]:
        """Insert or upsert the batch; the records refused."""
        refused: list[Bad] = []
        rows = self._keyed(batch, refused)
        wanted = list(dict.fromkeys(column for _, row in rows for column in row))
        known = self._columns(connection)
        if not known:
            self._create(connection, wanted)
        elif new := [column for column in wanted if column.casefold() not in known]:
            rows = self._meet(connection, rows, new, refused)
        if self._generation:
            self._add_generation(connection)
        groups: dict[tuple[str, ...], list[tuple[int, Record]]] = {}
        for number, row in rows:
            groups.setdefault(tuple(row), []).append((number, row))
        for columns, group in groups.items():
            refused += self._insert(connection, columns, group)
        return refused

    def _keyed(self, batch: Batch, refused: list[Bad]) -> list[tuple[int, Record]]:
        """The records with their rows; of those that share a key the last one, without a key none."""
        numbered = list(enumerate(batch.records, batch.start.row))
        if self._spec.mode == "append":
            return numbered
        latest: dict[tuple[Any, ...], tuple[int, Record]] = {}
        for number, row in numbered:
            values = tuple(row.get(column) for column in self._spec.key)
            if None in values or any(isinstance(value, dict | list) for value in values):
                refused.append(
                    Bad(number, f"no usable value for the key {','.join(self._spec.key)}", _shown(row))
                )
            else:
                latest[values] = (number, row)
        return list(latest.values())

    def _columns(self, connection: sqlite3.Connection) -> set[str]:
        return {row[1].casefold() for row in connection.execute(f"PRAGMA table_info({self._name})")}

    def _create(self, connection: sqlite3.Connection, columns: Iterable[str]) -> None:
        names = list(dict.fromkeys([*self._spec.key, *columns]))
        if not names:
            return
        declared = [_identifier(name, "column") for name in names]
        if self._spec.key:
            declared.append(
                "PRIMARY KEY (" + ", ".join(_identifier(k, "key column") for k in self._spec.key) + ")"
            )
        connection.execute(f"CREATE TABLE {self._name} ({', '.join(declared)})")

    def _meet(
        self,
        connection: sqlite3.Connection,
        rows: list[tuple[int, Record]],
        new: list[str],
        refused: list[Bad],
    ) -> list[tuple[int, Record]]:
        """Columns that the table has not: followed, refused, or put aside row by row, as the policy says."""
        if self._spec.schema == "freeze":
            raise Permanent(
                f"table {self._spec.name} has no column {new[0]!r}, and schema=freeze forbids to add it"
            )
        if self._spec.schema == "evolve":
            for column in new:
                connection.execute(f"ALTER TABLE {self._name} ADD COLUMN {_identifier(column, 'column')}")
            return rows
        unknown = set(new)
        kept = []
        for number, row in rows:
            if strange := unknown.intersection(row):
                refused.append(Bad(number, f"unknown column {min(strange)!r}", _shown(row)))
            else:
                kept.append((number, row))
        return kept

    def _add_generation(self, connection: sqlite3.Connection) -> None:
        if _GENERATION not in self._columns(connection):
            connection.execute(f'ALTER TABLE {self._name} ADD COLUMN "{_GENERATION}" INTEGER')

    def _insert(
        self, connection: sqlite3.Connection, columns: tuple[str, ...], rows: list[tuple[int, Record]]
    ) -> list[Bad]:
        statement = self._statement(columns)
        extra = (self._generation,) if self._generation else ()
        values = [(*map(_plain, row.values()), *extra) for _, row in rows]
        connection.execute("SAVEPOINT batch")
        try:
            connection.executemany(statement, values)
        except _REFUSED:
            connection.execute("ROLLBACK TO batch")
            return self._one_by_one(connection, statement, rows, values)
        finally:
            connection.execute("RELEASE batch")
        return []

    def _one_by_one(
        self,
        connection: sqlite3.Connection,
        statement: str,
        rows: list[tuple[int, Record]],
        values: list[tuple[Any, ...]],
    ) -> list[Bad]:
        refused = []
        for (number, row), value in zip(rows, values, strict=True):
            try:
                connection.execute(statement, value)
            except _REFUSED as error:
                refused.append(Bad(number, f"refused by the table: {error}", _shown(row)))
        return refused

    def _statement(self, columns: tuple[str, ...]) -> str:
        names = [_identifier(column, "column") for column in columns]
        updated = [n for n, c in zip(names, columns, strict=True) if c not in self._spec.key]
        if self._generation:
            names.append(f'"{_GENERATION}"')
            updated.append(f'"{_GENERATION}"')
        marks = ", ".join("?" * len(names))
        statement = f"INSERT INTO {self._name} ({', '.join(names)}) VALUES ({marks})"  # noqa: S608  # checked names
        if self._spec.mode == "append":
            return statement
        keys = ", ".join(_identifier(column, "key column") for column in self._spec.key)
        if not updated:
            return f"{statement} ON CONFLICT ({keys}) DO NOTHING"
        changes = ", ".join(f"{name} = excluded.{name}" for name in updated)
        statement += f" ON CONFLICT ({keys}) DO UPDATE SET {changes}"
        if self._generation:
            old = f'{self._name}."{_GENERATION}"'
            statement += f' WHERE {old} IS NULL OR {old} <= excluded."{_GENERATION}"'
        return statement


def _plain(value: Any) -> Any:
    """What SQLite stores of `value`: nested values as JSON, whatever else it has no type for as text."""
    if value is None or isinstance(value, str | int | float | bytes):
        return value
    if isinstance(value, dict | list):
        return msgspec.json.encode(value).decode()
    return str(value)


def _shown(row: Record) -> str:
    return repr(row)[:1000]
