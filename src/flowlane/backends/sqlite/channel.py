"""Channels: records by partition and position, consumers by name, in the same file."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import count
from typing import Any, Final

import msgspec

from flowlane.backends.common import (
    BATCH_BYTES,
    PARTITIONS,
    POLL,
    News,
    consume,
    portions,
)
from flowlane.backends.sqlite.queue import Change
from flowlane.backends.sqlite.records import store
from flowlane.backends.sqlite.writer import WRITE, Writer
from flowlane.clock import Clock
from flowlane.ports import ChannelBatch, ChannelRecord, Lag

_records: Final = msgspec.json.Decoder(list[tuple[int, str, str]])
_numbers: Final = msgspec.json.Decoder(list[int])
_lags: Final = msgspec.json.Decoder(list[tuple[int, str, int, int]])

# An owner is the name of an iteration, for how many milliseconds it was given the hold, and the hold's number
# (token.30000.1): that of a batch, and of no other.
_GIVEN: Final = "CAST(substr(c.owner, instr(c.owner, '.') + 1) AS INTEGER)"
# The first partition, of those given in order, that has records to hand out and is nobody's. A hold that ends
# later than it can is one from before the wall clock was set back.
_FREE: Final = f"""
SELECT p.value, coalesce(c.position, 0) FROM json_each(?3) AS p
LEFT JOIN consumer AS c ON c.channel = ?1 AND c.consumer = ?2 AND c.partition = p.value
WHERE (c.owner IS NULL OR c.owner = '' OR c.until <= ?4 OR c.until > ?4 + {_GIVEN}) AND EXISTS (
    SELECT 1 FROM channel AS r
    WHERE r.channel = ?1 AND r.partition = p.value AND r.position > coalesce(c.position, 0))
LIMIT 1
"""  # noqa: S608  # a constant
_HELD: Final = (
    "SELECT min(until) FROM consumer "
    "WHERE channel = ? AND consumer = ? AND owner <> '' AND substr(owner, 1, length(?3)) <> ?3"
)
_HOLD: Final = """
INSERT INTO consumer (channel, consumer, partition, position, owner, until) VALUES (?,?,?,0,?,?)
ON CONFLICT DO UPDATE SET owner = excluded.owner, until = excluded.until
"""
_SIZES: Final = """
SELECT json_group_array(size) FROM (
    SELECT length(data) AS size FROM channel WHERE channel = ? AND partition = ? AND position > ?
    ORDER BY position LIMIT ?)
"""
_NEXT: Final = """
SELECT json_group_array(json_array(position, key, hex(data))) FROM (
    SELECT position, key, data FROM channel WHERE channel = ? AND partition = ? AND position > ?
    ORDER BY position LIMIT ?)
"""
_MINE: Final = "channel = ? AND consumer = ? AND partition = ? AND owner = ?"
_SETTLE: Final = f"UPDATE consumer SET position = max(position, ?), owner = '' WHERE {_MINE}"  # noqa: S608  # a constant
_EXTEND: Final = f"UPDATE consumer SET until = ? WHERE {_MINE} AND until > ?"  # noqa: S608  # a constant
_GIVE_UP: Final = (
    "UPDATE consumer SET owner = '' "
    "WHERE channel = ? AND consumer = ? AND owner <> '' AND substr(owner, 1, length(?3)) = ?3"
)
# Positions are consecutive: how many records there are need not be counted.
_LAG: Final = """
SELECT json_group_array(json_array(
    partition, CASE WHEN until > ?4 THEN owner ELSE '' END, coalesce(position, 0), last))
FROM (
    SELECT p.value AS partition, c.owner, c.until, c.position,
        (SELECT max(position) FROM channel AS r WHERE r.channel = ?1 AND r.partition = p.value) AS last
    FROM json_each(?3) AS p
    LEFT JOIN consumer AS c ON c.channel = ?1 AND c.consumer = ?2 AND c.partition = p.value)
WHERE last IS NOT NULL
"""
_REWIND: Final = """
INSERT INTO consumer (channel, consumer, partition, position, owner, until)
SELECT ?1, ?2, ?3, max(0, min(?4, coalesce(
    (SELECT max(position) FROM channel WHERE channel = ?1 AND partition = ?3), 0))), '', 0 WHERE true
