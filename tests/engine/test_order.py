"""Stages with an order key: one unit of a group after the other, whatever becomes of it, whatever carries it;
in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from flowlane import Context, Event, Lane, Permanent, Retryable, Unit, events
from flowlane.backends import memory
from flowlane.compose import Application
from flowlane.deadline import Deadline
from flowlane.ports import Commit
from flowlane.pump import Pump
from flowlane.redrive import GROUP, redrive
from flowlane.sweep import sweep
from tests.engine.test_attempt import Forgetful
from tests.engine.test_engine import QUICK, Bench, only, simulate, virtual


class Change(Unit, key=("customer", "n")):
    """One change of what a customer ordered."""

    customer: str | None
    n: int


Handle = Callable[[Event, Context], Awaitable[Any]]


def changes(*names: str) -> list[Change]:
    """Of ``a1``: the first change of customer a."""
    return [Change(customer=name[0], n=int(name[1:])) for name in names]


def named(event: Event) -> str:
    return f"{event.data.customer}{event.data.n}"


def ordered(
    handle: Handle, units: Iterable[Change], *, order: Any = "customer", **policy: Any
) -> tuple[Lane, list[Change]]:
    """A lane that finds `units` in each run, and what they are: a list to add to."""
    lane, found = Lane("toy", policy=QUICK), list(units)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Any]:
        for unit in found:
            yield unit

    lane.stage(on=Change, name="apply", order=order, **policy)(handle)
    return lane, found


def either_way(test: Callable[[Bench, Any], Awaitable[None]]) -> Callable[[str], None]:
    """`test`, in virtual time, of a stage whose deliveries come by its queue, and of one with a channel."""

    @pytest.mark.parametrize("via", ["queue", "channel"])
    def sync(via: str) -> None:
        simulate(lambda bench: test(bench, via))

    sync.__name__, sync.__doc__, sync.__module__ = test.__name__, test.__doc__, test.__module__
    return sync


async def discover(app: Application, slot: str) -> None:
    """A run of `slot` that has found its units and handled none."""
    await app.engine.trigger("toy", slot)
    async with Pump(app.engine, Deadline(), only="find") as pump:
        await pump.until(asyncio.sleep(0.5))


@either_way
async def test_units_of_one_key_are_handled_in_order_and_keys_beside_each_other(
    bench: Bench, via: Any
) -> None:
    done: list[str] = []
    at_work: set[str] = set()
    most = 0

    async def apply(event: Event, ctx: Context) -> None:
        nonlocal most
        assert event.data.customer not in at_work
        at_work.add(event.data.customer)
        most = max(most, len(at_work))
        await asyncio.sleep(0.1 + bench.loop.rng.random())
        at_work.remove(event.data.customer)
        done.append(named(event))

    names = [f"{customer}{n}" for n in range(40) for customer in "abc"]
    lane, _ = ordered(apply, changes(*names), via=via)
    report = await bench.run(lane)
    assert report.outcome == "settled"
    assert most == 3
    for customer in "abc":
        assert [name for name in done if name[0] == customer] == [n for n in names if n[0] == customer]


@either_way
async def test_a_key_may_be_made_of_several_fields(bench: Bench, via: Any) -> None:
    begun: list[str] = []

    async def apply(event: Event, ctx: Context) -> None:
        begun.append(named(event))
        await asyncio.sleep(1)

    lane, _ = ordered(apply, changes("a1", "a2"), via=via, order=("customer", "n"))
    async with bench.app(lane) as app:
        await app.engine.trigger("toy", "1")
        async with Pump(app.engine, Deadline()) as pump:
            await pump.until(asyncio.sleep(0.5))
        assert sorted(begun) == ["a1", "a2"], "each is a group by itself"


@either_way
async def test_a_retry_keeps_its_place(bench: Bench, via: Any) -> None:
    begun: list[tuple[str, float]] = []

    async def apply(event: Event, ctx: Context) -> None:
        begun.append((named(event), bench.clock.monotonic()))
        if named(event) == "a1" and len(begun) < 4:
            raise Retryable("not yet", delay=5.0)

    lane, _ = ordered(apply, changes("a1", "a2", "b1"), via=via)
    assert (await bench.run(lane)).outcome == "settled"
    names = [name for name, _ in begun]
    assert [name for name in names if name[0] == "a"] == ["a1"] * (names.count("a1")) + ["a2"]
    assert names.count("a1") == 3
    assert names.index("b1") < 3, "another group does not wait"
    times = [at for name, at in begun if name == "a1"]
    assert all(later - earlier >= 5.0 for earlier, later in pairwise(times))
    types = [
        "change",
        "attempt.failed",
        "attempt.started",
        "attempt.failed",
        "attempt.started",
        "unit.settled",
    ]
    if via == "channel":  # where nobody knows whether it was handed out before
        types.insert(1, "attempt.started")
    assert await bench.types("toy/change/a@1") == types


@either_way
async def test_a_continuation_keeps_its_place(bench: Bench, via: Any) -> None:
    begun: list[str] = []

    async def apply(event: Event, ctx: Context) -> None:
        begun.append(named(event))
        for n in range(4):
            await ctx.step(f"step-{n}", asyncio.sleep, 5)

    lane, _ = ordered(apply, changes("a1", "a2"), via=via)
    for _ in range(10):
        if (await bench.run(lane, deadline=bench.in_seconds(12), sound=False)).outcome == "settled":
            break
    assert begun == sorted(begun)
    assert begun.count("a1") > 1
    assert "attempt.continued" in await bench.types("toy/change/a@1")


@pytest.mark.parametrize("why", ["retry", "continuation"])
def test_what_stays_in_its_place_is_told_apart(why: str) -> None:
    """Whoever answers for the delivery elsewhere, as Lambda does, must not take it for done."""

    async def scenario(bench: Bench) -> None:
        async def apply(event: Event, ctx: Context) -> None:
            if why == "retry":
                raise Retryable("not now")
            await asyncio.sleep(100)

        lane, _ = ordered(apply, changes("a1", "a2"))
        async with bench.app(lane) as app:
            await discover(app, "1")
            for attempt in (1, 2):
                (delivery,) = await bench.backend.receive(["toy/apply"], 9, lease=60)
                assert (delivery.event.subject, delivery.attempt) == ("toy/change/a@1", attempt)
                async with Pump(app.engine, bench.in_seconds(20, 5), receiving=False) as pump:
                    assert await pump.handle(delivery) == "again"
                await asyncio.sleep(10)

    simulate(scenario)


@virtual
async def test_a_stage_without_an_order_key_hands_over(bench: Bench) -> None:
    async def apply(event: Event, ctx: Context) -> None:
        raise Retryable("not now")

    lane, _ = ordered(apply, changes("a1"), order=())
    async with bench.app(lane) as app:
        await discover(app, "1")
        (delivery,) = await bench.backend.receive(["toy/apply"], 9, lease=60)
        async with Pump(app.engine, Deadline(), receiving=False) as pump:
            assert await pump.handle(delivery) == "retried"
        await asyncio.sleep(10)
        (delivery,) = await bench.backend.receive(["toy/apply"], 9, lease=60)
        assert delivery.attempt == 1, "another message"


@either_way
async def test_a_dead_unit_lets_its_group_go_on_and_is_redriven_behind_it(bench: Bench, via: Any) -> None:
    begun: list[str] = []
    bad = {"a1"}

    async def apply(event: Event, ctx: Context) -> None:
        begun.append(named(event))
        if named(event) in bad:
            raise Permanent("it is bad")

    lane, found = ordered(apply, changes("a1", "a2"), via=via)
    assert (await bench.run(lane)).outcome == "failed"
    assert begun == ["a1", "a2"]
    bad.clear()
    found[:] = changes("a3", "a4")
    async with bench.app(lane) as app:
        await discover(app, "2")
        assert await redrive(app.engine, "toy") == ["toy/change/a@1"]
        async with Pump(app.engine, Deadline()) as pump:
            await pump.until(asyncio.sleep(5))
    assert begun == ["a1", "a2", "a3", "a4", "a1"]
    assert (await bench.state("toy/change/a@1"))[0] == "settled"


@either_way
async def test_what_is_redriven_together_keeps_its_order(bench: Bench, via: Any) -> None:
    """More than one round of them, whose streams' names sort otherwise."""
    broken = True
    done: list[str] = []
    names = [f"a{n}" for n in range(1, GROUP + 10)]

    async def apply(event: Event, ctx: Context) -> None:
        await asyncio.sleep(0.01)
        if broken:
            raise Permanent("the ledger is closed")
        done.append(named(event))

    lane, _ = ordered(apply, changes(*names), via=via)
    assert (await bench.run(lane)).units["dead"] == len(names)
    broken = False
    async with bench.app(lane) as app:
        assert len(await redrive(app.engine, "toy")) == len(names)
        async with Pump(app.engine, Deadline()) as pump:
            await pump.until(asyncio.sleep(5))
    assert done == names


