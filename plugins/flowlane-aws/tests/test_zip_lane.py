"""``zip_tables`` on AWS: zips in S3, their tables in DynamoDB, by a worker and by a Lambda function; what
comes of it is what the same lane makes of the same zips with files and SQLite."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest

from examples import tpch
from flowlane import Context, Event, Lane
from flowlane.compose import open_application
from flowlane.settings import Settings
from flowlane.state import status
from flowlane.testing.oracle import Log
from tests.aws_lambda.mapping import QueueMapping
from tests.aws_lambda.runtime_api import RuntimeApi
from tests.dynamodb_tables import contents
from tests.servers import ROOT, environment

pytestmark = pytest.mark.long

BACKEND = "aws://zips"
LANE = ROOT / "examples" / "drops.py"
SCALE = 0.0001  # 15 customers, 165 orders


#: As ``examples/drops.py``, with small batches, each of which takes its time. What an invocation could not
#: give back in time is hidden for as long as the stage may take: not for the default's quarter of an hour.
SLOW = """
import asyncio

from flowlane import Policy
from flowlane.recipes import zip_tables


async def slowly(records):
    await asyncio.sleep(0.25)
    return records


lane = zip_tables(
    "drops",
    source="s3://drops/in/",
    to="dynamodb://",
    tables=["region", "nation", "supplier", "customer", "orders", "lineitem"],
    enrich=slowly,
    policy=Policy(batch=20, lease=5, timeout=30, quarantine="s3://drops/quarantine/"),
)
"""


def on_aws(endpoint: str) -> dict[str, str]:
    """Where the lane looks, loads and keeps its log."""
    return {
        **environment(endpoint),
        "DROPS_SOURCE": "s3://drops/in/",
        "DROPS_TO": "dynamodb://",
        "DROPS_QUARANTINE": "s3://drops/quarantine/",
        "FLOWLANE_BACKEND": BACKEND,
        "FLOWLANE_LANE": str(LANE),
    }


async def flowlane(*arguments: str, where: Mapping[str, str]) -> tuple[int, str]:
    """The command line tool's exit code, and what it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowlane", *arguments),
        env={**os.environ, **where},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode in (0, 1), err.decode()
    return process.returncode, out.decode()


async def with_sqlite(folder: Path) -> tpch.Tables:
    """The tables that the lane makes on this machine."""
    source = folder / "drops"
    source.mkdir()
    wanted = tpch.make_drops(source, SCALE)
    where = {
        "DROPS_SOURCE": source.as_uri() + "/",
        "DROPS_TO": f"sqlite:///{folder}/tables.db",
        "FLOWLANE_BACKEND": f"sqlite:///{folder}/flowlane.db",
    }
    await flowlane("run", str(LANE), where=where)
    found = tpch.read_sqlite(folder / "tables.db")
    assert found == wanted
    return found


def upload() -> None:
    """The same zips in a bucket, in their order."""
    s3: Any = boto3.client("s3")
    s3.create_bucket(Bucket="drops")
    for name, data in tpch.make_archives(SCALE)[0].items():
        s3.put_object(Bucket="drops", Key=f"in/{name}", Body=data)


def in_dynamodb() -> tpch.Tables:
    """All tables there are but the log's own, canonical."""
    names = boto3.client("dynamodb").list_tables()["TableNames"]
    return {name: tpch.canonical(name, contents(name)) for name in names if not name.startswith("zips")}


def quarantined() -> list[int]:
    """The rows that were put aside."""
    s3: Any = boto3.client("s3")
    found = s3.list_objects_v2(Bucket="drops", Prefix="quarantine/").get("Contents", [])
    lines = [
        json.loads(line)
        for item in found
        for line in s3.get_object(Bucket="drops", Key=item["Key"])["Body"].read().splitlines()
    ]
    return [line["row"] for line in lines]


async def over(run: str) -> Counter[str]:
    """Wait until the run has come to rest (what a function does is seen by looking); the events of the
    stream that has most of them, by type."""
    lane = Lane("drops")
    lane.stage(on=lane.triggered)(nothing)
    async with open_application([lane], Settings(backend=BACKEND)) as app, asyncio.timeout(240):
        while status((await app.backend.last([run]))[run]) not in ("settled", "dead"):  # noqa: ASYNC110  # no event of another process can be awaited
            await asyncio.sleep(0.2)
        log = await Log.read(app.backend, lane)
        return Counter(event.type for event in max(log.streams.values(), key=len))


async def nothing(event: Event, ctx: Context) -> None: ...


async def test_a_worker_makes_the_same_tables_as_with_sqlite(tmp_path: Path, ministack: str) -> None:
    where = on_aws(ministack)
    upload()
    await flowlane("init", str(LANE), where=where)
    code, said = await flowlane("run", str(LANE), "--json", where=where)
    told = json.loads(said)
    assert code == 1
    assert len(told["dead"]) == 2
    for name in (tpch.FORBIDDEN, tpch.CUT):
        assert any(name in item["reason"] for item in told["dead"]), told["dead"]
    assert in_dynamodb() == await with_sqlite(tmp_path)
    assert quarantined() == [tpch.BAD_CUSTOMER - 1]
    _, said = await flowlane("run", str(LANE), "--json", where=where)
    again = json.loads(said)
    assert (again["units"]["found"], again["records"]["in"]) == (0, 0)


async def test_a_function_makes_the_same_tables_as_with_sqlite(tmp_path: Path, ministack: str) -> None:
    pytest.importorskip("awslambdaric", reason="awslambdaric is not installed (it has wheels for Linux only)")
    where = on_aws(ministack)
    upload()
    await flowlane("init", str(LANE), where=where)
    with RuntimeApi("flowlane.aws_lambda.handler", tmp_path, where) as function:
        event = {"specversion": "1.0", "id": "1", "source": "s", "type": "t"}
        run = (await asyncio.to_thread(function.invoke, event, seconds=30))["run"]
        with QueueMapping(lambda: function.invoke, where, "zips-", seconds=20) as mapping:
            await over(run)
        assert mapping.messages >= 2 + 12  # drops and members
        assert mapping.failed == 0
    assert in_dynamodb() == await with_sqlite(tmp_path)
    assert quarantined() == [tpch.BAD_CUSTOMER - 1]


async def test_members_cross_the_deadlines_of_a_function(tmp_path: Path, ministack: str) -> None:
    pytest.importorskip("awslambdaric", reason="awslambdaric is not installed (it has wheels for Linux only)")
    (tmp_path / "slow.py").write_text(SLOW)
    where = {**on_aws(ministack), "FLOWLANE_LANE": str(tmp_path / "slow.py")}
    upload()
    await flowlane("init", str(tmp_path / "slow.py"), where=where)
    with RuntimeApi("flowlane.aws_lambda.handler", tmp_path, where) as function:
        event = {"specversion": "1.0", "id": "1", "source": "s", "type": "t"}
        run = (await asyncio.to_thread(function.invoke, event, seconds=30))["run"]
        with QueueMapping(lambda: function.invoke, where, "zips-", seconds=4):
            longest = await over(run)
    assert longest["attempt.continued"] >= 2  # some 30 batches, about 10 in each invocation
    assert in_dynamodb() == tpch.make_archives(SCALE)[1]
