"""Every event source through the function itself: which runs it opens, what it answers, what may go wrong."""

from __future__ import annotations

import asyncio
import json
from copy import deepcopy
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlane import Context, Event, FlowlaneError, Lane, Permanent, Policy, Retryable
from flowlane.aws_lambda.payload import STREAMS, batch
from flowlane.backends.memory import MemoryBackend
from flowlane.clock import SystemClock
from flowlane.ports import Index
from tests.aws_lambda.aggregate import aggregate
from tests.aws_lambda.model import Queue, Shard
from tests.aws_lambda.outside import OutsideBackend
from tests.aws_lambda.test_outside import drain
from tests.aws_lambda.test_wanted import BRIDGE, LOGS, TEST, bridged, s3, sns
from tests.aws_lambda.toys import PushedClock, Remaining, failed, function, kinesis, order, sqs, toy

LONG = Remaining(900)
SWEEP = {"flowlane": "sweep"}


def listening(seen: list[Any]) -> Lane:
    """A lane that keeps the events that opened its runs."""
    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        seen.append(event.data.event)

    return lane


def dynamodb(*keys: str, first: int = 99) -> dict[str, Any]:
    """A batch of DynamoDB Streams: one change of each item."""
    shard = Shard(True, [(str(first + n), key, b"") for n, key in enumerate(keys)], size=99)
    return shard.receive()


# --------------------------------------------------------------------------- what is opened


def test_each_change_of_an_item_opens_its_run_with_its_record() -> None:
    seen: list[Any] = []
    event = dynamodb("a", "b", "a")
    with function(listening(seen)) as call:
        assert failed(call(event, LONG)) == []
        assert failed(call(event, LONG)) == []
    by_number = sorted(seen, key=lambda record: int(record["dynamodb"]["SequenceNumber"]))
    assert by_number == event["Records"]
    of_a = [r["dynamodb"]["SequenceNumber"] for r in seen if r["dynamodb"]["Keys"]["id"]["S"] == "a"]
    assert of_a == ["99", "101"], "those of one item one after the other"


def test_a_change_that_cannot_be_handled_is_told_by_its_sequence_number() -> None:
    seen: list[Any] = []
    event = dynamodb("a", "b", "c", first=9)
    del event["Records"][1]["eventID"], event["Records"][1]["eventSourceARN"]
    with function(listening(seen)) as call:
        assert failed(call(event, LONG)) == ["10"]
        assert failed(call(event, Remaining(0))) == ["9"]


def test_what_a_kinesis_record_holds_together_is_handled_and_told_by_its_one_number() -> None:
    seen: list[Any] = []
    whole = aggregate(("a", json.dumps(order("x")).encode()), ("b", json.dumps(order("y")).encode()))
    bad = aggregate(("a", json.dumps(order("z")).encode()), ("b", b"nonsense"))
    shard = Shard(records=[("9", "k", whole), ("10", "k", bad), ("11", "k", json.dumps(order("w")).encode())])
    with function(listening(seen)) as call:
        answer = call(shard.receive(), LONG)
    assert failed(answer) == ["10"]
    assert {"x", "y"} <= {event["id"] for event in seen}
    assert shard.settle(answer) == ["10", "11"]


def test_the_state_of_a_tumbling_window_is_passed_back() -> None:
    event = {**kinesis(order("a")), "window": {"start": "s", "end": "e"}, "state": {"count": 7}}
    with function(toy()) as call:
        assert call(event, LONG) == {"batchItemFailures": [], "state": {"count": 7}}
        final = {"Records": [], "isFinalInvokeForWindow": True, "state": {"count": 8}}
        assert call(final, LONG) == {"batchItemFailures": [], "state": {"count": 8}}


def test_a_message_of_several_objects_is_done_when_all_of_them_are() -> None:
    seen: list[Any] = []
    both = {"Records": [s3("x"), s3("y")]}
    half = {"Records": [s3("z"), {"s3": {}}]}
    with function(listening(seen)) as call:
        assert failed(call(sqs(both, half), LONG)) == ["m1"]
        assert failed(call(sqs(both), LONG)) == []
    assert sorted(record["s3"]["object"]["key"] for record in seen) == ["x", "y"], (
        "all of a message, or nothing"
    )


