"""Rows into a DynamoDB table: the forms of writing, bare loops that send the same, and what users do.

On MiniStack, rows a second are bounded by the stand-in, which is one process, and tell nothing of AWS: what
they tell is how much of the time that a server takes is left unused. On the responder (``dynamodb_server``)
it is the other way round: there the client's CPU is the bound. ``again`` is a second load of the same rows,
of which nothing may be written (the responder knows no conditions: there it is the same load twice).

The bare loops send the very requests that flowlane sends, 32 at once, and look at nothing but the status of
the answer; their making is not in their time, and they are not signed. "SDK loop" has aioboto3 send the same
requests as parameters, made before the clock runs, too. Every row is looked for in the table after the clock
has stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from benchmarks import dynamodb_server
from benchmarks.harness import Bar, Candidate, Case, peak_mb, python

ROWS = 5_000
MANY = 50_000
#: As much as the engine hands over at once.
BATCH = 10_000
#: Requests of the loops that are under way: as many as flowlane has at most.
CALLS = 32

Load = Callable[[], Awaitable[None]]


def candidates(endpoint: str, rows: int, kinds: dict[str, str]) -> Sequence[Candidate]:
    """Those of `kinds`, by their names in tables, who write to `endpoint`."""
    return [Candidate(name, python("dynamodb", kind, endpoint, rows)) for name, kind in kinds.items()]


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """MiniStack, and who writes to it."""
    from tests import servers

    with servers.server("ministack") as endpoint:
        yield candidates(
            endpoint,
            size or ROWS,
            {
                "transactions of 100": "transactions",
                "bare loop, transactions": "bare-transactions",
                "batches, exactly=false": "batches",
                "bare loop, batches": "bare-batches",
                "single puts": "puts",
                "SDK: conditional puts": "sdk-puts",
                "aioboto3 batch_writer": "batch_writer",
            },
        )


@contextmanager
def opened_responder(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """The responder, and who writes to it."""
    with dynamodb_server.serving() as endpoint:
        yield candidates(
            endpoint,
            size or MANY,
            {
                "transactions of 100": "transactions",
                "bare loop, transactions": "bare-transactions",
                "SDK loop, transactions": "sdk-transactions",
                "batches, exactly=false": "batches",
                "bare loop, batches": "bare-batches",
                "SDK loop, batches": "sdk-batches",
            },
        )


CASE = Case(
    "dynamodb",
    f"{ROWS:,} rows of 10 fields into a DynamoDB table of MiniStack",
    opened,
    {
        "rate": "rows/s",
        "cpu_row": "CPU us a row",
        "calls": "rows a call",
        "again_rate": "again: rows/s",
        "again_cpu_row": "again: CPU us a row",
        "peak": "peak MB",
    },
    [
        Bar("transactions of 100", "rate", "at least", 0.9, "bare loop, transactions"),
        Bar("batches, exactly=false", "rate", "at least", 0.9, "bare loop, batches"),
        Bar("transactions of 100", "cpu_row", "at most", 0.5, "aioboto3 batch_writer"),
        Bar("transactions of 100", "rate", "at least", 1.2, "single puts"),
    ],
    peer="single puts",
)
CLIENT = Case(
    "dynamodb-client",
    f"{MANY:,} rows of 10 fields to a responder that takes them at once: the client is the bound",
    opened_responder,
    {
        "rate": "rows/s",
        "cpu_row": "CPU us a row",
        "calls": "rows a call",
        "again_rate": "again: rows/s",
        "peak": "peak MB",
    },
    [
        Bar("transactions of 100", "rate", "at least", 0.9, "SDK loop, transactions"),
        Bar("batches, exactly=false", "rate", "at least", 0.9, "SDK loop, batches"),
    ],
    peer="bare loop, transactions",
)


def record(number: int) -> dict[str, Any]:
    """One row, of about 300 bytes."""
    return {
        "id": f"order-{number:08}",
        "number": number,
        "price": number / 7,
        "paid": number % 3 == 0,
        "note": None,
        **{f"text{n}": f"some text that is {n} of {number}" for n in range(5)},
    }


async def flowlane(endpoint: str, rows: int, options: dict[str, Any]) -> tuple[list[float], int]:
    """Through the sink, as the engine uses it."""
    from flowlane.clock import SystemClock
    from flowlane.ports import Batch, Connections, Environment, Split, UnitRef
    from flowlane.state import Position
    from flowlane_aws.dynamodb.factory import open_sink

    environment = Environment(SystemClock(), cast(Connections, None))
    records = [record(number) for number in range(rows)]

    async def load(token: int) -> None:
        async with sink.open(Split("a", "a"), UnitRef("bench/unit", token)) as writer:
            for first in range(0, rows, BATCH):
                some = records[first : first + BATCH]
                refused = await writer.write(
                    Batch(some, Position(0, first), Position(0, first + len(some)), [])
                )
                assert not refused
            await writer.finish()

    async with open_sink(
        "dynamodb://bench", environment, key="id", create=True, endpoint=endpoint, **options
    ) as sink:
        calls: list[str] = []
        events = sink._client.meta.events
        events.register("before-call.dynamodb", lambda model, **_: calls.append(model.name))
        return await measured(partial(load, 1), partial(load, 2)), len(calls) // 2


def requests(kind: str, rows: int) -> list[bytes]:
    """What flowlane sends for that many rows: the bodies, in the form ``transactions`` or ``batches``."""
    from flowlane.ports import Batch, Split, UnitRef
    from flowlane.state import Position
    from flowlane_aws.dynamodb.forms import Batches, Transactions, chunks
    from flowlane_aws.dynamodb.sink import Making
    from flowlane_aws.dynamodb.table import Table
    from flowlane_aws.dynamodb.values import Key

    form, mark = (
        (Transactions(None, "bench"), "_flowlane") if kind == "transactions" else (Batches(None, "bench"), "")
    )
    key = Key("id", "S", 2048)
    making = Making(Table("bench", (key,), {"id": key}), mark, Split("a", "a"), UnitRef("bench/unit", 1))
    batch = Batch([record(n) for n in range(rows)], Position(0, 0), Position(0, rows), [])
    return [form.request(chunk) for items, _ in making.slices(batch) for chunk in chunks(items, form)]


async def bare(kind: str, endpoint: str, rows: int) -> tuple[list[float], int]:
    """Those requests, by aiohttp, as bytes."""
    import aiohttp

    bodies = requests(kind, rows)
    operation = {"transactions": "TransactWriteItems", "batches": "BatchWriteItem"}[kind]
    headers = {
        "Content-Type": "application/x-amz-json-1.0",
        "X-Amz-Target": f"DynamoDB_20120810.{operation}",
        "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/dynamodb/aws4_request, "
        "SignedHeaders=host, Signature=0",
    }
    # A second load of transactions is refused, as it has to be.
    expected = {200, 400} if kind == "transactions" else {200}

    async def send(body: bytes) -> None:
        async with session.post(endpoint, data=body, headers=headers) as answer:
            told = await answer.read()
            assert answer.status in expected, told
            assert not json.loads(told).get("UnprocessedItems"), told

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CALLS)) as session:
        return await measured(*2 * [partial(at_once, send, bodies)]), len(bodies)


async def sdk(kind: str, endpoint: str, rows: int) -> tuple[list[float], int]:
    """Those requests, by aioboto3, as parameters."""
    import aioboto3  # type: ignore[import-untyped]  # ships no types

    asked = [json.loads(body) for body in requests(kind, rows)]
    operation = {"transactions": "transact_write_items", "batches": "batch_write_item"}[kind]
    async with aioboto3.Session().client("dynamodb", endpoint_url=endpoint) as client:
        call = getattr(client, operation)

        async def send(params: dict[str, Any]) -> None:
            assert not (await call(**params)).get("UnprocessedItems")

        return await measured(*2 * [partial(at_once, send, asked)]), len(asked)


async def at_once(send: Callable[[Any], Awaitable[None]], asked: Sequence[Any]) -> None:
    """`send` all of `asked`, ``CALLS`` at a time."""
    left = iter(asked)

    async def work() -> None:
        for each in left:
            await send(each)

    await asyncio.gather(*(work() for _ in range(CALLS)))


async def sdk_puts(endpoint: str, rows: int) -> tuple[list[float], int]:
    """A loop of conditional PutItems, 64 at once, with the SDK's own parameters."""
    from botocore.exceptions import ClientError

    from flowlane_aws.clients import open_client

    async def load() -> None:
        numbers = iter(range(rows))

        async def work() -> None:
            for number in numbers:
                try:
                    await client.put_item(
                        TableName="bench",
                        Item=plain(number),
                        ConditionExpression="attribute_not_exists(#r) OR #r < :r",
                        ExpressionAttributeNames={"#r": "_row"},
                        ExpressionAttributeValues={":r": {"N": str(number)}},
                    )
                except ClientError as error:
                    if error.response["Error"]["Code"] != "ConditionalCheckFailedException":
                        raise

        await asyncio.gather(*(work() for _ in range(64)))

    def plain(number: int) -> dict[str, Any]:
        from boto3.dynamodb.types import TypeSerializer  # type: ignore[import-untyped]  # ships no types

        return {name: TypeSerializer().serialize(value) for name, value in decimal(number).items()}

    async with open_client("dynamodb", endpoint=endpoint) as client:
        await create(client)
        return await measured(load, load), rows


