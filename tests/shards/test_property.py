"""Whatever happens to shards and workers: every record is handed out, and its effect is right.

Workers come and go, pause past their hold and die; shards are split and merged, with records put all the
while. The consumers apply with compare of (generation, seq) by key, as all consumers of channels do.
"""

from __future__ import annotations

import asyncio
import random
from contextvars import copy_context

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlane import events
from flowlane.backends.memory import MemoryBackend
from flowlane.errors import Retryable
from flowlane.ports import ChannelBatch, ChannelRecord
from flowlane.shards import ShardedChannel
from flowlane.shards.leases import Lease
from flowlane.testing.clock import FATE, Fate, VirtualClock, VirtualLoop, run
from flowlane.testing.sharded import MemoryShards

HOLD = 30.0
KEYS = [f"key-{n}" for n in range(12)]

CALM = ("put", "split", "merge", "come", "go")
WILD = (*CALM, "pause", "pause briefly", "die", "fault")


class Consumer:
    """One process that consumes until it is stopped, paused or dead."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.fate = world, Fate(name)
        self.leaving = False
        context = copy_context()
        context.run(FATE.set, self.fate)
        self.task = world.loop.create_task(self._work(), context=context)

    async def _work(self) -> None:
        world = self.world
        clock = VirtualClock(world.loop, random.Random(world.rng.random()))
        channel = ShardedChannel("changes", world.shards, world.log, clock, put=world.shards.put, hold=HOLD)
        while not self.leaving:
            try:
                async for batch in channel.consume("c", limit=world.rng.choice((1, 3, 20)), wait=5.0):
                    await self._handle(batch)
                    if self.leaving:
                        break
            except Retryable:
                await asyncio.sleep(1.0)

    async def _handle(self, batch: ChannelBatch) -> None:
        world = self.world
        done = 0
        for record in batch.records:
            await asyncio.sleep(world.rng.choice((0.0, 0.0, 0.1, 3.0)))
            if not await batch.extend():
                return
            world.apply(record)
            done += 1
            if world.rng.random() < 0.05:
                break  # the next one is poison, for now
        await batch.settle(done)


class World:
    """A stream, a log, consumers, and what the consumers' target holds in the end."""

    def __init__(self, loop: VirtualLoop, seed: int, shards: int) -> None:
        self.loop, self.rng = loop, random.Random(seed)
        self.clock = VirtualClock(loop, random.Random(seed))
        self.log = MemoryBackend(self.clock)
        self.shards = MemoryShards(self.clock, shards, page=7, pace=1.0, fault=self._fault)
        self.faulty_until = 0.0
        self.consumers: list[Consumer] = []
        self.put_: dict[str, int] = {}
        self.handed: dict[str, list[int]] = {}
        self.target: dict[str, int] = {}

    def _fault(self, call: str) -> None:
        if self.loop.time() < self.faulty_until and self.rng.random() < 0.5:
            raise Retryable(f"{call}: the service is away")

    def apply(self, record: ChannelRecord) -> None:
        """In effect once: what is older than what is there changes nothing."""
        seq = int(record.data)
        self.handed.setdefault(record.key, []).append(seq)
        self.target[record.key] = max(seq, self.target.get(record.key, 0))

    # ------------------------------------------------------------------ what happens

    async def act(self, what: str) -> None:
        await getattr(self, "_" + what.replace(" ", "_"))()
        await asyncio.sleep(self.rng.choice((0.0, 0.5, 5.0, 20.0)))

    async def _put(self) -> None:
        keys = self.rng.choices(KEYS, k=self.rng.choice((1, 5, 30)))
        records = []
        for key in keys:
            self.put_[key] = self.put_.get(key, 0) + 1
            records.append(ChannelRecord(key, b"%d" % self.put_[key]))
        await self.shards.put(records, together=self.rng.random() < 0.5)

    async def _split(self) -> None:
        if len(self.shards.open) < 8:
            self.shards.split(self.rng.choice(self.shards.open))

    async def _merge(self) -> None:
        shards = self.shards.open
        if len(shards) > 1:
            n = self.rng.randrange(len(shards) - 1)
            self.shards.merge(shards[n], shards[n + 1])

    async def _come(self) -> None:
        if len(self.consumers) < 4:
            self.consumers.append(Consumer(self, f"consumer-{len(self.consumers)}"))

    async def _go(self) -> None:
        if self.consumers:
            consumer = self.consumers.pop(self.rng.randrange(len(self.consumers)))
            consumer.leaving = True

    async def _die(self) -> None:
        if self.consumers:
            consumer = self.consumers.pop(self.rng.randrange(len(self.consumers)))
            consumer.fate.dead = True

    async def _pause(self) -> None:
        self._freeze(2.5 * HOLD)

    async def _pause_briefly(self) -> None:
        self._freeze(0.8 * HOLD)

    def _freeze(self, seconds: float) -> None:
        awake = [consumer for consumer in self.consumers if not consumer.fate.frozen]
        if awake:
            consumer = self.rng.choice(awake)
            consumer.fate.frozen = True
            self.loop.call_later(seconds, self.loop.thaw, consumer.fate)

    async def _fault_(self) -> None:
        self.faulty_until = self.loop.time() + 20.0

    # ------------------------------------------------------------------ what has become of it

    async def come_to_rest(self) -> None:
        """Two more consumers see to whatever is left."""
        self.consumers += [Consumer(self, f"last-{n}") for n in range(2)]
        end = self.loop.time() + 40 * HOLD
        while not self.all_settled() and self.loop.time() < end:  # noqa: ASYNC110  # in virtual time
            await asyncio.sleep(HOLD / 3)
        for consumer in self.consumers:
            consumer.leaving = True
        await asyncio.sleep(3 * HOLD)

    def all_settled(self) -> bool:
        return all(set(self.handed.get(key, ())) >= set(range(1, n + 1)) for key, n in self.put_.items())

    def leases(self) -> list[tuple[str, str, Lease]]:
        """Shard, type and state of every event of a lease, in the order of the commits."""
        lane = self.log._lanes.get("changes!")
        decode = msgspec.json.Decoder(Lease).decode
        history = lane.history if lane else []
        return [
            (event.subject[len("changes!") : -len("/c")], event.type, decode(event.data)) for event in history
        ]

    async def check(self) -> None:
        """What holds however it went."""
        assert self.all_settled(), (self.put_, self.handed)
        assert self.target == self.put_
        parents = {shard.id: shard.parents for shard in await self.shards.shards()}
        last: dict[str, Lease] = {}
        for shard, kind, lease in self.leases():
            before = last.get(shard, Lease())
            assert lease.place.position >= before.place.position, "a position went back"
            assert not before.ended, "something came after the end"
            if kind in (events.SHARD_SETTLED, events.SHARD_HELD, events.SHARD_ENDED):
                assert before.owner, "nobody held what was settled"
            if kind == events.SHARD_TAKEN:
                assert all(last[parent].ended for parent in parents[shard]), "a child before its parent"
            last[shard] = lease


