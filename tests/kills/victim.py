"""A worker that is made to be killed: it tells in shared memory what it is in the middle of.

Backend and stores are the real ones; calls on their way through are counted in a page shared with the killer,
so that a kill can be aimed, and be told afterwards where it hit.
"""

import asyncio
import gzip
import json
import mmap
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Loaded once by the fork server, so that a worker is there within milliseconds.
import flowlane.backends.sqlite
import flowlane.connectors.file
import flowlane.connectors.http  # noqa: F401
from flowlane import Policy
from flowlane.compose import open_application
from flowlane.deadline import Deadline
from flowlane.lane import Lane
from flowlane.ports import (
    Bad,
    Batch,
    Commit,
    Committed,
    Delivery,
    Sink,
    Split,
    Store,
    UnitRef,
    Upload,
    Writer,
)
from flowlane.recipes import http_archive, zip_tables
from flowlane.settings import Settings
from flowlane.testing.lying_server import LyingServer
from flowlane.worker import serve

PHASES = ("held", "effect", "commit", "ack")
START = "2020-01-01T00"


def archive(hour: int) -> bytes:
    """The archive of one hour: small, and unlike any other."""
    lines = [json.dumps({"id": str(hour * 100 + n), "hour": hour, "pad": "x" * 50}) for n in range(20)]
    return gzip.compress("\n".join(lines).encode() + b"\n", mtime=0)


def lane(url: str, lake: str, until: str) -> Lane:
    """Small hourly archives, under a policy that no number of kills makes give up."""
    return http_archive(
        "kills",
        url=url + "/{t:%Y-%m-%d}-{t.hour}.json.gz",
        start=START,
        until=until,
        to=lake,
        every="1s",
        policy=Policy(lease=1.0, retries=1000, backoff=0.05, backoff_cap=0.2, concurrency=4),
    )


def drops_lane(source: str, to: str) -> Lane:
    """Zips of small tables, loaded in small batches, under such a policy."""
    return zip_tables(
        "kills",
        source=source,
        to=to,
        tables=["orders", "customers"],
        every="1s",
        policy=Policy(lease=1.0, retries=1000, backoff=0.05, backoff_cap=0.2, concurrency=4, batch=20),
    )


def lane_of(settings: Mapping[str, str]) -> Lane:
    """The lane that those settings are for."""
    if "source" in settings:
        return drops_lane(settings["source"], settings["to"])
    return lane(settings["url"], settings["lake"], settings["until"])


class Page:
    """Counters of what is going on, in memory that outlives the process."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def add(self, phase: str, change: int) -> None:
        """Count `change` more calls in `phase`."""
        at = PHASES.index(phase) * 4
        struct.pack_into("<i", self._map, at, struct.unpack_from("<i", self._map, at)[0] + change)

    def read(self) -> dict[str, int]:
        """The calls going on, by phase."""
        return dict(zip(PHASES, struct.unpack_from("<4i", self._map), strict=True))


class _Backend:
    """The backend, watched."""

    def __init__(self, backend: Any, page: Page) -> None:
        self._backend = backend
        self._page = page

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def commit(self, work: Sequence[Commit]) -> Sequence[Any]:
        acks = sum(commit.ack is not None for commit in work)
        phase = "ack" if acks else "commit"
        self._page.add(phase, 1)
        try:
            answers: Sequence[Any] = await self._backend.commit(work)
        finally:
            self._page.add(phase, -1)
        self._page.add(
            "held",
            -sum(isinstance(a, Committed) and c.ack is not None for a, c in zip(answers, work, strict=True)),
        )
        return answers

    async def receive(self, *arguments: Any, **options: Any) -> Sequence[Delivery]:
        got: Sequence[Delivery] = await self._backend.receive(*arguments, **options)
        self._page.add("held", len(got))
        return got


class _Store:
    """A store, watched."""

    def __init__(self, store: Store, page: Page) -> None:
        self._store = store
        self._page = page

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @asynccontextmanager
    async def upload(self, url: str, **options: Any) -> AsyncIterator[Upload]:
        self._page.add("effect", 1)
        try:
            async with self._store.upload(url, **options) as upload:
                yield upload
        finally:
            self._page.add("effect", -1)


class _Writer:
    """A writer, watched."""

    def __init__(self, writer: Writer, page: Page) -> None:
        self._writer = writer
        self._page = page

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    async def write(self, batch: Batch) -> Sequence[Bad]:
        self._page.add("effect", 1)
        try:
            return await self._writer.write(batch)
        finally:
            self._page.add("effect", -1)


class _Sink:
    """A sink, watched."""

    def __init__(self, sink: Sink, page: Page) -> None:
        self._sink = sink
        self._page = page

    @asynccontextmanager
    async def open(self, split: Split, unit: UnitRef, resume: str = "") -> AsyncIterator[Any]:
        async with self._sink.open(split, unit, resume) as writer:
            yield _Writer(writer, self._page)


class _Connections:
    """The connections, watched."""

    def __init__(self, connections: Any, page: Page) -> None:
        self._connections = connections
        self._page = page

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connections, name)

    async def store(self, url: str) -> Any:
        return _Store(await self._connections.store(url), self._page)

    @asynccontextmanager
    async def sink(self, url: str, options: Mapping[str, Any]) -> AsyncIterator[Any]:
        async with self._connections.sink(url, options) as sink:
            yield _Sink(sink, self._page)


async def _work(settings: Mapping[str, str], page: Page) -> None:
    watched = lane_of(settings)
    chosen = Settings(backend=settings["backend"], allow_private_hosts=True)
    async with open_application([watched], chosen) as app:
        app.engine.backend = app.backend = _Backend(app.backend, page)
        app.engine.connections = _Connections(app.engine.connections, page)
        await serve(app, asyncio.Event(), Deadline())


def work(settings: Mapping[str, str], page: str) -> None:
    """Be a worker until killed."""
    asyncio.run(_work(settings, Page(Path(page))))


def serve_archives(hours: int, drip: float, pipe: Connection) -> None:
    """Serve the archives of so many hours on loopback, until killed; the URL goes out by `pipe`. Slowly, over
    `drip` seconds each, so that there is something to be hit, until anything comes in by it."""

    async def forever() -> None:
        async with LyingServer() as server:
            serve_all(server, drip)
            pipe.send(server.url("").rstrip("/"))
            await asyncio.to_thread(pipe.recv)
            serve_all(server, 0.0)
            pipe.send("fast")
            await asyncio.Event().wait()

    def serve_all(server: LyingServer, drip: float) -> None:
        for hour in range(hours):
            moment = datetime.fromisoformat(START) + timedelta(hours=hour)
            server.serve(f"/{moment:%Y-%m-%d}-{moment.hour}.json.gz", archive(hour), drip=drip)

    asyncio.run(forever())