async def batch_writer(endpoint: str, rows: int) -> tuple[list[float], int]:
    """As the SDK's guide has it: no conditions, one batch after the other."""
    import aioboto3

    async with aioboto3.Session().resource("dynamodb", endpoint_url=endpoint) as resource:
        await create(resource.meta.client)
        table = await resource.Table("bench")

        async def load() -> None:
            async with table.batch_writer() as batch:
                for number in range(rows):
                    await batch.put_item(Item=decimal(number))

        return await measured(load, load), rows // 25


def decimal(number: int) -> dict[str, Any]:
    """The row as the SDK wants it: with decimals, since it refuses floats."""
    from decimal import Decimal

    return {**record(number), "price": Decimal(repr(number / 7)), "_row": number}


async def create(client: Any) -> None:
    """The table ``bench``."""
    await client.create_table(
        TableName="bench",
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )


async def measured(*loads: Load) -> list[float]:
    """Wall and CPU seconds of each."""
    figures = []
    for load in loads:
        wall, cpu = time.perf_counter(), time.process_time()
        await load()
        figures += [time.perf_counter() - wall, time.process_time() - cpu]
    return figures


def main(kind: str, endpoint: str, rows: int) -> dict[str, float]:
    """One candidate, in this process."""
    from tests import servers

    responder = rows_told(endpoint) is not None
    if not responder:
        servers.reset(endpoint)
    os.environ.update(servers.environment(endpoint))
    (wall, cpu, again_wall, again_cpu), calls = asyncio.run(work_of(kind, endpoint, rows, made=responder))
    peak = peak_mb()
    check(endpoint, rows)
    return {
        "rate": rows / wall,
        "cpu_row": cpu / rows * 1e6,
        "calls": rows / calls,
        "again_rate": rows / again_wall,
        "again_cpu_row": again_cpu / rows * 1e6,
        "peak": peak,
    }


