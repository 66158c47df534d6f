"""Faults: wrappers around every port through which a simulated process meets the world.

Each call passes ``Process.call``, where it may go wrong as ``Faults`` decides:

==================  =========================================================================
die before          the process is dead, and the call was never made
die after           the call was made, the process is dead
unknown after       the call was made, and its answer lost: it raises
refuse              the call was not made: it raises
cancel              the whole process is cancelled (Ctrl-C) while the call is made
hang                the call takes long
==================  =========================================================================

A dead process has no effects any more: no callback of it runs again, and what its ``finally`` blocks ask of a
port raises ``SimulatedDeath``. ``Counters`` say which ports were reached and which faults fired.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from contextvars import Context, copy_context
from typing import Any, TypeVar

import msgspec

from flowlane.errors import Retryable, VersionConflict
from flowlane.events import Event
from flowlane.ports import (
    Backend,
    Bad,
    Batch,
    Body,
    Channel,
    Commit,
    Committed,
    Cut,
    Delivery,
    Index,
    ObjectInfo,
    Patience,
    Publish,
    QueueSpec,
    Sink,
    Source,
    Split,
    Store,
    TableSpec,
    UnitRef,
    Upload,
    Writer,
)
from flowlane.state import Position, RunTally
from flowlane.testing.channels import BATCHES, faulty_channel
from flowlane.testing.clock import FATE, Fate, SimulatedDeath, VirtualClock, VirtualLoop, turn
from flowlane.testing.stores import Ports, using

T = TypeVar("T")

DIE_BEFORE = "die before"
DIE_AFTER = "die after"
UNKNOWN = "unknown after"
REFUSE = "refuse"
CANCEL = "cancel"
HANG = "hang"

#: The modes of a crash point.
MODES = (DIE_BEFORE, DIE_AFTER, UNKNOWN, CANCEL)

#: What may become of messages and leases on their way, besides.
MESSAGES = (
    "lost message",
    "duplicate message",
    "delayed message",
    "reordered messages",
    "lost lease",
    "short lease",
    "index lag",
    "partial group",
    *BATCHES,
)


class Unavailable(Retryable):
    """A port did not answer, by order of the simulation."""


class Counters:
    """How often each port was reached, and each kind of fault fired; ``lost``: the units of which a message
    was."""

    def __init__(self) -> None:
        self.reached: Counter[str] = Counter()
        self.fired: Counter[str] = Counter()
        self.delivered = 0
        self.lost: set[str] = set()


class Faults:
    """What goes wrong; nothing, unless a subclass says otherwise."""

    def at(self, process: Process, port: str) -> str:
        """How this call of `port` goes wrong; empty if it does not."""
        return ""

    def chance(self, kind: str) -> bool:
        """Whether the fault `kind` (of ``MESSAGES``) happens here."""
        return False


class CrashAt(Faults):
    """One fault, of `mode`, at the `number`-th port call (from 1) of all processes together, and more of them
    at later calls. ``calls`` are the ports called so far, in order."""

    def __init__(self, number: int, mode: str, *more: tuple[int, str]) -> None:
        self._points = {number: mode, **dict(more)}
        self.calls: list[str] = []

    def at(self, process: Process, port: str) -> str:
        """See ``Faults.at``."""
        self.calls.append(port)
        return self._points.get(len(self.calls), "")


class Process:
    """One simulated process: its tasks, its clock, and its own way to the shared `backend` and `world`.

    ``ended`` resolves with what it ended with: None, an exception that escaped from it, or a
    ``SimulatedDeath``.
    """

    def __init__(
        self,
        name: str,
        loop: VirtualLoop,
        backend: Backend,
        world: Ports,
        *,
        faults: Faults | None = None,
        counters: Counters | None = None,
        clock: VirtualClock | None = None,
        latency: float = 0.0,
    ) -> None:
        self.name = name
        self.loop = loop
        self.rng = random.Random(loop.rng.getrandbits(64))
        self.clock = clock or VirtualClock(loop, random.Random(self.rng.getrandbits(64)))
        self.faults = faults or Faults()
        self.counters = counters or Counters()
        self.backend = FaultyBackend(self, backend)
        self.fate = Fate(name)
        self.fate.blown = self.kill
        self.ended: asyncio.Future[BaseException | None] = loop.create_future()
        self._world = world
        self._latency = latency
        self._main: asyncio.Task[None] | None = None
        self._spawned: list[asyncio.Task[None]] = []
        loop.at_end.append(self._let_go)

    def _let_go(self) -> None:
        """Of all it has: commits, which are such structs, hold its deliveries. One by one: Python 3.13.0
        crashes where the dictionary of an object is cleared as a whole and outlives it."""
        for name in list(vars(self)):
            delattr(self, name)

    # ------------------------------------------------------------------ life and death

    def start(self, main: Callable[[Process], Coroutine[Any, Any, None]]) -> Process:
        """Run ``main(self)`` as the process; its tasks share its fate."""

        async def body() -> None:
            with using(self):
                await main(self)

        context = copy_context()
        context.run(FATE.set, self.fate)
        self._main = self.loop.create_task(body(), context=context)
        self._main.add_done_callback(self._done, context=Context())
        return self

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it do `work` besides; nobody waits for it."""
        context = copy_context()
        context.run(FATE.set, self.fate)
        self._spawned.append(self.loop.create_task(work, context=context))

    def _done(self, main: asyncio.Task[None]) -> None:
        if not self.ended.done():
            error = asyncio.CancelledError() if main.cancelled() else main.exception()
            self.ended.set_result(error)

    def kill(self) -> None:
        """SIGKILL: nothing of it happens any more."""
        self.fate.dead = True
        self.loop.call_soon(self._bury, context=Context())

    def _bury(self) -> None:
        if not self.ended.done():
            self.ended.set_result(SimulatedDeath(self.name))
        self.fate.bury()

    def cancel(self) -> None:
        """Ctrl-C: its main task is cancelled, and its ``finally`` blocks do run."""
        if self._main is not None:
            self._main.cancel()

    async def freeze(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after `seconds`; to be called from outside of it."""
        self.fate.frozen = True
        await asyncio.sleep(seconds)
        if not self.fate.dead:
            self.loop.thaw(self.fate)

    def check(self) -> None:
        """Raises:
        SimulatedDeath: the process is dead.
        """
        if self.fate.dead:
            raise SimulatedDeath(self.name)

    # ------------------------------------------------------------------ calling

    async def call(self, port: str, effect: Callable[[], Awaitable[T]]) -> T:
        """``await effect()``, the call of a port, as the faults have it.

        Raises:
            Unavailable: by order of the faults; after "unknown after" the effect has taken place.
            SimulatedDeath: the process is dead.
        """
        self.check()
        self.counters.reached[port] += 1
        self.loop.trace(f"{self.name} {port}")
        mode = self.faults.at(self, port)
        if mode:
            self.counters.fired[mode] += 1
            self.loop.trace(f"{self.name} {mode}")
        if mode == DIE_BEFORE:
            await self._die()
        if mode == REFUSE:
            raise Unavailable(f"{port} is away")
        if mode == CANCEL:
            self.cancel()
        await (self._travel(mode) if mode == HANG or self._latency else turn())
        self.check()
        result = await effect()
        if mode == DIE_AFTER:
            await self._die()
        if mode == UNKNOWN:
            raise Unavailable(f"{port} did not answer")
        await (self._travel("") if self._latency else turn())
        self.check()
        return result

    async def _travel(self, mode: str) -> None:
        if mode == HANG:
            await asyncio.sleep(self.rng.uniform(1.0, 60.0))
        else:
            await asyncio.sleep(self.rng.random() * self._latency)

    async def _die(self) -> None:
        self.kill()
        await self.loop.create_future()

    def chance(self, kind: str) -> bool:
        """Whether the fault `kind` happens here, counted and traced if so."""
        happens = self.faults.chance(kind)
        if happens:
            self.counters.fired[kind] += 1
            self.loop.trace(f"{self.name} {kind}")
        return happens

    # ------------------------------------------------------------------ see ``stores.Ports``

    def store(self, scheme: str) -> Store:
        """The world's store, through this process's faults."""
        return FaultyStore(self, self._world.store(scheme))

    def source(self, uri: str, options: Mapping[str, Any]) -> Source:
        """The world's source, through this process's faults."""
        return FaultySource(self, self._world.source(uri, options))

    def sink(self, uri: str, into: TableSpec | None = None) -> Sink:
        """The world's sink, through this process's faults."""
        return FaultySink(self, self._world.sink(uri, into))


# --------------------------------------------------------------------------- log and queue


class FaultyDelivery:
    """See ``ports.Delivery``."""

    def __init__(self, process: Process, delivery: Delivery) -> None:
        self._process = process
        self.bare = delivery
        self.event = delivery.event
        self.stage = delivery.stage
        self.attempt = delivery.attempt
        self.head = delivery.head

    async def ack(self) -> None:
        """See ``Delivery.ack``."""
        await self._process.call("delivery.ack", self.bare.ack)

    async def nack(self, *, delay: float = 0) -> None:
        """See ``Delivery.nack``."""
        await self._process.call("delivery.nack", lambda: self.bare.nack(delay=delay))

    async def extend(self, seconds: float) -> bool:
        """See ``Delivery.extend``. The lease may turn out to be lost: another process has the message."""
        if self._process.chance("lost lease"):
            await self.bare.nack()
        return await self._process.call("delivery.extend", lambda: self.bare.extend(seconds))


class FaultyBackend:
    """See ``ports.Backend``."""

    def __init__(self, process: Process, backend: Backend) -> None:
        self._process = process
        self._backend = backend

    @property
    def exact_queue(self) -> bool:
        """See ``Backend.exact_queue``."""
        return self._backend.exact_queue

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        """See ``Backend.commit``. A group may be applied in part, and the answer lost."""
        bare = [
            msgspec.structs.replace(commit, ack=commit.ack.bare)
            if isinstance(commit.ack, FaultyDelivery)
            else commit
            for commit in work
        ]
        if len(bare) > 1 and self._process.chance("partial group"):
            some = bare[: self._process.rng.randrange(1, len(bare))]
            await self._process.call("backend.commit", lambda: self._backend.commit(some))
            raise Unavailable("backend.commit did not answer")
        return await self._process.call("backend.commit", lambda: self._backend.commit(bare))

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        """See ``Backend.last``."""
        return await self._process.call("backend.last", lambda: self._backend.last(streams))

    async def read(self, stream: str, *, after: int = 0) -> AsyncGenerator[Event]:
        """See ``Backend.read``."""
        await self._process.call("backend.read", _nothing)
        async for event in self._backend.read(stream, after=after):
            self._process.check()
            yield event

    async def scan(self, lane: str, *, run: str | None = None) -> AsyncGenerator[Event]:
        """See ``Backend.scan``."""
        await self._process.call("backend.scan", _nothing)
        async for event in self._backend.scan(lane, run=run):
            self._process.check()
            yield event

    async def runs(self, lane: str, limit: int) -> Sequence[Event]:
        """See ``Backend.runs``."""
        return await self._process.call("backend.runs", lambda: self._backend.runs(lane, limit))

    async def units(self, lane: str, index: Index, patience: Patience | None = None) -> AsyncGenerator[Event]:
        """See ``Backend.units``. The index may lag behind."""
        await self._process.call("backend.units", _nothing)
        async for head in self._backend.units(lane, index, patience):
            self._process.check()
            if not self._process.chance("index lag"):
                yield head

    async def tally(self, run: str, round: int) -> RunTally:
        """See ``Backend.tally``."""
        return await self._process.call("backend.tally", lambda: self._backend.tally(run, round))

    async def receive(
        self, stages: Sequence[str], limit: int, *, lease: float, wait: float = 0
    ) -> Sequence[Delivery]:
        """See ``Backend.receive``. Messages may be lost, doubled, late, in any order; leases too short."""
        process = self._process
        if process.chance("short lease"):
            lease *= 0.05

        async def take() -> list[Delivery]:
            got = await self._backend.receive(stages, limit, lease=lease, wait=wait)
            return [FaultyDelivery(process, delivery) for delivery in got if await self._arrives(delivery)]

        arrived = await process.call("backend.receive", take)
        process.counters.delivered += len(arrived)
        if len(arrived) > 1 and process.chance("reordered messages"):
            process.rng.shuffle(arrived)
        return arrived

    async def _arrives(self, delivery: Delivery) -> bool:
        process = self._process
        if process.chance("duplicate message"):
            event = delivery.event
            again = Publish(event, delivery.stage, process.rng.random() * 5, group=event.partitionkey)
            await self._backend.commit([Commit(publish=[again])])
        if process.chance("lost message"):
            process.counters.lost.add(delivery.event.subject)
            await delivery.ack()
            return False
        if process.chance("delayed message"):
            await delivery.nack(delay=process.rng.random() * 20)
            return False
        return True

    def channel(self, name: str) -> Channel:
        """See ``Backend.channel``; see ``testing.channels`` for its faults."""
        return faulty_channel(self._process, self, self._backend, name)

    async def create(self, queues: Sequence[QueueSpec]) -> Sequence[str]:
        """See ``Backend.create``."""
        return await self._process.call("backend.create", lambda: self._backend.create(queues))

    async def resend(self, lane: str) -> int:
        """See ``Backend.resend``."""
        return await self._process.call("backend.resend", lambda: self._backend.resend(lane))

    async def given_up(self, stages: Sequence[str], limit: int) -> Sequence[Delivery]:
        """See ``Backend.given_up``."""
        got = await self._process.call("backend.given_up", lambda: self._backend.given_up(stages, limit))
        return [FaultyDelivery(self._process, delivery) for delivery in got]

    async def purge(self) -> None:
        """See ``Backend.purge``."""
        await self._process.call("backend.purge", self._backend.purge)


async def _nothing() -> None:
    return


# --------------------------------------------------------------------------- bytes


class FaultyBody:
    """See ``ports.Body``."""

    def __init__(self, process: Process, body: Body) -> None:
        self._process = process
        self._body = body
        self.info = body.info
        self.proven_length = body.proven_length

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        """See ``Body.__aiter__``."""
        blocks = aiter(self._body)
        while True:
            block: bytes | None = await self._process.call("body.read", lambda: _next(blocks))
            if block is None:
                return
            yield block


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)


class FaultyUpload:
    """See ``ports.Upload``."""

    def __init__(self, process: Process, upload: Upload) -> None:
        self._process = process
        self._upload = upload

    @property
    def id(self) -> str:
        """See ``Upload.id``."""
        return self._upload.id

    @property
    def position(self) -> int:
        """See ``Upload``."""
        return self._upload.position

    async def write(self, block: bytes) -> None:
        """See ``Upload.write``."""
        await self._process.call("upload.write", lambda: self._upload.write(block))

    async def flush(self) -> int:
        """See ``Upload.flush``."""
        return await self._process.call("upload.flush", self._upload.flush)

    async def commit(self) -> ObjectInfo:
        """See ``Upload.commit``."""
        return await self._process.call("upload.commit", self._upload.commit)

    async def abort(self) -> None:
        """See ``Upload.abort``."""
        await self._process.call("upload.abort", self._upload.abort)


class FaultyStore:
    """See ``ports.Store``."""

    def __init__(self, process: Process, store: Store) -> None:
        self._process = process
        self._store = store

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """See ``Store.head``."""
        return await self._process.call("store.head", lambda: self._store.head(url, headers=headers))

    async def list(self, url: str) -> AsyncGenerator[ObjectInfo]:
        """See ``Store.list``."""
        await self._process.call("store.list", _nothing)
        async for found in self._store.list(url):
            yield found

    @asynccontextmanager
    async def read(
        self,
        url: str,
        *,
        start: int = 0,
        end: int | None = None,
        etag: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Body]:
        """See ``Store.read``."""
        opening = self._store.read(url, start=start, end=end, etag=etag, headers=headers)
        async with AsyncExitStack() as stack:
            body = await self._process.call("store.read", lambda: stack.enter_async_context(opening))
            yield FaultyBody(self._process, body)

    @asynccontextmanager
    async def upload(
        self, url: str, *, owner: str, resume: str = "", position: int = 0, overwrite: bool = False
    ) -> AsyncIterator[Upload]:
        """See ``Store.upload``."""
        opening = self._store.upload(url, owner=owner, resume=resume, position=position, overwrite=overwrite)
        async with AsyncExitStack() as stack:
            upload = await self._process.call("store.upload", lambda: stack.enter_async_context(opening))
            yield FaultyUpload(self._process, upload)

    async def discard(self, url: str, upload: str) -> None:
        """See ``Store.discard``."""
        await self._process.call("store.discard", lambda: self._store.discard(url, upload))


# --------------------------------------------------------------------------- records


class FaultySource:
    """See ``ports.Source``."""

    def __init__(self, process: Process, source: Source) -> None:
        self._process = process
        self._source = source

    async def splits(self) -> AsyncGenerator[Split]:
        """See ``Source.splits``."""
        await self._process.call("source.splits", _nothing)
        async with aclosing(self._source.splits()) as splits:
            async for split in splits:
                yield split

    async def read(self, split: Split, position: Position, cut: Cut) -> AsyncGenerator[Batch]:
        """See ``Source.read``."""
        async with aclosing(self._source.read(split, position, cut)) as batches:
            while True:
                batch: Batch | None = await self._process.call("source.read", lambda: _next(batches))
                if batch is None:
                    return
                yield batch

    async def prove(self, split: Split, position: Position) -> AsyncGenerator[int]:
        """See ``Source.prove``."""
        async with aclosing(self._source.prove(split, position)) as proving:
            while True:
                passed: int | None = await self._process.call("source.prove", lambda: _next(proving))
                if passed is None:
                    return
                yield passed


class FaultyWriter:
    """See ``ports.Writer``."""

    def __init__(self, process: Process, writer: Writer) -> None:
        self._process = process
        self._writer = writer

    @property
    def position(self) -> Position | None:
        """See ``Writer.position``."""
        return self._writer.position

    @property
    def resume(self) -> str:
        """See ``Writer.resume``."""
        return self._writer.resume

    @property
    def unfinished(self) -> tuple[str, str]:
        """See ``Writer.unfinished``."""
        return self._writer.unfinished

    @property
    def changes(self) -> Sequence[str]:
        """See ``Writer.changes``."""
        return self._writer.changes

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """See ``Writer.write``."""
        return await self._process.call("writer.write", lambda: self._writer.write(batch))

    async def finish(self) -> None:
        """See ``Writer.finish``."""
        await self._process.call("writer.finish", self._writer.finish)


class FaultySink:
    """See ``ports.Sink``."""

    def __init__(self, process: Process, sink: Sink) -> None:
        self._process = process
        self._sink = sink

    @asynccontextmanager
    async def open(self, split: Split, unit: UnitRef, resume: str = "") -> AsyncIterator[Writer]:
        """See ``Sink.open``."""
        opening = self._sink.open(split, unit, resume)
        async with AsyncExitStack() as stack:
            writer = await self._process.call("sink.open", lambda: stack.enter_async_context(opening))
            yield FaultyWriter(self._process, writer)
