"""Tables in memory: a source of records, and a transactional sink with every fence that the ports promise."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from flowlane.errors import Fenced, Permanent, Superseded
from flowlane.ports import Bad, Batch, Cut, Record, Sink, Source, Split, TableSpec, UnitRef, Writer
from flowlane.state import Position


class Write(msgspec.Struct, frozen=True):
    """That a table took a batch: whose, under which token, and which rows of the split [start, end)."""

    unit: str
    split: str
    token: int
    start: int
    end: int


class _Stand(msgspec.Struct):
    """How far one unit's split has come in a table; rows and position change together or not at all."""

    token: int = 0
    position: Position = Position()
    refused: dict[int, Sequence[Bad]] = {}


class Table:
    """``rows`` is what can be seen, in order of arrival; ``writes`` every batch that was taken."""

    def __init__(self) -> None:
        self.rows: list[Record] = []
        self.writes: list[Write] = []
        self.stands: dict[tuple[str, str], _Stand] = {}
        self._places: dict[tuple[Any, ...], int] = {}  # in `rows`, by key
        self._generations: dict[tuple[Any, ...], int] = {}

    def upsert(self, key: tuple[Any, ...], record: Record, generation: int) -> None:
        """`record` changes the row of that key, or is one, unless a later generation has written it; it
        replaces one of an earlier generation."""
        known = self._generations.setdefault(key, generation)
        if key not in self._places:
            self._places[key] = len(self.rows)
            self.rows.append({})
        if generation < known:
            return
        place = self._places[key]
        self.rows[place] = self.rows[place] | record if generation == known else dict(record)
        self._generations[key] = generation


class Tables:
    """Where ``rows://name`` and ``table://name`` lead to."""

    def __init__(self) -> None:
        self.sources: dict[str, list[list[Record]]] = {}  #: by URI: the splits, each a list of records
        self.tables: dict[str, Table] = {}

    def publish(self, uri: str, splits: list[list[Record]]) -> None:
        """From now on `uri` has these records."""
        self.sources[uri] = splits

    def source(self, uri: str) -> Source:
        """The records at `uri`."""
        return RecordSource(self, uri)

    def sink(self, uri: str, into: TableSpec | None = None) -> Sink:
        """The table at `uri`; or the one below it that `into` names, whose rows are upserted by its key."""
        name = f"{uri}{into.name}" if into else uri
        return TableSink(self.tables.setdefault(name, Table()), into.key if into else ())


class RecordSource:
    """See ``ports.Source``. Offsets count 10 bytes a record."""

    def __init__(self, tables: Tables, uri: str) -> None:
        self._tables = tables
        self._uri = uri

    def _records(self) -> list[list[Record]]:
        if self._uri not in self._tables.sources:
            raise Permanent(f"{self._uri}: there is no such source")
        return self._tables.sources[self._uri]

    async def splits(self) -> AsyncGenerator[Split]:
        """See ``Source.splits``."""
        for number, records in enumerate(self._records()):
            yield Split(id=str(number), url=self._uri, etag=etag_of(records), size=10 * len(records))

    async def read(self, split: Split, position: Position, cut: Cut) -> AsyncGenerator[Batch]:
        """See ``Source.read``."""
        at, crc = position.row, 0
        if position.row:
            crc = _crc(self._records()[int(split.id)][:at], 0)
            if crc != position.crc:
                raise Superseded(f"{self._uri}: the first {at} records are not those read before")
        while True:
            splits = self._records()
            records = splits[int(split.id)] if int(split.id) < len(splits) else []
            if etag_of(records) != split.etag:
                raise Superseded(f"{self._uri} was replaced")
            if at >= len(records):
                return
            end = min(len(records), at + cut.rows)
            following = Position(10 * end, end, _crc(records[at:end], crc))
            yield Batch(
                records=[dict(record) for record in records[at:end]],
                start=Position(10 * at, at, crc),
                end=following,
                bad=[],
                size=10 * (end - at),
            )
            crc = following.crc
            at = end

    async def prove(self, split: Split, position: Position) -> AsyncGenerator[int]:
        """See ``Source.prove``: nothing."""
        return
        yield 0  # makes this a generator


class TableSink:
    """See ``ports.Sink``: transactional, fenced by token, positions compared and set."""

    def __init__(self, table: Table, key: tuple[str, ...] = ()) -> None:
        self._table = table
        self._key = key

    @asynccontextmanager
    async def open(self, split: Split, unit: UnitRef, resume: str = "") -> AsyncIterator[Writer]:
        """See ``Sink.open``. Claims before anything is read: whoever came earlier is refused from now on."""
        stand = self._table.stands.setdefault((unit.stream, split.id), _Stand())
        if unit.token < stand.token:
            raise Fenced(f"{unit.stream}: token {unit.token} is older than {stand.token}")
        stand.token = unit.token
        yield TableWriter(self._table, stand, split, unit, self._key)


class TableWriter:
    """See ``ports.Writer``. Records with a true field ``refuse`` are refused, and those without a key."""

    def __init__(
        self, table: Table, stand: _Stand, split: Split, unit: UnitRef, key: tuple[str, ...] = ()
    ) -> None:
        self._table = table
        self._key = key
        self._stand = stand
        self._split = split
        self._unit = unit

    @property
    def position(self) -> Position | None:
        """See ``Writer.position``."""
        return self._stand.position

    @property
    def resume(self) -> str:
        """See ``Writer.resume``."""
        return ""

    @property
    def unfinished(self) -> tuple[str, str]:
        """See ``Writer.unfinished``: nothing is."""
        return "", ""

    @property
    def changes(self) -> Sequence[str]:
        """See ``Writer.changes``: none."""
        return ()

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """See ``Writer.write``."""
        stand = self._stand
        if self._unit.token < stand.token:
            raise Fenced(f"{self._unit.stream}: token {self._unit.token} is older than {stand.token}")
        if batch.end.row <= stand.position.row:
            return stand.refused.get(batch.start.row, ())
        if batch.start.row != stand.position.row:
            raise Fenced(f"{self._unit.stream}: {stand.position} is not where {batch.start} begins")
        refused = [
            Bad(batch.start.row + n, "refused", str(r))
            for n, r in enumerate(batch.records)
            if r.get("refuse") or any(r.get(name) is None for name in self._key)
        ]
        self._keep(batch, {found.row - batch.start.row for found in refused})
        stand.position = batch.end
        stand.refused = {**stand.refused, batch.start.row: refused}
        self._table.writes.append(
            Write(self._unit.stream, self._split.id, self._unit.token, batch.start.row, batch.end.row)
        )
        return refused

    def _keep(self, batch: Batch, refused: set[int]) -> None:
        kept = [record for n, record in enumerate(batch.records) if n not in refused]
        if not self._key:
            self._table.rows += kept
        for record in kept if self._key else ():
            key = tuple(record[name] for name in self._key)
            self._table.upsert(key, record, self._unit.generation)

    async def finish(self) -> None:
        """Nothing is left to do: every batch is visible."""


def _crc(records: Sequence[Record], before: int) -> int:
    for record in records:
        before = zlib.crc32(msgspec.json.encode(record), before)
    return before


def etag_of(records: Sequence[dict[str, Any]]) -> str:
    """What pins a split's content."""
    return hashlib.blake2b(msgspec.json.encode(records), digest_size=8).hexdigest()
