"""The pump, its committer and the worker: what hangs, ends early or never waits keeps nobody from working."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from flowlane import ConfigError, Context, Event, Lane, Permanent, Policy, Retryable, Unit, events
from flowlane.backends.memory import MemoryBackend
from flowlane.deadline import Deadline
from flowlane.ports import Commit, Delivery
from flowlane.pump import AGAIN, PATIENCE, Pump
from flowlane.reasons import leaf
from flowlane.testing.clock import VirtualClock
from flowlane.worker import run_once, serve
from tests.engine.test_engine import EPOCH, QUICK, Bench, Thing, lane_of, only, simulate, virtual


async def foreign() -> None:
    """Ends as cancelled, though nobody cancelled who awaits it: some library cancelled a task of its own."""
    inner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    inner.cancel()
    await inner


class Wrapped:
    """A delivery whose calls a test replaces; the backend of ``wrap`` takes it for its own."""

    def __init__(self, inner: Delivery) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def wrap(bench: Bench, kind: type[Any], stage: str = "toy/load") -> None:
    """Have the backend hand out the deliveries of `stage` as `kind`."""
    receive, commit = bench.backend.receive, bench.backend.commit

    async def received(stages: Sequence[str], limit: int, **more: Any) -> list[Any]:
        got = await receive(stages, limit, **more)
        return [kind(delivery) if delivery.stage == stage else delivery for delivery in got]

    async def committed(work: Sequence[Commit]) -> Any:
        return await commit(
            [msgspec.structs.replace(c, ack=c.ack.inner) if isinstance(c.ack, kind) else c for c in work]
        )

    bench.backend.receive, bench.backend.commit = received, committed


# --------------------------------------------------------------------------- cancelled from within


@virtual
async def test_a_handler_that_is_cancelled_from_within_has_failed(bench: Bench) -> None:
    calls: list[int] = []

    async def load(event: Event, ctx: Context) -> None:
        calls.append(event.data.n)
        if event.data.n == 0:
            await foreign()

    report = await bench.run(lane_of(load, units=[Thing(n=n) for n in range(4)], concurrency=1))
    assert "the handler was cancelled from within" in only(report)
    assert report.units["settled"] == 4, "the slot has gone on"
    assert calls.count(0) == QUICK.retries + 1


@virtual
async def test_a_handler_that_cancels_its_own_task_has_failed(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        if event.data.n == 0:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await bench.clock.sleep(1)

    report = await bench.run(lane_of(load, units=[Thing(n=n) for n in range(4)], concurrency=1))
    assert "the handler was cancelled from within" in only(report)


@virtual
async def test_a_commit_that_is_cancelled_from_within_is_looked_up_and_repeated(bench: Bench) -> None:
    real, failed = bench.backend.commit, 0

    async def commit(work: Sequence[Commit]) -> Any:
        nonlocal failed
        if failed < 2 and any(a.events[0].type == events.UNIT_SETTLED for c in work for a in c.appends):
            failed += 1
            await foreign()
        return await real(work)

    bench.backend.commit = commit
    report = await bench.run(lane_of(units=[Thing(n=n) for n in range(3)]))
    assert (report.outcome, report.units["settled"], failed) == ("settled", 3, 2)
    assert report.seconds < 6, "nothing had to wait for its lease"


@virtual
async def test_one_commit_of_a_refused_group_that_is_cancelled_from_within_is_repeated(bench: Bench) -> None:
    real, failed = bench.backend.commit, 0

    async def commit(work: Sequence[Commit]) -> Any:
        nonlocal failed
        if failed < 2 and any(a.events[0].type == events.UNIT_SETTLED for c in work for a in c.appends):
            failed += 1
            if failed == 1:
                raise Permanent("one of them is too long")
            await foreign()
        return await real(work)

    bench.backend.commit = commit
    report = await bench.run(lane_of(units=[Thing(n=n) for n in range(3)]))
    assert (report.outcome, report.units["settled"], failed) == ("settled", 3, 2)


@virtual
async def test_a_last_commit_whose_resolving_is_cancelled_from_within_is_seen_to_later(bench: Bench) -> None:
    lane, failed = lane_of(), 0
    async with bench.app(lane) as app:
        real = app.engine.resolve

        async def resolve(*work: Any) -> None:
            nonlocal failed
            if failed < 8:  # more often than there are resolvers
                failed += 1
                await foreign()
            await real(*work)

        app.engine.resolve = resolve  # type: ignore[assignment, method-assign]  # a driver's fault somewhere below it
        async with Pump(app.engine, Deadline()):
            for slot in range(9):
                await app.engine.trigger("toy", str(slot))
            await bench.clock.sleep(60)
        assert failed == 8
        assert [head async for head in bench.backend.units("toy", "open")] != [], "left to the sweep"
    assert (await bench.run(lane, "later")).outcome == "settled"
    assert [head async for head in bench.backend.units("toy", "open")] == []


@virtual
async def test_a_receiver_that_is_cancelled_from_within_asks_again(bench: Bench) -> None:
    real, failed = bench.backend.receive, 0

    async def receive(stages: Sequence[str], limit: int, **more: Any) -> Any:
        nonlocal failed
        if not failed and stages == ["toy/load"]:
            failed += 1
            await foreign()
        return await real(stages, limit, **more)

    bench.backend.receive = receive
    report = await bench.run(lane_of())
    assert (report.outcome, failed) == ("settled", 1)
    assert report.seconds < 5


@virtual
async def test_a_slot_that_ends_before_its_time_fails_the_pump(bench: Bench) -> None:
    async def pumping() -> None:
        async with bench.app(lane_of()) as app, Pump(app.engine, Deadline()) as pump:
            await bench.clock.sleep(1)
            next(t for t in asyncio.all_tasks() if t.get_name() == "slot toy/load").cancel()
            await pump.until(asyncio.sleep(1e6))

    with pytest.raises(BaseExceptionGroup) as raised:
        await pumping()
    assert "slot toy/load was cancelled" in repr(raised.value)


# --------------------------------------------------------------------------- time runs out


STUBBORN = Policy(retries=1, timeout=3.0, backoff=0.1, lease=6.0, concurrency=2)


@virtual
async def test_a_clean_up_that_hangs_is_cancelled_as_well(bench: Bench) -> None:
    calls: list[float] = []

    async def load(event: Event, ctx: Context) -> None:
        calls.append(bench.loop.time())
        if len(calls) == 1:
            try:
                await bench.clock.sleep(1e6)
            finally:
                await bench.clock.sleep(1e6)  # a close that waits for a peer that is dead

    report = await bench.run(lane_of(load, policy=STUBBORN))
    assert (report.outcome, len(calls)) == ("settled", 2)
    assert AGAIN < calls[1] - calls[0] < 3 + AGAIN + 3


async def stubborn(bench: Bench) -> None:
    """Goes on for ever, whoever cancels it."""
    while True:
        try:
            await bench.clock.sleep(1e6)
        except asyncio.CancelledError:
            continue


@virtual
async def test_the_lease_of_what_does_not_end_is_not_kept_for_ever(bench: Bench) -> None:
    calls: list[float] = []

    async def load(event: Event, ctx: Context) -> None:
        calls.append(bench.loop.time())
        if len(calls) == 1:
            await stubborn(bench)

    lane = lane_of(load, policy=STUBBORN)
    async with bench.app(lane) as app:
        running = asyncio.ensure_future(run_once(app, lane, deadline=bench.in_seconds(60, 8)))
        report = await running
    assert (report.outcome, len(calls)) == ("settled", 2)
    assert PATIENCE < calls[1] - calls[0] < PATIENCE + 3 * 6 + 3


@virtual
async def test_what_does_not_end_is_left_behind_at_the_deadline(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        await stubborn(bench)

    began = bench.loop.time()
    await bench.run(lane_of(load), deadline=bench.in_seconds(10, 8), sound=False)
    assert bench.loop.time() - began <= 18
    assert (await bench.state("toy/thing/1"))[0] == "open"


def test_what_is_left_behind_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    test_what_does_not_end_is_left_behind_at_the_deadline()
    assert [r for r in caplog.messages if r.startswith("toy/thing/1: its handler does not end")]


@virtual
async def test_handle_answers_by_the_deadline(bench: Bench) -> None:
    """Behind Lambda: an answer that comes later comes never."""

    async def load(event: Event, ctx: Context) -> None:
        await stubborn(bench)

    lane = lane_of(load)
    async with bench.app(lane) as app:
        await run_once(app, lane, slot="s", deadline=bench.in_seconds(1, 4))
        await bench.clock.sleep(30)
        (delivery,) = await app.backend.receive(["toy/load"], 1, lease=60)
        began = bench.loop.time()
        async with Pump(app.engine, bench.in_seconds(6, 2), receiving=False) as pump:
            assert await pump.handle(delivery) == "released"
        assert bench.loop.time() - began < 8


class Away(MemoryBackend):
    """From some moment on the log does not take anything: each try lasts `patience` seconds."""

    def __init__(self, clock: VirtualClock, patience: float) -> None:
        super().__init__(clock)
        self.away = False
        self.tries = 0
        self._clock_of_test, self._patience = clock, patience

    async def commit(self, work: Sequence[Commit]) -> Any:
        if self.away:
            self.tries += 1
            await self._clock_of_test.sleep(self._patience)
            raise OSError("the log is away")
        return await super().commit(work)


@pytest.mark.parametrize("patience", [0.5, 30.0, 1e6])
def test_a_log_that_is_away_does_not_keep_the_worker_from_ending(patience: float) -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend = Away(bench.clock, patience)
        reached = asyncio.Event()

        async def load(event: Event, ctx: Context) -> None:
            await bench.clock.sleep(0.001)
            if event.data.n == 300 and not reached.is_set():
                bench.backend.away = True
                reached.set()

        lane = lane_of(load, units=[Thing(n=n) for n in range(1000)], concurrency=16)
        stop, deadline = asyncio.Event(), Deadline()
        async with bench.app(lane) as app:
            await app.engine.trigger("toy", "s")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(serve(app, stop, deadline))
                await reached.wait()
                await bench.clock.sleep(1)
                began = bench.loop.time()
                deadline.margin, deadline.at = 20.0, bench.clock.monotonic() + 20.0
                stop.set()
            assert bench.loop.time() - began <= 20.0
            if patience < 1:  # one unit's end is tried four times, not each unit's
                assert bench.loop.time() - began <= 8.0
        bench.backend.away = False
        await bench.clock.sleep(60)
        report = await bench.run(lane, "s")
        assert report.units["settled"] == 1000, "what was released comes again"

    simulate(scenario)


@virtual
async def test_a_queue_that_takes_nothing_back_does_not_keep_the_worker_from_ending(bench: Bench) -> None:
    class Hanging(Wrapped):
        async def nack(self, *, delay: float = 0) -> None:
            await bench.clock.sleep(10.0)

    wrap(bench, Hanging)

    async def load(event: Event, ctx: Context) -> None:
        await bench.clock.sleep(0.01 if event.data.n < 300 else 1e6)

    units = [Thing(n=n) for n in range(400)]
    began = bench.loop.time()
    await bench.run(lane_of(load, units=units, concurrency=4), deadline=bench.in_seconds(4, 20), sound=False)
    assert bench.loop.time() - began <= 24


# --------------------------------------------------------------------------- leases


class Quick(Unit, key="n"):
    """Handled by a stage whose lease is short."""

    n: int


@virtual
async def test_a_queue_that_does_not_extend_keeps_no_other_stage_waiting(bench: Bench) -> None:
    class Hanging(Wrapped):
        async def extend(self, seconds: float) -> bool:
            await bench.clock.sleep(1e6)
            return True

    wrap(bench, Hanging)
    calls: list[float] = []

    async def load(event: Event, ctx: Context) -> None:
        await bench.clock.sleep(1e6)

    lane = lane_of(load, units=[Thing(n=1), Quick(n=1)], policy=Policy(timeout=100, lease=30))

    @lane.stage(on=Quick, lease=4)
    async def quick(event: Event, ctx: Context) -> None:
        calls.append(bench.loop.time())
        await bench.clock.sleep(1e6)

    began = bench.loop.time()
    await bench.run(lane, deadline=bench.in_seconds(40, 4), sound=False)
    assert len(calls) == 1, "its lease was kept"
    assert (await bench.types("toy/quick/1"))[-1] == events.ATTEMPT_CONTINUED
    assert bench.loop.time() - began <= 43, "both were cut off when the deadline was over"


@dataclass
class Plain:
    """A queue plugin's delivery: a mutable dataclass has no hash, and is equal to its like."""

    inner: Any
    event = property(lambda self: self.inner.event)
    stage = property(lambda self: self.inner.stage)
    attempt = property(lambda self: self.inner.attempt)
    head = property(lambda self: self.inner.head)

    async def ack(self) -> None:
        await self.inner.ack()

    async def nack(self, *, delay: float = 0) -> None:
        await self.inner.nack(delay=delay)

    async def extend(self, seconds: float) -> bool:
        return bool(await self.inner.extend(seconds))


