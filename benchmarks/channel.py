"""Records put to Kinesis and read from it: flowlane, beside bare loops of aioboto3 and async-kinesis.

All are measured against the same responder (``kinesis_server``), which runs in a process of its own: the
client is the bound. Records are of 200 bytes under 10,000 keys, in 4 shards.

Putting: flowlane is given ten thousand at a time. The bare loop is PutRecords of 500, four calls at once as
flowlane has, with no regard to the order of keys; "brisk loop" is it with flowlane's short way for the call,
so that what the channel adds stands by itself. "one key" is the worst that order costs: one record per round
trip, unless they are put together. What the responder took is compared with what was put: every record once,
and each key's in their order where that is promised.

Reading: the bare loop is GetRecords of 10,000, the shards beside one another; flowlane holds leases, hands
out batches and keeps its positions in a log in memory besides. Every record has to come once, each key's in
their order.

async-kinesis is in the tables where it can be imported (it is not among the requirements: ``pip install
--target DIR --no-deps async-kinesis aws-kinesis-agg protobuf``, then ``PYTHONPATH=DIR``), with its own limits
of 1,000 records and 1 MiB a second and shard lifted, and that of one read a second and shard. It puts
together under one key for all, "a", so that every record goes to one shard.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import kinesis_server
from benchmarks.engine import Meter
from benchmarks.harness import Bar, Candidate, Case, peak_mb, python
from benchmarks.kinesis_server import KEYS, record

COUNT = 200_000
#: As many fewer, where each takes longer.
FEWER = 20
#: Records that flowlane is given at once.
PUT = 10_000
#: Records in an aggregate that is read: as many as flowlane puts into one.
PACK = 650
#: Records that are put before the clock runs.
WARM = 10_000
#: Calls of the loops that are under way at once: as many as flowlane has at most.
CALLS = 4

Rows = Sequence[tuple[str, bytes]]
Put = Callable[[Any], Awaitable[None]]

KINDS = {
    "flowlane": "flowlane",
    "flowlane, aggregated": "flowlane-packed",
    "aioboto3 loop": "loop",
    "brisk loop": "loop-brisk",
    "flowlane, one key": "flowlane-one",
    "flowlane, one key, aggregated": "flowlane-packed-one",
}
PEERS = {"async-kinesis": "peer", "async-kinesis, aggregated": "peer-packed"}


READING = {
    "flowlane": "read-flowlane",
    "flowlane, aggregated": "read-flowlane-packed",
    "aioboto3 loop": "read-loop",
}
READING_PEERS = {"async-kinesis": "read-peer", "async-kinesis, aggregated": "read-peer-packed"}


def against(
    kinds: dict[str, str], peers: dict[str, str], size: int | None, scratch: Path
) -> Iterator[Sequence[Candidate]]:
    """The responder, and who is measured against it."""
    kinds = kinds | (peers if importlib.util.find_spec("kinesis") else {})
    with kinesis_server.serving() as endpoint:
        yield [
            Candidate(name, python("channel", kind, size or COUNT, endpoint)) for name, kind in kinds.items()
        ]


PUTS = Case(
    "channel-put",
    f"records of {kinesis_server.SIZE} bytes put to Kinesis: a responder takes them, the client is the bound",
    contextmanager(partial(against, KINDS, PEERS)),
    {"rate": "records/s", "us": "CPU us a record", "calls": "records a call", "peak": "peak MB"},
    [
        Bar("flowlane", "rate", "at least", 0.9, "aioboto3 loop"),
        Bar("flowlane, aggregated", "rate", "at least", 5.0, "aioboto3 loop"),
        Bar("flowlane", "us", "at most", 1.0, "aioboto3 loop"),
        Bar("flowlane, aggregated", "us", "at most", 0.2, "aioboto3 loop"),
    ],
    peer="aioboto3 loop",
)
READS = Case(
    "channel-read",
    f"records of {kinesis_server.SIZE} bytes read from Kinesis: they lie ready, the client is the bound",
    contextmanager(partial(against, READING, READING_PEERS)),
    {"rate": "records/s", "us": "CPU us a record", "peak": "peak MB"},
    [
        Bar("flowlane", "rate", "at least", 0.9, "aioboto3 loop"),
        Bar("flowlane, aggregated", "rate", "at least", 5.0, "aioboto3 loop"),
    ],
    peer="aioboto3 loop",
)
CASES = (PUTS, READS)


async def measured(put: Put, rows: Sequence[Any], client: Any) -> dict[str, float]:
    """The figures of putting `rows` by `client`, of which the first go before the clock runs: connections are
    made with them, the SDK finds out where to, and memory is what it will be."""
    warm = min(WARM, len(rows) // 2)
    await put(rows[:warm])
    count = len(rows) - warm
    calls = 0

    def counted(**_: Any) -> None:
        nonlocal calls
        calls += 1

    client.meta.events.register("before-call.kinesis.PutRecords", counted)
    meter = Meter()
    await put(rows[warm:])
    wall, cpu = meter.lap()
    return {"us": cpu / count * 1e6, "rate": count / wall, "calls": count / calls, "peak": peak_mb()}


async def flowlane(rows: Rows, endpoint: str, *, aggregate: bool) -> dict[str, float]:
    """The channel, as its backend has it."""
    from flowlane.clock import SystemClock
    from flowlane.ports import ChannelRecord
    from flowlane_aws.clients import open_client
    from flowlane_aws.kinesis.producer import HOT, Producer

    records = [ChannelRecord(key, data) for key, data in rows]
    async with open_client("kinesis", endpoint=endpoint, brisk=HOT) as client:
        producer = Producer("bench", client, SystemClock(), aggregate=aggregate)

        async def put(some: Sequence[ChannelRecord]) -> None:
            for at in range(0, len(some), PUT):
                await producer.put(some[at : at + PUT])

        return await measured(put, records, client)


async def loop(rows: Rows, endpoint: str, *, brisk: bool) -> dict[str, float]:
    """As one would write it with aioboto3; `brisk`: with our own client and its short way."""
    import aioboto3  # type: ignore[import-untyped]  # ships no types

    from flowlane_aws.clients import open_client
    from flowlane_aws.kinesis.producer import HOT

    opening = (
        open_client("kinesis", endpoint=endpoint, brisk=HOT)
        if brisk
        else aioboto3.Session().client("kinesis", endpoint_url=endpoint)
    )
    async with opening as client:

        async def put(some: Rows) -> None:
            left = iter(range(0, len(some), 500))

            async def work() -> None:
                for at in left:
                    entries = [{"Data": data, "PartitionKey": key} for key, data in some[at : at + 500]]
                    answer = await client.put_records(StreamName="bench", Records=entries)
                    assert answer["FailedRecordCount"] == 0

            await asyncio.gather(*(work() for _ in range(CALLS)))

        return await measured(put, rows, client)


def as_it_is(*, aggregate: bool) -> Any:
    """A processor of async-kinesis's that leaves data alone, aggregates aside."""
    from kinesis.aggregators import (  # type: ignore[import-not-found]  # not among the requirements
        KPLAggregator,
        SimpleAggregator,
    )

    class AsItIs:
        def serialize(self, item: bytes) -> bytes:
            return item

        deserialize = serialize

    class Plain(SimpleAggregator, AsItIs):  # type: ignore[misc]  # of an untyped module
        pass

    class Packed(KPLAggregator, AsItIs):  # type: ignore[misc]  # the same
        pass

    return Packed() if aggregate else Plain()


