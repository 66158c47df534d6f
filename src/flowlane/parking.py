"""Parking: records of a channel that no stage can make anything of.

They would come again and again, and nothing behind them would get its turn. So they are kept in the log, in
streams of their own, and the channel goes on. No unit has died and no run is waiting: a redrive has nothing
to put back.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec

from flowlane import events
from flowlane.errors import VersionConflict
from flowlane.events import Event
from flowlane.handling import Handling
from flowlane.lane import MAX_STREAM
from flowlane.ports import Append, Backend, ChannelRecord, Commit
from flowlane.state import status
from flowlane.veil import conceal

if TYPE_CHECKING:
    from flowlane.engine import Engine

logger = logging.getLogger("flowlane")

#: Bytes that are kept of a record, at most: with its envelope an event takes that.
KEPT = 64 * 1024
_KEY = 256


class Parked(msgspec.Struct, frozen=True):
    """What a ``record.parked`` says: where the record was, why nobody takes it, how many bytes it has, and
    the first of them in base64. Positions are text: they are larger than a number in JSON may be."""

    reason: str
    channel: str
    partition: int
    position: str
    key: str
    bytes: int
    data: str


async def park(engine: Engine, handling: Handling, record: ChannelRecord, reason: str) -> None:
    """The log says that `record`, of the channel of `handling`'s stage, was passed over, and why. Repeatable:
    it says so once.

    Raises:
        Retryable: the log is away.
    """
    stage = handling.stage
    parked = Parked(
        conceal(reason),
        handling.queue,
        record.partition,
        str(record.position),
        record.key.encode("utf-8", "backslashreplace").decode()[:_KEY],
        len(record.data),
        base64.b64encode(record.data[:KEPT]).decode(),
    )
    # A unit's type has no colon: no unit has such a stream.
    stream = f"{stage.lane}/parked:{stage.name}/{record.partition}@{record.position}"
    event = Event(
        engine.next_id(),
        stage.lane,
        events.RECORD_PARKED,
        stream,
        engine.stamp(),
        msgspec.Raw(events.encode_data(parked)),
        1,
        stage=stage.name,
    )
    if not isinstance(await engine.commit(Commit((Append(stream, 0, (event,)),))), VersionConflict):
        logger.warning("%s: a record of channel %s is passed over: %s", stream, handling.queue, parked.reason)


def stray(handling: Handling, event: Event) -> str:
    """Why `event`, which the stage's channel brought, cannot be of its lane, whatever the log knows; empty if
    it may be. What is not is not to be asked for: a log may take no stream of such a name."""
    lane = handling.stage.lane
    if event.source != lane:
        return f"it is an event of lane {event.source:.64}, and this is a channel of lane {lane}"
    if not event.subject.startswith(f"{lane}/") or len(event.subject) > MAX_STREAM:
        return f"its subject {event.subject[:200]!r} is no stream of lane {lane}"
    return ""


def refusal(engine: Engine, handling: Handling, event: Event, head: Event | None) -> str:
    """Why the stage is not handed `event`, which its channel brought and which is not ``stray``; empty if it
    is. `head` is the last event of its stream."""
    if head is None:
        return f"the log does not know the stream {event.subject:.200}: was it put by another backend?"
    if status(head) == "open" and engine.handling_of(head) is not handling:
        return f"{event.subject:.200} is owed to stage {head.stage or 'none':.64}, and not to this one"
    return ""


async def parked_records(backend: Backend, lane: str) -> AsyncIterator[tuple[Event, Parked]]:
    """What was passed over in the channels of `lane`, and the events that say so."""
    async for head in backend.units(lane, "dead"):
        if (known := parked(head)) is not None:
            yield head, known


def parked(head: Event) -> Parked | None:
    """What `head` says of a record that was passed over; ``None`` if it is about a unit."""
    return msgspec.json.decode(head.data, type=Parked) if head.type == events.RECORD_PARKED else None
