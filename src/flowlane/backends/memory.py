"""``memory://``: log, queue and channels in this process, gone when it ends; the reference for every other.

Nothing here awaits between reading and changing, so that every call is atomic among the loop's tasks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from heapq import heapify, heappop, heappush
from itertools import count, islice
from math import inf
from types import MappingProxyType
from urllib.parse import urlsplit

import msgspec

from flowlane import state
from flowlane.backends.common import (
    BATCH_BYTES,
    CHANNEL_LEASE,
    PARTITIONS,
    News,
    checked,
    consume,
    copy_tally,
    counted,
    held_for,
    partition,
    portions,
    tell,
)
from flowlane.clock import Clock
from flowlane.errors import ConfigError, VersionConflict, redact
from flowlane.events import Event, encode
from flowlane.ports import (
    Append,
    Channel,
    ChannelBatch,
    ChannelRecord,
    Commit,
    Committed,
    Delivery,
    Environment,
    Index,
    Lag,
    Patience,
    Publish,
    QueueSpec,
    Tally,
)
from flowlane.state import RunTally, StageTally

_NOTHING: Mapping[tuple[str, int], RunTally] = MappingProxyType({})
_DONE = Committed(_NOTHING)

# An iteration gives way to other tasks after this many events.
_CHUNK = 512

# Streams of up to so many events are tuples: the garbage collector stops tracking those, while a list for
# each of 100,000 units is 100,000 objects to go through, again and again.
_SHORT = 8


#: A record, and the name of its channel.
_Put = tuple[str, ChannelRecord]


class _Stream(msgspec.Struct, eq=False, gc=False):
    """One stream: its events, and how many entries it has in all queues, waiting or leased.

    One that only the queue knows (a delivery of an event that was never appended) has no events.
    """

    events: tuple[Event, ...] | list[Event] = ()  # see _SHORT
    queued: int = 0


class _Message(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What waits in a queue: an event, its stream, and how often it was received already. Not a tuple: of
    those, too, there are as many as units, and the garbage collector would come for them."""

    event: Event
    stream: _Stream
    attempt: int
    group: str


class _Delivery(msgspec.Struct, eq=False, gc=False):
    """``lease`` holds every delivery that was received along with this one and is not settled yet, this one
    among them; ``None`` once it is settled or the lease has ended."""

    event: Event
    stage: str
    attempt: int
    head: Event | None
    backend: MemoryBackend
    stream: _Stream
    lease: dict[_Delivery, None] | None
    group: str

    async def ack(self) -> None:
        self.backend._expire()
        self.backend._ack(self)

    async def nack(self, *, delay: float = 0) -> None:
        backend = self.backend
        backend._expire()
        if backend._release(self):
            backend._put(self.event, self.stage, self.attempt, delay, self.group)
            backend._news((self.stage,))

    async def extend(self, seconds: float) -> bool:
        self.backend._expire()
        return self.backend._extend(self, seconds)


class _Queue:
    """What waits for one stage: what is due, in order of arrival, a heap of what is not yet, and for each
    group of which a message is among these (or leased) what waits behind that one, with when it is due."""

    __slots__ = ("behind", "delayed", "ready")

    def __init__(self) -> None:
        self.ready: deque[_Message] = deque()
        self.delayed: list[tuple[float, int, _Message]] = []
        self.behind: dict[str, deque[tuple[Event, float]]] = {}

    def promote(self, now: float) -> None:
        """What is due by `now` is ready."""
        delayed = self.delayed
        while delayed and delayed[0][0] <= now:
            self.ready.append(heappop(delayed)[2])


class _Lane:
    """One lane's events in the order of their commits, the streams that are in each index, and its runs."""

    __slots__ = ("dead", "history", "open", "runs")

    def __init__(self) -> None:
        self.history: list[Event] = []
        self.open: dict[str, None] = {}
        self.dead: dict[str, None] = {}
        self.runs: list[str] = []


class _Round:
    """One (run, round): its counters, and how many of its units have no terminal event yet."""

    __slots__ = ("tally", "unsettled")

    def __init__(self) -> None:
        self.tally = RunTally()
        self.unsettled = 0

    def add(self, tally: Tally, times: int) -> None:
        if tally.closed:
            self.tally.closed = True
        stage = self.tally.stages.setdefault(tally.stage, StageTally())
        stage.found += tally.found * times
        stage.settled += tally.settled * times
        self.unsettled += (tally.found - tally.settled) * times
        stage.dead += tally.dead * times
        stage.skipped += tally.skipped * times
        stage.superseded += tally.superseded * times
        stage.redriven += tally.redriven * times
        if tally.counts is not None:
            for _ in range(times):
                stage.counts.add(tally.counts)


