"""Rows into a DynamoDB table on MiniStack: the forms of conditional writing, and what users do otherwise.

What a client costs is its CPU time a row. Rows a second are bounded by the stand-in, which is one process,
and tell nothing of AWS. ``again`` is a second load of the same rows, of which nothing may be written. Every
row is looked for in the table after the clock has stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from benchmarks.harness import Bar, Candidate, Case, peak_mb, python

ROWS = 5_000
#: As much as the engine hands over at once.
BATCH = 10_000

Load = Callable[[], Awaitable[None]]


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """MiniStack, and who writes to it."""
    from tests import servers

    with servers.server("ministack") as endpoint:
        yield [
            Candidate(name, python("dynamodb", kind, endpoint, size or ROWS))
            for name, kind in (
                ("transactions of 100", "transactions"),
                ("single puts", "puts"),
                ("batches, exactly=false", "batches"),
                ("SDK: conditional puts", "sdk-puts"),
                ("aioboto3 batch_writer", "batch_writer"),
            )
        ]


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
        Bar("transactions of 100", "cpu_row", "at most", 0.5, "aioboto3 batch_writer"),
        Bar("transactions of 100", "rate", "at least", 1.2, "single puts"),
    ],
    peer="single puts",
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


async def flowlane(endpoint: str, rows: int, options: dict[str, str]) -> tuple[list[float], int]:
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
    import aioboto3  # type: ignore[import-untyped]  # ships no types

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
    from tests.dynamodb_tables import items

    servers.reset(endpoint)
    os.environ.update(servers.environment(endpoint))
    options = {"batches": {"exactly": "false"}}.get(kind, {"form": kind})
    if kind == "sdk-puts":
        work = sdk_puts(endpoint, rows)
    elif kind == "batch_writer":
        work = batch_writer(endpoint, rows)
    else:
        work = flowlane(endpoint, rows, options)
    (wall, cpu, again_wall, again_cpu), calls = asyncio.run(work)
    peak = peak_mb()
    found = {item["id"]["S"]: item["text4"]["S"] for item in items("bench")}
    assert found == {record(n)["id"]: record(n)["text4"] for n in range(rows)}, "rows are missing or wrong"
    return {
        "rate": rows / wall,
        "cpu_row": cpu / rows * 1e6,
        "calls": rows / calls,
        "again_rate": rows / again_wall,
        "again_cpu_row": again_cpu / rows * 1e6,
        "peak": peak,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
