"""What messages are taken for, wrapped in each other or not, and what is refused with which words."""

from __future__ import annotations

import gzip
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlane.aws_lambda.payload import batch
from flowlane.aws_lambda.refusals import REFUSALS, refusal
from flowlane.aws_lambda.wanted import Start, Sweep, understand, understand_direct
from flowlane.errors import Permanent
from flowlane.events import MAX_EVENT_BYTES, Event, encode, encode_data, refer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OWN = Event("e1", "toy", "thing", "toy/thing/1", "2024-01-01T00:00:00Z", msgspec.Raw(b'{"n":1}'), 1)
CLOUD = {"specversion": "1.0", "id": "7", "source": "/shop", "type": "order.placed"}
SCHEDULED = {"detail-type": "Scheduled Event", "source": "aws.events", "time": "2024-05-01T12:00:00Z"}
BRIDGE = {"detail-type": "Order Placed", "source": "shop", "id": "7", "detail": {}}
LOGS = {"messageType": "DATA_MESSAGE", "logGroup": "/g", "logStream": "s", "logEvents": [{"id": "1"}]}
TEST = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "b"}


def s3(
    key: str = "a+b%2B", sequencer: str = "0A", name: str = "ObjectCreated:Put", **inner: Any
) -> dict[str, Any]:
    """A record of S3."""
    about = {"key": key, "size": 3, "eTag": "e", "sequencer": sequencer, **inner}
    return {"eventSource": "aws:s3", "eventName": name, "s3": {"bucket": {"name": "bucket"}, "object": about}}


def bridged(key: str = "a b+", kind: str = "Object Created", **more: Any) -> dict[str, Any]:
    """The EventBridge event of the same."""
    about = {"key": key, "size": 3, "etag": "e", "sequencer": "0A"}
    detail = {"bucket": {"name": "bucket"}, "object": about}
    return {"detail-type": kind, "source": "aws.s3", "id": "i", "detail": detail, **more}


def sns(message: Any, **more: Any) -> dict[str, Any]:
    """A notification of SNS, as it stands in SQS and in ``Sns``."""
    text = message if isinstance(message, str) else json.dumps(message)
    return {"Type": "Notification", "MessageId": "n", "TopicArn": "arn:t", "Message": text, **more}


def slots(value: Any) -> list[str]:
    """The runs that it opens."""
    found = understand_direct(value, "toy")
    assert all(isinstance(wanted, Start) for wanted in found)
    return [wanted.slot for wanted in found if isinstance(wanted, Start)]


# --------------------------------------------------------------------------- CloudEvents


def test_an_event_of_the_lane_is_taken_for_one() -> None:
    assert understand(encode(OWN), "toy") == [OWN]
    assert understand(encode(OWN).decode(), "toy") == [OWN]


def test_a_reference_to_an_event_of_the_log_is_taken_for_one() -> None:
    body = encode_data(refer(OWN))
    assert json.loads(body) == {"flowlane": "reference", "stream": "toy/thing/1", "version": 1, "id": "e1"}
    assert understand(body, "toy") == [refer(OWN)]


def test_any_other_cloud_event_triggers_a_run_named_by_source_and_id() -> None:
    assert understand(msgspec.json.encode(CLOUD), "toy") == [Start("/shop,7", "event", CLOUD)]
    triggered = {**CLOUD, "source": "toy", "type": "lane.triggered"}
    for body in (encode(OWN), msgspec.json.encode(triggered)):
        (wanted,) = understand(body, "other" if body == encode(OWN) else "toy")
        assert isinstance(wanted, Start)


@settings(deadline=None)
@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_different_events_never_share_a_slot(source: str, name: str, source2: str, name2: str) -> None:
    def slot(source: str, name: str) -> list[str]:
        return slots({**CLOUD, "source": source, "id": name})

    assert (slot(source, name) == slot(source2, name2)) == ((source, name) == (source2, name2))


# --------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("time", "slot"),
    [("2024-05-01T12:00:00Z", "2024-05-01T12:00:00Z"), ("2024-05-01T14:00:00+02:00", "2024-05-01T12:00:00Z")],
)
@pytest.mark.parametrize(
    "value",
    [
        {**SCHEDULED, "detail": {}, "id": "i"},
        {**SCHEDULED, "source": "aws.scheduler", "detail": "{}", "id": "i"},
        {**SCHEDULED, "source": "aws.scheduler", "detail": "not JSON", "id": "i"},
        {"flowlane": "run"},
    ],
)
def test_a_schedule_triggers_the_run_of_its_time(value: dict[str, Any], time: str, slot: str) -> None:
    value = {**value, "time": time}
    assert understand_direct(value, "toy") == [Start(slot, "schedule", value)]


@pytest.mark.parametrize(
    "value",
    [
        {"flowlane": "sweep"},
        {**SCHEDULED, "detail": {"flowlane": "sweep"}},
        {**SCHEDULED, "source": "aws.scheduler", "detail": '{"flowlane": "sweep"}'},
        {**BRIDGE, "detail": {"flowlane": "sweep"}},
    ],
)
def test_a_sweep_is_asked_for(value: dict[str, Any]) -> None:
    assert understand_direct(value, "toy") == [Sweep()]