async def work_of(kind: str, endpoint: str, rows: int, *, made: bool) -> tuple[list[float], int]:
    """Seconds of the loads, wall and CPU, and the calls of one; the table is `made` already, or not."""
    from flowlane_aws.clients import open_client

    way, _, form = kind.partition("-")
    if way == "bare" and not made:
        async with open_client("dynamodb", endpoint=endpoint) as client:
            await create(client)
    if way == "bare":
        return await bare(form, endpoint, rows)
    if kind == "sdk-puts":
        return await sdk_puts(endpoint, rows)
    if way == "sdk":
        return await sdk(form, endpoint, rows)
    if kind == "batch_writer":
        return await batch_writer(endpoint, rows)
    return await flowlane(endpoint, rows, {"exactly": "false"} if kind == "batches" else {"form": kind})


def check(endpoint: str, rows: int) -> None:
    """Every row is in the table, as it should be."""
    from tests.dynamodb_tables import items

    found = rows_told(endpoint)
    if found is None:
        found = {item["id"]["S"]: item["text4"]["S"] for item in items("bench")}
    assert found == {record(n)["id"]: record(n)["text4"] for n in range(rows)}, "rows are missing or wrong"


def rows_told(endpoint: str) -> dict[str, str] | None:
    """What the responder has taken since it was last asked; None of another server."""
    asked = urllib.request.Request(endpoint, b"{}", {"X-Amz-Target": "Bench.Texts"})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            found: dict[str, str] = json.load(answer)
            return found
    except (urllib.error.HTTPError, ValueError):
        return None


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
