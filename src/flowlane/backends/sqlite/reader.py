"""Reads of the log, in a thread and with a connection of their own, in chunks."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import msgspec

from flowlane import state
from flowlane.backends.sqlite.group import read_tally
from flowlane.backends.sqlite.schema import Identity, Settings, connect_reader, failure
from flowlane.events import Event
from flowlane.ports import Index
from flowlane.state import RunTally

T = TypeVar("T")

_events: Final = msgspec.json.Decoder(list[Event])

# A chunk of an iteration: what is in memory at once, and how long the thread is taken for it.
_CHUNK: Final = 256

# One row a chunk, the events joined to a JSON array: see ``group`` on why not a row for each.
_LAST: Final = """
SELECT '[' || group_concat((SELECT event FROM log WHERE stream = value ORDER BY version DESC LIMIT 1)) || ']'
FROM (SELECT DISTINCT value FROM json_each(?))
"""
_READ: Final = """
SELECT '[' || group_concat(event) || ']', max(version)
FROM (SELECT event, version FROM log WHERE stream = ? AND version > ? ORDER BY version LIMIT ?)
"""
_SCAN: Final = """
SELECT '[' || group_concat(event) || ']', max(seq)
FROM (SELECT event, seq FROM log WHERE lane = ? AND seq > ? ORDER BY seq LIMIT ?)
"""
_SCAN_RUN: Final = _SCAN.replace("lane = ?", "lane = ? AND run = ?")
_UNITS: Final = """
SELECT '[' || group_concat(
    (SELECT event FROM log WHERE log.stream = u.stream ORDER BY version DESC LIMIT 1)) || ']', max(stream)
FROM (SELECT stream FROM {} WHERE lane = ? AND stream > ? ORDER BY stream LIMIT ?) AS u
"""
_INDEXES: Final[Mapping[Index, str]] = {"open": _UNITS.format("open"), "dead": _UNITS.format("dead")}
_RUNS: Final = """
SELECT '[' || group_concat(
    (SELECT event FROM log WHERE log.stream = r.stream ORDER BY version DESC LIMIT 1)) || ']'
FROM (SELECT stream FROM log WHERE lane = ? AND version = 1 AND stream = run ORDER BY seq DESC LIMIT ?) AS r
"""


class Reader:
    """Reads see every commit that was answered before they began."""

    def __init__(self, settings: Settings, identity: Identity) -> None:
        self._settings, self._identity = settings, identity
        self._executor = ThreadPoolExecutor(1, "flowlane-sqlite-read")
        self._connection: sqlite3.Connection | None = None

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        finally:
            self._executor.shutdown(wait=False)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        """The last event of each stream that exists."""
        (text,) = await self._row(_LAST, (msgspec.json.encode(streams).decode(),))
        return {event.subject: event for event in self._decode(text)}

    async def read(self, stream: str, after: int) -> AsyncIterator[Event]:
        """The events of `stream` after version `after`."""
        async for event in self._chunks(_READ, (stream,), after):
            yield event

    async def scan(self, lane: str, run: str | None) -> AsyncIterator[Event]:
        """The events of `lane` in the order of their commits."""
        sql, arguments = (_SCAN, (lane,)) if run is None else (_SCAN_RUN, (lane, run))
        async for event in self._chunks(sql, arguments, 0):
            yield event

    async def units(self, lane: str, index: Index) -> AsyncIterator[Event]:
        """The heads of the streams of `lane` in `index`, in the order of their names."""
        async for event in self._chunks(_INDEXES[index], (lane,), ""):
            # A dead one is struck off when it is redriven; if it goes on in any other way, it is told here.
            if index == "open" or state.index(event) == index:
                yield event

    async def runs(self, lane: str, limit: int) -> Sequence[Event]:
        """The heads of the last `limit` runs of `lane`, oldest first."""
        (text,) = await self._row(_RUNS, (lane, limit))
        return self._decode(text)[::-1]

    async def tally(self, run: str, round: int) -> RunTally:
        """The counters of one (run, round)."""
        return await self._in_thread(lambda connection: read_tally(connection, run, round))

    async def _chunks(
        self, sql: str, arguments: tuple[str, ...], position: int | str
    ) -> AsyncIterator[Event]:
        while True:
            text, end = await self._row(sql, (*arguments, position, _CHUNK))
            if end is None:
                return
            for event in self._decode(text):
                yield event
            position = end

    async def _row(self, sql: str, arguments: Sequence[Any]) -> Any:
        return await self._in_thread(lambda connection: connection.execute(sql, arguments).fetchone())

    async def _in_thread(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, work)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self._identity.check()
            if self._connection is None:
                self._connection = connect_reader(self._settings)
            return work(self._connection)
        except sqlite3.Error as error:
            raise failure(error, self._settings.path) from None

    def _decode(self, text: str | None) -> list[Event]:
        try:
            return [] if text is None else _events.decode(text)
        except msgspec.DecodeError as error:
            raise failure(error, self._settings.path) from None