# --------------------------------------------------------------------------- S3


def test_a_change_of_an_object_opens_one_run_whichever_way_it_is_told() -> None:
    record = s3()
    both = {"Records": [record]}
    ways: list[Any] = [
        both,
        sns(both),
        {"Records": [{"EventSource": "aws:sns", "Sns": sns(both)}]},
        sns(sns(both)),
        bridged(),
        sns(bridged()),
    ]
    assert {tuple(slots(way)) for way in ways} == {("s3,bucket/a%20b+,created,,e,0A",)}
    for way in ways[:4]:
        assert understand_direct(way, "toy") == [Start("s3,bucket/a%20b+,created,,e,0A", "event", record)]


def test_several_records_are_several_runs_in_their_order() -> None:
    value = {"Records": [s3("x"), s3("y"), s3("x", "0B")]}
    assert slots(value) == [
        "s3,bucket/x,created,,e,0A",
        "s3,bucket/y,created,,e,0A",
        "s3,bucket/x,created,,e,0B",
    ]
    assert slots(sns(value)) == slots(value)


SAME = s3("x")
OTHERS = [
    s3("y"),
    s3("x", "0B"),
    s3("x", eTag="f"),
    s3("x", versionId="v"),
    s3("x", name="ObjectRemoved:Delete"),
    s3("x", name="ObjectTagging:Put"),
    s3("x,created,,e,0A"),
    {**s3("x"), "s3": {**s3("x")["s3"], "bucket": {"name": "bucket2"}}},
]


def test_different_changes_are_different_runs_and_a_redelivery_is_the_same() -> None:
    named = [slots({"Records": [record]})[0] for record in [SAME, *OTHERS]]
    assert len(set(named)) == len(named)
    again = {**SAME, "eventTime": "later", "s3": {**SAME["s3"], "configurationId": "another"}}
    assert slots({"Records": [again]}) == named[:1]


def test_a_change_without_a_sequencer_is_named_by_its_time_and_request() -> None:
    def slot(time: str, request: str) -> list[str]:
        told = {"eventTime": time, "responseElements": {"x-amz-request-id": request}}
        return slots({"Records": [{**s3("x", name="ObjectTagging:Put"), **told}]})

    assert slot("t", "r") == slot("t", "r") == ["s3,bucket/x,ObjectTagging:Put,t,r"]
    assert slot("t", "r") != slot("t", "q")
    assert slot("t", "r") != slot("u", "r")


def test_other_events_of_s3_by_eventbridge_are_named_by_their_id() -> None:
    assert slots(bridged(kind="Object Restore Completed")) == ["eventbridge,aws.s3,i"]


@pytest.mark.parametrize("value", [TEST, sns(TEST), {"Records": [{"Sns": sns(TEST)}]}])
def test_the_test_event_of_s3_opens_nothing(value: Any) -> None:
    assert understand_direct(value, "toy") == []


# --------------------------------------------------------------------------- the others


def test_a_notification_of_anything_else_is_an_event_itself() -> None:
    for text in (
        "Hello!",
        "",
        "[1]",
        '{"message": "hello"}',
        '{"records": []}',
        "{",
        '{"Records": [{"a": 1}]}',
    ):
        value = sns(text)
        assert understand_direct(value, "toy") == [Start("sns,arn:t,n", "event", value)]
    assert slots(sns(CLOUD)) == ["/shop,7"]
    assert understand_direct(sns(encode(OWN).decode()), "toy") == [OWN]
    assert slots(sns(BRIDGE)) == ["eventbridge,shop,7"]


def test_notifications_within_each_other_are_unwrapped_so_far_and_no_further() -> None:
    value = sns("innermost", MessageId="0")
    for number in range(1, 10):
        value = sns(value, MessageId=str(number))
    assert slots(value) == ["sns,arn:t,4"]


def test_an_event_of_any_source_on_eventbridge_triggers_a_run_named_by_source_and_id() -> None:
    assert understand_direct(BRIDGE, "toy") == [Start("eventbridge,shop,7", "event", BRIDGE)]
    assert slots({**BRIDGE, "replay-name": "r"}) == ["eventbridge,shop,7"], "a replayed event is the same one"
    assert slots({**BRIDGE, "source": "aws.ec2"}) != slots(BRIDGE)


def test_a_change_of_an_item_is_named_by_its_event_id() -> None:
    change = {"SequenceNumber": "111", "Keys": {}}
    value = {"eventSource": "aws:dynamodb", "eventID": "i", "eventSourceARN": "arn:s", "dynamodb": change}
    assert understand_direct(value, "toy") == [Start("dynamodb,arn:s,i", "event", value)]
    assert slots({**value, "eventID": None}) == ["dynamodb,arn:s,111"]
    by_kinesis = {"eventSource": "aws:dynamodb", "eventID": "i", "tableName": "table", "dynamodb": change}
    assert slots(by_kinesis) == ["dynamodb,table,i"]


