"""The wrappers: every mode does what it says, to every port."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

import pytest

from flowlane import Event, Lane
from flowlane.backends.memory import MemoryBackend
from flowlane.errors import Fenced, Retryable
from flowlane.ports import Backend, ChannelRecord, Source, Store
from flowlane.shards import Place
from flowlane.testing.channels import FaultyShards, ShardedBackend
from flowlane.testing.clock import SimulatedDeath, VirtualClock, VirtualLoop, run
from flowlane.testing.faults import (
    CANCEL,
    DIE_AFTER,
    DIE_BEFORE,
    HANG,
    REFUSE,
    UNKNOWN,
    CrashAt,
    Faults,
    FaultyDelivery,
    Process,
    Unavailable,
)
from flowlane.testing.stores import Page
from flowlane.testing.units import applied, discover, found
from tests.simulation.lab import Lab

URL = "lake://raw/a"


def no_lanes(process: Process) -> Sequence[Lane]:
    return []


async def land(process: Process) -> None:
    """Two calls: opening an upload, and its commit."""
    async with process.store("lake").upload(URL, owner="u#1") as upload:
        try:
            await upload.commit()
        finally:
            await process.call("cleaning", _clean)


async def _clean() -> None: ...


@pytest.mark.parametrize(
    ("mode", "landed", "ended"),
    [
        ("", True, None),
        (DIE_BEFORE, False, SimulatedDeath),
        (DIE_AFTER, True, SimulatedDeath),
        (UNKNOWN, True, Unavailable),
        (REFUSE, False, Unavailable),
        (CANCEL, False, asyncio.CancelledError),
        (HANG, True, None),
    ],
)
def test_each_mode(mode: str, landed: bool, ended: type[BaseException] | None) -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        process = lab.process(CrashAt(2, mode)).start(land)
        error = await process.ended
        assert (error is None) if ended is None else isinstance(error, ended)
        assert (URL in lab.world.lake.objects) == landed
        cleaned = lab.counters.reached["cleaning"]
        assert cleaned == (0 if ended is SimulatedDeath else 1)
        assert sum(lab.counters.fired.values()) == bool(mode)
        assert loop.complaints == []

    run(main)


def test_the_dead_are_refused_every_port() -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        lab.world.tables.publish("rows://a", [[]])
        process = lab.process()
        process.kill()
        with pytest.raises(SimulatedDeath):
            await process.backend.last(["a"])
        with pytest.raises(SimulatedDeath):
            await process.store("web").head("web://a")
        with pytest.raises(SimulatedDeath):
            await anext(process.source("rows://a", {}).splits())

    run(main)


@pytest.mark.parametrize("kind", ["lost message", "delayed message", "duplicate message"])
def test_what_becomes_of_messages(kind: str) -> None:
    class Always(Faults):
        on = True

        def chance(self, which: str) -> bool:
            return self.on and which == kind

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        await applied(lab.memory, discover(found("a")))
        faults = Always()
        process = lab.process(faults)
        first = await process.backend.receive(["load"], 10, lease=1.0)
        faults.on = False
        later = await process.backend.receive(["load"], 10, lease=100.0, wait=60.0)
        seen = {"lost message": (0, 0), "delayed message": (0, 1), "duplicate message": (1, 1)}
        assert (len(first), len(later)) == seen[kind]

    run(main)


def test_a_lost_lease_says_so() -> None:
    class Lost(Faults):
        def chance(self, kind: str) -> bool:
            return kind == "lost lease"

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        await applied(lab.memory, discover(found("a")))
        (delivery,) = await lab.process(Lost()).backend.receive(["load"], 1, lease=10.0)
        assert isinstance(delivery, FaultyDelivery)
        assert not await delivery.extend(10.0)
        (again,) = await lab.process().backend.receive(["load"], 1, lease=10.0)
        assert again.attempt == 2

    run(main)


def test_the_stores_keep_the_promises_that_faults_build_on() -> None:
    """A former owner is refused, resuming goes on exactly where it was asked to, and an object stays."""

    async def main(loop: VirtualLoop) -> None:
        lake = Lab(loop, no_lanes).world.lake
        async with lake.upload(URL, owner="u#1") as first:
            await first.write(b"one")
            await first.flush()
            await first.write(b"lost with its process")
            async with lake.upload(URL, owner="u#2", resume=first.id, position=2) as second:
                assert second.position == 2
                for late in (first.write(b"x"), first.flush(), first.commit()):
                    with pytest.raises(Fenced):
                        await late
                await first.abort()
                await second.write(b"ly")
                await second.commit()
        assert lake.objects == {URL: b"only"}
        async with lake.upload(URL, owner="u#3", resume="gone", position=9) as third:
            assert third.position == 0
            await third.write(b"else")
            with pytest.raises(Fenced):
                await third.commit()
        assert [landing.owner for landing in lake.landings] == ["u#2"]

    run(main)


def test_the_wrappers_are_ports() -> None:
    async def main(loop: VirtualLoop) -> tuple[Backend, Store, Source, Event | None]:
        lab = Lab(loop, no_lanes)
        process = lab.process()
        lab.world.web.publish("web://a", Page(data=b"a"))
        return process.backend, process.store("web"), process.source("rows://a", {}), None

    assert run(main)


# --------------------------------------------------------------------------- channels


class Always(Faults):
    """Messages meet with that kind of fault each time."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds

    def chance(self, kind: str) -> bool:
        return kind in self.kinds


