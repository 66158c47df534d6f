"""Faults of channels: what may become of records, batches and holds on their way through a simulated process.

A channel of the memory backend is a service; one of ``ShardedBackend`` is a stream, whose consumer runs in
the process itself and keeps its leases in the log. Order within a key is never broken: no channel may do so.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from flowlane.backends.memory import MemoryBackend
from flowlane.clock import Clock
from flowlane.conveyor import ChannelDelivery
from flowlane.errors import Retryable
from flowlane.ports import Backend, Channel, ChannelBatch, ChannelRecord, Lag
from flowlane.shards import Page, Place, Reader, Shard, ShardedChannel, Shards
from flowlane.testing.sharded import MemoryShards

if TYPE_CHECKING:
    from flowlane.testing.faults import Process

#: What may become of records that are put: all stored and some of them once more; only some stored, and the
#: answer lost; those of different keys stored in another order.
PUTS: Final = ("doubled records", "partial put", "reordered records")
#: What may become of batches and their holds: another process has the partition; it is handed out again
#: though it was settled.
BATCHES: Final = ("lost hold", "batch again")
#: Seconds after which a shard whose owner vanished is another's.
HOLD: Final = 12.0


class ShardedBackend(MemoryBackend):
    """A memory backend whose channels are streams of `shards` shards at first, which can be split and merged;
    what a commit publishes to a channel is in the stream along with it."""

    def __init__(self, clock: Clock, shards: int = 3) -> None:
        super().__init__(clock)
        self._shards = shards
        self.streams: dict[str, MemoryShards] = {}

    def stream(self, name: str) -> MemoryShards:
        """The stream of the channel called `name`."""
        if name not in self.streams:
            # Who waits at a shard's end is woken by news: looking more often than this only takes time.
            self.streams[name] = MemoryShards(self._clock, self._shards, page=20, pace=5.0)
        return self.streams[name]

    def channel(self, name: str) -> Channel:
        """See ``Backend.channel``."""
        return self.consumer(name, self.stream(name), self, self._clock)

    def consumer(self, name: str, shards: Shards, log: Backend, clock: Clock) -> ShardedChannel:
        """The channel called `name` as a process sees it."""
        return ShardedChannel(name, shards, log, clock, put=self.stream(name).put, hold=HOLD)

    def store(self, name: str, records: Sequence[ChannelRecord]) -> None:
        """See ``MemoryBackend.store``."""
        self.stream(name).store(records)

    def reshard(self, rng: random.Random) -> None:
        """Some shard is split, or two neighbours are merged."""
        for stream in self.streams.values():
            shards = stream.open
            if len(shards) > 1 and (len(shards) > 5 or rng.random() < 0.5):
                first = rng.randrange(len(shards) - 1)
                stream.merge(shards[first], shards[first + 1])
            else:
                stream.split(rng.choice(shards))


def faulty_channel(process: Process, log: Backend, backend: Backend, name: str) -> Channel:
    """The channel `name` of `backend` as `process` sees it, whose way to the log is `log`."""
    if _let_go_of_deliveries not in process.loop.at_end:
        process.loop.at_end.append(_let_go_of_deliveries)
    bare = backend.channel(name)
    if isinstance(backend, ShardedBackend):
        seen = backend.consumer(name, FaultyShards(process, backend.stream(name)), log, process.clock)
        return FaultyChannel(process, bare, seen)
    return FaultyChannel(process, bare)


def _let_go_of_deliveries() -> None:
    """Commits that came to nothing hold deliveries of channels, and those all else: see ``VirtualLoop``."""
    # Nothing was collected since the beginning (``clock.run``); isinstance would ask proxies of what is gone.
    held: list[Any] = [known for known in gc.get_objects(generation=0) if type(known) is ChannelDelivery]
    for delivery in held:
        delivery.line = delivery.conveyor = None  # nobody is left to ask it


class FaultyChannel:
    """See ``ports.Channel``. `bare` has no faults; `seen`, if there is one, is a part of the process that has
    faults of its own, and is what it consumes by."""

    def __init__(self, process: Process, bare: Channel, seen: Channel | None = None) -> None:
        self._process, self._bare, self._seen = process, bare, seen

    async def put(self, records: Sequence[ChannelRecord]) -> None:
        """See ``Channel.put``. Some may be stored and the answer lost, some twice, keys in any order."""
        process = self._process
        if process.chance("reordered records"):
            records = _interleaved(records, process.rng)
        if len(records) > 1 and process.chance("partial put"):
            some = records[: process.rng.randrange(1, len(records))]
            await process.call("channel.put", lambda: self._bare.put(some))
            raise Retryable("channel.put did not answer")
        if records and process.chance("doubled records"):
            await self._bare.put(records[: process.rng.randrange(1, len(records) + 1)])
        await process.call("channel.put", lambda: self._bare.put(records))

    async def consume(
        self, consumer: str, *, limit: int = 500, wait: float = 0
    ) -> AsyncGenerator[ChannelBatch]:
        """See ``Channel.consume``."""
        process, seen = self._process, self._seen
        batches = (seen or self._bare).consume(consumer, limit=limit, wait=wait)
        try:
            while True:
                batch: ChannelBatch | None = await process.call(
                    "channel.next", lambda: _next(batches) if seen else self._apart(batches)
                )
                if batch is None:
                    return
                process.counters.delivered += len(batch.records)
                yield FaultyBatch(process, self._bare, consumer, batch)
        finally:
            if not process.fate.dead:
                await batches.aclose()  # type: ignore[attr-defined]  # an asynchronous generator

    async def _apart(self, batches: AsyncIterator[ChannelBatch]) -> ChannelBatch | None:
        """The next of `batches`, waited for in a task that stops when the process dies, and is not unwound:
        that would give back what only the living can."""
        task = asyncio.ensure_future(_next(batches))
        if task in self._process.fate.tasks:
            self._process.fate.tasks.remove(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise

    async def lag(self, consumer: str) -> Sequence[Lag]:
        """See ``Channel.lag``."""
        return await self._process.call("channel.lag", lambda: self._bare.lag(consumer))

    async def rewind(self, consumer: str, positions: Mapping[int, int] | None = None) -> None:
        """See ``Channel.rewind``."""
        await self._process.call("channel.rewind", lambda: self._bare.rewind(consumer, positions))


class FaultyBatch:
    """See ``ports.ChannelBatch``."""

    def __init__(self, process: Process, bare: Channel, consumer: str, batch: ChannelBatch) -> None:
        self._process, self._bare, self._consumer = process, bare, consumer
        self._batch = batch
        self.records = batch.records

    async def settle(self, count: int | None = None) -> None:
        """See ``ChannelBatch.settle``. The hold may turn out to be lost; or all be handed out again."""
        again = self._process.chance("batch again")
        before = await self._position() if again else 0
        await self._lose()
        await self._process.call("batch.settle", lambda: self._batch.settle(count))
        if again:
            await self._bare.rewind(self._consumer, {self._partition: before})

    async def extend(self) -> bool:
        """See ``ChannelBatch.extend``. The hold may turn out to be lost."""
        await self._lose()
        return await self._process.call("batch.extend", self._batch.extend)

    @property
    def _partition(self) -> int:
        return self.records[0].partition

    async def _position(self) -> int:
        found = {lag.partition: lag.position for lag in await self._bare.lag(self._consumer)}
        return found.get(self._partition, 0)

    async def _lose(self) -> None:
        if self._process.chance("lost hold"):
            await self._bare.rewind(self._consumer, {self._partition: await self._position()})


class FaultyShards:
    """See ``shards.Shards``."""

    def __init__(self, process: Process, shards: Shards) -> None:
        self._process, self._shards = process, shards

    async def shards(self) -> Sequence[Shard]:
        """See ``Shards.shards``."""
        return await self._process.call("shards.list", self._shards.shards)

    def read(self, shard: Shard, place: Place, *, limit: int | None = None) -> Reader:
        """See ``Shards.read``."""
        return FaultyReader(self._process, self._shards.read(shard, place, limit=limit))


class FaultyReader:
    """See ``shards.Reader``: a page whose answer was lost is what comes next."""

    def __init__(self, process: Process, reader: Reader) -> None:
        self._process, self._reader = process, reader
        self._kept: Page | None = None

    async def page(self) -> Page:
        """See ``Reader.page``."""
        await self._process.call("shards.page", self._look)
        page, self._kept = self._kept, None
        assert page is not None
        return page

    async def _look(self) -> None:
        if self._kept is None:
            self._kept = await self._reader.page()


async def _next(batches: AsyncIterator[ChannelBatch]) -> ChannelBatch | None:
    return await anext(batches, None)


def _interleaved(records: Sequence[ChannelRecord], rng: random.Random) -> list[ChannelRecord]:
    """`records` in another order, those of each key in theirs."""
    lines: dict[str, deque[ChannelRecord]] = {}
    for record in records:
        lines.setdefault(record.key, deque()).append(record)
    turns = [record.key for record in records]
    rng.shuffle(turns)
    return [lines[key].popleft() for key in turns]