@either_way
async def test_a_unit_whose_budget_is_spent_lets_its_group_go_on(bench: Bench, via: Any) -> None:
    begun: list[str] = []

    async def apply(event: Event, ctx: Context) -> None:
        begun.append(named(event))
        if named(event) == "a1":
            raise OSError("never")

    lane, _ = ordered(apply, changes("a1", "a2"), via=via)
    assert (await bench.run(lane)).outcome == "failed"
    assert begun == ["a1"] * (QUICK.retries + 1) + ["a2"]


@virtual
async def test_what_a_sweep_queues_again_is_of_its_group(bench: Bench) -> None:
    async def apply(event: Event, ctx: Context) -> None: ...

    lane, _ = ordered(apply, changes("a1", "a2", "b1", "b2"))
    async with bench.app(lane) as app:
        await discover(app, "1")
        await bench.backend.purge()
        await sweep(app.engine, "toy")
        got = await bench.backend.receive(["toy/apply"], 9, lease=60)
        assert sorted(d.event.partitionkey for d in got) == ["a", "b"]
    assert (await bench.run(lane)).units["settled"] == 4


@virtual
async def test_a_unit_found_before_its_stage_had_an_order_key_is_a_group_by_itself(bench: Bench) -> None:
    async def apply(event: Event, ctx: Context) -> None: ...

    before, _ = ordered(apply, changes("a1", "a2"), order=())
    async with bench.app(before) as app:
        await discover(app, "1")
        await bench.backend.purge()
    lane, _ = ordered(apply, changes("a1", "a2"))
    async with bench.app(lane) as app:
        await sweep(app.engine, "toy")
        got = await bench.backend.receive(["toy/apply"], 9, lease=1)
        assert sorted(d.group for d in got) == ["toy/change/a@1", "toy/change/a@2"]
        await asyncio.sleep(2)
    assert (await bench.run(lane)).units["settled"] == 2


