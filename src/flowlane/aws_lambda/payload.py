"""What a Lambda payload says: its messages, and what each of them is about; without I/O.

An envelope that cannot be understood is refused as a whole, since nothing could be named in the answer; a
message that cannot be understood is that message's own failure.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, Literal
from urllib.parse import quote

import msgspec

from flowlane import events
from flowlane.errors import Permanent
from flowlane.events import Event
from flowlane.lane import events_time

_KPL = b"\xf3\x89\x9a\xc2"
_ABOUT: Final = "send CloudEvents 1.0 (structured JSON) or scheduled events"
_LATER: Final = "not supported yet by this release: "


class Message(msgspec.Struct, frozen=True):
    """One message of a batch: ``id`` names it in the answer, verbatim; ``group`` is what its order is kept
    within (a FIFO queue's message group, Kinesis' partition key); ``attempt`` counts its receives, from 1."""

    id: str
    body: str | bytes
    group: str = ""
    attempt: int = 1


class Batch(msgspec.Struct, frozen=True):
    """The messages of one queue, or of one shard, in the order in which they came."""

    kind: Literal["standard", "fifo", "kinesis"]
    messages: list[Message]

    def sequences(self) -> list[list[int]]:
        """The numbers of the messages, grouped into what must be handled one after the other."""
        if self.kind == "standard":
            return [[index] for index in range(len(self.messages))]
        groups: dict[str, list[int]] = {}
        for index, message in enumerate(self.messages):
            groups.setdefault(message.group, []).append(index)
        return list(groups.values())


class Start(msgspec.Struct, frozen=True):
    """A run is to be opened, named by `slot`; `event` is what its stages find as ``event.data.event``."""

    slot: str
    by: Literal["event", "schedule"]
    event: dict[str, Any]


# --------------------------------------------------------------------------- envelopes


def batch(payload: Any) -> Batch | None:
    """The messages in `payload`; ``None`` if it is not a batch but an event of its own (a direct invoke).

    Raises:
        Permanent: it is nothing that flowlane understands, or a record lacks what names it in the answer.
    """
    if not isinstance(payload, Mapping):
        raise Permanent(f"the Lambda event is a JSON {_kind(payload)}, not an object: {_ABOUT}")
    if "Records" not in payload:
        return None
    records = payload["Records"]
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise Permanent(
            "the Lambda event's Records are no list of objects: no message can be named, all come again"
        )
    if not records:
        return Batch("standard", [])
    sources = {str(record.get("eventSource") or record.get("EventSource")) for record in records}
    if len(sources) > 1:
        raise Permanent(
            f"the Lambda event mixes records of {', '.join(sorted(sources))}: no such batch is known"
        )
    source = sources.pop()
    if source == "aws:sqs":
        return _sqs(records)
    if source == "aws:kinesis":
        return Batch("kinesis", [_kinesis(number, record) for number, record in enumerate(records)])
    if source in ("aws:s3", "aws:sns", "aws:dynamodb"):
        raise Permanent(f"{_LATER}records of {source}; SQS, Kinesis, CloudEvents and scheduled events are")
    raise Permanent(
        f"the Lambda event has records of unknown source {source!r:.60}: SQS and Kinesis are understood"
    )


def _sqs(records: list[Mapping[str, Any]]) -> Batch:
    fifo = [_text(n, record, "eventSourceARN").endswith(".fifo") for n, record in enumerate(records)]
    messages = []
    for number, record in enumerate(records):
        attributes = record.get("attributes")
        if not isinstance(attributes, Mapping):
            attributes = {}
        messages.append(
            Message(
                id=_text(number, record, "messageId"),
                body=_text(number, record, "body", empty=True),
                # On a standard queue a group is a tenant, and promises no order.
                group=_text(number, attributes, "MessageGroupId") if fifo[number] else "",
                attempt=_count(attributes.get("ApproximateReceiveCount")),
            )
        )
    return Batch("fifo" if any(fifo) else "standard", messages)


def _kinesis(number: int, record: Mapping[str, Any]) -> Message:
    inner = record.get("kinesis")
    if not isinstance(inner, Mapping):
        raise Permanent(
            f"record {number} of the Kinesis batch has no 'kinesis' object: all of the batch comes again"
        )
    sequence = _text(number, inner, "sequenceNumber")
    if not re.fullmatch(r"[0-9]{1,128}", sequence):
        raise Permanent(f"record {number} has the sequence number {sequence!r:.60}, which is no number")
    data = _text(number, inner, "data", empty=True)
    try:
        body = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        body = b""  # refused as every empty message is: it has a name, so the others need not suffer
    return Message(sequence, body, _text(number, inner, "partitionKey", empty=True))


def _text(number: int, record: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not (value or empty):
        raise Permanent(
            f"record {number} of the batch has no {name}: it cannot be answered for, all come again"
        )
    return value


def _count(text: Any) -> int:
    return int(text) if isinstance(text, str) and re.fullmatch(r"[0-9]{1,9}", text) and int(text) else 1


# --------------------------------------------------------------------------- messages


def understand(body: str | bytes, lane: str) -> Event | Start:
    """What a message of that `body` wants of `lane`: an event that claims to be the lane's own (whether its
    unit exists, the log knows), or a run.

    Raises:
        Permanent: it is neither, and will not become it by being delivered again.
    """
    if not body:
        raise Permanent(f"the message is empty or not base64: {_ABOUT}")
    if isinstance(body, bytes) and body.startswith(_KPL):
        raise Permanent(f"{_LATER}records aggregated by the Kinesis Producer Library: turn aggregation off")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Permanent(f"the message is not JSON ({error}): {_ABOUT}") from None
    if not isinstance(value, dict):
        raise Permanent(f"the message is a JSON {_kind(value)}, not an object: {_ABOUT}")
    if "specversion" in value:
        return _cloud_event(value, body, lane)
    if "detail-type" in value:
        return _event_bridge(value)
    raise Permanent(_unknown(value))


def understand_direct(payload: Mapping[str, Any], lane: str) -> Event | Start:
    """As ``understand``, for what the function was invoked with itself."""
    try:
        return understand(msgspec.json.encode(payload), lane)
    except (TypeError, UnicodeError, RecursionError, msgspec.EncodeError) as error:
        raise Permanent(f"the Lambda event is not JSON ({error}): {_ABOUT}") from None


def start(value: dict[str, Any]) -> Start:
    """The run that a CloudEvent triggers. Its slot is source and id, which together name one event
    (CloudEvents 1.0.2, "Required Attributes"): whoever delivers it again finds the run open."""
    source, name = (quote(value[part], safe="/:+", errors="surrogatepass") for part in ("source", "id"))
    return Start(f"{source},{name}", "event", value)


def restart(event: Event) -> Start:
    """The run that a ``lane.triggered`` asks for that the lane's log does not hold."""
    return start(msgspec.to_builtins(msgspec.structs.replace(event, data=msgspec.json.decode(event.data))))


