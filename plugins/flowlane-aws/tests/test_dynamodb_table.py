"""The table is made, waited for and looked at before anything is written; what is wrong is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from flowlane.errors import ConfigError, Retryable
from flowlane.plugins import Registry
from flowlane.ports import Bad, Batch, Record, UnitRef
from flowlane.state import Position
from flowlane.testing.sink_suite import split
from flowlane_aws.dynamodb.factory import open_sink
from flowlane_aws.dynamodb.table import PATIENCE
from tests.aws_wire import Answer
from tests.dynamodb_tables import ENVIRONMENT, MARK, call, contents, items
from tests.fault_proxy import Exchange, FaultProxy, changed, refused


@pytest.fixture(params=["ministack", "moto"])
def server(request: pytest.FixtureRequest) -> str:
    endpoint: str = request.getfixturevalue(request.param)
    return endpoint


async def load(records: list[Record], **options: Any) -> list[Bad]:
    """`records` as one batch into the table ``rows``."""
    async with (
        open_sink("dynamodb://rows", ENVIRONMENT, **options) as sink,
        sink.open(split(), UnitRef("lane/unit/a", 1)) as writer,
    ):
        end = Position(10 * len(records), len(records))
        return list(await writer.write(Batch(records, Position(), end, [])))


def described(table: str = "rows") -> Any:
    return call("DescribeTable", {"TableName": table})["Table"]


def make(**more: Any) -> None:
    """The table ``rows`` by other means, with the key (``pk`` S, ``sk`` N) if nothing else is said."""
    wanted = {
        "TableName": "rows",
        "KeySchema": [
            {"AttributeName": "pk", "KeyType": "HASH"},
            {"AttributeName": "sk", "KeyType": "RANGE"},
        ],
        "AttributeDefinitions": [
            {"AttributeName": "pk", "AttributeType": "S"},
            {"AttributeName": "sk", "AttributeType": "N"},
        ],
        "BillingMode": "PAY_PER_REQUEST",
    }
    call("CreateTable", {**wanted, **more})


async def test_a_table_is_made_of_the_options(server: str) -> None:
    options = {"key": "pk", "sort": "sk", "key_type": "N", "sort_type": "B", "create": "true"}
    assert await load([{"pk": "1", "sk": b"\0", "text": "x"}], **options) == []
    table = described()
    assert table["KeySchema"] == [
        {"AttributeName": "pk", "KeyType": "HASH"},
        {"AttributeName": "sk", "KeyType": "RANGE"},
    ]
    types = {each["AttributeName"]: each["AttributeType"] for each in table["AttributeDefinitions"]}
    assert types == {"pk": "N", "sk": "B"}
    assert table["BillingModeSummary"]["BillingMode"] == "PAY_PER_REQUEST"
    assert contents("rows") == [{"pk": 1, "sk": b"\0", "text": "x"}]
    assert await load([{"pk": "2", "sk": b"\0"}], **options) == []  # it is there by now
    assert len(contents("rows")) == 2


async def test_a_table_that_is_there_needs_no_options(server: str) -> None:
    make()
    assert await load([{"pk": 5, "sk": "07", "text": "x"}]) == []
    assert contents("rows") == [{"pk": "5", "sk": 7, "text": "x"}]


async def test_values_come_back_as_they_went(server: str) -> None:
    make()
    record = {
        "pk": "żółć",
        "sk": 2**100,
        "text": "a\0b\n\u2028\U0001f600",
        "empty": "",
        "bytes": bytes(range(256)),
        "float": 0.1,
        "nothing": None,
        "yes": True,
        "list": [1, ["a", None], {"b": b""}],
        "record": {"b": {"c": 1.5}},
        "when": datetime(2024, 1, 2, tzinfo=UTC),
    }
    assert await load([record]) == []
    (found,) = contents("rows")
    wanted = {**record, "when": "2024-01-02T00:00:00+00:00"}
    assert {
        **found,
        "float": float(found["float"]),
        "record": {"b": {"c": float(found["record"]["b"]["c"])}},
    } == wanted


async def test_what_cannot_be_an_item_is_refused_row_by_row(server: str) -> None:
    make()
    records: list[Any] = [
        {"pk": "a", "sk": 1},
        {"pk": "", "sk": 1},
        {"pk": "x" * 2049, "sk": 1},
        {"pk": "b"},
        {"pk": "b", "sk": "one"},
        {"pk": "b", "sk": 2, "v": float("nan")},
        {"pk": "b", "sk": 2, "v": 10**40 + 1},
        {"pk": "b", "sk": 2, "v": "x" * 409_600},
        {"pk": "b", "sk": 2, MARK: "mine"},
        {"pk": "b", "sk": 2, "v": 10**5000},
        {"pk": "c", "sk": 3},
    ]
    bad = await load(records)
    assert [each.row for each in bad] == list(range(1, 10))
    for each, why in zip(
        bad,
        (
            "empty",
            "2,048",
            "no value for its key",
            "no number",
            "no number",
            "38",
            "409,600",
            "_flowlane",
            "38",
        ),
        strict=True,
    ):
        assert why in each.reason, each
    assert "cannot be shown" in bad[-1].raw
    assert sorted(record["pk"] for record in contents("rows")) == ["a", "c"]


async def test_an_item_as_large_as_may_be_is_taken(ministack: str) -> None:
    """With the mark, which is counted as long as it can be: up to 60 bytes of room are left. (moto
    counts otherwise, and refuses it.)"""
    make()
    fits, size = {"pk": "a", "sk": 1, "v": ""}, 409_600
    bad = await load([{**fits, "v": "x" * (size - 149)}])
    assert bad == []
    assert "an item has 409,600 at most" in (await load([{**fits, "v": "x" * (size - 80)}]))[0].reason


async def test_keys_of_indexes_get_their_type(server: str) -> None:
    index = {
        "IndexName": "by-n",
        "KeySchema": [{"AttributeName": "n", "KeyType": "HASH"}, {"AttributeName": "pk", "KeyType": "RANGE"}],
        "Projection": {"ProjectionType": "ALL"},
    }
    key = {"AttributeName": "pk", "KeyType": "HASH"}
    types = [{"AttributeName": "pk", "AttributeType": "S"}, {"AttributeName": "n", "AttributeType": "N"}]
    make(KeySchema=[key], AttributeDefinitions=types, GlobalSecondaryIndexes=[index])
    bad = await load(
        [{"pk": 1, "n": "5"}, {"pk": 2, "n": None}, {"pk": 3}, {"pk": 4, "n": "x"}, {"pk": "x" * 1025}]
    )
    assert [(each.row, each.reason) for each in bad] == [
        (3, "'n': 'x' is no number, and this key is one"),
        (4, "'pk': 1,025 bytes, and this key has 1,024 at most"),
    ]
    found = {item["pk"]["S"]: item.get("n") for item in items("rows")}
    assert found == {"1": {"N": "5"}, "2": None, "3": None}


async def test_the_last_of_a_key_stays_however_it_is_written(server: str) -> None:
    make()
    records = [{"pk": "a", "sk": n, "text": str(n)} for n in (1, "1.0", "01", 1.0)]
    assert await load([*records, {"pk": "a", "sk": "1e0", "text": "last"}]) == []
    assert contents("rows") == [{"pk": "a", "sk": 1, "text": "last"}]


@pytest.mark.parametrize(
    "before",
    [
        {},
        {MARK: {"S": "somebody's"}},
        {MARK: {"M": {}}},
        {MARK: {"N": "99"}},
        {MARK: {"M": {"g": {"S": "x"}}}},
    ],
)
async def test_what_others_wrote_is_replaced(server: str, before: dict[str, Any]) -> None:
    make()
    call("PutItem", {"TableName": "rows", "Item": {"pk": {"S": "a"}, "sk": {"N": "1"}, **before}})
    assert await load([{"pk": "a", "sk": 1, "text": "x"}]) == []
    assert contents("rows") == [{"pk": "a", "sk": 1, "text": "x"}]


# ---------------------------------------------------------------------- said before anything is written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "there is no DynamoDB table rows: create it, or add create=true"),
        ({"create": "true"}, "say by which key="),
        ({"create": "maybe"}, "create='maybe': say true or false"),
        ({"exactly": "2"}, "exactly='2': say true or false"),
        ({"key": "a", "key_type": "X"}, "key_type='X': must be S"),
        ({"sort": "a"}, "need a key="),
        ({"key": "a", "sort": "a"}, "another attribute"),
        ({"key": "a", "sort_type": "S"}, "another attribute"),
        ({"mode": "append"}, "mode='append'"),
        ({"schema": "freeze"}, "schema='freeze'"),
        ({"form": "prose"}, "form='prose': must be transactions or puts"),
        ({"bookkeeping": ""}, "bookkeeping= is empty"),
        ({"key": "a", "create": True, "bookkeeping": "a"}, "a is a key of the table"),
    ],
)
async def test_wrong_options(ministack: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        await load([], **options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["", "ab", "a b", "a/b", "x" * 256, "tab\n", "żółw", "a:b"])
async def test_names_that_no_table_has(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a DynamoDB table"):
        async with open_sink(f"dynamodb://{name}", ENVIRONMENT):
            pass


@pytest.mark.parametrize(
    "options",
    [
        {"key": "id"},
        {"key": "pk"},
        {"key": "sk", "sort": "pk"},
        {"key": "pk", "sort": "sk", "sort_type": "S"},
        {"key": "pk", "sort": "sk", "key_type": "B", "create": "true"},
    ],
)
async def test_a_table_with_another_key_is_told(server: str, options: dict[str, str]) -> None:
    make()
    with pytest.raises(
        ConfigError, match=r"has another key than .*: write key=pk&key_type=S&sort=sk&sort_type=N, or"
    ):
        await load([], **options)


async def test_the_plugin_opens_it_by_uri(ministack: str) -> None:
    registry = Registry.load()
    url, options = registry.split(
        "sink", "dynamodb://rows?key=pk&sort=sk&sort_type=N&create=true&exactly=false"
    )
    async with registry.open("sink", url, ENVIRONMENT, options) as sink:
        assert sink
    assert described()["TableStatus"] == "ACTIVE"
    with pytest.raises(
        ConfigError, match="unknown option 'keys'; known: bookkeeping, create, endpoint, exactly, form"
    ):
        registry.open("sink", url, ENVIRONMENT, {"keys": "pk"})


# ---------------------------------------------------------------------- waiting


@pytest.fixture
async def proxy(ministack: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(ministack) as proxy:
        yield proxy


class Patient:
    """A clock on which waiting takes no time."""

    def __init__(self) -> None:
        self.time = 0.0

    def monotonic(self) -> float:
        return self.time

    def random(self) -> float:
        return 1.0

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        await asyncio.sleep(0)


def status(name: str) -> Any:
    """A fault: the table is said to be in the status `name`."""

    def change(answer: Answer) -> None:
        told = json.loads(answer.body)
        told["Table"]["TableStatus"] = name
        answer.body = json.dumps(told).encode()
        answer.headers.pop("x-amz-crc32", None)

    return changed(change)


async def opened(proxy: FaultProxy, **options: Any) -> float:
    """The sink can be opened through `proxy`; the time that it waited."""
    clock = Patient()
    environment: Any = type(ENVIRONMENT)(clock, ENVIRONMENT.connections)  # type: ignore[arg-type]  # what is asked of it
    wanted = {"key": "pk", "create": "true", "endpoint": proxy.url, **options}
    async with open_sink("dynamodb://rows", environment, **wanted):
        return clock.time


async def test_a_new_table_is_waited_for(proxy: FaultProxy) -> None:
    asked = proxy.inject("dynamodb.DescribeTable", status("CREATING"), nth=2, times=6)
    assert 3 < await opened(proxy) < 20
    assert asked.fired == 6


async def test_a_table_that_is_not_seen_yet_is_waited_for(proxy: FaultProxy) -> None:
    asked = proxy.inject("dynamodb.DescribeTable", refused(400, "ResourceNotFoundException"), times=4)
    assert await opened(proxy) > 0
    assert asked.fired == 4
    assert proxy.calls["dynamodb.CreateTable"] == 1


async def test_a_table_that_somebody_else_makes_now_is_waited_for(proxy: FaultProxy) -> None:
    async def first(exchange: Exchange) -> bool:
        await exchange.forward()
        return await refused(400, "ResourceInUseException")(exchange)

    made = proxy.inject("dynamodb.CreateTable", first)
    await opened(proxy)
    assert made.fired == 1


async def test_waiting_ends(proxy: FaultProxy) -> None:
    proxy.inject("dynamodb.DescribeTable", status("CREATING"), nth=2, times=-1)
    with pytest.raises(Retryable, match=f"rows is still being created after {PATIENCE:g} s"):
        await opened(proxy)
    assert 24 <= proxy.calls["dynamodb.DescribeTable"] <= 40  # pauses of 0.05 s, doubled up to 5 s


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("DELETING", Retryable, "rows is being deleted"),
        ("ARCHIVED", ConfigError, r"cannot be written to \(its status is ARCHIVED\)"),
    ],
)
async def test_a_table_that_is_no_use(
    proxy: FaultProxy, name: str, error: type[Exception], said: str
) -> None:
    await opened(proxy)
    proxy.inject("dynamodb.DescribeTable", status(name), times=-1)
    with pytest.raises(error, match=said):
        await opened(proxy)


async def test_a_table_that_is_being_changed_is_used(proxy: FaultProxy) -> None:
    await opened(proxy)
    proxy.inject("dynamodb.DescribeTable", status("UPDATING"), times=-1)
    assert await opened(proxy) == 0


@pytest.mark.parametrize("operation", ["dynamodb.DescribeTable", "dynamodb.CreateTable"])
async def test_what_may_not_be_asked_is_told(proxy: FaultProxy, operation: str) -> None:
    proxy.inject(operation, refused(400, "AccessDeniedException"), times=-1)
    with pytest.raises(ConfigError, match=r"ing DynamoDB table rows: not allowed \(AccessDeniedException"):
        await opened(proxy)


async def test_a_hiccup_is_no_failure(proxy: FaultProxy) -> None:
    rules = [
        proxy.inject(operation, refused(500, "InternalServerError"), times=2)
        for operation in ("dynamodb.DescribeTable", "dynamodb.CreateTable")
    ]
    await opened(proxy)
    assert [rule.fired for rule in rules] == [2, 2]
