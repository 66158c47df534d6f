"""Rounds: what a run is told of, what a redrive puts back, and what the sweep makes good; in virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from flowlane import Context, Event, Lane, Permanent, Policy, Retryable, Unit, events
from flowlane.backends.memory import MemoryBackend
from flowlane.completion import complete, notice
from flowlane.compose import Application
from flowlane.deadline import Deadline
from flowlane.errors import VersionConflict
from flowlane.events import MAX_EVENT_BYTES
from flowlane.lane import Completed, stream_of
from flowlane.ports import Append, Commit, Committed
from flowlane.pump import Pump
from flowlane.redrive import GROUP, dead_units, redrive
from flowlane.state import RunTally, progress
from flowlane.sweep import sweep
from flowlane.testing.oracle import check
from flowlane.worker import report_of, run_once
from tests.engine.test_engine import Bench, Thing, virtual

RUN = "toy/run/1"
ONCE = Policy(retries=0, timeout=60.0, lease=6.0, concurrency=200)


class World:
    """What the things of a lane do, and what its people are told."""

    def __init__(self, things: int, *, first: int = 0) -> None:
        self.things = range(first, first + things)
        self.bad = set(self.things)
        self.slow: dict[int, float] = {}
        self.told: list[Completed] = []
        self.silent = False  #: the notices fail
        self.lane = Lane("toy", policy=ONCE)
        self.lane.stage(on=self.lane.triggered, name="find")(self.find)
        self.lane.stage(on=Thing, name="load")(self.load)
        self.lane.stage(on=self.lane.completed, name="cheer")(self.tell)
        self.lane.stage(on=self.lane.failed, name="moan")(self.tell)

    async def find(self, event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in self.things:
            yield Thing(n=n)

    async def load(self, event: Event, ctx: Context) -> None:
        n = event.data.n
        await asyncio.sleep(self.slow.get(n, 0.0))
        if n in self.bad:
            raise Permanent(f"thing {n} is bad")

    async def tell(self, event: Event, ctx: Context) -> None:
        if self.silent:
            raise Permanent("the mail server says no")
        self.told.append(event.data)

    @property
    def outcomes(self) -> list[tuple[int, str, int]]:
        """Of every notice: round, outcome, and units that were dead."""
        return [(data.round, data.outcome, data.report["units"]["dead"]) for data in self.told]


class Watched(MemoryBackend):
    """Counts the tallies read, and takes its time for commits that open a round, or dies at one of them."""

    tallies = 0
    pause = 0.0
    dies_at = 0
    opened = 0

    async def tally(self, run: str, round: int) -> RunTally:
        self.tallies += 1
        return await super().tally(run, round)

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        if any(a.events[0].type == events.RUN_REDRIVEN for commit in work for a in commit.appends):
            self.opened += 1
            if self.opened == self.dies_at:
                raise asyncio.CancelledError
            await asyncio.sleep(self.pause)
        return await super().commit(work)


@asynccontextmanager
async def working(bench: Bench, lane: Lane) -> AsyncIterator[Application]:
    """The lane, with a worker that handles deliveries and does not sweep."""
    async with bench.app(lane) as app, Pump(app.engine, Deadline()):
        yield app


# --------------------------------------------------------------------------- one notice per rest


@virtual
async def test_no_success_is_told_while_redriven_units_are_at_work(bench: Bench) -> None:
    world = World(2 * GROUP)
    await bench.run(world.lane)
    # The units of one round settle at once; those of the other are at work for long, and die again.
    again = [n for n in range(2 * GROUP) if n % 2]
    world.bad = set(again)
    world.slow = dict.fromkeys(again, 30.0)
    async with working(bench, world.lane) as app:
        settled = [f"toy/thing/{n}" for n in range(2 * GROUP) if n % 2 == 0]
        await redrive(app.engine, "toy", settled)
        await redrive(app.engine, "toy", [f"toy/thing/{n}" for n in again])
        await asyncio.sleep(10.0)
        assert world.outcomes == [(0, "failed", 2 * GROUP)], "the run is at work: nothing is to be told"
        assert (await bench.state(RUN))[0] == "closed"
        await asyncio.sleep(30.0)
    assert world.outcomes == [(0, "failed", 2 * GROUP), (2, "failed", GROUP)]
    assert await check(bench.backend, world.lane) == []


@virtual
async def test_a_redrive_of_many_rounds_is_told_of_once(bench: Bench) -> None:
    """However fast the worker, and however slow the opening of rounds: none of them is worked off alone."""
    bench.backend = watched = Watched(bench.clock)
    world = World(5 * GROUP)
    await bench.run(world.lane)
    world.bad.clear()
    watched.pause = 3.0
    async with working(bench, world.lane), bench.app(world.lane) as app:  # as two processes
        assert len(await redrive(app.engine, "toy")) == 5 * GROUP
        await asyncio.sleep(5.0)
    assert world.outcomes == [(0, "failed", 5 * GROUP), (5, "settled", 0)]
    ends = [event for event in await bench.stream(RUN) if event.type == events.RUN_COMPLETED]
    assert [progress(event).completed for event in ends] == [[0], [0, 1, 2, 3, 4, 5]]
    assert await check(bench.backend, world.lane) == []


@virtual
async def test_a_redrive_that_dies_between_two_rounds_is_gone_on_with_by_the_sweep(bench: Bench) -> None:
    bench.backend = watched = Watched(bench.clock)
    world = World(3 * GROUP)
    await bench.run(world.lane)
    world.bad.clear()
    watched.dies_at = 3
    async with bench.app(world.lane) as app:
        with pytest.raises(asyncio.CancelledError):
            await redrive(app.engine, "toy")
        assert (await sweep(app.engine, "toy")).requeued == 2 * GROUP
    await bench.run(world.lane, "2")
    told = [data for data in world.told if data.run == RUN]
    assert [(data.round, data.report["units"]["dead"]) for data in told] == [(0, 3 * GROUP), (2, GROUP)]
    async with bench.app(world.lane) as app:
        assert len(await redrive(app.engine, "toy")) == GROUP
    await bench.run(world.lane, "3")
    told = [data for data in world.told if data.run == RUN]
    assert [(data.round, data.outcome) for data in told] == [(0, "failed"), (2, "failed"), (3, "settled")]


@virtual
async def test_the_cost_of_a_redrive_does_not_grow_with_the_square_of_its_rounds(bench: Bench) -> None:
    bench.backend = watched = Watched(bench.clock)
    spent: list[float] = []
    for rounds in (10, 40):
        world = World(rounds * GROUP, first=len(spent) * 10 * GROUP)
        await bench.run(world.lane, str(rounds))
        world.bad.clear()
        async with bench.app(world.lane) as app:
            await redrive(app.engine, "toy")
            watched.tallies = 0
            await run_once(app, world.lane, slot=f"{rounds}-again")
        assert (await bench.state(f"toy/run/{rounds}"))[0] == "settled"
        spent.append(watched.tallies / rounds)
    few, many = spent
    assert few < 10, f"{few:.1f} tallies read for each round"
    assert many < 2.5 * few, f"{few:.1f} tallies read for each of 10 rounds, {many:.1f} for each of 40"


@virtual
async def test_the_sweep_completes_all_rounds_at_once(bench: Bench) -> None:
    """Whoever ended the last units died before it looked."""
    world = World(3 * GROUP)
    await bench.run(world.lane)
    world.bad.clear()
    async with working(bench, world.lane) as app:
        real = bench.backend.tally

        async def away(run: str, round: int) -> RunTally:
            raise OSError("the log is away")

        bench.backend.tally = away
        await redrive(app.engine, "toy")
        await asyncio.sleep(5.0)
        bench.backend.tally = real
        assert (await bench.state(RUN))[0] == "closed"
        assert (await sweep(app.engine, "toy")).completed == 1
        assert (await sweep(app.engine, "toy")).completed == 0
        await asyncio.sleep(5.0)
    assert world.outcomes == [(0, "failed", 3 * GROUP), (3, "settled", 0)]


@virtual
async def test_who_finds_a_run_completed_has_not_completed_it(bench: Bench) -> None:
    world = World(1)
    await bench.run(world.lane)
    async with bench.app(world.lane) as app:
        assert await complete(app.engine, RUN, 0) is False
        assert await complete(app.engine, "toy/run/none", 0) is False


@virtual
async def test_a_notice_that_an_older_release_gave_of_the_round_is_not_given_again(bench: Bench) -> None:
    """It told of each round by itself: of the last one maybe while another was at work."""
    world = World(2)
    await bench.run(world.lane)
    world.bad.clear()
    async with bench.app(world.lane) as app:
        await redrive(app.engine, "toy", ["toy/thing/0"])
        await redrive(app.engine, "toy", ["toy/thing/1"])
        given = Completed(run=RUN, round=2, outcome="settled", report={})
        head = (await app.backend.last([RUN]))[RUN]
        handling = app.engine.handling("toy", events.LANE_COMPLETED)
        assert handling is not None
        first = notice(app.engine, events.LANE_COMPLETED, given, head, handling)
        await app.backend.commit([Commit((Append(stream_of("toy", given), 0, (first,)),))])
        report = await run_once(app, world.lane, slot="2")
        assert report.outcome == "settled"
        state, now = await bench.state(RUN)
    assert (state, now.completed) == ("settled", [0, 1, 2])
    assert len([name async for name in _notices(bench)]) == 2


async def _notices(bench: Bench) -> AsyncIterator[str]:
    async for event in bench.backend.scan("toy"):
        if event.version == 1 and event.subject.startswith(f"toy/notice/{RUN}@"):
            yield event.subject


# --------------------------------------------------------------------------- what a redrive leaves as it is


class Discoveries:
    """A lane whose runs find one thing each, or two if they have a gate, at which they wait; or die of it."""

    def __init__(self) -> None:
        self.lane = Lane("toy", policy=ONCE)
        self.gates: dict[str, asyncio.Event] = {}
        self.bad = True
        self.dies = False
        self.work = asyncio.Event()
        self.lane.stage(on=self.lane.triggered, name="find")(self.find)
        self.lane.stage(on=Thing, name="load")(self.load)

    async def find(self, event: Event, ctx: Context) -> AsyncIterator[Unit]:
        number = int(event.data.slot)
        yield Thing(n=number)
        if gate := self.gates.get(event.data.slot):
            await asyncio.sleep(1.5)
            yield Thing(n=number + 100)
            await gate.wait()
        if self.dies:
            raise Permanent("the listing is gone")

    async def load(self, event: Event, ctx: Context) -> None:
        if self.bad:
            raise Permanent("bad")
        await self.work.wait()


@virtual
async def test_a_run_that_is_still_discovering_keeps_no_other_from_being_redriven(bench: Bench) -> None:
    toy = Discoveries()
    toy.gates["2"] = asyncio.Event()
    async with working(bench, toy.lane) as app:
        for slot in "123":
            await app.engine.trigger("toy", slot)
        await asyncio.sleep(5.0)
        toy.bad = False
        toy.work.set()
        done = await redrive(app.engine, "toy")
        assert sorted(done) == ["toy/thing/1", "toy/thing/3"]
        assert list(done.skipped) == ["toy/run/2"]
        assert "still discovering" in done.skipped["toy/run/2"]
        toy.gates["2"].set()
        await asyncio.sleep(1.0)
        done = await redrive(app.engine, "toy")
        assert sorted(done) == ["toy/thing/102", "toy/thing/2"]
        assert done.skipped == {}
        await asyncio.sleep(1.0)
    assert await check(bench.backend, toy.lane) == []


@virtual
async def test_a_unit_whose_stage_is_gone_keeps_no_other_from_being_redriven(bench: Bench) -> None:
    world = World(2)
    await bench.run(world.lane)
    lane = Lane("toy", policy=ONCE)
    lane.stage(on=lane.triggered, name="find")(world.find)
    lane.stage(on=Thing, name="renamed")(world.load)
    async with bench.app(lane) as app:
        done = await redrive(app.engine, "toy", ["toy/thing/1"])
    assert done == []
    assert "no longer has" in done.skipped["toy/thing/1"]


# --------------------------------------------------------------------------- notices


@virtual
async def test_a_dead_notice_is_redriven_as_the_one_notice_that_it_is(bench: Bench) -> None:
    world = World(1)
    world.bad.clear()
    world.silent = True
    await bench.run(world.lane)
    before = await bench.stream(RUN)
    notice = f"toy/notice/{RUN}@0"
    assert (await bench.state(notice))[0] == "dead"
    world.silent = False
    async with bench.app(world.lane) as app:
        assert await redrive(app.engine, "toy") == [notice]
    await bench.run(world.lane, "2")
    assert [data.round for data in world.told if data.run == RUN] == [0]
    assert (await bench.state(notice))[0] == "settled"
    assert await bench.stream(RUN) == before, "its run was complete, and stays so"


# --------------------------------------------------------------------------- dead discoveries


@virtual
async def test_a_dead_discovery_is_redriven_while_its_units_are_at_work(bench: Bench) -> None:
    toy = Discoveries()
    toy.bad, toy.dies = False, True
    toy.gates["1"] = asyncio.Event()
    toy.gates["1"].set()
    async with working(bench, toy.lane) as app:
        await app.engine.trigger("toy", "1")
        await asyncio.sleep(3.0)
        assert [head.subject async for head in dead_units(app.backend, "toy")] == [RUN]
        toy.dies = False
        assert await redrive(app.engine, "toy", [RUN]) == [RUN]
        await asyncio.sleep(3.0)
        assert (await bench.state(RUN))[0] == "closed"
        toy.work.set()
        await asyncio.sleep(1.0)
        assert (await bench.state(RUN))[0] == "settled"
    assert await check(bench.backend, toy.lane) == []


@virtual
async def test_all_that_is_dead_is_redriven_with_a_discovery_among_it(bench: Bench) -> None:
    toy = Discoveries()
    toy.dies = True
    async with working(bench, toy.lane) as app:
        await app.engine.trigger("toy", "1")
        await asyncio.sleep(1.0)
        toy.bad = toy.dies = False
        toy.work.set()
        assert sorted(await redrive(app.engine, "toy")) == [RUN, "toy/thing/1"]
        await asyncio.sleep(1.0)
    assert (await bench.state(RUN))[0] == "settled"
    assert await check(bench.backend, toy.lane) == []


@virtual
async def test_round_0_is_completed_though_its_units_ended_while_the_discovery_was_redriven(
    bench: Bench,
) -> None:
    """No sweep helps."""
    toy = Discoveries()
    toy.bad, toy.dies = False, True
    async with working(bench, toy.lane) as app:
        await app.engine.trigger("toy", "1")
        await asyncio.sleep(1.0)
        toy.dies = False
        toy.gates["1"] = asyncio.Event()
        await redrive(app.engine, "toy", [RUN])
        await asyncio.sleep(3.0)
        toy.work.set()
        await asyncio.sleep(1.0)
        assert (await bench.state(RUN))[0] == "open", "the units have ended, the discovery has not"
        toy.gates["1"].set()
        await asyncio.sleep(1.0)
        assert (await bench.state(RUN))[0] == "settled"
    assert await check(bench.backend, toy.lane) == []


def stepping(world: dict[str, Any]) -> Lane:
    """A lane whose discovery does long steps and then finds something, or dies."""
    lane = Lane("toy", policy=ONCE)

    async def give(size: int) -> str:
        world["given"] = world.get("given", 0) + 1
        return "x" * size

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n, size in enumerate(world["sizes"]):
            await ctx.step(f"s{n}", give, size)
        yield Thing(n=1)
        if world.get("dies"):
            raise Permanent("the listing is gone")

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        if world.get("bad"):
            raise Permanent("bad")

    return lane


@virtual
async def test_a_redriven_discovery_goes_on_from_its_steps(bench: Bench) -> None:
    """They are not in ``run.completed``, nor in the rounds opened since."""
    world: dict[str, Any] = {"sizes": (60_000, 60_000, 60_000), "dies": True, "bad": True}
    lane = stepping(world)
    await bench.run(lane)
    state, now = await bench.state(RUN)
    assert (state, now.steps) == ("dead", {})
    world["bad"] = False
    async with bench.app(lane) as app:
        assert await redrive(app.engine, "toy", ["toy/thing/1"]) == ["toy/thing/1"]
        world["dies"] = False
        assert await redrive(app.engine, "toy") == [RUN]
        await run_once(app, lane, slot="2")
    assert world["given"] == 3 + 3, "those of the first run, and of the second; none was done again"
    assert (await bench.state(RUN))[0] == "settled"
    assert await check(bench.backend, lane) == []


@virtual
async def test_a_run_is_completed_however_much_its_discovery_keeps(bench: Bench) -> None:
    world: dict[str, Any] = {"sizes": (61_000, 61_000, 61_000, 61_000)}
    lane = stepping(world)
    await bench.run(lane)
    state, now = await bench.state(RUN)
    assert (state, now.steps, now.completed) == ("settled", {}, [0])
    assert len((await bench.stream(RUN))[-1].data) < 4096


# --------------------------------------------------------------------------- the sweep


@virtual
async def test_a_run_that_cannot_be_completed_keeps_the_sweep_from_no_other(bench: Bench) -> None:
    class Refusing(MemoryBackend):
        away = True

        async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
            own = [append.events[0] for commit in work for append in commit.appends]
            ends = [event.subject for event in own if event.type == events.RUN_COMPLETED]
            if ends and self.away:
                raise OSError("the log is away")
            if RUN in ends:
                raise Permanent(f"event run.completed of {RUN} is over the limit of {MAX_EVENT_BYTES:,}")
            return await super().commit(work)

    bench.backend = backend = Refusing(bench.clock)
    toy = Discoveries()
    toy.bad = False
    toy.work.set()
    warned: list[str] = []
    heard = logging.Handler()
    heard.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("flowlane")
    async with working(bench, toy.lane) as app:
        for slot in "123":
            await app.engine.trigger("toy", slot)
        await asyncio.sleep(5.0)
    backend.away = False
    logger.addHandler(heard)
    try:
        async with bench.app(toy.lane) as app:
            swept = await sweep(app.engine, "toy")
    finally:
        logger.removeHandler(heard)
    assert [(await bench.state(f"toy/run/{n}"))[0] for n in (1, 2, 3)] == ["closed", "settled", "settled"]
    assert swept.completed == 2
    said = [line for line in warned if RUN in line]
    assert len(said) == 1
    assert "cannot be completed" in said[0]
    assert "trace" in said[0]
    assert "\n" not in said[0]


# --------------------------------------------------------------------------- reports of what is at work


@virtual
async def test_a_run_that_is_at_work_has_not_settled(bench: Bench) -> None:
    """Neither one whose units are, nor one whose discovery is being retried, which has not died."""
    toy = Discoveries()
    toy.bad = False
    toy.gates["1"] = asyncio.Event()
    async with working(bench, toy.lane) as app:
        await app.engine.trigger("toy", "1")
        for ended in (toy.gates["1"], toy.work):
            await asyncio.sleep(3.0)
            report = await report_of(app, toy.lane, RUN)
            assert (report.outcome, report.reason, report.dead) == ("failed", "", [])
            ended.set()
        await asyncio.sleep(3.0)
        assert (await report_of(app, toy.lane, RUN)).outcome == "settled"


@virtual
async def test_a_discovery_that_is_retried_has_not_died(bench: Bench) -> None:
    lane = Lane("toy", policy=Policy(retries=1, backoff=60.0, lease=6.0))
    tries: list[int] = []

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        tries.append(len(tries))
        if len(tries) == 1:
            raise Retryable("not now", delay=30.0)

    async with working(bench, lane) as app:
        await app.engine.trigger("toy", "1")
        await asyncio.sleep(3.0)
        report = await report_of(app, lane, RUN)
        assert (report.outcome, report.reason, report.dead) == ("failed", "", [])
        await asyncio.sleep(90.0)
        assert (await report_of(app, lane, RUN)).outcome == "settled"


@virtual
async def test_a_notice_that_yields_units_is_dead_with_its_reason(bench: Bench) -> None:
    """They would count in a run that is complete already."""
    world = World(1)
    world.bad.clear()
    lane = Lane("toy", policy=ONCE)
    lane.stage(on=lane.triggered, name="find")(world.find)
    lane.stage(on=Thing, name="load")(world.load)

    @lane.stage(on=lane.completed)
    async def more(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield Thing(n=2)

    report = await bench.run(lane)
    assert (report.outcome, report.units["found"]) == ("settled", 1)
    state, now = await bench.state(f"toy/notice/{RUN}@0")
    assert state == "dead"
    assert "its run may be complete already" in now.reason
