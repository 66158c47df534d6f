"""What the engine promises, one named test each; on ``memory://``, in virtual time: hours take no time."""

from __future__ import annotations

import asyncio
import gzip
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from flowlane import (
    BadRecord,
    ConfigError,
    Context,
    Event,
    Fact,
    Lane,
    Permanent,
    Policy,
    Retryable,
    Superseded,
    Unit,
    events,
)
from flowlane.backends.memory import MemoryBackend
from flowlane.compose import Application, open_application
from flowlane.deadline import Deadline
from flowlane.engine import Engine
from flowlane.errors import Fenced
from flowlane.events import MAX_EVENT_BYTES
from flowlane.lane import stream_of
from flowlane.plugins import Registry
from flowlane.ports import Append, Body, Commit, ObjectInfo, Publish, Record, Tally
from flowlane.redrive import redrive
from flowlane.report import Report
from flowlane.settings import Settings
from flowlane.state import Progress, progress, status
from flowlane.sweep import sweep
from flowlane.testing import stores
from flowlane.testing.clock import VirtualClock, VirtualLoop, run
from flowlane.testing.oracle import check
from flowlane.testing.stores import Page, World, using
from flowlane.worker import run_once

QUICK = Policy(retries=2, timeout=60.0, backoff=1.0, backoff_cap=8.0, lease=6.0, quarantine="lake://bad/")
EPOCH = datetime(2024, 1, 2, tzinfo=UTC)

Load = Callable[[Event, Context], Awaitable[Any]]


class Thing(Unit, key="n"):
    """The unit of most tests."""

    n: int


class Bench:
    """One world, one backend, and as many processes after each other as a test opens."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.clock = VirtualClock(loop, epoch=EPOCH)
        self.world = World(self.clock)
        self.backend: Any = MemoryBackend(self.clock)
        self.registry = Registry({"testing": stores.plugin})

    @asynccontextmanager
    async def app(self, lane: Lane) -> AsyncIterator[Application]:
        """The lane, opened as by one process."""
        with using(self.world):
            async with open_application(
                [lane],
                Settings(backend="memory://"),
                clock=self.clock,
                registry=self.registry,
                backend=self.backend,
            ) as app:
                yield app

    async def run(
        self, lane: Lane, slot: str = "1", *, deadline: Deadline | None = None, sound: bool = True
    ) -> Report:
        """The report of one run; the log is checked after it."""
        async with self.app(lane) as app:
            report = await run_once(app, lane, slot=slot, deadline=deadline)
            if sound:
                assert await check(self.backend, lane) == []
        return report

    def in_seconds(self, seconds: float, margin: float = 1.0) -> Deadline:
        """A deadline that is near in so many seconds."""
        return Deadline(self.clock.monotonic() + seconds + margin, margin)

    async def stream(self, name: str) -> list[Event]:
        """The events of one stream."""
        return [event async for event in self.backend.read(name)]

    async def types(self, name: str) -> list[str]:
        """The types of the events of one stream."""
        return [event.type for event in await self.stream(name)]

    async def state(self, name: str) -> tuple[str, Progress]:
        """What has become of a unit."""
        head = (await self.backend.last([name]))[name]
        return status(head), progress(head)


def virtual(test: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
    """`test` on a bench of its own, in virtual time."""

    def sync() -> None:
        async def main(loop: VirtualLoop) -> None:
            await test(Bench(loop))

        run(main)

    sync.__name__, sync.__doc__, sync.__module__ = test.__name__, test.__doc__, test.__module__
    return sync


def simulate(test: Callable[[Bench], Awaitable[None]]) -> None:
    """As ``virtual``, for tests that take parameters."""
    virtual(test)()


def lane_of(
    load: Load | None = None, *, units: Iterable[Any] = (Thing(n=1),), policy: Policy = QUICK, **stage: Any
) -> Lane:
    """A lane that finds `units` and handles each by `load`."""
    lane = Lane("toy", policy=policy)
    found = list(units)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Any]:
        for unit in found:
            yield unit

    @lane.stage(on=Thing, name="load", **stage)
    async def handle(event: Event, ctx: Context) -> Any:
        if load is not None:
            return await load(event, ctx)
        return None

    return lane


def only(report: Report) -> str:
    """The reason of the one unit that is dead."""
    assert report.outcome == "failed"
    assert len(report.dead) == 1, report.dead
    reason = report.dead[0]["reason"]
    assert "\n" not in reason
    return reason


# --------------------------------------------------------------------------- a stage that returns nonsense


@pytest.mark.parametrize("nonsense", [1, "done", [], {"ok": True}, Thing(n=2)])
def test_a_stage_that_returns_something_is_dead_with_its_reason(nonsense: Any) -> None:
    async def scenario(bench: Bench) -> None:
        async def load(event: Event, ctx: Context) -> Any:
            return nonsense

        reason = only(await bench.run(lane_of(load)))
        assert "stage load returned" in reason
        assert "yield the units" in reason

    simulate(scenario)


class Lonely(Unit, key="n"):
    """No stage handles it."""

    n: int


class Keyless(Unit):
    """Has no key."""

    n: int = 0


class Strange(Unit, key="n"):
    """Has a key that may be anything."""

    n: Any
    more: Any = None


def strange_lane(units: Iterable[Any]) -> Lane:
    lane = lane_of(units=units)

    async def ignore(event: Event, ctx: Context) -> None: ...

    lane.stage(on=Strange, name="strange")(ignore)
    lane.stage(on=Keyless, name="keyless")(ignore)
    return lane


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (None, "yield units"),
        ("text", "yield units"),
        ({"n": 1}, "yield units"),
        (Thing, "yield units"),
        (Lonely(n=1), "no stage of lane toy handles"),
        (Keyless(), "has no key"),
        (Strange(n=[1]), "in its key field 'n'"),
        (Strange(n=1.5), "in its key field 'n'"),
        (Strange(n="\ud800"), r"yielded Strange(n='\ud800', more=None), which JSON cannot hold"),
        (Strange(n=1, more={1j: 2}), "which JSON cannot hold"),
        (Strange(n=1, more=object()), "which JSON cannot hold"),
    ],
)
def test_a_discovery_that_yields_nonsense_is_dead_with_its_reason(item: Any, said: str) -> None:
    async def scenario(bench: Bench) -> None:
        report = await bench.run(strange_lane([Thing(n=1), item]))
        assert said in only(report)
        assert "attempts" not in only(report), "at once, since it will not get better"
        assert report.dead[0]["unit"] == report.run
        assert report.units["found"] == report.units["settled"], "what was found before counts"

    simulate(scenario)


@virtual
async def test_what_was_found_before_the_nonsense_stays_found(bench: Bench) -> None:
    report = await bench.run(strange_lane([Thing(n=1), Thing(n=2), "nonsense"]))
    assert (report.outcome, report.units["found"], report.units["settled"]) == ("failed", 2, 2)


def test_a_stage_that_is_not_async_is_refused() -> None:
    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    def find(event: Event, ctx: Context) -> None: ...

    async def scenario(bench: Bench) -> None:
        with pytest.raises(ConfigError, match="stage find of lane toy is not async"):
            async with bench.app(lane):
                pass

    simulate(scenario)


# --------------------------------------------------------------------------- events that cannot be read


async def plant(bench: Bench, app: Application, data: bytes, *, n: int = 1, **fields: Any) -> str:
    """A unit's first event with that payload, as another release or a broken tool might have written it."""
    run_, _ = await app.engine.trigger("toy", "planted")
    stream = stream_of("toy", Thing(n=n))
    event = Event(
        f"planted-{n}",
        "toy",
        "thing",
        stream,
        app.engine.stamp(),
        msgspec.Raw(data),
        1,
        run_,
        stage="load",
    )
    event = msgspec.structs.replace(event, **fields)
    answers = await app.backend.commit(
        [
            Commit(
                (Append(stream, 0, (event,)),),
                (Publish(event, "toy/load"),),
                (Tally(run_, 0, "load", found=1),),
            )
        ]
    )
    assert type(answers[0]).__name__ == "Committed"
    return stream


