"""A responder that speaks as much of DynamoDB as writing takes: a process of its own, that keeps requests.

``python -m benchmarks.dynamodb_server`` prints its port, and serves until it is killed. AWS JSON protocol
1.0: POST / with ``X-Amz-Target: DynamoDB_20120810.<operation>``. There is one table, which takes everything
at once: so what is measured against it is who writes. ``Bench.Texts``, which is nobody's operation but the
benchmark's, answers with what it took since the last time: a text of every item, by its key.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import python

_ANSWERS = {"BatchWriteItem": b'{"UnprocessedItems":{}}'}


@contextmanager
def serving() -> Iterator[str]:
    """The endpoint of a running responder."""
    with subprocess.Popen(
        python("dynamodb_server"), cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


class Table:
    """What was asked, as it came; it is looked into when somebody wants to know."""

    def __init__(self) -> None:
        self._taken: list[tuple[str, bytes]] = []

    def answer(self, operation: str, body: bytes) -> bytes:
        """The answer's body."""
        if operation == "Texts":
            texts = self._texts()
            self._taken.clear()
            return json.dumps(texts).encode()
        if operation in ("CreateTable", "DescribeTable"):
            return _DESCRIPTION
        self._taken.append((operation, body))
        return _ANSWERS.get(operation, b"{}")

    def _texts(self) -> dict[str, str]:
        found = {}
        for operation, body in self._taken:
            for item in _items(operation, json.loads(body)):
                found[item["id"]["S"]] = item["text4"]["S"]
        return found


def _items(operation: str, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if operation == "PutItem":
        yield asked["Item"]
    elif operation == "TransactWriteItems":
        yield from (action["Put"]["Item"] for action in asked["TransactItems"])
    elif operation == "BatchWriteItem":
        for puts in asked["RequestItems"].values():
            yield from (put["PutRequest"]["Item"] for put in puts)


_DESCRIPTION = json.dumps(
    {
        "Table": {
            "TableName": "bench",
            "TableStatus": "ACTIVE",
            "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
            "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "S"}],
        }
    }
).encode()


class Connection(asyncio.Protocol):
    """HTTP/1.1 with as little as the requests need: one at a time, with a Content-Length."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._parts: list[bytes] = []
        self._missing = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._missing -= len(data)
        if self._missing > 0:
            return
        request = b"".join(self._parts)
        self._parts = [request]
        head, found, body = request.partition(b"\r\n\r\n")
        if not found:
            return
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        self._missing = int(fields[b"content-length"]) - len(body)
        if self._missing > 0:
            return
        self._parts = []
        operation = fields[b"x-amz-target"].decode().rpartition(".")[2]
        told = self._table.answer(operation, body)
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\nx-amzn-RequestId: 0\r\n"
            b"x-amz-crc32: %d\r\nContent-Length: %d\r\n\r\n%s" % (zlib.crc32(told), len(told), told)
        )


async def serve() -> None:
    """Serve for ever."""
    table = Table()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(table), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
