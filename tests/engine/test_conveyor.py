"""Stages whose deliveries come through a channel: what ``test_order`` does not say; in virtual time."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest

from flowlane import ConfigError, Context, Event, Lane, Retryable, events
from flowlane.backends.common import CHANNEL_LEASE
from flowlane.backends.memory import MemoryBackend
from flowlane.conveyor import CONSUMER
from flowlane.deadline import Deadline
from flowlane.marks import Marks
from flowlane.parking import KEPT, parked_records
from flowlane.ports import ChannelBatch, ChannelRecord, Commit, Lag
from flowlane.pump import Pump
from flowlane.redrive import redrive
from flowlane.state import status
from flowlane.sweep import sweep
from flowlane.testing.clock import VirtualLoop, run
from flowlane.testing.faults import Process
from flowlane.testing.oracle import check
from flowlane.testing.units import append
from tests.engine.test_attempt import Forgetful
from tests.engine.test_engine import QUICK, Bench, Thing, simulate, virtual
from tests.engine.test_order import Change, changes, discover, named, ordered
from tests.simulation.lab import Lab

QUEUE = "toy/apply"


def channeled(handle: Any, names: Sequence[str], **policy: Any) -> tuple[Lane, list[Change]]:
    """See ``ordered``; by a channel."""
    return ordered(handle, changes(*names), via="channel", **policy)


def recording(into: list[str], seconds: float = 0.1) -> Callable[[Event, Context], Awaitable[None]]:
    """A handler that takes so long, and notes whom it has handled."""

    async def apply(event: Event, ctx: Context) -> None:
        await asyncio.sleep(seconds)
        into.append(named(event))

    return apply


async def lags(bench: Bench) -> list[Lag]:
    return list(await bench.backend.channel(QUEUE).lag(CONSUMER))


async def behind(bench: Bench) -> int:
    """How many records of the channel are not settled."""
    return sum([lag.records or 0 for lag in await lags(bench)])


async def pumping(app: Any, seconds: float) -> None:
    async with Pump(app.engine, Deadline()) as pump:
        await pump.until(asyncio.sleep(seconds))


# --------------------------------------------------------------------------- declaring


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"via": "channel"}, "an order key"),
        ({"via": "post", "order": "customer"}, "via='post'"),
    ],
)
def test_a_channel_needs_an_order_key(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Lane("toy").stage(on=Change, **more)


def test_what_the_lane_does_itself_goes_by_no_channel() -> None:
    lane = Lane("toy")
    for on in (lane.triggered, lane.completed, lane.dead):
        with pytest.raises(ConfigError, match="leave it out"):
            lane.stage(on=on, via="channel")


# --------------------------------------------------------------------------- positions and holds


@virtual
async def test_positions_follow_what_is_done(bench: Bench) -> None:
    done: list[str] = []
    lane, _ = channeled(recording(done), [f"{c}{n}" for n in range(50) for c in "abcd"])
    assert (await bench.run(lane)).outcome == "settled"
    assert len(done) == 200
    assert [(lag.records, lag.owner) for lag in await lags(bench)] == [(0, "")] * 4


@virtual
async def test_what_is_done_when_the_process_ends_does_not_come_again(bench: Bench) -> None:
    """The rest does, in its order, to whoever comes next: nothing has to run out before."""
    done: list[str] = []
    names = [f"a{n}" for n in range(9)]
    lane, _ = channeled(recording(done, 1.0), names)
    async with bench.app(lane) as app:
        await discover(app, "1")
        await pumping(app, 4.5)
    assert done == names[:5], "what was begun went on to its end"
    assert [(lag.position, lag.owner) for lag in await lags(bench)] == [(5, "")]
    began = bench.loop.time()
    async with bench.app(lane) as app:
        await pumping(app, 4.5)
    assert done == names
    assert bench.loop.time() - began < CHANNEL_LEASE


@virtual
async def test_a_hold_outlasts_what_its_records_wait_for(bench: Bench) -> None:
    """A long backoff, with nobody at work meanwhile; and a handler that takes longer than the hold."""
    begun: list[tuple[str, float]] = []

    async def apply(event: Event, ctx: Context) -> None:
        begun.append((named(event), bench.loop.time()))
        if len(begun) == 1:
            raise Retryable("later", delay=2 * CHANNEL_LEASE)
        await asyncio.sleep(2 * CHANNEL_LEASE)

    lane, _ = channeled(apply, ["a1"], timeout=1000.0, backoff_cap=100.0)
    async with bench.app(lane) as one, bench.app(lane) as other:
        await discover(one, "1")
        async with Pump(one.engine, Deadline(), only="apply"):
            await asyncio.sleep(1)
            async with Pump(other.engine, Deadline(), only="apply"):
                for _ in range(9):
                    (lag,) = await lags(bench)
                    assert lag.owner, "held all the time"
                    await asyncio.sleep(CHANNEL_LEASE / 3)
        assert [name for name, _ in begun] == ["a1", "a1"]
        assert begun[1][1] - begun[0][1] >= 2 * CHANNEL_LEASE


@virtual
async def test_a_batch_that_comes_while_there_is_no_room_is_held(bench: Bench) -> None:
    """It was asked for while there was; then what had waited for its retry took the last slot."""
    begun: list[str] = []

    async def apply(event: Event, ctx: Context) -> None:
        begun.append(named(event))
        if begun == ["a1"]:
            raise Retryable("later", delay=5.0)
        if begun == ["a1", "a1"]:
            await asyncio.sleep(4 * CHANNEL_LEASE)

    lane, found = channeled(apply, ["a1"], concurrency=1, timeout=1000.0)
    async with bench.app(lane) as app, Pump(app.engine, Deadline()):
        await app.engine.trigger("toy", "1")
        await asyncio.sleep(10)
        found[:] = changes("b1")
        await app.engine.trigger("toy", "2")
        await asyncio.sleep(1)
        for _ in range(9):
            assert [bool(lag.owner) for lag in await lags(bench)] == [True, True]
            await asyncio.sleep(CHANNEL_LEASE / 3)
        await asyncio.sleep(2 * CHANNEL_LEASE)
    assert begun == ["a1", "a1", "b1"]


@virtual
async def test_a_hold_that_is_lost_ends_what_is_at_work(bench: Bench) -> None:
    begun: list[tuple[str, str]] = []

    def handler(who: str) -> Any:
        async def apply(event: Event, ctx: Context) -> None:
            begun.append((who, named(event)))
            await ctx.step("one", asyncio.sleep, 60 if who == "slow" else 1)

        return apply

    slow, _ = channeled(handler("slow"), ["a1", "a2", "a3"], concurrency=1)
    fast, _ = channeled(handler("fast"), ["a1", "a2", "a3"], concurrency=1)
    async with bench.app(slow) as app, bench.app(fast) as other:
        await discover(app, "1")
        async with Pump(app.engine, Deadline(), only="apply"):
            await asyncio.sleep(1)
            async with Pump(other.engine, Deadline(), only="apply"):
                await bench.backend.channel(QUEUE).rewind(CONSUMER)
                await asyncio.sleep(9)
                # The one that lost it has begun nothing more of it, and its attempt does not go on.
                assert begun.count(("slow", "a1")) == 1
                assert ("slow", "a2") not in begun
                await asyncio.sleep(30)
        assert [name for who, name in begun if who == "fast"] == ["a1", "a2", "a3"]
    for n in (1, 2, 3):
        types = await bench.types(f"toy/change/a@{n}")
        assert types.count("unit.settled") == 1


@virtual
async def test_a_partition_that_is_lost_and_handed_out_again_is_worked_off_once(bench: Bench) -> None:
    """To the same process, before it could know of the loss."""
    begun: list[str] = []
    interrupted: list[str] = []

    async def apply(event: Event, ctx: Context) -> None:
        begun.append(named(event))
        try:
            await asyncio.sleep(2)
        except asyncio.CancelledError:
            interrupted.append(named(event))
            raise

    lane, _ = channeled(apply, ["a1", "a2", "a3"])
    async with bench.app(lane) as app:
        await discover(app, "1")
        async with Pump(app.engine, Deadline(), only="apply"):
            await asyncio.sleep(0.5)  # and not when its hold is renewed anyway
            await bench.backend.channel(QUEUE).rewind(CONSUMER)
            await asyncio.sleep(0.1)
            assert interrupted == ["a1"], "at once; when it is begun again, the order of tasks decides"
            await asyncio.sleep(30)
    assert begun == ["a1", "a1", "a2", "a3"]
    assert interrupted == ["a1"]


@virtual
async def test_no_more_partitions_are_held_than_there_is_room_for(bench: Bench) -> None:
    """What one process cannot get to is there for others."""
    begun: list[str] = []
    lane, _ = channeled(
        recording(begun, 10.0), [f"{c}{n}" for c in "abcdefgh" for n in range(3)], concurrency=1
    )
    async with bench.app(lane) as app, bench.app(lane) as other:
        await discover(app, "1")
        async with Pump(app.engine, Deadline(), only="apply"):
            await asyncio.sleep(5)
            assert len([lag for lag in await lags(bench) if lag.owner]) == 1
            async with Pump(other.engine, Deadline(), only="apply"):
                await asyncio.sleep(1)
                assert len([lag for lag in await lags(bench) if lag.owner]) == 2


@virtual
async def test_other_keys_go_on_while_one_waits(bench: Bench) -> None:
    done: list[str] = []

    async def apply(event: Event, ctx: Context) -> None:
        if named(event) == "a1" and ctx.attempts_left == QUICK.retries:
            raise Retryable("later", delay=20.0)
        done.append(named(event))

    lane, _ = channeled(apply, ["a1", "b1", "a2", "b2"], backoff_cap=100.0)
    async with bench.app(lane) as app:
        await discover(app, "1")
        await pumping(app, 10)
        assert done == ["b1", "b2"]
        await pumping(app, 40)
    assert done == ["b1", "b2", "a1", "a2"]


# --------------------------------------------------------------------------- what goes wrong on the way


class Flaky(MemoryBackend):
    """Its channels fail: the first `count` calls of `what`, with `error`."""

    def __init__(self, bench: Bench, what: str, count: int, error: Exception) -> None:
        super().__init__(bench.clock)
        self.what, self.left, self.error = what, count, error

    def fail(self, what: str) -> None:
        """Raise, if it is to."""
        if what == self.what and self.left:
            self.left -= 1
            raise self.error

    def channel(self, name: str) -> Any:
        return FlakyChannel(self, super().channel(name))


class FlakyChannel:
    def __init__(self, backend: Flaky, inner: Any) -> None:
        self.backend, self.inner = backend, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def consume(self, consumer: str, **more: Any) -> AsyncIterator[ChannelBatch]:
        batches = self.inner.consume(consumer, **more)
        try:
            async for batch in batches:
                self.backend.fail("consume")
                yield FlakyBatch(self.backend, batch)
        finally:
            await batches.aclose()


class FlakyBatch:
    def __init__(self, backend: Flaky, inner: ChannelBatch) -> None:
        self.backend, self.inner, self.records = backend, inner, inner.records

    async def settle(self, count: int | None = None) -> None:
        self.backend.fail("settle")
        await self.inner.settle(count)

    async def extend(self) -> bool:
        self.backend.fail("extend")
        return await self.inner.extend()


@pytest.mark.parametrize("what", ["consume", "settle", "extend"])
def test_a_channel_that_is_away_for_a_while_is_asked_again(what: str) -> None:
    async def scenario(bench: Bench) -> None:
        done: list[str] = []
        bench.backend = backend = Flaky(bench, what, 3, Retryable("away"))
        names = [f"{c}{n}" for n in range(4) for c in "ab"]
        lane, _ = channeled(recording(done, 8.0), names)
        async with bench.app(lane) as app:
            await app.engine.trigger("toy", "1")
            await pumping(app, 150)
        assert backend.left == 0
        assert set(done) == set(names)
        assert await behind(bench) == 0

    simulate(scenario)


@virtual
async def test_what_an_iteration_held_is_lost_with_it(bench: Bench) -> None:
    begun: list[str] = []

    async def apply(event: Event, ctx: Context) -> None:
        begun.append(named(event))
        await asyncio.sleep(9)

    bench.backend = backend = Flaky(bench, "consume", 0, Retryable("away"))
    lane, found = channeled(apply, ["a1"])
    async with bench.app(lane) as app:
        await discover(app, "1")
        async with Pump(app.engine, Deadline()):
            await asyncio.sleep(1)
            backend.left = 1
            found[:] = changes("b1")
            await app.engine.trigger("toy", "2")
            await asyncio.sleep(2)
            assert sorted(begun) == ["a1", "a1", "b1"], "another might have been handed it"
            await asyncio.sleep(30)
    assert sorted(begun) == ["a1", "a1", "b1"]


@virtual
async def test_a_channel_that_is_not_there_ends_the_process(bench: Bench) -> None:
    bench.backend = Flaky(bench, "consume", 1, ConfigError("there is no stream: make it"))
    lane, _ = channeled(recording([]), ["a1"])
    with pytest.raises(BaseExceptionGroup) as raised:
        await bench.run(lane)
    assert raised.group_contains(ConfigError, match="make it")


class Refusing(MemoryBackend):
    """A log that takes no commit of events of that type."""

    async def commit(self, work: Sequence[Commit]) -> Any:
        if any(event.type == "unit.settled" for c in work for a in c.appends for event in a.events):
            raise ConfigError("the log may not be written: allow it")
        return await super().commit(work)


@virtual
async def test_a_log_that_takes_no_commits_ends_a_process_that_has_channel_stages_only(bench: Bench) -> None:
    """Its units would come again for ever: nothing but the commits is refused."""
    lane, _ = channeled(recording([]), ["a1"])
    async with bench.app(lane) as app:
        await discover(app, "1")
    history = [event async for event in bench.backend.scan("toy")]
    bench.backend = Refusing(bench.clock)
    await MemoryBackend.commit(bench.backend, [Commit([append(event)]) for event in history])
    await bench.backend.channel(QUEUE).put(
        [ChannelRecord("a", events.encode(event)) for event in history if event.type == "change"]
    )
    async with bench.app(lane) as app:
        with pytest.raises(BaseExceptionGroup) as raised:
            async with asyncio.timeout(60), Pump(app.engine, Deadline(), only="apply") as pump:
                await pump.until(asyncio.sleep(1e6))
        assert raised.group_contains(ConfigError, match="allow it")


@pytest.mark.parametrize("what", ["settle", "extend"])
def test_a_channel_whose_holds_and_positions_are_refused_ends_the_process(what: str) -> None:
    async def scenario(bench: Bench) -> None:
        bench.backend = Flaky(bench, what, 1, ConfigError("it may not be written: allow it"))
        lane, _ = channeled(recording([], 3.0), ["a1", "a2"])
        async with bench.app(lane) as app:
            await app.engine.trigger("toy", "1")
            with pytest.raises(BaseExceptionGroup) as raised:
                await pumping(app, 600)
            assert raised.group_contains(ConfigError, match="allow it")

    simulate(scenario)


@pytest.mark.parametrize("calls", [1, 3, 8])
def test_a_record_that_was_left_since_the_log_was_away_comes_again(calls: int) -> None:
    """Nothing had been attempted, so nothing was decided of it; and nobody's lease runs out here."""

    async def scenario(bench: Bench) -> None:
        done: list[str] = []
        bench.backend = Forgetful(bench, events.ATTEMPT_STARTED, calls)
        lane, _ = channeled(recording(done), ["a1", "a2"])
        assert (await bench.run(lane)).outcome == "settled"
        assert done == ["a1", "a2"]

    simulate(scenario)


