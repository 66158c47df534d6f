"""Event source mappings as far as a test needs one, step by step: a function is invoked with what a queue or
a stream on a stand-in has, and its answer is done as AWS does it."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import boto3  # type: ignore[import-untyped]

from flowlane import Lane
from flowlane.aws_lambda.function import Function
from flowlane.compose import open_application
from flowlane.ports import QueueSpec
from flowlane.settings import Settings
from tests.aws_lambda.toys import Remaining, failed

BACKEND = "aws://fn"


class Mapping:
    """An event source mapping with ``ReportBatchItemFailures``, as far as these tests need one."""

    def __init__(self, call: Function) -> None:
        self.call = call
        self.again: dict[str, int] = {}  # how many messages of each queue were named last
        self.sqs: Any = boto3.client("sqs")

    def create(self, lane: Lane) -> list[str]:
        """The lane's table and queues are there; the queues' URLs."""

        async def create() -> None:
            async with open_application([lane], Settings(backend=BACKEND)) as app:
                wanted = [(stage, stage.policy) for stage in lane.stages]
                await app.backend.create(
                    [
                        QueueSpec(s.queue, float(p.lease), float(p.timeout), bool(s.order), via=s.via)
                        for s, p in wanted
                    ]
                )

        asyncio.run(create())
        urls = self.sqs.list_queues(QueueNamePrefix="fn-")["QueueUrls"]
        return [url for url in urls if "-dead" not in url]

    def arn(self, url: str) -> str:
        """The queue's ARN."""
        told = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
        return str(told["Attributes"]["QueueArn"])

    def deliver(self, url: str, seconds: float = 20.0) -> list[str]:
        """Invoke the function with what the queue has; the bodies of what was handed out."""
        found = self.sqs.receive_message(
            QueueUrl=url,
            MaxNumberOfMessages=10,
            MessageSystemAttributeNames=["All"],
            VisibilityTimeout=60,
            WaitTimeSeconds=5 if self.again.get(url) else 0,
        ).get("Messages", [])
        if not found:
            return []
        arn = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"][
            "QueueArn"
        ]
        records = [
            {
                "messageId": message["MessageId"],
                "receiptHandle": message["ReceiptHandle"],
                "body": message["Body"],
                "attributes": message["Attributes"],
                "eventSource": "aws:sqs",
                "eventSourceARN": arn,
            }
            for message in found
        ]
        names = failed(self.call({"Records": records}, Remaining(seconds)))
        self.again[url] = len(names)
        assert set(names) <= {message["MessageId"] for message in found}
        for message in found:
            receipt = {"QueueUrl": url, "ReceiptHandle": message["ReceiptHandle"]}
            if message["MessageId"] not in names:  # what is named stays hidden for as long as it is
                self.sqs.delete_message(**receipt)
        return [message["Body"] for message in found]

    def drain(self, urls: list[str]) -> list[str]:
        """Deliver until the queues are empty; the bodies."""
        bodies: list[str] = []
        for _ in range(200):
            some = [body for url in urls for body in self.deliver(url)]
            if not some:
                return bodies
            bodies += some
        raise AssertionError("the queues do not run empty")


class StreamMapping:
    """One of the stream of that name, with ``ReportBatchItemFailures`` and ``BisectBatchOnFunctionError``,
    from ``TRIM_HORIZON`` on (Lambda developer guide, "Using Lambda with Kinesis")."""

    def __init__(self, call: Function, stream: str, *, size: int = 100) -> None:
        self.call, self.stream, self.size = call, stream, size
        self.kinesis: Any = boto3.client("kinesis")
        self.places: dict[str, int] = {}  # how many records of each shard are done
        self._sizes: dict[str, int] = {}  # of the next batch of a shard whose last one ended the function
        self.invocations = 0
        self.answers: list[list[str]] = []  # what was named in each

    @property
    def arn(self) -> str:
        """The stream's ARN."""
        told = self.kinesis.describe_stream_summary(StreamName=self.stream)
        return str(told["StreamDescriptionSummary"]["StreamARN"])

    def records(self, shard: str) -> list[dict[str, Any]]:
        """All that the shard holds."""
        asked = {"StreamName": self.stream, "ShardId": shard, "ShardIteratorType": "TRIM_HORIZON"}
        at = self.kinesis.get_shard_iterator(**asked)["ShardIterator"]
        return list(self.kinesis.get_records(ShardIterator=at)["Records"])

    def deliver(self, seconds: float = 20.0) -> int:
        """Invoke the function once with what each shard has; how many records it was given."""
        given = 0
        for shard in self.kinesis.list_shards(StreamName=self.stream)["Shards"]:
            name = shard["ShardId"]
            place = self.places.get(name, 0)
            batch = self.records(name)[place:][: self._sizes.get(name, self.size)]
            if batch:
                given += len(batch)
                self.places[name] = place + self._done(name, batch, seconds)
        return given

    def _done(self, shard: str, batch: list[dict[str, Any]], seconds: float) -> int:
        """How many of `batch` are done, by the function's answer."""
        self.invocations += 1
        try:
            names = failed(
                self.call({"Records": [self._record(shard, one) for one in batch]}, Remaining(seconds))
            )
        except Exception:
            self._sizes[shard] = max(1, len(batch) // 2)
            return 0
        self._sizes.pop(shard, None)
        self.answers.append(names)
        numbers = [record["SequenceNumber"] for record in batch]
        assert set(names) <= set(numbers)
        return min((numbers.index(name) for name in names), default=len(batch))

    def _record(self, shard: str, record: dict[str, Any]) -> dict[str, Any]:
        inner = {
            "kinesisSchemaVersion": "1.0",
            "partitionKey": record["PartitionKey"],
            "sequenceNumber": record["SequenceNumber"],
            "data": base64.b64encode(record["Data"]).decode(),
            "approximateArrivalTimestamp": record["ApproximateArrivalTimestamp"].timestamp(),
        }
        return {
            "kinesis": inner,
            "eventSource": "aws:kinesis",
            "eventID": f"{shard}:{record['SequenceNumber']}",
            "eventSourceARN": self.arn,
        }

    def drain(self, seconds: float = 20.0) -> None:
        """Deliver until all is done."""
        for _ in range(200):
            if not self.deliver(seconds):
                return
        raise AssertionError(f"still not done: {self.answers[-3:]}")
