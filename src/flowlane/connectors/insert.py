"""The SQLite sink: a batch's rows, its position and the writer's token are one transaction.

So a batch is in the table once, however often it is written, and a writer that was overtaken writes nothing.
Beside the target stand four tables of flowlane's own, keyed by target and unit: ``_flowlane_fence`` with
the highest token seen, ``_flowlane_position`` with where each split stands, ``_flowlane_refused`` with the
rows that were refused, and ``_flowlane_changed`` with what was changed beyond rows: both are told again to
whoever repeats their batch.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import msgspec

from flowlane.connectors.database import Database
from flowlane.connectors.table import Table
from flowlane.errors import Fenced, Permanent, Superseded, redact
from flowlane.ports import Bad, Batch, Split, TableSpec, UnitRef
from flowlane.state import Position

T = TypeVar("T")

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS _flowlane_fence (
    target TEXT, stream TEXT, token INTEGER NOT NULL, PRIMARY KEY (target, stream)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _flowlane_position (
    target TEXT, stream TEXT, split TEXT, etag TEXT NOT NULL, token INTEGER NOT NULL,
    offset INTEGER NOT NULL, row INTEGER NOT NULL, crc INTEGER NOT NULL, done INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (target, stream, split)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _flowlane_refused (
    target TEXT, stream TEXT, split TEXT, row INTEGER, refused TEXT NOT NULL,
    PRIMARY KEY (target, stream, split, row)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _flowlane_changed (
    target TEXT, stream TEXT, split TEXT, row INTEGER, changed TEXT NOT NULL,
    PRIMARY KEY (target, stream, split, row)) WITHOUT ROWID
"""
_changed: Final = msgspec.json.Decoder(list[str])
_refused: Final = msgspec.json.Decoder(list[Bad])


class SqliteSink:
    """See ``ports.Sink``. Rows are added, or upserted by their key unless a later generation wrote them
    (column ``_flowlane_generation``). A table that is missing is made of the first batch's columns; columns
    that come later are added, refused or quarantined, as ``schema`` says."""

    def __init__(self, database: Database, spec: TableSpec) -> None:
        self._database = database
        self._spec = spec

    @asynccontextmanager
    async def open(self, split: Split, unit: UnitRef, resume: str = "") -> AsyncIterator[TableWriter]:
        """See ``Sink.open``. All that came earlier is refused from now on.

        Raises:
            Fenced: a later attempt has been here.
            Superseded: rows of another content of the split are in the table.
            Permanent: rows of the split are in the table, and it cannot be read in the same order twice.
        """
        writer = TableWriter(self._database, self._spec, split, unit)
        await self._database.run(writer.claim)
        yield writer


