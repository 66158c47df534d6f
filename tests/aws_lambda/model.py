"""Small models of what AWS does with a batch and with its answer: the oracle of these tests, written from
AWS's documentation and not from the code under test (sources in docs/contracts).

``Queue`` is SQS behind an event source mapping with ``ReportBatchItemFailures``, ``Shard`` is one of Kinesis
or of DynamoDB Streams.
"""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass, field
from typing import Any


def named(answer: Any, batch: list[str]) -> set[str] | None:
    """The identifiers that AWS takes from `answer`; ``None`` where it takes the whole batch for failed.

    Complete success: null, {}, an empty or null list. Complete failure: an exception (given here as one),
    an empty or null identifier, a wrong key, an identifier that is not in the batch.
    """
    if isinstance(answer, BaseException):
        return None
    failures = (answer or {}).get("batchItemFailures") or []
    names = [item.get("itemIdentifier") if isinstance(item, dict) else None for item in failures]
    if any(not isinstance(name, str) or name not in batch for name in names):
        return None
    return {str(name) for name in names}


@dataclass
class Sent:
    """A message in the model."""

    id: str
    body: str
    group: str = ""
    receives: int = 0


@dataclass
class Queue:
    """SQS: a FIFO queue hands out no message of a group while an earlier one is there, except along with
    it; a standard one hands out whatever is there, in any order."""

    fifo: bool = False
    size: int = 10
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    waiting: list[Sent] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    _batch: list[Sent] = field(default_factory=list)

    def send(self, id: str, body: str, group: str = "") -> None:
        """Put a message into the queue."""
        self.waiting.append(Sent(id, body, group))

    def receive(self) -> dict[str, Any]:
        """The Lambda event with the next batch."""
        if self.fifo:
            self._batch = self.waiting[: self.size]
        else:
            self._batch = self.rng.sample(self.waiting, min(self.size, len(self.waiting)))
        for message in self._batch:
            message.receives += 1
        arn = "arn:aws:sqs:eu-west-1:1:queue" + (".fifo" if self.fifo else "")
        return {"Records": [self._record(message, arn) for message in self._batch]}

    def _record(self, message: Sent, arn: str) -> dict[str, Any]:
        attributes = {"ApproximateReceiveCount": str(message.receives)}
        if message.group:
            attributes["MessageGroupId"] = message.group
        return {
            "messageId": message.id,
            "receiptHandle": "r",
            "body": message.body,
            "attributes": attributes,
            "eventSource": "aws:sqs",
            "eventSourceARN": arn,
        }

    def settle(self, answer: Any) -> list[str]:
        """What AWS deletes on `answer` is gone; returns the names of what is delivered again."""
        names = named(answer, [message.id for message in self._batch])
        again = [m for m in self._batch if names is None or m.id in names]
        for message in self._batch:
            if message not in again:
                self.waiting.remove(message)
                self.deleted.append(message.id)
        return [message.id for message in again]


@dataclass
class Shard:
    """Goes on behind the batch, or from the lowest sequence number named. With ``items`` it is one of
    DynamoDB Streams: a record's key is that of its item, its data an attribute."""

    items: bool = False
    records: list[tuple[str, str, bytes]] = field(default_factory=list)  # sequence number, key, data
    position: int = 0
    size: int = 10

    def receive(self) -> dict[str, Any]:
        """The Lambda event with the next batch."""
        return {
            "Records": [self._record(*r) for r in self.records[self.position : self.position + self.size]]
        }

    def _record(self, sequence: str, key: str, data: bytes) -> dict[str, Any]:
        text = base64.b64encode(data).decode()
        if self.items:
            image = {
                "Keys": {"id": {"S": key}},
                "NewImage": {"data": {"B": text}},
                "SequenceNumber": sequence,
            }
            source = {
                "eventSource": "aws:dynamodb",
                "eventSourceARN": "arn:stream",
                "eventID": f"e{sequence}",
            }
            return {"dynamodb": image, "eventName": "INSERT", **source}
        inner = {"partitionKey": key, "sequenceNumber": sequence, "data": text}
        return {"kinesis": inner, "eventSource": "aws:kinesis", "eventID": f"shardId-0:{sequence}"}

    def settle(self, answer: Any) -> list[str]:
        """As ``Queue.settle``."""
        batch = [sequence for sequence, _, _ in self.records[self.position : self.position + self.size]]
        names = named(answer, batch)
        if names is None:
            return batch
        done = min((batch.index(name) for name in names), default=len(batch))
        self.position += done
        return batch[done:]