@pytest.mark.parametrize("data", [b'{"n": "one"}', b"{}", b"[]", b"{", b"\xff", b"", b'{"n": 1e400}'])
def test_an_unparsable_payload_is_dead_with_its_reason(data: bytes) -> None:
    async def scenario(bench: Bench) -> None:
        lane = lane_of(units=())
        async with bench.app(lane) as app:
            stream = await plant(bench, app, data)
            await run_once(app, lane, slot="2")
            state, now = await bench.state(stream)
        assert state == "dead"
        assert "Thing" in now.reason
        assert stream in now.reason
        assert "\n" not in now.reason

    simulate(scenario)


@virtual
async def test_a_payload_of_a_newer_schema_waits_for_the_release_that_knows_it(bench: Bench) -> None:
    lane = lane_of(units=())
    async with bench.app(lane) as app:
        stream = await plant(bench, app, b'{"m": 7}', schema=2)
        await run_once(app, lane, slot="2")
        state, now = await bench.state(stream)
        assert state == "dead"
        assert "upgrade, then redrive" in now.reason

    seen = []

    class Thing2(Unit, key="m", type="thing", schema=2):
        m: int

    newer = Lane("toy", policy=QUICK)

    @newer.stage(on=newer.triggered)
    async def find(event: Event, ctx: Context) -> None: ...

    @newer.stage(on=Thing2, name="load")
    async def load(event: Event, ctx: Context) -> None:
        seen.append(event.data)

    async with bench.app(newer) as app:
        assert await redrive(app.engine, "toy") == [stream]
        await run_once(app, newer, slot="3")
    assert seen == [Thing2(m=7)]
    assert (await bench.state(stream))[0] == "settled"


def upcast_lane(seen: list[Any], upcasters: dict[int, Any]) -> Lane:
    class Newer(Unit, key="m", type="thing", schema=3, upcasters=upcasters):
        m: int

    lane = Lane("toy", policy=QUICK)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None: ...

    @lane.stage(on=Newer, name="load")
    async def load(event: Event, ctx: Context) -> None:
        seen.append(event.data.m)

    return lane


@virtual
async def test_an_old_payload_is_lifted_to_this_release(bench: Bench) -> None:
    seen: list[int] = []
    lane = upcast_lane(seen, {1: lambda d: {"l": d["n"]}, 2: lambda d: {"m": d["l"] * 10}})
    async with bench.app(lane) as app:
        stream = await plant(bench, app, b'{"n": 4}')
        await run_once(app, lane, slot="2")
    assert seen == [40]
    assert (await bench.state(stream))[0] == "settled"


@pytest.mark.parametrize(
    ("upcasters", "said"),
    [({1: lambda d: d}, "no upcaster from schema 2 to 3"), ({1: lambda d: d["gone"], 2: dict}, "upcaster")],
)
def test_an_upcaster_that_is_missing_or_fails_is_dead_with_its_reason(upcasters: Any, said: str) -> None:
    async def scenario(bench: Bench) -> None:
        lane = upcast_lane([], upcasters)
        async with bench.app(lane) as app:
            stream = await plant(bench, app, b'{"n": 4}')
            await run_once(app, lane, slot="2")
            state, now = await bench.state(stream)
        assert state == "dead"
        assert said in now.reason
        assert await bench.types(stream) == ["thing", "unit.dead"], "asking again does not help"

    simulate(scenario)


class Letter(Unit, key="n"):
    """A unit that carries more than it should."""

    n: int
    text: str


@virtual
async def test_a_unit_too_long_for_an_event_is_a_dead_discovery(bench: Bench) -> None:
    lane = lane_of(units=[Thing(n=1), Letter(n=1, text="x" * MAX_EVENT_BYTES), Thing(n=2)])

    @lane.stage(on=Letter)
    async def read(event: Event, ctx: Context) -> None: ...

    report = await bench.run(lane)
    reason = only(report)
    assert "the limit is 262,144" in reason
    assert "URL" in reason, "what to do"
    assert "toy/letter/1" in reason, "where"
    assert report.seconds < 60


@virtual
async def test_what_was_found_along_with_a_unit_too_long_stays_found(bench: Bench) -> None:
    lane = lane_of(units=[Thing(n=1), Thing(n=2), Letter(n=1, text="x" * MAX_EVENT_BYTES)])

    @lane.stage(on=Letter)
    async def read(event: Event, ctx: Context) -> None: ...

    report = await bench.run(lane)
    assert (report.outcome, report.units["settled"]) == ("failed", 2)


@virtual
async def test_a_fact_too_long_for_an_event_is_a_dead_discovery(bench: Bench) -> None:
    lane = Lane("toy", policy=QUICK)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield Shelf(name="upper", content=[1] * MAX_EVENT_BYTES)

    report = await bench.run(lane)
    assert "the limit is 262,144" in only(report)
    assert "toy/shelf/upper" in report.reason
    assert report.seconds < 60


