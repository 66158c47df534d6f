"""Commits, many at once: what they write, and how conflicts among them are found."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, islice
from math import ceil
from types import MappingProxyType
from typing import Any, Final, Protocol

import msgspec

from flowlane import state
from flowlane.backends.common import counted, tell
from flowlane.backends.sqlite.records import store
from flowlane.backends.sqlite.schema import find_by_stream, keep_order
from flowlane.backends.sqlite.wall import Wall
from flowlane.backends.sqlite.wide import Wide
from flowlane.errors import VersionConflict
from flowlane.events import UNIT_REDRIVEN, Event, encode
from flowlane.ports import Append, ChannelRecord, Commit, Committed, Publish, Tally
from flowlane.state import Counts, RunTally, StageTally

_DONE: Final = Committed(MappingProxyType({}))

_TALLY: Final = (
    "found, settled, dead, skipped, superseded, redriven, "
    "records_in, expanded, records_out, records_skipped, quarantined, bytes_in, bytes_out"
)
_ADD_TALLY: Final = (
    f"INSERT INTO tally (run, round, stage, closed, {_TALLY}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) "  # noqa: S608
    "ON CONFLICT DO UPDATE SET closed = max(closed, excluded.closed), "
    + ", ".join(f"{column} = {column} + excluded.{column}" for column in _TALLY.split(", "))
)
_READ_TALLY: Final = f"SELECT stage, closed, {_TALLY} FROM tally WHERE run = ? AND round = ?"  # noqa: S608
_COMPLETE: Final = "SELECT max(closed) AND NOT sum(found <> settled) FROM tally WHERE run = ? AND round = ?"


_LOG: Final = Wide("INSERT INTO log (stream, version, lane, run, event) VALUES ", "(?,?,?,?,?)")
_OPEN: Final = Wide("INSERT INTO open (stream, lane) VALUES ", "(?,?)", " ON CONFLICT DO NOTHING")
_CLOSE: Final = Wide("DELETE FROM open WHERE stream IN (", "?", ")")
_BURY: Final = Wide("INSERT INTO dead (stream, lane) VALUES ", "(?,?)", " ON CONFLICT DO NOTHING")
_REVIVE: Final = "DELETE FROM dead WHERE lane = ? AND stream = ?"
_PUBLISH: Final = Wide("INSERT INTO queue (stage, due, stream, version) VALUES ", "(?,?,?,?)")
_LINE_UP: Final = Wide("INSERT INTO queue (stage, due, stream, version, event, grp) VALUES ", "(?,?,?,?,?,?)")
_REMIND: Final = (
    "INSERT INTO queue (stage, due, stream, version, event, grp) SELECT ?1, ?2, ?3, ?4, ?5, ?6 "
    "WHERE NOT EXISTS (SELECT 1 FROM queue WHERE stream = ?3)"
)
_ACK: Final = Wide("DELETE FROM queue WHERE id IN (", "?", ") AND lease = ? AND due > ?")
_EXIST: Final = Wide(
    "SELECT count(*) FROM (VALUES ",
    "(?,?)",
    ") AS v CROSS JOIN log ON log.stream = v.column1 AND log.version = v.column2",
)
_HEADS: Final = Wide("SELECT stream, max(version) FROM log WHERE stream IN (", "?", ") GROUP BY stream")


class Leased(Protocol):
    """A delivery of this backend's queue: its id and lease there, and the head of its stream as it was when
    it was received."""

    @property
    def lease(self) -> tuple[int, int]: ...
    @property
    def head(self) -> Event | None: ...


Entry = tuple[Commit, Leased | None]  # a commit, already checked, and what it acks


class Group:
    """Commits that are written together, as values for wide statements.

    Made on the loop, where a mistake can be told to the caller, and so that the thread that writes touches
    few objects: those that the other core has made are slow to reach.
    """

    __slots__ = (
        "acks",
        "broken",
        "closed",
        "dead",
        "ends",
        "lines",
        "log",
        "needed",
        "opened",
        "publish",
        "puts",
        "reminders",
        "revived",
        "size",
        "tally",
    )

    def __init__(self) -> None:
        self.ends: dict[str, int] = {}  #: the streams appended to, and their heads afterwards
        self.broken = False  #: a commit does not follow the one before it in its stream
        self.needed: list[Any] = []  #: streams and versions that the log must have, and is not known to
        self.log: list[Any] = []
        self.opened: dict[str, str] = {}  #: streams, with their lanes
        self.closed: dict[str, None] = {}
        self.dead: dict[str, str] = {}
        self.revived: list[tuple[str, str]] = []  #: lanes and streams of what is dead no more
        self.acks: dict[int, list[int]] = {}  #: by lease: ids in the queue
        self.publish: list[Any] = []  #: stages, milliseconds of delay, streams, versions
        self.lines: list[tuple[str, int, str, int, str | None, str | None]] = []  #: with event, and group
        self.reminders: list[tuple[str, int, str, int, str | None, str | None]] = []
        self.puts: dict[str, list[ChannelRecord]] = {}  #: by channel
        self.tally: dict[tuple[str, int, str], list[int]] = {}
        self.size = 0  #: bytes of the events in it

    def take(self, entries: Iterator[Entry]) -> None:
        """Add the commits of `entries`, in order, up to and with one that reminds of a unit.

        Raises:
            Permanent: an event is too long.
        """
        taken: list[Commit] = []
        for commit, held in entries:
            taken.append(commit)
            head, publishes = None, commit.publish
            texts: dict[tuple[str, int], bytes] | None = {} if publishes else None
            if held is not None:
                head = held.head
                number, lease = held.lease
                self.acks.setdefault(lease, []).append(number)
            for append in commit.appends:
                self._append(append, head, texts)
            if texts is not None:
                for publish in publishes:
                    self._publish(publish, texts)
                if self.reminders:
                    break
        for tally, times in counted(taken):
            self._count(tally, times)

    def _append(
        self, append: Append, head: Event | None, texts: MutableMapping[tuple[str, int], bytes] | None
    ) -> None:
        stream, expected = append.stream, append.expected
        for event in append.events:
            text = encode(event)
            self.size += len(text)
            self.log += (stream, event.version, event.source, event.run, text.decode())
            if texts is not None:
                texts[stream, event.version] = text
            if event.type == UNIT_REDRIVEN:
                self.revived.append((event.source, stream))
        before = self.ends.get(stream)
        if before is not None:
            self.broken = self.broken or before != expected
            self._forget(stream)
        elif expected and not (head is not None and head.version >= expected and head.subject == stream):
            self.needed += (stream, expected)  # else a delivery has brought it: it was there, and is
        self.ends[stream] = event.version
        index = state.index(event)
        if index == "open":
            self.opened[stream] = event.source
        elif index or expected:
            self.closed[stream] = None
            if index:
                self.dead[stream] = event.source

    def _forget(self, stream: str) -> None:
        """It does not count in which index `stream` was before the last of the group's events."""
        self.opened.pop(stream, None)
        self.closed.pop(stream, None)
        self.dead.pop(stream, None)

    def _publish(self, publish: Publish, texts: Mapping[tuple[str, int], bytes]) -> None:
        event = publish.event
        known = texts.get((event.subject, event.version))
        delay = ceil(publish.delay * 1000) if publish.delay else 0
        if publish.via == "queue" and known is not None and not (publish.repeat or publish.group):
            self.publish += (publish.stage, delay, event.subject, event.version)
            return
        text = known or encode(event)
        self.size += len(text)
        if publish.via == "channel":
            self.puts.setdefault(publish.stage, []).append(ChannelRecord(publish.group, text))
            return
        copy = None if known else text.decode()
        rows = self.reminders if publish.repeat else self.lines
        rows.append((publish.stage, delay, event.subject, event.version, copy, publish.group or None))

    def _count(self, tally: Tally, times: int) -> None:
        row = self.tally.setdefault((tally.run, tally.round, tally.stage), [0] * 14)
        row[0] |= tally.closed
        units = (tally.found, tally.settled, tally.dead, tally.skipped, tally.superseded, tally.redriven)
        counts = () if tally.counts is None else msgspec.structs.astuple(tally.counts)
        for place, number in enumerate((*units, *counts), 1):
            row[place] += number * times

    def write(self, connection: sqlite3.Connection, now: int) -> None:
        """Write all of it, in the transaction that `connection` is in.

        Raises:
            _ConflictError, sqlite3.IntegrityError: some commit is in conflict; the transaction must be rolled
                back.
        """
        found = sum(connection.execute(sql, part).fetchone()[0] for sql, part in _EXIST.parts(self.needed))
        if self.broken or found != len(self.needed) // 2:
            raise _ConflictError  # the unique index refuses a version that exists; this: one without the last
        _LOG.run(connection, self.log)
        if self.revived:
            connection.executemany(_REVIVE, self.revived)
        _OPEN.run(connection, [*chain.from_iterable(self.opened.items())])
        _CLOSE.run(connection, [*self.closed])
        _BURY.run(connection, [*chain.from_iterable(self.dead.items())])
        for lease, numbers in self.acks.items():
            settle(connection, lease, numbers, now)
        publish = [*self.publish]
        publish[1::4] = [now + delay for delay in publish[1::4]]
        _PUBLISH.run(connection, publish)
        if self.lines or self.reminders:
            self._line_up(connection, now)
        for channel, records in self.puts.items():
            store(connection, channel, records)

    def _line_up(self, connection: sqlite3.Connection, now: int) -> None:
        lines = [(stage, now + delay, *on) for stage, delay, *on in self.lines]
        reminders = [(stage, now + delay, *on) for stage, delay, *on in self.reminders]
        if any(row[-1] for row in (*lines, *reminders)):
            keep_order(connection)
        _LINE_UP.run(connection, [*chain.from_iterable(lines)])
        if reminders:
            find_by_stream(connection)
        for row in reminders:  # whether a unit is queued depends on all that was acked and published before
            connection.execute(_REMIND, row)


