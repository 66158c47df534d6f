"""Real Lambda events, as others have published them: each opens the runs it should, or is refused as told in
docs/lambda.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowlane import Context, Event, Lane, Permanent
from flowlane.aws_lambda import Object, objects
from flowlane.aws_lambda.wanted import kind_of
from flowlane.cli.event import read_event
from flowlane.lane import Trigger, stream_of
from tests.aws_lambda.toys import Remaining, function

LONG = Remaining(900)
Corpus = Callable[[str], Any]


class Outcome(msgspec.Struct):
    """The runs that the event opens, by their slots; their objects; and the names reported failed (``None``:
    the event is no batch, its runs are reported themselves)."""

    slots: list[str]
    objects: list[Object] = []
    failed: list[str] | None = None


LOGS = "logs,/aws/lambda/pt-1488-DummyLogDataFunction-gnWXPvL6jJyG,2022/11/10/%5B%24LATEST%5D"
STREAM = "dynamodb,arn:aws:dynamodb:us-east-1::table/ExampleTableWithStream/stream/2015-06-27T00:48:05.899,"
DIGEST = "b21b84d653bb07b05b1e6b33684dc11b"
ARTIFACT = f"lambda-artifacts-deafc19498e3f2df/{DIGEST}"
FACE, PDF = "d41d8cd98f00b204e9800998ecf8427e", "2e3ad1e983318bbd8e73b080e2997980"
IMAGE = "4e68adba0abe2dc8653dc3354e14c01d"
PLACED = Object(f"s3://{ARTIFACT}", f'"{DIGEST}"', 1305107, "", "created", "0C0F6F405D6ED209E1")


def image(change: Any, *, told: bool = True) -> Object:
    """The object of the EventBridge events."""
    etag, size = (f'"{IMAGE}"', 184662) if told else ("", -1)
    return Object("s3://example-bucket/IMG_m7fzo3.jpg", etag, size, "", change, "006408CAD69598B05E")


#: What opens runs, or is a batch.
OPENED = {
    "powertools/dynamoStreamEvent.json": Outcome(
        ["dynamodb,eventsource_arn,1", "dynamodb,source_arn,2"], failed=[]
    ),
    "powertools/eventBridgeEvent.json": Outcome(["eventbridge,aws.ec2,6a7e8feb-b491-4cf7-a9f1-bf3703467718"]),
    "powertools/kinesisStreamCloudWatchLogsEvent.json": Outcome(
        [
            f"{LOGS}26b6a45d574f442ea28438923cbf7bf7,c68c0bf806cd4b1e19f77350fb9827f7",
            f"{LOGS}6749cb3ec3b34895986d592d7421cab2,56e7b1cf6fc925dbd1cb46720600146f",
        ],
        failed=[],
    ),
    "powertools/kinesisStreamEvent.json": Outcome(
        [], failed=["49590338271490256608559692538361571095921575989136588898"]
    ),
    "powertools/kinesisStreamEventOneRecord.json": Outcome(
        [], failed=["49590338271490256608559692538361571095921575989136588898"]
    ),
    "powertools/s3Event.json": Outcome([f"s3,{ARTIFACT},created,,{DIGEST},0C0F6F405D6ED209E1"], [PLACED]),
    "powertools/s3EventBridgeNotificationObjectCreatedEvent.json": Outcome(
        [f"s3,example-bucket/IMG_m7fzo3.jpg,created,,{IMAGE},006408CAD69598B05E"], [image("created")]
    ),
    "powertools/s3EventBridgeNotificationObjectDeletedEvent.json": Outcome(
        ["s3,example-bucket/IMG_m7fzo3.jpg,removed,,,006408CAD69598B05E"], [image("removed", told=False)]
    ),
    "powertools/s3EventBridgeNotificationObjectExpiredEvent.json": Outcome(
        [f"s3,example-bucket/IMG_m7fzo3.jpg,removed,,{IMAGE},006408CAD69598B05E"], [image("removed")]
    ),
    "powertools/s3EventBridgeNotificationObjectRestoreCompletedEvent.json": Outcome(
        ["eventbridge,aws.s3,6924de0d-13e2-6bbf-c0c1-b903b753565e"], [image("restored")]
    ),
    "powertools/s3EventDecodedKey.json": Outcome(
        [
            f"s3,sourcebucket/Happy%20Face.jpg,created,version,{FACE},Happy%20Sequencer",
        ],
        [
            Object(
                "s3://sourcebucket/Happy%20Face.jpg",
                f'"{FACE}"',
                1024,
                "version",
                "created",
                "Happy Sequencer",
            )
        ],
    ),
    "powertools/s3EventDeleteObject.json": Outcome(
        [f"s3,{ARTIFACT},removed,,,0C0F6F405D6ED209E1"],
        [Object(f"s3://{ARTIFACT}", change="removed", sequencer="0C0F6F405D6ED209E1")],
    ),
    "powertools/s3EventGlacier.json": Outcome(
        [f"s3,{ARTIFACT},created,,{DIGEST},0C0F6F405D6ED209E1"], [PLACED]
    ),
    "powertools/s3SqsEvent.json": Outcome(
        [
            f"s3,xxx/test.pdf,created,yd3d4HaWOT2zguDLvIQLU6ptDTwKBnQV,{PDF},00643717F9F8B85354",
        ],
        [
            Object(
                "s3://xxx/test.pdf",
                f'"{PDF}"',
                104681,
                "yd3d4HaWOT2zguDLvIQLU6ptDTwKBnQV",
                "created",
                "00643717F9F8B85354",
            )
        ],
        failed=[],
    ),
    "powertools/snsEvent.json": Outcome(
        ["sns,arn:aws:sns:us-east-2:123456789012:sns-lambda,95df01b4-ee98-5cb9-9903-4c221d41eb5e"]
    ),
    "powertools/snsSqsEvent.json": Outcome(
        ["sns,arn:aws:sns:eu-west-1:231436140809:powertools265,d88d4479-6ec0-54fe-b63f-1cf9df4bb16e"],
        failed=[],
    ),
    "powertools/snsSqsFifoEvent.json": Outcome(
        ["sns,arn:aws:sns:eu-west-1:231436140809:Test.fifo,a7c9d2fa-77fa-5184-9de9-89391027cc7d"], failed=[]
    ),
    "powertools/sqsDlqTriggerEvent.json": Outcome([], failed=["db37cc61-1bb0-4e77-b6f3-7cf87f44a72a"]),
    "powertools/sqsEvent.json": Outcome(
        [], failed=["059f36b4-87a3-44ab-83d2-661975830a7d", "2e1424d4-f796-459a-8184-9c92662be6da"]
    ),
    "sam_cli/cloudwatch.scheduled-event.json": Outcome(["1970-01-01T00:00:00Z"]),
    "sam_cli/dynamodb.update.json": Outcome(
        [
            f"{STREAM}c4ca4238a0b923820dcc509a6f75849b",
            f"{STREAM}c81e728d9d4c2f636f067f89cc14862c",
            f"{STREAM}eccbc87e4b5ce2fe28308fd9f2a7baf3",
        ],
        failed=[],
    ),
    "sam_cli/kinesis.get-records.json": Outcome(
        [], failed=["49545115243490985018280067714973144582180062593244200961"]
    ),
    "sam_cli/s3.delete.json": Outcome(
        ["s3,example-bucket/test/key,removed,,,0A1B2C3D4E5F678901"],
        [Object("s3://example-bucket/test/key", change="removed", sequencer="0A1B2C3D4E5F678901")],
    ),
    "sam_cli/s3.put.json": Outcome(
        ["s3,example-bucket/test/key,created,,0123456789abcdef0123456789abcdef,0A1B2C3D4E5F678901"],
        [
            Object(
                "s3://example-bucket/test/key",
                '"0123456789abcdef0123456789abcdef"',
                1024,
                "",
                "created",
                "0A1B2C3D4E5F678901",
            )
        ],
    ),
    "sam_cli/sns.notification.json": Outcome(
        ["sns,arn:aws:sns:us-east-1::ExampleTopic,95df01b4-ee98-5cb9-9903-4c221d41eb5e"]
    ),
    "sam_cli/sqs.receive-message.json": Outcome([], failed=["19dd0b57-b21e-4ac1-bd88-01bbb068cb78"]),
}

#: What is refused, with the first words of the reason.
REFUSED = {
    "powertools/cloudWatchLogEvent.json": "a CloudWatch Logs subscription",
    "powertools/kinesisFirehoseKinesisEvent.json": "a Firehose (or Kinesis Analytics) transformation",
    "powertools/kinesisFirehosePutEvent.json": "a Firehose (or Kinesis Analytics) transformation",
    "powertools/kinesisFirehoseSQSEvent.json": "a Firehose (or Kinesis Analytics) transformation",
    "powertools/lambdaFunctionUrlEvent.json": "an HTTP request to a function URL",
    "powertools/s3BatchOperationEventSchemaV1.json": "a task of S3 Batch Operations",
    "powertools/s3BatchOperationEventSchemaV2.json": "a task of S3 Batch Operations",
    "powertools/secretsManagerEvent.json": "a rotation step of Secrets Manager",
    "sam_cli/cloudwatch.logs.json": "a CloudWatch Logs subscription",
    "sam_cli/kinesis.analytics-compressed.json": "a Firehose (or Kinesis Analytics) transformation",
    "sam_cli/kinesis.analytics-dynamodb.json": "a Firehose (or Kinesis Analytics) transformation",
    "sam_cli/kinesis.analytics-kpl.json": "a Firehose (or Kinesis Analytics) transformation",
    "sam_cli/kinesis.analytics.json": "a Firehose (or Kinesis Analytics) transformation",
    "sam_cli/kinesis.apachelog.json": "a Firehose (or Kinesis Analytics) transformation",
    "sam_cli/kinesis.cloudwatch-logs-processor.json": "a Firehose (or Kinesis Analytics) transformation",
    "sam_cli/kinesis.kinesis-firehose.json": "a Firehose (or Kinesis Analytics) transformation",
    "sam_cli/kinesis.streams-as-source.json": "a Firehose (or Kinesis Analytics) transformation",
    "sam_cli/kinesis.syslog.json": "a Firehose (or Kinesis Analytics) transformation",
    "sam_cli/s3.batch-invocation.json": "a task of S3 Batch Operations",
    "sam_cli/stepfunctions.error.json": "an error of Step Functions",
}

#: Those whose messages are reported failed, with their names.
BATCHES = {name: outcome.failed for name, outcome in OPENED.items() if outcome.failed}


def test_every_event_of_the_corpus_is_listed_here(corpus: Corpus) -> None:
    folder = Path(os.environ["FLOWLANE_CORPUS"]) / "lambda_events"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == {*OPENED, *REFUSED}
    assert {kind_of(corpus(name)) for name in there} == {"value"}, "each is an object"


@pytest.mark.parametrize("name", OPENED)
def test_it_opens_its_runs_and_names_what_failed(corpus: Corpus, name: str) -> None:
    seen: dict[str, list[Object]] = {}
    events: list[Any] = []
    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        seen[event.data.slot] = objects(event)
        events.append(event.data.event)

    expected = OPENED[name]
    with function(lane) as call:
        for _ in range(2):  # the second time is a redelivery
            answer = call(corpus(name), LONG)
            if expected.failed is None:
                assert answer["run"] == stream_of("toy", Trigger(slot=expected.slots[0]))
                assert answer["outcome"] == "settled"
            else:
                assert answer == {"batchItemFailures": [{"itemIdentifier": each} for each in expected.failed]}
    assert sorted(seen) == sorted(expected.slots)
    assert [each for slot in expected.slots for each in seen[slot]] == expected.objects
    assert len(events) == len(expected.slots), "a redelivery opens no second run"


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(corpus: Corpus, name: str) -> None:
    with function(_unused()) as call, pytest.raises(Permanent) as caught:
        call(corpus(name), LONG)
    said = str(caught.value)
    assert said.startswith(REFUSED[name])
    assert "is not served, because" in said
    assert "\n" not in said


def _unused() -> Lane:
    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        raise AssertionError("a run was opened")

    return lane


@pytest.mark.parametrize("name", sorted({*OPENED, *REFUSED}))
def test_on_the_command_line_it_names_the_same_run(corpus: Corpus, tmp_path: Path, name: str) -> None:
    file = tmp_path / "event.json"
    file.write_text(json.dumps(corpus(name)))
    given = read_event(str(file))
    slots = OPENED[name].slots if name in OPENED else []
    assert given.slot == slots[0] if len(slots) == 1 else given.slot.startswith("blake2b-")
    assert objects(given.value) == (OPENED[name].objects if name in OPENED else [])