def test_a_unit_that_kills_its_process_each_time_is_dead_and_its_partition_goes_on() -> None:
    """Nobody counts how often a record is handed out; the log counts the attempts."""
    done: list[str] = []

    def lanes(process: Process) -> list[Lane]:
        async def apply(event: Event, ctx: Context) -> None:
            if named(event) == "a2":
                process.kill()
                await asyncio.sleep(1e6)
            done.append(named(event))

        return [channeled(apply, ["a1", "a2", "a3"])[0]]

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        assert await lab.until_done(lab.process(), lab.run(), again=lab.run()) == ""
        assert await lab.violations() == []
        assert status((await lab.memory.last(["toy/change/a@2"]))["toy/change/a@2"]) == "dead"
        assert done == ["a1", "a3"]

    run(main)


@virtual
async def test_an_attempt_is_logged_first_only_where_another_may_have_died_of_it(bench: Bench) -> None:
    lane, found = channeled(recording([]), [f"a{n}" for n in range(20)], concurrency=1)
    async with bench.app(lane) as app, Pump(app.engine, Deadline()) as pump:
        await app.engine.trigger("toy", "1")
        await pump.until(asyncio.sleep(5))
        found[:] = changes("a20", "a21")
        await app.engine.trigger("toy", "2")
        await pump.until(asyncio.sleep(5))
    assert events.ATTEMPT_STARTED in await bench.types("toy/change/a@0")
    assert await bench.types("toy/change/a@20") == ["change", "unit.settled"]


