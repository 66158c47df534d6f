"""What the writer does with the queue: receive, settle one delivery, release, purge."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from typing import Any, Final

import msgspec

from flowlane.backends.sqlite.group import settle
from flowlane.backends.sqlite.writer import WRITE
from flowlane.events import Event

# id, attempt, the head of the stream, the event itself where it is not the head
Entry = tuple[int, int, Event | None, Event | None]

_entries: Final = msgspec.json.Decoder(list[Entry])

# One row however many entries there are, as JSON by concatenation: the events are JSON already.
_DUE: Final = """
SELECT json_group_array(id), '[' || group_concat(
    '[' || id || ',' || attempt || ',' || coalesce(head, 'null') || ',' || coalesce(event, (
        SELECT l.event FROM log AS l
        WHERE l.stream = due.stream AND l.version = due.version AND l.version <> head_version
    ), 'null') || ']') || ']'
FROM (
    SELECT q.id, q.attempt + 1 AS attempt, q.stream, q.version, q.event,
        h.event AS head, h.version AS head_version
    FROM queue AS q LEFT JOIN log AS h
        ON h.seq = (SELECT seq FROM log WHERE stream = q.stream ORDER BY version DESC LIMIT 1)
    WHERE q.stage = ? AND q.due <= ? ORDER BY q.due LIMIT ?
) AS due
"""
_LEASE: Final = (
    "UPDATE queue SET due = ?, lease = ?, attempt = attempt + 1 WHERE id IN (SELECT value FROM json_each(?))"
)


class Receive:
    """Lease at most `limit` entries of `stages` under the number `lease` for `seconds`.

    The answer has for each stage that gave some: its name, their ids and the entries, both as JSON.
    """

    wakes = False

    def __init__(
        self, stages: Sequence[str], limit: int, lease: int, seconds: float, leave: Callable[[Release], None]
    ) -> None:
        self.stages, self.limit, self.lease, self.seconds, self._leave = stages, limit, lease, seconds, leave

    def peek(self, connection: sqlite3.Connection, now: int) -> Any:
        sql = "SELECT 1 FROM queue WHERE stage = ? AND due <= ? LIMIT 1"
        due = any(connection.execute(sql, (stage, now)).fetchone() for stage in self.stages)
        return WRITE if due else []

    def run(self, connection: sqlite3.Connection, now: int) -> list[tuple[str, str, str]]:
        answer: list[tuple[str, str, str]] = []
        left = self.limit
        until = now + int(self.seconds * 1000)
        for stage in self.stages:
            if left <= 0:
                break
            ids, entries = connection.execute(_DUE, (stage, now, left)).fetchone()
            if entries is not None:
                left -= connection.execute(_LEASE, (until, self.lease, ids)).rowcount
                answer.append((stage, ids, entries))
        return answer

    def abandoned(self, answer: list[tuple[str, str, str]]) -> None:
        for _, ids, _ in answer:
            self._leave(Release(ids, self.lease))


class Change:
    """A request that always writes, and that stands even if its caller is gone."""

    wakes = False

    def peek(self, connection: sqlite3.Connection, now: int) -> Any:
        return WRITE

    def abandoned(self, answer: Any) -> None:
        """Nothing: it stands."""


class Release(Change):
    """Entries that were leased for somebody who is gone: due now, and not counted as an attempt."""

    wakes = True

    def __init__(self, ids: str, lease: int) -> None:
        self.ids, self.lease = ids, lease

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        connection.execute(
            "UPDATE queue SET due = ?, lease = 0, attempt = attempt - 1 "
            "WHERE id IN (SELECT value FROM json_each(?)) AND lease = ?",
            (now, self.ids, self.lease),
        )


class Ack(Change):
    """The entry is gone, if it is still leased so."""

    def __init__(self, lease: tuple[int, int]) -> None:
        self.lease = lease

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        settle(connection, list(self.lease), now)


class Nack(Change):
    """The entry is due again after `delay`, if it is still leased so."""

    wakes = True

    def __init__(self, lease: tuple[int, int], delay: float) -> None:
        self.lease, self.delay = lease, delay

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        connection.execute(
            "UPDATE queue SET due = ?, lease = 0 WHERE id = ? AND lease = ? AND due > ?",
            (now + ceil(self.delay * 1000), *self.lease, now),
        )


class Extend(Change):
    """The answer is whether the lease was still held."""

    def __init__(self, lease: tuple[int, int], seconds: float) -> None:
        self.lease, self.seconds = lease, seconds

    def run(self, connection: sqlite3.Connection, now: int) -> bool:
        changed = connection.execute(
            "UPDATE queue SET due = ? WHERE id = ? AND lease = ? AND due > ?",
            (now + ceil(self.seconds * 1000), *self.lease, now),
        )
        return changed.rowcount == 1


class Purge(Change):
    def run(self, connection: sqlite3.Connection, now: int) -> None:
        connection.execute("DELETE FROM queue")


def entries(text: str) -> Iterator[tuple[int, int, Event | None, Event]]:
    """Id, attempt, head and event of each entry in the answer to ``Receive``."""
    for number, attempt, head, published in _entries.decode(text):
        event = published or head
        assert event is not None, "an entry without an event is never written"
        yield number, attempt, head, event
