"""Channels on Kinesis while shards are split and merged: children after parents, nothing lost, order per key.

On kinesalite, whose closed shards end as those of Kinesis do; MiniStack forgets them, records and all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from flowlane.backends.memory import MemoryBackend
from flowlane.ports import Backend, ChannelRecord
from flowlane_aws.clients import open_client
from flowlane_aws.kinesis import HOT, KinesisChannel
from tests.aws_backend import RealClock, new_name

KEYS = 12


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


class Stream:
    """A stream of two shards, and two processes' channels on it: they share its log and nothing else."""

    def __init__(self, client: Any, log: Backend, *, aggregate: bool) -> None:
        self.client, self.name = client, new_name()
        clock = RealClock()
        self.one, self.two = (
            KinesisChannel("changes", self.name, client, log, clock, aggregate=aggregate, hold=12.0)
            for _ in range(2)
        )
        self.handed: dict[str, list[int]] = {}
        self.partitions: dict[str, list[int]] = {}
        self.put_so_far = 0
        self.done = asyncio.Event()  # all that was put so far was handled

    async def put(self, count: int) -> None:
        start, self.put_so_far = self.put_so_far, self.put_so_far + count
        self.done.clear()
        for n in range(start, start + count, 20):
            await self.one.put([ChannelRecord(f"k{n % KEYS}", b"%d" % n) for n in range(n, n + 20)])

    async def changed(self) -> None:
        """The shards are what they are to become."""
        await self.client.get_waiter("stream_exists").wait(
            StreamName=self.name, WaiterConfig={"Delay": 0.03, "MaxAttempts": 100}
        )

    async def shards(self) -> Sequence[str]:
        """The open ones, in the order of their ranges."""
        told = (await self.client.list_shards(StreamName=self.name))["Shards"]
        taking = [one for one in told if "EndingSequenceNumber" not in one["SequenceNumberRange"]]
        taking.sort(key=lambda one: int(one["HashKeyRange"]["StartingHashKey"]))
        return [one["ShardId"] for one in taking]

    async def split(self, shard: str, at: int) -> None:
        await self.client.split_shard(StreamName=self.name, ShardToSplit=shard, NewStartingHashKey=str(at))
        await self.changed()

    async def merge(self, one: str, other: str) -> None:
        await self.client.merge_shards(StreamName=self.name, ShardToMerge=one, AdjacentShardToMerge=other)
        await self.changed()

    async def work(self, channel: KinesisChannel) -> None:
        """Handle what comes, until everything that was put has been."""
        iterator: Any = channel.consume("c", limit=30, wait=60)
        async with aclosing(iterator) as batches:
            async for batch in batches:
                for record in batch.records:
                    self.handed.setdefault(record.key, []).append(int(record.data))
                    self.partitions.setdefault(record.key, []).append(record.partition)
                await batch.settle()
                if self.applied() == self.expected():
                    self.done.set()

    def applied(self) -> dict[str, list[int]]:
        """What a consumer that compares numbers per key does with what it was handed."""
        found: dict[str, list[int]] = {}
        for key, numbers in self.handed.items():
            for number in numbers:
                if number > found.setdefault(key, [-1])[-1]:
                    found[key].append(number)
        return {key: numbers[1:] for key, numbers in found.items()}

    def expected(self) -> dict[str, list[int]]:
        return {f"k{key}": list(range(key, self.put_so_far, KEYS)) for key in range(KEYS)}


@asynccontextmanager
async def stream_on(endpoint: str, *, aggregate: bool = False) -> AsyncIterator[Stream]:
    async with open_client("kinesis", endpoint=endpoint, brisk=HOT) as client:
        stream = Stream(client, MemoryBackend(RealClock()), aggregate=aggregate)
        await client.create_stream(StreamName=stream.name, ShardCount=2)
        await stream.changed()
        yield stream


@pytest.mark.parametrize("aggregate", [False, True])
async def test_order_per_key_holds_across_splits_and_merges(kinesalite: str, aggregate: bool) -> None:
    async with stream_on(kinesalite, aggregate=aggregate) as stream, asyncio.timeout(240):
        low, high = await stream.shards()
        await stream.put(240)
        await stream.split(low, 1 << 126)
        await stream.put(120)
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(stream.work(channel)) for channel in (stream.one, stream.two)]
            await asyncio.gather(stream.split(high, 3 << 126), stream.put(180))
            await stream.put(60)
            first, second, third, fourth = await stream.shards()
            await asyncio.gather(stream.merge(second, third), stream.put(180))
            await stream.put(120)
            await stream.done.wait()
            for worker in workers:
                worker.cancel()
        assert stream.applied() == stream.expected()
        if not aggregate:  # what got into a wrong shard was put again, together with all of its aggregate
            assert stream.handed == stream.expected()  # everything went well, so all of it once
        assert {number for numbers in stream.partitions.values() for number in numbers} == set(range(7))
        lags = {lag.partition: lag for lag in await stream.one.lag("c")}
        assert {number for number, lag in lags.items() if lag.ended} == {0, 1, 3, 4}
        assert [int(shard[-3:]) for shard in (first, second, third, fourth)] == [2, 3, 4, 5]


async def test_a_new_consumer_begins_with_the_oldest_shards(kinesalite: str) -> None:
    async with stream_on(kinesalite) as stream, asyncio.timeout(240):
        await stream.put(60)
        low, high = await stream.shards()
        await stream.merge(low, high)
        await stream.put(60)
        (whole,) = await stream.shards()
        await stream.split(whole, 1 << 127)
        await stream.put(60)
        async with asyncio.TaskGroup() as group:
            worker = group.create_task(stream.work(stream.one))
            await stream.done.wait()
            worker.cancel()
        assert stream.handed == stream.expected()
        generations = [[0, 1], [2], [3, 4]]
        for partitions in stream.partitions.values():
            of = [next(n for n, these in enumerate(generations) if one in these) for one in partitions]
            assert of == sorted(of)


async def test_a_stand_in_without_closed_shards_goes_on_with_their_children(ministack: str) -> None:
    async with stream_on(ministack) as stream, asyncio.timeout(240):
        async with asyncio.TaskGroup() as group:
            worker = group.create_task(stream.work(stream.one))
            for _ in range(2):
                await stream.put(60)
                await stream.done.wait()
                await stream.split(
                    (await stream.shards())[0], 1 << 125 if stream.put_so_far > 60 else 1 << 126
                )
            await stream.put(60)
            await stream.done.wait()
            worker.cancel()
        assert stream.handed == stream.expected()