def test_a_zombie_of_a_partition_changes_nothing() -> None:
    """A process is stopped past its hold, in the middle of an effect; another one does its work."""
    begun: list[tuple[str, str]] = []

    def lanes(process: Process) -> list[Lane]:
        async def note(name: str) -> None:
            begun.append((process.name, name))
            await process.clock.sleep(5)

        async def apply(event: Event, ctx: Context) -> None:
            await ctx.step("one", note, named(event))
            await ctx.step("two", note, named(event))

        return [channeled(apply, ["a1", "a2"])[0]]

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        first, second = lab.process(), lab.process()
        first.start(lab.handle())
        await asyncio.sleep(2)
        assert begun == [(first.name, "a1")]
        freezing = loop.create_task(first.freeze(3 * CHANNEL_LEASE))
        second.start(lab.handle())
        assert await lab.until_empty("change/") == ""
        by_second = [name for who, name in begun if who == second.name]
        assert by_second == ["a1", "a1", "a2", "a2"]
        await freezing
        await asyncio.sleep(60)
        assert [name for who, name in begun if who == first.name] == ["a1"], "it did nothing more"
        (lag,) = await lab.memory.channel(QUEUE).lag(CONSUMER)
        assert (lag.position, lag.records) == (2, 0)
        for process in (first, second):
            process.kill()
        # The runs' own ends are theirs who come next.
        assert await lab.until_done(lab.process(), lab.run()) == ""
        assert await lab.violations() == []

    run(main)