class MemoryBackend:
    """See ``ports.Backend``. Safe for the tasks of one loop. `hold`: of a partition of a channel, seconds."""

    exact_queue = True  # see ``ports.Backend``

    def __init__(self, clock: Clock, *, hold: float = CHANNEL_LEASE) -> None:
        self._clock, self._hold = clock, hold
        self._order = count()  # breaks ties in heaps, so that events are never compared
        self._streams: dict[str, _Stream] = {}
        self._lanes: dict[str, _Lane] = {}
        self._rounds: dict[tuple[str, int], _Round] = {}
        self._queues: dict[str, _Queue] = {}
        self._leases: list[tuple[float, int, dict[_Delivery, None]]] = []
        self._spent = 0  # how many of the leases are empty: everything under them has been settled
        self._news = News()
        self._turn = 0
        self._channels: dict[str, MemoryChannel] = {}

    # ----------------------------------------------------------------- log

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        fit = checked(work)
        puts: dict[int, Sequence[_Put]] = {}
        published = [publish for commit in fit for publish in commit.publish]
        if "channel" in [publish.via for publish in published]:
            puts = {n: _puts(commit) for n, commit in enumerate(fit)}  # before any is applied
        self._expire()
        answers = [self._apply(commit, puts.get(n, ())) for n, commit in enumerate(fit)]
        self._count(fit, answers)
        if published:
            self._news({publish.stage for publish in published})
        for n, commit in enumerate(fit):
            ack = commit.ack
            if type(ack) is not _Delivery and ack is not None and type(answers[n]) is Committed:
                await ack.ack()  # it was brought by another than the queue
        return answers

    def _apply(self, commit: Commit, puts: Sequence[_Put]) -> Committed | VersionConflict:
        known = self._streams
        for append in commit.appends:
            stream = known.get(append.stream)
            if append.expected != (0 if stream is None else len(stream.events)):
                return self._conflict(commit)
        for append in commit.appends:
            self._append(append)
        if type(commit.ack) is _Delivery:
            # Before the publishing: a reminder of the unit whose delivery this is must not find it queued.
            self._ack(commit.ack)
        for publish in commit.publish:
            event = publish.event
            if publish.via == "channel":
                continue
            stream = known.get(event.subject)
            if stream is None:
                stream = known[event.subject] = _Stream()
            if not (publish.repeat and stream.queued):
                stream.queued += 1
                if publish.group:
                    self._line_up(publish)
                else:
                    self._put(event, publish.stage, 0, publish.delay)
        for name, record in puts:
            self.store(name, [record])
        return _DONE

    def _conflict(self, commit: Commit) -> VersionConflict:
        known = self._streams
        heads = {a.stream: len(known[a.stream].events) if a.stream in known else 0 for a in commit.appends}
        return VersionConflict(
            {a.stream: heads[a.stream] for a in commit.appends if heads[a.stream] != a.expected}
        )

    def _append(self, append: Append) -> None:
        name, events = append.stream, append.events
        stream = self._streams.get(name)
        if stream is None:
            self._streams[name] = _Stream(tuple(events))
        elif isinstance(stream.events, list):
            stream.events.extend(events)
        else:
            longer = stream.events + tuple(events)
            stream.events = longer if len(longer) <= _SHORT else list(longer)
        last = events[-1]
        lane = self._lanes.get(last.source)
        if lane is None:
            lane = self._lanes[last.source] = _Lane()
        lane.history.extend(events)
        if stream is None and name == last.run:
            lane.runs.append(name)
        now = state.index(last)
        if now == "open":
            lane.open[name] = None
        else:
            lane.open.pop(name, None)
        if now == "dead":
            lane.dead[name] = None
        elif lane.dead:
            lane.dead.pop(name, None)

    def _count(self, work: Sequence[Commit], answers: list[Committed | VersionConflict]) -> None:
        """Count what was applied of `work`, and see ``tell``."""
        keys: dict[tuple[str, int], None] = {}
        for tally, times in counted(
            commit for commit, answer in zip(work, answers, strict=True) if answer is _DONE
        ):
            key = (tally.run, tally.round)
            keys[key] = None
            self._rounds.setdefault(key, _Round()).add(tally, times)
        complete: dict[tuple[str, int], RunTally] = {}
        for key in keys:
            round_ = self._rounds[key]
            if round_.unsettled == 0 and round_.tally.closed and round_.tally.complete:
                complete[key] = copy_tally(round_.tally)
        tell(work, answers, complete)

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        known = self._streams
        return {name: found.events[-1] for name in streams if (found := known.get(name)) and found.events}

    async def read(self, stream: str, *, after: int = 0) -> AsyncIterator[Event]:
        position = after
        while (found := self._streams.get(stream)) and position < len(found.events):
            yield found.events[position]
            position += 1
            if position % _CHUNK == 0:
                await asyncio.sleep(0)

    async def scan(self, lane: str, *, run: str | None = None) -> AsyncIterator[Event]:
        found = self._lanes.get(lane)
        async for event in _follow(found.history if found else (), 0):
            if run is None or event.run == run:
                yield event

    async def units(self, lane: str, index: Index, patience: Patience | None = None) -> AsyncIterator[Event]:
        found = self._lanes.get(lane, _Lane())
        streams = found.open if index == "open" else found.dead
        for n, name in enumerate(_names(streams), 1):
            if name in streams:  # it may have left meanwhile
                yield self._streams[name].events[-1]
            if n % _CHUNK == 0:
                await asyncio.sleep(0)

    async def runs(self, lane: str, limit: int) -> Sequence[Event]:
        found = self._lanes.get(lane, _Lane()).runs
        return [self._streams[name].events[-1] for name in found[max(0, len(found) - limit) :]]

    async def tally(self, run: str, round: int) -> RunTally:
        found = self._rounds.get((run, round))
        return copy_tally(found.tally) if found else RunTally()

    # ----------------------------------------------------------------- queue

    async def receive(
        self, stages: Sequence[str], limit: int, *, lease: float, wait: float = 0
    ) -> Sequence[Delivery]:
        # Waiting is the loop's business (it may be a virtual one), what is due is the clock's.
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while True:
            taken = self._take(stages, limit, lease)
            if taken or wait <= 0 or (left := end - loop.time()) <= 0:
                return taken
            await self._news.wait(self._news.count, min(left, self._next(stages)), stages)

    def _take(self, stages: Sequence[str], limit: int, lease: float) -> list[Delivery]:
        now = self._expire()
        held: dict[_Delivery, None] = {}
        self._turn += 1  # another stage comes first each time, so that none starves the others
        for n in range(len(stages)):
            stage = stages[(n + self._turn) % len(stages)]
            queue = self._queues.get(stage)
            if queue is None:
                continue
            if queue.delayed:
                queue.promote(now)
            ready = queue.ready
            while ready and len(held) < limit:
                found = ready.popleft()
                stream = found.stream
                head = stream.events[-1] if stream.events else None
                attempt = found.attempt + 1
                held[_Delivery(found.event, stage, attempt, head, self, stream, held, found.group)] = None
        if not held:
            return []
        self._lease(held, now + lease)
        return list(held)

    def _put(self, event: Event, stage: str, attempt: int, delay: float, group: str = "") -> None:
        queue = self._queues.get(stage)
        if queue is None:
            queue = self._queues[stage] = _Queue()
        message = _Message(event, self._streams[event.subject], attempt, group)
        if delay > 0:
            due = self._clock.monotonic() + delay
            heappush(queue.delayed, (due, next(self._order), message))
        else:
            queue.ready.append(message)

    def _line_up(self, publish: Publish) -> None:
        """Put what is published under a group behind what the queue has of it."""
        stage, group = publish.stage, publish.group
        queue = self._queues.setdefault(stage, _Queue())
        behind = queue.behind.get(group)
        if behind is None:
            queue.behind[group] = deque()
            self._put(publish.event, stage, 0, publish.delay, group)
        else:
            behind.append((publish.event, self._clock.monotonic() + publish.delay))

    def _move_up(self, stage: str, group: str) -> None:
        """The first of the group is gone: it is the turn of the next."""
        behind = self._queues[stage].behind
        if behind[group]:
            event, due = behind[group].popleft()
            self._put(event, stage, 0, due - self._clock.monotonic(), group)
            self._news((stage,))
        else:
            del behind[group]

    def _lease(self, held: dict[_Delivery, None], end: float) -> None:
        if self._spent > 1000 and self._spent > len(self._leases) // 2:
            self._leases = [entry for entry in self._leases if entry[2]]
            heapify(self._leases)
            self._spent = 0
        heappush(self._leases, (end, next(self._order), held))

    def _expire(self) -> float:
        """Every lease that has ended by now is over, and what was under it is ready again."""
        now = self._clock.monotonic()
        leases = self._leases
        while leases and leases[0][0] <= now:
            _, _, held = heappop(leases)
            self._spent -= not held
            for delivery in held:
                delivery.lease = None
                self._put(delivery.event, delivery.stage, delivery.attempt, 0, delivery.group)
                self._news((delivery.stage,))
            held.clear()  # the struct is unknown to the garbage collector: no cycle may be left
        return now

    def _release(self, delivery: _Delivery) -> bool:
        """Take `delivery` from under its lease; False if it is not under one any more."""
        held = delivery.lease
        if held is None:
            return False
        delivery.lease = None
        del held[delivery]
        self._spent += not held
        return True

    def _ack(self, delivery: _Delivery) -> None:
        held = delivery.lease
        if held is not None:  # as ``_release``, for each of many
            delivery.lease = None
            del held[delivery]
            self._spent += not held
            delivery.stream.queued -= 1
            if delivery.group:
                self._move_up(delivery.stage, delivery.group)

    def _extend(self, delivery: _Delivery, seconds: float) -> bool:
        if not self._release(delivery):
            return False
        delivery.lease = {delivery: None}
        self._lease(delivery.lease, self._clock.monotonic() + seconds)
        return True

    def _next(self, stages: Iterable[str]) -> float:
        """Seconds until something may be due without anybody putting it."""
        due = [queue.delayed[0][0] for s in stages if (queue := self._queues.get(s)) and queue.delayed]
        leases = self._leases
        while leases and not leases[0][2]:
            heappop(leases)  # all under it is settled: nothing happens when it ends
            self._spent -= 1
        if leases:
            due.append(leases[0][0])
        # At least a millisecond: a difference too small to move the clock would be asked for without end.
        return max(0.001, min(due, default=inf) - self._clock.monotonic())

    async def create(self, queues: Sequence[QueueSpec]) -> Sequence[str]:
        return []

    async def resend(self, lane: str) -> int:
        return 0

    async def given_up(self, stages: Sequence[str], limit: int) -> Sequence[Delivery]:
        return []

    async def purge(self) -> None:
        for _, _, held in self._leases:
            for delivery in held:
                delivery.lease = None
            held.clear()
        self._leases.clear()
        self._spent = 0
        self._queues.clear()
        for stream in self._streams.values():
            stream.queued = 0

    def channel(self, name: str) -> Channel:
        return self._channel(name)

    def store(self, name: str, records: Sequence[ChannelRecord]) -> None:
        """They are in the channel `name` now; none is too large (``common.record_size``)."""
        self._channel(name).store(records)

    def _channel(self, name: str) -> MemoryChannel:
        if name not in self._channels:
            self._channels[name] = MemoryChannel(name, self._clock, self._hold)
        return self._channels[name]


