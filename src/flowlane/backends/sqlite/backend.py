"""The backend as the loop sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import msgspec

from flowlane.backends.common import CHANNEL_LEASE, POLL, News, checked, held_for
from flowlane.backends.sqlite.channel import SqliteChannel
from flowlane.backends.sqlite.group import Leased, Work
from flowlane.backends.sqlite.queue import Ack, Extend, Nack, Pace, Purge, Receive, entries
from flowlane.backends.sqlite.reader import Reader
from flowlane.backends.sqlite.schema import Settings, failure
from flowlane.backends.sqlite.writer import Writer
from flowlane.clock import Clock
from flowlane.errors import ConfigError, VersionConflict, redact
from flowlane.events import Event
from flowlane.ports import Channel, Commit, Committed, Delivery, Environment, Index, Patience, QueueSpec
from flowlane.state import RunTally

# The longest ``busy_timeout``, a day: SQLite's own number of milliseconds ends at 25 of them.
_LONGEST: Final = 86400


class _Delivery(msgspec.Struct, eq=False, gc=False):
    event: Event
    stage: str
    attempt: int
    head: Event | None
    lease: tuple[int, int]  # queue id and the number of the receive
    backend: SqliteBackend

    async def ack(self) -> None:
        await self.backend.writer.submit(Ack(self.lease, (self.stage,) if self.event.partitionkey else ()))

    async def nack(self, *, delay: float = 0) -> None:
        await self.backend.writer.submit(Nack(self.lease, delay))

    async def extend(self, seconds: float) -> bool:
        return bool(await self.backend.writer.submit(Extend(self.lease, seconds)))


class SqliteBackend:
    """See ``ports.Backend``. Safe for the tasks of one loop, and for every process that opens the file.
    `hold`: of a partition of a channel, seconds."""

    exact_queue = True  # see ``ports.Backend``

    def __init__(
        self,
        path: Path,
        clock: Clock,
        writer: Writer,
        reader: Reader,
        news: News,
        *,
        hold: float = CHANNEL_LEASE,
    ) -> None:
        self._path = path
        self._clock = clock
        self.writer = writer
        self._reader = reader
        self._news = news
        self._hold = hold
        self._turn = 0
        self._pace = Pace()

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        entries: list[tuple[Commit, Leased | None]] = []
        moved: set[str] = set()  # where the next of a group moves up behind what is acked
        carried: list[tuple[int, Delivery]] = []  # which another than the queue has brought
        for number, commit in enumerate(checked(work)):
            delivery = commit.ack
            if type(delivery) is _Delivery and delivery.backend is self:
                entries.append((commit, delivery))
                if delivery.event.partitionkey:
                    moved.add(delivery.stage)
                continue
            entries.append((commit, None))
            if delivery is not None:
                carried.append((number, delivery))
        answers: Sequence[Committed | VersionConflict] = await self.writer.submit(Work(entries, moved))
        for number, delivery in carried:
            if isinstance(answers[number], Committed):
                await delivery.ack()
        return answers

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        return await self._reader.last(streams)

    def read(self, stream: str, *, after: int = 0) -> AsyncIterator[Event]:
        return self._reader.read(stream, after)

    def scan(self, lane: str, *, run: str | None = None) -> AsyncIterator[Event]:
        return self._reader.scan(lane, run)

    def units(self, lane: str, index: Index, patience: Patience | None = None) -> AsyncIterator[Event]:
        return self._reader.units(lane, index)

    async def runs(self, lane: str, limit: int) -> Sequence[Event]:
        return await self._reader.runs(lane, limit)

    async def tally(self, run: str, round: int) -> RunTally:
        return await self._reader.tally(run, round)

    async def receive(
        self, stages: Sequence[str], limit: int, *, lease: float, wait: float = 0
    ) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while True:
            seen = self._news.count
            taken = await self._take(stages, limit, lease)
            left = end - loop.time()
            if taken or left <= 0:
                return taken
            await self._news.wait(seen, min(left, POLL), stages)

    async def _take(self, stages: Sequence[str], limit: int, lease: float) -> Sequence[Delivery]:
        if not stages:
            return []
        self._turn = (self._turn + 1) % len(stages)  # another stage comes first each time: none starves
        turned = [*stages[self._turn :], *stages[: self._turn]]
        number = int.from_bytes(blake2b(self._clock.token().encode(), digest_size=7).digest(), "big")
        request = Receive(turned, limit, number, lease, self._pace, self.writer.leave)
        answer = await self.writer.submit(request)
        try:
            return [
                _Delivery(event, stage, attempt, head, (entry, number), self)
                for stage, _, text in answer
                for entry, attempt, head, event in entries(text)
            ]
        except msgspec.DecodeError as error:
            raise failure(error, self._path) from None

    def channel(self, name: str) -> Channel:
        return SqliteChannel(name, self._clock, self.writer, self._news, self._hold)

    async def create(self, queues: Sequence[QueueSpec]) -> Sequence[str]:
        return []

    async def resend(self, lane: str) -> int:
        return 0

    async def given_up(self, stages: Sequence[str], limit: int) -> Sequence[Delivery]:
        return []

    async def purge(self) -> None:
        await self.writer.submit(Purge())


@asynccontextmanager
async def open_backend(
    uri: str,
    environment: Environment,
    *,
    synchronous: str = "normal",
    busy_timeout: str = "30",
    hold: str = "",
) -> AsyncIterator[SqliteBackend]:
    """The backend in the file that `uri` names: ``sqlite:///relative/path``, ``sqlite:////absolute/path``.

    The file and its directory are made if they are missing. With ``synchronous=full`` the last commits
    survive a power failure, with ``normal`` they may be lost, log and queue together. ``busy_timeout`` is
    how long (seconds) a write waits for those of other processes, ``hold`` how long a partition of a channel
    is held that nobody renews (``5s``); processes need not agree on it.

    Raises:
        ConfigError: see ``schema.connect``; or an option is wrong.
    """
    settings, held = _settings(uri, synchronous, busy_timeout), held_for(uri, hold)
    news = News()
    async with (
        Writer(settings, environment.clock, news) as writer,
        Reader(settings, writer.identity) as reader,
    ):
        yield SqliteBackend(settings.path, environment.clock, writer, reader, news, hold=held)


def _settings(uri: str, synchronous: str, busy_timeout: str) -> Settings:
    parts = urlsplit(uri)
    path = unquote(parts.path[1:])
    if parts.scheme != "sqlite" or parts.netloc or not path or path == ":memory:" or "\0" in path:
        raise ConfigError(
            f"{redact(uri)}: write sqlite:///relative/path or sqlite:////absolute/path of a file"
        )
    if synchronous.lower() not in ("normal", "full"):
        raise ConfigError(f"{redact(uri)}: synchronous={synchronous} is neither normal nor full")
    try:
        seconds = float(busy_timeout)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= _LONGEST:
        raise ConfigError(
            f"{redact(uri)}: busy_timeout={busy_timeout} is not a number of seconds from 0 to {_LONGEST}"
        )
    return Settings(Path(path).absolute(), synchronous.upper(), seconds)
