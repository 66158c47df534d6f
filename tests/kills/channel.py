"""Records on a stream of four shards, applied by three workers of which one is killed every two seconds (if
they got on in that time), while a shard is split: every key's records are applied in order, each once in
effect, and none is lost.

The stream is one of ``stream_server``; the leases are in a log on MiniStack's DynamoDB.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flowlane.compose import open_application
from flowlane.ports import ChannelRecord
from flowlane.settings import Settings
from tests import servers
from tests.kills import zygote
from tests.kills.aws import variables
from tests.kills.stream_server import streaming

#: A hold that ends soon: a worker lives for six seconds on average, and what it held is nobody's until then.
BACKEND = "aws://kills?hold=3s"
CHANNEL, CONSUMER = "changes", "apply"
STREAM = "kills-changes"
SHARDS, WORKERS = 4, 3
SIZE = 200
_CHUNK = 10_000  # records of one put
_BATCH = 5_000  # of one effect
_PAUSE = 2.0

_TABLES = """
PRAGMA journal_mode = WAL;
CREATE TABLE state (key TEXT PRIMARY KEY, generation INTEGER, seq INTEGER) WITHOUT ROWID;
CREATE TABLE applied (place INTEGER PRIMARY KEY, key TEXT, seq INTEGER, worker TEXT);
"""
# The compare is the consumer's part: a record that is not newer than what its key has is no effect.
_APPLY = """
INSERT INTO state (key, generation, seq) VALUES (?, ?, ?)
ON CONFLICT (key) DO UPDATE SET generation = excluded.generation, seq = excluded.seq
WHERE (excluded.generation, excluded.seq) > (state.generation, state.seq)
RETURNING key, seq
"""


def changes(records: int, keys: int) -> Iterator[ChannelRecord]:
    """So many changes of so many keys in turn; the n-th of a key has the number n, from 1."""
    for number in range(records):
        key, seq = f"key-{number % keys}", number // keys + 1
        yield ChannelRecord(key, b"1 %d " % seq + b"." * (SIZE - 3 - len(str(seq))))


def apply(target: Path, records: Sequence[ChannelRecord], worker: str) -> int:
    """Apply `records` to the table in one transaction; how many had an effect."""
    with closing(sqlite3.connect(target, timeout=60, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")  # processes are killed here, machines are not
        connection.execute("BEGIN IMMEDIATE")
        effects: list[tuple[str, int, str]] = []
        for record in records:
            generation, seq, _ = record.data.split(b" ", 2)
            for key, applied in connection.execute(_APPLY, (record.key, int(generation), int(seq))):
                effects.append((key, applied, worker))
        connection.executemany("INSERT INTO applied (key, seq, worker) VALUES (?, ?, ?)", effects)
        connection.execute("COMMIT")
    return len(effects)


async def work(target: Path) -> None:
    """Apply what comes, until killed."""
    async with open_application([], Settings(backend=BACKEND)) as app:
        channel = app.backend.channel(CHANNEL)
        async for batch in channel.consume(CONSUMER, limit=_BATCH, wait=3600):
            await asyncio.to_thread(apply, target, batch.records, str(os.getpid()))
            await batch.settle()


async def produce(records: int, keys: int, rest: Path) -> None:
    """Put all changes, in their order; the last tenth once there is the file `rest`."""
    async with open_application([], Settings(backend=BACKEND)) as app:
        channel = app.backend.channel(CHANNEL)
        chunk: list[ChannelRecord] = []
        for number, change in enumerate(changes(records, keys)):
            if number == records - records // 10:
                await channel.put(chunk)
                chunk = []
                while not rest.exists():  # noqa: ASYNC110  # another process makes it
                    await asyncio.sleep(0.05)
            chunk.append(change)
            if len(chunk) == _CHUNK:
                await channel.put(chunk)
                chunk = []
        await channel.put(chunk)


class ChannelCampaign:
    """``run`` does it all; then `kills` and `split` say what was done on the way."""

    def __init__(self, folder: Path, records: int, keys: int, seed: int) -> None:
        self.folder, self.records, self.keys = folder, records, keys
        self.chance = random.Random(seed)
        self.target = folder / "target.db"
        self._rest = folder / "rest"
        self.kills = 0
        self.split = ""
        self.seconds = 0.0

    def run(self, timeout: float, pause: float = _PAUSE) -> None:
        """Produce, consume and kill until all is applied, and check it.

        Raises:
            AssertionError: something is missing, doubled or out of order, or not there after `timeout`.
        """
        with closing(sqlite3.connect(self.target)) as connection:
            connection.executescript(_TABLES)
        with ExitStack() as stack:
            endpoint = stack.enter_context(servers.server("ministack"))
            environment = {**servers.environment(endpoint), "FLOWLANE_LOG_LEVEL": "ERROR"}
            environment["AWS_ENDPOINT_URL_KINESIS"] = stack.enter_context(streaming(SHARDS))
            stack.enter_context(variables(environment))
            asyncio.run(_make())
            workers = [self._start("work", str(self.target)) for _ in range(WORKERS)]
            producer = self._start("produce", str(self.records), str(self.keys), str(self._rest))
            stack.callback(lambda: self._end(*workers, producer))
            began = time.monotonic()
            due, before = began + pause, 0
            while (applied := self._applied()) < self.records:
                assert time.monotonic() < began + timeout, (
                    f"{applied:,} of {self.records:,} after {timeout:g} s"
                )
                assert producer.poll() in (None, 0), self._said(producer)
                if not self.split and applied > self.records // 2:
                    self.split = asyncio.run(_split())
                if self.split and self.kills:
                    self._rest.touch()  # not before: a shard was split, and a worker killed, on the way
                time.sleep(max(0.05, min(0.2, due - time.monotonic())))
                if time.monotonic() >= due and applied > before:  # or a slow machine would get nowhere
                    due, before = time.monotonic() + pause, applied
                    chosen = self.chance.randrange(WORKERS)
                    assert workers[chosen].poll() is None, self._said(workers[chosen])
                    self._end(workers[chosen])
                    workers[chosen] = self._start("work", str(self.target))
                    self.kills += 1
            self.seconds = time.monotonic() - began
        self._check()

    def _start(self, *arguments: str) -> zygote.Command:
        command = ["tests.kills.channel", *arguments]
        return zygote.Command(command, Path.cwd(), os.environ, self.folder / "processes.log")

    def _end(self, *processes: zygote.Command) -> None:
        for process in processes:
            process.kill()
            process.wait()

    def _said(self, process: zygote.Command) -> str:
        said = (self.folder / "processes.log").read_text()[-3000:]
        return f"a process ended by itself with {process.poll()}: {said}"

    def _applied(self) -> int:
        with closing(sqlite3.connect(self.target, timeout=60)) as connection:
            found: int = connection.execute("SELECT coalesce(max(place), 0) FROM applied").fetchone()[0]
        return found

    def _check(self) -> None:
        expected = {f"key-{n}": (self.records - n + self.keys - 1) // self.keys for n in range(self.keys)}
        seen: dict[str, int] = {}
        with closing(sqlite3.connect(self.target)) as connection:
            for key, seq in connection.execute("SELECT key, seq FROM applied ORDER BY place"):
                assert seq == seen.get(key, 0) + 1, f"{key}: {seq} was applied after {seen.get(key, 0)}"
                seen[key] = seq
        assert seen == expected


async def _make() -> None:
    async with open_application([], Settings(backend=BACKEND)) as app:
        await app.backend.create([])


async def _split() -> str:
    """Split the first shard in the middle of its range."""
    async with _kinesis() as kinesis:
        shard: dict[str, Any] = (await kinesis.list_shards(StreamName=STREAM))["Shards"][0]
        hashes = shard["HashKeyRange"]
        middle = (int(hashes["StartingHashKey"]) + int(hashes["EndingHashKey"])) // 2
        await kinesis.split_shard(
            StreamName=STREAM, ShardToSplit=shard["ShardId"], NewStartingHashKey=str(middle)
        )
    return str(shard["ShardId"])


def _kinesis() -> Any:
    from flowlane_aws.clients import open_client

    return open_client("kinesis")


def main() -> int:
    """``python -m tests.kills.channel 1000000``: so many records; without a number a process of it."""
    if sys.argv[1] == "work":
        asyncio.run(work(Path(sys.argv[2])))
    elif sys.argv[1] == "produce":
        asyncio.run(produce(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
    else:
        with TemporaryDirectory() as folder:
            records = int(sys.argv[1])
            campaign = ChannelCampaign(Path(folder), records, keys=10_000, seed=random.randrange(10**9))
            campaign.run(timeout=1800)
            print(f"{records:,} records applied in order, once in effect; {campaign.seconds:.0f} s, ", end="")
            print(f"{campaign.kills} kills, {campaign.split} split in the middle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
