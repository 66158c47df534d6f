"""Commits, many at once: what they write, and how conflicts among them are found."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from math import ceil
from types import MappingProxyType
from typing import Any, Final

import msgspec

from flowlane import state
from flowlane.backends.sqlite.records import store
from flowlane.backends.sqlite.schema import keep_order
from flowlane.backends.sqlite.wall import Wall
from flowlane.backends.sqlite.wide import Wide
from flowlane.errors import VersionConflict
from flowlane.events import UNIT_REDRIVEN, encode
from flowlane.ports import ChannelRecord, Commit, Committed, Tally
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
_PUBLISH: Final = Wide("INSERT INTO queue (stage, due, stream, version, event) VALUES ", "(?,?,?,?,?)")
_LINE_UP: Final = Wide("INSERT INTO queue (stage, due, stream, version, event, grp) VALUES ", "(?,?,?,?,?,?)")
_REMIND: Final = (
    "INSERT INTO queue (stage, due, stream, version, event, grp) SELECT ?1, ?2, ?3, ?4, ?5, ?6 "
    "WHERE NOT EXISTS (SELECT 1 FROM queue WHERE stream = ?3)"
)
_ACK: Final = Wide(
    "DELETE FROM queue WHERE id IN (SELECT id FROM (VALUES ",
    "(?,?)",
    ") AS v CROSS JOIN queue AS q ON q.id = v.column1 WHERE q.lease = v.column2 AND q.due > ?)",
)
_EXIST: Final = Wide(
    "SELECT count(*) FROM (VALUES ",
    "(?,?)",
    ") AS v CROSS JOIN log ON log.stream = v.column1 AND log.version = v.column2",
)
_HEADS: Final = Wide("SELECT stream, max(version) FROM log WHERE stream IN (", "?", ") GROUP BY stream")


class Prepared(msgspec.Struct, gc=False):
    """One commit as rows, made on the caller's side, where its mistakes can be told to the caller."""

    heads: list[tuple[str, int, int]]  #: stream, version expected, version afterwards
    log: list[Any]
    units: list[tuple[str, str, str | None]]  #: stream, lane, index
    revived: list[tuple[str, str]]  #: lane and stream of what is dead no more
    #: whether repeated, then as in the queue
    publish: list[tuple[bool, str, int, str, int, str | None, str | None]]
    puts: list[tuple[str, ChannelRecord]]  #: what goes to which channel
    tally: Sequence[Tally]
    ack: tuple[int, int] | None  #: queue id and lease
    size: int  #: bytes of the events in it


class Work:
    """One call of ``Backend.commit``: a request to the writer. It wakes `moved`, the stages where something
    may be due when it is done, besides those of what it publishes."""

    __slots__ = ("commits", "size", "wakes")

    def __init__(self, commits: list[Prepared], moved: Collection[str]) -> None:
        self.commits = commits
        self.size = sum(commit.size for commit in commits)
        self.wakes = {row[1] for commit in commits for row in commit.publish}
        self.wakes.update(moved)
        self.wakes.update([channel for commit in commits for channel, _ in commit.puts])

    def abandoned(self, answer: Any) -> None:
        """Nothing: the commits stand."""


class _ConflictError(Exception):
    """Some commit of the group is in conflict."""


def prepare(commit: Commit, ack: tuple[int, int] | None) -> Prepared:
    """`commit`, already checked, as rows.

    Raises:
        Permanent: an event is too long.
    """
    heads: list[tuple[str, int, int]] = []
    log: list[Any] = []
    units: list[tuple[str, str, str | None]] = []
    revived: list[tuple[str, str]] = []
    size = 0
    own: dict[tuple[str, int], bytes] = {}
    for append in commit.appends:
        for event in append.events:
            text = encode(event)
            size += len(text)
            log += (append.stream, event.version, event.source, event.run, text.decode())
            own[append.stream, event.version] = text
        last = append.events[-1]
        heads.append((append.stream, append.expected, last.version))
        index = state.index(last)
        if index or append.expected:
            units.append((append.stream, last.source, index))
            if index == "open" and append.expected and UNIT_REDRIVEN in [e.type for e in append.events]:
                revived.append((last.source, append.stream))
    rows: list[tuple[bool, str, int, str, int, str | None, str | None]] = []
    puts: list[tuple[str, ChannelRecord]] = []
    for publish in commit.publish:
        event = publish.event
        known = own.get((event.subject, event.version))
        if publish.via == "channel":
            text = known or encode(event)
            size += len(text)
            puts.append((publish.stage, ChannelRecord(publish.group, text)))
            continue
        copy = None
        if known is None:
            text = encode(event)
            size += len(text)
            copy = text.decode()
        delay = ceil(publish.delay * 1000)
        rows.append(
            (publish.repeat, publish.stage, delay, event.subject, event.version, copy, publish.group or None)
        )
    return Prepared(heads, log, units, revived, rows, puts, commit.tally, ack, size)


def apply(
    connection: sqlite3.Connection, group: Sequence[Prepared], wall: Wall
) -> list[Committed | VersionConflict]:
    """Write `group`, in the transaction that `wall` has just begun; one answer for each.

    Optimistic: conflicts are rare, so all is written as if there were none. If there is one, the transaction
    is begun again, the heads are read at once, and the commits that conflict are left out.
    """
    accepted: Sequence[Prepared] = group
    conflicts: dict[int, VersionConflict] = {}
    try:
        _check_chains(connection, group)
        _write(connection, group, wall.moment)
    except (sqlite3.IntegrityError, _ConflictError):
        wall.again(connection)
        conflicts = _conflicts(connection, group)
        accepted = [commit for n, commit in enumerate(group) if n not in conflicts]
        _write(connection, accepted, wall.moment)
    complete = _count(connection, accepted)
    return [
        conflicts[n] if n in conflicts else _committed(commit, complete) for n, commit in enumerate(group)
    ]