def test_log_lines_that_come_packed_are_an_event_and_control_messages_are_none() -> None:
    packed = gzip.compress(json.dumps(LOGS).encode())
    (wanted,) = understand(packed, "toy")
    assert isinstance(wanted, Start)
    assert wanted.event == LOGS
    assert understand(gzip.compress(json.dumps(dict(reversed(LOGS.items()))).encode()), "toy") == [
        Start(wanted.slot, "event", LOGS)
    ]
    other = {**LOGS, "logEvents": [{"id": "2"}]}
    assert understand(gzip.compress(json.dumps(other).encode()), "toy") != [wanted]
    assert (
        understand(gzip.compress(json.dumps({**LOGS, "messageType": "CONTROL_MESSAGE"}).encode()), "toy")
        == []
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (gzip.compress(b"x" * (MAX_EVENT_BYTES + 1)), "more than 262,144 bytes, packed as gzip"),
        (gzip.compress(bytes(1 << 22)), "more than 262,144 bytes"),
        (gzip.compress(b"{}")[:-1], "gzip that is cut"),
        (gzip.compress(b"{}") + b"more", "gzip that is cut, or has"),
        (b"\x1f\x8bnothing of the kind", "begins as gzip and is none"),
        (gzip.compress(b""), "empty"),
        (gzip.compress(b"text"), "not JSON"),
    ],
    ids=["long", "bomb", "cut", "longer", "none", "empty", "text"],
)
def test_packed_messages_that_are_none(body: bytes, words: str) -> None:
    with pytest.raises(Permanent, match=words):
        understand(body, "toy")


# --------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "empty or not base64"),
        ("Test message.", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "a JSON string"),
        ("[]", "a JSON array"),
        ('{"message": "foo1"}', "no CloudEvent"),
        ('{"specversion": "0.3"}', "specversion '0.3'"),
        ('{"specversion": "1.0", "id": "", "source": "s", "type": "t"}', "without 'id'"),
        ('{"specversion": "1.0", "id": "1", "type": "t"}', "without 'source'"),
        ('{"specversion": "1.0", "id": "1", "source": "toy", "type": "t"}', "not a CloudEvents 1.0 event"),
        ('{"flowlane": "reference", "stream": "s"}', "makes no sense: .*version"),
        ('{"flowlane": "reference", "stream": 1, "version": 1, "id": "i"}', "makes no sense: .*str"),
        ('{"flowlane": ["run"]}', "flowlane knows no"),
        ('{"flowlane": "run"}', "without a 'time'"),
        ('{"flowlane": "run", "time": "<aws.scheduler.scheduled-time>"}', "without a 'time'"),
        ('{"Type": "Notification", "TopicArn": "t", "Message": "m"}', "without 'MessageId'"),
        ('{"Type": "Notification", "TopicArn": 1, "Message": "m"}', "without 'TopicArn'"),
        ('{"Records": [{"s3": {}}]}', "without the names of bucket and object"),
        ('{"Records": [{"eventSource": "aws:sqs", "body": "{}"}]}', "record 0 has neither"),
        ('{"Records": [7]}', "record 0 has neither"),
        ('{"detail-type": "Object Created", "source": "aws.s3", "detail": {}}', "names of bucket and object"),
        ('{"detail-type": "Object Created", "source": "aws.s3", "detail": []}', "names of bucket and object"),
        ('{"detail-type": "Scheduled Event", "source": "me"}', "an EventBridge event without 'id'"),
        ('{"detail-type": "T", "id": "i"}', "an EventBridge event without 'source'"),
        ('{"detail-type": "Scheduled Event", "source": "aws.events", "time": "noon"}', "without a 'time'"),
        ('{"eventSource": "aws:dynamodb", "dynamodb": {}}', "without eventID"),
        ('{"awslogs": {"data": ""}}', "a CloudWatch Logs subscription"),
        ('{"Error": "E", "Cause": "C"}', "an error of Step Functions"),
    ],
)
def test_a_message_that_says_nothing_is_refused_with_its_reason(body: str | bytes, words: str) -> None:
    with pytest.raises(Permanent, match=words) as caught:
        understand(body, "toy")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("known", REFUSALS, ids=lambda known: ",".join(known.has))
def test_every_refusal_says_what_why_and_what_instead(known: Any) -> None:
    value: dict[str, Any] = {}
    for name in known.has:
        outer, _, inner = name.partition(".")
        value[outer] = {inner: {}} if inner else {}
    said = refusal(value)
    assert said == f"{known.what} is not served, because {known.why}: {known.instead}"
    assert len(said) < 300
    with pytest.raises(Permanent, match="is not served, because"):
        understand_direct(value, "toy")
    del value[known.has[-1].partition(".")[0]]
    assert refusal(value) != said


@settings(deadline=None)
@given(st.binary() | st.text() | JSON.map(msgspec.json.encode))
def test_no_message_does_anything_but_be_understood_or_refused(body: str | bytes) -> None:
    try:
        understand(body, "toy")
    except Permanent:
        return


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(Permanent, match="not JSON"):
        understand_direct({"specversion": "1.0", "id": "\ud800"}, "toy")
    assert batch({"specversion": "1.0"}) is None
