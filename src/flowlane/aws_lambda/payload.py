"""What a Lambda payload holds: its messages, under the names by which AWS knows them; without I/O.

An envelope that cannot be understood is refused as a whole, since nothing could be named in the answer; a
message that cannot be understood is that message's own failure (see ``wanted``).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from flowlane.aws_lambda.refusals import ABOUT
from flowlane.aws_lambda.wanted import kind_of
from flowlane.errors import Permanent
from flowlane.streams import kpl

#: Sources of which AWS goes back to the lowest sequence number named.
STREAMS: Final = ("kinesis", "dynamodb")
#: Sources that invoke a function with records that the answer cannot name: as a whole they are one event.
_UNNAMED: Final = ("aws:s3", "aws:sns")


class Message(msgspec.Struct, frozen=True):
    """One message of a batch: ``id`` names it in the answer, verbatim; ``group`` is what its order is kept
    within (a FIFO queue's message group, Kinesis' partition key, a DynamoDB item's key); ``attempt`` counts
    its receives, from 1; ``receipt`` is what a queue knows this one by. Those that one Kinesis record held
    together share its name, and ``sub`` counts them, from 0; ``partition`` is the number of its shard."""

    id: str
    body: str | bytes
    group: str = ""
    attempt: int = 1
    receipt: str = ""
    partition: int = 0
    sub: int = 0


class Batch(msgspec.Struct, frozen=True):
    """The messages of one queue, or of one shard, in the order in which they came. ``queue`` is the ARN of an
    SQS queue, ``stream`` the name of a Kinesis stream. ``state``: what a tumbling window has come to
    (``None``: there is no window); the answer gives it back, since a lane keeps its own state in its log."""

    kind: Literal["standard", "fifo", "kinesis", "dynamodb"]
    messages: list[Message]
    queue: str = ""
    state: dict[str, Any] | None = None
    stream: str = ""

    def attempt(self, index: int) -> int:
        """How often message number `index` was received, as far as that is known. Of a stream it is not; but
        a record that comes alone may be one that its mapping has split off (``BisectBatchOnFunctionError``),
        because it ends the function whenever it comes: as of its second time, an attempt is counted before it
        begins."""
        if self.kind in STREAMS and len({message.id for message in self.messages}) == 1:
            return 2
        return self.messages[index].attempt

    def sequences(self) -> list[list[int]]:
        """The numbers of the messages, grouped into what must be handled one after the other."""
        if self.kind == "standard":
            return [[index] for index in range(len(self.messages))]
        groups: dict[str, list[int]] = {}
        for index, message in enumerate(self.messages):
            groups.setdefault(message.group, []).append(index)
        return list(groups.values())


def batch(payload: Any) -> Batch | None:
    """The messages in `payload`; ``None`` if it is not a batch but an event of its own (a direct invoke).

    Raises:
        Permanent: it is nothing that flowlane understands, or a record lacks what names it in the answer.
    """
    if not isinstance(payload, Mapping):
        raise Permanent(f"the Lambda event is a JSON {kind_of(payload)}, not an object: {ABOUT}")
    if "Records" not in payload and "isFinalInvokeForWindow" not in payload:
        return None
    records = payload.get("Records", [])
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise Permanent(
            "the Lambda event's Records are no list of objects: no message can be named, all come again"
        )
    state = _state(payload)
    if not records:
        return Batch("standard", [], state=state)
    source = _source(records)
    if source in _UNNAMED:
        return None
    if source == "aws:sqs":
        return _sqs(records)
    if source == "aws:kinesis":
        unpacked = [one for number, record in enumerate(records) for one in _kinesis(number, record)]
        return Batch("kinesis", unpacked, state=state, stream=_stream(records[0]))
    if source == "aws:dynamodb":
        return Batch(
            "dynamodb", [_dynamodb(number, record) for number, record in enumerate(records)], state=state
        )
    raise Permanent(
        f"the Lambda event has records of unknown source {source!r:.60}: SQS, Kinesis, DynamoDB Streams, S3 "
        "and SNS are understood"
    )


def _source(records: list[Mapping[str, Any]]) -> str:
    sources = {str(record.get("eventSource") or record.get("EventSource")) for record in records}
    if len(sources) > 1:
        named = ", ".join(f"{name!r:.60}" for name in sorted(sources)[:4])
        raise Permanent(f"the Lambda event mixes records of {named}: no such batch is known")
    return sources.pop()


def _state(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of a tumbling window (Lambda developer guide, "Stateful processing"): an object, at first an
    empty one."""
    if "window" not in payload and "isFinalInvokeForWindow" not in payload:
        return None
    state = payload.get("state")
    return dict(state) if isinstance(state, Mapping) else {}


def _sqs(records: list[Mapping[str, Any]]) -> Batch:
    queues = [_text(n, record, "eventSourceARN") for n, record in enumerate(records)]
    fifo = [queue.endswith(".fifo") for queue in queues]
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
                receipt=receipt if isinstance(receipt := record.get("receiptHandle"), str) else "",
            )
        )
    return Batch("fifo" if any(fifo) else "standard", messages, queues[0])


