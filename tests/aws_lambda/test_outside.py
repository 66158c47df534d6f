"""With the queue outside: deliveries come as payloads, and runs are driven by nothing else."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from flowlane import Context, Event, Lane, Policy, Unit
from flowlane.aws_lambda.function import Function
from flowlane.clock import SystemClock
from flowlane.errors import Retryable, VersionConflict
from flowlane.events import Reference, encode_data, refer
from flowlane.ports import Commit, Committed
from flowlane.state import progress, status
from tests.aws_lambda.model import Queue
from tests.aws_lambda.outside import OutsideBackend
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


def drain(call: Function, queue: Queue) -> int:
    """Invoke `call` until the queue is empty; how often."""
    for turn in range(200):
        if not queue.waiting:
            return turn
        queue.settle(call(queue.receive(), LONG))
    raise AssertionError(f"still there: {queue.waiting}")


@pytest.mark.parametrize("by_reference", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_is_driven_by_its_messages_whatever_is_delivered_twice(
    copies: int, seed: int, by_reference: bool
) -> None:
    queue = Queue(size=7, rng=random.Random(seed))
    backend = OutsideBackend(SystemClock(), queue, copies)
    backend.by_reference = by_reference
    tries: Counter[str] = Counter()

    async def load(event: Event, ctx: Context) -> None:
        tries[ctx.unit] += 1
        if tries[ctx.unit] == 1 and event.data.n % 3 == 0:
            raise OSError("the first time never works")

    with function(toy(load), backend=backend) as call:
        assert failed(call(sqs(order("a", 5), "bad", order("b", 5)), LONG)) == ["m1"]
        assert call(order("c", 5), LONG) == {"lane": "toy", "run": "toy/run/shop,c", "outcome": "open"}
        drain(call, queue)
        runs = asyncio.run(_heads(backend, ["toy/run/shop,a", "toy/run/shop,b", "toy/run/shop,c"]))
    for head in runs:
        assert status(head) == "settled"
        assert progress(head).report["units"]["settled"] == 5
    assert set(tries) == {f"toy/thing/{name}@{n}" for name in "abc" for n in range(5)}


async def _heads(backend: OutsideBackend, streams: list[str]) -> list[Event]:
    return list((await backend.last(streams)).values())


def test_what_is_not_reached_before_the_deadline_is_reported_and_comes_again() -> None:
    queue = Queue()
    backend = OutsideBackend(SystemClock(), queue)
    with function(toy(), backend=backend) as call:
        call(order("a", 4), LONG)
        queue.settle(call(queue.receive(), LONG))  # discovery
        batch = queue.receive()
        names = [record["messageId"] for record in batch["Records"]]
        answer = call(batch, Remaining(0))
        assert failed(answer) == names
        assert queue.settle(answer) == names
        drain(call, queue)
        (head,) = asyncio.run(_heads(backend, ["toy/run/shop,a"]))
    assert status(head) == "settled"


def test_the_delivery_of_a_stage_that_the_function_does_not_handle_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue = Queue()
    backend = OutsideBackend(SystemClock(), queue)
    environment = {"FLOWLANE_BACKEND": "memory://", "FLOWLANE_STAGE": "load"}
    with function(toy(), backend=backend, environment=environment) as call:
        call(order("a"), LONG)
        assert failed(call(queue.receive(), LONG)) != []
    assert "is for the stage find, and FLOWLANE_STAGE has this function handle load only" in (
        caplog.records[-1].getMessage()
    )


class HangingBackend(OutsideBackend):
    """Of which the calls in `hang` come back when Lambda has long ended the function."""

    hang: frozenset[str] = frozenset()

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        await self._answer("commit")
        return await super().commit(work)

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        await self._answer("last")
        return await super().last(streams)

    async def read(self, stream: str, *, after: int = 0) -> AsyncIterator[Event]:
        await self._answer("read")
        async for event in super().read(stream, after=after):
            yield event

    async def _answer(self, call: str) -> None:
        if call in self.hang:
            await asyncio.sleep(240)


@pytest.mark.parametrize("hang", ["commit", "last", "read"])
def test_a_log_that_does_not_answer_is_told_of_before_lambda_ends_the_function(
    hang: str, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Queue()
    backend = HangingBackend(SystemClock(), queue)
    backend.by_reference = hang == "read"
    with function(toy(), backend=backend) as call:
        call(order("a", 2), LONG)
        triggered = queue.receive()
        backend.hang = frozenset([hang])
        batch = triggered if hang != "commit" else sqs(order("b"), order("c"))
        names = [record["messageId"] for record in batch["Records"]]
        began = time.monotonic()
        assert failed(call(batch, Remaining(1))) == names
        with pytest.raises(Retryable, match=r"the backend of lane toy did not answer in the 0(\.\d+)? s"):
            call(
                json.loads(triggered["Records"][0]["body"]) if hang != "commit" else order("d"), Remaining(1)
            )
        assert time.monotonic() - began < 120, "neither waited for the log"
        backend.hang = frozenset()
        again = [{"itemIdentifier": record["messageId"]} for record in triggered["Records"]]
        queue.settle({"batchItemFailures": again})
        drain(call, queue)
        (head,) = asyncio.run(_heads(backend, ["toy/run/shop,a"]))
    assert status(head) == "settled"
    assert {record.getMessage().partition('"reason":"')[2][:36] for record in caplog.records} == {
        "the backend of lane toy did not answ"
    }


@pytest.mark.parametrize(
    "reference",
    [
        Reference("toy/thing/a@9", 1, "e"),
        Reference("toy/thing/a@0", 1, "another"),
        Reference("toy/thing/a@0", 99, "e"),
        Reference("toy/thing/a@0", -1, "e"),
        Reference("elsewhere/thing/a@0", 1, "e"),
        Reference("", 0, ""),
    ],
)
def test_a_reference_to_what_the_log_does_not_hold_is_its_messages_failure(
    reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    queue = Queue()
    backend = OutsideBackend(SystemClock(), queue)
    with function(toy(), backend=backend) as call:
        call(order("a"), LONG)
        drain(call, queue)
        (head,) = asyncio.run(_heads(backend, ["toy/thing/a@0"]))
        known = encode_data(refer(head)).decode()
        assert failed(call(sqs(encode_data(reference).decode(), known), LONG)) == ["m0"]
    assert "the log does not know" in caplog.text


# --------------------------------------------------------------------------- a stage with an order key


def ordered(load: Callable[[Event, Context], Any], policy: Policy = QUICK) -> Lane:
    """A lane whose things are handled one after the other within their order."""
    lane = Lane("toy", policy=policy)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in range(event.data.event["data"]["things"]):
            for name in "abc":
                yield Thing(order=name, n=n)

    @lane.stage(on=Thing, name="load", order="order", retries=1000)
    async def handle(event: Event, ctx: Context) -> None:
        await load(event, ctx)

    return lane


@pytest.mark.parametrize("seed", range(8))
def test_a_fifo_queue_keeps_the_order_whatever_fails_for_a_while(seed: int) -> None:
    rng = random.Random(seed)
    queue = Queue(fifo=True, size=rng.randint(1, 10))
    backend = OutsideBackend(SystemClock(), queue)
    done: list[tuple[str, int]] = []
    again: list[int] = []

    async def load(event: Event, ctx: Context) -> None:
        if rng.random() < 0.3:
            raise OSError("not yet")
        done.append((event.data.order, event.data.n))

    with function(ordered(load), backend=backend) as call:
        call(order("x", 6), LONG)
        for _ in range(500):
            if not queue.waiting:
                break
            again.append(len(queue.settle(call(queue.receive(), LONG))))
        (head,) = asyncio.run(_heads(backend, ["toy/run/shop,x"]))
    assert status(head) == "settled"
    assert sum(again) > 0, "something was to fail"
    for name in "abc":
        assert [n for other, n in done if other == name] == list(range(6)), "each once, and in order"
    assert len(queue.deleted) == len(set(queue.deleted)) == 1 + 18, "nothing was published again"


def test_a_fifo_stage_goes_on_in_its_place_at_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    clock = PushedClock()
    queue = Queue(fifo=True)
    backend = OutsideBackend(clock, queue)
    steps: list[tuple[str, int]] = []

    async def load(event: Event, ctx: Context) -> None:
        for n in range(3):
            await ctx.step(f"s{n}", step, event.data.order, event.data.n * 10 + n)

    async def step(name: str, n: int) -> None:
        steps.append((name, n))
        if (name, n) == ("a", 1):
            clock.pushed += 55

    with function(ordered(load), backend=backend, clock=clock) as call:
        call(order("x", 2), LONG)
        queue.settle(call(queue.receive(), LONG))  # discovery
        batch = queue.receive()
        assert len(queue.waiting) == 6
        again = queue.settle(call(batch, Remaining(60)))
        of_a = [message.id for message in queue.waiting if message.group == "a"]
        assert [name for name in again if name in of_a] == of_a, "the first of its group, and all behind it"
        assert ("a", 2) not in steps
        assert "toy/thing/a@0 goes on in its place" in caplog.text
        drain(call, queue)
        (head,) = asyncio.run(_heads(backend, ["toy/run/shop,x"]))
    assert status(head) == "settled"
    assert [n for name, n in steps if name == "a"] == [0, 1, 2, 10, 11, 12], "no step was done twice"


def test_a_stage_without_an_order_key_is_continued_by_another_message() -> None:
    clock = PushedClock()
    queue = Queue()
    backend = OutsideBackend(clock, queue)
    steps: list[int] = []

    async def load(event: Event, ctx: Context) -> None:
        for n in range(3):
            await ctx.step(f"s{n}", step, n)

    async def step(n: int) -> None:
        steps.append(n)
        if n == 1:
            clock.pushed += 55

    with function(toy(load), backend=backend, clock=clock) as call:
        call(order("x"), LONG)
        queue.settle(call(queue.receive(), LONG))  # discovery
        (before,) = queue.waiting
        assert queue.settle(call(queue.receive(), Remaining(60))) == [], "checkpointed, published, and acked"
        (after,) = queue.waiting
        assert before.id != after.id
        assert steps == [0, 1]
        drain(call, queue)
    assert steps == [0, 1, 2]


def test_without_progress_the_hops_are_counted_in_the_log_and_have_an_end() -> None:
    clock = PushedClock()
    queue = Queue()
    backend = OutsideBackend(clock, queue)
    tries: list[int] = []

    async def load(event: Event, ctx: Context) -> None:
        tries.append(1)
        clock.pushed += 58
        await asyncio.Event().wait()

    with function(toy(load, replace(QUICK, hops=1)), backend=backend, clock=clock) as call:
        call(order("x"), LONG)
        for _ in range(20):
            if not queue.waiting:
                break
            queue.settle(call(queue.receive(), Remaining(60)))
        (head,) = asyncio.run(_heads(backend, ["toy/thing/x@0"]))
    assert len(tries) == 2
    assert status(head) == "dead"
    assert "no progress in 1 continuations" in progress(head).reason


def test_triggers_of_a_stream_open_their_runs_and_are_done() -> None:
    queue = Queue()
    with function(toy(), backend=OutsideBackend(SystemClock(), queue)) as call:
        assert failed(call(kinesis(order("a"), order("b"), keys="kk"), LONG)) == []
        assert len(queue.waiting) == 2
        drain(call, queue)