@virtual
async def test_a_queue_that_will_never_answer_again_ends_the_worker(bench: Bench) -> None:
    """A backend's file that was removed, say: who watches the process must see it."""

    async def receive(*_: Any, **__: Any) -> Any:
        raise ConfigError("gone.db was removed: put it back, or start anew")

    bench.backend.receive = receive
    async with bench.app(lane_of()) as app:
        with pytest.raises(BaseExceptionGroup) as raised:
            async with Pump(app.engine, Deadline()):
                await bench.clock.sleep(3600)
    assert "gone.db was removed" in str(leaf(raised.value))


@virtual
async def test_a_queue_that_is_away_for_long_is_an_error_even_to_those_who_want_no_warnings(
    bench: Bench,
) -> None:
    """A disk that is full, say: a run waits until there is room, and who waits for it must know why."""
    said: list[tuple[str, str]] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelname, record.getMessage()))

    async def receive(*_: Any, **__: Any) -> Any:
        raise Retryable("flowlane.db: database or disk is full")

    bench.backend.receive = receive
    ear = Ear()
    logging.getLogger("flowlane").addHandler(ear)
    try:
        async with bench.app(lane_of()) as app, Pump(app.engine, Deadline()):
            await bench.clock.sleep(1)
            assert {level for level, _ in said} == {"WARNING"}
            await bench.clock.sleep(20)
    finally:
        logging.getLogger("flowlane").removeHandler(ear)
    errors = [line for level, line in said if level == "ERROR"]
    assert errors
    assert all("disk is full" in line for line in errors)