def _kinesis(number: int, record: Mapping[str, Any]) -> list[Message]:
    inner = record.get("kinesis")
    if not isinstance(inner, Mapping):
        raise Permanent(
            f"record {number} of the Kinesis batch has no 'kinesis' object: all of the batch comes again"
        )
    sequence = _sequence(number, inner, "sequenceNumber")
    key = _text(number, inner, "partitionKey", empty=True)
    data = _text(number, inner, "data", empty=True)
    try:
        body = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        body = b""  # refused as every empty message is: it has a name, so the others need not suffer
    shard = _shard(record)
    unpacked = kpl.unpack(body)
    if unpacked is None:
        return [Message(sequence, body, key, partition=shard)]
    return [
        Message(sequence, one.data, one.key, partition=shard, sub=sub) for sub, one in enumerate(unpacked)
    ]


def _stream(record: Mapping[str, Any]) -> str:
    """The name of the stream that a record is of; empty if it is not told."""
    # arn:aws:kinesis:region:account:stream/name, and of a consumer .../consumer/its-name:created
    found = re.fullmatch(r"arn:[^:]+:kinesis:[^/]*:stream/([^/]+)(/.*)?", str(record.get("eventSourceARN")))
    return found[1] if found else ""


def _shard(record: Mapping[str, Any]) -> int:
    """The number of the shard that a record is of; 0 if it is not told."""
    found = re.match(r"shardId-([0-9]{1,18}):", str(record.get("eventID")))
    return int(found[1]) if found else 0


def _dynamodb(number: int, record: Mapping[str, Any]) -> Message:
    inner = record.get("dynamodb")
    if not isinstance(inner, Mapping):
        raise Permanent(
            f"record {number} of the DynamoDB batch has no 'dynamodb' object: all of the batch comes again"
        )
    sequence = _sequence(number, inner, "SequenceNumber")
    try:
        body = msgspec.json.encode(record)
        group = msgspec.json.encode(inner.get("Keys"), order="sorted").decode()
    except (TypeError, UnicodeError, RecursionError, msgspec.EncodeError):
        body, group = b"", ""  # as above
    return Message(sequence, body, group)


def _sequence(number: int, record: Mapping[str, Any], name: str) -> str:
    sequence = _text(number, record, name)
    if not re.fullmatch(r"[0-9]{1,128}", sequence):
        raise Permanent(f"record {number} has the sequence number {sequence!r:.60}, which is no number")
    return sequence


def _text(number: int, record: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not (value or empty):
        raise Permanent(
            f"record {number} of the batch has no {name}: it cannot be answered for, all come again"
        )
    return value


def _count(text: Any) -> int:
    return int(text) if isinstance(text, str) and re.fullmatch(r"[0-9]{1,9}", text) and int(text) else 1
