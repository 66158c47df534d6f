"""A process that consumes a channel by hand and is stopped (SIGSTOP) for longer than it holds a shard."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import groupby
from pathlib import Path

import pytest

from flowlane.compose import Application, open_application
from flowlane.ports import ChannelRecord
from flowlane.settings import Settings
from flowlane.shards.leases import stream_of
from flowlane.testing.channel_suite import close, numbers
from flowlane.testing.units import listed
from flowlane_aws.clients import open_client

pytestmark = pytest.mark.long

BACKEND = "aws://paused?hold=4s"
#: Handles one batch: says what is in it, waits to be told, and has effects for as long as it holds it.
CONSUMER = f"""
import asyncio, sys
from pathlib import Path
from flowlane.compose import open_application
from flowlane.settings import Settings

async def main():
    async with open_application([], Settings(backend={BACKEND!r})) as app:
        async for batch in app.backend.channel("changes").consume("c", limit=5, wait=120):
            print(*[int(record.data) for record in batch.records], flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            for record in batch.records:
                if not await batch.extend():
                    print("lost", flush=True)
                    break
                with Path("effects").open("a") as effects:
                    effects.write(f"{{int(record.data)}}\\n")
            await batch.settle()
            print("settled", flush=True)
            return

asyncio.run(main())
"""


@pytest.fixture
async def app(ministack: str) -> AsyncIterator[Application]:
    async with open_application([], Settings(backend=BACKEND)) as app, open_client("kinesis") as kinesis:
        await app.backend.create([])
        await kinesis.create_stream(StreamName="paused-changes", ShardCount=1)
        await kinesis.get_waiter("stream_exists").wait(
            StreamName="paused-changes", WaiterConfig={"Delay": 0.03, "MaxAttempts": 100}
        )
        await app.backend.channel("changes").put([ChannelRecord("k", b"%d" % n) for n in range(10)])
        yield app


@pytest.fixture
def process(app: Application, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A consumer at work."""
    command = [sys.executable, "-c", CONSUMER]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


async def began(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return await asyncio.to_thread(process.stdout.readline)


async def goes_on(process: subprocess.Popen[str]) -> str:
    """What it says until it ends."""
    said, _ = await asyncio.to_thread(process.communicate, "go on\n", 60)
    assert process.returncode == 0
    return said


async def test_a_process_at_work_has_its_effects_and_its_checkpoint(
    app: Application, process: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert await began(process) == "0 1 2 3 4\n"
    assert await goes_on(process) == "settled\n"
    assert (tmp_path / "effects").read_text() == "0\n1\n2\n3\n4\n"
    left = app.backend.channel("changes").consume("c")
    assert [numbers(batch) async for batch in left] == [[5, 6, 7, 8, 9]]


async def test_the_checkpoint_and_the_effects_of_a_process_that_was_stopped_are_refused(
    app: Application, process: subprocess.Popen[str], tmp_path: Path
) -> None:
    channel = app.backend.channel("changes")
    assert await began(process) == "0 1 2 3 4\n"
    process.send_signal(signal.SIGSTOP)
    batches = channel.consume("c", limit=4, wait=120)
    first = await asyncio.wait_for(anext(batches), 60)
    assert numbers(first) == [0, 1, 2, 3]
    await first.settle(2)
    second = await anext(batches)
    assert numbers(second) == [2, 3, 4, 5]
    process.send_signal(signal.SIGCONT)
    assert await goes_on(process) == "lost\nsettled\n"
    assert not (tmp_path / "effects").exists()
    assert await second.extend(), "nobody took it away from the one who has it"
    await second.settle()
    await close(batches)
    assert [numbers(batch) async for batch in channel.consume("c")] == [[6, 7, 8, 9]]
    lease = await listed(app.backend.read(stream_of("changes", "shardId-000000000000", "c")))
    owners = [json.loads(bytes(event.data)).get("owner", "") for event in lease]
    turns = [owner for owner, _ in groupby(owners)]
    assert turns[0]
    assert turns.count(turns[0]) == 1, "the process wrote nothing any more"