def _check_chains(connection: sqlite3.Connection, group: Iterable[Prepared]) -> None:
    """The unique index refuses a version that exists; here: that the version before it does."""
    ends: dict[str, int] = {}
    needed: list[Any] = []
    for commit in group:
        for stream, expected, end in commit.heads:
            before = ends.get(stream)
            if before is None:
                if expected:
                    needed += (stream, expected)
            elif before != expected:
                raise _ConflictError
            ends[stream] = end
    found = sum(connection.execute(sql, part).fetchone()[0] for sql, part in _EXIST.parts(needed))
    if found != len(needed) // 2:
        raise _ConflictError


def _conflicts(connection: sqlite3.Connection, group: Sequence[Prepared]) -> dict[int, VersionConflict]:
    heads: dict[str, int] = {}
    for sql, part in _HEADS.parts(list({stream: None for commit in group for stream, _, _ in commit.heads})):
        heads.update(connection.execute(sql, part))
    conflicts: dict[int, VersionConflict] = {}
    for n, commit in enumerate(group):
        wrong = {s: heads.get(s, 0) for s, expected, _ in commit.heads if heads.get(s, 0) != expected}
        if wrong:
            conflicts[n] = VersionConflict(wrong)
        else:
            heads.update((stream, end) for stream, _, end in commit.heads)
    return conflicts


def _write(connection: sqlite3.Connection, group: Iterable[Prepared], now: int) -> None:
    log: list[Any] = []
    units: dict[str, tuple[str, str, str | None]] = {}
    acks: list[Any] = []
    publish: list[Any] = []
    lines: list[Any] = []
    revived: list[tuple[str, str]] = []
    puts: dict[str, list[ChannelRecord]] = {}
    for commit in group:
        log += commit.log
        revived += commit.revived
        for channel, record in commit.puts:
            puts.setdefault(channel, []).append(record)
        for unit in commit.units:
            units[unit[0]] = unit
        if commit.ack is not None:
            acks += commit.ack
        for repeat, stage, delay, stream, version, event, line in commit.publish:
            if repeat:
                # Whether the unit is queued depends on all that was acked and published before, in order.
                _flush(connection, acks, publish, lines, now)
                if line:
                    keep_order(connection)
                connection.execute(_REMIND, (stage, now + delay, stream, version, event, line))
            elif line:
                lines += (stage, now + delay, stream, version, event, line)
            else:
                publish += (stage, now + delay, stream, version, event)
    _LOG.run(connection, log)
    if revived:
        connection.executemany(_REVIVE, revived)
    _list(connection, units.values())
    _flush(connection, acks, publish, lines, now)
    for channel, records in puts.items():
        store(connection, channel, records)


def _list(connection: sqlite3.Connection, units: Iterable[tuple[str, str, str | None]]) -> None:
    opened: list[str] = []
    closed: list[str] = []
    dead: list[str] = []
    for stream, lane, index in units:
        if index == "open":
            opened += (stream, lane)
        else:
            closed.append(stream)
            if index:
                dead += (stream, lane)
    _OPEN.run(connection, opened)
    _CLOSE.run(connection, closed)
    _BURY.run(connection, dead)


def _flush(
    connection: sqlite3.Connection, acks: list[Any], publish: list[Any], lines: list[Any], now: int
) -> None:
    settle(connection, acks, now)
    _PUBLISH.run(connection, publish)
    if lines:
        keep_order(connection)
        _LINE_UP.run(connection, lines)
        lines.clear()
    acks.clear()
    publish.clear()


def settle(connection: sqlite3.Connection, leases: list[Any], now: int) -> None:
    """The queue entries given by id and lease are gone; those whose lease has ended stay."""
    for sql, part in _ACK.parts(leases):
        connection.execute(sql, [*part, now])


def _count(connection: sqlite3.Connection, group: Iterable[Prepared]) -> dict[tuple[str, int], RunTally]:
    """Add the tallies of `group`; the rounds among them that are complete now."""
    sums: dict[tuple[str, int, str], list[int]] = {}
    for commit in group:
        for tally in commit.tally:
            key = (tally.run, tally.round, tally.stage)
            row = sums.get(key)
            if row is None:
                row = sums[key] = [0] * 14
            row[0] |= tally.closed
            row[1] += tally.found
            row[2] += tally.settled
            if tally.dead or tally.skipped or tally.superseded or tally.redriven:
                row[3] += tally.dead
                row[4] += tally.skipped
                row[5] += tally.superseded
                row[6] += tally.redriven
            if (counts := tally.counts) is not None:
                row[7] += counts.records_in
                row[8] += counts.expanded
                row[9] += counts.records_out
                row[10] += counts.skipped
                row[11] += counts.quarantined
                row[12] += counts.bytes_in
                row[13] += counts.bytes_out
    complete: dict[tuple[str, int], RunTally] = {}
    if sums:
        connection.executemany(_ADD_TALLY, [(*key, *row) for key, row in sums.items()])
        for run, round_ in {key[:2]: None for key in sums}:
            (done,) = connection.execute(_COMPLETE, (run, round_)).fetchone()
            if done:
                complete[run, round_] = read_tally(connection, run, round_)
    return complete


def _committed(commit: Prepared, complete: dict[tuple[str, int], RunTally]) -> Committed:
    if not complete or not commit.tally:
        return _DONE
    keys = {(tally.run, tally.round) for tally in commit.tally}
    return Committed({key: complete[key] for key in keys if key in complete})


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
