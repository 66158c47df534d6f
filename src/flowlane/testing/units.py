"""Events, commits and a few helpers for the contract suites: units of work as the engine would write them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import count
from typing import Any, TypeVar

import msgspec

from flowlane import events
from flowlane.events import Event
from flowlane.ports import Append, Backend, Commit, Committed, Delivery, Publish, Tally
from flowlane.state import Progress

T = TypeVar("T")

LANE = "suite"
RUN = "suite/run/1"
FOUND = "thing.found"

_ids = count(1)


def found(key: str, *, lane: str = LANE, run: str = RUN, stage: str = "load", data: Any = None) -> Event:
    """The first event of the unit `key`, owed to `stage`; a fact if `stage` is empty."""
    payload = msgspec.Raw(msgspec.json.encode({"key": key} if data is None else data))
    return Event(
        id=f"e{next(_ids)}",
        source=lane,
        type=FOUND,
        subject=f"{lane}/{key}",
        time="2024-01-01T00:00:00.000Z",
        data=payload,
        version=1,
        run=run,
        stage=stage,
    )


def following(head: Event, type: str = events.UNIT_SETTLED, **progress: Any) -> Event:
    """The event after `head` in its stream."""
    data = msgspec.Raw(events.encode_data(Progress(**progress)))
    return msgspec.structs.replace(head, id=f"e{next(_ids)}", type=type, data=data, version=head.version + 1)


def append(*stream: Event) -> Append:
    """`stream`, which are consecutive events of one stream, after the version before their first."""
    return Append(stream[0].subject, stream[0].version - 1, stream)


def discover(event: Event, *, delay: float = 0, group: str = "") -> Commit:
    """`event` begins its stream, is published (under `group`) and counted."""
    event = msgspec.structs.replace(event, partitionkey=group) if group else event
    return Commit(
        (append(event),),
        (Publish(event, event.stage, delay, group=group),),
        (Tally(event.run, event.round, event.stage, found=1),),
    )


def settle(delivery: Delivery) -> Commit:
    """The unit of `delivery` is settled and counted, the delivery acked."""
    assert delivery.head is not None
    last = following(delivery.head)
    return Commit((append(last),), (), (Tally(last.run, last.round, delivery.stage, settled=1),), delivery)


async def applied(backend: Backend, *work: Commit) -> Sequence[Committed]:
    """The answers to `work`, none of which is a conflict."""
    answers = await backend.commit(work)
    assert len(answers) == len(work)
    done = [answer for answer in answers if isinstance(answer, Committed)]
    assert len(done) == len(answers), answers
    return done


async def listed(iterator: AsyncIterator[T]) -> list[T]:
    """All that `iterator` gives."""
    return [item async for item in iterator]


async def within(seconds: float, what: Any) -> Any:
    """What `what` gives; it is an error if that takes longer than `seconds`."""
    async with asyncio.timeout(seconds):
        return await what