def test_a_message_of_several_runs_is_reported_until_all_have_ended(caplog: pytest.LogCaptureFixture) -> None:
    clock = PushedClock()
    handled: list[str] = []
    lane = Lane("toy", policy=Policy(lease="2m"))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        key = event.data.event["s3"]["object"]["key"]
        if key == "y" and not clock.pushed:
            clock.pushed += 58
            await asyncio.Event().wait()
        handled.append(key)

    both = {"Records": [s3("x"), s3("y"), s3("z")]}
    with function(lane, clock=clock) as call:
        assert failed(call(sqs(both), Remaining(60))) == ["m0"]
        assert "not finished in time" in caplog.text
        assert failed(call(sqs(both), Remaining(60))) == []
    assert sorted(handled) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("event", "count"),
    [
        ({"Records": [s3("x"), s3("y")]}, 2),
        ({"Records": [{"EventSource": "aws:sns", "Sns": sns({"Records": [s3("x"), s3("y")]})}]}, 2),
        ({"Records": [{"EventSource": "aws:sns", "Sns": sns(t, MessageId=t)} for t in ("x", "y", "z")]}, 3),
        (TEST, 0),
        ({"Records": [{"EventSource": "aws:sns", "Sns": sns(TEST)}]}, 0),
    ],
)
def test_an_invocation_by_several_records_reports_each_run(event: Any, count: int) -> None:
    with function(listening([])) as call:
        answer = call(event, LONG)
        assert list(answer) == ["lane", "runs"]
        assert [report["outcome"] for report in answer["runs"]] == ["settled"] * count
    queue = Queue()
    with function(listening([]), backend=OutsideBackend(SystemClock(), queue)) as call:
        answer = call(event, LONG)
    assert [report["outcome"] for report in answer["runs"]] == ["open"] * count
    assert len(queue.waiting) == count


@pytest.mark.parametrize("event", [s3("x"), bridged("x"), BRIDGE, sns("text")])
def test_what_one_event_is_about_is_one_report(event: dict[str, Any]) -> None:
    direct = {"Records": [event]} if "s3" in event else event
    with function(listening([])) as call:
        report = call(direct, LONG)
        assert report["outcome"] == "settled"
        assert failed(call(sqs(direct, direct), LONG)) == []
        assert call(direct, LONG)["run"] == report["run"]


def test_the_rest_is_done_though_one_record_makes_no_sense() -> None:
    seen: list[Any] = []
    message = json.dumps({"specversion": "9"})
    event = {"Records": [{"EventSource": "aws:sns", "Sns": sns("good")}]}
    with function(listening(seen)) as call:
        with pytest.raises(Permanent, match="specversion"):
            call({"Records": [*event["Records"], {"EventSource": "aws:sns", "Sns": sns(message)}]}, LONG)
        assert seen == [], "what is not understood is not begun"
        call(event, LONG)
    assert len(seen) == 1


def test_control_messages_of_log_groups_are_skipped() -> None:
    import gzip

    seen: list[Any] = []
    shard = Shard()
    for number, kind in enumerate(("CONTROL_MESSAGE", "DATA_MESSAGE")):
        packed = gzip.compress(json.dumps({**LOGS, "messageType": kind}).encode())
        shard.records.append((str(number), "k", packed))
    with function(listening(seen)) as call:
        assert failed(call(shard.receive(), LONG)) == []
    assert [event["messageType"] for event in seen] == ["DATA_MESSAGE"]


# --------------------------------------------------------------------------- the sweep


class WallClock(PushedClock):
    """One whose wall clock can be pushed on, too."""

    def now(self) -> datetime:
        """See ``Clock.now``."""
        return super().now() + timedelta(seconds=self.pushed)


@pytest.mark.parametrize("event", [SWEEP, {**BRIDGE, "detail": SWEEP}])
def test_a_scheduled_sweep_puts_back_what_was_lost(event: dict[str, Any]) -> None:
    clock, queue = WallClock(), Queue()
    with function(toy(), backend=OutsideBackend(clock, queue), clock=clock) as call:
        call(order("a", 2), LONG)
        queue.waiting.clear()
        nothing = call(event, LONG)
        assert nothing["lane"] == "toy"
        assert (nothing["swept"]["open"], nothing["swept"]["requeued"]) == (1, 0), "it may still be at work"
        clock.pushed = 1000
        assert call(event, LONG)["swept"]["requeued"] == 1
        assert failed(call(sqs(event), LONG)) == []
        drain(call, queue)
        assert call(event, LONG)["swept"]["open"] == 0
    assert "runs" not in nothing


def test_a_sweep_opens_no_run_and_drains_what_is_left() -> None:
    backend = MemoryBackend(SystemClock())
    clock = PushedClock()
    handled: list[str] = []

    async def cut(event: Event, ctx: Context) -> None:
        clock.pushed += 60
        raise OSError("not yet")

    async def load(event: Event, ctx: Context) -> None:
        handled.append(event.data.order)

    with function(toy(cut), backend=backend, clock=clock) as call:
        assert failed(call(sqs(order("a")), Remaining(60))) == ["m0"]
    with function(toy(load), backend=backend) as call:
        assert call(SWEEP, LONG)["swept"]["open"] == 2, "the run and its unit"
    assert handled == ["a"]