# --------------------------------------------------------------------------- what is no event of the stage


def put(bench: Bench, data: bytes, key: str = "a") -> Awaitable[None]:
    answer: Awaitable[None] = bench.backend.channel(QUEUE).put([ChannelRecord(key, data)])
    return answer


async def stray(bench: Bench, app: Any, kind: str) -> bytes:
    """A record that the stage is not owed."""
    await discover(app, "1")
    first = await anext(bench.backend.read("toy/change/a@1"))
    if kind == "another lane":
        return events.encode(msgspec.structs.replace(first, source="other"))
    if kind in ("no name", "long name"):
        return events.encode(msgspec.structs.replace(first, subject="toy/" * 700 if kind[0] == "l" else ""))
    if kind == "unknown stream":
        return events.encode(msgspec.structs.replace(first, subject="toy/change/a@77"))
    if kind == "another stage":
        return events.encode(await anext(bench.backend.read("toy/thing/1")))
    return {"junk": b"\xff\x00junk", "nothing": b"", "json": b"[1, 2]"}[kind]


def with_another_stage(done: list[str]) -> Lane:
    """A lane that finds two changes and a thing, which nobody handles for now."""
    lane, found = channeled(recording(done), ["a1", "a2"])
    found.append(Thing(n=1))  # type: ignore[arg-type]  # of another stage

    @lane.stage(on=Thing)
    async def other(event: Event, ctx: Context) -> None:
        await asyncio.sleep(1e6)

    return lane


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("junk", "not a CloudEvents 1.0 event"),
        ("nothing", "not a CloudEvents 1.0 event"),
        ("json", "not a CloudEvents 1.0 event"),
        ("another lane", "of lane other"),
        ("unknown stream", "does not know the stream toy/change/a@77"),
        ("another stage", "owed to stage other"),
        ("no name", "is no stream of lane toy"),
        ("long name", "is no stream of lane toy"),
    ],
)
def test_a_record_that_is_no_event_of_the_stage_is_parked_and_the_partition_goes_on(
    kind: str, said: str
) -> None:
    class Particular(MemoryBackend):
        """As DynamoDB is about the names of streams."""

        async def last(self, streams: Sequence[str]) -> Any:
            assert all(0 < len(stream) <= 2048 for stream in streams)
            return await super().last(streams)

    async def scenario(bench: Bench) -> None:
        done: list[str] = []
        bench.backend = Particular(bench.clock)
        lane = with_another_stage(done)
        async with bench.app(lane) as app:
            await put(bench, await stray(bench, app, kind))
            await put(bench, b"junk behind it", "b")
            await pumping(app, 60)
            assert done == ["a1", "a2"]
            assert await behind(bench) == 0
            found = [(head, record) async for head, record in parked_records(bench.backend, "toy")]
            ((head, record),) = [(h, r) for h, r in found if r.key == "a"]
            assert len(found) == 2
            assert said in record.reason
            assert (record.channel, record.position) == (QUEUE, "3")
            assert head.subject == f"toy/parked:apply/{record.partition}@3"
            assert head.run == ""
            await bench.backend.channel(QUEUE).rewind(CONSUMER)
            await pumping(app, 60)
            assert len([each async for each in parked_records(bench.backend, "toy")]) == 2, "once each"

    simulate(scenario)


