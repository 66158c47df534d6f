"""A backend whose queue is outside of it, as SQS is: what it publishes are messages for a model of SQS, and
comes back as payloads of Lambda. Log and channels are the memory backend's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import count

import msgspec

from flowlane.backends.memory import MemoryBackend
from flowlane.clock import Clock
from flowlane.errors import VersionConflict
from flowlane.events import Event, encode
from flowlane.ports import Channel, Commit, Committed, Delivery, Index, QueueSpec
from flowlane.state import RunTally
from tests.aws_lambda.model import Queue


class OutsideBackend:
    """See ``ports.Backend``; publishes into `queue`, each message `copies` times, and at once."""

    exact_queue = False

    def __init__(self, clock: Clock, queue: Queue, copies: int = 1) -> None:
        self._inner = MemoryBackend(clock)
        self._queue = queue
        self._copies = copies
        self._names = count(1)

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        answers = await self._inner.commit([msgspec.structs.replace(c, publish=(), ack=None) for c in work])
        for commit, answer in zip(work, answers, strict=True):
            if isinstance(answer, VersionConflict):
                continue
            for publish in commit.publish:
                for _ in range(self._copies):
                    self._queue.send(f"s{next(self._names)}", encode(publish.event).decode())
            if commit.ack is not None:
                await commit.ack.ack()
        return answers

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        return await self._inner.last(streams)

    def read(self, stream: str, *, after: int = 0) -> AsyncIterator[Event]:
        return self._inner.read(stream, after=after)

    def scan(self, lane: str, *, run: str | None = None) -> AsyncIterator[Event]:
        return self._inner.scan(lane, run=run)

    def units(self, lane: str, index: Index) -> AsyncIterator[Event]:
        return self._inner.units(lane, index)

    async def tally(self, run: str, round: int) -> RunTally:
        return await self._inner.tally(run, round)

    async def receive(
        self, stages: Sequence[str], limit: int, *, lease: float, wait: float = 0
    ) -> Sequence[Delivery]:
        raise AssertionError("deliveries come as payloads")

    def channel(self, name: str) -> Channel:
        return self._inner.channel(name)

    async def create(self, queues: Sequence[QueueSpec]) -> Sequence[str]:
        return []

    async def resend(self, lane: str) -> int:
        return 0

    async def purge(self) -> None:
        self._queue.waiting.clear()