@either_way
async def test_every_event_of_an_ordered_unit_names_its_group(bench: Bench, via: Any) -> None:
    async def apply(event: Event, ctx: Context) -> None:
        await ctx.step("one", asyncio.sleep, 0)
        if ctx.attempts_left:
            raise Retryable("again")
        raise Permanent("no")

    lane, _ = ordered(apply, changes("a1"), via=via)
    await bench.run(lane)
    async with bench.app(lane) as app:
        await redrive(app.engine, "toy")
    stream = await bench.stream("toy/change/a@1")
    assert stream[-1].type == events.UNIT_REDRIVEN
    assert {event.partitionkey for event in stream} == {"a"}


@pytest.mark.parametrize("calls", [1, 2, 3, 8])
def test_an_answer_that_is_lost_costs_no_place_and_no_attempt(calls: int) -> None:
    async def scenario(bench: Bench) -> None:
        begun: list[str] = []

        async def apply(event: Event, ctx: Context) -> None:
            begun.append(named(event))
            if begun == ["a1"]:
                raise Retryable("once")

        bench.backend = Forgetful(bench, "attempt.failed", calls)
        lane, _ = ordered(apply, changes("a1", "a2"))
        assert (await bench.run(lane)).outcome == "settled"
        assert begun == ["a1", "a1", "a2"]
        assert (await bench.types("toy/change/a@1")).count("attempt.failed") == 1

    simulate(scenario)


def test_a_delivery_that_cannot_be_given_back_comes_when_its_lease_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def away(self: Any, *, delay: float = 0) -> None:
        raise OSError("away")

    async def scenario(bench: Bench) -> None:
        begun: list[tuple[str, float]] = []

        async def apply(event: Event, ctx: Context) -> None:
            begun.append((named(event), bench.clock.monotonic()))
            if len(begun) == 1:
                raise Retryable("once")

        lane, _ = ordered(apply, changes("a1", "a2"))
        async with bench.app(lane) as app:
            await discover(app, "1")
            (delivery,) = await bench.backend.receive(["toy/apply"], 9, lease=6)
            monkeypatch.setattr(memory._Delivery, "nack", away)
            async with Pump(app.engine, Deadline(), receiving=False) as pump:
                assert await pump.handle(delivery) == "again", "the log has it"
        assert (await bench.run(lane)).outcome == "settled"
        assert [name for name, _ in begun] == ["a1", "a1", "a2"]
        assert begun[1][1] - begun[0][1] >= 6.0

    simulate(scenario)


@either_way
async def test_a_retry_that_the_log_refuses_is_a_dead_unit_and_its_group_goes_on(
    bench: Bench, via: Any
) -> None:
    begun: list[str] = []

    class Picky(memory.MemoryBackend):
        async def commit(self, work: Sequence[Commit]) -> Any:
            if any(a.events[0].type == events.ATTEMPT_FAILED for c in work for a in c.appends):
                raise Permanent("too long")
            return await super().commit(work)

    async def apply(event: Event, ctx: Context) -> None:
        begun.append(named(event))
        if named(event) == "a1":
            raise Retryable("once")

    bench.backend = Picky(bench.clock)
    lane, _ = ordered(apply, changes("a1", "a2"), via=via)
    assert "too long" in only(await bench.run(lane))
    assert begun == ["a1", "a2"]


@virtual
async def test_an_order_key_that_cannot_be_one_is_a_dead_discovery(bench: Bench) -> None:
    async def apply(event: Event, ctx: Context) -> None: ...

    class Loose(Unit, key="n"):
        n: int
        customer: str | None = None

    lane = Lane("toy", policy=QUICK)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Any]:
        yield Loose(n=1)

    lane.stage(on=Loose, name="apply", order="customer")(apply)
    report = await bench.run(lane)
    assert report.outcome == "failed"
    assert (
        "unit Loose has NoneType in its order field 'customer'" in (await bench.state(report.run))[1].reason
    )