def _puts(commit: Commit) -> Sequence[_Put]:
    """What `commit` puts to channels.

    Raises:
        Permanent: an event is too long.
    """
    return [
        (publish.stage, ChannelRecord(publish.group, encode(publish.event)))
        for publish in commit.publish
        if publish.via == "channel"
    ]


def _names(streams: Mapping[str, None]) -> Iterator[str]:
    """The names in an index that may change meanwhile, each once. Who looks at the first ones only (whether
    there is any, say) does not pay for a copy of all."""
    first = dict.fromkeys(islice(streams, _CHUNK))
    yield from first
    for name in list(streams):
        if name not in first:
            yield name


async def _follow(events: Sequence[Event], position: int) -> AsyncIterator[Event]:
    """`events` from `position` to the end that is reached; what is appended meanwhile included."""
    while position < len(events):
        yield events[position]
        position += 1
        if position % _CHUNK == 0:
            await asyncio.sleep(0)


# --------------------------------------------------------------------------- channel


class _Group:
    """How far all that consume under one name have come, and the batches that they hold, per partition."""

    __slots__ = ("held", "positions", "turn")

    def __init__(self) -> None:
        self.turn = 0  # the partition to look at first: none starves the others
        self.positions = [0] * PARTITIONS
        self.held: dict[int, _Batch] = {}


