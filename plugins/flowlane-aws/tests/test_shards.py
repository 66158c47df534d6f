"""Reading Kinesis shard by shard: nothing is skipped, whatever it answers; aggregates are taken apart."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import md5
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane.errors import ConfigError, Permanent, Retryable
from flowlane.ports import ChannelRecord
from flowlane.shards import SUBS, Page, Place, Reader, Shard, place
from flowlane.testing.manual import ManualClock
from flowlane_aws.clients import open_client
from flowlane_aws.kinesis import HOT
from flowlane_aws.kinesis.pages import SLICE, Got, Span, Unpacking
from flowlane_aws.kinesis.reader import PAGE_BYTES
from flowlane_aws.kinesis.shards import KinesisShards
from tests.aws_backend import new_name
from tests.aws_lambda.aggregate import aggregate, member, message, sealed, varint
from tests.aws_wire import Answer
from tests.fault_proxy import Exchange, FaultProxy, changed, refused, throttled

ALL = (1 << 128) - 1
GET = "kinesis.GetRecords"
OLDEST = Place()


class Stream:
    """A stream of a name of its own on a stand-in behind the proxy."""

    def __init__(self, client: Any, proxy: FaultProxy) -> None:
        self.client, self.proxy = client, proxy
        self.name = new_name()
        self.clock = ManualClock()
        self.shards = KinesisShards(self.name, client, self.clock)
        self.shards.usual = PAGE_BYTES // 100  # the first page holds so many

    async def make(self, shards: int = 1) -> None:
        await self.client.create_stream(StreamName=self.name, ShardCount=shards)
        await self.settled()

    async def settled(self) -> None:
        """It is there and does not change."""
        await self.client.get_waiter("stream_exists").wait(
            StreamName=self.name, WaiterConfig={"Delay": 0.03, "MaxAttempts": 100}
        )

    async def put(self, *records: tuple[str, bytes]) -> None:
        """In this order: one writer, one call."""
        records_ = [{"PartitionKey": key, "Data": data} for key, data in records]
        for start in range(0, len(records_), 500):
            await self.client.put_records(StreamName=self.name, Records=records_[start : start + 500])

    async def split(self, shard: str, at: int = 1 << 127) -> None:
        await self.client.split_shard(StreamName=self.name, ShardToSplit=shard, NewStartingHashKey=str(at))
        await self.settled()

    async def merge(self, one: str, other: str) -> None:
        await self.client.merge_shards(StreamName=self.name, ShardToMerge=one, AdjacentShardToMerge=other)
        await self.settled()

    async def shard(self, number: int = 0) -> Shard:
        return next(one for one in await self.shards.shards() if one.number == number)

    async def reader(self, place: Place = OLDEST, number: int = 0) -> Reader:
        return self.shards.read(await self.shard(number), place)


@asynccontextmanager
async def stream_on(endpoint: str, shards: int = 1, *, brisk: Any = HOT) -> AsyncIterator[Stream]:
    async with (
        FaultProxy(endpoint) as proxy,
        open_client("kinesis", endpoint=proxy.url, brisk=brisk, attempts=1) as client,
    ):
        stream = Stream(client, proxy)
        await stream.make(shards)
        yield stream


@pytest.fixture
async def stream(ministack: str) -> AsyncIterator[Stream]:
    async with stream_on(ministack) as stream:
        yield stream


@pytest.fixture
def on_kinesalite(kinesalite: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return kinesalite


async def read(reader: Reader, *, until: int = 10_000) -> list[Page]:
    """Pages up to the tip, or to the shard's end; not many more than `until` records."""
    pages = [await reader.page()]
    while pages[-1].behind and not pages[-1].ended and sum(len(p.records) for p in pages) < until:
        pages.append(await reader.page())
    return pages


def held(pages: Sequence[Page]) -> list[tuple[str, bytes]]:
    return [(record.key, record.data) for page in pages for record in page.records]


