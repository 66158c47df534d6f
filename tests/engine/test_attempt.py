"""Attempts: several effects at once, answers that are lost, what a handler may do wrong; in virtual time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from flowlane import Context, Event, Fact, Lane, Permanent, Unit, events
from flowlane.backends.memory import MemoryBackend
from flowlane.ports import Commit
from flowlane.testing.stores import Page
from tests.engine.test_engine import QUICK, Bench, Thing, lane_of, only, simulate, virtual

ONCE = replace(QUICK, retries=0)


class Forgetful(MemoryBackend):
    """Applies the first commit of an event of type `kind`, and is away with the answer, for so many calls."""

    def __init__(self, bench: Bench, kind: str, calls: int) -> None:
        super().__init__(bench.clock)
        self._kind, self._calls = kind, calls
        self._away = -1

    async def commit(self, work: Sequence[Commit]) -> Any:
        answer = await super().commit(work)
        if self._away < 0 and any(a.events[0].type == self._kind for c in work for a in c.appends):
            self._away = self._calls
        self._check()
        return answer

    async def read(self, stream: str, *, after: int = 0) -> AsyncIterator[Event]:
        self._check()
        async for event in super().read(stream, after=after):
            yield event

    def _check(self) -> None:
        if self._away > 0:
            self._away -= 1
            raise OSError("away")


# --------------------------------------------------------------------------- several effects at once


@virtual
async def test_several_effects_of_one_handler_at_once(bench: Bench) -> None:
    done: list[int] = []

    async def post(n: int) -> int:
        await asyncio.sleep(0.01)
        done.append(n)
        return n

    async def load(event: Event, ctx: Context) -> None:
        async with asyncio.TaskGroup() as tasks:
            for n in range(8):
                tasks.create_task(ctx.step(f"post-{n}", post, n))
            tasks.create_task(ctx.copy("web://x/a", to="lake://a", verify="length"))

    bench.world.web.publish("web://x/a", Page(data=b"x" * 100))
    report = await bench.run(lane_of(load, policy=ONCE))
    assert report.outcome == "settled", report.dead
    assert sorted(done) == list(range(8))
    types = await bench.types("toy/thing/1")
    assert types.count(events.ATTEMPT_STARTED) == 1
    assert types.count(events.STEP_DONE) == 8


# --------------------------------------------------------------------------- answers that are lost


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [events.ATTEMPT_STARTED, events.STEP_DONE])
def test_an_answer_that_is_lost_costs_no_attempt(kind: str, calls: int) -> None:
    """With one call away the look-up answers; with two it is away too, and the commit tried again is in
    conflict with itself."""

    async def scenario(bench: Bench) -> None:
        bench.backend = Forgetful(bench, kind, calls)
        done: list[str] = []

        async def post() -> None:
            done.append("post")

        async def load(event: Event, ctx: Context) -> None:
            await ctx.step("post", post)

        report = await bench.run(lane_of(load, policy=ONCE))
        assert report.outcome == "settled", report.dead
        assert done == ["post"]
        assert await bench.types("toy/thing/1") == [
            "thing",
            events.ATTEMPT_STARTED,
            events.STEP_DONE,
            events.UNIT_SETTLED,
        ]

    simulate(scenario)


@virtual
async def test_a_sign_of_life_whose_answer_is_lost_costs_no_attempt(bench: Bench) -> None:
    bench.backend = Forgetful(bench, events.ATTEMPT_ALIVE, 1)
    done: list[str] = []

    async def slow() -> None:
        done.append("slow")
        await bench.clock.sleep(20)  # several leases

    async def load(event: Event, ctx: Context) -> None:
        await ctx.step("slow", slow)
        await ctx.step("fast", fast)

    async def fast() -> None:
        done.append("fast")

    report = await bench.run(lane_of(load, policy=ONCE))
    assert report.outcome == "settled", report.dead
    assert done == ["slow", "fast"]
    assert events.ATTEMPT_ALIVE in await bench.types("toy/thing/1")


@virtual
async def test_an_attempt_that_is_cut_off_while_it_waits_for_the_log(bench: Bench) -> None:
    """Its timeout strikes during the append, which is applied all the same: what follows comes after it."""
    real = bench.backend.commit

    async def commit(work: Sequence[Commit]) -> Any:
        if any(a.events[0].type == events.STEP_DONE for c in work for a in c.appends):
            await bench.clock.sleep(90)
        return await real(work)

    bench.backend.commit = commit
    calls = 0

    async def post() -> None:
        nonlocal calls
        calls += 1

    async def load(event: Event, ctx: Context) -> None:
        await ctx.step("post", post)

    report = await bench.run(lane_of(load))
    assert (report.outcome, calls) == ("settled", 1)
    assert await bench.types("toy/thing/1") == [
        "thing",
        events.ATTEMPT_STARTED,
        events.STEP_DONE,
        events.ATTEMPT_FAILED,
        events.UNIT_SETTLED,
    ]


# --------------------------------------------------------------------------- discovery


@virtual
async def test_a_unit_that_finds_itself_goes_on_with_the_others(bench: Bench) -> None:
    links = {1: [1, 2], 2: [1, 3], 3: []}
    lane = Lane("toy", policy=ONCE)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Thing]:
        yield Thing(n=1)

    @lane.stage(on=Thing)
    async def crawl(event: Event, ctx: Context) -> AsyncIterator[Thing]:
        for n in links[event.data.n]:
            yield Thing(n=n)

    report = await bench.run(lane)
    assert (report.outcome, report.units["found"]) == ("settled", 3)


@virtual
async def test_known_units_add_nothing_to_the_log(bench: Bench) -> None:
    lane = lane_of(units=[Thing(n=n) for n in range(500)])
    await bench.run(lane, "1")
    report = await bench.run(lane, "2")
    assert report.units["found"] == 0
    assert await bench.types(report.run) == [
        events.LANE_TRIGGERED,
        events.UNIT_SETTLED,
        events.RUN_COMPLETED,
    ]


@virtual
async def test_a_discovery_that_moves_on_says_so_in_the_same_event(bench: Bench) -> None:
    """Its process may die at any moment: the budget must begin anew in the very commit that registers."""
    lane = Lane("toy", policy=QUICK)
    attempts = 0

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Thing]:
        nonlocal attempts
        attempts += 1
        for n in range(100 * attempts):
            yield Thing(n=n)
        if attempts < 6:
            raise OSError("gone")

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        pass

    report = await bench.run(lane)
    assert (report.outcome, report.units["found"]) == ("settled", 600)
    progressed = [e for e in await bench.stream(report.run) if e.type == events.DISCOVERY_PROGRESS]
    assert all(b'"attempt"' not in bytes(event.data) for event in progressed)


@virtual
async def test_every_unit_of_a_chunk_may_be_of_another_stage(bench: Bench) -> None:
    lane = Lane("toy", policy=ONCE)
    kinds: list[Callable[..., Unit]] = []
    for number in range(60):

        class Kind(Unit, key="n", type=f"kind-{number}"):
            n: int

        @lane.stage(on=Kind, name=f"load-{number}")
        async def load(event: Event, ctx: Context) -> None:
            pass

        kinds.append(Kind)

    class Mark(Fact):
        at: int

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in range(3):
            for kind in kinds:
                yield kind(n=n)
            yield Mark(at=n)

    report = await bench.run(lane)
    assert (report.outcome, report.units["found"]) == ("settled", 180)


# --------------------------------------------------------------------------- what a handler may do wrong


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Permanent("no such customer: \udcff"), r"no such customer: \udcff"),
        (OSError("no file \udc80.csv"), r"OSError: no file \udc80.csv"),
        (Unspeakable(), "Unspeakable: Unspeakable"),
    ],
)
def test_any_error_can_be_told(error: Exception, said: str) -> None:
    async def scenario(bench: Bench) -> None:
        async def load(event: Event, ctx: Context) -> None:
            raise error

        report = await bench.run(lane_of(load, policy=ONCE))
        assert only(report).partition(" (test_attempt.py, line ")[0] == said
        assert report.seconds < 1, "not after lease upon lease"

    simulate(scenario)


class Panic(BaseException):
    """As libraries raise it that are written in Rust."""


@virtual
async def test_a_panic_fails_its_unit_and_not_the_worker(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        if event.data.n == 1:
            raise Panic("index out of bounds")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(panic())

    async def panic() -> None:
        raise Panic("in a task")

    report = await bench.run(lane_of(load, units=[Thing(n=1), Thing(n=2)]))
    assert sorted(dead["reason"].partition(" (")[0] for dead in report.dead) == [
        "Panic: in a task",
        "Panic: index out of bounds",
    ]


@virtual
async def test_a_stage_that_ends_the_process_has_failed(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        sys.exit(3)

    report = await bench.run(lane_of(load, units=[Thing(n=1), Thing(n=2)]))
    said = "the stage called sys.exit(3) in the middle of its work: raise Permanent(...) there"
    assert [dead["reason"] for dead in report.dead] == [said] * 2


@virtual
async def test_two_steps_of_one_name_are_refused(bench: Bench) -> None:
    sent: list[str] = []

    async def post(text: str) -> None:
        sent.append(text)

    async def load(event: Event, ctx: Context) -> None:
        for text in "abc":
            await ctx.step("post", post, text)

    assert "two steps called 'post'" in only(await bench.run(lane_of(load)))
    assert sent == ["a"]


@virtual
async def test_a_step_that_failed_may_be_tried_again_by_the_handler(bench: Bench) -> None:
    tries = 0

    async def post() -> int:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OSError("once")
        return tries

    async def load(event: Event, ctx: Context) -> None:
        with pytest.raises(OSError, match="once"):
            await ctx.step("post", post)
        assert await ctx.step("post", post) == 2

    assert (await bench.run(lane_of(load))).outcome == "settled"


@virtual
async def test_a_step_says_the_same_to_the_attempt_after_a_crash(bench: Bench) -> None:
    heard: list[object] = []

    async def count() -> object:
        return {1: ("a", "b"), "left": float("nan")}

    async def load(event: Event, ctx: Context) -> None:
        heard.append(await ctx.step("count", count))
        if len(heard) == 1:
            raise OSError("once more")

    assert (await bench.run(lane_of(load))).outcome == "settled"
    assert heard == [{"1": ["a", "b"], "left": None}] * 2


@virtual
async def test_a_step_that_returns_what_utf_8_cannot_hold_is_named(bench: Bench) -> None:
    async def name() -> str:
        return "\ud800"

    async def load(event: Event, ctx: Context) -> None:
        await ctx.step("name", name)

    assert only(await bench.run(lane_of(load))).startswith("step 'name' returned what JSON cannot hold")


@virtual
async def test_a_step_that_is_not_async_says_so(bench: Bench) -> None:
    def post() -> int:
        return 7

    async def load(event: Event, ctx: Context) -> None:
        await ctx.step("post", post)

    reason = only(await bench.run(lane_of(load)))
    assert reason == "step 'post' was given a function that is not async: write `async def`"


@virtual
async def test_a_state_that_nearly_fills_an_event_leaves_room_for_its_end(bench: Bench) -> None:
    async def give(size: int) -> str:
        return "x" * size

    async def load(event: Event, ctx: Context) -> None:
        for n in range(4):
            await ctx.step(f"give-{n}", give, 61_000)
        raise Permanent("\x01" * 2000)  # six bytes each in JSON

    reason = only(await bench.run(lane_of(load)))
    assert reason == "\x01" * 1000


@virtual
async def test_a_finder_that_is_broken_off_has_cleaned_up_before_its_end_is_logged(bench: Bench) -> None:
    lane = Lane("toy", policy=QUICK)
    seen: list[list[str]] = []

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Any]:
        try:
            yield "no unit"
        finally:
            await asyncio.sleep(0.5)
            seen.append(await bench.types("toy/run/1"))

    await bench.run(lane)
    assert seen == [["lane.triggered"]]
    assert (await bench.types("toy/run/1"))[1] == "unit.dead"
