"""``ctx.turn``, ``ctx.known`` and ``ctx.offload``: waiting costs a unit nothing, and no turn is ever lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flowlane import Context, Event, Lane, Unit, ZipLimits
from flowlane.connectors.members import budget_of
from flowlane.ports import Environment
from flowlane.testing.clock import run
from flowlane.turns import Turns, waiting
from flowlane.worker import run_once
from tests.engine.test_engine import QUICK, Bench, Thing, lane_of, virtual
from tests.engine.test_proofs import URL, publish

THREE = [Thing(n=n) for n in range(3)]


@virtual
async def test_units_take_turns_in_order(bench: Bench) -> None:
    at_once: list[int] = []
    order: list[int] = []

    async def load(event: Event, ctx: Context) -> None:
        async with ctx.turn("a", 1):
            at_once.append(event.data.n)
            order.append(len(at_once))
            await asyncio.sleep(1)
            at_once.remove(event.data.n)

    report = await bench.run(lane_of(load, units=THREE))
    assert (report.outcome, order) == ("settled", [1, 1, 1])


@virtual
async def test_the_time_that_a_unit_waits_is_none_of_its_own(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        async with ctx.turn("a", 1):
            await asyncio.sleep(8)

    policy = replace(QUICK, timeout=10.0, retries=0)
    report = await bench.run(lane_of(load, units=THREE, policy=policy))
    assert (report.outcome, report.units["settled"]) == ("settled", 3), report.dead


@virtual
async def test_a_unit_that_has_its_turn_is_held_to_its_time(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        async with ctx.turn("a", 1):
            await asyncio.sleep(60)

    policy = replace(QUICK, timeout=10.0, retries=0)
    report = await bench.run(lane_of(load, units=THREE, policy=policy))
    assert report.units["dead"] == 3
    assert all("timeout" in dead["reason"] for dead in report.dead)


@virtual
async def test_processes_that_end_while_a_unit_waits_are_no_hops_of_it(bench: Bench) -> None:
    """Each process is given the units anew, does no more than one step of one of them, and ends."""
    steps = 0

    async def load(event: Event, ctx: Context) -> None:
        async def step() -> int:
            await asyncio.sleep(3)
            return 0

        nonlocal steps
        async with ctx.turn("a", 1):
            for n in range(6):
                await ctx.step(f"{n}", step)
                steps += 1

    lane = lane_of(load, units=THREE[:2], policy=replace(QUICK, hops=1, retries=9, lease=1.0))
    report = await bench.run(lane, deadline=bench.in_seconds(4), sound=False)
    for _ in range(40):
        await asyncio.sleep(2)
        report = await bench.run(lane, deadline=bench.in_seconds(4), sound=False)
    assert report.units["dead"] == 0, report.dead
    assert report.outcome == "settled"


@virtual
async def test_a_turn_that_comes_just_before_the_end_is_no_hop(bench: Bench) -> None:
    """Whoever waited for most of the time there was has not had its chance."""

    async def load(event: Event, ctx: Context) -> None:
        async with ctx.turn("a", 1):
            await asyncio.sleep(2)

    lane = lane_of(load, units=THREE[:1], policy=replace(QUICK, hops=1, retries=9, lease=1.0))
    for _ in range(4):
        async with (
            bench.app(lane) as app,
            asyncio.TaskGroup() as tasks,
            app.engine.turns.of("toy/a", 1),
        ):
            tasks.create_task(run_once(app, lane, slot="1", deadline=bench.in_seconds(4)))
            await asyncio.sleep(3.9)
        await asyncio.sleep(2)
    types = await bench.types("toy/thing/0")
    assert types.count("attempt.continued") == 4
    report = await bench.run(lane, deadline=bench.in_seconds(4))
    assert report.outcome == "settled", report.dead


@virtual
async def test_waiting_for_memory_is_waiting(bench: Bench) -> None:
    """Members that are read hold some of one budget for a process."""
    publish(bench, 0.0)

    async def load(event: Event, ctx: Context) -> None:
        await ctx.load(ctx.rows(URL, entry=0), to="table://t")

    lane = lane_of(load, units=THREE[:1], policy=replace(QUICK, hops=1, timeout=3.0, retries=0, lease=1.0))
    for _ in range(4):
        async with bench.app(lane) as app:
            budget = budget_of(Environment(bench.clock, app.engine.connections))
            async with budget.hold(ZipLimits().memory, ZipLimits().memory):
                await run_once(app, lane, slot="1", deadline=bench.in_seconds(8))
        await asyncio.sleep(2)
    assert (await bench.types("toy/thing/0")).count("attempt.continued") == 4
    report = await bench.run(lane)
    assert report.outcome == "settled", report.dead


@virtual
async def test_what_a_unit_leaves_behind_waits_for_no_other(bench: Bench) -> None:
    """A handler may forget a task; the unit behind it is held to its time all the same."""
    forgotten: list[asyncio.Task[None]] = []

    async def forget() -> None:
        await asyncio.sleep(1)
        with waiting():
            await asyncio.sleep(100)

    async def load(event: Event, ctx: Context) -> None:
        if not forgotten:
            forgotten.append(asyncio.create_task(forget()))
        else:
            await asyncio.sleep(60)

    policy = replace(QUICK, concurrency=1, timeout=10.0, retries=0)
    report = await bench.run(lane_of(load, units=THREE[:2], policy=policy))
    assert report.units["dead"] == 1


@virtual
async def test_turns_of_other_names_are_others(bench: Bench) -> None:
    met = asyncio.Barrier(3)

    async def load(event: Event, ctx: Context) -> None:
        async with ctx.turn(f"name {event.data.n}", 1), asyncio.timeout(5):
            await met.wait()

    assert (await bench.run(lane_of(load, units=THREE))).outcome == "settled"


@given(st.integers(1, 3), st.lists(st.sampled_from(["enter", "leave", "cancel", "turn"]), max_size=60))
def test_turns_are_never_lost_nor_made(most: int, actions: list[str]) -> None:
    async def main(_: Any) -> None:
        turns = Turns()
        having: list[asyncio.Event] = []
        tasks: list[asyncio.Task[None]] = []

        async def one() -> None:
            async with turns.of("x", most):
                leave = asyncio.Event()
                having.append(leave)
                try:
                    await leave.wait()
                finally:
                    having.remove(leave)

        for number, action in enumerate(actions):
            if action == "enter":
                tasks.append(asyncio.ensure_future(one()))
            elif action == "leave" and having:
                having[0].set()
            elif action == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif action == "turn":
                await asyncio.sleep(0)
            assert len(having) <= most
        while pending := [task for task in tasks if not task.done()]:
            for _ in range(5):
                await asyncio.sleep(0)
            assert len(having) == min(most, len([task for task in tasks if not task.done()]))
            if having:
                having[0].set()
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED, timeout=1)
        assert turns._lines == {}

    run(main)


def test_a_turn_given_to_one_that_is_cancelled_at_that_moment_goes_on_to_the_next() -> None:
    async def main(_: Any) -> None:
        turns = Turns()

        async def one() -> None:
            async with turns.of("x", 1):
                raise AssertionError("it was cancelled")

        async with turns.of("x", 1):
            waiting = asyncio.ensure_future(one())
            for _ in range(3):
                await asyncio.sleep(0)
            assert turns._lines["x"].waiting
        waiting.cancel()  # the turn is its own by now, and it has not been told yet
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        async with asyncio.timeout(5), turns.of("x", 1):
            pass

    run(main)


def test_whoever_would_let_more_in_does_not_go_before_who_waits() -> None:
    async def main(_: Any) -> None:
        turns = Turns()
        order: list[int] = []

        async def one(most: int) -> None:
            async with turns.of("x", most):
                order.append(most)

        async with asyncio.TaskGroup() as tasks, turns.of("x", 1):
            for most in (1, 2):
                tasks.create_task(one(most))
                for _ in range(3):
                    await asyncio.sleep(0)
            assert not order
        assert order == [1, 2]

    run(main)


class Other(Unit, key="n"):
    """Of another type than ``Thing``, with the same key."""

    n: int


@virtual
async def test_known_units_are_those_that_the_log_has(bench: Bench) -> None:
    told: list[list[bool]] = []
    lane = Lane("toy", policy=QUICK)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Any]:
        told.append(list(await ctx.known([Thing(n=1), Thing(n=2), Thing(n=1)])))
        told.append(list(await ctx.known([])))
        yield Thing(n=1)
        yield Thing(n=3)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        assert await ctx.offload(max, 1, event.data.n) == event.data.n

    @lane.stage(on=Other)
    async def never(event: Event, ctx: Context) -> None: ...

    assert (await bench.run(lane, "1")).units["settled"] == 2
    assert (await bench.run(lane, "2")).units["found"] == 0
    assert told == [[False, False, False], [], [True, False, True], []]
