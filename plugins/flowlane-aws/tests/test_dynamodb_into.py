"""A table that the lane learns of from data, under ``dynamodb://``: made by its spec, on demand."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from flowlane.errors import ConfigError
from flowlane.ports import Batch, Record, TableSpec, UnitRef
from flowlane.state import Position
from flowlane.testing.sink_suite import split
from flowlane_aws.dynamodb.factory import open_sink
from tests.dynamodb_tables import ENVIRONMENT, call, contents

SPEC = TableSpec("rows", ("pk", "sk"), "upsert", types=(("pk", "N"), ("sk", "B")))


async def load(
    records: list[Record],
    into: TableSpec | None,
    generation: int = 0,
    uri: str = "dynamodb://",
    **options: Any,
) -> None:
    """`records` as one batch of a unit of that generation."""
    async with (
        open_sink(uri, ENVIRONMENT, into=into, **options) as sink,
        sink.open(split(), UnitRef(f"lane/unit/{generation}", 1, generation)) as writer,
    ):
        end = Position(10 * len(records), len(records))
        assert list(await writer.write(Batch(records, Position(), end, []))) == []
        assert list(writer.changes) == []
        await writer.finish()


def described() -> Any:
    return call("DescribeTable", {"TableName": "rows"})["Table"]


async def test_the_table_is_made_of_the_spec(ministack: str) -> None:
    await load([{"pk": 1, "sk": b"\0", "text": "x"}], SPEC)
    table = described()
    assert [(part["AttributeName"], part["KeyType"]) for part in table["KeySchema"]] == [
        ("pk", "HASH"),
        ("sk", "RANGE"),
    ]
    types = {each["AttributeName"]: each["AttributeType"] for each in table["AttributeDefinitions"]}
    assert types == {"pk": "N", "sk": "B"}
    assert table["BillingModeSummary"]["BillingMode"] == "PAY_PER_REQUEST"
    assert contents("rows") == [{"pk": 1, "sk": b"\0", "text": "x"}]


async def test_generations_apply_in_any_order(ministack: str) -> None:
    spec = TableSpec("rows", ("id",), "upsert", types=(("id", "S"),))
    for order in permutations((1, 2, 3)):
        key = "".join(map(str, order))
        for generation in (*order, order[0]):
            await load([{"id": key, "v": generation}], spec, generation)
    assert {(row["id"], row["v"]) for row in contents("rows")} == {
        ("".join(map(str, order)), 3) for order in permutations((1, 2, 3))
    }


async def test_a_missing_table_is_not_made_where_the_uri_forbids_it(ministack: str) -> None:
    with pytest.raises(ConfigError, match="there is no DynamoDB table rows"):
        await load([{"pk": 1, "sk": b"\0"}], SPEC, create="false")


async def test_a_table_of_another_key_is_told(ministack: str) -> None:
    await load([{"id": "1"}], TableSpec("rows", ("id",), "upsert", types=(("id", "S"),)))
    with pytest.raises(
        ConfigError,
        match="rows has another key than key=pk&key_type=N&sort=sk&sort_type=B: write key=id&key_type=S,",
    ):
        await load([{"pk": 1, "sk": b"\0"}], SPEC)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"uri": "dynamodb://rows"}, "leave them out"),
        ({"key": "pk"}, "leave them out"),
        ({"sort_type": "N"}, "leave them out"),
        ({"into": TableSpec("rows", (), "upsert")}, "has 0 columns"),
        ({"into": TableSpec("rows", ("a", "b", "c"), "upsert")}, "has 3 columns"),
        ({"into": TableSpec("rows", ("a",), "append")}, "can only be upsert"),
        ({"into": TableSpec("a/b", ("a",), "upsert")}, "no name of a DynamoDB table"),
        ({"into": None}, "no name of a DynamoDB table"),
    ],
)
async def test_what_cannot_be_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        await load([{"pk": 1}], **{"into": SPEC, **given})
