"""What the tests call functions with: events, contexts, small lanes, and a clock that lanes can move on."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from flowlane import Context, Event, Lane, Policy, Unit
from flowlane.aws_lambda.function import Function
from flowlane.clock import SystemClock

QUICK = Policy(backoff="1ms", backoff_cap="2ms")


class Thing(Unit, key=("order", "n")):
    """A unit of the toy lanes."""

    order: str
    n: int


class Remaining:
    """Lambda's context, as far as it is looked at."""

    def __init__(self, seconds: float) -> None:
        self._milliseconds = int(seconds * 1000)

    def get_remaining_time_in_millis(self) -> int:
        """As Lambda's: 0 when past."""
        return max(0, self._milliseconds)


class PushedClock(SystemClock):
    """The machine's clock, and whatever a test pushed it on by."""

    def __init__(self) -> None:
        self.pushed = 0.0

    def monotonic(self) -> float:
        """See ``Clock.monotonic``."""
        return super().monotonic() + self.pushed


def order(id: str, things: int = 1, **more: Any) -> dict[str, Any]:
    """A foreign CloudEvent that the toy lanes make `things` units of."""
    return {
        "specversion": "1.0",
        "id": id,
        "source": "shop",
        "type": "order",
        "data": {"things": things, **more},
    }


def sqs(*bodies: Any, fifo: str = "", groups: str = "") -> dict[str, Any]:
    """An SQS batch; messages are called m0, m1, ...; `groups` names the group of each by a letter."""
    return {
        "Records": [
            {
                "messageId": f"m{n}",
                "body": body if isinstance(body, str) else json.dumps(body),
                "attributes": {"MessageGroupId": groups[n]} if groups else {},
                "eventSource": "aws:sqs",
                "eventSourceARN": "arn:aws:sqs:eu-west-1:1:q" + (".fifo" if groups else ""),
            }
            for n, body in enumerate(bodies)
        ]
    }


def kinesis(*bodies: Any, keys: str = "") -> dict[str, Any]:
    """A Kinesis batch; sequence numbers are 99, 100, ...; `keys` names the key of each by a letter."""
    return {
        "Records": [
            {
                "kinesis": {
                    "sequenceNumber": str(99 + n),
                    "partitionKey": keys[n] if keys else "k",
                    "data": base64.b64encode(
                        body.encode() if isinstance(body, str) else json.dumps(body).encode()
                    ).decode(),
                },
                "eventSource": "aws:kinesis",
            }
            for n, body in enumerate(bodies)
        ]
    }


def failed(answer: dict[str, Any]) -> list[str]:
    """The identifiers in `answer`."""
    assert list(answer) == ["batchItemFailures"]
    return [item["itemIdentifier"] for item in answer["batchItemFailures"]]


def toy(load: Callable[[Event, Context], Any] | None = None, policy: Policy = QUICK) -> Lane:
    """A lane that makes units of an order, and handles each by `load`."""
    lane = Lane("toy", policy=policy)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        outer = event.data.event
        for n in range(outer.get("data", {}).get("things", 1)):
            yield Thing(order=outer["id"], n=n)

    @lane.stage(on=Thing, name="load")
    async def handle(event: Event, ctx: Context) -> None:
        if load is not None:
            await load(event, ctx)

    return lane


def function(lane: Lane, **options: Any) -> Function:
    """`lane` behind Lambda, on a memory backend."""
    options.setdefault("environment", {"FLOWLANE_BACKEND": "memory://"})
    return Function(lambda settings: lane, **options)