def grouped(entries: Iterable[Entry]) -> list[Group]:
    """The commits of `entries`, in order; one that reminds of a unit ends its group.

    Raises:
        Permanent: an event is too long.
    """
    left = iter(entries)
    groups = [Group()]
    groups[0].take(left)
    while groups[-1].reminders:
        groups.append(Group())
        groups[-1].take(left)
    return groups


class Work:
    """One call of ``Backend.commit``: a request to the writer. It wakes `moved`, the stages where something
    may be due when it is done, besides those of what it publishes.

    Raises:
        Permanent: an event is too long.
    """

    __slots__ = ("entries", "groups", "size", "wakes")

    def __init__(self, entries: Sequence[Entry], moved: Collection[str]) -> None:
        self.entries = entries
        self.groups = grouped(entries)
        self.size = sum([group.size for group in self.groups])
        self.wakes = {publish.stage for commit, _ in entries for publish in commit.publish}
        self.wakes.update(moved)

    def abandoned(self, answer: Any) -> None:
        """Nothing: the commits stand."""


class _ConflictError(Exception):
    """Some commit of the group is in conflict."""


def apply(
    connection: sqlite3.Connection, works: Sequence[Work], wall: Wall
) -> Sequence[Sequence[Committed | VersionConflict]]:
    """Write `works`, in the transaction that `wall` has just begun; one answer for each of their commits.

    Optimistic: conflicts are rare, so all is written as if there were none. If there is one, the transaction
    is begun again, the heads are read at once, and the commits that conflict are left out.
    """
    entries = [entry for work in works for entry in work.entries]
    groups = [group for work in works for group in work.groups]
    conflicts: dict[int, VersionConflict] = {}
    try:
        for group in groups:
            group.write(connection, wall.moment)
    except (sqlite3.IntegrityError, _ConflictError):
        wall.again(connection)
        conflicts = _conflicts(connection, entries)
        groups = grouped(entry for n, entry in enumerate(entries) if n not in conflicts)
        for group in groups:
            group.write(connection, wall.moment)
    answers: list[Committed | VersionConflict] = [conflicts.get(n, _DONE) for n in range(len(entries))]
    tell([commit for commit, _ in entries], answers, _count(connection, groups))
    left = iter(answers)
    return [[*islice(left, len(work.entries))] for work in works]