@virtual
async def test_a_delivery_need_not_be_hashable(bench: Bench) -> None:
    wrap(bench, Plain)

    async def load(event: Event, ctx: Context) -> None:
        await bench.clock.sleep(20)  # several leases

    report = await bench.run(lane_of(load, units=[Thing(n=n) for n in range(3)]))
    assert (report.outcome, report.units["settled"]) == ("settled", 3)


# --------------------------------------------------------------------------- a loop that is not blocked


class Computing(VirtualClock):
    """Time that passes while the loop stands still."""

    spent = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.spent


@virtual
async def test_handlers_that_never_wait_let_others_have_the_loop(bench: Bench) -> None:
    bench.clock = clock = Computing(bench.loop, epoch=EPOCH)
    bench.backend = MemoryBackend(clock)
    longest, over = 0.0, False

    async def load(event: Event, ctx: Context) -> None:
        clock.spent += 0.001

    async def others() -> None:
        nonlocal longest
        while not over:
            before = clock.spent
            await asyncio.sleep(0)
            longest = max(longest, clock.spent - before)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(others())
        report = await bench.run(lane_of(load, units=[Thing(n=n) for n in range(1000)], concurrency=8))
        over = True
    assert report.units["settled"] == 1000
    assert longest < 0.015, "of 1 s of computing"


