"""Real Lambda events, as others have published them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flowlane import Permanent
from tests.aws_lambda.toys import Remaining, failed, function, toy

LONG = Remaining(900)
Corpus = Callable[[str], Any]

# None of these messages is a CloudEvent: each is reported failed, under the name by which AWS knows it.
BATCHES = {
    "powertools/sqsEvent.json": [
        "059f36b4-87a3-44ab-83d2-661975830a7d",
        "2e1424d4-f796-459a-8184-9c92662be6da",
    ],
    "powertools/sqsDlqTriggerEvent.json": ["db37cc61-1bb0-4e77-b6f3-7cf87f44a72a"],
    "powertools/snsSqsEvent.json": ["79406a00-bf15-46ca-978c-22c3613fcb30"],
    "powertools/snsSqsFifoEvent.json": ["69bc4bbd-ed69-4325-a434-85c3b428ceab"],
    "powertools/s3SqsEvent.json": ["ca3e7a89-c358-40e5-8aa0-5da01403c267"],
    "sam_cli/sqs.receive-message.json": ["19dd0b57-b21e-4ac1-bd88-01bbb068cb78"],
    "powertools/kinesisStreamEvent.json": ["49590338271490256608559692538361571095921575989136588898"],
    "powertools/kinesisStreamEventOneRecord.json": [
        "49590338271490256608559692538361571095921575989136588898"
    ],
    "powertools/kinesisStreamCloudWatchLogsEvent.json": [
        "49635052289529725553291405520881064510298312199003701250"
    ],
    "sam_cli/kinesis.get-records.json": ["49545115243490985018280067714973144582180062593244200961"],
}
REFUSED = [
    "powertools/s3Event.json",
    "powertools/snsEvent.json",
    "powertools/dynamoStreamEvent.json",
    "powertools/eventBridgeEvent.json",
    "powertools/s3EventBridgeNotificationObjectCreatedEvent.json",
    "powertools/lambdaFunctionUrlEvent.json",
    "powertools/kinesisFirehosePutEvent.json",
    "powertools/cloudWatchLogEvent.json",
    "powertools/secretsManagerEvent.json",
    "sam_cli/s3.put.json",
    "sam_cli/sns.notification.json",
    "sam_cli/dynamodb.update.json",
]


@pytest.mark.parametrize("name", BATCHES)
def test_foreign_messages_are_named_verbatim(corpus: Corpus, name: str) -> None:
    with function(toy()) as call:
        assert failed(call(corpus(name), LONG)) == BATCHES[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_yet_is_refused_in_one_line(corpus: Corpus, name: str) -> None:
    with function(toy()) as call, pytest.raises(Permanent) as caught:
        call(corpus(name), LONG)
    assert "\n" not in str(caught.value)


def test_a_scheduled_event_opens_its_run(corpus: Corpus) -> None:
    with function(toy()) as call:
        report = call(corpus("sam_cli/cloudwatch.scheduled-event.json"), LONG)
    assert (report["run"], report["outcome"]) == ("toy/run/1970-01-01T00:00:00Z", "settled")