@virtual
async def test_too_many_long_step_results_are_dead_with_their_reason(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        async def long() -> str:
            return "x" * 60_000

        for n in range(6):
            await ctx.step(f"long-{n}", long)

    report = await bench.run(lane_of(load))
    reason = only(report)
    assert "the limit is 245,760" in reason
    assert report.seconds < 60, "at once, not after lease upon lease"
    state, now = await bench.state("toy/thing/1")
    assert (state, len(now.steps)) == ("dead", 4), "what was done is remembered"


@virtual
async def test_a_huge_reason_is_cut_and_on_one_line(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        raise Permanent("line\nafter line\x1b[31m " * 100_000)

    reason = only(await bench.run(lane_of(load)))
    assert len(reason) <= 1000


# --------------------------------------------------------------------------- retries


@virtual
async def test_an_unknown_exception_is_retried_and_then_dead(bench: Bench) -> None:
    calls = 0

    async def load(event: Event, ctx: Context) -> None:
        nonlocal calls
        calls += 1
        raise KeyError("customer")

    reason = only(await bench.run(lane_of(load)))
    assert calls == QUICK.retries + 1
    assert re.fullmatch(r"KeyError: 'customer' \(test_engine.py, line \d+, in load\)", reason)
    failed = [e for e in await bench.stream("toy/thing/1") if e.type == "attempt.failed"]
    assert [progress(e).attempt for e in failed] == [1, 2]
    assert all(0 <= progress(e).delay <= 2.0 ** progress(e).attempt for e in failed)


@virtual
async def test_a_retry_waits_as_long_as_it_was_asked_to(bench: Bench) -> None:
    at: list[float] = []

    async def load(event: Event, ctx: Context) -> None:
        at.append(bench.loop.time())
        if len(at) < 3:
            raise Retryable("busy", delay=5.0 if len(at) == 1 else 500.0)

    assert (await bench.run(lane_of(load))).outcome == "settled"
    assert 5.0 <= at[1] - at[0] < 7.0
    assert 8.0 <= at[2] - at[1] < 10.0, "the policy's cap holds"


@pytest.mark.parametrize("error", [Permanent("never"), BadRecord("never"), ConfigError("never")])
def test_what_no_retry_helps_is_dead_at_once(error: Exception) -> None:
    async def scenario(bench: Bench) -> None:
        async def load(event: Event, ctx: Context) -> None:
            raise error

        assert only(await bench.run(lane_of(load))) == "never"
        assert await bench.types("toy/thing/1") == ["thing", "unit.dead"]

    simulate(scenario)


@pytest.mark.parametrize(
    ("errors", "said", "tries"),
    [
        ([ValueError("a"), Permanent("b")], "b", 1),
        ([Retryable("c"), ValueError("d")], "c", 3),
        ([ValueError("e"), ExceptionGroup("", [TypeError("f")])], "ValueError: e", 3),
        ([Retryable("g"), ExceptionGroup("", [ConfigError("h")])], "h", 1),
    ],
)
def test_of_a_group_of_errors_the_decisive_one_counts(errors: Any, said: str, tries: int) -> None:
    async def scenario(bench: Bench) -> None:
        calls = 0

        async def load(event: Event, ctx: Context) -> None:
            nonlocal calls
            calls += 1
            raise ExceptionGroup("unhandled errors in a TaskGroup", errors)

        assert only(await bench.run(lane_of(load))) == said
        assert calls == tries

    simulate(scenario)


@virtual
async def test_a_unit_that_moves_on_gets_its_attempts_back(bench: Bench) -> None:
    calls = 0

    async def load(event: Event, ctx: Context) -> None:
        nonlocal calls
        calls += 1

        async def work() -> int:
            return calls

        for n in range(5):
            if calls <= n * QUICK.retries:
                raise Retryable(f"stuck before step {n}")
            await ctx.step(f"step-{n}", work)

    assert (await bench.run(lane_of(load))).outcome == "settled"
    assert calls == 4 * QUICK.retries + 1, "far more attempts than the policy allows without moving on"


@virtual
async def test_attempts_left_counts_down(bench: Bench) -> None:
    left: list[int] = []

    async def load(event: Event, ctx: Context) -> None:
        left.append(ctx.attempts_left)
        raise Retryable("again")

    await bench.run(lane_of(load))
    assert left == [2, 1, 0]


@virtual
async def test_an_attempt_has_a_timeout(bench: Bench) -> None:
    began: list[float] = []

    async def load(event: Event, ctx: Context) -> None:
        began.append(bench.loop.time())
        await asyncio.sleep(10_000)

    report = await bench.run(lane_of(load))
    assert only(report) == "the attempt took longer than its timeout of 60 s"
    assert len(began) == QUICK.retries + 1
    assert 180 <= report.seconds < 240


@virtual
async def test_a_superseded_unit_is_settled_and_no_failure(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        raise Superseded("there is a newer one")

    report = await bench.run(lane_of(load))
    assert (report.outcome, report.units["superseded"], report.units["settled"]) == ("settled", 1, 1)
    assert (await bench.state("toy/thing/1"))[1].reason == "there is a newer one"


@virtual
async def test_a_skipped_unit_is_settled_and_says_why(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        ctx.skip("nothing in it")

    report = await bench.run(lane_of(load))
    assert (report.outcome, report.units["skipped"], report.units["settled"]) == ("settled", 1, 1)
    assert (await bench.state("toy/thing/1"))[0] == "skipped"
    assert (await bench.state("toy/thing/1"))[1].reason == "nothing in it"


@virtual
async def test_a_skip_that_was_retried_is_only_a_skip_if_the_last_attempt_says_so(bench: Bench) -> None:
    calls = 0

    async def load(event: Event, ctx: Context) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            ctx.skip("nothing in it")
            raise Retryable("or perhaps there is")

    report = await bench.run(lane_of(load))
    assert (report.outcome, report.units["skipped"], report.units["settled"]) == ("settled", 0, 1)
    assert (await bench.state("toy/thing/1"))[1].reason == ""


@virtual
async def test_a_discovery_that_skips_has_not_failed(bench: Bench) -> None:
    lane = Lane("toy", policy=QUICK)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        ctx.skip("done already today")

    report = await bench.run(lane)
    assert (report.outcome, report.reason, report.dead) == ("settled", "", [])
    skipped = [e for e in await bench.stream(report.run) if e.type == "unit.skipped"]
    assert "done already today" in bytes(skipped[0].data).decode()
    assert (await bench.state(report.run))[0] == "settled"


# --------------------------------------------------------------------------- deadlines


@virtual
async def test_a_long_discovery_goes_on_with_the_next_delivery(bench: Bench) -> None:
    calls = 0

    async def load(event: Event, ctx: Context) -> None: ...

    lane = lane_of(load)
    lane.stages.clear()

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        nonlocal calls
        calls += 1
        for n in range(30):
            await asyncio.sleep(1)
            yield Thing(n=n)

    lane.stage(on=Thing, name="load")(load)
    first = await bench.run(lane, deadline=bench.in_seconds(20.5), sound=False)
    assert first.units["found"] < 30
    assert (await bench.types(first.run))[-1] == "attempt.continued"
    assert calls == 1
    report = await bench.run(lane)  # the same slot: the same run
    assert report.run == first.run
    assert (report.outcome, report.units["found"], report.units["settled"]) == ("settled", 30, 30)
    assert calls == 2


@virtual
async def test_what_makes_no_progress_may_continue_only_so_often(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        await asyncio.sleep(1000)

    lane = lane_of(load, timeout=5000.0)
    for n in range(QUICK.hops):
        await bench.run(lane, deadline=bench.in_seconds(50, 20), sound=False)
        state, now = await bench.state("toy/thing/1")
        assert (state, now.hops, now.attempt) == ("open", n + 1, 0), "a continuation is no failed attempt"
    report = await bench.run(lane, deadline=bench.in_seconds(50, 20), sound=False)
    assert "no progress in 3 continuations" in only(report)


@virtual
async def test_what_makes_progress_may_continue_for_ever(bench: Bench) -> None:
    done: list[int] = []

    async def load(event: Event, ctx: Context) -> None:
        async def work(n: int) -> int:
            await asyncio.sleep(30)
            done.append(n)
            return n

        for n in range(8):
            await ctx.step(f"step-{n}", work, n)

    lane = lane_of(load, timeout=5000.0)
    for _ in range(10):
        await bench.run(lane, deadline=bench.in_seconds(50, 20), sound=False)
    assert (await bench.state("toy/thing/1"))[0] == "settled"
    assert done == list(range(8)), "each step once, though the process was stopped again and again"
    assert (await bench.types("toy/thing/1")).count("attempt.continued") >= 3


@virtual
async def test_no_further_step_is_begun_when_the_deadline_is_near(bench: Bench) -> None:
    done: list[str] = []

    async def load(event: Event, ctx: Context) -> None:
        async def work(name: str) -> None:
            await asyncio.sleep(10)
            done.append(name)

        await ctx.step("one", work, "one")
        await asyncio.sleep(10)
        await ctx.step("two", work, "two")

    lane = lane_of(load)
    await bench.run(lane, deadline=bench.in_seconds(15, 60), sound=False)
    assert done == ["one"]
    types = await bench.types("toy/thing/1")
    assert (types.count("step.done"), types[-1]) == (1, "attempt.continued")
    assert (await bench.run(lane)).outcome == "settled"
    assert done == ["one", "two"]


@virtual
async def test_nothing_is_begun_when_the_deadline_is_near(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None:
        raise AssertionError("begun")

    report = await bench.run(lane_of(load), deadline=bench.in_seconds(0), sound=False)
    assert await bench.types(report.run) == ["lane.triggered"]


# --------------------------------------------------------------------------- steps


@virtual
async def test_a_step_that_was_logged_is_not_done_again(bench: Bench) -> None:
    calls: Counter[str] = Counter()
    keys: list[str] = []
    results: list[Any] = []

    async def post(text: str, *, idempotency_key: str) -> dict[str, Any]:
        calls[text] += 1
        keys.append(idempotency_key)
        if text == "second" and calls[text] == 1:
            raise Retryable("later")
        return {"said": text, "at": datetime(2024, 1, 1, tzinfo=UTC)}

    async def load(event: Event, ctx: Context) -> None:
        results.append(await ctx.step("one", post, "first"))
        results.append(await ctx.step("two", post, "second"))

    assert (await bench.run(lane_of(load))).outcome == "settled"
    assert calls == {"first": 1, "second": 2}
    assert keys == ["toy/thing/1#0/one", "toy/thing/1#0/two", "toy/thing/1#0/two"]
    assert results[0] == results[1] == {"said": "first", "at": "2024-01-01T00:00:00Z"}, "as it is in the log"


@pytest.mark.parametrize(
    ("result", "said"),
    [("x" * 70_000, "the limit is 65,536"), (object(), "JSON cannot hold"), ({1, 2} | {object()}, "JSON")],
)
def test_a_step_result_that_the_log_cannot_hold_is_dead_with_its_reason(result: Any, said: str) -> None:
    async def scenario(bench: Bench) -> None:
        async def work() -> Any:
            return result

        async def load(event: Event, ctx: Context) -> None:
            await ctx.step("work", work)

        reason = only(await bench.run(lane_of(load)))
        assert said in reason
        assert "'work'" in reason

    simulate(scenario)


# --------------------------------------------------------------------------- load


def rows(count: int, **more: Any) -> list[Record]:
    return [{"n": n, **more} for n in range(count)]


def loading(bench: Bench, change: Callable[[Any], Any] = lambda rows: rows, **stage: Any) -> Lane:
    """A lane that loads ``rows://in`` through `change` into ``table://out``."""

    async def load(event: Event, ctx: Context) -> None:
        await ctx.load(change(ctx.rows("rows://in")), to="table://out")

    return lane_of(load, policy=replace(QUICK, batch=10, error_budget=1.0), **stage)


@virtual
async def test_every_record_is_accounted_for(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(25), rows(8)])

    def change(record: Record) -> Any:
        kind = record["n"] % 5
        if kind == 1:
            return None
        if kind == 2:
            return [record, record, record]
        if kind == 3:
            raise BadRecord("a three")
        if kind == 4:
            return []
        return record

    report = await bench.run(loading(bench, lambda r: r.map(change)))
    kinds = Counter(n % 5 for n in [*range(25), *range(8)])
    wanted = {
        "in": 33,
        "expanded": 2 * kinds[2],
        "out": kinds[0] + 3 * kinds[2],
        "skipped": kinds[1] + kinds[4],
        "quarantined": kinds[3],
    }
    assert report.records == wanted
    assert report.outcome == "settled"
    assert wanted["in"] + wanted["expanded"] == wanted["out"] + wanted["skipped"] + wanted["quarantined"]
    assert len(bench.world.tables.tables["table://out"].rows) == wanted["out"]
    assert report.bytes["in"] == 330


@virtual
async def test_a_load_is_taken_up_where_it_was_left(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(35), rows(15)])
    seen: list[int] = []
    failures = 2

    async def enrich(records: list[Record]) -> list[Record]:
        nonlocal failures
        seen.extend(record["n"] for record in records)
        if records[0]["n"] == 20 and failures:
            failures -= 1
            raise OSError("the directory is away")
        return records

    report = await bench.run(loading(bench, lambda r: r.enrich(enrich)))
    table = bench.world.tables.tables["table://out"]
    assert (report.outcome, report.records["in"], report.records["out"]) == ("settled", 50, 50)
    assert [row["n"] for row in table.rows] == [*range(35), *range(15)]
    assert len(seen) == 50 + 2 * 10, "only the batch that failed was read again"
    written = [(w.start, w.end) for w in table.writes if w.split == "0"]
    assert written == [(0, 10), (10, 20), (20, 30), (30, 35)]
    tokens = [w.token for w in table.writes]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == 2, "before the failures, and after them"


@virtual
async def test_the_end_of_a_split_of_one_batch_takes_no_event_of_its_own(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(3), rows(15), rows(4)])
    failures = 1

    async def enrich(records: list[Record]) -> list[Record]:
        nonlocal failures
        if len(records) == 4 and failures:
            failures -= 1
            raise OSError("the directory is away")
        return records

    report = await bench.run(loading(bench, lambda r: r.enrich(enrich)))
    assert (report.outcome, report.records["in"], report.records["out"]) == ("settled", 22, 22)
    types = await bench.types("toy/thing/1")
    assert types.count("batch.written") == 1 + (2 + 1) + 1, "and one for the end of two batches"
    table = bench.world.tables.tables["table://out"]
    assert [row["n"] for row in table.rows] == [*range(3), *range(15), *range(4)]


@virtual
async def test_a_load_goes_on_over_deadlines(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(100)])

    async def slowly(records: list[Record]) -> list[Record]:
        await asyncio.sleep(10)
        return records

    lane = loading(bench, lambda r: r.enrich(slowly), timeout=5000.0)
    for _ in range(5):
        await bench.run(lane, deadline=bench.in_seconds(25, 15), sound=False)
    table = bench.world.tables.tables["table://out"]
    assert (await bench.state("toy/thing/1"))[0] == "settled"
    assert [row["n"] for row in table.rows] == list(range(100))
    assert (await bench.types("toy/thing/1")).count("attempt.continued") >= 2


@virtual
async def test_a_unit_is_cut_as_the_release_that_found_it_would(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(20)])
    lane = loading(bench)
    async with bench.app(lane) as app:
        stream = await plant(bench, app, b'{"n": 1}', cut="7/1000000")
        await run_once(app, lane, slot="planted")
    writes = bench.world.tables.tables["table://out"].writes
    assert [(w.start, w.end) for w in writes if w.unit == stream] == [(0, 7), (7, 14), (14, 20)]


@virtual
async def test_two_loads_of_one_unit_are_told_apart(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(3)])
    bench.world.tables.publish("rows://more", [rows(4)])
    calls = 0

    async def load(event: Event, ctx: Context) -> None:
        nonlocal calls
        calls += 1
        one = await ctx.load(ctx.rows("rows://in"), to="table://one")
        if calls == 1:
            raise Retryable("between the two")
        two = await ctx.load(ctx.rows("rows://more"), to="table://two")
        assert (one.records_out, two.records_out) == (3, 4)

    report = await bench.run(lane_of(load))
    assert (report.outcome, report.records["out"]) == ("settled", 7)
    assert {uri: len(table.rows) for uri, table in bench.world.tables.tables.items()} == {
        "table://one": 3,
        "table://two": 4,
    }