ON CONFLICT DO UPDATE SET position = excluded.position, owner = '', until = 0
"""
_ALL: Final = str(list(range(PARTITIONS)))


class _Put(Change):
    def __init__(self, channel: str, records: Sequence[ChannelRecord]) -> None:
        self.channel, self.records = channel, records
        self.wakes = (channel,)
        self.size = sum([len(record.data) for record in records])

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        store(connection, self.channel, self.records)


class _Next:
    """The answer is a partition, the owner of the hold on it and its next records as JSON; or in how many
    seconds another consumer's hold ends; or ``None``."""

    wakes = ()
    size = 0

    def __init__(
        self, channel: str, consumer: str, owner: str, hold: str, lasts: int, limit: int, order: str
    ) -> None:
        self.channel, self.consumer, self.owner, self.hold = channel, consumer, owner, hold
        self.lasts, self.limit, self.order = lasts, limit, order

    def peek(self, connection: sqlite3.Connection, now: int) -> Any:
        return WRITE if self._free(connection, now) else self._held(connection, now)

    def run(self, connection: sqlite3.Connection, now: int) -> tuple[int, str, str] | float | None:
        free = self._free(connection, now)
        if free is None:
            return self._held(connection, now)
        where, position = free
        connection.execute(_HOLD, (self.channel, self.consumer, where, self.hold, now + self.lasts))
        behind = (self.channel, where, position)
        (text,) = connection.execute(_NEXT, (*behind, self._fit(connection, behind))).fetchone()
        return where, self.hold, text

    def _fit(self, connection: sqlite3.Connection, behind: tuple[str, int, int]) -> int:
        """How many of the records there make one batch."""
        (text,) = connection.execute(_SIZES, (*behind, self.limit)).fetchone()
        sizes = _numbers.decode(text)
        while len(sizes) > 1 and sum(sizes) > BATCH_BYTES:
            del sizes[max(1, len(sizes) // 2) :]
        return len(sizes)

    def _free(self, connection: sqlite3.Connection, now: int) -> tuple[int, int] | None:
        found: tuple[int, int] | None = connection.execute(
            _FREE, (self.channel, self.consumer, self.order, now)
        ).fetchone()
        return found

    def _held(self, connection: sqlite3.Connection, now: int) -> float | None:
        (until,) = connection.execute(_HELD, (self.channel, self.consumer, self.owner)).fetchone()
        return None if until is None else (until - now) / 1000

    def abandoned(self, answer: Any) -> None:
        """Nothing: the iteration that asked gives up all it holds when it ends."""


class _Settle(Change):
    def __init__(self, mine: tuple[str, str, int, str], position: int) -> None:
        self.row = (position, *mine)
        self.wakes = (mine[0],)

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        connection.execute(_SETTLE, self.row)


class _Extend(Change):
    """The answer is whether the hold was still there."""

    def __init__(self, mine: tuple[str, str, int, str], lasts: int) -> None:
        self.mine, self.lasts = mine, lasts

    def run(self, connection: sqlite3.Connection, now: int) -> bool:
        return connection.execute(_EXTEND, (now + self.lasts, *self.mine, now)).rowcount == 1


class _GiveUp(Change):
    def __init__(self, channel: str, consumer: str, owner: str) -> None:
        self.row = (channel, consumer, owner)
        self.wakes = (channel,)

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        connection.execute(_GIVE_UP, self.row)


class _Rewind(Change):
    def __init__(self, channel: str, consumer: str, positions: Mapping[int, int]) -> None:
        self.rows = [(channel, consumer, where, position) for where, position in positions.items()]
        self.wakes = (channel,)

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        for row in self.rows:
            connection.execute(_REWIND, row)


class _Look:
    """The answer is a ``Lag`` for each partition that has records, as JSON."""

    wakes = ()
    size = 0

    def __init__(self, channel: str, consumer: str) -> None:
        self.row = (channel, consumer, _ALL)

    def peek(self, connection: sqlite3.Connection, now: int) -> Any:
        return self.run(connection, now)

    def run(self, connection: sqlite3.Connection, now: int) -> Any:
        (text,) = connection.execute(_LAG, (*self.row, now)).fetchone()
        return text

    def abandoned(self, answer: Any) -> None:
        """Nothing."""


class _Batch:
    """``mine`` are the channel, the consumer, the partition and the owner of the hold, which `lasts` so many
    milliseconds."""

    __slots__ = ("_lasts", "_mine", "_writer", "records")

    def __init__(
        self, records: list[ChannelRecord], mine: tuple[str, str, int, str], lasts: int, writer: Writer
    ) -> None:
        self.records = records
        self._mine, self._lasts, self._writer = mine, lasts, writer

    async def settle(self, count: int | None = None) -> None:
        done = self.records[:count]
        await self._writer.submit(_Settle(self._mine, done[-1].position if done else 0))

    async def extend(self) -> bool:
        return bool(await self._writer.submit(_Extend(self._mine, self._lasts)))


class SqliteChannel:
    """See ``ports.Channel``. Positions count from 1 in each partition. Records are kept for ever."""

    def __init__(self, name: str, clock: Clock, writer: Writer, news: News, hold: float) -> None:
        self._name, self._clock, self._writer, self._news = name, clock, writer, news
        self._lasts = int(hold * 1000)

    async def put(self, records: Sequence[ChannelRecord]) -> None:
        for portion in await portions(self._name, records):
            await self._writer.submit(_Put(self._name, portion))

    def consume(self, consumer: str, *, limit: int = 500, wait: float = 0) -> AsyncIterator[ChannelBatch]:
        owner = f"{self._clock.token()}."
        holds = count(1)
        turn = 0

        async def find() -> ChannelBatch | float | None:
            nonlocal turn
            order = str([(turn + n) % PARTITIONS for n in range(PARTITIONS)])
            mine = f"{owner}{self._lasts}.{next(holds)}"
            request = _Next(self._name, consumer, owner, mine, self._lasts, limit, order)
            answer = await self._writer.submit(request)
            if not isinstance(answer, tuple):
                waiting: float | None = answer
                return waiting
            where, hold, text = answer
            turn = where + 1
            records = [
                ChannelRecord(key, bytes.fromhex(data), where, position)
                for position, key, data in _records.decode(text)
            ]
            return _Batch(records, (self._name, consumer, where, hold), self._lasts, self._writer)

        def give_up() -> None:
            self._writer.leave(_GiveUp(self._name, consumer, owner))

        return consume(find, give_up, self._news, wait, POLL, (self._name,))

    async def lag(self, consumer: str) -> Sequence[Lag]:
        text = await self._writer.submit(_Look(self._name, consumer))
        return [
            Lag(where, owner, position, last - position)
            for where, owner, position, last in _lags.decode(text)
        ]

    async def rewind(self, consumer: str, positions: Mapping[int, int] | None = None) -> None:
        if positions is None:
            positions = dict.fromkeys(range(PARTITIONS), 0)
        await self._writer.submit(_Rewind(self._name, consumer, positions))
