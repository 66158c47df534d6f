"""Channels: records by partition and position, consumers by name, in the same file."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import msgspec

from flowlane.backends.common import CHANNEL_LEASE, PARTITIONS, POLL, News, consume, partition
from flowlane.backends.sqlite.group import Wide
from flowlane.backends.sqlite.queue import Change
from flowlane.backends.sqlite.writer import WRITE, Writer
from flowlane.clock import Clock
from flowlane.ports import ChannelBatch, ChannelRecord

_records: Final = msgspec.json.Decoder(list[tuple[int, str, str]])
_positions: Final = msgspec.json.Decoder(list[int])

_INSERT: Final = Wide("INSERT INTO channel (channel, partition, position, key, data) VALUES ", "(?,?,?,?,?)")
_ENDS: Final = """
SELECT json_group_array(coalesce(
    (SELECT max(position) FROM channel WHERE channel = ? AND partition = value), 0)) FROM json_each(?)
"""
# The first partition, of those given in order, that has records to hand out and is nobody's. A hold that ends
# later than any can is one from before the wall clock was set back.
_FREE: Final = """
SELECT p.value, coalesce(c.position, 0) FROM json_each(?3) AS p
LEFT JOIN consumer AS c ON c.channel = ?1 AND c.consumer = ?2 AND c.partition = p.value
WHERE (c.owner IS NULL OR c.owner = '' OR c.until <= ?4 OR c.until > ?5) AND EXISTS (
    SELECT 1 FROM channel AS r
    WHERE r.channel = ?1 AND r.partition = p.value AND r.position > coalesce(c.position, 0))
LIMIT 1
"""
_HELD: Final = "SELECT min(until) FROM consumer WHERE channel = ? AND consumer = ? AND owner NOT IN ('', ?)"
_HOLD: Final = """
INSERT INTO consumer (channel, consumer, partition, position, owner, until) VALUES (?,?,?,0,?,?)
ON CONFLICT DO UPDATE SET owner = excluded.owner, until = excluded.until
"""
_NEXT: Final = """
SELECT json_group_array(json_array(position, key, hex(data))) FROM (
    SELECT position, key, data FROM channel WHERE channel = ? AND partition = ? AND position > ?
    ORDER BY position LIMIT ?)
"""
_SETTLE: Final = """
UPDATE consumer
    SET position = max(position, ?), owner = CASE WHEN owner = ? AND until = ? THEN '' ELSE owner END
WHERE channel = ? AND consumer = ? AND partition = ?
"""


class _Put(Change):
    wakes = True

    def __init__(self, channel: str, records: Sequence[ChannelRecord]) -> None:
        self.channel = channel
        self.records = [(partition(record.key), record.key, record.data) for record in records]
        self.size = sum(len(record.data) for record in records)

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        touched = sorted({where for where, _, _ in self.records})
        (text,) = connection.execute(_ENDS, (self.channel, str(touched))).fetchone()
        ends = dict(zip(touched, _positions.decode(text), strict=True))
        rows: list[Any] = []
        for where, key, data in self.records:
            ends[where] += 1
            rows += (self.channel, where, ends[where], key, data)
        _INSERT.run(connection, rows)


class _Next:
    """The answer is a partition, the end of the hold on it and its next records as JSON; or in how many
    seconds another consumer's hold ends; or ``None``."""

    wakes = False
    size = 0

    def __init__(self, channel: str, consumer: str, owner: str, limit: int, order: str) -> None:
        self.channel, self.consumer, self.owner = channel, consumer, owner
        self.limit, self.order = limit, order

    def peek(self, connection: sqlite3.Connection, now: int) -> Any:
        return WRITE if self._free(connection, now) else self._held(connection, now)

    def run(self, connection: sqlite3.Connection, now: int) -> tuple[int, int, str] | float | None:
        free = self._free(connection, now)
        if free is None:
            return self._held(connection, now)
        where, position = free
        until = now + int(CHANNEL_LEASE * 1000)
        connection.execute(_HOLD, (self.channel, self.consumer, where, self.owner, until))
        (text,) = connection.execute(_NEXT, (self.channel, where, position, self.limit)).fetchone()
        return where, until, text

    def _free(self, connection: sqlite3.Connection, now: int) -> tuple[int, int] | None:
        found: tuple[int, int] | None = connection.execute(
            _FREE, (self.channel, self.consumer, self.order, now, now + int(CHANNEL_LEASE * 1000))
        ).fetchone()
        return found

    def _held(self, connection: sqlite3.Connection, now: int) -> float | None:
        (until,) = connection.execute(_HELD, (self.channel, self.consumer, self.owner)).fetchone()
        return None if until is None else (until - now) / 1000

    def abandoned(self, answer: Any) -> None:
        """Nothing: the iteration that asked gives up all it holds when it ends."""


class _Settle(Change):
    wakes = True

    def __init__(self, name: tuple[str, str], hold: tuple[str, int], where: int, position: int) -> None:
        self.row = (position, *hold, *name, where)

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        connection.execute(_SETTLE, self.row)


class _GiveUp(Change):
    wakes = True

    def __init__(self, channel: str, consumer: str, owner: str) -> None:
        self.row = (channel, consumer, owner)

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        connection.execute(
            "UPDATE consumer SET owner = '' WHERE channel = ? AND consumer = ? AND owner = ?", self.row
        )


class _Batch:
    """``name`` are the channel and the consumer, ``hold`` its owner and end."""

    __slots__ = ("_hold", "_name", "_writer", "records")

    def __init__(
        self, records: list[ChannelRecord], name: tuple[str, str], hold: tuple[str, int], writer: Writer
    ) -> None:
        self.records = records
        self._name, self._hold, self._writer = name, hold, writer

    async def settle(self, count: int | None = None) -> None:
        done = self.records[:count]
        position = done[-1].position if done else 0
        await self._writer.submit(_Settle(self._name, self._hold, self.records[0].partition, position))


class SqliteChannel:
    """See ``ports.Channel``. Positions count from 1 in each partition."""

    def __init__(self, name: str, clock: Clock, writer: Writer, news: News) -> None:
        self._name, self._clock, self._writer, self._news = name, clock, writer, news

    async def put(self, records: Sequence[ChannelRecord]) -> None:
        if records:
            await self._writer.submit(_Put(self._name, records))

    def consume(self, consumer: str, *, limit: int = 500, wait: float = 0) -> AsyncIterator[ChannelBatch]:
        owner = self._clock.token()
        turn = 0

        async def find() -> ChannelBatch | float | None:
            nonlocal turn
            order = str([(turn + n) % PARTITIONS for n in range(PARTITIONS)])
            answer = await self._writer.submit(_Next(self._name, consumer, owner, limit, order))
            if not isinstance(answer, tuple):
                waiting: float | None = answer
                return waiting
            where, until, text = answer
            turn = where + 1
            records = [
                ChannelRecord(key, bytes.fromhex(data), where, position)
                for position, key, data in _records.decode(text)
            ]
            return _Batch(records, (self._name, consumer), (owner, until), self._writer)

        def give_up() -> None:
            self._writer.leave(_GiveUp(self._name, consumer, owner))

        return consume(find, give_up, self._news, wait, POLL)
