"""A responder that speaks as much of DynamoDB as writing takes: a process of its own, that keeps requests.

``python -m benchmarks.dynamodb_server`` prints its port, and serves until it is killed. AWS JSON protocol
1.0: POST / with ``X-Amz-Target: DynamoDB_20120810.<operation>``. There is one table, which takes everything
at once: so what is measured against it is who writes. ``Bench.Texts``, which is nobody's operation but the
benchmark's, answers with what it took since the last time: a text of every item, by its key.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.responder import serve, started

_ANSWERS = {"BatchWriteItem": b'{"UnprocessedItems":{}}'}


def serving() -> AbstractContextManager[str]:
    """The endpoint of a running responder."""
    return started("dynamodb_server")


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


if __name__ == "__main__":
    asyncio.run(serve(Table().answer, crc=True))
