"""With the queue outside: deliveries come as payloads, and runs are driven by nothing else."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from flowlane import Context, Event
from flowlane.aws_lambda.function import Function
from flowlane.clock import SystemClock
from flowlane.state import progress, status
from tests.aws_lambda.model import Queue
from tests.aws_lambda.outside import OutsideBackend
from tests.aws_lambda.toys import Remaining, failed, function, order, sqs, toy

LONG = Remaining(900)


def drain(call: Function, queue: Queue) -> int:
    """Invoke `call` until the queue is empty; how often."""
    for turn in range(200):
        if not queue.waiting:
            return turn
        queue.settle(call(queue.receive(), LONG))
    raise AssertionError(f"still there: {queue.waiting}")


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_run_is_driven_by_its_messages_whatever_is_delivered_twice(copies: int, seed: int) -> None:
    queue = Queue(size=7, rng=random.Random(seed))
    backend = OutsideBackend(SystemClock(), queue, copies)
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