@virtual
async def test_one_source_loaded_twice_into_one_table(bench: Bench) -> None:
    """What tells the two apart is which load it is: source, split, unit and table are the same."""
    bench.world.tables.publish("rows://in", [rows(3)])

    def mark(side: str) -> Callable[[Record], Record]:
        def mark_or_refuse(record: Record) -> Record:
            if record["n"] == 0:
                raise BadRecord(f"none for {side}")
            return {**record, "side": side}

        return mark_or_refuse

    async def load(event: Event, ctx: Context) -> None:
        for side in ("left", "right"):
            await ctx.load(ctx.rows("rows://in").map(mark(side)), to="table://out")

    report = await bench.run(lane_of(load, policy=replace(QUICK, error_budget=1.0)))
    assert (report.records["out"], report.records["quarantined"]) == (4, 2)
    sides = Counter(row["side"] for row in bench.world.tables.tables["table://out"].rows)
    assert sides == {"left": 2, "right": 2}
    bad = b"".join(data for url, data in bench.world.lake.objects.items() if url.startswith("lake://bad/"))
    assert bad.count(b"none for left") == bad.count(b"none for right") == 1


async def _short(records: list[Record]) -> list[Record]:
    return records[1:]


async def _nothing(records: list[Record]) -> Any:
    return None