def _conflicts(connection: sqlite3.Connection, entries: Sequence[Entry]) -> dict[int, VersionConflict]:
    heads: dict[str, int] = {}
    streams = {append.stream: None for commit, _ in entries for append in commit.appends}
    for sql, part in _HEADS.parts([*streams]):
        heads.update(connection.execute(sql, part))
    conflicts: dict[int, VersionConflict] = {}
    for n, (commit, _) in enumerate(entries):
        appends = commit.appends
        wrong = {a.stream: heads.get(a.stream, 0) for a in appends if heads.get(a.stream, 0) != a.expected}
        if wrong:
            conflicts[n] = VersionConflict(wrong)
        else:
            heads.update((append.stream, append.events[-1].version) for append in appends)
    return conflicts


def settle(connection: sqlite3.Connection, lease: int, numbers: list[int], now: int) -> None:
    """The queue entries with those ids are gone; those that are not leased so, or no more, stay."""
    for sql, part in _ACK.parts(numbers):
        connection.execute(sql, [*part, lease, now])


def _count(connection: sqlite3.Connection, groups: Sequence[Group]) -> dict[tuple[str, int], RunTally]:
    """Add the tallies of `groups`; the rounds among them that are complete now."""
    rows = [(*key, *row) for group in groups for key, row in group.tally.items()]
    if rows:
        connection.executemany(_ADD_TALLY, rows)
    complete: dict[tuple[str, int], RunTally] = {}
    for run, round_ in {key[:2]: None for group in groups for key in group.tally}:
        (done,) = connection.execute(_COMPLETE, (run, round_)).fetchone()
        if done:
            complete[run, round_] = read_tally(connection, run, round_)
    return complete


def read_tally(connection: sqlite3.Connection, run: str, round: int) -> RunTally:
    """The counters of one (run, round), all as of one moment."""
    tally = RunTally()
    for stage, closed, *numbers in connection.execute(_READ_TALLY, (run, round)).fetchall():
        tally.closed = tally.closed or bool(closed)
        found, settled, dead, skipped, superseded, redriven, *counts = numbers
        tally.stages[stage] = StageTally(
            found, settled, dead, skipped, superseded, redriven, counts=Counts(*counts)
        )
    return tally