def records(count: int, keys: int = 3) -> list[ChannelRecord]:
    return [ChannelRecord(f"k{n % keys}", b"%d" % n) for n in range(count)]


async def rest(lab: Lab, consumer: str = "c") -> list[tuple[str, int]]:
    """What the channel has left for `consumer`, by somebody without faults."""
    found: list[tuple[str, int]] = []
    async for batch in lab.backend.channel("changes").consume(consumer):
        found += [(record.key, int(record.data)) for record in batch.records]
        await batch.settle()
    return found


@pytest.mark.parametrize("backend", [MemoryBackend, ShardedBackend])
def test_records_are_doubled_and_reordered_but_never_within_a_key(
    backend: Callable[[VirtualClock], MemoryBackend],
) -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        lab.backend = backend(lab.clock)
        process = lab.process(Always("reordered records", "doubled records"))
        await process.backend.channel("changes").put(records(30))
        found = await rest(lab)
        assert len(found) > 30
        for key in range(3):
            numbers = [n for name, n in found if name == f"k{key}"]
            again = len(numbers) - 10
            assert numbers == [*range(key, key + 3 * again, 3), *range(key, 30, 3)]

    for seed in range(5):
        run(main, seed=seed)


def test_of_a_put_that_is_cut_short_the_first_records_are_stored() -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        channel = lab.process(Always("partial put")).backend.channel("changes")
        with pytest.raises(Retryable):
            await channel.put(records(30, keys=1))
        found = await rest(lab)
        assert found == [("k0", n) for n in range(len(found))]
        assert 0 < len(found) < 30

    run(main)


@pytest.mark.parametrize("backend", [MemoryBackend, ShardedBackend])
def test_a_hold_turns_out_to_be_lost_and_a_settled_batch_comes_again(
    backend: Callable[[VirtualClock], MemoryBackend],
) -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        lab.backend = backend(lab.clock)
        await lab.backend.channel("changes").put(records(5, keys=1))
        everything = [("k0", n) for n in range(5)]
        for kind in ("lost hold", "batch again"):
            batches = lab.process(Always(kind)).backend.channel("changes").consume(kind)
            batch = await anext(batches)
            assert await batch.extend() is (kind != "lost hold")
            await batch.settle()
            await batches.aclose()  # type: ignore[attr-defined]  # an asynchronous generator
            assert await rest(lab, kind) == everything

    run(main)


@pytest.mark.parametrize("backend", [MemoryBackend, ShardedBackend])
def test_the_dead_hold_what_they_held_until_it_runs_out(
    backend: Callable[[VirtualClock], MemoryBackend],
) -> None:
    async def hold(process: Process) -> None:
        """Holds one batch, and waits for the next one."""
        async for _ in process.backend.channel("changes").consume("c", wait=1e9):
            pass

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        lab.backend = backend(lab.clock)
        channel = lab.backend.channel("changes")
        await channel.put(records(1))
        process = lab.process().start(hold)
        await asyncio.sleep(5.0)
        process.kill()
        await asyncio.sleep(1.0)
        assert any(lag.owner for lag in await channel.lag("c"))
        began = loop.time()
        assert await rest(lab) == [("k0", 0)]
        assert loop.time() > began + 5.0
        assert loop.complaints == []

    run(main)


@pytest.mark.parametrize("backend", [MemoryBackend, ShardedBackend])
def test_the_cancelled_give_back_what_they_held(backend: Callable[[VirtualClock], MemoryBackend]) -> None:
    async def hold(process: Process) -> None:
        async with aclosing(process.backend.channel("changes").consume("c", wait=1e9)) as batches:  # type: ignore[type-var]  # an asynchronous generator
            async for _ in batches:
                pass

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        lab.backend = backend(lab.clock)
        await lab.backend.channel("changes").put(records(1))
        process = lab.process().start(hold)
        await asyncio.sleep(5.0)
        process.cancel()
        assert isinstance(await process.ended, asyncio.CancelledError)
        assert not any(lag.owner for lag in await lab.backend.channel("changes").lag("c"))

    run(main)


def test_a_page_whose_answer_was_lost_is_the_next() -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, no_lanes)
        backend = ShardedBackend(lab.clock, shards=1)
        await backend.channel("changes").put(records(3))
        process = lab.process(CrashAt(2, UNKNOWN))
        shards = FaultyShards(process, backend.stream("changes"))
        (shard,) = await shards.shards()
        reader = shards.read(shard, Place())
        with pytest.raises(Unavailable):
            await reader.page()
        assert [record.data for record in (await reader.page()).records] == [b"0", b"1", b"2"]
        assert (await reader.page()).records == []

    run(main)
