"""Kinesis channels: nothing is lost, and of one key no record is stored before an earlier one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlane.errors import ConfigError, Permanent, Retryable
from flowlane.ports import ChannelRecord
from flowlane.testing.manual import ManualClock
from flowlane_aws.clients import open_client
from flowlane_aws.kinesis import CALL_BYTES, CALL_RECORDS, RECORD_BYTES, TRIES, Producer, partition_key
from tests.aws_wire import Answer
from tests.fault_proxy import Exchange, Fault, FaultProxy, changed, lost_reply, throttled

SHARDS = 4
BUSY = "ProvisionedThroughputExceededException"


class Stream:
    """A stream on a stand-in behind the proxy: the channel that puts to it, and what it holds."""

    def __init__(self, client: Any, proxy: FaultProxy) -> None:
        self.client, self.proxy = client, proxy
        self.clock = ManualClock()
        self.channel = Producer("changes", client, self.clock)
        self._iterators: list[str] = []
        self.calls: list[list[tuple[str, int]]] = []  #: key and size of each call's records

    async def open(self) -> None:
        await self.client.create_stream(StreamName="changes", ShardCount=SHARDS)
        await self.client.get_waiter("stream_exists").wait(
            StreamName="changes", WaiterConfig={"Delay": 0.05, "MaxAttempts": 100}
        )
        await self.rewind()

    async def rewind(self) -> None:
        """What is in it by now is not looked at any more."""
        shards = await self.client.list_shards(StreamName="changes")
        self._iterators = [
            (
                await self.client.get_shard_iterator(
                    StreamName="changes", ShardId=shard["ShardId"], ShardIteratorType="LATEST"
                )
            )["ShardIterator"]
            for shard in shards["Shards"]
        ]
        self.calls.clear()
        self.proxy.clear()

    async def read(self) -> dict[str, list[bytes]]:
        """All that came since, by partition key, in the order of each shard."""
        found: dict[str, list[bytes]] = {}
        for number in range(len(self._iterators)):
            while True:
                answer = await self.client.get_records(ShardIterator=self._iterators[number])
                self._iterators[number] = answer["NextShardIterator"]
                if not answer["Records"]:
                    break
                for record in answer["Records"]:
                    found.setdefault(record["PartitionKey"], []).append(record["Data"])
        return found

    def refusing(self, refuses: Callable[[int, str, int], bool], code: str = BUSY) -> Fault:
        """Partial failures: of call number n, the record of that key and number in the call is refused where
        `refuses` says so; the others are stored, as Kinesis does it."""

        async def fault(exchange: Exchange) -> bool:
            asked = json.loads(exchange.request.body)
            records = asked["Records"]
            call = len(self.calls)
            self.calls.append([(each["PartitionKey"], len(each["Data"])) for each in records])
            out = [refuses(call, each["PartitionKey"], n) for n, each in enumerate(records)]
            kept = [each for each, refused in zip(records, out, strict=True) if not refused]
            answer = Answer(200, {"content-type": "application/x-amz-json-1.1"}, b'{"Records": []}')
            if kept:
                exchange.request.body = json.dumps(asked | {"Records": kept}).encode()
                answer = await exchange.forward()
            if answer.status != 200:
                return await exchange.answer(answer)
            stored = iter(json.loads(answer.body)["Records"])
            failed = {"ErrorCode": code, "ErrorMessage": "injected"}
            results = [failed if refused else next(stored) for refused in out]
            answer.body = json.dumps({"FailedRecordCount": sum(out), "Records": results}).encode()
            return await exchange.answer(answer)

        return fault

    def inject(self, refuses: Callable[[int, str, int], bool], code: str = BUSY) -> None:
        self.proxy.inject("kinesis.PutRecords", self.refusing(refuses, code), times=-1)


@asynccontextmanager
async def stream_on(endpoint: str) -> AsyncIterator[Stream]:
    async with FaultProxy(endpoint) as proxy, open_client("kinesis", endpoint=proxy.url) as client:
        stream = Stream(client, proxy)
        await stream.open()
        yield stream


@pytest.fixture
async def stream(ministack: str) -> AsyncIterator[Stream]:
    async with stream_on(ministack) as stream:
        yield stream


def by_key(records: Sequence[ChannelRecord]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for record in records:
        found.setdefault(partition_key(record.key), []).append(record.data)
    return found


def records(count: int, keys: int) -> list[ChannelRecord]:
    return [ChannelRecord(f"k{n % keys}", b"%d" % n) for n in range(count)]


async def test_many_keys_go_out_in_full_calls(stream: Stream) -> None:
    stream.inject(lambda call, key, n: False)
    put = records(3 * CALL_RECORDS + 7, keys=3 * CALL_RECORDS + 7)
    await stream.channel.put(put)
    assert await stream.read() == by_key(put)
    assert [len(call) for call in stream.calls] == [CALL_RECORDS, CALL_RECORDS, CALL_RECORDS, 7]
    assert stream.clock.monotonic() == 0  # nobody waited


async def test_no_call_holds_two_records_of_one_key(stream: Stream) -> None:
    stream.inject(lambda call, key, n: False)
    put = records(40, keys=7)
    await stream.channel.put(put)
    assert await stream.read() == by_key(put)
    assert [len(call) for call in stream.calls] == [7, 7, 7, 7, 7, 5]
    assert all(max(Counter(key for key, _ in call).values()) == 1 for call in stream.calls)


async def test_another_server_thinks_the_same(moto: str) -> None:
    async with stream_on(moto) as stream:
        stream.inject(lambda call, key, n: (call + n) % 5 == 0)
        put = records(100, keys=30)
        await stream.channel.put(put)
        assert await stream.read() == by_key(put)
        with pytest.raises(ConfigError, match="it does not exist"):
            await Producer("nowhere", stream.client, stream.clock).put(put)


async def test_calls_are_bounded_by_bytes(stream: Stream) -> None:
    stream.inject(lambda call, key, n: False)
    half = CALL_BYTES // 2
    sizes = [half - 2, half - 1, half - 3, half - 2, RECORD_BYTES - 2, 1, half]
    put = [ChannelRecord(f"k{n}", b"x" * size) for n, size in enumerate(sizes)]
    await stream.channel.put(put)
    assert await stream.read() == by_key(put)
    # In the order given, though several go at once. With their keys, the first two are one byte more than a
    # call takes, the second and the third as much.
    assert sorted([key for key, _ in call] for call in stream.calls) == [
        ["k0"],
        ["k1", "k2"],
        ["k3"],
        ["k4"],
        ["k5", "k6"],
    ]


async def test_what_fails_is_sent_again_before_what_follows_it(stream: Stream) -> None:
    stream.inject(lambda call, key, n: key == "k1" and call in (0, 2, 3))
    put = records(9, keys=3)
    await stream.channel.put(put)
    assert await stream.read() == by_key(put)
    sent = [sorted(key for key, _ in call) for call in stream.calls]
    assert sent == [["k0", "k1", "k2"], ["k0", "k1", "k2"], ["k0", "k1", "k2"], *[["k1"]] * 3]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    keys=st.lists(st.sampled_from(["a", "b", "c", "", "x" * 257, "\N{GRINNING FACE}" * 129]), max_size=60),
    refused=st.sets(st.tuples(st.integers(0, 20), st.integers(0, 6))),
    code=st.sampled_from([BUSY, "InternalFailure"]),
)
async def test_nothing_is_lost_doubled_or_out_of_order_whatever_is_refused(
    stream: Stream, keys: list[str], refused: set[tuple[int, int]], code: str
) -> None:
    await stream.rewind()
    stream.inject(lambda call, key, n: (call, n) in refused and call % TRIES != TRIES - 1, code)
    put = [ChannelRecord(key, b"%d" % n) for n, key in enumerate(keys)]
    await stream.channel.put(put)
    assert await stream.read() == by_key(put)


async def test_a_lost_reply_doubles_and_loses_nothing(stream: Stream) -> None:
    lost = stream.proxy.inject("kinesis.PutRecords", lost_reply(), nth=2)
    put = records(20, keys=5)
    await stream.channel.put(put)
    assert lost.fired == 1
    found = await stream.read()
    expected = by_key(put)
    for data in expected.values():
        data.insert(1, data[1])  # the second of each key: sent again by the SDK
    assert found == expected


async def test_a_busy_shard_is_given_up_in_the_end(stream: Stream) -> None:
    stream.inject(lambda call, key, n: key == "k1")
    with pytest.raises(
        Retryable, match=r"changes: 2 of 6 records .* refused 12 times \(Provisioned"
    ) as caught:
        await stream.channel.put(records(6, keys=3))
    assert await stream.read() == {"k0": [b"0", b"3"], "k2": [b"2", b"5"]}
    assert len(stream.calls) == TRIES
    assert caught.value.delay
    assert 10 < stream.clock.monotonic() < 20


async def test_the_pace_falls_while_most_is_refused_and_recovers(stream: Stream) -> None:
    slept: list[float] = []

    def busy(call: int, key: str, n: int) -> bool:
        slept.append(stream.clock.monotonic())
        return call < 4

    stream.inject(busy)
    await stream.channel.put(records(40, keys=4))
    times = sorted(set(slept))
    pauses = [round(after - before, 3) for before, after in zip([0.0, *times], times, strict=False)]
    assert pauses[:5] == [0.0, 0.05, 0.1, 0.2, 0.4]
    assert pauses[5:] == sorted(pauses[5:], reverse=True)
    before = stream.clock.monotonic()
    await stream.channel.put(records(1, keys=1))
    assert stream.clock.monotonic() == before


async def test_one_busy_shard_does_not_slow_the_others(stream: Stream) -> None:
    stream.inject(lambda call, key, n: key == "k1" and call < 8)
    await stream.channel.put(records(1000, keys=100))
    assert stream.clock.monotonic() < 8 * 0.1


async def test_a_throttled_call_is_as_its_records_refused(stream: Stream) -> None:
    throttle = stream.proxy.inject("kinesis.PutRecords", throttled(), times=3)  # as often as the SDK tries
    put = records(10, keys=5)
    await stream.channel.put(put)
    assert throttle.fired == 3
    assert await stream.read() == by_key(put)
    assert stream.clock.monotonic() > 0


async def test_a_large_call_is_sent_again_whole(stream: Stream) -> None:
    lost = stream.proxy.inject("kinesis.PutRecords", lost_reply())
    put = [ChannelRecord("k", bytes(range(256)) * 4000)]
    await stream.channel.put(put)
    assert lost.fired == 1
    assert await stream.read() == {"k": [put[0].data] * 2}


async def test_too_few_answers_are_no_answer(stream: Stream) -> None:
    def short(answer: Answer) -> None:
        said = json.loads(answer.body)
        answer.body = json.dumps(said | {"Records": said["Records"][1:]}).encode()

    def empty(answer: Answer) -> None:
        answer.body = b'{"Records": [{}, {}]}'

    def none(answer: Answer) -> None:
        answer.body = b"{}"

    for number, change in ((1, short), (0, empty), (0, none)):
        stream.proxy.inject("kinesis.PutRecords", changed(change))
        with pytest.raises(Retryable, match=f"{number} answers to 2 records"):
            await stream.channel.put(records(2, keys=2))


async def test_a_record_that_is_too_large_is_refused_before_anything_is_sent(stream: Stream) -> None:
    put = [*records(3, keys=3), ChannelRecord("big", b"x" * (RECORD_BYTES - 2))]
    with pytest.raises(Permanent, match=r"record 3 has 1,048,577 bytes .* takes 1,048,576: raise"):
        await stream.channel.put(put)
    assert await stream.read() == {}
    fits = ChannelRecord("big", b"x" * (RECORD_BYTES - 3))
    await stream.channel.put([fits])
    assert await stream.read() == by_key([fits])


async def test_the_streams_own_limit_counts(stream: Stream) -> None:
    def larger(answer: Answer) -> None:
        said = json.loads(answer.body)
        said["StreamDescriptionSummary"]["MaxRecordSizeInKiB"] = 2048
        answer.body = json.dumps(said).encode()

    async def sized(exchange: Exchange) -> bool:  # MiniStack itself takes no such record
        stream.calls.append([(r["PartitionKey"], 0) for r in json.loads(exchange.request.body)["Records"]])
        results = [{"SequenceNumber": "1", "ShardId": "s"} for _ in stream.calls[-1]]
        body = json.dumps({"FailedRecordCount": 0, "Records": results}).encode()
        return await exchange.answer(Answer(200, {}, body))

    asked = stream.proxy.inject("kinesis.DescribeStreamSummary", changed(larger), times=-1)
    stream.proxy.inject("kinesis.PutRecords", sized, times=-1)
    large = ChannelRecord("big", b"x" * (RECORD_BYTES + 1))
    await stream.channel.put([ChannelRecord("a", b""), large, ChannelRecord("b", b"")])
    await stream.channel.put([large])
    assert asked.fired == 1
    assert stream.calls == [[("a", 0)], [("big", 0)], [("b", 0)], [("big", 0)]]
    with pytest.raises(Permanent, match="takes 2,097,152"):
        await stream.channel.put([ChannelRecord("big", b"x" * (2 * RECORD_BYTES))])


async def test_nothing_is_put_where_there_is_nothing(stream: Stream) -> None:
    await stream.channel.put([])
    assert stream.proxy.calls == {}


async def test_a_missing_stream_is_said(stream: Stream) -> None:
    missing = Producer("nowhere", stream.client, stream.clock)
    with pytest.raises(
        ConfigError, match=r"putting to the Kinesis stream nowhere: it does not exist .*create"
    ):
        await missing.put(records(1, keys=1))


@given(st.text(max_size=600) | st.text(st.characters(categories=["Cs"])))
def test_partition_keys_are_what_kinesis_takes(key: str) -> None:
    named = partition_key(key)
    assert 1 <= len(named.encode("utf-16-le")) // 2 <= 256
    assert named == key or len(named) == 64


def test_keys_are_hashed_only_where_they_must_be() -> None:
    assert partition_key("k" * 256) == "k" * 256
    assert partition_key("\N{GRINNING FACE}" * 128) == "\N{GRINNING FACE}" * 128
    odd = ("", "k" * 257, "k" * 258, "\N{GRINNING FACE}" * 129, "\ud800", "\ud801")
    hashed = [partition_key(key) for key in odd]
    assert len({*hashed}) == len(odd)
    assert {len(key) for key in hashed} == {64}
