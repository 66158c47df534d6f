"""The records of a stage's own channel, which a mapping brings: handled, or parked, as a worker would.

What else is put to a stream is an event source like any other (see ``wanted``), and what makes no sense in it
is its mapping's to give up. But a stage's channel holds the lane's own deliveries, and is to go on.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from flowlane import events
from flowlane.aws_lambda.invocation import Invocation
from flowlane.aws_lambda.payload import Batch, Message
from flowlane.engine import Engine
from flowlane.errors import Permanent, Retryable
from flowlane.events import Event
from flowlane.handling import Handling
from flowlane.parking import park, refusal, stray
from flowlane.ports import ChannelRecord
from flowlane.shards import position


@runtime_checkable
class Streaming(Protocol):
    """What a backend offers besides, if its channels are streams that a mapping can read."""

    def stream_of(self, channel: str) -> str:
        """What the stream of the channel of that name is called."""
        ...


def stage_of(engine: Engine, batch: Batch) -> Handling | None:
    """The stage whose channel `batch` is of; ``None`` if it is nobody's."""
    if batch.stream and isinstance(engine.backend, Streaming):
        for queue, handling in engine.queues.items():
            if handling.via == "channel" and engine.backend.stream_of(queue) == batch.stream:
                return handling
    return None


async def take(invocation: Invocation, handling: Handling, message: Message, attempt: int, tried: int) -> str:
    """Handle the delivery that `message` is, or park it, where it is none; see ``Invocation.take``. `attempt`
    is what is known of how often it came, `tried` how often this invocation has had it before.

    Raises:
        Retryable: not this time.
    """
    data = message.body if isinstance(message.body, bytes) else message.body.encode()
    record = ChannelRecord(message.group, data, message.partition, position(message.id, message.sub))
    async with invocation.in_time():
        event, head = await _owed(invocation, handling, record, tried)
    return await invocation.own(event, head, attempt) if event is not None and head is not None else ""


async def _owed(
    invocation: Invocation, handling: Handling, record: ChannelRecord, tried: int
) -> tuple[Event | None, Event | None]:
    """The event that `record` is, and the last one of its unit; nothing if it is parked."""
    engine, policy = invocation.engine, handling.stage.policy
    try:
        event = events.decode(record.data)
    except Permanent as error:
        await park(engine, handling, record, str(error))
        return None, None
    if wrong := stray(handling, event):
        await park(engine, handling, record, wrong)
        return None, None
    head = await invocation.head(event)
    wrong = refusal(engine, handling, event, head)
    if head is not None and not wrong:
        return event, head
    if head is None and tried < policy.retries:
        # Nobody counts the tries of earlier invocations: all of them have to fit into this one.
        most = invocation.left / (policy.retries - tried + 1)
        raise Retryable(wrong, delay=min(most, policy.delay(tried + 1, engine.clock.random())))
    await park(engine, handling, record, wrong)
    return None, None