@virtual
async def test_slots_that_give_way_take_turns(bench: Bench) -> None:
    bench.clock = clock = Computing(bench.loop, epoch=EPOCH)
    bench.backend = MemoryBackend(clock)
    order: list[str] = []

    async def load(event: Event, ctx: Context) -> None:
        clock.spent += 0.001
        order.append(event.stage)

    lane = lane_of(load, units=[kind(n=n) for n in range(300) for kind in (Thing, Quick)], concurrency=2)
    lane.stage(on=Quick, name="quick", concurrency=2)(load)
    await bench.run(lane)
    half = order[: len(order) // 2]
    assert min(half.count("load"), half.count("quick")) > len(half) / 4, "no stage starves another"


@virtual
async def test_a_group_of_commits_is_bounded_by_its_appends(bench: Bench) -> None:
    real, most = bench.backend.commit, 0

    async def commit(work: Sequence[Commit]) -> Any:
        nonlocal most
        most = max(most, sum(len(c.appends) for c in work))
        return await real(work)

    bench.backend.commit = commit
    gate = asyncio.Event()
    waiting = 0

    lane = Lane("toy", policy=Policy(concurrency=100))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Any]:
        for n in range(100):
            yield Thing(n=n)

    @lane.stage(on=Thing)
    async def split(event: Event, ctx: Context) -> AsyncIterator[Any]:
        nonlocal waiting
        waiting += 1
        if waiting == 100:
            gate.set()
        await gate.wait()
        for n in range(60):
            yield Quick(n=event.data.n * 100 + n)

    @lane.stage(on=Quick)
    async def load(event: Event, ctx: Context) -> None: ...

    report = await bench.run(lane)
    assert report.units["settled"] == 6100
    assert most <= 1024 + 100, "of 6,100 that were decided at once"


