"""How the log's table is made: by ``flowlane init`` or a deploy template, never at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from botocore.exceptions import ClientError

from flowlane.errors import ConfigError, Retryable
from flowlane_aws.clients import asking
from flowlane_aws.log.items import INDEXES
from flowlane_aws.log.table import Table


async def create(table: Table) -> bool:
    """The table is there and active; whether it was made now.

    Raises:
        ConfigError: one of that name is there that is no log of flowlane's; or it may not be made.
        Retryable: it is not active yet after some minutes.
    """
    made = True
    try:
        async with asking(f"making table {table.name}", passing={"ResourceInUseException"}):
            await table.client.create_table(TableName=table.name, **definition())
    except ClientError:  # passed: it is there, or in the making
        made = False
    for _ in range(300):
        async with asking(f"looking at table {table.name}"):
            there = (await table.client.describe_table(TableName=table.name))["Table"]
        if there["TableStatus"] == "ACTIVE":
            _check(table, there)
            return made
        await table.clock.sleep(1.0)
    raise Retryable(f"table {table.name} is there, and not active after minutes: run this again later")


def _check(table: Table, there: Mapping[str, Any]) -> None:
    indexes = {index["IndexName"] for index in there.get("GlobalSecondaryIndexes", ())}
    keys = [each["AttributeName"] for each in there["KeySchema"]]
    if keys != ["pk", "sk"] or not INDEXES.keys() <= indexes:
        raise ConfigError(
            f"table {table.name} is there and is no log of flowlane's (or of another release): name "
            f"another one by table= in {table.backend}"
        )


def definition() -> Mapping[str, Any]:
    """What ``CreateTable`` is given besides the name."""
    attributes = sorted({"pk", "sk"} | {name for index in INDEXES.values() for name in index[:2]})
    return {
        "BillingMode": "PAY_PER_REQUEST",
        "AttributeDefinitions": [{"AttributeName": name, "AttributeType": "S"} for name in attributes],
        "KeySchema": _schema("pk", "sk"),
        "GlobalSecondaryIndexes": [
            {"IndexName": name, "KeySchema": _schema(partition, sort), "Projection": _projection(besides)}
            for name, (partition, sort, besides) in INDEXES.items()
        ],
    }


def _schema(partition: str, sort: str) -> list[Mapping[str, str]]:
    return [
        {"AttributeName": partition, "KeyType": "HASH"},
        {"AttributeName": sort, "KeyType": "RANGE"},
    ]


def _projection(besides: Sequence[str]) -> Mapping[str, Any]:
    if not besides:
        return {"ProjectionType": "KEYS_ONLY"}
    return {"ProjectionType": "INCLUDE", "NonKeyAttributes": list(besides)}