async def peer(rows: Rows, endpoint: str, *, aggregate: bool) -> dict[str, float]:
    """async-kinesis, unlimited."""
    from kinesis import Producer  # type: ignore[import-not-found]  # not among the requirements

    async with Producer(
        "bench",
        endpoint_url=endpoint,
        region_name="us-east-1",
        skip_describe_stream=True,
        processor=as_it_is(aggregate=aggregate),
        put_rate_limit_per_shard=10**9,
        put_bandwidth_limit_per_shard=10**9,
    ) as producer:

        async def put(some: Rows) -> None:
            for key, data in some:
                await producer.put(data, None if aggregate else key)
            await producer.flush()

        return await measured(put, rows, producer.client)


# --------------------------------------------------------------------------- reading


class Reading:
    """What was read, and how fast; the clock runs from the first record on."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._meter = Meter()
        self.got: list[bytes] = []

    def note(self, data: Sequence[bytes]) -> bool:
        """`data` was read; whether that was the last of it."""
        if not self.got:
            self._meter = Meter()
            self._first = len(data)
        self.got += data
        return len(self.got) >= self._count

    def figures(self) -> dict[str, float]:
        """Of what came behind the first page. Every record has come once, each key's in their order."""
        wall, cpu = self._meter.lap()
        count = self._count - self._first
        by_key: dict[int, list[int]] = {}
        for number in (int(data[:10]) for data in self.got):
            by_key.setdefault(number % KEYS, []).append(number)
        expected = {key: list(range(key, self._count, KEYS)) for key in range(min(KEYS, self._count))}
        assert by_key == expected, "records are missing, doubled or out of order"
        return {"us": cpu / max(count, 1) * 1e6, "rate": max(count, 1) / wall, "peak": peak_mb()}