# --------------------------------------------------------------------------- the worker


def test_a_lane_that_cannot_be_swept_stops_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    other = Lane("other", policy=QUICK)

    @other.stage(on=other.triggered)
    async def find(event: Event, ctx: Context) -> None: ...

    async def scenario(bench: Bench) -> None:
        real = bench.backend.units
        swept: list[str] = []

        def units(lane: str, index: Any, patience: Any = None) -> Any:
            swept.append(lane)
            if lane == "toy":
                raise Permanent("its run cannot be completed")
            return real(lane, index, patience)

        bench.backend.units = units
        stop, deadline = asyncio.Event(), Deadline()
        async with bench.app(lane_of()) as app, asyncio.TaskGroup() as tasks:
            app.lanes.append(other)
            app.engine.lanes["other"] = other
            serving = tasks.create_task(serve(app, stop, deadline))
            await bench.clock.sleep(60)
            assert not serving.done()
            stop.set()
            deadline.at = bench.clock.monotonic()
        assert swept.count("other") > 3

    simulate(scenario)
    lines = [m for m in caplog.messages if "its run cannot be completed" in m]
    assert lines
    assert all(m.startswith("lane toy: the sweep is left for later") for m in lines)


@pytest.mark.parametrize(("every", "most"), [("1ms", 12), ("500ms", 12), (2, 7)])
def test_a_schedule_opens_no_more_than_one_run_a_second(every: Any, most: int) -> None:
    async def scenario(bench: Bench) -> None:
        lane = Lane("toy", policy=QUICK, every=every)

        @lane.stage(on=lane.triggered)
        async def find(event: Event, ctx: Context) -> None: ...

        tried: list[str] = []
        stop, deadline = asyncio.Event(), Deadline()
        async with bench.app(lane) as app, asyncio.TaskGroup() as tasks:
            real = app.engine.trigger

            async def trigger(lane: str, slot: str, **more: Any) -> Any:
                tried.append(slot)
                return await real(lane, slot, **more)

            app.engine.trigger = trigger  # type: ignore[method-assign]  # counted, not replaced
            tasks.create_task(serve(app, stop, deadline))
            await bench.clock.sleep(10)
            stop.set()
            deadline.at = bench.clock.monotonic() + 1
        assert most - 3 < len(tried) <= most
        assert len(set(tried)) == len(tried)

    simulate(scenario)
