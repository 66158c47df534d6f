"""What a message, or an event that the function is invoked with, wants of the lane; without I/O.

AWS wraps events into each other (S3 in SNS in SQS): wrappings are taken off, and what is inside opens a run.
A run's slot is the natural id of what is inside, so whatever AWS delivers twice, by whichever way, finds its
run open.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final, Literal
from urllib.parse import quote, unquote

import msgspec

from flowlane import events
from flowlane.aws_lambda.refusals import ABOUT, refusal
from flowlane.aws_lambda.s3 import told
from flowlane.errors import Permanent
from flowlane.events import Event, Reference
from flowlane.lane import events_time

#: Wrappings within each other; AWS offers no way to have more.
_NESTED: Final = 6
_GZIP: Final = b"\x1f\x8b"
_COMMANDS: Final = "sweep, run and reference"


class Start(msgspec.Struct, frozen=True):
    """A run is to be opened, named by `slot`; `event` is what its stages find as ``event.data.event``."""

    slot: str
    by: Literal["event", "schedule"]
    event: dict[str, Any]


class Sweep(msgspec.Struct, frozen=True):
    """The lane is to be swept."""


#: An event that claims to be the lane's own (whether its unit exists, the log knows), or where in the log it
#: stands; a run; a sweep.
Wanted = Event | Reference | Start | Sweep


def understand(body: str | bytes, lane: str) -> list[Wanted]:
    """What a message of that `body` wants of `lane`, in order; nothing, if all that it says is that somebody
    tests or controls what will send messages.

    Raises:
        Permanent: it makes no sense, and will not by being delivered again.
    """
    if isinstance(body, bytes) and body.startswith(_GZIP):
        body = _inflated(body)
    if not body:
        raise Permanent(f"the message is empty or not base64: {ABOUT}")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Permanent(f"the message is not JSON ({error}): {ABOUT}") from None
    if not isinstance(value, dict):
        raise Permanent(f"the message is a JSON {kind_of(value)}, not an object: {ABOUT}")
    return _wanted(value, body, lane, _NESTED)


def understand_direct(payload: Mapping[str, Any], lane: str) -> list[Wanted]:
    """As ``understand``, for what the function was invoked with itself."""
    try:
        return understand(msgspec.json.encode(payload), lane)
    except (TypeError, UnicodeError, RecursionError, msgspec.EncodeError) as error:
        raise Permanent(f"the Lambda event is not JSON ({error}): {ABOUT}") from None


def start(value: dict[str, Any]) -> Start:
    """The run that a CloudEvent triggers. Its slot is source and id, which together name one event
    (CloudEvents 1.0.2, "Required Attributes"): whoever delivers it again finds the run open."""
    return Start(_slot(value["source"], value["id"]), "event", value)


def restart(event: Event) -> Start:
    """The run that a ``lane.triggered`` asks for that the lane's log does not hold."""
    return start(msgspec.to_builtins(msgspec.structs.replace(event, data=msgspec.json.decode(event.data))))


# --------------------------------------------------------------------------- wrappings


def _wanted(value: dict[str, Any], raw: str | bytes, lane: str, depth: int) -> list[Wanted]:
    if "specversion" in value:
        return [_cloud_event(value, raw, lane)]
    if "flowlane" in value:
        return [_command(value)]
    if isinstance(value.get("detail-type"), str):
        return [_bridge(value)]
    if value.get("Type") == "Notification" and "TopicArn" in value:
        return _sns(value, lane, depth)
    if isinstance(records := value.get("Records"), list):
        return [
            wanted for number, each in enumerate(records) for wanted in _record(number, each, lane, depth)
        ]
    if isinstance(value.get("dynamodb"), Mapping) and value.get("eventSource") == "aws:dynamodb":
        return [_dynamodb(value)]
    if value.get("Event") == "s3:TestEvent":
        return []  # sent once when a notification is set up (S3 user guide, "Event message structure")
    if value.get("messageType") in ("CONTROL_MESSAGE", "DATA_MESSAGE") and "logGroup" in value:
        return _logs(value)
    raise Permanent(refusal(value))


def _record(number: int, record: Any, lane: str, depth: int) -> list[Wanted]:
    """A record of a list in which none has a name that could be answered: of S3, or of SNS."""
    if isinstance(record, dict) and isinstance(record.get("s3"), Mapping):
        return [_s3(record)]
    if isinstance(record, dict) and isinstance(record.get("Sns"), dict):
        return _sns(record["Sns"], lane, depth)
    raise Permanent(f"record {number} has neither an 's3' nor an 'Sns' object: {ABOUT}")


def _sns(notification: dict[str, Any], lane: str, depth: int) -> list[Wanted]:
    """What the notification's text is about if it is an event by itself; else the notification itself."""
    text = notification.get("Message")
    try:
        inner = msgspec.json.decode(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):  # any text may be published
        inner = None
    if depth > 1 and isinstance(text, str) and isinstance(inner, dict) and _is_event(inner):
        return _wanted(inner, text, lane, depth - 1)
    topic, name = _named(notification, "a notification of SNS", "TopicArn", "MessageId")
    return [Start(_slot("sns", topic, name), "event", notification)]


def _is_event(value: dict[str, Any]) -> bool:
    """Whether `value` is in a form that this module knows, well made or not."""
    if isinstance(records := value.get("Records"), list):
        return all(isinstance(each, dict) and ("s3" in each or "Sns" in each) for each in records)
    return (
        not {"specversion", "flowlane"}.isdisjoint(value)
        or ("detail-type" in value and "source" in value)
        or ("TopicArn" in value and "Type" in value)
        or value.get("Event") == "s3:TestEvent"
    )


