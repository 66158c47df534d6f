"""Change records through a channel: producers that number what they put, consumers that compare what they
apply, killed, stopped and away all the while; on channels of the memory backend and on streams of shards.

``scene`` says what is wrong in the end: for every key all changes must have been applied, each once in
effect, in order.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import msgspec

from flowlane.backends.memory import MemoryBackend
from flowlane.errors import Retryable
from flowlane.events import SHARD_REWOUND
from flowlane.ports import Channel, ChannelRecord
from flowlane.shards.leases import Lease, stream_of
from flowlane.testing.channels import BATCHES, PUTS, ShardedBackend
from flowlane.testing.clock import VirtualClock, VirtualLoop, run
from flowlane.testing.faults import CANCEL, DIE_AFTER, DIE_BEFORE, REFUSE, UNKNOWN, Counters, Process
from flowlane.testing.jobs import EPOCH
from flowlane.testing.simulator import Chaos
from flowlane.testing.stores import World

NAME, CONSUMER = "changes", "apply"
#: What strikes a call, what becomes of records and batches, and what strikes from outside.
CALLS = (DIE_BEFORE, DIE_AFTER, UNKNOWN, REFUSE, CANCEL)
OUTSIDE = ("pause", "crash anywhere", "reshard", "replay")
KINDS = (*CALLS, *PUTS, *BATCHES, *OUTSIDE)
#: Virtual seconds within which all must have been applied once nothing goes wrong any more.
PATIENCE = 300.0
_KEYS = 12
_EACH = 40  # changes of a key


class Change(msgspec.Struct, frozen=True, array_like=True):
    """The `seq`-th change of its key in `generation`, which is a run of the producer."""

    generation: int
    seq: int


class Target:
    """What the changes are applied to. ``effects``: by key, those that had an effect, in order."""

    def __init__(self) -> None:
        self.state: dict[str, Change] = {}
        self.effects: dict[str, list[Change]] = {}

    def apply(self, key: str, change: Change) -> None:
        """`change` has an effect if it is newer than what its key has. One transaction."""
        if self.is_newer(key, change):
            self.state[key] = change
            self.effects.setdefault(key, []).append(change)

    def is_newer(self, key: str, change: Change) -> bool:
        """The compare that makes duplicates, replays and zombies harmless."""
        known = self.state.get(key)
        return known is None or (change.generation, change.seq) > (known.generation, known.seq)


class Producer:
    """Puts the changes of its keys, in their order, in puts of any size. It remembers how far all is stored,
    across deaths; what it does not know to be stored it puts again, all of it."""

    def __init__(self, keys: Sequence[str], rng: random.Random) -> None:
        self.rng = rng
        changes = [(key, Change(seq % 3, seq)) for key in keys for seq in range(_EACH)]
        # Of each key: generations one after another, and in each of them ever greater numbers.
        self.changes = sorted(changes, key=lambda each: (each[1].generation, each[1].seq, each[0]))
        self.stored = 0

    async def __call__(self, process: Process) -> None:
        channel = process.backend.channel(NAME)
        while self.stored < len(self.changes):
            end = min(len(self.changes), self.stored + self.rng.randrange(1, 60))
            await self.put(channel, [_record(*each) for each in self.changes[self.stored : end]])
            self.stored = end
            await process.clock.sleep(self.rng.uniform(0.0, 3.0))

    async def put(self, channel: Channel, records: Sequence[ChannelRecord]) -> None:
        """All of `records` are stored, those of one key in order."""
        while True:
            try:
                return await channel.put(records)
            except Retryable:
                await asyncio.sleep(0.1)


class Consumer:
    """Applies what comes, each change by a call of its own, and settles what was applied."""

    def __init__(self, target: Target, rng: random.Random) -> None:
        self.target, self.rng = target, rng

    async def __call__(self, process: Process) -> None:
        while True:
            batches = process.backend.channel(NAME).consume(
                CONSUMER, limit=self.rng.randrange(1, 20), wait=1e9
            )
            try:
                async for batch in batches:
                    await batch.settle(await self.work(process, batch.records))
            except Retryable:
                await asyncio.sleep(0.1)
            finally:
                await batches.aclose()  # type: ignore[attr-defined]  # an asynchronous generator

    async def work(self, process: Process, records: Sequence[ChannelRecord]) -> int:
        """How many of `records`, from the first on, were applied."""
        for done, record in enumerate(records):
            change = msgspec.json.decode(record.data, type=Change)
            try:
                await process.call("target.apply", lambda r=record, c=change: self._apply(r.key, c))  # type: ignore[misc]  # mypy does not infer defaults of a lambda
            except Retryable:
                return done
        return len(records)

    async def _apply(self, key: str, change: Change) -> None:
        self.target.apply(key, change)


def _record(key: str, change: Change) -> ChannelRecord:
    return ChannelRecord(key, msgspec.json.encode(change))


class Scene:
    """One seed's worth of it."""

    def __init__(
        self, loop: VirtualLoop, backend: Callable[[VirtualClock], MemoryBackend], possible: Iterable[str]
    ) -> None:
        self.loop = loop
        self.rng = random.Random(loop.rng.getrandbits(64))
        self.clock = VirtualClock(loop, random.Random(1), epoch=EPOCH)
        self.backend = backend(self.clock)
        self.world = World(self.clock)
        self.counters = Counters()
        self.chaos = Chaos(random.Random(self.rng.getrandbits(64)), possible)
        self.target = Target()
        keys = [f"k{n}" for n in range(_KEYS)]
        self.producers = [Producer(keys[n::2], self.rng) for n in range(2)]
        self.alive: dict[str, Process] = {}
        self.pauses: list[asyncio.Task[None]] = []

    async def keep(
        self, name: str, main: Callable[[Process], Coroutine[Any, Any, None]], *, once: bool = False
    ) -> None:
        """Have a process do `main`, and another one whenever it ends; or (`once`) until it ends well."""
        while True:
            process = self.alive[name] = Process(
                name,
                self.loop,
                self.backend,
                self.world,
                faults=self.chaos,
                counters=self.counters,
                latency=self.rng.choice((0.0, 0.05)),
            )
            error = await process.start(main).ended
            del self.alive[name]
            if error is None and once:
                return
            await asyncio.sleep(self.rng.uniform(0.0, 2.0))

    async def trouble(self) -> None:
        """What strikes from outside, for a while."""
        while self.loop.time() < 60.0:
            await asyncio.sleep(self.rng.uniform(0.5, 5.0))
            kind = self.rng.choice(OUTSIDE)
            alive = [process for process in self.alive.values() if not process.fate.frozen]
            if kind in self.chaos.possible and alive:
                self.counters.fired[kind] += 1
                self.strike(kind, self.rng.choice(alive))
                if kind == "replay":
                    await self.backend.channel(NAME).rewind(CONSUMER)
        self.chaos.ceased = True

    def strike(self, kind: str, process: Process) -> None:
        """`kind` happens, to `process` if it is of that sort."""
        if kind == "pause":
            self.pauses.append(self.loop.create_task(process.freeze(self.rng.uniform(5.0, 50.0))))
        elif kind == "crash anywhere":
            process.fate.fuse = self.rng.randrange(1, 200)
        elif kind == "reshard" and isinstance(self.backend, ShardedBackend):
            self.backend.reshard(self.rng)

    async def main(self) -> list[str]:
        """All of it; what is wrong."""
        tasks = [
            self.loop.create_task(self.keep(f"producer-{n}", producer, once=True))
            for n, producer in enumerate(self.producers)
        ]
        consumers = [Consumer(self.target, self.rng) for _ in range(3)]
        tasks += [self.loop.create_task(self.keep(f"consumer-{n}", each)) for n, each in enumerate(consumers)]
        await self.trouble()
        end = self.loop.time() + PATIENCE
        while self.loop.time() < end and not self.is_complete():
            await self.clock.sleep(1.0)
        await asyncio.sleep(30.0)  # what comes late must be harmless, too
        for process in list(self.alive.values()):
            process.kill()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        complaints = [f"asyncio complains: {text}" for text in self.loop.complaints]
        return self.wrong() + await self.wrong_leases() + complaints

    def is_complete(self) -> bool:
        """Whether the last change of each key has been applied."""
        last = Change(2, max(seq for seq in range(_EACH) if seq % 3 == 2))
        return [self.target.state.get(f"k{n}") for n in range(_KEYS)] == [last] * _KEYS

    def wrong(self) -> list[str]:
        """What was applied otherwise than once each and in order."""
        wanted: dict[str, list[Change]] = {}
        for producer in self.producers:
            for key, change in producer.changes:
                wanted.setdefault(key, []).append(change)
        found: list[str] = []
        for key, changes in sorted(wanted.items()):
            got = self.target.effects.get(key, [])
            if got != changes:
                found.append(
                    f"{key}: of {len(changes)} changes {len(got)} had an effect, the first otherwise than it "
                    f"should be at {_first(got, changes)}"
                )
        return found

    async def wrong_leases(self) -> list[str]:
        """Where a lease went back, or began anew, without having been rewound."""
        if not isinstance(self.backend, ShardedBackend):
            return []
        found: list[str] = []
        for shard in await self.backend.stream(NAME).shards():
            before = Lease()
            async for event in self.backend.read(stream_of(NAME, shard.id, CONSUMER)):
                lease = msgspec.json.decode(event.data, type=Lease)
                back = lease.place.position < before.place.position or lease.ended < before.ended
                if back and event.type != SHARD_REWOUND:
                    found.append(f"{event.type} {event.version} of {shard.id} takes its lease back")
                before = lease
        return found


def _first(got: Sequence[Change], wanted: Sequence[Change]) -> str:
    for n, change in enumerate(wanted):
        if n >= len(got) or got[n] != change:
            return f"{change}, was {got[n] if n < len(got) else None}"
    return f"the end, then came {got[len(wanted)]}"


def scene(
    seed: int,
    backend: Callable[[VirtualClock], MemoryBackend] = MemoryBackend,
    possible: Iterable[str] | None = None,
) -> tuple[list[str], Counters]:
    """What is wrong with `seed`, and what has struck; `possible` kinds instead of those that it draws."""
    rng = random.Random(seed)
    kinds = [kind for kind in KINDS if rng.random() < 0.4] if possible is None else possible
    found = Counters()

    async def main(loop: VirtualLoop) -> list[str]:
        nonlocal found
        it = Scene(loop, backend, kinds)
        found = it.counters
        return await it.main()

    return run(main, seed=seed), found