async def read_flowlane(reading: Reading, endpoint: str) -> None:
    """The channel, as its backend has it, its log in memory."""
    from flowlane.backends.memory import MemoryBackend
    from flowlane.clock import SystemClock
    from flowlane_aws.clients import open_client
    from flowlane_aws.kinesis import HOT, KinesisChannel

    clock = SystemClock()
    async with open_client("kinesis", endpoint=endpoint, brisk=HOT) as client:
        channel = KinesisChannel("bench", "bench", client, MemoryBackend(clock), clock)
        async for batch in channel.consume("reader", limit=PUT, wait=5):
            last = reading.note([record.data for record in batch.records])
            await batch.settle()
            if last:
                break


async def read_loop(reading: Reading, endpoint: str) -> None:
    """As one would write it with aioboto3."""
    import aioboto3

    async with aioboto3.Session().client("kinesis", endpoint_url=endpoint) as client:

        async def work(shard: str) -> None:
            answer = await client.get_shard_iterator(
                StreamName="bench", ShardId=shard, ShardIteratorType="TRIM_HORIZON"
            )
            iterator = answer["ShardIterator"]
            while iterator:
                page = await client.get_records(ShardIterator=iterator, Limit=10_000)
                if page["Records"]:
                    reading.note([record["Data"] for record in page["Records"]])
                if not page["MillisBehindLatest"]:
                    break
                iterator = page["NextShardIterator"]

        shards = (await client.list_shards(StreamName="bench"))["Shards"]
        await asyncio.gather(*(work(shard["ShardId"]) for shard in shards))


async def read_peer(reading: Reading, endpoint: str, *, aggregate: bool) -> None:
    """async-kinesis, its positions in memory."""
    from kinesis import Consumer

    async with Consumer(
        "bench",
        endpoint_url=endpoint,
        region_name="us-east-1",
        processor=as_it_is(aggregate=aggregate),
        shard_fetch_rate=10**6,
        sleep_time_no_records=0.05,
    ) as consumer:
        last = False
        while not last:  # it ends whenever nothing came for a while
            async for data in consumer:
                last = reading.note([data])
                if last:
                    break


def read(who: str, count: int, endpoint: str, *, aggregate: bool) -> dict[str, float]:
    """The figures of reading `count` records."""
    asked(endpoint, "Fill", Count=count, Pack=PACK if aggregate else 0)
    reading = Reading(count)
    ways: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
        "flowlane": partial(read_flowlane, reading, endpoint),
        "loop": partial(read_loop, reading, endpoint),
        "peer": partial(read_peer, reading, endpoint, aggregate=aggregate),
    }
    asyncio.run(ways[who]())
    return reading.figures()


# --------------------------------------------------------------------------- one candidate


def main(kind: str, count: int, endpoint: str) -> dict[str, float]:
    """One candidate, in this process."""
    from tests.servers import environment

    os.environ.update(environment(endpoint))
    who, *how = kind.split("-")
    if who == "read":
        return read(how[0], count, endpoint, aggregate="packed" in how)
    keys = 1 if "one" in how else KEYS
    if who == "peer" or how == ["one"]:
        count = max(500, count // FEWER)
    rows = [record(number, keys) for number in range(count)]
    ways: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
        "flowlane": partial(flowlane, rows, endpoint, aggregate="packed" in how),
        "loop": partial(loop, rows, endpoint, brisk="brisk" in how),
        "peer": partial(peer, rows, endpoint, aggregate="packed" in how),
    }

    async def run() -> dict[str, float]:
        return await ways[who]()

    figures = asyncio.run(run())
    check(kind, rows, asked(endpoint, "Taken"))
    return figures


def asked(endpoint: str, operation: str, **params: Any) -> Any:
    """What the responder answers to an operation of the benchmark's own."""
    request = urllib.request.Request(
        endpoint, json.dumps(params).encode(), {"X-Amz-Target": f"Bench.{operation}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def check(kind: str, rows: Rows, taken: dict[str, list[int]]) -> None:
    """Every record was taken once, and by key in order where that is promised."""
    expected: dict[str, list[int]] = {}
    for number, (key, _) in enumerate(rows):
        expected.setdefault(key if kind != "peer-packed" else "a", []).append(number)
    if not kind.startswith("flowlane"):
        taken = {key: sorted(numbers) for key, numbers in taken.items()}
    assert taken == expected, "records are missing, doubled or out of order"


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