async def _texts(records: list[Record]) -> Any:
    return ["x"] * len(records)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.map(lambda record: 7), "map returned int"),
        (lambda r: r.map(lambda record: "text"), "map returned str"),
        (lambda r: r.map(lambda record: [record, 7]), "map returned"),
        (lambda r: r.enrich(_short), "as many records"),
        (lambda r: r.enrich(_nothing), "as many records"),
        (lambda r: r.enrich(_texts), "enrich"),
    ],
)
def test_a_map_or_enrich_that_returns_nonsense_is_dead_with_its_reason(change: Any, said: str) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.tables.publish("rows://in", [rows(5)])
        assert said in only(await bench.run(loading(bench, change)))
        assert await bench.types("toy/thing/1") == ["thing", "attempt.started", "unit.dead"]

    simulate(scenario)


@virtual
async def test_a_map_that_fails_is_retried_with_its_own_words(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(5)])
    reason = only(await bench.run(loading(bench, lambda r: r.map(lambda record: record["missing"]))))
    assert re.fullmatch(r"KeyError: 'missing' \(test_engine.py, line \d+, in <lambda>; row 0\)", reason)


@virtual
async def test_steps_follow_each_other_in_the_order_written(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(4)])

    async def double(records: list[Record]) -> list[Record]:
        return [{"n": record["n"] * 2} for record in records]

    def next_one(record: Record) -> Record:
        return {"n": record["n"] + 1}

    await bench.run(loading(bench, lambda r: r.map(next_one).enrich(double).map(next_one)))
    assert [row["n"] for row in bench.world.tables.tables["table://out"].rows] == [3, 5, 7, 9]


@virtual
async def test_records_that_one_map_made_reach_the_next_one(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(10)])

    def three(record: Record) -> Any:
        return [{**record, "part": part} for part in range(3)] if record["n"] % 2 else None

    def mark(record: Record) -> Record:
        if record["n"] == 7:
            raise BadRecord("a seven")
        return {**record, "marked": True}

    report = await bench.run(loading(bench, lambda r: r.map(three).map(mark)))
    out = bench.world.tables.tables["table://out"].rows
    assert [(row["n"], row["part"]) for row in out] == [(n, p) for n in (1, 3, 5, 9) for p in range(3)]
    assert all(row["marked"] for row in out)
    assert report.records == {"in": 10, "expanded": 10, "out": 12, "skipped": 5, "quarantined": 3}


def quarantined(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    return {
        url: [msgspec.json.decode(line) for line in data.splitlines()]
        for url, data in bench.world.lake.objects.items()
        if url.startswith("lake://bad/")
    }


def refuse_fives(record: Record) -> Record:
    if record["n"] % 10 == 5:
        raise BadRecord(f"{record['n']} is a five")
    return {**record, "refuse": True} if record["n"] == 8 else record


@virtual
async def test_bad_records_are_put_aside_with_reason_and_position(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(20, name="Zoë")])
    report = await bench.run(loading(bench, lambda r: r.map(refuse_fives)))
    assert (report.outcome, report.records["quarantined"], report.records["out"]) == ("settled", 3, 17)
    files = quarantined(bench)
    assert [url.rpartition("-")[2] for url in sorted(files)] == ["000000000000.jsonl", "000000000010.jsonl"]
    assert all(url.startswith("lake://bad/toy/") and "thing" in url for url in files)
    first, second = (files[url] for url in sorted(files))
    assert first[0] == {
        "unit": "toy/thing/1",
        "url": "rows://in",
        "row": 5,
        "reason": "5 is a five",
        "raw": "{'n': 5, 'name': 'Zoë'}",
    }
    assert [bad["reason"] for bad in first] == ["5 is a five", "refused"]
    assert [bad["row"] for bad in second] == [15]


@virtual
async def test_a_repeated_batch_puts_the_same_records_in_the_same_place(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(20)])
    fail = True

    async def enrich(records: list[Record]) -> list[Record]:
        return records

    real = bench.backend.commit

    async def commit(work: Sequence[Commit]) -> Any:
        nonlocal fail
        written = [a for c in work for a in c.appends if a.events[0].type == "batch.written"]
        if written and fail:
            fail = False
            raise ConnectionError("the log is away")  # after effect and quarantine, before the position
        return await real(work)

    bench.backend.commit = commit
    before: dict[str, bytes] = {}
    report = await bench.run(loading(bench, lambda r: r.map(refuse_fives).enrich(enrich)))
    assert not fail
    assert (report.outcome, report.records["quarantined"]) == ("settled", 3)
    landings = [x for x in bench.world.lake.landings if x.url.startswith("lake://bad/")]
    for landing in landings:
        assert before.setdefault(landing.url, landing.data) == landing.data
    assert [row["n"] for row in bench.world.tables.tables["table://out"].rows].count(0) == 1


@virtual
async def test_bad_records_with_no_place_for_them_are_a_dead_unit(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(20)])
    lane = loading(bench, lambda r: r.map(refuse_fives))
    async with bench.app(lane) as app:
        engine = Engine([lane_without_quarantine(lane)], bench.backend, app.connections, bench.clock)
        app.engine = engine
        report = await run_once(app, lane, slot="1")
    assert "Policy(quarantine=...)" in only(report)


def lane_without_quarantine(lane: Lane) -> Lane:
    lane.stages[:] = [replace(s, policy=replace(s.policy, quarantine=None)) for s in lane.stages]
    return lane


@pytest.mark.parametrize(("budget", "outcome"), [(0.1, "settled"), (0.09, "failed"), (0.0, "failed")])
def test_a_run_over_its_error_budget_has_failed(budget: float, outcome: str) -> None:
    async def scenario(bench: Bench) -> None:
        bench.world.tables.publish("rows://in", [rows(100)])

        def change(record: Record) -> Record:
            if record["n"] % 10 == 5:
                raise BadRecord("a five")
            return record

        lane = loading(bench, lambda r: r.map(change))
        lane.policy = replace(lane.policy, error_budget=budget)
        lane.stages[:] = [replace(s, policy=replace(s.policy, error_budget=budget)) for s in lane.stages]
        report = await bench.run(lane)
        assert report.outcome == outcome
        assert report.records["out"] == 90, "a small unit is loaded all the same"
        assert ("over the budget" in report.reason) == (outcome == "failed")

    simulate(scenario)


@virtual
async def test_a_unit_far_over_its_error_budget_stops(bench: Bench) -> None:
    bench.world.tables.publish("rows://in", [rows(10_000)])

    def change(record: Record) -> Record:
        raise BadRecord("all of them")

    lane = loading(bench, lambda r: r.map(change), batch=500, error_budget=0.5)
    report = await bench.run(lane)
    reason = only(report)
    assert "1,000 of 1,000 records are bad" in reason
    assert "50.00%" in reason
    assert report.records["in"] == 1000


# --------------------------------------------------------------------------- copy