def simulate(seed: int, shards: int, actions: list[str]) -> World:
    async def main(loop: VirtualLoop) -> World:
        world = World(loop, seed, shards)
        for what in ["come", "put", *actions]:
            await world.act(what + "_" if what == "fault" else what)
        await world.come_to_rest()
        await world.check()
        assert loop.complaints == []
        return world

    return run(main, seed=seed)


_quick = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@_quick
@given(st.integers(0, 10**9), st.integers(1, 4), st.lists(st.sampled_from(CALM), min_size=5, max_size=25))
def test_without_accidents_each_record_comes_once_and_in_order(
    seed: int, shards: int, actions: list[str]
) -> None:
    world = simulate(seed, shards, actions)
    assert world.handed == {key: list(range(1, n + 1)) for key, n in world.put_.items()}


@_quick
@given(st.integers(0, 10**9), st.integers(1, 4), st.lists(st.sampled_from(WILD), min_size=5, max_size=25))
def test_whatever_happens_each_record_comes_and_the_effect_is_right(
    seed: int, shards: int, actions: list[str]
) -> None:
    simulate(seed, shards, actions)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_goes_the_same_way(seed: int) -> None:
    actions = [random.Random(seed).choice(WILD) for _ in range(15)]
    assert simulate(seed, 2, actions).leases() == simulate(seed, 2, actions).leases()