@virtual
async def test_what_is_parked_is_kept_as_far_as_an_event_can(bench: Bench) -> None:
    data = bytes(range(256)) * 4000
    lane, _ = channeled(recording([]), [])
    async with bench.app(lane) as app:
        await put(bench, data)
        await pumping(app, 5)
    ((_, record),) = [each async for each in parked_records(bench.backend, "toy")]
    assert (record.bytes, base64.b64decode(record.data)) == (len(data), data[:KEPT])


@virtual
async def test_a_stream_that_the_log_knows_late_is_no_reason_to_park(bench: Bench) -> None:
    done: list[str] = []
    lane, _ = channeled(recording(done), ["a1"], retries=50)  # chance may have it that they come at once
    other = Bench(bench.loop)
    async with other.app(lane) as app:
        await discover(app, "1")
    history = [event async for event in other.backend.scan("toy")]
    async with bench.app(lane) as app, Pump(app.engine, Deadline(), only="apply"):
        await put(bench, events.encode(next(event for event in history if event.type == "change")))
        await asyncio.sleep(0.5)
        streams: dict[str, list[Event]] = {}
        for event in history:
            streams.setdefault(event.subject, []).append(event)
        await bench.backend.commit([Commit([append(*stream) for stream in streams.values()])])
        await asyncio.sleep(30)
        assert done == ["a1"]
        assert [each async for each in parked_records(bench.backend, "toy")] == []


