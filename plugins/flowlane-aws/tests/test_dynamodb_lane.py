"""A lane loads CSV into a DynamoDB table; killed in the middle of a batch it goes on, and ends right."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.dynamodb_tables import contents
from tests.fault_proxy import Exchange, Fault, FaultProxy

ROWS, KEYS = 1_000, 400

LANE = """
from flowlane import Context, Lane, Policy, Unit

lane = Lane("orders", policy=Policy(batch=200, lease=1.0, backoff=0.05, backoff_cap=0.2, error_budget=0.1))


class OrdersFound(Unit, key=("url",)):
    url: str


@lane.stage(on=lane.triggered)
async def find(event, ctx: Context):
    async for found in ctx.list("{folder}*.csv"):
        yield OrdersFound(url=found.url)


@lane.stage(on=OrdersFound)
async def load(event, ctx: Context):
    await ctx.load(
        ctx.rows(event.data.url), to="dynamodb://orders?key=id&sort=part&key_type=N&create=true"
    )
"""


async def run(folder: Path, endpoint: str) -> asyncio.subprocess.Process:
    """``flowlane run``, in a process of its own."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "flowlane",
        "run",
        "orders_lane.py",
        "--event",
        "drop.json",  # the same run, however often
        "--json",
        cwd=folder,
        env={
            **os.environ,
            "AWS_ENDPOINT_URL": endpoint,
            "FLOWLANE_BACKEND": f"sqlite:///{folder / 'log.db'}",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def make(folder: Path) -> None:
    """A lane, and a file in which every key comes about three times and some rows have none."""
    (folder / "in").mkdir()
    lines = [f"{'' if row % 100 == 99 else row % KEYS},p,text {row}" for row in range(ROWS)]
    (folder / "in" / "orders.csv").write_text("id,part,text\n" + "".join(f"{line}\n" for line in lines))
    (folder / "drop.json").write_text('{"drop": 1}')
    (folder / "orders_lane.py").write_text(LANE.format(folder=(folder / "in").as_uri() + "/"))


def wanted() -> dict[int, str]:
    """The last row of every key."""
    return {row % KEYS: f"text {row}" for row in range(ROWS) if row % 100 != 99}


def table() -> dict[int, str]:
    """What a reader finds."""
    return {record["id"]: record["text"] for record in contents("orders")}


def killing(process: list[asyncio.subprocess.Process], *, applied: bool) -> Fault:
    """A fault: whoever calls is killed, before or after the table has done what it was asked."""

    async def fault(exchange: Exchange) -> bool:
        if applied:
            await exchange.forward()
        process[0].kill()
        return exchange.reset()

    return fault


@pytest.mark.parametrize("applied", [False, True])
async def test_killed_in_the_middle_it_goes_on(tmp_path: Path, ministack: str, applied: bool) -> None:
    make(tmp_path)
    async with FaultProxy(ministack) as proxy:
        victim: list[asyncio.subprocess.Process] = []
        rule = proxy.inject("dynamodb.TransactWriteItems", killing(victim, applied=applied), nth=6)
        victim.append(await run(tmp_path, proxy.url))
        await victim[0].communicate()
        assert rule.fired == 1
        assert victim[0].returncode == -9
        assert table() not in ({}, wanted())
        again = await run(tmp_path, proxy.url)
        out, err = await again.communicate()
        assert again.returncode == 0, (out, err)
    told = json.loads(out)
    assert told["records"] == {
        "in": ROWS,
        "out": ROWS - ROWS // 100,
        "expanded": 0,
        "skipped": 0,
        "quarantined": ROWS // 100,
    }
    assert table() == wanted()