def _cloud_event(value: dict[str, Any], body: str | bytes, lane: str) -> Event | Start:
    if value["specversion"] != "1.0":
        raise Permanent(f"a CloudEvent of specversion {value['specversion']!r:.20}: only 1.0 is understood")
    for name in ("id", "source", "type"):
        if not isinstance(value.get(name), str) or not value[name]:
            raise Permanent(f"a CloudEvent without {name!r}, which must be a non-empty string")
    if value["source"] != lane:
        return start(value)
    try:
        return events.decode(body)
    except Permanent:
        if value["type"] == events.LANE_TRIGGERED:
            return start(value)
        raise


def _event_bridge(value: dict[str, Any]) -> Start:
    kind, source, time = value["detail-type"], value.get("source"), value.get("time")
    if kind != "Scheduled Event" or source not in ("aws.events", "aws.scheduler"):
        raise Permanent(f"{_LATER}EventBridge events of {source!r:.60} ({kind!r:.60}); scheduled ones are")
    try:
        slot = events_time(datetime.fromisoformat(time)) if isinstance(time, str) else ""
    except (ValueError, OverflowError):
        slot = ""
    if not slot:
        raise Permanent("a scheduled event without a 'time' (RFC 3339): it names no slot")
    return Start(slot, "schedule", value)


def _unknown(value: dict[str, Any]) -> str:
    if value.get("Type") == "Notification" and "TopicArn" in value:
        return f"{_LATER}notifications by SNS; {_ABOUT}"
    if "Records" in value or value.get("Event") == "s3:TestEvent":
        return f"{_LATER}notifications by S3; {_ABOUT}"
    return f"an object that is no CloudEvent (it has no 'specversion'): {_ABOUT}"


def _kind(value: Any) -> str:
    kinds = {
        str: "string",
        list: "array",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return kinds.get(type(value), "value")
