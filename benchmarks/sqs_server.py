"""A responder that speaks as much of SQS as the benchmark needs: a process of its own, queues in memory.

``python -m benchmarks.sqs_server`` prints its port, and serves until it is killed. AWS JSON protocol 1.0:
POST / with ``X-Amz-Target: AmazonSQS.<operation>``. Queues exist as soon as they are named; visibility never
ends.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import md5
from itertools import count
from typing import Any

from benchmarks.responder import serve, started


def serving() -> AbstractContextManager[str]:
    """The endpoint of a running responder."""
    return started("sqs_server")


class Queues:
    """What is sent and received; a message is its finished JSON, so that receiving it costs little here."""

    def __init__(self) -> None:
        self._port = 0
        self._waiting: dict[str, deque[str]] = {}
        self._numbers = count(1)
        self._news: list[asyncio.Future[None]] = []

    def reached_by(self, port: int) -> None:
        """The queues' URLs name this port."""
        self._port = port

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._port}/000000000000/{name}"

    async def answer(self, operation: str, body: bytes) -> bytes:
        """The answer's body."""
        asked: dict[str, Any] = json.loads(body)
        answers: dict[str, Callable[[dict[str, Any]], Any]] = {
            "GetQueueUrl": lambda a: {"QueueUrl": self._url(a["QueueName"])},
            "GetQueueAttributes": lambda a: {"Attributes": {"MaximumMessageSize": "1048576"}},
            "SendMessageBatch": self._send,
            "DeleteMessageBatch": self._done,
            "ChangeMessageVisibility": lambda a: {},
            "ChangeMessageVisibilityBatch": self._done,
        }
        if operation == "ReceiveMessage":
            return (await self._receive(asked)).encode()
        return json.dumps(answers[operation](asked)).encode()

    def _send(self, asked: dict[str, Any]) -> Any:
        queue = self._waiting.setdefault(asked["QueueUrl"], deque())
        done = []
        for entry in asked["Entries"]:
            number = next(self._numbers)
            body = entry["MessageBody"]
            digest = md5(body.encode(), usedforsecurity=False).hexdigest()
            message = {
                "MessageId": f"00000000-0000-0000-0000-{number:012d}",
                "ReceiptHandle": f"r{number}",
                "MD5OfBody": digest,
                "Body": body,
                "Attributes": {"ApproximateReceiveCount": "1", "SentTimestamp": "1700000000000"},
            }
            if "MessageAttributes" in entry:
                message["MessageAttributes"] = entry["MessageAttributes"]
            queue.append(json.dumps(message))
            done.append({"Id": entry["Id"], "MessageId": message["MessageId"], "MD5OfMessageBody": digest})
        for waiting in self._news:
            if not waiting.done():
                waiting.set_result(None)
        self._news.clear()
        return {"Successful": done, "Failed": []}

    def _done(self, asked: dict[str, Any]) -> Any:
        return {"Successful": [{"Id": entry["Id"]} for entry in asked["Entries"]], "Failed": []}

    async def _receive(self, asked: dict[str, Any]) -> str:
        loop = asyncio.get_running_loop()
        end = loop.time() + asked.get("WaitTimeSeconds", 0)
        queue = self._waiting.setdefault(asked["QueueUrl"], deque())
        while not queue and loop.time() < end:
            news = loop.create_future()
            self._news.append(news)
            await asyncio.wait([news], timeout=end - loop.time())
        taken = [queue.popleft() for _ in range(min(len(queue), asked.get("MaxNumberOfMessages", 1)))]
        return '{"Messages":[' + ",".join(taken) + "]}" if taken else "{}"


if __name__ == "__main__":
    queues = Queues()
    asyncio.run(serve(queues.answer, port=queues.reached_by))
