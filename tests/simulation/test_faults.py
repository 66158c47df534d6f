"""The wrappers: every mode does what it says, to every port."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from flowlane import Event, Lane
from flowlane.errors import Fenced
from flowlane.ports import Backend, Source, Store
from flowlane.testing.clock import SimulatedDeath, VirtualLoop, run
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