@virtual
async def test_two_copies_of_one_unit_land_once_each(bench: Bench) -> None:
    calls = 0
    for name in "ab":
        bench.world.web.publish(f"web://x/{name}.json", Page(data=name.encode() * 500))

    async def load(event: Event, ctx: Context) -> None:
        nonlocal calls
        calls += 1
        await ctx.copy("web://x/a.json", to="lake://a.json")
        if calls == 1:
            raise Retryable("between the two")
        await ctx.copy("web://x/b.json", to="lake://b.json")

    report = await bench.run(lane_of(load))
    assert report.outcome == "settled"
    assert report.bytes == {"in": 1000, "out": 1000}
    assert [landing.url for landing in bench.world.lake.landings] == ["lake://a.json", "lake://b.json"]


@virtual
async def test_another_object_in_the_way_is_a_dead_unit(bench: Bench) -> None:
    bench.world.web.publish("web://x/a.json", Page(data=b"new"))
    bench.world.lake.objects["lake://a.json"] = b"old"

    async def load(event: Event, ctx: Context) -> None:
        await ctx.copy("web://x/a.json", to="lake://a.json")

    assert "another object stands there" in only(await bench.run(lane_of(load)))
    assert bench.world.lake.objects["lake://a.json"] == b"old"


@virtual
async def test_a_refused_copy_leaves_no_unfinished_upload(bench: Bench) -> None:
    bench.world.web.publish("web://x/a.json.gz", Page(data=b"<html>sorry</html>"))

    async def load(event: Event, ctx: Context) -> None:
        await ctx.copy("web://x/a.json.gz", to="lake://a.json.gz")

    assert "not a .gz file" in only(await bench.run(lane_of(load)))
    assert bench.world.lake.parts == {}
    assert bench.world.lake.objects == {}


@virtual
async def test_a_copy_that_only_catches_up_until_the_deadline_is_stopped_in_time(bench: Bench) -> None:
    """What has landed is decoded once more by each attempt: one that has no time for more than that."""
    page = Page(data=gzip.compress(random.Random(1).randbytes(64 * 40), mtime=0), pause=1.0)
    bench.world.web.publish("web://x/a.gz", page)

    async def load(event: Event, ctx: Context) -> None:
        await ctx.copy("web://x/a.gz", to="lake://a.gz")

    lane = lane_of(load, policy=Policy(hops=1, timeout=1000.0))
    await bench.run(lane, deadline=bench.in_seconds(30.5, 5), sound=False)
    assert (await bench.types("toy/thing/1"))[-1] == "attempt.continued"
    for last in ("attempt.continued", "unit.dead"):
        before = bench.clock.monotonic()
        await bench.run(lane, deadline=bench.in_seconds(20.5, 5), sound=False)
        assert bench.clock.monotonic() - before < 23
        assert (await bench.types("toy/thing/1"))[-1] == last
    assert "decoded once more" in (await bench.state("toy/thing/1"))[1].reason


@virtual
async def test_an_object_is_known_again_over_deadlines(bench: Bench) -> None:
    """The answer to the commit was lost; to read what stands there takes longer than one invocation has."""
    page = Page(data=random.Random(1).randbytes(64 * 40))
    bench.world.web.publish("web://x/a.bin", page)
    lake, land, read = bench.world.lake, bench.world.lake.land, bench.world.lake.read
    starts: list[int] = []

    def lost(*arguments: Any, **options: Any) -> ObjectInfo:
        land(*arguments, **options)
        raise Retryable("the answer was lost")

    class Slow:
        def __init__(self, body: Body) -> None:
            self.info, self.proven_length, self._body = body.info, True, body

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for block in self._body:
                await bench.clock.sleep(1)
                yield block

    @asynccontextmanager
    async def slowly(url: str, *, start: int = 0, **options: Any) -> AsyncIterator[Body]:
        starts.append(start)
        async with read(url, start=start, **options) as body:
            yield Slow(body)

    bench.world.lake.land = lost  # type: ignore[method-assign]
    bench.world.lake.read = slowly  # type: ignore[method-assign]

    async def load(event: Event, ctx: Context) -> None:
        await ctx.copy("web://x/a.bin", to="lake://a.bin", verify="length")

    lane = lane_of(load, policy=Policy(hops=1, timeout=1000.0, backoff="1ms", backoff_cap="2ms"))
    for _ in range(4):
        await bench.run(lane, deadline=bench.in_seconds(15.5, 5), sound=False)
    assert (await bench.state("toy/thing/1"))[0] == "settled"
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert len(starts) >= 3
    assert lake.objects["lake://a.bin"] == page.data
    assert len(lake.landings) == 1


@virtual
async def test_what_a_dead_unit_had_uploaded_is_kept_for_a_week(bench: Bench) -> None:
    page = Page(data=b"x" * 3_000_000, breaks=99)
    bench.world.web.publish("web://x/a.bin", page)
    lake = bench.world.lake

    async def load(event: Event, ctx: Context) -> None:
        await ctx.copy("web://x/a.bin", to="lake://a.bin", verify="length")

    lane = lane_of(load)
    assert "the connection broke" in only(await bench.run(lane))
    async with bench.app(lane) as app:
        await bench.clock.sleep(6 * 86400)
        assert (await sweep(app.engine, "toy")).discarded == 0
        assert [bool(part.data) for part in lake.parts.values()] == [True]
        await bench.clock.sleep(2 * 86400)
        assert (await sweep(app.engine, "toy")).discarded == 1
        assert lake.parts == {}
        page.breaks = 0
        await redrive(app.engine, "toy")
    await bench.run(lane)
    assert lake.objects["lake://a.bin"] == page.data


# --------------------------------------------------------------------------- deliveries and leases


@virtual
async def test_no_more_units_are_handled_at_once_than_the_policy_says(bench: Bench) -> None:
    now = most = 0

    async def load(event: Event, ctx: Context) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(1)
        now -= 1

    report = await bench.run(lane_of(load, units=[Thing(n=n) for n in range(40)], concurrency=4))
    assert report.units["settled"] == 40
    assert most == 4
    assert 10 <= report.seconds < 15


@virtual
async def test_a_long_attempt_keeps_its_lease(bench: Bench) -> None:
    calls = 0

    async def load(event: Event, ctx: Context) -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(50)  # with a lease of 6

    assert (await bench.run(lane_of(load))).outcome == "settled"
    assert calls == 1
    assert await bench.types("toy/thing/1") == ["thing", "unit.settled"]


@virtual
async def test_who_loses_the_lease_is_stopped_and_the_unit_handled_again(bench: Bench) -> None:
    ended: list[str] = []

    async def load(event: Event, ctx: Context) -> None:
        try:
            if not ended:
                await bench.backend.purge()
            await asyncio.sleep(50)
            ended.append("done")
        except asyncio.CancelledError:
            ended.append("stopped")
            raise

    assert (await bench.run(lane_of(load))).outcome == "settled"
    assert ended == ["stopped", "done"]
    assert (await bench.types("toy/thing/1")).count("unit.settled") == 1


@virtual
async def test_who_has_lost_the_lease_logs_nothing_more(bench: Bench) -> None:
    """As a handler that was paused: it goes on all the same, and whatever it wants logged is refused."""
    refused: list[str] = []

    async def load(event: Event, ctx: Any) -> None:
        async def work() -> None:
            raise AssertionError("an effect of somebody who has lost the lease")

        if refused:
            return
        ctx.lost = True
        for name in ("one", "two"):
            try:
                await ctx.step(name, work)
            except Fenced as error:
                refused.append(str(error))
        await ctx.step("three", work)

    assert (await bench.run(lane_of(load))).outcome == "settled"
    assert len(refused) == 2
    assert "toy/thing/1" in refused[0]
    assert "step.done" not in await bench.types("toy/thing/1")


