"""Leases, balance and the life of shards; what each guard is for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextvars import copy_context
from typing import Any, cast

import msgspec
import pytest

from flowlane import events
from flowlane.backends.memory import MemoryBackend
from flowlane.errors import ConfigError, Retryable
from flowlane.events import Event
from flowlane.ports import Append, ChannelBatch, ChannelRecord, Commit
from flowlane.shards import ShardedChannel
from flowlane.shards.leases import Lease, Leases, stream_of
from flowlane.testing.channel_suite import close, numbers, records
from flowlane.testing.clock import FATE, Fate, VirtualLoop, run
from flowlane.testing.sharded import MemoryShards
from flowlane.testing.units import within
from tests.shards.stream import FlowingClock

HOLD = 30.0


class Stream:
    """One sharded stream and one log, and processes (channel objects) that consume it."""

    def __init__(self, shards: int = 4, **settings: Any) -> None:
        self.clock = FlowingClock()
        self.log = MemoryBackend(self.clock)
        self.shards = MemoryShards(self.clock, shards, pace=1.0, **settings)

    def process(self, log: MemoryBackend | None = None) -> ShardedChannel:
        """Another process: it knows nothing of what the others have seen."""
        return ShardedChannel(
            "changes", self.shards, log or self.log, self.clock, put=self.shards.put, hold=HOLD
        )

    def key(self, shard: str) -> str:
        """A key of `shard`."""
        return next(f"k{n}" for n in range(10_000) if self.shards.where(f"k{n}") == shard)

    async def fill(self, each: int = 10) -> None:
        """`each` records, numbered from 0, for every open shard, all of one key there."""
        for shard in self.shards.open:
            await self.put(shard, 0, each)

    async def put(self, shard: str, start: int, count: int) -> None:
        key = self.key(shard)
        await self.shards.put([ChannelRecord(key, b"%d" % n) for n in range(start, start + count)])

    async def history(self, shard: str, consumer: str = "c") -> list[Event]:
        return [event async for event in self.log.read(stream_of("changes", shard, consumer))]

    async def types(self, consumer: str = "c") -> Counter[str]:
        """How many events of each type there are in the leases of all shards."""
        found: Counter[str] = Counter()
        for shard in await self.shards.shards():
            found.update(event.type for event in await self.history(shard.id, consumer))
        return found

    async def owners(self, channel: ShardedChannel) -> Counter[str]:
        """How many open shards everybody holds."""
        return Counter(lag.owner for lag in await channel.lag("c") if lag.owner and not lag.ended)


class Working:
    """An iteration that settles each batch, and notes what it was handed."""

    def __init__(
        self, channel: ShardedChannel, limit: int = 5, seen: list[ChannelRecord] | None = None
    ) -> None:
        self._channel, self._limit = channel, limit
        self.seen = [] if seen is None else seen
        self._task: asyncio.Task[None] | None = None

    def start(self) -> Working:
        self._task = asyncio.create_task(self._work())
        return self

    async def _work(self) -> None:
        async for batch in self._channel.consume("c", limit=self._limit, wait=1e9):
            self.seen += batch.records
            await batch.settle()

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        assert self._task.cancelled(), self._task.exception()


def batches(channel: ShardedChannel, limit: int = 5) -> AsyncIterator[ChannelBatch]:
    return channel.consume("c", limit=limit, wait=1e9)


# --------------------------------------------------------------------------- fences


async def test_a_zombies_checkpoint_is_refused() -> None:
    stream = Stream(1)
    await stream.fill(10)
    zombie = batches(stream.process())
    old = await anext(zombie)
    assert numbers(old) == [0, 1, 2, 3, 4]
    successor = batches(stream.process())
    new = await within(2 * HOLD, anext(successor))
    assert numbers(new) == [0, 1, 2, 3, 4]
    await new.settle(2)
    await old.settle()
    assert not await old.extend()
    again = await anext(successor)
    assert numbers(again) == [2, 3, 4, 5, 6]
    await close(zombie, successor)
    types = await stream.types()
    assert (types["shard.taken"], types["shard.settled"], types["shard.released"]) == (2, 1, 1)


async def test_a_worker_that_vanished_is_waited_for_no_longer_than_hold() -> None:
    stream = Stream(1)
    await stream.fill(10)
    vanished = batches(stream.process())
    await anext(vanished)
    began = asyncio.get_running_loop().time()
    successor = batches(stream.process())
    await within(3 * HOLD, anext(successor))
    took = asyncio.get_running_loop().time() - began
    assert HOLD <= took <= 1.5 * HOLD
    await close(successor, vanished)


async def test_an_idle_owner_that_vanished_costs_new_records_no_more_than_hold() -> None:
    stream = Stream(1)
    await stream.fill(5)
    vanished = batches(stream.process())
    await (await anext(vanished)).settle()  # asks no more: it is as good as dead
    successor = Working(stream.process()).start()
    await asyncio.sleep(10 * HOLD)
    assert await stream.owners(stream.process()) != Counter()
    before = await stream.types()
    await asyncio.sleep(100 * HOLD)
    assert await stream.types() == before
    await stream.put("shard-0000", 5, 5)
    await asyncio.sleep(1.1 * HOLD)
    assert [int(record.data) for record in successor.seen] == list(range(5, 10))
    await successor.stop()
    await close(vanished)


async def test_a_hold_that_is_extended_is_not_taken() -> None:
    stream = Stream(1)
    await stream.fill(5)
    one, other = batches(stream.process()), Working(stream.process()).start()
    first = await anext(one)
    for _ in range(40):
        await asyncio.sleep(HOLD / 4)
        assert await first.extend()
    assert other.seen == []
    # ten times hold: an event each third of it, at most
    assert (await stream.types())["shard.held"] <= 30
    await first.settle()
    await other.stop()
    await close(one)


async def test_a_rewind_takes_the_shard_away_in_other_processes_too() -> None:
    stream = Stream(1)
    await stream.fill(10)
    one = batches(stream.process())
    first = await anext(one)
    await stream.process().rewind("c")
    await first.settle()
    assert numbers(await within(HOLD, anext(one))) == [0, 1, 2, 3, 4]
    await close(one)


async def test_a_partition_that_is_none_cannot_be_rewound() -> None:
    stream = Stream(2)
    with pytest.raises(ConfigError, match="no partition 7"):
        await stream.process().rewind("c", {7: 1})


# --------------------------------------------------------------------------- settling


async def test_what_is_poison_is_handed_out_again_from_there() -> None:
    stream = Stream(1)
    await stream.fill(10)
    iterator = batches(stream.process())
    first = await anext(iterator)
    await first.settle(3)  # the record 3 is poison
    second = await anext(iterator)
    assert numbers(second) == [3, 4, 5, 6, 7]
    await second.settle(0)
    third = await anext(iterator)
    assert numbers(third) == [3, 4, 5, 6, 7]
    await third.settle()
    assert numbers(await anext(iterator)) == [8, 9]
    await close(iterator)
    assert (await stream.types())["shard.settled"] == 2


async def test_a_place_within_an_aggregate_is_kept() -> None:
    stream = Stream(1)
    await stream.shards.put(records(10, keys=1), together=True)
    one = batches(stream.process(), limit=4)
    await (await anext(one)).settle(3)
    await close(one)
    two = batches(stream.process(), limit=4)
    assert numbers(await anext(two)) == [3, 4, 5, 6]
    await close(two)


class Unsteady(MemoryBackend):
    """A log whose answers are lost: ``applied`` commits stand all the same."""

    lost = 0
    applied = True

    async def commit(self, work: Any) -> Any:
        if self.lost and any(append.stream.startswith("changes!") for one in work for append in one.appends):
            self.lost -= 1
            if self.applied:
                await super().commit(work)
            raise Retryable("the answer was lost")
        return await super().commit(work)


@pytest.mark.parametrize("applied", [True, False])
async def test_a_lost_answer_is_looked_into(applied: bool) -> None:
    stream = Stream(1)
    await stream.fill(10)
    log = stream.log = Unsteady(stream.clock)
    iterator = batches(stream.process())
    for expected in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]):
        batch = await anext(iterator)
        assert numbers(batch) == expected
        log.lost, log.applied = 1, applied
        await batch.settle()
    await close(iterator)
    assert await stream.types() == Counter({"shard.taken": 1, "shard.settled": 2, "shard.released": 1})


async def test_a_log_that_stays_away_is_told_and_settling_can_be_tried_again() -> None:
    stream = Stream(1)
    await stream.fill(10)
    log = stream.log = Unsteady(stream.clock)
    iterator = batches(stream.process())
    batch = await anext(iterator)
    log.lost, log.applied = 3, False
    with pytest.raises(Retryable):
        await batch.settle()
    await batch.settle()
    assert numbers(await anext(iterator)) == [5, 6, 7, 8, 9]
    await close(iterator)
    lease = (await stream.history("shard-0000"))[-1]
    assert b'"settled":5' in bytes(lease.data)


async def test_a_log_that_is_away_for_less_than_hold_ends_no_iteration() -> None:
    stream = Stream(2)
    await stream.fill(10)
    log = stream.log = Unsteady(stream.clock)
    iterator = batches(stream.process(), 10)
    for _ in range(2):  # what is at hand was read, and its leases are old: they are renewed first
        batch = await anext(iterator)
        await asyncio.sleep(HOLD / 2)
        log.lost, log.applied = 5, False
        assert numbers(batch) == list(range(10))
        with pytest.raises(Retryable):
            await batch.settle()
        await batch.settle()
    for shard in list(stream.shards.open):
        stream.shards.split(shard)
    log.lost = 7  # at the ends of the parents
    await stream.fill(10)
    for _ in range(4):
        batch = await within(HOLD, anext(iterator))
        assert numbers(batch) == list(range(10))
        await batch.settle()
    assert log.lost == 0
    await close(iterator)


async def test_a_log_that_takes_nothing_for_longer_ends_the_iteration() -> None:
    stream = Stream(2)
    await stream.fill(10)
    log = stream.log = Unsteady(stream.clock)
    iterator = batches(stream.process(), 5)
    await (await anext(iterator)).settle()
    await asyncio.sleep(HOLD / 2)
    log.lost, log.applied = 10**6, False
    with pytest.raises(Retryable, match="the answer was lost"):
        await within(3 * HOLD, anext(iterator))


async def test_who_lost_races_first_is_told_of_a_log_that_stays_away_too() -> None:
    stream = Stream(1)
    log = stream.log = Unsteady(stream.clock)
    leases, rival = (Leases("changes", "c", log, stream.clock) for _ in range(2))

    def to(lease: Lease) -> tuple[str, Lease]:
        return events.SHARD_HELD, msgspec.structs.replace(lease, settled=lease.settled + 1)

    races = 0

    async def race(work: Any) -> Any:
        nonlocal races
        races += 1
        if races > 4:
            raise Retryable("the log is away")
        await rival.change("s", to)
        return await Unsteady.commit(log, work)

    leases._commits = lambda append: _first(race([Commit(appends=(append,))]))  # type: ignore[assignment]
    with pytest.raises(Retryable, match="the log is away"):
        await within(HOLD, leases.change("s", to))


async def _first(answers: Any) -> Any:
    return (await answers)[0]


async def test_leases_are_in_no_lane_and_no_index() -> None:
    stream = Stream(2)
    await stream.fill(3)
    iterator = batches(stream.process())
    await (await anext(iterator)).settle()
    (event, *_) = await stream.history("shard-0000")
    assert event.subject == "changes!shard-0000/c"
    assert event.source == "changes!"
    for which in ("open", "dead"):
        assert [head async for head in stream.log.units("changes!", cast("Any", which))] == []
    await close(iterator)


# --------------------------------------------------------------------------- balance


async def test_workers_that_come_and_go_share_the_shards() -> None:
    stream = Stream(4)
    await stream.fill(5)
    looking = stream.process()
    workers = [Working(stream.process()).start() for _ in range(3)]
    await asyncio.sleep(2 * HOLD)
    assert sorted((await stream.owners(looking)).values()) == [1, 1, 2]
    workers.append(Working(stream.process()).start())
    await asyncio.sleep(2 * HOLD)
    assert sorted((await stream.owners(looking)).values()) == [1, 1, 1, 1]
    await workers.pop().stop()
    await asyncio.sleep(2 * HOLD)
    assert sorted((await stream.owners(looking)).values()) == [1, 1, 2]
    for worker in workers:
        await worker.stop()
    assert await stream.owners(looking) == Counter()


async def test_a_friendly_hand_over_does_nothing_twice() -> None:
    stream = Stream(4)
    seen: list[ChannelRecord] = []
    workers = [Working(stream.process(), limit=3, seen=seen).start()]
    for n in range(60):
        for shard in stream.shards.open:
            await stream.put(shard, 10 * n, 10)
        if n in (10, 20, 30):
            workers.append(Working(stream.process(), limit=3, seen=seen).start())
        if n in (40, 50):
            await workers.pop(0).stop()
        await asyncio.sleep(3.0)
    await asyncio.sleep(HOLD)
    by_key: dict[str, list[int]] = {}
    for record in seen:
        by_key.setdefault(record.key, []).append(int(record.data))
    assert len(by_key) == 4
    # Only what a stopped one had been handed and not settled may come again, and none was.
    assert all(order == list(range(600)) for order in by_key.values())
    for worker in workers:
        await worker.stop()


async def test_an_idle_stream_adds_nothing_to_the_log() -> None:
    stream = Stream(4)
    await stream.fill(5)
    workers = [Working(stream.process()).start() for _ in range(3)]
    await asyncio.sleep(3 * HOLD)
    before = await stream.types()
    await asyncio.sleep(3600)
    assert await stream.types() == before
    for worker in workers:
        await worker.stop()


async def test_what_asks_and_is_not_answered_takes() -> None:
    stream = Stream(2)
    await stream.fill(5)
    paused, context = Fate("paused"), copy_context()
    context.run(FATE.set, paused)
    idle = context.run(Working(stream.process()).start)
    await asyncio.sleep(HOLD)
    assert len(idle.seen) == 10
    paused.frozen = True
    worker = Working(stream.process()).start()
    await asyncio.sleep(2 * HOLD)
    # The half that was asked for, and along with it the other: nobody has been heard of.
    assert list((await stream.owners(stream.process())).values()) == [2]
    assert worker.seen == []
    cast("VirtualLoop", asyncio.get_running_loop()).thaw(paused)
    await asyncio.sleep(HOLD)
    assert sorted((await stream.owners(stream.process())).values()) == [1, 1]
    for each in (worker, idle):
        await each.stop()


# --------------------------------------------------------------------------- the life of shards


async def test_children_wait_for_their_parents() -> None:
    stream = Stream(2)
    key = stream.key("shard-0000")
    await stream.put("shard-0000", 0, 10)
    left, right = stream.shards.split("shard-0000")
    for n in range(10, 20):
        await stream.shards.put([ChannelRecord(key, b"%d" % n)])
    merged = stream.shards.merge(left, right)
    await stream.shards.put([ChannelRecord(key, b"%d" % n) for n in range(20, 30)])
    seen: list[ChannelRecord] = []
    workers = [Working(stream.process(), seen=seen).start() for _ in range(3)]
    await asyncio.sleep(HOLD)
    assert [int(record.data) for record in seen] == list(range(30))
    ended = {lag.partition for lag in await stream.process().lag("c") if lag.ended}
    assert ended == {0, 2, 3}
    order = [(event.type, event.subject) for event in stream.log._lanes["changes!"].history]
    for child, parent in ((left, "shard-0000"), (right, "shard-0000"), (merged, left), (merged, right)):
        taken = order.index(("shard.taken", f"changes!{child}/c"))
        assert order.index(("shard.ended", f"changes!{parent}/c")) < taken
    assert merged in stream.shards.open
    for worker in workers:
        await worker.stop()


async def test_an_empty_closed_shard_ends_at_once() -> None:
    stream = Stream(2)
    left, right = stream.shards.split("shard-0000")
    await stream.put(left, 0, 3)
    await stream.put(right, 0, 3)
    worker = Working(stream.process()).start()
    await asyncio.sleep(1)
    assert len(worker.seen) == 6
    await worker.stop()


async def test_a_parent_that_is_gone_counts_as_ended() -> None:
    stream = Stream(2)
    await stream.put("shard-0000", 0, 3)
    left, right = stream.shards.split("shard-0000")
    await stream.put(left, 0, 3)
    await stream.put(right, 0, 3)
    stream.shards.trim("shard-0000")
    worker = Working(stream.process()).start()
    await asyncio.sleep(1)
    assert len(worker.seen) == 6
    await worker.stop()


async def test_a_shard_that_is_gone_is_given_up() -> None:
    stream = Stream(2)
    await stream.put("shard-0000", 0, 10)
    iterator = batches(stream.process())
    first = await anext(iterator)
    left, _ = stream.shards.split("shard-0000")
    stream.shards.trim("shard-0000")
    await stream.put(left, 10, 3)
    await asyncio.sleep(2 * HOLD)
    assert await first.extend()
    await first.settle(0)
    await asyncio.sleep(2 * HOLD)
    assert numbers(await within(HOLD, anext(iterator))) == [10, 11, 12]
    await close(iterator)


async def test_a_service_that_is_away_is_waited_for() -> None:
    stream = Stream(2)
    await stream.fill(10)
    calls = Counter[str]()

    def fault(call: str) -> None:
        calls[call] += 1
        if calls[call] % 2:
            raise Retryable("the service is away")

    stream.shards.fault = fault
    worker = Working(stream.process()).start()
    await asyncio.sleep(4 * HOLD)
    assert len(worker.seen) == 20
    await worker.stop()


@pytest.mark.parametrize("call", ["list", "read"])
async def test_a_service_that_stays_away_ends_the_iteration(call: str) -> None:
    stream = Stream(2)
    await stream.fill(10)

    def fault(what: str) -> None:
        if what == call:
            raise Retryable("the service is away")

    stream.shards.fault = fault
    with pytest.raises(Retryable, match="the service is away"):
        await within(3 * HOLD, anext(batches(stream.process())))
    assert await stream.owners(stream.process()) == Counter() if call == "read" else True


async def test_leaving_leaves_no_task() -> None:
    stream = Stream(4)
    await stream.fill(10)
    before = asyncio.all_tasks()
    for _ in range(5):
        iterator = batches(stream.process())
        await anext(iterator)
        await close(iterator)
        assert asyncio.all_tasks() == before


def test_an_iteration_that_nobody_closes_ends_with_the_loop() -> None:
    complaints: list[dict[str, Any]] = []
    kept: list[Any] = []

    async def forget() -> Stream:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        stream = Stream(2)
        await stream.fill(3)
        kept.append(batches(stream.process()))
        await anext(kept[0])
        return stream

    stream = asyncio.run(forget())
    assert complaints == []
    released = asyncio.run(stream.types())
    assert released["shard.released"] == released["shard.taken"] == 2


async def test_several_checkpoints_go_into_one_commit() -> None:
    stream = Stream(4)
    await stream.fill(5)
    calls: list[int] = []

    class Counting(MemoryBackend):
        async def commit(self, work: Any) -> Any:
            calls.append(len(work))
            await asyncio.sleep(0.01)
            return await super().commit(work)

    stream.log = Counting(stream.clock)
    iterator = batches(stream.process())
    held = [await anext(iterator) for _ in range(4)]
    calls.clear()
    await asyncio.gather(*(batch.settle() for batch in held))
    assert sum(calls) == 4
    assert len(calls) == 2
    await close(iterator)


async def test_a_foreign_event_in_between_only_costs_another_try() -> None:
    stream = Stream(1)
    await stream.fill(10)
    iterator = batches(stream.process())
    batch = await anext(iterator)
    (head,) = await stream.history("shard-0000")
    wanted = msgspec.structs.replace(
        head,
        id="x",
        type=events.SHARD_WANTED,
        version=2,
        data=msgspec.Raw(bytes(head.data)[:-1] + b',"wanted":"somebody"}'),
    )
    await stream.log.commit([Commit(appends=(Append(head.subject, 1, (wanted,)),))])
    await batch.settle()
    last = (await stream.history("shard-0000"))[-1]
    assert last.type == "shard.settled"
    assert b'"owner":"somebody"' in bytes(last.data)
    assert b"wanted" not in bytes(last.data)
    await close(iterator)


async def test_a_paused_worker_hands_out_nothing_that_it_has_lost() -> None:
    stream = Stream(1)
    await stream.fill(10)
    paused, context = Fate("paused"), copy_context()
    context.run(FATE.set, paused)
    iterator = batches(stream.process())
    loop = cast("VirtualLoop", asyncio.get_running_loop())

    async def settle_one() -> None:
        await (await anext(iterator)).settle()

    await loop.create_task(settle_one(), context=context)
    await asyncio.sleep(1)  # the next batch is ready
    paused.frozen = True
    successor = Working(stream.process()).start()
    await asyncio.sleep(2 * HOLD)
    assert [int(record.data) for record in successor.seen] == [5, 6, 7, 8, 9]
    loop.thaw(paused)
    with pytest.raises(TimeoutError):
        await within(HOLD, anext(iterator))
    await successor.stop()


async def test_a_rewound_consumer_goes_through_parents_and_children_in_order_again() -> None:
    stream = Stream(1)
    key = stream.key("shard-0000")
    await stream.put("shard-0000", 0, 10)
    stream.shards.split("shard-0000")
    await stream.shards.put([ChannelRecord(key, b"%d" % n) for n in range(10, 20)])
    worker = Working(stream.process()).start()
    await asyncio.sleep(HOLD)
    await stream.process().rewind("c")
    await asyncio.sleep(2 * HOLD)
    assert [int(record.data) for record in worker.seen] == [*range(20), *range(20)]
    history = stream.log._lanes["changes!"].history
    rewound = [event.subject for event in history if event.type == "shard.rewound"]
    assert rewound[0] == "changes!shard-0000/c"
    assert len(rewound) == 3
    await worker.stop()


async def test_a_cancelled_append_is_made_by_nobody_else() -> None:
    stream = Stream(2)
    await stream.fill(5)
    gate = asyncio.Event()

    class Slow(MemoryBackend):
        async def commit(self, work: Any) -> Any:
            await gate.wait()
            return await super().commit(work)

    stream.log = Slow(stream.clock)
    gate.set()
    iterator = batches(stream.process())
    first, second = await anext(iterator), await anext(iterator)
    gate.clear()
    leading = asyncio.ensure_future(first.settle())
    await asyncio.sleep(0.1)
    cut = asyncio.ensure_future(second.settle())
    await asyncio.sleep(0.1)
    cut.cancel()
    await asyncio.wait([cut])
    gate.set()
    await leading
    await close(iterator)
    assert (await stream.types())["shard.settled"] == 1


async def test_who_leaves_withdraws_what_it_asked_for() -> None:
    stream = Stream(2)
    await stream.fill(5)
    one, other = batches(stream.process()), batches(stream.process())
    held = [await anext(one), await anext(one)]
    waiting = asyncio.ensure_future(anext(other))
    await asyncio.sleep(HOLD / 6)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert (await stream.types())["shard.wanted"] == 1
    for batch in held:
        await batch.settle()
    assert list((await stream.owners(stream.process())).values()) == [2]
    await close(one, other)


async def test_children_are_found_when_their_parent_ends() -> None:
    stream = Stream(2)
    await stream.fill(5)
    worker = Working(stream.process()).start()
    await asyncio.sleep(1)
    left, right = stream.shards.split("shard-0000")
    await stream.put(left, 0, 5)
    await stream.put(right, 0, 5)
    await asyncio.sleep(1)
    assert len(worker.seen) == 20
    await worker.stop()


def test_what_comes_before_the_last_look_is_seen() -> None:
    """In whatever order: what is put, the look at a shard and the question may be of one moment."""

    async def consumed(_: VirtualLoop) -> int:
        stream = Stream(4)
        await stream.fill(1)
        seen = 0
        async for batch in stream.process().consume("c"):
            seen += len(batch.records)
            await batch.settle()
            if seen < 40:
                await stream.put(stream.shards.open[seen % 4], seen, 1)
        return seen

    assert min(run(consumed, seed=seed) for seed in range(50)) >= 40


async def test_who_is_busy_takes_nothing() -> None:
    stream = Stream(2)
    await stream.fill(5)
    busy, leaving = batches(stream.process()), Working(stream.process()).start()
    first = await anext(busy)
    for _ in range(8):
        await asyncio.sleep(HOLD / 4)
        assert await first.extend()
    assert sorted((await stream.owners(stream.process())).values()) == [1, 1]
    await leaving.stop()
    await asyncio.sleep(HOLD / 2)
    assert list((await stream.owners(stream.process())).values()) == [1]
    await close(busy)


async def test_settling_that_was_cut_short_is_repeated_in_vain() -> None:
    stream = Stream(1)
    await stream.fill(10)
    gate = asyncio.Event()

    class Mute(MemoryBackend):
        async def commit(self, work: Any) -> Any:
            answer = await super().commit(work)
            await gate.wait()
            return answer

    stream.log = Mute(stream.clock)
    gate.set()
    iterator = batches(stream.process())
    first = await anext(iterator)
    gate.clear()
    cut = asyncio.ensure_future(first.settle())
    await asyncio.sleep(0.1)
    cut.cancel()
    await asyncio.wait([cut])
    gate.set()
    await asyncio.sleep(HOLD / 2)  # long enough to see that it went through all the same
    await first.settle()
    assert numbers(await anext(iterator)) == [5, 6, 7, 8, 9]
    assert b'"settled":5' in bytes((await stream.history("shard-0000"))[-1].data)
    await close(iterator)