def numbered(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [(f"k{n % 7}", b"%d" % n) for n in range(start, start + count)]


# --------------------------------------------------------------------------- shards


async def test_shards_are_listed_with_their_parents(stream: Stream) -> None:
    assert await stream.shards.shards() == [Shard("shardId-000000000000", 0)]
    await stream.split("shardId-000000000000")
    children = await stream.shards.shards()
    assert children == [
        Shard("shardId-000000000001", 1, ("shardId-000000000000",)),
        Shard("shardId-000000000002", 2, ("shardId-000000000000",)),
    ]
    await stream.merge(children[0].id, children[1].id)
    assert await stream.shards.shards() == [
        Shard("shardId-000000000003", 3, ("shardId-000000000001", "shardId-000000000002"))
    ]


async def test_shards_are_listed_page_by_page(ministack: str) -> None:
    async def one_by_one(exchange: Exchange) -> bool:
        asked = json.loads(exchange.request.body)
        assert len(asked) == 1  # the name, or a token: Kinesis takes no both
        exchange.request.body = json.dumps(asked | {"StreamName": stream.name, "MaxResults": 2}).encode()
        return await exchange.answer(await exchange.forward())

    async with stream_on(ministack, shards=5) as stream:
        pages = stream.proxy.inject("kinesis.ListShards", one_by_one, times=-1)
        assert [shard.number for shard in await stream.shards.shards()] == [0, 1, 2, 3, 4]
        assert pages.fired == 3


@pytest.mark.parametrize("code", ["ResourceInUseException", "ExpiredNextTokenException"])
async def test_a_stream_that_is_changing_is_listed_later(stream: Stream, code: str) -> None:
    stream.proxy.inject("kinesis.ListShards", refused(400, code))
    with pytest.raises(Retryable, match=f"listing the shards of .*{stream.name}: {code}"):
        await stream.shards.shards()
    assert await stream.shards.shards()


@pytest.mark.parametrize("body", [b"{}", b'{"Shards": []}', b'{"Shards": [{"Shard', b"<html>busy</html>"])
async def test_an_answer_without_shards_is_none(stream: Stream, body: bytes) -> None:
    stream.proxy.inject("kinesis.ListShards", changed(instead(body)))
    with pytest.raises(Retryable, match=f"listing the shards of .*{stream.name}: "):
        await stream.shards.shards()
    assert await stream.shards.shards()


def instead(body: bytes) -> Callable[[Answer], None]:
    def change(answer: Answer) -> None:
        answer.body = body

    return change


async def test_a_shard_without_a_number_is_refused(stream: Stream) -> None:
    def other(answer: Answer) -> None:
        answer.body = answer.body.replace(b"shardId-000000000000", b"first")

    stream.proxy.inject("kinesis.ListShards", changed(other))
    with pytest.raises(Permanent, match="shard 'first' of a Kinesis stream has no number"):
        await stream.shards.shards()


# --------------------------------------------------------------------------- pages and places


async def test_what_was_put_is_read_from_any_place_on(stream: Stream) -> None:
    put = numbered(250)
    await stream.put(*put)
    pages = await read(await stream.reader())
    assert held(pages) == put
    assert [pages[-1].behind, pages[-1].ended] == [0, False]
    records = [record for page in pages for record in page.records]
    assert [record.partition for record in records] == [0] * 250
    positions = [record.position for record in records]
    assert positions == sorted(set(positions))
    page = pages[0]
    for index in (0, 57, 98):
        for behind in (page.place(index), place(records[index].position)):  # as it was, and of a position
            assert held(await read(await stream.reader(behind))) == put[index + 1 :]
        assert page.place(index).position == records[index].position


async def test_places_within_an_aggregate(stream: Stream) -> None:
    many = numbered(20)
    put = [("a", b"first"), *many, ("b", b"last")]
    await stream.put(put[0], ("x", aggregate(*many)), put[-1])
    pages = await read(await stream.reader())
    assert held(pages) == put
    (page,) = pages
    assert page.records[1].position + 19 == page.records[20].position
    assert page.records[1].position % SUBS == 0
    assert [page.place(n).whole for n in (0, 1, 19, 20, 21)] == [True, False, False, True, True]
    for index in range(len(put)):
        for behind in (page.place(index), place(page.records[index].position)):
            assert held(await read(await stream.reader(behind))) == put[index + 1 :]


async def test_records_put_while_it_is_read_come_next(stream: Stream) -> None:
    reader = await stream.reader()
    assert held(await read(reader)) == []
    await stream.put(*numbered(5))
    assert held(await read(reader)) == numbered(5)
    await stream.put(*numbered(300, start=5))
    assert held(await read(reader)) == numbered(300, start=5)


async def test_the_sdks_own_way_reads_the_same(ministack: str) -> None:
    async with stream_on(ministack, brisk=()) as stream:
        put = [*numbered(20), ("x", bytes(range(256)))]
        await stream.put(*put[:-1], ("y", aggregate(*numbered(3))), put[-1])
        assert held(await read(await stream.reader())) == [*put[:-1], *numbered(3), put[-1]]


async def test_a_page_holds_some_megabytes(stream: Stream) -> None:
    large = [("k", b"%d" % n + bytes(199_999)) for n in range(40)]
    await stream.put(*numbered(100))
    for start in range(0, 40, 20):
        await stream.put(*large[start : start + 20])
    stream.shards = KinesisShards(stream.name, stream.client, stream.clock)
    reader = await stream.reader()
    assert len((await reader.page()).records) == 10  # of whatever size: they are not too many
    assert [len(page.records) for page in await read(reader)] == [130]  # 8 MB: it could not be known
    await stream.put(large[0])
    assert held(await read(reader)) == large[:1]
    await stream.put(*large[:20])
    pages = await read(reader)
    assert held(pages) == large[:20]
    assert [len(page.records) for page in pages] == [PAGE_BYTES // 200_000, PAGE_BYTES // 200_000, 0]
    assert pages[1].behind  # as far as the page can tell


async def test_the_more_shards_are_read_the_smaller_are_the_pages(stream: Stream) -> None:
    await stream.put(*((f"k{n}", bytes(9)) for n in range(200)))
    readers = [await stream.reader() for _ in range(64)]
    assert len((await readers[0].page()).records) == 100 // 4
    stream.shards.read(await stream.shard(), OLDEST, limit=1)  # who only looks does not count
    del readers[1:]
    stream.shards.usual = PAGE_BYTES // 100
    assert len((await readers[0].page()).records) == 100


async def test_few_reads_are_under_way_at_once(stream: Stream) -> None:
    under_way = most = 0

    async def empty(exchange: Exchange) -> bool:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        body = b'{"Records": [], "MillisBehindLatest": 0, "NextShardIterator": "x"}'
        return await exchange.answer(Answer(200, {}, body))

    stream.proxy.inject(GET, empty, times=-1)
    readers = [await stream.reader() for _ in range(60)]
    await asyncio.gather(*(reader.page() for reader in readers))
    assert 8 < most <= 16


async def test_the_tip_is_asked_for_with_pauses_and_what_is_behind_at_once(stream: Stream) -> None:
    async def pause() -> float:
        before = stream.clock.monotonic()
        await reader.page()
        return round(stream.clock.monotonic() - before, 3)

    reader = await stream.reader()
    assert [await pause() for _ in range(6)] == [0, 0.2, 0.4, 0.8, 1, 1]
    await stream.put(*numbered(30))
    assert [await pause() for _ in range(3)] == [1, 0.2, 0.4]
    await stream.put(*numbered(10_100))
    assert [await pause() for _ in range(4)] == [0.8, 0, 0.2, 0.4]

    def sparse(answer: Answer) -> None:
        answer.body = json.dumps(json.loads(answer.body) | {"MillisBehindLatest": 5000}).encode()

    stream.proxy.inject(GET, changed(sparse), times=3)
    assert [await pause() for _ in range(5)] == [0.8, 0.2, 0.2, 0.2, 0.4]


# --------------------------------------------------------------------------- what may go wrong


async def test_an_expired_iterator_is_renewed(stream: Stream) -> None:
    await stream.put(*numbered(250))
    reader = await stream.reader(place((await (await stream.reader()).page()).records[9].position))
    expired = stream.proxy.inject(GET, refused(400, "ExpiredIteratorException"), times=2)
    pages = [await reader.page()]
    again = stream.proxy.inject(GET, refused(400, "ExpiredIteratorException"))
    pages += await read(reader)
    assert held(pages) == numbered(240, start=10)
    assert (expired.fired, again.fired) == (2, 1)
    stream.proxy.inject(GET, refused(400, "ExpiredIteratorException"))
    await stream.put(*numbered(3))
    assert held(await read(reader)) == numbered(3)


@pytest.mark.parametrize("call", [GET, "kinesis.GetShardIterator"])
async def test_a_busy_shard_is_waited_for(stream: Stream, call: str) -> None:
    await stream.put(*numbered(3))
    busy = stream.proxy.inject(call, throttled(), times=5)
    assert held(await read(await stream.reader())) == numbered(3)
    assert busy.fired == 5
    assert stream.clock.monotonic() == 5  # with a jitter of half a second each


async def test_a_shard_that_stays_busy_is_given_up_for_now(stream: Stream) -> None:
    await stream.put(*numbered(3))
    stream.proxy.inject(GET, throttled(), times=10)
    reader = await stream.reader()
    with pytest.raises(Retryable, match=r"reading shardId-0+ of .*ProvisionedThroughput.* 10 times in a row"):
        await reader.page()
    assert held(await read(reader)) == numbered(3)


async def test_iterators_that_always_expire_are_given_up_for_now(stream: Stream) -> None:
    await stream.put(*numbered(3))
    expired = stream.proxy.inject(GET, refused(400, "ExpiredIteratorException"), times=10)
    reader = await stream.reader()
    with pytest.raises(Retryable, match="ExpiredIteratorException 10 times in a row: iterators that"):
        await reader.page()
    assert expired.fired == 10
    assert held(await read(reader)) == numbered(3)


async def test_a_failed_call_skips_nothing(stream: Stream) -> None:
    await stream.put(*numbered(150))
    reader = await stream.reader()
    first = await reader.page()
    stream.proxy.inject(GET, refused(500, "InternalFailure"))
    stream.proxy.inject(GET, changed(lambda answer: setattr(answer, "body", b"")))
    for _ in range(2):  # an empty answer has no next iterator, and is not the end of the shard for that
        with pytest.raises(Retryable):
            await reader.page()
    assert held([first, *await read(reader)]) == numbered(150)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"Records": [{"Sequence', b"<html>busy</html>"])
@pytest.mark.parametrize("call", [GET, "kinesis.GetShardIterator"])
async def test_an_answer_that_is_none_skips_nothing(stream: Stream, call: str, body: bytes) -> None:
    await stream.put(*numbered(10))
    reader = await stream.reader()
    stream.proxy.inject(call, changed(instead(body)))
    with pytest.raises(Retryable):
        await reader.page()
    assert held(await read(reader)) == numbered(10)


class Cancelling(ManualClock):
    """Whoever sleeps for the time that ``left`` counts down to is cancelled."""

    left = 0

    async def sleep(self, seconds: float) -> None:
        self.left -= 1
        if self.left == 0:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await super().sleep(seconds)


async def test_a_read_that_is_cancelled_skips_nothing(stream: Stream) -> None:
    put = [*numbered(20), ("x", aggregate(*numbered(6 * SLICE))), *numbered(20)]
    await stream.put(*put)
    clock = Cancelling()
    stream.shards = KinesisShards(stream.name, stream.client, clock)
    reader = stream.shards.read(await stream.shard(), Place())
    assert held([await reader.page()]) == numbered(10)  # of records whose size is not known
    for steps in (1, 2, 3):  # before it asks, and between two slices of the aggregate
        clock.left = steps
        task = asyncio.ensure_future(reader.page())
        with pytest.raises(asyncio.CancelledError):
            await task
    assert held(await read(reader)) == numbered(20)[10:] + numbered(6 * SLICE) + numbered(20)


async def test_a_shard_that_is_gone_has_ended(stream: Stream) -> None:
    reader = await stream.reader()
    await reader.page()
    await stream.split("shardId-000000000000")  # MiniStack has no parents
    assert await reader.page() == Page(ended=True)
    assert await stream.shards.read(Shard("shardId-000000000000", 0), Place()).page() == Page(ended=True)


async def test_a_shard_that_is_listed_is_not_gone(stream: Stream) -> None:
    await stream.put(*numbered(3))
    reader = await stream.reader()
    stream.proxy.inject(GET, refused(400, "ResourceNotFoundException"))
    with pytest.raises(Retryable, match="the shard is listed, and cannot be found"):
        await reader.page()
    assert held(await read(reader)) == numbered(3)


async def test_a_stream_that_is_not_there_is_no_ended_shard(stream: Stream) -> None:
    reader = await stream.reader()
    await stream.client.delete_stream(StreamName=stream.name)
    with pytest.raises(ConfigError, match=f"{stream.name}: it does not exist"):
        await reader.page()
    with pytest.raises(ConfigError, match=f"{stream.name}: it does not exist"):
        await stream.shards.shards()


async def test_a_closed_shard_ends_where_its_records_end(on_kinesalite: str) -> None:
    async with stream_on(on_kinesalite) as stream:
        await stream.put(*numbered(120))
        reader = await stream.reader()
        pages = [await reader.page()]
        await stream.split("shardId-000000000000")
        await stream.put(*numbered(10))
        while not pages[-1].ended:
            pages.append(await reader.page())
        assert held(pages) == numbered(120)
        found = [one.number for one in await stream.shards.shards()]
        assert found == [0, 1, 2]


async def test_a_place_of_another_stream_is_before_the_oldest(
    on_kinesalite: str, caplog: pytest.LogCaptureFixture
) -> None:
    # As of a stream that was deleted and made anew; here it is another shard's, which is told of alike.
    async with stream_on(on_kinesalite, shards=2) as stream:
        await stream.put(*numbered(20))
        (page,) = await read(await stream.reader(number=1))
        (whole,) = await read(await stream.reader())
        for behind in (page.place(2), place(page.records[2].position)):
            assert await read(await stream.reader(behind)) == [whole]
    assert "is read from its oldest one on: is the stream another one than it was?" in caplog.text


# --------------------------------------------------------------------------- aggregates


def hash_of(key: str, explicit: str) -> int:
    return int(explicit) if explicit else int(md5(key.encode(), usedforsecurity=False).hexdigest(), 16)


def with_hashes(records: Sequence[tuple[str, bytes, str]]) -> bytes:
    """An aggregate in which each record has the explicit hash key that is given, if one is."""
    keys = list(dict.fromkeys(key for key, _, _ in records))
    hashes = list(dict.fromkeys(explicit for _, _, explicit in records if explicit))
    parts = [member(1, key.encode()) for key in keys] + [member(2, one.encode()) for one in hashes]
    for key, data, explicit in records:
        of = member(2, hashes.index(explicit)) if explicit else b""
        parts.append(member(3, member(1, keys.index(key)) + of + member(3, data)))
    return sealed(b"".join(parts))


PLAIN = st.tuples(st.text(min_size=1, max_size=4), st.binary(max_size=20))
INNER = st.tuples(
    st.text(max_size=4),
    st.binary(max_size=20) | st.binary(min_size=130, max_size=140),
    st.just("") | st.integers(0, ALL).map(str),
)


async def unpacked(got: Sequence[Got], span: Span, clock: ManualClock | None = None) -> Unpacking:
    unpacking = Unpacking(3, span, clock or ManualClock())
    await unpacking.add(got)
    return unpacking


@given(
    st.lists(PLAIN | st.lists(INNER, max_size=5), max_size=8),
    st.tuples(st.integers(0, ALL), st.integers(0, ALL)).map(sorted) | st.just([0, ALL]),
)
async def test_aggregates_are_taken_apart_and_strangers_left_out(
    records: list[tuple[str, bytes] | list[tuple[str, bytes, str]]], bounds: list[int]
) -> None:
    low, high = bounds
    got, expected = [], []
    for number, one in enumerate(records, start=10**30):
        if isinstance(one, tuple):
            got.append(Got(str(number), *one))
            expected.append((str(number), 0, *one))
        else:
            got.append(Got(str(number), "a", with_hashes(one)))
            for sub, (key, data, explicit) in enumerate(one):
                if low <= hash_of(key, explicit) <= high:
                    expected.append((str(number), sub, key, data))
    found = await unpacked(got, Span(low, high))
    assert found.sequences == [sequence for sequence, _, _, _ in expected]
    assert found.records == [
        ChannelRecord(key, data, 3, int(sequence) * SUBS + sub) for sequence, sub, key, data in expected
    ]
    everything = sum(1 if isinstance(one, tuple) else len(one) for one in records)
    assert found.strangers == everything - len(expected)


@pytest.mark.parametrize(
    "data",
    [
        aggregate(("k", b"x" * 100))[:-1],  # its digest is wrong
        sealed(message([("k", b"x")]) + b"\x1a\x05\x08\x09\x1a\x01y"),  # no key has that number
        sealed(b"\x0b"),
    ],
)
async def test_what_is_no_aggregate_is_a_record(data: bytes) -> None:
    found = await unpacked([Got("7", "key", data)], Span(0, 5))
    assert (found.records, found.strangers) == ([ChannelRecord("key", data, 3, 7 * SUBS)], 0)


@pytest.mark.parametrize("explicit", ["9" * 5000, "-1", "k"])
async def test_a_hash_key_that_is_none_is_a_strangers(explicit: str) -> None:
    # Python makes no number of more than 4,300 digits: the shard would end here, for good.
    got = [Got("7", "a", with_hashes([("k", b"x", explicit), ("k", b"y", "5")])), Got("8", "k", b"z")]
    found = await unpacked(got, Span(0, 5))
    assert ([one.data for one in found.records], found.strangers) == ([b"y", b"z"], 1)


async def test_of_a_shard_that_is_listed_no_longer_nothing_is_left_out(ministack: str) -> None:
    def emptied(answer: Answer) -> None:
        said = json.loads(answer.body)
        answer.body = json.dumps(said | {"Shards": said["Shards"][1:]}).encode()

    async with stream_on(ministack, shards=2) as stream:
        several = [(str(n), b"%d" % n) for n in range(20)]
        packed = aggregate(*several)
        await stream.client.put_record(
            StreamName=stream.name, PartitionKey="a", ExplicitHashKey="0", Data=packed
        )
        reader = await stream.reader()
        stream.proxy.inject("kinesis.ListShards", changed(emptied), times=-1)
        await stream.shards.shards()
        assert held(await read(reader)) == several


@pytest.mark.parametrize("ours", [True, False])
async def test_unusual_ones_are_taken_apart_too(ours: bool) -> None:
    # What was taken before it was found to be unusual (64 KiB) does not count twice.
    usual = b"".join(member(3, member(1, 0) + member(3, b"%03d" % n + bytes(97))) for n in range(900))
    tagged = b"".join(
        member(3, member(1, 0) + member(3, b"%d" % n) + member(4, member(1, b"tag")))
        for n in range(2 * SLICE)
    )
    data = sealed(member(1, b"k") + usual + tagged)
    found = await unpacked([Got("7", "a", data)], Span(0, ALL if ours else 5))
    count = 900 + 2 * SLICE
    assert [one.position - 7 * SUBS for one in found.records] == list(range(count if ours else 0))
    assert [len(found.sequences), found.strangers] == ([count, 0] if ours else [0, count])


async def test_more_than_can_be_numbered_stay_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowlane_aws.kinesis.pages.SUBS", 10)  # so many fit into a record of 6 MiB only
    large = member(1, b"k") + member(3, member(1, 0) + member(3, bytes(1 << 20)))
    small = member(3, member(1, 0) + member(3, b""))
    assert len((await unpacked([Got("7", "a", sealed(large + 9 * small))], Span(0, ALL))).records) == 10
    data = sealed(large + 10 * small)
    found = await unpacked([Got("7", "a", data)], Span(0, ALL))
    assert [one.data for one in found.records] == [data]


class Watching(ManualClock):
    """Notes how many records are there each time the loop is given way to."""

    def __init__(self) -> None:
        super().__init__()
        self.unpacking: Unpacking | None = None
        self.seen = [0]

    async def sleep(self, seconds: float) -> None:
        assert self.unpacking is not None
        self.seen.append(len(self.unpacking.records) + self.unpacking.strangers)
        await super().sleep(seconds)


@pytest.mark.parametrize("whole", [True, False])
async def test_the_loop_is_given_way_to(whole: bool) -> None:
    clock = Watching()
    clock.unpacking = Unpacking(0, Span(0, ALL if whole else ALL >> 1), clock)
    tiny = sealed(member(1, b"k") + 60_000 * (varint(26) + varint(5) + b"\x08\x00\x1a\x01x"))
    usual = aggregate(*((f"k{n % 9}", bytes(200)) for n in range(4_000)))
    await clock.unpacking.add(
        [
            *(Got(str(n), "key", b"x") for n in range(3 * SLICE)),
            Got("100000", "a", tiny),
            *(Got(str(n + 200_000), "a", usual) for n in range(2)),
        ]
    )
    steps = [after - before for before, after in zip(clock.seen, clock.seen[1:], strict=False)]
    assert sum(steps) > 70_000
    assert max(steps) < 12_000  # 64 KiB of the smallest ones that there are: some 10 ms
    assert max(step for at, step in zip(clock.seen, steps, strict=False) if at > 66_000) < 1.2 * SLICE
    large = [Got(str(n), "key", bytes(1 << 18)) for n in range(40)]
    before = len(clock.seen)
    await clock.unpacking.add(large)
    assert len(clock.seen) - before > 8


async def test_strangers_are_told_of_once(ministack: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="flowlane")
    async with stream_on(ministack, shards=2) as stream:
        home = [key for key in map(str, range(50)) if hash_of(key, "") < 1 << 127]
        away = [key for key in map(str, range(50)) if hash_of(key, "") >= 1 << 127]
        mixed = aggregate(*((key, key.encode()) for key in map(str, range(50))))
        for _ in range(2):
            await stream.client.put_record(
                StreamName=stream.name, PartitionKey="a", ExplicitHashKey="0", Data=mixed
            )
        reader = await stream.reader()
        found = held(await read(reader))
        assert found == 2 * [(key, key.encode()) for key in home]
        assert len(away) > 5
        await stream.client.put_record(
            StreamName=stream.name, PartitionKey="a", ExplicitHashKey="0", Data=mixed
        )
        await read(reader)
    said = [one.getMessage() for one in caplog.records if "keys of other shards" in one.getMessage()]
    assert len(said) == 1
    assert f"{2 * len(away)} records" in said[0]
