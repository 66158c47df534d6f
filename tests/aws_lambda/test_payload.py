"""What envelopes are taken for: the messages in them, their names and their order."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest

from flowlane.aws_lambda.payload import Message, batch
from flowlane.aws_lambda.wanted import understand
from flowlane.errors import Permanent
from tests.aws_lambda.aggregate import aggregate

SQS = {"messageId": "m", "body": "{}", "eventSource": "aws:sqs", "eventSourceARN": "arn:q", "attributes": {}}
KINESIS = {
    "kinesis": {"sequenceNumber": "7", "partitionKey": "", "data": "e30="},
    "eventSource": "aws:kinesis",
}
DYNAMODB = {"dynamodb": {"SequenceNumber": "7", "Keys": {"id": {"N": "1"}}}, "eventSource": "aws:dynamodb"}


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


def test_a_batch_of_dynamodb_streams() -> None:
    other = {**DYNAMODB, "dynamodb": {"SequenceNumber": "10", "Keys": {"b": {"S": "x"}, "a": {"S": "y"}}}}
    turned = {**DYNAMODB, "dynamodb": {"SequenceNumber": "11", "Keys": {"a": {"S": "y"}, "b": {"S": "x"}}}}
    found = batch({"Records": [DYNAMODB, other, turned]})
    assert found is not None
    assert found.kind == "dynamodb"
    assert [message.id for message in found.messages] == ["7", "10", "11"]
    assert msgspec.json.decode(found.messages[0].body) == DYNAMODB
    assert found.sequences() == [[0], [1, 2]], "the order of each item is kept, by its key"


def test_an_item_that_json_cannot_hold_is_its_own_records_failure() -> None:
    odd = {**DYNAMODB, "dynamodb": {"SequenceNumber": "8", "Keys": {"id": {"S": "\ud800"}}}}
    found = batch({"Records": [odd, DYNAMODB]})
    assert found is not None
    assert [message.id for message in found.messages] == ["8", "7"]
    with pytest.raises(Permanent, match="empty"):
        understand(found.messages[0].body, "toy")


def test_what_one_kinesis_record_holds_together_are_messages_of_its_name() -> None:
    data = base64.b64encode(aggregate(("a", b"1"), ("b", b"2"), ("a", b"3"))).decode()
    packed = {**KINESIS, "kinesis": {"sequenceNumber": "8", "partitionKey": "packed", "data": data}}
    found = batch({"Records": [KINESIS, packed, KINESIS]})
    assert found is not None
    assert found.messages == [
        Message("7", b"{}"),
        Message("8", b"1", "a"),
        Message("8", b"2", "b", sub=1),
        Message("8", b"3", "a", sub=2),
        Message("7", b"{}"),
    ]
    assert found.sequences() == [[0, 4], [1, 3], [2]]


def test_an_aggregate_that_is_damaged_is_a_plain_record() -> None:
    whole = aggregate(("a", b"1"))
    data = base64.b64encode(whole[:-1] + bytes([whole[-1] ^ 1])).decode()
    found = batch({"Records": [{**KINESIS, "kinesis": {**KINESIS["kinesis"], "data": data}}]})  # type: ignore[dict-item]  # an object
    assert found is not None
    assert len(found.messages) == 1
    with pytest.raises(Permanent, match="not JSON"):
        understand(found.messages[0].body, "toy")


@pytest.mark.parametrize(
    ("payload", "state"),
    [
        ({"Records": [KINESIS]}, None),
        ({"Records": [KINESIS], "window": {}, "state": {"count": 3}}, {"count": 3}),
        ({"Records": [DYNAMODB], "window": {}, "state": None}, {}),
        ({"Records": [KINESIS], "window": {}}, {}),
        ({"isFinalInvokeForWindow": True, "state": {"count": 9}}, {"count": 9}),
        ({"isFinalInvokeForWindow": True, "Records": []}, {}),
    ],
)
def test_the_state_of_a_tumbling_window(payload: Any, state: Any) -> None:
    found = batch(payload)
    assert found is not None
    assert found.state == state
    assert len(found.messages) == len(payload.get("Records", []))


@pytest.mark.parametrize(
    "payload",
    [
        {"Records": [{"eventSource": "aws:s3", "s3": {}}]},
        {"Records": [{"EventSource": "aws:sns", "Sns": {}}]},
    ],
)
def test_records_that_no_answer_can_name_are_one_event(payload: Any) -> None:
    assert batch(payload) is None


def test_the_queue_is_told() -> None:
    found = batch({"Records": [SQS]})
    assert found is not None
    assert found.queue == "arn:q"


@pytest.mark.parametrize(
    ("arn", "stream"),
    [
        ("arn:aws:kinesis:eu-west-1:123456789012:stream/prod-orders.load", "prod-orders.load"),
        ("arn:aws-cn:kinesis:cn-north-1:1:stream/a/consumer/b:1700000000", "a"),
        ("arn:aws:dynamodb:eu-west-1:1:table/a/stream/b", ""),
        ("stream/a", ""),
        (None, ""),
    ],
)
def test_the_stream_is_told_by_its_name(arn: str | None, stream: str) -> None:
    found = batch({"Records": [{**KINESIS, "eventSourceARN": arn}]})
    assert found is not None
    assert found.stream == stream


@pytest.mark.parametrize(
    ("name", "number"), [("shardId-000000000017:49590338", 17), ("shardId-x:1", 0), ("17:1", 0), (None, 0)]
)
def test_the_shard_is_told_by_its_number(name: str | None, number: int) -> None:
    found = batch({"Records": [{**KINESIS, "eventID": name}]})
    assert found is not None
    assert [message.partition for message in found.messages] == [number]


def test_a_record_that_comes_alone_may_have_come_before() -> None:
    def attempts(*sequences: str, data: str = "e30=") -> list[int]:
        inner = {"partitionKey": "k", "data": data}
        records = [{**KINESIS, "kinesis": {**inner, "sequenceNumber": each}} for each in sequences]
        found = batch({"Records": records})
        assert found is not None
        return [found.attempt(index) for index in range(len(found.messages))]

    packed = base64.b64encode(aggregate(("a", b"1"), ("b", b"2"))).decode()
    assert attempts("7") == [2]
    assert attempts("7", "8") == [1, 1]
    assert attempts("7", data=packed) == [2, 2], "no mapping can split them off"
    message = batch({"Records": [{**SQS, "attributes": {"ApproximateReceiveCount": "3"}}]})
    assert message is not None
    assert message.attempt(0) == 3


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
        ({"Records": [{"eventSource": "aws:codecommit"}]}, "unknown source 'aws:codecommit'"),
        ({"Records": [SQS, KINESIS]}, "mixes records of 'aws:kinesis', 'aws:sqs'"),
        ({"Records": [SQS, {**SQS, "messageId": ""}]}, "record 1 of the batch has no messageId"),
        ({"Records": [{**SQS, "messageId": 7}]}, "record 0 of the batch has no messageId"),
        ({"Records": [{**SQS, "body": None}]}, "no body"),
        ({"Records": [{**SQS, "eventSourceARN": ""}]}, "no eventSourceARN"),
        ({"Records": [{**SQS, "eventSourceARN": "q.fifo"}]}, "no MessageGroupId"),
        ({"Records": [{**KINESIS, "kinesis": None}]}, "no 'kinesis' object"),
        ({"Records": [{**KINESIS, "kinesis": {"partitionKey": "", "data": ""}}]}, "no sequenceNumber"),
        ({"Records": [{**KINESIS, "kinesis": {"sequenceNumber": "x"}}]}, "no number"),
        ({"Records": [{**KINESIS, "kinesis": {"sequenceNumber": "\u0667"}}]}, "no number"),
        ({"Records": [{**DYNAMODB, "dynamodb": []}]}, "no 'dynamodb' object"),
        (
            {"Records": [DYNAMODB, {**DYNAMODB, "dynamodb": {}}]},
            "record 1 of the batch has no SequenceNumber",
        ),
        ({"isFinalInvokeForWindow": True, "Records": None}, "no list of objects"),
    ],
)
def test_an_envelope_that_cannot_be_answered_for_is_refused(payload: Any, words: str) -> None:
    with pytest.raises(Permanent, match=words) as caught:
        batch(payload)
    assert "\n" not in str(caught.value)


def test_data_that_is_not_base64_is_its_own_records_failure() -> None:
    inner = {"sequenceNumber": "7", "partitionKey": "k", "data": "***"}
    found = batch({"Records": [{**KINESIS, "kinesis": inner}]})
    assert found is not None
    with pytest.raises(Permanent, match="base64"):
        understand(found.messages[0].body, "toy")
