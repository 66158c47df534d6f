"""What the embedded backends share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from flowlane.backends import memory, sqlite
from flowlane.backends.common import (
    BATCH_BYTES,
    CHANNEL_LEASE,
    PARTITIONS,
    News,
    held_for,
    partition,
    portions,
)
from flowlane.errors import ConfigError, Permanent, VersionConflict
from flowlane.ports import Backend, Channel, ChannelRecord, Commit, Committed, Environment, Tally
from flowlane.testing.manual import ManualClock
from flowlane.testing.units import RUN, append, applied, discover, found, settle, within


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["memory", "sqlite"])
async def backend(
    request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock
) -> AsyncIterator[Backend]:
    environment = Environment(clock, cast("Any", None))
    opened = (
        memory.open_backend("memory://", environment)
        if request.param == "memory"
        else sqlite.open_backend(f"sqlite:///{tmp_path}/f.db", environment)
    )
    async with opened as backend:
        yield backend


@pytest.fixture
def channel(backend: Backend) -> Channel:
    return backend.channel("changes")


async def test_of_a_group_the_last_that_counted_is_told_that_its_round_is_complete(backend: Backend) -> None:
    closing = Commit((), (), (Tally(RUN, 0, "load", closed=True),))
    await applied(backend, closing, *(discover(found(key)) for key in "abc"))
    one, two, three = await backend.receive(["load"], 9, lease=60)
    other = Commit((append(found("aside", run="", stage="")),))
    taken = Commit((append(found("a")),), (), (Tally(RUN, 0, "load", settled=1),))
    answers = await backend.commit([settle(one), settle(two), settle(three), other, taken])
    assert isinstance(answers[-1], VersionConflict)
    told = [list(answer.tally or ()) for answer in answers if isinstance(answer, Committed)]
    assert told == [[], [], [(RUN, 0)], []]


async def test_news_that_came_while_one_looked_are_not_missed() -> None:
    news = News()
    seen = news.count
    news()
    await within(30, news.wait(seen, 60))


@pytest.mark.parametrize("wanted", [("orders",), ("items", "orders"), ()])
@pytest.mark.parametrize("told", [("orders", "customers"), ()])
async def test_news_wake_those_who_wait_for_them(wanted: Sequence[str], told: Sequence[str]) -> None:
    news = News()
    async with asyncio.TaskGroup() as tasks:
        others = tasks.create_task(news.wait(news.count, 60, ("customs",)))
        waiting = tasks.create_task(news.wait(news.count, 60, wanted))
        await asyncio.sleep(0)
        seen = news.count
        news(told)
        await within(30, waiting)
        assert others.done() == (not told)
        await within(30, news.wait(seen, 60, wanted))  # who looked meanwhile does not wait
        news(("customs",))


async def test_no_news_is_an_end_too() -> None:
    news = News()
    await within(30, news.wait(news.count, 0.001))


def test_a_key_has_the_same_partition_in_every_release() -> None:
    # Changing this would break the order of what stands in files already.
    assert [partition(key) for key in ("", "a", "orders/1", "\u00fc")] == [0, 3, 4, 5]
    assert {partition(str(n)) for n in range(200)} == set(range(PARTITIONS))


# --------------------------------------------------------------------------- channels


async def test_what_is_put_at_once_goes_in_by_portions() -> None:
    small = [ChannelRecord("k", b"%d" % n) for n in range(5000)]
    large = [ChannelRecord("k", b"x" * (1 << 19)) for _ in range(40)]
    for records in ([], small[:1], small, large, [*large, *small]):
        found = await portions("c", records)
        assert [record for portion in found for record in portion] == records
        assert all(0 < len(portion) <= 2048 for portion in found)
        assert all(sum(len(record.data) for record in portion) <= 8 << 20 for portion in found)
    assert len(await portions("c", small)) == 3


async def test_a_long_put_lets_others_have_their_turn(channel: Channel) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    await channel.put([ChannelRecord("k", b"x")] * 20_000)
    task.cancel()
    assert turns >= 9


async def test_a_key_that_is_no_text_is_refused(channel: Channel) -> None:
    with pytest.raises(Permanent, match="channel changes: the key of record 1 is not Unicode text"):
        await channel.put([ChannelRecord("k", b"1"), ChannelRecord("\ud800", b"2")])
    assert [batch async for batch in channel.consume("c")] == []


async def test_the_limit_is_told(channel: Channel) -> None:
    with pytest.raises(Permanent, match=r"channel changes: record 0 has 1,048,577 bytes with its key"):
        await channel.put([ChannelRecord("k", b"x" * (1 << 20))])


async def test_a_rewind_passes_over_nothing_that_is_put_later(channel: Channel) -> None:
    await channel.put([ChannelRecord("a", b"1")])
    await channel.rewind("c", {partition("a"): 7, partition("b"): 7, PARTITIONS: 7, -1: 7})
    await channel.put([ChannelRecord("a", b"2"), ChannelRecord("b", b"1")])
    got = []
    async for batch in channel.consume("c"):
        got += [(record.key, record.data) for record in batch.records]
        await batch.settle()
    assert sorted(got) == [("a", b"2"), ("b", b"1")]
    assert {lag.partition for lag in await channel.lag("c")} == {partition("a"), partition("b")}


async def test_a_batch_of_large_records_is_short_and_a_single_one_comes_whole(channel: Channel) -> None:
    sizes = [1 << 19] * 20 + [10] * 20
    await channel.put([ChannelRecord("k", b"x" * size) for size in sizes])
    got: list[int] = []
    async for batch in channel.consume("c", limit=30):
        lengths = [len(record.data) for record in batch.records]
        assert len(lengths) == 1 or sum(lengths) <= BATCH_BYTES
        got += lengths
        await batch.settle()
    assert got == sizes


async def test_who_waits_is_woken_by_a_rewind(channel: Channel) -> None:
    await channel.put([ChannelRecord("k", b"1")])
    async for batch in channel.consume("c"):
        await batch.settle()
    waiting = asyncio.ensure_future(anext(channel.consume("c", wait=60)))
    for _ in range(5):
        await asyncio.sleep(0)
    await channel.rewind("c")
    assert [record.data for record in (await within(30, waiting)).records] == [b"1"]


async def test_a_hold_that_ran_out_is_nobodys(channel: Channel, clock: ManualClock) -> None:
    await channel.put([ChannelRecord("k", b"1")])
    iterator = channel.consume("c")
    batch = await anext(iterator)
    assert [bool(lag.owner) for lag in await channel.lag("c")] == [True]
    clock.advance(CHANNEL_LEASE)
    assert [lag.owner for lag in await channel.lag("c")] == [""]
    assert not await batch.extend()
    await batch.settle()  # nobody has taken it: what was done is done
    assert [lag.records for lag in await channel.lag("c")] == [0]


@pytest.mark.parametrize(("hold", "said"), [("soon", "hold=soon"), ("1s", "too short"), ("-3s", "hold=-3s")])
def test_a_hold_that_makes_no_sense_is_refused(hold: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        held_for("sqlite:///f.db", hold)


async def test_a_hold_may_be_chosen() -> None:
    clock = ManualClock()
    async with memory.open_backend("memory://", Environment(clock, cast("Any", None)), hold="5s") as backend:
        await backend.channel("c").put([ChannelRecord("k", b"1")])
        batches = backend.channel("c").consume("x")
        batch = await anext(batches)
        clock.advance(4.9)
        assert await batch.extend()
        clock.advance(5)
        assert not await batch.extend()