@virtual
async def test_a_unit_that_somebody_else_ended_is_acked_and_not_ended_again(bench: Bench) -> None:
    async def load(event: Event, ctx: Any) -> None:
        settled = ctx.make(events.UNIT_SETTLED, None)
        answer = await ctx.engine.commit(
            Commit(
                (Append(ctx.unit, ctx.version, (settled,)),),
                tally=(ctx.handling.settled(ctx.run, 0)),
            )
        )
        assert type(answer).__name__ == "Committed"

    report = await bench.run(lane_of(load))
    assert (report.outcome, report.units["settled"]) == ("settled", 1)
    assert await bench.types("toy/thing/1") == ["thing", "unit.settled"]


@virtual
async def test_a_duplicate_delivery_changes_nothing(bench: Bench) -> None:
    calls = 0

    async def load(event: Event, ctx: Any) -> None:
        nonlocal calls
        calls += 1
        first = (await bench.stream(ctx.unit))[0]
        await bench.backend.commit([Commit((), (Publish(first, "toy/load"),))])
        await asyncio.sleep(3)

    report = await bench.run(lane_of(load))
    assert (report.outcome, report.units["settled"]) == ("settled", 1)
    assert (await bench.types("toy/thing/1")).count("unit.settled") == 1


@pytest.mark.parametrize("applied", [True, False])
def test_a_lost_answer_is_looked_up_in_the_log(applied: bool) -> None:
    async def scenario(bench: Bench) -> None:
        lost: list[str] = []
        real = bench.backend.commit

        async def commit(work: Sequence[Commit]) -> Any:
            kinds = [a.events[0].type for c in work for a in c.appends]
            fresh = [kind for kind in kinds if kind not in lost]
            lost.extend(fresh)
            if fresh and not applied:
                raise ConnectionError("no answer")
            answer = await real(work)
            if fresh:
                raise ConnectionError("no answer")
            return answer

        bench.backend.commit = commit
        posted: list[str] = []

        async def post(*, idempotency_key: str) -> None:
            posted.append(idempotency_key)

        async def load(event: Event, ctx: Context) -> None:
            await ctx.step("post", post)

        report = await bench.run(lane_of(load, units=[Thing(n=n) for n in range(3)]))
        assert {"lane.triggered", "thing", "attempt.started", "step.done", "unit.settled"} <= {*lost, "thing"}
        assert (report.outcome, report.units["found"], report.units["settled"]) == ("settled", 3, 3)
        assert sorted(posted) == [f"toy/thing/{n}#0/post" for n in range(3)]

    simulate(scenario)


@virtual
async def test_a_run_completes_though_every_queue_is_purged_in_the_middle(bench: Bench) -> None:
    purged = 0

    async def load(event: Event, ctx: Context) -> None:
        nonlocal purged
        if event.data.n % 5 == 0 and purged < 3:
            purged += 1
            await bench.backend.purge()
        await asyncio.sleep(1)

    report = await bench.run(lane_of(load, units=[Thing(n=n) for n in range(20)]))
    assert purged == 3
    assert (report.outcome, report.units["settled"]) == ("settled", 20)


# --------------------------------------------------------------------------- fan-out, facts, notices


class House(Unit, key="street"):
    """The first level."""

    street: str


class Room(Unit, key=("street", "floor")):
    """The second level."""

    street: str
    floor: int


