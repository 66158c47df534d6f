"""What a reader finds in a DynamoDB table of a stand-in."""

from __future__ import annotations

import json
import os
import urllib.request
from base64 import b64decode
from decimal import Decimal
from typing import Any, cast

from flowlane.clock import SystemClock
from flowlane.ports import Connections, Environment, Record

ENVIRONMENT = Environment(SystemClock(), cast(Connections, None))
MARK = "_flowlane"


def plain(value: dict[str, Any]) -> Any:
    """What an attribute value stands for."""
    ((kind, held),) = value.items()
    if kind == "N":
        return int(held) if Decimal(held) == int(Decimal(held)) else Decimal(held)
    if kind == "B":
        return b64decode(held)
    if kind == "M":
        return {name: plain(inner) for name, inner in held.items()}
    if kind == "L":
        return [plain(inner) for inner in held]
    return None if kind == "NULL" else held


def call(operation: str, request: dict[str, Any], endpoint: str = "") -> dict[str, Any]:
    """Ask the stand-in that the environment points at, without an SDK: a new client costs 50 ms."""
    names = "Credential=test/20260101/us-east-1/dynamodb/aws4_request, SignedHeaders=host, Signature=0"
    headers = {
        "Content-Type": "application/x-amz-json-1.0",
        "X-Amz-Target": f"DynamoDB_20120810.{operation}",
        "Authorization": f"AWS4-HMAC-SHA256 {names}",
    }
    url = endpoint or os.environ["AWS_ENDPOINT_URL"]
    body = json.dumps(request).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def items(table: str) -> list[dict[str, Any]]:
    """Every item as it is, flowlane's mark with it."""
    found: list[dict[str, Any]] = []
    page: dict[str, Any] = {"LastEvaluatedKey": None}
    while "LastEvaluatedKey" in page:
        asked = {"TableName": table, "ConsistentRead": True}
        if page["LastEvaluatedKey"]:
            asked["ExclusiveStartKey"] = page["LastEvaluatedKey"]
        page = call("Scan", asked)
        found += page["Items"]
    return found


def contents(table: str) -> list[Record]:
    """Every item as a record."""
    return [{name: plain(value) for name, value in item.items() if name != MARK} for item in items(table)]