def _inflated(body: bytes) -> bytes:
    """What the gzip body holds, which is read no further than an event may be long."""
    decompress = zlib.decompressobj(wbits=31)
    try:
        text = decompress.decompress(body, events.MAX_EVENT_BYTES + 1)
    except zlib.error as error:
        raise Permanent(f"the message begins as gzip and is none ({error}): send it again, whole") from None
    if len(text) > events.MAX_EVENT_BYTES:
        raise Permanent(
            f"the message holds more than {events.MAX_EVENT_BYTES:,} bytes, packed as gzip: "
            "put the bulk into a store and its URL into the event"
        )
    if not decompress.eof or decompress.unused_data:
        raise Permanent(
            "the message is gzip that is cut, or has something behind its end: send it again, whole"
        )
    return text


# --------------------------------------------------------------------------- what is inside


def _cloud_event(value: dict[str, Any], raw: str | bytes, lane: str) -> Event | Start:
    if value["specversion"] != "1.0":
        raise Permanent(f"a CloudEvent of specversion {value['specversion']!r:.20}: only 1.0 is understood")
    _named(value, "a CloudEvent", "id", "source", "type")
    if value["source"] != lane:
        return start(value)
    try:
        return events.decode(raw)
    except Permanent:
        if value["type"] == events.LANE_TRIGGERED:
            return start(value)
        raise


def _command(value: dict[str, Any]) -> Reference | Start | Sweep:
    """What is told to flowlane itself: by its queues, by a schedule's own input, by hand."""
    if value["flowlane"] == "sweep":
        return Sweep()
    if value["flowlane"] == "run":
        return _scheduled(value, 'an input {"flowlane": "run"}')
    if value["flowlane"] == "reference":
        try:
            return msgspec.convert(value, Reference)
        except msgspec.ValidationError as error:
            raise Permanent(f"a reference to an event in the log that makes no sense: {error}") from None
    raise Permanent(f"flowlane knows no {value['flowlane']!r:.60}, only {_COMMANDS}")


def _bridge(value: dict[str, Any]) -> Start | Sweep:
    detail = value.get("detail")
    if isinstance(detail, str):  # EventBridge Scheduler sends its default as the text "{}"
        try:
            detail = msgspec.json.decode(detail)
        except (ValueError, RecursionError):
            detail = None
    if isinstance(detail, dict) and detail.get("flowlane") == "sweep":
        return Sweep()
    if value["detail-type"] == "Scheduled Event" and value.get("source") in ("aws.events", "aws.scheduler"):
        return _scheduled(value, "a scheduled event")
    if value.get("source") == "aws.s3" and value["detail-type"] in ("Object Created", "Object Deleted"):
        return _s3(value)
    return Start(_slot("eventbridge", *_named(value, "an EventBridge event", "source", "id")), "event", value)


def _scheduled(value: dict[str, Any], what: str) -> Start:
    time = value.get("time")
    try:
        slot = events_time(datetime.fromisoformat(time)) if isinstance(time, str) else ""
    except (ValueError, OverflowError):
        slot = ""
    if not slot:
        raise Permanent(f"{what} without a 'time' (RFC 3339): it names no slot")
    return Start(slot, "schedule", value)


def _s3(record: dict[str, Any]) -> Start:
    """A change of an object is named by its sequencer, the same whichever way it is told."""
    found = told(record)
    named: tuple[str, ...]
    if found is None:
        raise Permanent("an event of S3 without the names of bucket and object: nothing can be found by it")
    if found.change in ("created", "removed") and found.sequencer:
        named = (found.change, found.version, found.etag.strip('"'), found.sequencer)
    else:  # no other change is promised to have one of its own
        elements = record.get("responseElements")
        request = elements.get("x-amz-request-id") if isinstance(elements, Mapping) else ""
        named = (str(record.get("eventName")), str(record.get("eventTime")), str(request))
    return Start(_slot("s3", unquote(found.url.removeprefix("s3://")), *named), "event", record)


def _dynamodb(record: dict[str, Any]) -> Start:
    """A change of an item is named by its event id, or by its sequence number in its stream."""
    change = record["dynamodb"]
    name = record.get("eventID") or change.get("SequenceNumber")
    source = record.get("eventSourceARN") or record.get("tableName")  # the second by way of Kinesis
    if not isinstance(name, str) or not isinstance(source, str):
        raise Permanent("a record of DynamoDB Streams without eventID and eventSourceARN: it names no run")
    return Start(_slot("dynamodb", source, name), "event", record)


def _logs(value: dict[str, Any]) -> list[Wanted]:
    """Log lines as CloudWatch Logs sends them to Kinesis; now and then it sends only that it can."""
    if value["messageType"] == "CONTROL_MESSAGE":
        return []
    digest = blake2b(msgspec.json.encode(value, order="sorted"), digest_size=16).hexdigest()
    return [Start(_slot("logs", str(value["logGroup"]), str(value.get("logStream")), digest), "event", value)]


def _named(value: Mapping[str, Any], what: str, *names: str) -> list[str]:
    """The members `names`, which make up the id of `what`."""
    for name in names:
        if not isinstance(value.get(name), str) or not value[name]:
            raise Permanent(f"{what} without {name!r}, which must be a non-empty string")
    return [value[name] for name in names]


def _slot(*parts: str) -> str:
    """A name that no other `parts` have: those of a CloudEvent are two, of others three or more."""
    return ",".join(quote(part, safe="/:+", errors="surrogatepass") for part in parts)


def kind_of(value: Any) -> str:
    """What JSON calls `value`."""
    kinds = {
        str: "string",
        list: "array",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return kinds.get(type(value), "value")
