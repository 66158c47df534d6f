"""Records put together: any reader of aggregates finds each one once, in order of its key, in its shard."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlane.errors import ConfigError, Retryable
from flowlane.ports import ChannelRecord, Connections, Environment
from flowlane.streams import kpl
from flowlane.streams.aggregate import pack
from flowlane.testing.manual import ManualClock
from flowlane_aws.backend import open_backend
from flowlane_aws.bounded import Flights, owned_tasks
from flowlane_aws.clients import open_client
from flowlane_aws.kinesis import lines, parcels, producer
from flowlane_aws.kinesis import ranges as ranges_module
from flowlane_aws.kinesis.producer import AT_ONCE, HOT, RECORD_BYTES, TRIES, Producer
from flowlane_aws.kinesis.ranges import Ranges, partition_key, ranges_of
from tests.fault_proxy import Exchange, Fault, FaultProxy, changed, lost_reply

SHARDS = 4
BUSY = "ProvisionedThroughputExceededException"


class Stream:
    """A stream on a stand-in behind the proxy, a producer that puts together, and a reader that knows how to
    take apart: as the AWS libraries do it, it leaves out an aggregate of which a record does not belong into
    the shard."""

    def __init__(self, client: Any, proxy: FaultProxy) -> None:
        self.client, self.proxy = client, proxy
        self.clock = ManualClock()
        self.producer = self.another()
        self.raw: list[tuple[str, int]] = []  #: shard and size of what it read
        self.strangers = 0
        self._iterators: dict[str, str] = {}
        self._found: dict[str, list[bytes]] = {}
        self._ranges = Ranges([])

    def another(self) -> Producer:
        """One that knows nothing of the stream yet."""
        return Producer("changes", self.client, self.clock, aggregate=True)

    async def open(self) -> None:
        await self.client.create_stream(StreamName="changes", ShardCount=SHARDS)
        await self.settled()

    async def settled(self) -> None:
        """The stream's shards are as they were asked for, and all of them are read."""
        await self.client.get_waiter("stream_exists").wait(
            StreamName="changes", WaiterConfig={"Delay": 0.02, "MaxAttempts": 200}
        )
        self._ranges = await ranges_of(self.client, "changes")
        before, self._iterators = self._iterators, {}
        for shard, _ in self._ranges.open:
            answer = await self.client.get_shard_iterator(
                StreamName="changes", ShardId=shard, ShardIteratorType="TRIM_HORIZON"
            )
            self._iterators[shard] = before.get(shard) or answer["ShardIterator"]

    async def collect(self) -> None:
        """Read on, in every open shard."""
        for shard in self._iterators:
            found: list[Any] = [None]
            while found:
                answer = await self.client.get_records(ShardIterator=self._iterators[shard])
                self._iterators[shard], found = answer["NextShardIterator"], answer["Records"]
                for record in found:
                    self._note(shard, record)

    def _note(self, shard: str, record: Any) -> None:
        data = record["Data"]
        self.raw.append((shard, len(data)))
        several = kpl.unpack(data) or [kpl.UserRecord(record["PartitionKey"], data)]
        strangers = [one for one in several if not self._ranges.holds(shard, one.key)]
        self.strangers += len(strangers)
        for one in several if not strangers else ():
            self._found.setdefault(one.key, []).append(one.data)

    async def read(self) -> dict[str, list[bytes]]:
        """All that came since the last time, by key."""
        await self.collect()
        found, self._found = self._found, {}
        return found

    async def reshard(self, change: Callable[[], Awaitable[Any]]) -> None:
        """What is in the shards is read (MiniStack forgets those that are closed), then they `change`."""
        await self.collect()
        await change()
        await self.settled()

    async def split(self, at: int = 0) -> None:
        shards = (await self.client.list_shards(StreamName="changes"))["Shards"]
        shard = [one for one in shards if "EndingSequenceNumber" not in one["SequenceNumberRange"]][at]
        first, last = (int(shard["HashKeyRange"][f"{end}HashKey"]) for end in ("Starting", "Ending"))
        await self.reshard(
            lambda: self.client.split_shard(
                StreamName="changes",
                ShardToSplit=shard["ShardId"],
                NewStartingHashKey=str((first + last) // 2),
            )
        )

    async def merge(self) -> None:
        if len(self._ranges.open) < 2:
            return
        one, two = (shard for shard, _ in self._ranges.open[:2])
        await self.reshard(
            lambda: self.client.merge_shards(StreamName="changes", ShardToMerge=one, AdjacentShardToMerge=two)
        )


@pytest.fixture
async def stream(ministack: str) -> AsyncIterator[Stream]:
    async with (
        FaultProxy(ministack) as proxy,
        open_client("kinesis", endpoint=proxy.url, brisk=HOT) as client,
    ):
        stream = Stream(client, proxy)
        await stream.open()
        yield stream


def records(count: int, keys: int, start: int = 0, size: int = 20) -> list[ChannelRecord]:
    return [ChannelRecord(f"k{n % keys}", b"%d" % n + b" " * size) for n in range(start, start + count)]


def by_key(records: Sequence[ChannelRecord]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for record in records:
        found.setdefault(partition_key(record.key), []).append(record.data)
    return found


async def test_one_record_of_each_shard_holds_them_all(stream: Stream) -> None:
    put = [*records(3000, keys=700), ChannelRecord("", b"odd"), ChannelRecord("é" * 300, b"too long a key")]
    await stream.producer.put(put)
    assert await stream.read() == by_key(put)
    assert stream.strangers == 0
    assert sorted(shard for shard, _ in stream.raw) == sorted(shard for shard, _ in (await shards(stream)))
    assert stream.proxy.calls["kinesis.PutRecords"] == 1


async def shards(stream: Stream) -> Sequence[tuple[str, str]]:
    return (await ranges_of(stream.client, "changes")).open


async def test_full_ones_are_of_a_size_and_go_in_order(stream: Stream) -> None:
    put = records(4000, keys=3, size=600)
    await stream.producer.put(put)
    assert await stream.read() == by_key(put)
    sizes = sorted(size for _, size in stream.raw)
    assert sizes[-1] <= parcels.PACK_BYTES
    assert len([size for size in sizes if size < 0.95 * parcels.PACK_BYTES]) <= SHARDS


async def test_another_server_thinks_the_same(moto: str) -> None:
    async with FaultProxy(moto) as proxy, open_client("kinesis", endpoint=proxy.url, brisk=HOT) as client:
        stream = Stream(client, proxy)
        await stream.open()
        put = records(100, keys=30)
        await stream.producer.put(put)
        assert await stream.read() == by_key(put)
        with pytest.raises(ConfigError, match="it does not exist"):
            await Producer("nowhere", client, stream.clock, aggregate=True).put(put)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    keys=st.lists(st.sampled_from("abcdefgh"), max_size=60),
    refused=st.sets(st.tuples(st.integers(0, 12), st.integers(0, 3))),
    changes=st.dictionaries(st.integers(0, 6), st.sampled_from(["split", "merge"]), max_size=2),
    size=st.sampled_from([1, 50, 120, 100_000]),
)
async def test_nothing_is_lost_doubled_or_out_of_order_whatever_happens(
    stream: Stream,
    keys: list[str],
    refused: set[tuple[int, int]],
    changes: dict[int, str],
    size: int,
) -> None:
    calls = 0

    async def fault(exchange: Exchange) -> bool:
        nonlocal calls
        call, calls = calls, calls + 1
        async with lock:  # nothing gets into a shard that is about to be closed, and forgotten
            if call in changes:
                await (stream.split() if changes[call] == "split" else stream.merge())
            return await partly(exchange, lambda n: (call, n) in refused)

    lock = asyncio.Lock()
    stream.proxy.clear()
    stream.producer = stream.another() if size == 1 else stream.producer
    stream.proxy.inject("kinesis.PutRecords", fault, times=-1)
    put = [ChannelRecord(key, b"%d" % n) for n, key in enumerate(keys)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parcels, "PACK_BYTES", size)
        await stream.producer.put(put)
    assert await stream.read() == by_key(put)


async def partly(exchange: Exchange, refuses: Callable[[int], bool]) -> bool:
    """The call's entries are stored, but for those that it `refuses` by their place."""
    asked = json.loads(exchange.request.body)
    entries = asked["Records"]
    out = [refuses(number) for number in range(len(entries))]
    kept = [each for each, refused in zip(entries, out, strict=True) if not refused]
    exchange.request.body = json.dumps(asked | {"Records": kept or entries[:1]}).encode()
    if not kept:
        exchange.request.body = json.dumps({"StreamName": "none", "Records": entries[:1]}).encode()
    answer = await exchange.forward()
    stored = iter(json.loads(answer.body)["Records"] if kept else ())
    failed = {"ErrorCode": BUSY, "ErrorMessage": "injected"}
    results = [failed if refused else next(stored) for refused in out]
    answer.status, answer.body = 200, json.dumps({"FailedRecordCount": sum(out), "Records": results}).encode()
    return await exchange.answer(answer)


@pytest.mark.parametrize("change", ["split", "merge"])
async def test_what_went_to_other_shards_is_put_again_where_it_belongs(stream: Stream, change: str) -> None:
    first, second = records(400, keys=40), records(400, keys=40, start=400)
    await stream.producer.put(first)
    await (stream.split() if change == "split" else stream.merge())
    stream.proxy.clear()
    await stream.producer.put(second)
    assert await stream.read() == by_key([*first, *second])
    assert (stream.strangers > 0) == (change == "split")
    assert stream.proxy.calls["kinesis.ListShards"] == 1
    third = records(400, keys=40, start=800)
    await stream.producer.put(third)
    assert await stream.read() == by_key(third)
    assert stream.proxy.calls["kinesis.ListShards"] == 1


async def test_nothing_behind_what_went_astray_overtakes_it(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many aggregates of a key wait behind the first, which meets the split, and records for more of them."""
    monkeypatch.setattr(parcels, "PACK_BYTES", 200)
    monkeypatch.setattr(parcels, "_CALL_PACKED", 800)
    monkeypatch.setattr(producer, "_SLICE", 11)
    await stream.producer.put(records(10, keys=10))
    await stream.read()
    await stream.split(0)
    await stream.split(2)
    put = records(400, keys=10)
    await stream.producer.put(put)
    assert await stream.read() == by_key(put)
    assert stream.strangers > 0


async def test_several_calls_are_under_way_at_once(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CALL_RECORDS", 2)
    under_way = most = 0
    full = asyncio.Event()

    async def fault(exchange: Exchange) -> bool:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == AT_ONCE:
            full.set()
        await full.wait()
        under_way -= 1
        return await exchange.answer(await exchange.forward())

    stream.proxy.inject("kinesis.PutRecords", fault, times=-1)
    put = records(40, keys=8)
    await Producer("changes", stream.client, stream.clock).put(put)
    assert await stream.read() == by_key(put)
    assert most == AT_ONCE


async def test_a_put_that_is_cancelled_leaves_nothing_running(stream: Stream) -> None:
    begun = asyncio.Event()

    async def fault(exchange: Exchange) -> bool:
        begun.set()
        return await exchange.hang()

    stream.proxy.inject("kinesis.PutRecords", fault, times=-1)
    before = asyncio.all_tasks()
    putting = asyncio.create_task(stream.producer.put(records(10, keys=5)))
    await begun.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert not [task for task in asyncio.all_tasks() - before if "_caught" in repr(task)]


@pytest.mark.parametrize("changed_meanwhile", [False, True])
async def test_the_loop_goes_on_while_much_is_put(stream: Stream, changed_meanwhile: bool) -> None:
    """Whatever the machine is at: between two turns of the loop no more than a slice is worked at, also where
    all that was kept back is set out for other shards."""
    worked: list[int] = []
    turns = added = 0

    async def turning() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    class Noting(parcels.Packs):
        def add(self, records: Sequence[ChannelRecord]) -> None:
            nonlocal added
            added += 1
            assert len(records) <= 2000
            worked.append(turns)
            super().add(records)

        def prepare(self) -> bool:
            some = super().prepare()
            worked.extend([turns] * some)
            return some

    plan = Noting(0, await ranges_of(stream.client, "changes"), RECORD_BYTES)
    put = records(20_000, keys=500, size=200)
    if changed_meanwhile:
        await stream.split()
    ticking = asyncio.create_task(turning())
    async with owned_tasks() as group, Flights[Any](group) as flights:
        await stream.producer._carry(put, plan, flights)
    ticking.cancel()
    assert plan.plans == 1 + changed_meanwhile
    assert changed_meanwhile or added == 10
    assert len(worked) == len(set(worked)) > added
    assert await stream.read() == by_key(put)


WHOLE = {"HashKeyRange": {"StartingHashKey": "0", "EndingHashKey": str((1 << 128) - 1)}}
ONE = Ranges([{"ShardId": "one", **WHOLE, "SequenceNumberRange": {"StartingSequenceNumber": "1"}}])


def test_no_more_than_a_call_is_put_together_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the records are of which a slice is given."""
    sizes: list[int] = []

    def noting(keys: Sequence[str], data: Sequence[bytes]) -> bytes:
        sizes.append(sum(map(len, data)))
        return pack(keys, data)

    monkeypatch.setattr(parcels, "pack", noting)
    plan = parcels.Packs(2000, ONE, RECORD_BYTES)
    plan.add(records(2000, keys=500, size=10_000))
    assert not sizes
    while plan.prepare() or plan.flush():
        assert sum(sizes) <= 4 * parcels.PACK_BYTES + parcels.PACK_BYTES
        sizes.clear()
    assert len(plan.lines.drain()["one"]) > 100


def test_what_a_failed_put_was_at_is_not_in_another_one() -> None:
    one = ChannelRecord("k", b"")
    with pytest.raises(AttributeError):
        ONE.split([one, cast(ChannelRecord, None)])
    assert ONE.split([one]) == [[one]]


def test_keys_that_are_kept_in_mind_are_few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges_module, "_KEYS", 10)
    few = Ranges([{"ShardId": "one", **WHOLE, "SequenceNumberRange": {"StartingSequenceNumber": "1"}}])
    put = [ChannelRecord(f"k{number}", b"") for number in range(9)]
    odd = [ChannelRecord("x" * 257, b""), ChannelRecord("", b""), ChannelRecord("\ud800", b"")]
    assert few.split([*put, *odd])[0][:9] == put
    assert max(map(len, few._boxes)) == 64  # what the odd ones are put under
    assert [len(some) for some in few.split(records(100, keys=100))] == [100]
    assert len(few._boxes) <= 10


def test_closed_shards_take_nothing_and_hold_what_they_held() -> None:
    closed = {"SequenceNumberRange": {"StartingSequenceNumber": "1", "EndingSequenceNumber": "2"}}
    taking = {"SequenceNumberRange": {"StartingSequenceNumber": "3"}}
    ranges = Ranges([{"ShardId": "old", **WHOLE, **closed}, {"ShardId": "new", **WHOLE, **taking}])
    assert ranges.open == [("new", "0")]
    assert ranges.split([one := ChannelRecord("k", b"")]) == [[one]]
    assert (ranges.holds("old", "k"), ranges.holds("new", "k"), ranges.holds("gone", "k")) == (
        True,
        True,
        False,
    )


def test_what_is_prepared_ahead_is_bounded_and_calls_are_full() -> None:
    some = lines.Lines(1000)
    for number in range(40):
        assert not some.enough
        some.add(lines.Parcel(f"{number % 10}", {}, (), 100))
        assert some.full == (number >= 8)
    assert some.enough
    call = some.take()
    assert [parcel.line for parcel in call] == [f"{number}" for number in range(10)]
    assert not some.enough
    assert not some.full
    assert some.take() == []
    some.refused(call[0])
    some.stored(call[1])
    assert [parcel.line for parcel in some.take()] == ["0", "1"]


async def test_shards_that_change_all_the_time_are_told_of(stream: Stream) -> None:
    def elsewhere(answer: Any) -> None:
        told = json.loads(answer.body)
        for result in told["Records"]:
            result["ShardId"] = "shardId-000000009999"
        answer.body = json.dumps(told).encode()

    stream.proxy.inject("kinesis.PutRecords", changed(elsewhere), times=-1)
    with pytest.raises(Retryable, match="putting to the Kinesis stream changes: its shards change faster"):
        await stream.producer.put(records(3, keys=3))
    assert stream.proxy.calls["kinesis.PutRecords"] == TRIES
    assert stream.clock.monotonic() > 0


async def test_a_lost_reply_doubles_and_loses_nothing(stream: Stream) -> None:
    await stream.producer.put(records(1, keys=1))
    await stream.read()
    lost = stream.proxy.inject("kinesis.PutRecords", lost_reply())
    put = records(10, keys=1)
    await stream.producer.put(put)
    assert lost.fired == 1
    assert await stream.read() == {"k0": [record.data for record in put] * 2}


async def test_large_records_go_between_the_small_ones_in_order(stream: Stream) -> None:
    sizes = [10, parcels.PACK_BYTES, 10, RECORD_BYTES - 2, 10, 10, RECORD_BYTES - 100, 10]
    put = [ChannelRecord("k0", b"%d" % n + b"x" * (size - 1)) for n, size in enumerate(sizes)]
    await stream.producer.put(put)
    assert await stream.read() == by_key(put)
    assert len(stream.raw) == 7
    assert max(size for _, size in stream.raw) <= RECORD_BYTES - 2


async def test_what_a_key_takes_in_bytes_counts(stream: Stream) -> None:
    key = "é" * 200
    put = [ChannelRecord(key, b"x" * (RECORD_BYTES - 2 * len(key) - 10))]
    await stream.producer.put(put)
    assert await stream.read() == by_key(put)
    assert [size for _, size in stream.raw] == [len(put[0].data)]


@pytest.mark.parametrize("aggregate", [True, False])
async def test_what_is_an_aggregate_by_itself_stays_as_it_is(stream: Stream, aggregate: bool) -> None:
    inner = pack(["k0", "x"], [b"one", b"two"])
    put = [ChannelRecord("k0", inner), ChannelRecord("k0", kpl.MAGIC + b"only begins like one")]
    await Producer("changes", stream.client, stream.clock, aggregate=aggregate).put(put)
    assert await stream.read() == by_key(put)


async def test_the_backends_uri_asks_for_it(stream: Stream, ministack: str) -> None:
    seen: list[dict[str, Any]] = []

    def look() -> Fault:
        async def fault(exchange: Exchange) -> bool:
            seen.extend(json.loads(exchange.request.body)["Records"])
            return await exchange.answer(await exchange.forward())

        return fault

    stream.proxy.inject("kinesis.PutRecords", look(), times=-1)
    environment = Environment(ManualClock(), cast(Connections, None))
    for name, option in (("one", {}), ("two", {"aggregate": "true"}), ("three", {"aggregate": "false"})):
        await stream.client.create_stream(StreamName=f"{name}-changes", ShardCount=1)
        async with open_backend(f"aws://{name}", environment, endpoint=stream.proxy.url, **option) as backend:
            await backend.channel("changes").put(records(1, keys=1))
    assert ["ExplicitHashKey" in entry for entry in seen] == [False, True, False]
    with pytest.raises(ConfigError, match="aws://x: aggregate='perhaps': say true or false"):
        async with open_backend("aws://x", environment, aggregate="perhaps"):
            pass
