"""Tables in memory: a source of records, and a transactional sink with every fence that the ports promise."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from flowlane.errors import Fenced, Permanent, Superseded
from flowlane.ports import Bad, Batch, Cut, Record, Sink, Source, Split, UnitRef, Writer
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

    def sink(self, uri: str) -> Sink:
        """The table at `uri`."""
        return TableSink(self.tables.setdefault(uri, Table()))


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


class TableSink:
    """See ``ports.Sink``: transactional, fenced by token, positions compared and set."""

    def __init__(self, table: Table) -> None:
        self._table = table

    @asynccontextmanager
    async def open(self, split: Split, unit: UnitRef, resume: str = "") -> AsyncIterator[Writer]:
        """See ``Sink.open``. Claims before anything is read: whoever came earlier is refused from now on."""
        stand = self._table.stands.setdefault((unit.stream, split.id), _Stand())
        if unit.token < stand.token:
            raise Fenced(f"{unit.stream}: token {unit.token} is older than {stand.token}")
        stand.token = unit.token
        yield TableWriter(self._table, stand, split, unit)


class TableWriter:
    """See ``ports.Writer``. Records with a true field ``refuse`` are refused."""

    def __init__(self, table: Table, stand: _Stand, split: Split, unit: UnitRef) -> None:
        self._table = table
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

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """See ``Writer.write``."""
        stand = self._stand
        if self._unit.token < stand.token:
            raise Fenced(f"{self._unit.stream}: token {self._unit.token} is older than {stand.token}")
        if batch.end.row <= stand.position.row:
            return stand.refused.get(batch.start.row, ())
        if batch.start.row != stand.position.row:
            raise Fenced(f"{self._unit.stream}: {stand.position} is not where {batch.start} begins")
        refused = [Bad(batch.start.row, "refused", str(r)) for r in batch.records if r.get("refuse")]
        self._table.rows += [r for r in batch.records if not r.get("refuse")]
        stand.position = batch.end
        stand.refused = {**stand.refused, batch.start.row: refused}
        self._table.writes.append(
            Write(self._unit.stream, self._split.id, self._unit.token, batch.start.row, batch.end.row)
        )
        return refused

    async def finish(self) -> None:
        """Nothing is left to do: every batch is visible."""


def _crc(records: Sequence[Record], before: int) -> int:
    for record in records:
        before = zlib.crc32(msgspec.json.encode(record), before)
    return before


def etag_of(records: Sequence[dict[str, Any]]) -> str:
    """What pins a split's content."""
    return hashlib.blake2b(msgspec.json.encode(records), digest_size=8).hexdigest()
