"""A queue that shows its messages again too early is refused, with the number needed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from flowlane import ConfigError, Context, Event, FlowlaneError, Permanent, Retryable
from flowlane.aws_lambda.visibility import Leasing, Visibility, show_again
from flowlane.backends.memory import MemoryBackend
from flowlane.clock import SystemClock
from tests.aws_lambda.model import Queue
from tests.aws_lambda.outside import OutsideBackend
from tests.aws_lambda.test_outside import LONG, ordered
from tests.aws_lambda.toys import QUICK, Remaining, failed, function, kinesis, order, sqs, toy

ARN = "arn:aws:sqs:eu-west-1:1:q"


class LeasingBackend(OutsideBackend):
    """One that can be asked for how long a queue hides its messages: the first of `leases`, as long as there
    are others; an error is raised."""

    def __init__(self, *leases: float | FlowlaneError | None) -> None:
        super().__init__(SystemClock(), Queue())
        self.leases = list(leases)
        self.asked: list[str] = []
        self.shown: list[tuple[str, dict[str, float]]] = []
        self.error: BaseException | None = None

    async def show_again(self, queue: str, due: Mapping[str, float]) -> None:
        """See ``visibility.Leasing``."""
        self.shown.append((queue, dict(due)))
        if self.error is not None:
            raise self.error

    async def lease_of(self, queue: str) -> float | None:
        """See ``visibility.Leasing``."""
        self.asked.append(queue)
        lease = self.leases.pop(0) if len(self.leases) > 1 else self.leases[0]
        if isinstance(lease, FlowlaneError):
            raise lease
        return lease


def test_a_queue_that_hides_for_less_than_the_functions_time_is_refused_with_the_number_needed() -> None:
    backend = LeasingBackend(30.0, 59.0, 60.0)
    with function(toy(), backend=backend) as call:
        for lease in ("30", "59"):
            with pytest.raises(ConfigError) as caught:
                call(sqs(order("a")), Remaining(59.97))
            assert str(caught.value) == (
                f"the queue {ARN} hides a message for {lease} s, but this function may work on it for 60 s: "
                "set the queue's VisibilityTimeout to at least 60 s, or better 360 s"
            )
        assert failed(call(sqs(order("a")), Remaining(59.97))) == [], "mended, without a new process"
        assert failed(call(sqs(order("b")), Remaining(59.97))) == []
    assert backend.asked == [ARN] * 3, "asked no more once it is right"


def test_nothing_is_begun_where_it_is_refused() -> None:
    backend = LeasingBackend(1.0)
    with function(toy(), backend=backend) as call, pytest.raises(ConfigError):
        call(sqs(order("a")), Remaining(60))
    assert backend._queue.waiting == []


def test_each_queue_is_asked_for_once() -> None:
    backend = LeasingBackend(900.0)
    with function(toy(), backend=backend) as call:
        for _ in range(2):
            call(sqs(order("a")), Remaining(60))
            call(sqs(order("a"), groups="g"), Remaining(60))
    assert backend.asked == [ARN, f"{ARN}.fifo"]


@pytest.mark.parametrize("seconds", [0.4, 60.0])
def test_what_is_no_queue_or_has_no_end_is_not_asked_for(seconds: float) -> None:
    backend = LeasingBackend(0.0)
    with function(toy(), backend=backend) as call:
        call(kinesis(order("a")), Remaining(seconds))
        call(sqs(order("b")), None)
        call(order("c"), Remaining(60))
    assert backend.asked == []


def test_a_queue_that_does_not_answer_is_asked_again_and_one_that_may_not_be_asked_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = LeasingBackend(Retryable("away"), Permanent("AccessDenied"))
    with function(toy(), backend=backend) as call:
        for name in "abc":
            assert failed(call(sqs(order(name)), Remaining(60))) == []
    assert len(backend.asked) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot see for how long {ARN} hides messages: AccessDenied (sqs:GetQueueAttributes is needed)"
    ]


def test_a_queue_that_gives_no_answer_leaves_most_of_the_time_to_its_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Hanging(LeasingBackend):
        async def lease_of(self, queue: str) -> float | None:
            await asyncio.sleep(240)
            return await super().lease_of(queue)

    monkeypatch.setattr("flowlane.aws_lambda.visibility._PATIENCE", 0.2)
    with function(toy(), backend=Hanging(900.0)) as call:
        for name in "ab":
            assert failed(call(sqs(order(name)), Remaining(30))) == []


async def test_a_backend_that_knows_nothing_of_queues_is_not_asked() -> None:
    backend = MemoryBackend(SystemClock())
    assert not isinstance(backend, Leasing)
    await Visibility().check(backend, ARN, 60)
    unknown = LeasingBackend(None)
    visibility = Visibility()
    await visibility.check(unknown, ARN, 60)
    await visibility.check(unknown, ARN, 60)
    assert unknown.asked == [ARN]


# --------------------------------------------------------------------------- what comes again at its time


def received(event: dict[str, Any]) -> dict[str, Any]:
    """The batch, each message with a receipt of its own."""
    for record in event["Records"]:
        record["receiptHandle"] = "r-" + record["messageId"]
    return event


def test_what_is_not_begun_is_shown_again_at_once_and_what_makes_no_sense_is_not() -> None:
    backend = LeasingBackend(900.0)
    with function(toy(), backend=backend) as call:
        assert failed(call(received(sqs(order("a"), order("b"))), Remaining(0))) == ["m0", "m1"]
        assert backend.shown == [(ARN, {"r-m0": 0.0, "r-m1": 0.0})]
        assert failed(call(received(sqs("nonsense", order("b"))), LONG)) == ["m0"]
        assert failed(call(sqs(order("a")), Remaining(0))) == ["m0"], "without a receipt nothing can be said"
    assert len(backend.shown) == 1


def test_a_group_is_shown_again_as_a_whole_when_its_first_message_is_due() -> None:
    backend = LeasingBackend(900.0)

    async def load(event: Event, ctx: Context) -> None:
        raise Retryable("not yet", delay=7)

    patient = replace(QUICK, backoff_cap="30s")
    with function(ordered(load, patient), backend=backend) as call:
        call(order("x", 2), LONG)
        event = Queue(fifo=True, waiting=backend._queue.waiting)
        event.settle(call(event.receive(), LONG))  # discovery
        answer = failed(call(received(event.receive()), LONG))
        groups = {message.id: message.group for message in event.waiting}
    (queue, due) = backend.shown[-1]
    assert queue == f"{ARN}ueue.fifo"
    assert sorted(due) == sorted(f"r-{name}" for name in answer) == sorted(f"r-{name}" for name in groups)
    assert {round(seconds) for seconds in due.values()} == {7}
    for group in "abc":
        assert len({due[f"r-{name}"] for name in groups if groups[name] == group}) == 1


def test_a_group_whose_first_message_makes_no_sense_waits() -> None:
    backend = LeasingBackend(900.0)
    with function(toy(), backend=backend) as call:
        event = received(sqs("nonsense", order("b"), groups="gg"))
        assert failed(call(event, LONG)) == ["m0", "m1"]
    assert backend.shown == []


@pytest.mark.parametrize("error", [Retryable("away"), Permanent("AccessDenied"), TimeoutError()])
def test_a_queue_that_cannot_be_told_costs_time_and_nothing_else(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    backend = LeasingBackend(900.0)
    backend.error = error
    with function(toy(), backend=backend) as call:
        assert failed(call(received(sqs(order("a"))), Remaining(0))) == ["m0"]
    said = caplog.records[-1].getMessage()
    assert said.startswith(f"1 messages of {ARN} come again later than they could: ")
    assert said.endswith(str(error) or "it took too long")


async def test_showing_again_is_given_up_in_time() -> None:
    class Hanging(LeasingBackend):
        async def show_again(self, queue: str, due: Mapping[str, float]) -> None:
            await asyncio.Event().wait()

    async with asyncio.timeout(60):
        await show_again(Hanging(900.0), ARN, {"r": 0.0}, 0.1)
    await show_again(MemoryBackend(SystemClock()), ARN, {"r": 0.0}, 0.1)
