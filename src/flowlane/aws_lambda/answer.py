"""Which messages of a batch AWS is told to deliver again: ``batchItemFailures``, without I/O.

- A standard queue delivers again exactly what is named; what is not named is deleted.
- A FIFO queue would deliver what is named behind what is not: so from the first failure of a message group
  on, all of that group is named, and no other group.
- A stream (Kinesis, DynamoDB Streams) goes back to the lowest sequence number named, in its one shard: so
  only that one is named. Records that one Kinesis record held together share its number, and come again
  together.

An identifier that is not in the batch fails the whole of it, so they are given back verbatim.
"""

from __future__ import annotations

from typing import Any

from flowlane.aws_lambda.payload import STREAMS, Batch


class Answer:
    """What is known of a batch so far: which of its messages failed, and which therefore come again."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._failed: set[int] = set()
        self._first: dict[str, int] = {}  # FIFO: the first failure of each group
        self._lowest: int | None = None  # streams

    def fail(self, index: int) -> None:
        """Message number `index` did not succeed, or was not begun."""
        self._failed.add(index)
        message = self._batch.messages[index]
        if self._batch.kind == "fifo":
            self._first[message.group] = min(index, self._first.get(message.group, index))
        elif self._batch.kind in STREAMS and (self._lowest is None or int(message.id) < self._position()):
            self._lowest = index

    def again(self, index: int) -> bool:
        """Whether message number `index` is delivered again, as things stand, whatever becomes of it: it need
        not be begun."""
        if index in self._failed:
            return True
        message = self._batch.messages[index]
        if self._batch.kind == "fifo":
            return index > self._first.get(message.group, index)
        return self._lowest is not None and int(message.id) >= self._position()

    def document(self) -> dict[str, Any]:
        """The answer for AWS; an empty list is a complete success. The state of a tumbling window goes back
        as it came: an answer without it would empty it."""
        messages = self._batch.messages
        if self._lowest is not None:
            named = [messages[self._lowest].id]
        else:
            named = [message.id for index, message in enumerate(messages) if self.again(index)]
        answer: dict[str, Any] = {
            "batchItemFailures": [{"itemIdentifier": name} for name in dict.fromkeys(named)]
        }
        if self._batch.state is not None:
            answer["state"] = self._batch.state
        return answer

    def _position(self) -> int:
        assert self._lowest is not None
        return int(self._batch.messages[self._lowest].id)