class SlowBackend(MemoryBackend):
    """Never comes to the end of its index."""

    async def units(self, lane: str, index: Index, patience: Any = None) -> Any:
        await asyncio.Event().wait()
        yield


def test_a_sweep_ends_at_the_deadline() -> None:
    backend = SlowBackend(SystemClock())
    backend.exact_queue = False
    with function(toy(), backend=backend, margin="200ms") as call:
        assert failed(call(sqs(), LONG)) == []  # opened, which may take longer than the sweep is given
        with pytest.raises(Retryable, match=r"sweep of lane toy did not come to its end in [01] s"):
            call(SWEEP, Remaining(1.0))
        assert failed(call(sqs(SWEEP), Remaining(0.5))) == ["m0"]


# --------------------------------------------------------------------------- mutated


def _events() -> list[dict[str, Any]]:
    whole = aggregate(("a", json.dumps(order("x")).encode()), ("b", b"no"))
    shard = Shard(records=[("9", "k", whole), ("10", "k", b"{}")])
    return [
        sqs(order("a"), "text", {"Records": [s3("x")]}, sns(bridged())),
        sqs(order("a"), "text", order("c"), groups="aab"),
        shard.receive(),
        dynamodb("a", "b"),
        {"Records": [s3("x"), s3("y")]},
        {"Records": [{"EventSource": "aws:sns", "Sns": sns("text")}]},
        {**BRIDGE},
        bridged(),
        order("a"),
        {"detail-type": "Scheduled Event", "source": "aws.events", "time": "2024-05-01T12:00:00Z"},
        {**kinesis(order("a")), "window": {}, "state": {"n": 1}},
        SWEEP,
    ]


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        "",
        "x",
        0,
        -1,
        1.5,
        True,
        [],
        {},
        [[]],
        {"a": 1},
        "\ud800",
        "\x00",
        "9" * 200,
        10**400,
        float("nan"),
    ]
) | st.text(max_size=5)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """An event that Lambda may be invoked with, with something changed anywhere in it."""
    event: Any = json.loads(json.dumps(draw(st.sampled_from(_events()))))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = event
        while True:
            if not isinstance(place, dict | list) or not place:
                break
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            if isinstance(inner, str) and inner.startswith("{") and draw(st.booleans()):
                cut = draw(st.integers(0, len(inner)))
                place[key] = inner[:cut] + draw(st.text(max_size=2)) + inner[cut + 1 :]
            elif draw(st.integers(0, 3)) == 0:
                del place[key]
            else:
                place[key] = deepcopy(draw(ODD))
            break
    return event


def _names(event: Any) -> set[str]:
    """The identifiers by which AWS knows the messages in `event`."""
    found = set()
    for record in event["Records"]:
        for inner, name in ((record, "messageId"), (record.get("kinesis"), "sequenceNumber")):
            if isinstance(inner, dict) and name in inner:
                found.add(inner[name])
        if isinstance(record.get("dynamodb"), dict):
            found.add(record["dynamodb"].get("SequenceNumber"))
    return found


def test_names_that_utf8_cannot_hold_are_given_back_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    event = sqs("bad", order("a"))
    event["Records"][0]["messageId"] = "\ud800"
    event["Records"][1]["attributes"]["MessageGroupId"] = "\ud800"
    with function(toy()) as call:
        assert failed(call(event, LONG)) == ["\ud800"]
    assert json.loads(caplog.records[0].getMessage())["message"] == "\\ud800"


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_a_mutated_event_is_answered_by_its_own_names_or_refused(event: Any) -> None:
    refused: FlowlaneError | None = None
    answer: dict[str, Any] = {}
    with function(_once) as call:
        try:
            answer = call(event, LONG)
        except FlowlaneError as error:
            refused = error
    assert "\n" not in str(refused)
    assert not isinstance(refused, Retryable), f"nothing breaks off: {refused}"
    if "batchItemFailures" in answer:
        names = failed({"batchItemFailures": answer["batchItemFailures"]})
        assert len(names) == len(set(names))
        assert set(names) <= _names(event)
        found = batch(event)
        assert found is not None
        assert found.kind not in STREAMS or len(names) <= 1
        json.dumps(answer)


_once = Lane("toy")


@_once.stage(on=_once.triggered)
async def find(event: Event, ctx: Context) -> None: ...