class _Batch:
    """Records handed to the iteration `owner`, and to no other before `until`."""

    __slots__ = ("channel", "group", "owner", "records", "until")

    def __init__(
        self, channel: MemoryChannel, group: _Group, owner: str, records: list[ChannelRecord], until: float
    ) -> None:
        self.channel, self.group, self.owner = channel, group, owner
        self.records, self.until = records, until

    async def settle(self, count: int | None = None) -> None:
        self.channel.settle(self, count)

    async def extend(self) -> bool:
        return self.channel.extend(self)


class MemoryChannel:
    """See ``ports.Channel``. Positions count from 1 in each partition. Records are kept for ever."""

    def __init__(self, name: str, clock: Clock, hold: float) -> None:
        self._name, self._clock, self._hold = name, clock, hold
        self._partitions: list[list[ChannelRecord]] = [[] for _ in range(PARTITIONS)]
        self._groups: dict[str, _Group] = {}
        self.news = News()

    async def put(self, records: Sequence[ChannelRecord]) -> None:
        for portion in await portions(self._name, records):
            self.store(portion)

    def store(self, records: Iterable[ChannelRecord]) -> None:
        """They are in the channel now; none is too large (``common.record_size``)."""
        for record in records:
            where = partition(record.key)
            stored = self._partitions[where]
            stored.append(ChannelRecord(record.key, record.data, where, len(stored) + 1))
        self.news()

    def consume(self, consumer: str, *, limit: int = 500, wait: float = 0) -> AsyncIterator[ChannelBatch]:
        group = self._group(consumer)
        owner = self._clock.token()

        async def find() -> ChannelBatch | float | None:
            return self._next(group, owner, limit)

        def give_up() -> None:
            for where in [where for where, held in group.held.items() if held.owner == owner]:
                del group.held[where]
            self.news()

        return consume(find, give_up, self.news, wait, inf)

    def _group(self, consumer: str) -> _Group:
        return self._groups.setdefault(consumer, _Group())

    def _next(self, group: _Group, owner: str, limit: int) -> _Batch | float | None:
        now = self._clock.monotonic()
        for n in range(PARTITIONS):
            where = (group.turn + n) % PARTITIONS
            stored, position, held = self._partitions[where], group.positions[where], group.held.get(where)
            if position < len(stored) and (held is None or held.until <= now):
                records = _some(stored[position : position + limit])
                batch = group.held[where] = _Batch(self, group, owner, records, now + self._hold)
                group.turn = where + 1
                return batch
        others = [held.until - now for held in group.held.values() if held.owner != owner]
        return min(others, default=None)

    def settle(self, batch: _Batch, count: int | None) -> None:
        """See ``ChannelBatch.settle``; a batch that is held by nobody, or not any more, settles nothing."""
        where = batch.records[0].partition
        if batch.group.held.get(where) is batch:
            batch.group.positions[where] += len(batch.records[:count])
            del batch.group.held[where]
            self.news()

    def extend(self, batch: _Batch) -> bool:
        """See ``ChannelBatch.extend``."""
        now = self._clock.monotonic()
        if batch.group.held.get(batch.records[0].partition) is not batch or batch.until <= now:
            return False
        batch.until = now + self._hold
        return True

    async def lag(self, consumer: str) -> Sequence[Lag]:
        group = self._groups.get(consumer) or _Group()
        now = self._clock.monotonic()
        found: list[Lag] = []
        for where, stored in enumerate(self._partitions):
            if stored:
                held, position = group.held.get(where), group.positions[where]
                owner = held.owner if held and held.until > now else ""
                found.append(Lag(where, owner, position, len(stored) - position))
        return found

    async def rewind(self, consumer: str, positions: Mapping[int, int] | None = None) -> None:
        group = self._group(consumer)
        for where in range(PARTITIONS):
            if positions is None or where in positions:
                wanted = positions[where] if positions else 0
                group.positions[where] = max(0, min(wanted, len(self._partitions[where])))
                group.held.pop(where, None)
        self.news()


def _some(records: list[ChannelRecord]) -> list[ChannelRecord]:
    """The first of `records`, as many as make one batch."""
    size = 0
    for n, record in enumerate(records):
        size += len(record.data)
        if size > BATCH_BYTES and n:
            return records[:n]
    return records


# --------------------------------------------------------------------------- factory


@asynccontextmanager
async def open_backend(uri: str, environment: Environment, *, hold: str = "") -> AsyncIterator[MemoryBackend]:
    """A new, empty backend; it is gone when its context is left. ``hold`` is how long a partition of a
    channel is held that nobody renews (``5s``).

    Raises:
        ConfigError: `uri` is not ``memory://``; or ``hold`` is wrong (see ``common.held_for``).
    """
    parts = urlsplit(uri)
    if parts.scheme != "memory" or parts.netloc or parts.path.strip("/"):
        raise ConfigError(f"{redact(uri)}: a memory backend has no name or path, write memory://")
    yield MemoryBackend(environment.clock, hold=held_for(uri, hold))
