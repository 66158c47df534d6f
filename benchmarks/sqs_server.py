"""A responder that speaks as much of SQS as the benchmark needs: a process of its own, queues in memory.

``python -m benchmarks.sqs_server`` prints its port, and serves until it is killed. AWS JSON protocol 1.0:
POST / with ``X-Amz-Target: AmazonSQS.<operation>``. Queues exist as soon as they are named; visibility never
ends.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import md5
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.harness import python


@contextmanager
def serving() -> Iterator[str]:
    """The endpoint of a running responder."""
    with subprocess.Popen(
        python("sqs_server"), cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


class Queues:
    """What is sent and received; a message is its finished JSON, so that receiving it costs little here."""

    def __init__(self) -> None:
        self.port = 0
        self._waiting: dict[str, deque[str]] = {}
        self._numbers = count(1)
        self._news: list[asyncio.Future[None]] = []

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/000000000000/{name}"

    async def answer(self, operation: str, asked: dict[str, Any]) -> str:
        """The answer's body, as JSON."""
        answers: dict[str, Callable[[dict[str, Any]], Any]] = {
            "GetQueueUrl": lambda a: {"QueueUrl": self._url(a["QueueName"])},
            "GetQueueAttributes": lambda a: {"Attributes": {"MaximumMessageSize": "1048576"}},
            "SendMessageBatch": self._send,
            "DeleteMessageBatch": self._done,
            "ChangeMessageVisibility": lambda a: {},
            "ChangeMessageVisibilityBatch": self._done,
        }
        if operation == "ReceiveMessage":
            return await self._receive(asked)
        return json.dumps(answers[operation](asked))

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


class Connection(asyncio.Protocol):
    """HTTP/1.1 with as little as the SDK's requests need."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._buffer = b""
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        length = int(fields.get(b"content-length", b"0"))
        if len(rest) < length:
            if fields.get(b"expect"):
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        self._buffer = rest[length:]
        operation = fields[b"x-amz-target"].decode().partition(".")[2]
        task = asyncio.create_task(self._answer(operation, json.loads(rest[:length])))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, operation: str, asked: dict[str, Any]) -> None:
        body = (await self._queues.answer(operation, asked)).encode()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\n"
            b"x-amzn-RequestId: 0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )


async def serve() -> None:
    """Serve for ever."""
    queues = Queues()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(queues), "127.0.0.1", 0)
    queues.port = server.sockets[0].getsockname()[1]
    print(queues.port, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
