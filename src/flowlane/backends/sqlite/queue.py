"""What the writer does with the queue: receive, settle one delivery, release, purge."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from math import ceil
from typing import Any, Final

import msgspec

from flowlane.backends.sqlite.group import settle
from flowlane.backends.sqlite.writer import WRITE
from flowlane.events import Event

# id, attempt, the event itself where it is not the head of its stream, the head
Entry = tuple[int, int, Event | None, Event | None]

_entries: Final = msgspec.json.Decoder(list[Entry])

# One row however many entries there are, as JSON by concatenation: the events are JSON already. The long one
# comes last, since each further || would copy it.
_DUE: Final = """
SELECT '[' || group_concat(id) || ']', '[[' || group_concat(
    id || ',' || attempt || ',' || iif(event IS NULL AND version = head_version, 'null', coalesce(event, (
        SELECT l.event FROM log AS l WHERE l.stream = due.stream AND l.version = due.version
    ), 'null')) || ',' || coalesce(head, 'null'), '],[') || ']]'
FROM (
    SELECT q.id, q.attempt + 1 AS attempt, q.stream, q.version, q.event,
        h.event AS head, h.version AS head_version
    FROM queue AS q LEFT JOIN log AS h
        ON h.seq = (SELECT seq FROM log WHERE stream = q.stream ORDER BY version DESC LIMIT 1)
    WHERE q.stage = ? AND q.due <= ? ORDER BY q.due, q.id LIMIT ?
) AS due
"""
_SIZES: Final = """
SELECT length(CAST(coalesce(q.event, (
        SELECT l.event FROM log AS l WHERE l.stream = q.stream AND l.version = q.version)) AS BLOB))
    + coalesce((SELECT length(CAST(h.event AS BLOB)) FROM log AS h
        WHERE h.stream = q.stream AND (h.version > q.version OR q.event IS NOT NULL)
        ORDER BY h.version DESC LIMIT 1), 0)
FROM queue AS q WHERE q.stage = ? AND q.due <= ? ORDER BY q.due, q.id LIMIT ?
"""
_LEASE: Final = (
    "UPDATE queue SET due = ?, lease = ?, attempt = attempt + 1 WHERE id IN (SELECT value FROM json_each(?))"
)


# One receive hands out about so many bytes, at least one entry.
_BYTES: Final = 4 << 20


class Pace:
    """How many entries one look at the queue takes: as many as were found to be of ``_BYTES`` together."""

    __slots__ = ("entries",)
    MOST: Final = 512

    def __init__(self) -> None:
        self.entries = 64


class Receive:
    """Lease at most `limit` entries of `stages` under the number `lease` for `seconds`.

    The answer has the entries in portions, each of one stage: its name, their ids and the entries, both as
    JSON.
    """

    wakes: Collection[str] | None = ()
    size = 0

    def __init__(
        self,
        stages: Sequence[str],
        limit: int,
        lease: int,
        seconds: float,
        pace: Pace,
        leave: Callable[[Release], None],
    ) -> None:
        self.stages, self.limit, self.lease, self.seconds = stages, limit, lease, seconds
        self._pace, self._leave = pace, leave

    def peek(self, connection: sqlite3.Connection, now: int) -> Any:
        sql = "SELECT 1 FROM queue WHERE stage = ? AND due <= ? LIMIT 1"
        due = any(connection.execute(sql, (stage, now)).fetchone() for stage in self.stages)
        return WRITE if due else []

    def run(self, connection: sqlite3.Connection, now: int) -> list[tuple[str, str, str]]:
        answer: list[tuple[str, str, str]] = []
        left, room = self.limit, _BYTES
        until = now + int(self.seconds * 1000)
        for stage in self.stages:
            more = True
            while more and left > 0 and room > 0:
                asked = min(left, self._pace.entries)
                ids, entries = self._look(connection, (stage, now, asked), room, bool(answer))
                if entries is None:
                    break
                taken = connection.execute(_LEASE, (until, self.lease, ids)).rowcount
                answer.append((stage, ids, entries))
                more = taken == asked
                left -= taken
                size = len(entries) if entries.isascii() else len(entries.encode())
                room -= size
                if more and asked == self._pace.entries and 2 * size <= _BYTES:
                    self._pace.entries = min(2 * self._pace.entries, Pace.MOST)
        return answer

    def _look(
        self, connection: sqlite3.Connection, what: tuple[str, int, int], room: int, enough: bool
    ) -> tuple[str, str | None]:
        """Ids and entries, of `room` bytes together. If the first is longer: it, or none if that is `enough`.

        To add up the lengths for every receive would cost each entry; SQLite's own limit costs nothing.
        """
        limit = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, room)
        try:
            found: tuple[str, str | None] = connection.execute(_DUE, what).fetchone()
        except sqlite3.DataError:
            pass
        else:
            return found
        finally:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limit)
        fit = 0
        for (size,) in connection.execute(_SIZES, what):
            room -= size or 0
            if room < 0:
                break
            fit += 1
        if enough and fit == 0:
            return "[]", None
        fit = max(1, fit)
        if not enough:
            self._pace.entries = fit
        ids, entries = connection.execute(_DUE, (*what[:2], fit)).fetchone()
        return ids, entries

    def abandoned(self, answer: list[tuple[str, str, str]]) -> None:
        for _, ids, _ in answer:
            self._leave(Release(ids, self.lease))


class Change:
    """A request that always writes, and that stands even if its caller is gone."""

    wakes: Collection[str] | None = ()
    size = 0

    def peek(self, connection: sqlite3.Connection, now: int) -> Any:
        return WRITE

    def abandoned(self, answer: Any) -> None:
        """Nothing: it stands."""


class Release(Change):
    """Entries that were leased for somebody who is gone: due now, and not counted as an attempt."""

    wakes = None

    def __init__(self, ids: str, lease: int) -> None:
        self.ids, self.lease = ids, lease

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        connection.execute(
            "UPDATE queue SET due = ?, lease = 0, attempt = attempt - 1 "
            "WHERE id IN (SELECT value FROM json_each(?)) AND lease = ?",
            (now, self.ids, self.lease),
        )


class Ack(Change):
    """The entry is gone, if it is still leased so. `wakes`: where it may be the turn of another then."""

    def __init__(self, lease: tuple[int, int], wakes: Collection[str]) -> None:
        self.lease, self.wakes = lease, wakes

    def run(self, connection: sqlite3.Connection, now: int) -> None:
        number, lease = self.lease
        settle(connection, lease, [number], now)


class Nack(Change):
    """The entry is due again after `delay`, if it is still leased so."""

    wakes = None

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
    """Id, attempt, head and event of each entry in the answer to ``Receive``.

    Raises:
        msgspec.DecodeError: the file is damaged.
    """
    for number, attempt, published, head in _entries.decode(text):
        event = published or head
        if event is None:
            raise msgspec.DecodeError("an entry of the queue has no event")
        yield number, attempt, head, event