@virtual
async def test_while_the_log_is_away_nothing_is_parked(bench: Bench) -> None:
    class Away(MemoryBackend):
        away = False

        async def last(self, streams: Sequence[str]) -> Any:
            if self.away:
                raise Retryable("away")
            return await super().last(streams)

    bench.backend = backend = Away(bench.clock)
    done: list[str] = []
    lane, _ = channeled(recording(done), ["a1"])
    async with bench.app(lane) as app:
        await discover(app, "1")
        backend.away = True
        async with Pump(app.engine, Deadline()):
            await asyncio.sleep(600)
            backend.away = False
            await asyncio.sleep(60)
    assert done == ["a1"]
    assert [each async for each in parked_records(bench.backend, "toy")] == []


@virtual
async def test_what_is_parked_is_no_unit_to_redrive_and_none_of_a_run(bench: Bench) -> None:
    lane, _ = channeled(recording([]), ["a1"])
    await put(bench, b"junk", "zz")
    report = await bench.run(lane)
    assert (report.outcome, report.units["dead"]) == ("settled", 0)
    ((head, _),) = [each async for each in parked_records(bench.backend, "toy")]
    async with bench.app(lane) as app:
        assert await redrive(app.engine, "toy") == []
        with pytest.raises(ConfigError, match="was passed over, and no unit"):
            await redrive(app.engine, "toy", [head.subject])
        assert await check(bench.backend, lane) == []


