"""Lambda events that are known and not served: why, and what to do instead (the table in docs/lambda.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

#: What an event may be sent as, where nothing better is known.
ABOUT: Final = "send a CloudEvent 1.0 (structured JSON), or any event listed in docs/lambda.md"


class Refusal(msgspec.Struct, frozen=True):
    """An event with all the members `has` (a dot leads into an object) is a `what`; it is refused because of
    `why`, and what to do instead is `instead`."""

    has: tuple[str, ...]
    what: str
    why: str
    instead: str


REFUSALS: Final[tuple[Refusal, ...]] = (
    Refusal(
        ("awslogs",),
        "a CloudWatch Logs subscription of the function itself",
        "what fails is dropped after two more tries, while a stream keeps it",
        "subscribe a Kinesis stream to the log group, and map that to the function",
    ),
    Refusal(
        ("records", "invocationId"),
        "a Firehose (or Kinesis Analytics) transformation",
        "it wants every record back, transformed, while a lane has runs",
        "let Firehose deliver to S3, and S3 notify the lane",
    ),
    Refusal(
        ("tasks", "invocationSchemaVersion"),
        "a task of S3 Batch Operations",
        "the job waits for a result of each object, while a lane keeps its own count of them",
        "let the lane list the objects, or read the job's manifest",
    ),
    Refusal(
        ("SecretId", "Step", "ClientRequestToken"),
        "a rotation step of Secrets Manager",
        "it is answered by changing a password, not by a run",
        "give the secret a rotation function of its own",
    ),
    Refusal(
        ("requestContext.http",),
        "an HTTP request to a function URL or API Gateway",
        "its caller waits for a page, while a lane has runs",
        "let the API put the body on an SQS queue, and map that to the function",
    ),
    Refusal(
        ("httpMethod",),
        "an HTTP request of API Gateway or a load balancer",
        "its caller waits for a page, while a lane has runs",
        "let the API put the body on an SQS queue, and map that to the function",
    ),
    Refusal(
        ("requestContext", "requestPayload"),
        "Lambda's record of an invocation that it gave up (or that succeeded)",
        "it tells of an invocation and is none",
        "invoke the function with its requestPayload",
    ),
    Refusal(
        ("KinesisBatchInfo",),
        "Lambda's record of a Kinesis batch that it gave up",
        "it names sequence numbers, not data",
        "read the records from the stream while it holds them, and send them again",
    ),
    Refusal(
        ("DDBStreamBatchInfo",),
        "Lambda's record of a DynamoDB Streams batch that it gave up",
        "it names sequence numbers, not items",
        "read the records from the stream within its 24 hours, and send them again",
    ),
    Refusal(
        ("Error", "Cause"),
        "an error of Step Functions",
        "that a state failed is no work for a lane",
        "let the state machine send what is to be done as a CloudEvent",
    ),
    Refusal(
        ("eventSource", "records"),
        "a batch of Kafka records",
        "its offsets are not answered for one by one",
        "bring the topic into Kinesis or SQS (EventBridge Pipes does), and map that to the function",
    ),
    Refusal(
        ("eventSource", "rmqMessagesByQueue"),
        "a batch of Amazon MQ messages",
        "it fails or succeeds as a whole",
        "bring the queue into SQS (EventBridge Pipes does), and map that to the function",
    ),
    Refusal(
        ("eventSource", "messages"),
        "a batch of Amazon MQ messages",
        "it fails or succeeds as a whole",
        "bring the queue into SQS (EventBridge Pipes does), and map that to the function",
    ),
    Refusal(
        ("Token", "TopicArn", "SubscribeURL"),
        "the question of SNS whether a subscription is wanted",
        "nothing is subscribed on anybody's word",
        "confirm the subscription where it was made",
    ),
)


def refusal(value: Mapping[str, Any]) -> str:
    """Why `value`, which is nothing that opens a run, is refused; one line."""
    for known in REFUSALS:
        if all(_has(value, name) for name in known.has):
            return f"{known.what} is not served, because {known.why}: {known.instead}"
    return f"an object that is no CloudEvent (it has no 'specversion') and no event known of AWS: {ABOUT}"


def _has(value: Mapping[str, Any], name: str) -> bool:
    outer, _, inner = name.partition(".")
    if not inner:
        return outer in value
    found = value.get(outer)
    return isinstance(found, Mapping) and inner in found
