"""The SQLite source: a table's rows in the order of its key, as they stand at one moment.

Rows have no bytes of their own, so their place is counted in those of their values as JSON lines. That gives
a table what a file has: batches cut by size, and a checksum over everything before a position. A resumed read
goes over those rows once more and says ``Superseded`` if one of them is no longer what it was.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from collections.abc import AsyncGenerator, Iterator
from hashlib import blake2b
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Final

import msgspec

from flowlane.clock import Clock
from flowlane.connectors.database import GENERATION, Database, escaped, folded, quoted
from flowlane.errors import ConfigError, Permanent, Superseded
from flowlane.ports import Batch, Cut, Split
from flowlane.state import Position
from flowlane.streams.cutting import Chunk, Cutter, Skip

_PAGE: Final = 500  # rows fetched at a time
_END: Final = object()

_encoder: Final = msgspec.json.Encoder()


class SqliteSource:
    """See ``ports.Source``. The table is one split, and its rows are dicts of what SQLite holds.

    It is replayable if no two rows can have the same `key`, by default the primary key; what pins it are its
    columns (the ETag) and the checksum of the rows before a position. A table without a primary key comes in
    no order that can be had again. A generation that flowlane wrote beside a row is no part of the record.
    """

    def __init__(self, clock: Clock, path: Path, table: str, key: tuple[str, ...]) -> None:
        self._clock = clock
        self._path = path
        self._table = table
        self._key = key

    async def splits(self) -> AsyncGenerator[Split]:
        """See ``Source.splits``.

        Raises:
            ConfigError: there is no such table, or it has no such key column.
        """
        database = await Database.open(self._clock, self._path, write=False)
        try:
            etag, _, unique = await database.run(self._describe)
        finally:
            await database.close()
        url = f"sqlite:///{self._path}?table={self._table}"
        # The file is part of the name: a sink that has one file's table would take another's for done.
        yield Split(url, url, etag=etag if unique else "", replayable=unique)

    async def read(self, split: Split, position: Position, cut: Cut) -> AsyncGenerator[Batch]:
        """See ``Source.read``.

        Raises:
            Superseded: the table's columns, or rows before `position`, were changed.
            Permanent: a row holds what cannot be read as it is declared.
        """
        database = await Database.open(self._clock, self._path, write=False)
        try:
            reading = await database.run(lambda connection: self._begin(connection, split, position, cut))
            while (batch := await database.run(lambda _: next(reading, _END))) is not _END:
                if isinstance(batch, Batch):
                    yield batch
        finally:
            await database.close()

    async def prove(self, split: Split, position: Position) -> AsyncGenerator[int]:
        """See ``Source.prove``: nothing, a table has no checksum of its own."""
        return
        yield 0  # makes this a generator

    def _describe(self, connection: sqlite3.Connection) -> tuple[str, list[str], bool]:
        """What tells the table's columns from others, the key to read by, and whether that is unique."""
        columns = connection.execute(f"PRAGMA table_xinfo({quoted(self._table, 'table')})").fetchall()
        if not columns:
            raise ConfigError(f"{self._path}: there is no table {self._table}")
        names = {folded(name) for _, name, *_ in columns}
        for name in self._key:
            if folded(name) not in names:
                raise ConfigError(f"{self._path}: table {self._table} has no column {name}")
        primary = [name for _, name, _, _, _, place, *_ in sorted(columns, key=itemgetter(5)) if place]
        key = list(self._key) or primary
        digest = blake2b(_encoder.encode([key, columns]), digest_size=16).hexdigest()
        return f'"{digest}"', key, self._unique(connection, key, primary)

    def _unique(self, connection: sqlite3.Connection, by: list[str], primary: list[str]) -> bool:
        key = set(map(folded, by))
        sets = [set(map(folded, primary))]
        name = quoted(self._table, "table")
        for _, index, unique, _, partial in connection.execute(f"PRAGMA index_list({name})").fetchall():
            if unique and not partial:
                found = connection.execute("SELECT name FROM pragma_index_info(?)", (index,))
                sets.append({folded(column) for (column,) in found if column})
        return any(some and some <= key for some in sets)

    def _begin(
        self, connection: sqlite3.Connection, split: Split, position: Position, cut: Cut
    ) -> Iterator[Batch | None]:
        connection.execute("BEGIN")  # one moment: what is written meanwhile is not seen
        etag, key, _ = self._describe(connection)
        if split.etag and etag != split.etag:
            raise Superseded(f"{split.url}: its columns were changed")
        order = ", ".join(map(escaped, key))
        query = f"SELECT * FROM {quoted(self._table, 'table')}"  # noqa: S608 - a checked name
        cursor = connection.execute(query + (f" ORDER BY {order}" if order else ""))
        return self._batches(cursor, split.url, position, cut)

    def _batches(
        self, cursor: sqlite3.Cursor, url: str, position: Position, cut: Cut
    ) -> Iterator[Batch | None]:
        """The batches; ``None`` where a page adds none."""
        names = [name for name, *_ in cursor.description]
        skip, cutter = Skip(position), Cutter(cut, position)
        try:
            while rows := self._fetch(cursor, url):
                lines = [_encoder.encode(row) + b"\n" for row in rows]
                data, ends = b"".join(lines), list(accumulate(map(len, lines)))
                rest = skip.feed(data)
                passed = len(data) - len(rest)
                first = bisect_left(ends, passed) + 1 if passed else 0
                items = [dict(zip(names, row, strict=True)) for row in rows[first:]]
                if GENERATION in names:  # flowlane's own word on the row, which another table has of its own
                    for item in items:
                        del item[GENERATION]
                chunk = Chunk(rest, items, 0, [end - passed for end in ends[first:]])  # type: ignore[arg-type]
                yield from map(_sized, cutter.feed(chunk))
                yield None
            skip.close()
        except Superseded as error:
            raise Superseded(f"{url}: {error}") from None
        yield from map(_sized, cutter.close())

    def _fetch(self, cursor: sqlite3.Cursor, url: str) -> list[tuple[object, ...]]:
        try:
            return cursor.fetchmany(_PAGE)
        except sqlite3.OperationalError as error:
            if "UTF-8" in str(error):  # the one error here that the module words itself, without a code
                raise Permanent(f"{url}: {error}: store it as BLOB, or repair the text") from None
            raise


def _sized(batch: Batch) -> Batch:
    batch.size = batch.end.offset - batch.start.offset
    return batch