# --------------------------------------------------------------------------- what the channel has lost


@virtual
async def test_a_unit_whose_record_was_lost_is_put_again(bench: Bench) -> None:
    done: list[str] = []
    lane, _ = channeled(recording(done), ["a1", "a2", "b1"])
    async with bench.app(lane) as app:
        await discover(app, "1")
        async for batch in bench.backend.channel(QUEUE).consume(CONSUMER):
            await batch.settle()  # by nobody that would do anything about it
        assert (await sweep(app.engine, "toy")).requeued == 0, "it may be at work"
        await asyncio.sleep(float(QUICK.timeout) + 200)
        assert (await sweep(app.engine, "toy")).requeued == 3
        await pumping(app, 5)
    assert sorted(done) == ["a1", "a2", "b1"]
    assert (await bench.run(lane)).units["settled"] == 3


@virtual
async def test_what_waits_in_the_channel_is_not_put_again_however_long(bench: Bench) -> None:
    """A sweep would double it each time: the channel does not know what it holds, but how far it is."""
    lane, found = channeled(recording([]), [f"{c}{n}" for c in "abc" for n in range(9)])
    async with bench.app(lane) as app:
        await discover(app, "1")
        for _ in range(30):
            await asyncio.sleep(400)
            assert (await sweep(app.engine, "toy", thorough=True)).requeued == 0
        assert await behind(bench) == 27
        # Of three partitions one is not passed: it might be in that one.
        batches = bench.backend.channel(QUEUE).consume(CONSUMER)
        for _ in range(2):
            await (await anext(batches)).settle()
        assert (await sweep(app.engine, "toy")).requeued == 0
        await (await anext(batches)).settle()
        await batches.aclose()
        # And behind what is put meanwhile, the old ones are known to be gone all the same.
        found[:] = changes("a50", "b50")
        await discover(app, "2")
        assert (await sweep(app.engine, "toy")).requeued == 27


@virtual
async def test_units_that_the_queue_has_move_to_the_channel(bench: Bench) -> None:
    """The stage was one with a queue when they were found."""
    done: list[str] = []
    before, _ = ordered(recording(done), changes("a1", "a2"))
    async with bench.app(before) as app:
        await discover(app, "1")
    lane, _ = channeled(recording(done), ["a1", "a2"])
    async with bench.app(lane) as app:
        await asyncio.sleep(float(QUICK.timeout) + 200)
        await sweep(app.engine, "toy")
        await pumping(app, 5)
    assert sorted(done) == ["a1", "a2"]


def marked(*ends: tuple[int, int]) -> list[Lag]:
    """Partitions by their position and the records behind it."""
    return [Lag(n, "", position, left) for n, (position, left) in enumerate(ends)]


def test_marks_tell_what_is_passed() -> None:
    marks = Marks()
    assert marks.passed(marked((0, 5), (0, 5)), 100) == 0
    assert marks.passed(marked((5, 0), (4, 3)), 200) == 0
    assert marks.passed(marked((5, 9), (5, 9)), 300) == 100
    assert marks.passed(marked((5, 9), (7, 9)), 400) == 200
    assert marks.passed(marked((5, 9), (7, 9), (0, 2)), 500) == 200, "a partition that is new"
    assert marks.passed(marked((14, 0), (16, 0), (0, 2)), 600) == 400
    assert marks.passed(marked((14, 0), (16, 0), (2, 0)), 700) == 700
    assert marks.passed([], 800) == 800, "nobody has put anything"


def test_marks_do_without_how_much_there_is() -> None:
    marks = Marks()
    assert marks.passed([Lag(0, seconds=40.0), Lag(1, seconds=0.0)], 100) == 60
    assert marks.passed([Lag(0, seconds=None), Lag(1, seconds=5.0)], 100) == 100
    assert marks.passed([Lag(0, seconds=None, ended=True), Lag(1, seconds=5.0)], 100) == 95


def test_marks_are_few_however_long_it_takes() -> None:
    marks = Marks()
    for n in range(3_000):
        assert marks.passed(marked((0, n + 1)), float(n)) == 0
    assert len(marks._marks) < 900
    assert marks.passed(marked((2700, 300)), 1e6) > 2670
