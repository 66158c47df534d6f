"""A backend whose queue is outside of it, as SQS is: what it publishes are messages for a model of SQS, and
comes back as payloads of Lambda. Log and channels are the memory backend's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import count

import msgspec

from flowlane.backends.memory import MemoryBackend
from flowlane.clock import Clock
from flowlane.errors import VersionConflict
from flowlane.events import Event, encode, encode_data, refer
from flowlane.ports import Channel, Commit, Committed, Delivery, Index, Patience, QueueSpec
from flowlane.state import RunTally
from tests.aws_lambda.model import Queue


class Letter:
    """A delivery that `queue` gave up after `attempt` receives; ``delays`` are those it was put back for."""

    def __init__(self, backend: OutsideBackend, event: Event, stage: str, attempt: int = 10) -> None:
        self.event, self.stage, self.attempt = event, stage, attempt
        self.head: Event | None = None
        self.delays: list[float] = []
        self._letters = backend.letters
        self._letters.append(self)

    async def ack(self) -> None:
        self._letters.remove(self)

    async def nack(self, *, delay: float = 0) -> None:
        self.delays.append(delay)

    async def extend(self, seconds: float) -> bool:
        return True


class OutsideBackend:
    """See ``ports.Backend``; publishes into `queue`, each message `copies` times, and at once."""

    exact_queue = False

    def __init__(self, clock: Clock, queue: Queue, copies: int = 1) -> None:
        self._inner = MemoryBackend(clock)
        self._queue = queue
        self._copies = copies
        self._names = count(1)
        self.by_reference = False  #: whether messages say only where in the log their events stand
        self.letters: list[Letter] = []  #: what stands in the dead-letter queues

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        answers = await self._inner.commit([msgspec.structs.replace(c, publish=(), ack=None) for c in work])
        for commit, answer in zip(work, answers, strict=True):
            if isinstance(answer, VersionConflict):
                continue
            for publish in commit.publish:
                for _ in range(self._copies):
                    name = f"s{next(self._names)}"
                    self._queue.send(name, self._body(publish.event), publish.group or name)
            if commit.ack is not None:
                await commit.ack.ack()
        return answers

    def _body(self, event: Event) -> str:
        return encode_data(refer(event)).decode() if self.by_reference else encode(event).decode()

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        return await self._inner.last(streams)

    def read(self, stream: str, *, after: int = 0) -> AsyncIterator[Event]:
        return self._inner.read(stream, after=after)

    def scan(self, lane: str, *, run: str | None = None) -> AsyncIterator[Event]:
        return self._inner.scan(lane, run=run)

    def units(self, lane: str, index: Index, patience: Patience | None = None) -> AsyncIterator[Event]:
        return self._inner.units(lane, index, patience)

    async def runs(self, lane: str, limit: int) -> Sequence[Event]:
        return await self._inner.runs(lane, limit)

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

    async def given_up(self, stages: Sequence[str], limit: int) -> Sequence[Delivery]:
        some = [letter for letter in self.letters if letter.stage in stages][:limit]
        heads = await self._inner.last([letter.event.subject for letter in some])
        for letter in some:
            letter.head = heads.get(letter.event.subject)
        return list(some)

    async def purge(self) -> None:
        self._queue.waiting.clear()
