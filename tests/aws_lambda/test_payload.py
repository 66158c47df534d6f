"""What payloads are taken for, and what is refused with which words."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlane.aws_lambda.payload import Start, batch, understand, understand_direct
from flowlane.errors import Permanent
from flowlane.events import Event, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SQS = {"messageId": "m", "body": "{}", "eventSource": "aws:sqs", "eventSourceARN": "arn:q", "attributes": {}}
KINESIS = {
    "kinesis": {"sequenceNumber": "7", "partitionKey": "", "data": "e30="},
    "eventSource": "aws:kinesis",
}
OWN = Event("e1", "toy", "thing", "toy/thing/1", "2024-01-01T00:00:00Z", msgspec.Raw(b'{"n":1}'), 1)
CLOUD = {"specversion": "1.0", "id": "7", "source": "/shop", "type": "order.placed"}


def test_a_batch_of_sqs() -> None:
    record = {**SQS, "attributes": {"ApproximateReceiveCount": "3", "MessageGroupId": "tenant"}}
    standard = batch({"Records": [record]})
    assert standard is not None
    assert standard.kind == "standard"
    assert [(m.id, m.body, m.group, m.attempt) for m in standard.messages] == [("m", "{}", "", 3)]
    fifo = batch({"Records": [{**record, "eventSourceARN": "arn:q.fifo"}]})
    assert fifo is not None
    assert fifo.kind == "fifo"
    assert fifo.messages[0].group == "tenant"


def test_a_batch_of_kinesis() -> None:
    found = batch({"Records": [KINESIS]})
    assert found is not None
    assert found.kind == "kinesis"
    assert [(m.id, m.body, m.group) for m in found.messages] == [("7", b"{}", "")]


def test_no_records_are_an_empty_batch_and_no_key_is_no_batch() -> None:
    empty = batch({"Records": []})
    assert empty is not None
    assert empty.messages == []
    assert batch({"detail-type": "Scheduled Event"}) is None


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (None, "a JSON null, not an object"),
        ("text", "a JSON string"),
        ([{}], "a JSON array"),
        ({"Records": {}}, "no list of objects"),
        ({"Records": [1]}, "no list of objects"),
        ({"Records": [{}]}, "unknown source"),
        ({"Records": [SQS, KINESIS]}, "mixes records of aws:kinesis, aws:sqs"),
        ({"Records": [{"eventSource": "aws:s3"}]}, "not supported yet by this release: records of aws:s3"),
        ({"Records": [{"EventSource": "aws:sns"}]}, "not supported yet by this release: records of aws:sns"),
        ({"Records": [{"eventSource": "aws:dynamodb"}]}, "not supported yet"),
        ({"Records": [SQS, {**SQS, "messageId": ""}]}, "record 1 of the batch has no messageId"),
        ({"Records": [{**SQS, "messageId": 7}]}, "record 0 of the batch has no messageId"),
        ({"Records": [{**SQS, "body": None}]}, "no body"),
        ({"Records": [{**SQS, "eventSourceARN": ""}]}, "no eventSourceARN"),
        ({"Records": [{**SQS, "eventSourceARN": "q.fifo"}]}, "no MessageGroupId"),
        ({"Records": [{**KINESIS, "kinesis": None}]}, "no 'kinesis' object"),
        ({"Records": [{**KINESIS, "kinesis": {"partitionKey": "", "data": ""}}]}, "no sequenceNumber"),
        ({"Records": [{**KINESIS, "kinesis": {"sequenceNumber": "x"}}]}, "no number"),
    ],
)
def test_an_envelope_that_cannot_be_answered_for_is_refused(payload: Any, words: str) -> None:
    with pytest.raises(Permanent, match=words) as caught:
        batch(payload)
    assert "\n" not in str(caught.value)


def test_an_event_of_the_lane_is_taken_for_one() -> None:
    assert understand(encode(OWN), "toy") == OWN
    assert understand(encode(OWN).decode(), "toy") == OWN


def test_any_other_cloud_event_triggers_a_run_named_by_source_and_id() -> None:
    assert understand(msgspec.json.encode(CLOUD), "toy") == Start("/shop,7", "event", CLOUD)
    assert isinstance(understand(encode(OWN), "other"), Start)
    assert isinstance(
        understand(msgspec.json.encode({**CLOUD, "source": "toy", "type": "lane.triggered"}), "toy"), Start
    )


@settings(deadline=None)
@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_different_events_never_share_a_slot(source: str, name: str, source2: str, name2: str) -> None:
    def slot(source: str, name: str) -> str:
        found = understand_direct({**CLOUD, "source": source, "id": name}, "toy")
        assert isinstance(found, Start)
        return found.slot

    assert (slot(source, name) == slot(source2, name2)) == ((source, name) == (source2, name2))


@pytest.mark.parametrize(
    ("time", "slot"),
    [("2024-05-01T12:00:00Z", "2024-05-01T12:00:00Z"), ("2024-05-01T14:00:00+02:00", "2024-05-01T12:00:00Z")],
)
@pytest.mark.parametrize(("source", "detail"), [("aws.events", {}), ("aws.scheduler", "{}")])
def test_a_scheduled_event_triggers_the_run_of_its_time(
    time: str, slot: str, source: str, detail: Any
) -> None:
    value = {"detail-type": "Scheduled Event", "source": source, "time": time, "detail": detail, "id": "i"}
    assert understand_direct(value, "toy") == Start(slot, "schedule", value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "empty or not base64"),
        ("Test message.", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b"\xf3\x89\x9a\xc2rest", "Kinesis Producer Library"),
        ('"text"', "a JSON string"),
        ("[]", "a JSON array"),
        ('{"message": "foo1"}', "no CloudEvent"),
        ('{"specversion": "0.3"}', "specversion '0.3'"),
        ('{"specversion": "1.0", "id": "", "source": "s", "type": "t"}', "without 'id'"),
        ('{"specversion": "1.0", "id": "1", "type": "t"}', "without 'source'"),
        ('{"specversion": "1.0", "id": "1", "source": "toy", "type": "t"}', "not a CloudEvents 1.0 event"),
        ('{"Type": "Notification", "TopicArn": "t", "Message": "m"}', "not supported yet.*SNS"),
        ('{"Records": [{"s3": {}}]}', "not supported yet.*S3"),
        ('{"Event": "s3:TestEvent"}', "not supported yet.*S3"),
        ('{"detail-type": "Object Created", "source": "aws.s3"}', "not supported yet.*aws.s3"),
        ('{"detail-type": "Scheduled Event", "source": "me"}', "not supported yet"),
        ('{"detail-type": "Scheduled Event", "source": "aws.events", "time": "noon"}', "without a 'time'"),
    ],
)
def test_a_message_that_says_nothing_is_refused_with_its_reason(body: str | bytes, words: str) -> None:
    with pytest.raises(Permanent, match=words) as caught:
        understand(body, "toy")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@settings(deadline=None)
@given(st.binary() | st.text() | JSON.map(msgspec.json.encode))
def test_no_message_does_anything_but_be_understood_or_refused(body: str | bytes) -> None:
    try:
        understand(body, "toy")
    except Permanent:
        return


@settings(deadline=None)
@given(JSON | st.fixed_dictionaries({"Records": st.lists(st.dictionaries(st.text(), JSON) | st.just(SQS))}))
def test_no_payload_does_anything_but_be_understood_or_refused(payload: Any) -> None:
    try:
        if batch(payload) is None:
            understand_direct(payload, "toy")
    except Permanent:
        return


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(Permanent, match="not JSON"):
        understand_direct({"specversion": "1.0", "id": "\ud800"}, "toy")


def test_data_that_is_not_base64_is_its_own_records_failure() -> None:
    inner = {"sequenceNumber": "7", "partitionKey": "k", "data": "***"}
    found = batch({"Records": [{**KINESIS, "kinesis": inner}]})
    assert found is not None
    with pytest.raises(Permanent, match="base64"):
        understand(found.messages[0].body, "toy")
    assert base64.b64decode("e30=") == b"{}"