def building(floors: int, things: int) -> tuple[Lane, list[int]]:
    lane = Lane("toy", policy=QUICK)
    seen: list[int] = []

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for street in ("a", "b"):
            yield House(street=street)

    @lane.stage(on=House)
    async def enter(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for floor in range(floors):
            yield Room(street=event.data.street, floor=floor)

    @lane.stage(on=Room)
    async def search(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        base = (event.data.street == "b") * 10_000 + event.data.floor * 100
        for n in range(things):
            yield Thing(n=base + n)

    @lane.stage(on=Thing)
    async def take(event: Event, ctx: Context) -> None:
        seen.append(event.data.n)

    return lane, seen


@virtual
async def test_units_found_by_units_count_in_the_run(bench: Bench) -> None:
    lane, seen = building(3, 4)
    report = await bench.run(lane)
    assert report.outcome == "settled"
    found = {stage["stage"]: stage["units"]["found"] for stage in report.stages}
    assert found.pop("find") == 0, "the run is no unit of itself"
    assert found == {"enter": 2, "search": 6, "take": 24}
    assert len(set(seen)) == len(seen) == 24
    children = [e async for e in bench.backend.scan("toy") if e.type == "thing"]
    causes = {e.id for e in [e async for e in bench.backend.scan("toy")] if e.type == "room"}
    assert {e.cause for e in children} == causes


@virtual
async def test_a_large_discovery_is_committed_in_chunks(bench: Bench) -> None:
    groups: list[int] = []
    real = bench.backend.commit

    async def commit(work: Sequence[Commit]) -> Any:
        groups.extend(sum(a.events[0].type == "thing" for a in c.appends) for c in work)
        return await real(work)

    bench.backend.commit = commit
    units = [Thing(n=n) for n in range(200)]
    report = await bench.run(lane_of(units=[*units, *units[:10]]))
    assert (report.units["found"], report.units["settled"]) == (200, 200)
    assert sum(n > 0 for n in groups) >= 4
    assert max(groups) <= 64
    progressed = [e for e in await bench.stream(report.run) if e.type == "discovery.progress"]
    assert [progress(e).children for e in progressed[:3]] == [64, 128, 192]


@virtual
async def test_what_is_known_already_is_left_out_of_its_chunk(bench: Bench) -> None:
    assert (await bench.run(lane_of(units=[Thing(n=n) for n in range(0, 150, 3)]), "1")).units["found"] == 50
    report = await bench.run(lane_of(units=[Thing(n=n) for n in range(150)]), "2")
    assert (report.outcome, report.units["found"], report.units["settled"]) == ("settled", 100, 100)
    assert (await bench.state(report.run))[1].children == 100
    again = await bench.run(lane_of(units=[Thing(n=n) for n in range(150)]), "3")
    assert (again.outcome, again.units["found"]) == ("settled", 0)


@virtual
async def test_a_discovery_that_finds_nothing_settles(bench: Bench) -> None:
    report = await bench.run(lane_of(units=[]))
    assert (report.outcome, report.units["found"]) == ("settled", 0)


@virtual
async def test_a_slot_is_run_once(bench: Bench) -> None:
    calls = 0

    async def load(event: Event, ctx: Context) -> None:
        nonlocal calls
        calls += 1

    lane = lane_of(load)
    one, two = await bench.run(lane, "noon"), await bench.run(lane, "noon")
    assert one.run == two.run == "toy/run/noon"
    assert calls == 1
    assert (await bench.types("toy/run/noon")).count("lane.triggered") == 1


class Mark(Fact, type="mark"):
    """The state of the lane itself."""

    total: int = 0


class Shelf(Fact, key="name", type="shelf"):
    """One of several facts, with a field that has no default."""

    name: str
    content: list[int]


def counting_lane(before: Callable[[], Awaitable[None]] | None = None) -> Lane:
    lane = Lane("toy", policy=QUICK)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        mark = await ctx.recall(Mark) or Mark()
        if before is not None:
            await before()
        yield Thing(n=mark.total)
        yield Mark(total=mark.total + 1)
        yield Thing(n=100 + mark.total)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None: ...

    return lane


@virtual
async def test_a_fact_is_remembered_from_run_to_run(bench: Bench) -> None:
    for n in range(3):
        await bench.run(counting_lane(), str(n))
    marks = await bench.stream("toy/mark")
    assert [e.version for e in marks] == [1, 2, 3]
    assert [msgspec.json.decode(e.data)["total"] for e in marks] == [1, 2, 3]
    assert [bool(e.stage) for e in marks] == [False] * 3, "nobody is owed a fact"


@virtual
async def test_a_fact_overtaken_by_another_is_decided_anew(bench: Bench) -> None:
    rival = counting_lane()
    overtaken = False

    async def before() -> None:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            await bench.run(rival, "rival", sound=False)

    await bench.run(counting_lane(before), "slow")
    marks = await bench.stream("toy/mark")
    assert [msgspec.json.decode(e.data)["total"] for e in marks] == [1, 2]
    assert [e.run for e in marks] == ["toy/run/rival", "toy/run/slow"]
    things = sorted([e.subject async for e in bench.backend.scan("toy") if e.type == "thing"])
    assert things == ["toy/thing/0", "toy/thing/1", "toy/thing/100", "toy/thing/101"]


@virtual
async def test_facts_with_a_key_are_kept_apart(bench: Bench) -> None:
    lane = Lane("toy", policy=QUICK)
    recalled: list[Any] = []

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        recalled.append(await ctx.recall(Shelf, name="upper"))
        yield Shelf(name="upper", content=[len(recalled)])
        yield Shelf(name="lower", content=[])

    report = await bench.run(lane, "1")
    assert report.outcome == "settled", report.reason
    await bench.run(lane, "2")
    assert recalled == [None, Shelf(name="upper", content=[1])]
    assert len(await bench.stream("toy/shelf/upper")) == 2


@pytest.mark.parametrize("key", [{}, {"nme": "upper"}, {"name": "upper", "more": 1}])
def test_a_fact_recalled_by_a_wrong_key_is_dead_with_its_reason(key: dict[str, Any]) -> None:
    async def scenario(bench: Bench) -> None:
        lane = Lane("toy", policy=QUICK)

        @lane.stage(on=lane.triggered)
        async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
            await ctx.recall(Shelf, **key)
            yield Shelf(name="upper", content=[])

        reason = only(await bench.run(lane))
        assert "Shelf" in reason
        assert "name" in reason

    simulate(scenario)


def told_lane(load: Load, units: Iterable[Any]) -> tuple[Lane, list[tuple[str, Any]]]:
    lane = lane_of(load, units=units)
    told: list[tuple[str, Any]] = []

    @lane.stage(on=lane.completed)
    async def cheer(event: Event, ctx: Context) -> None:
        told.append(("completed", event.data))

    @lane.stage(on=lane.failed)
    async def moan(event: Event, ctx: Context) -> None:
        told.append(("failed", event.data))

    @lane.stage(on=lane.dead)
    async def mourn(event: Event, ctx: Context) -> None:
        told.append(("dead", event.data))

    return lane, told


@virtual
async def test_a_completed_run_is_told_of_once(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None: ...

    lane, told = told_lane(load, [Thing(n=n) for n in range(20)])
    report = await bench.run(lane)
    await bench.run(lane, "2")
    assert [kind for kind, _ in told] == ["completed", "completed"]
    notice = told[0][1]
    assert (notice.run, notice.round, notice.outcome) == (report.run, 0, "settled")
    assert notice.report["units"] == report.units


@virtual
async def test_dead_units_and_failed_runs_are_told_of_once_a_round(bench: Bench) -> None:
    bad = {3, 4}

    async def load(event: Event, ctx: Context) -> None:
        if event.data.n in bad:
            raise Permanent(f"thing {event.data.n} is bad")

    lane, told = told_lane(load, [Thing(n=n) for n in range(6)])
    await bench.run(lane)
    assert Counter(kind for kind, _ in told) == {"dead": 2, "failed": 1}
    dead = next(data for kind, data in told if kind == "dead")
    assert (dead.unit, dead.round, dead.stage) == (f"toy/thing/{dead.unit[-1]}", 0, "load")
    assert "is bad" in dead.reason
    bad.remove(3)
    told.clear()
    async with bench.app(lane) as app:
        assert len(await redrive(app.engine, "toy")) == 2
        await run_once(app, lane, slot="2")
    assert Counter(kind for kind, _ in told) == {"dead": 1, "failed": 1, "completed": 1}
    assert {data.round for kind, data in told if kind in ("dead", "failed")} == {1}
    bad.clear()
    told.clear()
    async with bench.app(lane) as app:
        assert await redrive(app.engine, "toy", ["toy/thing/4"]) == ["toy/thing/4"]
        await run_once(app, lane, slot="3")
        assert await check(bench.backend, lane) == []
    assert Counter(kind for kind, _ in told) == {"completed": 2}
    assert (await bench.state("toy/run/1"))[0] == "settled"
    assert (await bench.state("toy/run/1"))[1].completed == [0, 1, 2]


@virtual
async def test_a_notice_that_fails_is_dead_and_no_failure_of_its_run(bench: Bench) -> None:
    async def load(event: Event, ctx: Context) -> None: ...

    lane = lane_of(load)

    @lane.stage(on=lane.completed)
    async def tell(event: Event, ctx: Context) -> None:
        raise Permanent("nobody listens")

    report = await bench.run(lane)
    assert report.outcome == "settled"
    assert [d["reason"] for d in report.dead] == ["nobody listens"]


@virtual
async def test_the_traceparent_of_the_trigger_is_on_everything_it_caused(bench: Bench) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def load(event: Event, ctx: Context) -> None: ...

    lane, _ = told_lane(load, [Thing(n=1)])
    async with bench.app(lane) as app:
        await run_once(app, lane, slot="1", event={"id": "outer-1", "traceparent": trace})
    log = [e async for e in bench.backend.scan("toy")]
    assert {e.traceparent for e in log} == {trace}
    assert log[0].cause == "outer-1"
    known = {e.id for e in log}
    assert all(e.cause in known for e in log[1:])


# --------------------------------------------------------------------------- odds and ends


@virtual
async def test_event_ids_are_unique_over_processes(bench: Bench) -> None:
    for n in range(5):
        await bench.run(lane_of(units=[Thing(n=n * 10 + m) for m in range(10)]), str(n))
    ids = [e.id async for e in bench.backend.scan("toy")]
    assert len(ids) == len(set(ids)) > 100


@virtual
async def test_an_engine_with_lanes_of_one_stage_type_keeps_them_apart(bench: Bench) -> None:
    lanes = []
    seen: list[tuple[str, str]] = []
    for name in ("one", "two"):
        lane = Lane(name, policy=QUICK)

        @lane.stage(on=lane.triggered)
        async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
            yield Thing(n=1)

        @lane.stage(on=Thing)
        async def load(event: Event, ctx: Context) -> None:
            seen.append((ctx.lane, ctx.unit))

        lanes.append(lane)
    with using(bench.world):
        async with open_application(
            lanes,
            Settings(backend="memory://"),
            clock=bench.clock,
            registry=bench.registry,
            backend=bench.backend,
        ) as app:
            for lane in lanes:
                assert (await run_once(app, lane, slot="1")).units["settled"] == 1
    assert sorted(seen) == [("one", "one/thing/1"), ("two", "two/thing/1")]


def test_the_scenarios_above_are_the_same_every_time() -> None:
    async def scenario(bench: Bench) -> list[tuple[str, str, str]]:
        lane, _ = building(3, 4)
        await bench.run(lane)
        return [(e.id, e.type, e.subject) async for e in bench.backend.scan("toy")]

    async def main(loop: VirtualLoop) -> list[tuple[str, str, str]]:
        return await scenario(Bench(loop))

    one, two, other = run(main, seed=1), run(main, seed=1), run(main, seed=2)
    assert one == two
    assert one != other
