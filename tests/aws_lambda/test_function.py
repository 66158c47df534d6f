"""The function in this process, on a memory backend: what it answers, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlane import ConfigError, Context, Event, Lane, Permanent, Retryable, Unit
from flowlane.aws_lambda import handler_for
from flowlane.aws_lambda.function import Function, lane_of_environment, margin_of
from flowlane.backends.memory import MemoryBackend
from flowlane.clock import SystemClock
from flowlane.events import Event as Envelope
from flowlane.events import encode
from flowlane.lane import Policy
from tests.aws_lambda.toys import (
    QUICK,
    PushedClock,
    Remaining,
    Thing,
    failed,
    function,
    kinesis,
    order,
    sqs,
    toy,
)

LONG = Remaining(900)


def test_good_and_bad_messages_in_one_batch(caplog: pytest.LogCaptureFixture) -> None:
    handled: list[tuple[str, int]] = []

    async def load(event: Event, ctx: Context) -> None:
        handled.append((event.data.order, event.data.n))

    with function(toy(load)) as call:
        answer = call(
            sqs(order("a", 2), "Test message.", order("b"), {"message": "foo1"}, order("c", 0)), LONG
        )
    assert failed(answer) == ["m1", "m3"]
    assert sorted(handled) == [("a", 0), ("a", 1), ("b", 0)]
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["message"], line["lane"], line["source"]) for line in lines] == [
        ("m1", "toy", "standard"),
        ("m3", "toy", "standard"),
    ]
    assert "not JSON" in lines[0]["reason"]
    assert "no CloudEvent" in lines[1]["reason"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), max_size=8), st.data())
def test_exactly_what_failed_comes_again(good: list[bool], data: st.DataObject) -> None:
    bodies = [order(f"o{n}") if fine else "nonsense" for n, fine in enumerate(good)]
    groups = "".join(data.draw(st.sampled_from("abc")) for _ in good)
    bad = [n for n, fine in enumerate(good) if not fine]
    with function(toy()) as call:
        assert failed(call(sqs(*bodies), LONG)) == [f"m{n}" for n in bad]
        tail = [n for n, group in enumerate(groups) if any(groups[k] == group and k <= n for k in bad)]
        assert failed(call(sqs(*bodies, groups=groups), LONG)) == [f"m{n}" for n in tail]
        assert failed(call(kinesis(*bodies, keys=groups), LONG)) == [str(99 + n) for n in bad[:1]]


def test_messages_of_a_group_are_handled_one_after_the_other() -> None:
    handled: list[str] = []

    async def load(event: Event, ctx: Context) -> None:
        handled.append(f"{event.data.order} begins")
        await asyncio.sleep(0)
        handled.append(f"{event.data.order} ends")

    for event in (sqs(*map(order, "abc"), groups="ggg"), kinesis(*map(order, "abc"))):
        handled.clear()
        with function(toy(load)) as call:
            assert failed(call(event, LONG)) == []
        assert handled == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]


def test_nothing_of_a_group_is_begun_after_its_failure() -> None:
    handled: list[str] = []

    async def load(event: Event, ctx: Context) -> None:
        handled.append(event.data.order)

    with function(toy(load)) as call:
        answer = call(sqs(order("a"), "bad", order("c"), order("d"), groups="gggh"), LONG)
        assert failed(answer) == ["m1", "m2"]
        assert sorted(handled) == ["a", "d"]


def test_what_a_stream_delivers_again_anyway_is_not_begun() -> None:
    handled: list[str] = []

    async def load(event: Event, ctx: Context) -> None:
        handled.append(event.data.order)

    with function(toy(load)) as call:
        assert failed(call(kinesis("bad", order("b"), keys="ab"), LONG)) == ["99"]
        assert handled == [], "it is of another key, and behind the failure"


def test_a_message_that_comes_again_opens_no_second_run() -> None:
    handled: list[str] = []

    async def load(event: Event, ctx: Context) -> None:
        handled.append(event.data.order)

    with function(toy(load)) as call:
        for _ in range(3):
            assert failed(call(sqs(order("a"), order("a")), LONG)) == []
    assert handled == ["a"]


def test_a_dead_unit_is_no_failure_of_its_message() -> None:
    async def load(event: Event, ctx: Context) -> None:
        raise Permanent("never")

    with function(toy(load)) as call:
        assert failed(call(sqs(order("a")), LONG)) == []
        report = call(order("a"), LONG)
    assert (report["run"], report["outcome"], report["units"]["dead"]) == ("toy/run/shop,a", "failed", 1)
    assert report["dead"] == [{"unit": "toy/thing/a@0", "reason": "never"}]


def test_retries_are_waited_for() -> None:
    tries: list[int] = []

    async def load(event: Event, ctx: Context) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("not yet")

    with function(toy(load)) as call:
        assert failed(call(sqs(order("a")), LONG)) == []
    assert len(tries) == 3


def test_stages_find_the_outer_event() -> None:
    seen: list[Any] = []
    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        seen.append((event.data.slot, event.data.by, event.data.event, event.cause, event.traceparent))

    outer = {**order("a"), "traceparent": "00-1-2-01", "extra": [1]}
    with function(lane) as call:
        call(outer, LONG)
    assert seen == [("shop,a", "event", outer, "a", "00-1-2-01")]


def test_one_loop_and_nothing_left_running_over_a_hundred_invocations() -> None:
    loops: set[int] = set()
    opened: list[asyncio.Lock] = []  # stands for a client: bound to the loop that first had to wait on it
    left: list[int] = []

    async def load(event: Event, ctx: Context) -> None:
        loops.add(id(asyncio.get_running_loop()))
        if not opened:
            opened.append(asyncio.Lock())
        async with opened[0]:
            await asyncio.sleep(0)

    with function(toy(load)) as call:
        for n in range(120):
            assert failed(call(sqs(order(f"{n}a", 3), "bad", order(f"{n}b", 3)), LONG)) == ["m1"]
            assert call._runner is not None
            left.append(len(asyncio.all_tasks(call._runner.get_loop())))
    assert len(loops) == 1
    assert set(left) == {1}, "the application's keeper alone, which waits for the end of the process"


def test_what_a_stage_left_running_is_cancelled() -> None:
    ends: list[str] = []
    strays: list[asyncio.Task[None]] = []

    async def stray() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async def load(event: Event, ctx: Context) -> None:
        strays.append(asyncio.create_task(stray()))
        await asyncio.sleep(0)

    with function(toy(load)) as call:
        call(sqs(order("a")), LONG)
        assert ends == ["cancelled"]


# --------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize(
    ("seconds", "margin"), [(900, 10), (100, 10), (60, 6), (30, 3), (10, 1), (3, 1), (1, 0.5), (0, 0)]
)
def test_the_margin(seconds: float, margin: float) -> None:
    assert margin_of(seconds) == margin


@pytest.mark.parametrize("seconds", [0, -5])
def test_an_expired_invocation_begins_nothing(seconds: float) -> None:
    handled: list[str] = []

    async def load(event: Event, ctx: Context) -> None:
        handled.append(event.data.order)

    with function(toy(load)) as call:
        assert failed(call(sqs(order("a"), order("b")), Remaining(seconds))) == ["m0", "m1"]
        assert failed(call(kinesis(order("a"), order("b")), Remaining(seconds))) == ["99"]
        with pytest.raises(Retryable, match="nothing was begun"):
            call(order("a"), Remaining(seconds))
        assert handled == []


def test_discovery_stops_at_the_deadline_and_goes_on_with_the_message() -> None:
    clock = PushedClock()
    lane = Lane("toy", policy=QUICK)
    handled: list[int] = []

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in range(4):
            if n == 2 and not clock.pushed:
                clock.pushed += 55
            yield Thing(order="x", n=n)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        handled.append(event.data.n)

    with function(lane, clock=clock) as call:
        assert failed(call(sqs(order("a")), Remaining(60))) == ["m0"]
        assert handled == [], "what was found is registered, and begun by the next invocation"
        assert failed(call(sqs(order("a")), Remaining(60))) == []
        assert sorted(handled) == [0, 1, 2, 3]


def test_an_attempt_is_cut_off_and_goes_on_where_it_was() -> None:
    clock = PushedClock()
    done: list[int] = []
    cut: list[bool] = []
    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield Thing(order="x", n=0)

    async def work(n: int) -> int:
        if n == 2 and not cut:
            cut.append(True)
            clock.pushed += 58
            await asyncio.Event().wait()
        done.append(n)
        return n

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        for n in range(4):
            await ctx.step(f"work-{n}", work, n)

    with function(lane, clock=clock) as call:
        answer = call(sqs(order("a"), order("b"), groups="gg"), Remaining(60))
        assert failed(answer) == ["m0", "m1"]
        assert done == [0, 1]
        with pytest.raises(Retryable, match="nothing was begun"):
            call(order("a"), Remaining(0))
        report = call(order("a"), Remaining(60))
        assert done == [0, 1, 2, 3]
    assert report["outcome"] == "settled"


def test_an_unfinished_direct_invocation_says_how_to_go_on() -> None:
    clock = PushedClock()
    lane = Lane("toy", policy=QUICK)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        if not clock.pushed:
            clock.pushed += 55
        yield Thing(order="x", n=0)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None: ...

    with function(lane, clock=clock) as call:
        with pytest.raises(Retryable, match=r"toy/run/shop,a is not finished: send the same event again"):
            call(order("a"), Remaining(60))
        assert call(order("a"), Remaining(60))["outcome"] == "settled"


def test_the_margin_can_be_set() -> None:
    clock = PushedClock()
    near: list[bool] = []

    async def load(event: Event, ctx: Any) -> None:
        near.append(ctx.near_deadline())
        clock.pushed += 15
        near.append(ctx.near_deadline())

    with function(toy(load), clock=clock, margin="50s") as call:
        assert failed(call(sqs(order("a")), Remaining(60))) == []
    assert near == [False, True]
    with pytest.raises(ConfigError, match="not a duration"):
        handler_for(toy(), margin="soon")


def test_no_context_is_no_deadline() -> None:
    with function(toy()) as call:
        assert failed(call(sqs(order("a")), None)) == []


# --------------------------------------------------------------------------- direct invocations


@pytest.mark.parametrize(("source", "detail"), [("aws.events", {}), ("aws.scheduler", "{}")])
def test_a_schedule_opens_the_run_of_its_slot_once(source: str, detail: Any) -> None:
    slots: list[tuple[str, str]] = []
    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        slots.append((event.data.slot, event.data.by))

    tick = {
        "version": "0", "id": "i", "detail-type": "Scheduled Event", "source": source, "account": "1",
        "time": "2024-05-01T12:00:00Z", "region": "r", "resources": ["arn"], "detail": detail,
    }  # fmt: skip
    with function(lane) as call:
        reports = [call(tick, LONG), call({**tick, "id": "another"}, LONG)]
        assert failed(call(sqs(tick), LONG)) == []
    assert slots == [("2024-05-01T12:00:00Z", "schedule")]
    assert [report["run"] for report in reports] == ["toy/run/2024-05-01T12:00:00Z"] * 2


def test_a_direct_invocation_also_drains_what_is_left_open() -> None:
    clock = PushedClock()
    handled: list[str] = []
    lane = Lane("toy", policy=QUICK)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        if not clock.pushed:
            clock.pushed += 55
        yield Thing(order=event.data.event["id"], n=0)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        handled.append(event.data.order)

    with function(lane, clock=clock) as call:
        assert failed(call(sqs(order("left")), Remaining(60))) == ["m0"]
        call(order("new"), Remaining(60))
    assert sorted(handled) == ["left", "new"]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({}, "no CloudEvent"),
        ([], "a JSON array"),
        ("x", "a JSON string"),
        ({"Records": [{"eventSource": "aws:s3"}]}, "record 0 has neither an 's3' nor an 'Sns' object"),
        ({"Records": [{"eventSource": "aws:cloudfront"}]}, "unknown source"),
        ({"detail-type": "EC2 Instance State-change Notification", "source": "aws.ec2"}, "without 'id'"),
        ({"httpMethod": "GET"}, "an HTTP request .* is not served"),
        ({"awslogs": {"data": ""}}, "a CloudWatch Logs subscription .* is not served"),
    ],
)
def test_unknown_events_are_one_line_errors(event: Any, words: str) -> None:
    with function(toy()) as call:
        with pytest.raises(Permanent, match=words) as caught:
            call(event, LONG)
        assert "\n" not in str(caught.value)
        assert failed(call(sqs(order("a")), LONG)) == []


# --------------------------------------------------------------------------- the lane's own events


def test_an_event_of_the_lane_is_drained_and_one_that_the_log_does_not_know_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with function(toy()) as call:
        call(order("a"), LONG)

        def own(subject: str, type: str = "thing", source: str = "toy") -> str:
            return encode(Envelope("e", source, type, subject, "2024-01-01T00:00:00Z", {}, 1)).decode()

        assert failed(call(sqs(own("toy/thing/a@0"), own("toy/run/shop,a", "lane.triggered")), LONG)) == []
        assert failed(call(sqs(own("toy/thing/other"), own("elsewhere/thing/a@0")), LONG)) == ["m0", "m1"]
        assert "the log does not know toy/thing/other" in caplog.text
        assert failed(call(sqs(own("toy/run/9", "lane.triggered")), LONG)) == []
        report = call(json.loads(own("toy/thing/a@0")), LONG)
    assert report["run"] == "toy/run/shop,a"


def test_a_run_whose_stage_is_gone_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    backend = MemoryBackend(SystemClock())
    clock = PushedClock()

    async def cut(event: Event, ctx: Context) -> None:
        clock.pushed += 60
        raise OSError("not yet")

    hours = Policy(backoff="9h", backoff_cap="9h")
    with function(toy(cut, policy=hours), backend=backend, clock=clock) as call:
        assert failed(call(sqs(order("a")), Remaining(60))) == ["m0"]
    later = toy()
    del later.stages[1:]
    with function(later, backend=backend) as call:
        assert failed(call(sqs(order("a")), LONG)) == ["m0"]
        assert "wait for a stage that lane toy does not have" in caplog.text
        with pytest.raises(Permanent, match="wait for a stage"):
            call(order("a"), LONG)
        assert call(order("b", 0), LONG)["outcome"] == "settled"


def test_facts_are_owed_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    from flowlane import Fact

    class Mark(Fact, type="mark"):
        at: int

    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield Mark(at=1)

    with function(lane) as call:
        call(order("a"), LONG)
        body = encode(Envelope("e", "toy", "mark", "toy/mark", "2024-01-01T00:00:00Z", {}, 1)).decode()
        assert failed(call(sqs(body), LONG)) == ["m0"]
    assert "no stage of lane toy is owed the events of toy/mark" in caplog.text


def test_an_event_too_long_for_the_log_is_its_messages_failure(caplog: pytest.LogCaptureFixture) -> None:
    with function(toy()) as call:
        assert failed(call(sqs(order("big", text="x" * 600_000), order("b")), LONG)) == ["m0"]
    assert "limit" in caplog.text
    assert "xxxx" not in caplog.text


# --------------------------------------------------------------------------- opening


def test_opening_is_tried_again_after_a_wrong_configuration() -> None:
    environment = {"FLOWLANE_BACKEND": "nosuch://"}
    finds: list[int] = []

    def find(settings: Any) -> Lane:
        finds.append(1)
        return toy()

    with Function(find, environment=environment) as call:
        with pytest.raises(ConfigError, match="nosuch"):
            call(sqs(order("a")), LONG)
        with pytest.raises(ConfigError, match="nosuch"):
            call(order("a"), LONG)
        environment["FLOWLANE_BACKEND"] = "memory://"
        assert failed(call(sqs(order("a")), LONG)) == []
        call(order("b"), LONG)
    assert len(finds) == 3


def test_the_environment_has_to_name_a_lane() -> None:
    with (
        Function(lane_of_environment, environment={}) as call,
        pytest.raises(ConfigError, match="FLOWLANE_LANE"),
    ):
        call(order("a"), LONG)


def test_a_stage_that_the_lane_does_not_have_is_refused_at_once() -> None:
    environment = {"FLOWLANE_BACKEND": "memory://", "FLOWLANE_STAGE": "lode"}
    with Function(lambda settings: toy(), environment=environment) as call:
        with pytest.raises(
            ConfigError, match="FLOWLANE_STAGE='lode': lane toy has no such stage; there are "
        ):
            call(sqs(order("a")), Remaining(30))
        del environment["FLOWLANE_STAGE"]
        assert failed(call(sqs(order("a")), LONG)) == []


def test_making_a_handler_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(asyncio, "Runner", refuse)
    monkeypatch.setattr("flowlane.compose.open_application", refuse)
    handler = handler_for(toy())
    assert callable(handler)
    assert not asyncio.iscoroutinefunction(handler)


def test_the_log_level_is_the_settings() -> None:
    before = logging.getLogger("flowlane").level
    try:
        environment = {"FLOWLANE_BACKEND": "memory://", "FLOWLANE_LOG_LEVEL": "error"}
        with function(toy(), environment=environment) as call:
            call(order("a"), LONG)
        assert logging.getLogger("flowlane").level == logging.ERROR
    finally:
        logging.getLogger("flowlane").setLevel(before)