class TableWriter:
    """See ``ports.Writer``."""

    def __init__(self, database: Database, spec: TableSpec, split: Split, unit: UnitRef) -> None:
        self._database = database
        self._table = Table(spec, unit.generation)
        self._split = split
        self._unit = unit
        self._target = (spec.name.lower(), unit.stream)
        self._place = (*self._target, split.id)
        self._position = Position()
        self._changes: Sequence[str] = ()

    @property
    def position(self) -> Position:
        """See ``Writer.position``."""
        return self._position

    @property
    def resume(self) -> str:
        """See ``Writer.resume``: the table knows by itself."""
        return ""

    @property
    def unfinished(self) -> tuple[str, str]:
        """See ``Writer.unfinished``: nothing is."""
        return "", ""

    @property
    def changes(self) -> Sequence[str]:
        """See ``Writer.changes``: columns that were added, and the table if it was made."""
        return self._changes

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """See ``Writer.write``.

        Raises:
            Permanent: the batch does not follow what is in the table; or the table refuses its columns.
        """
        wrote = await self._database.run(lambda connection: self._write(connection, batch))
        self._position, refused, self._changes = wrote
        return refused

    async def finish(self) -> None:
        """See ``Writer.finish``: every row is visible already, and now it is known that none is missing."""
        await self._database.run(self._finish)

    # ------------------------------------------------------------------ in the thread

    def claim(self, connection: sqlite3.Connection) -> None:
        """Leave the token, and see where the split stands."""
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        self._fence(connection)
        connection.execute(
            "INSERT INTO _flowlane_fence VALUES (?, ?, ?) "
            "ON CONFLICT DO UPDATE SET token = max(token, excluded.token)",
            (*self._target, self._unit.token),
        )
        self._position, _ = self._standing(connection)
        connection.execute("COMMIT")

    def _fence(self, connection: sqlite3.Connection) -> None:
        found = connection.execute(
            "SELECT token FROM _flowlane_fence WHERE target = ? AND stream = ?", self._target
        ).fetchone()
        if found and found[0] > self._unit.token:
            raise Fenced(
                f"{self._unit.stream}: attempt {found[0]} writes to {self._target[0]} now, "
                f"this one is {self._unit.token}"
            )

    def _standing(self, connection: sqlite3.Connection) -> tuple[Position, bool]:
        """Where the split stands, and whether all of it is in the table."""
        found = connection.execute(
            "SELECT etag, token, done, offset, row, crc FROM _flowlane_position "
            "WHERE target = ? AND stream = ? AND split = ?",
            self._place,
        ).fetchone()
        if found is None:
            return Position(), False
        etag, token, done, *place = found
        where = f"{self._target[0]}: {place[1]:,} rows of {redact(self._split.url)}"
        if etag != self._split.etag:
            raise Superseded(f"{where} are in it, and it was replaced since")
        if not self._split.replayable and token != self._unit.token and not done:
            raise Permanent(f"{where} are in it, and it cannot be read in the same order twice")
        return Position(*place), bool(done)

    def _write(self, connection: sqlite3.Connection, batch: Batch) -> tuple[Position, list[Bad], list[str]]:
        connection.execute("BEGIN IMMEDIATE")
        self._fence(connection)
        stands, done = self._standing(connection)
        if done or (batch.end.row <= stands.row and batch.end.offset <= stands.offset):
            refused = self._told_before(connection, batch, "refused", _refused)
            changes = self._told_before(connection, batch, "changed", _changed)
            connection.execute("ROLLBACK")
            return stands, refused, changes
        if batch.start != stands:
            raise Permanent(
                f"{self._target[0]} has the rows of {redact(self._split.url)} up to {stands.row:,}, the "
                f"batch begins at {batch.start.row:,}: the table was restored from a backup, or written to "
                "by others"
            )
        refused = self._table.write(connection, batch.records, batch.start.row)
        changes = self._table.changes
        self._keep(connection, batch, refused, changes)
        connection.execute("COMMIT")
        return batch.end, refused, changes

    def _keep(
        self, connection: sqlite3.Connection, batch: Batch, refused: list[Bad], changes: list[str]
    ) -> None:
        end = batch.end
        connection.execute(
            "INSERT OR REPLACE INTO _flowlane_position "
            "(target, stream, split, etag, token, offset, row, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*self._place, self._split.etag, self._unit.token, end.offset, end.row, end.crc),
        )
        for what, told in (("refused", refused), ("changed", changes)):
            if told:
                connection.execute(
                    f"INSERT INTO _flowlane_{what} VALUES (?, ?, ?, ?, ?)",  # noqa: S608 - one of two names
                    (*self._place, batch.start.row, msgspec.json.encode(told).decode()),
                )

    def _told_before(
        self, connection: sqlite3.Connection, batch: Batch, what: str, decoder: msgspec.json.Decoder[list[T]]
    ) -> list[T]:
        found = connection.execute(
            f"SELECT {what} FROM _flowlane_{what} "  # noqa: S608 - one of two names
            "WHERE target = ? AND stream = ? AND split = ? AND row = ?",
            (*self._place, batch.start.row),
        ).fetchone()
        return decoder.decode(found[0]) if found else []

    def _finish(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        self._fence(connection)
        connection.execute(
            "UPDATE _flowlane_position SET done = 1 WHERE target = ? AND stream = ? AND split = ?",
            self._place,
        )
        connection.execute("COMMIT")
