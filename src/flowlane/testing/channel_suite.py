"""The contract of ``ports.Channel`` as tests; subclass as ``backend_suite`` says, with the same fixtures.

A channel whose holds follow a real clock sets ``elapse`` to really wait and a short ``HOLD``, which it reads
when it is opened: it is long in a test that lets no hold run out, so that a machine that stands still for
seconds lets none run out either. One that does not show at once what was put, or who has gone, says so with
``QUIET``. Nothing is taken for granted of which
key is in which partition, how positions are spaced, or in which portions records come, but that a batch has
consecutive ones and never more than asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from inspect import signature
from typing import ClassVar

import pytest

from flowlane.errors import Permanent
from flowlane.ports import Backend, Channel, ChannelBatch, ChannelRecord, Lag
from flowlane.testing.backend_model import Opener
from flowlane.testing.backend_suite import KEPT, LONG_PATIENCE, PATIENCE, Suite
from flowlane.testing.manual import ManualClock
from flowlane.testing.units import within


def records(count: int, keys: int = 5, start: int = 0) -> list[ChannelRecord]:
    """Records of `keys` keys in turn, numbered from `start`."""
    return [ChannelRecord(f"k{n % keys}", b"%d" % n) for n in range(start, start + count)]


async def close(*iterators: AsyncIterator[ChannelBatch]) -> None:
    """They end now, wherever they stand."""
    for iterator in iterators:
        await iterator.aclose()  # type: ignore[attr-defined]  # an asynchronous generator


def numbers(batch: ChannelBatch) -> list[int]:
    """What the records of `batch` are numbered."""
    return [int(record.data) for record in batch.records]


class ChannelSuite(Suite):
    """Order by key, positions by consumer, batches held by one at a time."""

    #: Seconds after which a partition whose consumer vanished is another's.
    HOLD: ClassVar[float] = 30.0
    #: Seconds without a record after which a channel counts as read to its end.
    QUIET: ClassVar[float] = 0.0
    #: Bytes of data in one record with its key, at most.
    RECORD: ClassVar[int] = 1 << 20
    #: Bytes of data in one batch, at most, however many records were asked for.
    BATCH: ClassVar[int] = 11 << 20

    @pytest.fixture(autouse=True)
    def _hold(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """A test that lets a hold run out asks for the clock; in others none does."""
        if "clock" not in signature(request.function).parameters:
            monkeypatch.setattr(self, "HOLD", KEPT)

    @pytest.fixture
    def channel(self, backend: Backend) -> Channel:
        return backend.channel("changes")

    def consume(self, channel: Channel, name: str = "c", limit: int = 500) -> AsyncIterator[ChannelBatch]:
        """What `channel` has now for `name`."""
        return channel.consume(name, limit=limit, wait=self.QUIET)

    async def drain(self, channel: Channel, name: str = "c", limit: int = 500) -> dict[str, list[int]]:
        """The numbers that are left for `name`, by key, each batch settled."""
        seen: dict[str, list[int]] = {}
        async for batch in self.consume(channel, name, limit):
            note(seen, batch.records)
            await batch.settle()
        return seen

    async def settled(
        self, channel: Channel, name: str = "c", limit: int = 500
    ) -> AsyncIterator[ChannelBatch]:
        """The batches that are left for `name`, each settled when the next one is asked for."""
        async for batch in self.consume(channel, name, limit):
            yield batch
            await batch.settle()

    async def vanish(self, clock: ManualClock) -> None:
        """So much time goes by that whoever holds a partition has lost it."""
        await self.elapse(clock, 1.1 * self.HOLD)

    async def lags(self, channel: Channel, name: str = "c") -> dict[int, Lag]:
        """How far `name` is, by partition."""
        found = await channel.lag(name)
        assert len({lag.partition for lag in found}) == len(found)
        return {lag.partition: lag for lag in found}

    async def test_order_is_kept_per_key(self, channel: Channel) -> None:
        for start in range(0, 300, 30):
            await channel.put(records(30, start=start))
        seen = await self.drain(channel, limit=7)
        assert seen == {f"k{k}": list(range(k, 300, 5)) for k in range(5)}
        assert await self.drain(channel) == {}

    async def test_records_come_as_they_were_put(self, channel: Channel) -> None:
        data = [bytes(range(256)), b"", b"\x00", b"x" * 100_000]
        await channel.put([ChannelRecord('kéy "1"\n', each) for each in data])
        got = [record async for batch in self.settled(channel) for record in batch.records]
        assert [record.data for record in got] == data
        assert {record.key for record in got} == {'kéy "1"\n'}
        assert len({record.partition for record in got}) == 1
        positions = [record.position for record in got]
        assert positions == sorted(set(positions))

    async def test_an_empty_channel_ends(self, backend: Backend, channel: Channel) -> None:
        await channel.put([])
        assert await within(PATIENCE, self.drain(channel)) == {}
        await channel.put(records(1))
        assert await self.drain(backend.channel("other")) == {}

    async def test_consumers_have_positions_of_their_own(self, backend: Backend, channel: Channel) -> None:
        await channel.put(records(10))
        first = await self.drain(channel, "one")
        await channel.put(records(10, start=10))
        assert await self.drain(channel, "one") == {f"k{k}": [10 + k, 15 + k] for k in range(5)}
        again = await self.drain(backend.channel("changes"), "two")
        assert {key: numbers[:2] for key, numbers in again.items()} == first

    async def test_what_is_not_settled_comes_again(self, channel: Channel) -> None:
        await channel.put(records(10, keys=1))
        seen = []
        async for batch in self.consume(channel, limit=4):
            seen.append(numbers(batch))
            await batch.settle(1 if len(seen) == 1 else 0 if len(seen) == 2 else None)
        assert seen == [[0, 1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [9]]

    async def test_who_stops_gives_up_what_it_has_not_settled(self, channel: Channel) -> None:
        await channel.put(records(10))
        everything = {f"k{k}": [k, k + 5] for k in range(5)}
        for _ in range(2):
            iterator = self.consume(channel)
            await anext(iterator)
            await anext(iterator, None)
            await close(iterator)
        assert await self.drain(channel) == everything

    async def test_who_asks_on_without_settling_comes_to_an_end(self, channel: Channel) -> None:
        await channel.put(records(10, keys=1))

        async def count() -> int:
            return len([batch async for batch in self.consume(channel, limit=3)])

        assert await within(PATIENCE, count()) == 1
        assert await self.drain(channel) == {"k0": list(range(10))}

    async def test_a_position_never_goes_back(self, channel: Channel, clock: ManualClock) -> None:
        await channel.put(records(10, keys=1))
        stale = self.consume(channel, limit=3)
        slow = await anext(stale)
        await self.vanish(clock)
        fast = self.consume(channel, limit=5)
        await (await anext(fast)).settle()
        await slow.settle()
        await slow.settle(1)
        assert numbers(await anext(fast)) == [5, 6, 7, 8, 9]
        await close(stale, fast)

    async def test_a_stale_batch_frees_nobody_elses_hold(self, channel: Channel, clock: ManualClock) -> None:
        await channel.put(records(10, keys=1))
        iterators = [self.consume(channel, limit=4) for _ in range(3)]
        slow = await anext(iterators[0])
        await self.vanish(clock)
        fast = await anext(iterators[1])
        await slow.settle(0)
        waiting = asyncio.ensure_future(anext(iterators[2]))
        for _ in range(5):
            await asyncio.sleep(0)
        await fast.settle()
        third = await within(PATIENCE, waiting)
        assert numbers(third) == [4, 5, 6, 7]
        await close(*iterators)

    async def test_a_partition_is_handed_to_one_at_a_time(self, channel: Channel) -> None:
        await channel.put(records(10, keys=1))
        one, two = self.consume(channel, limit=4), self.consume(channel, limit=4)
        first = await anext(one)
        waiting = asyncio.ensure_future(anext(two))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        await first.settle()
        second = await within(PATIENCE, waiting)
        assert numbers(second) == [4, 5, 6, 7]
        await close(one, two)

    async def test_who_vanishes_loses_its_hold(self, channel: Channel, clock: ManualClock) -> None:
        await channel.put(records(10, keys=1))
        vanished = self.consume(channel)
        await anext(vanished)
        await self.vanish(clock)
        assert await within(PATIENCE, self.drain(channel)) == {"k0": list(range(10))}
        await close(vanished)

    async def test_several_under_one_name_share_the_work(self, channel: Channel) -> None:
        seen: dict[str, list[int]] = {}

        async def work() -> None:
            async for batch in channel.consume("c", limit=3, wait=max(0.2, self.QUIET)):
                note(seen, batch.records)
                await asyncio.sleep(0)
                await batch.settle()

        async with asyncio.timeout(LONG_PATIENCE), asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(work())
            for start in range(0, 200, 20):
                await channel.put(records(20, keys=20, start=start))
        assert seen == {f"k{k}": list(range(k, 200, 20)) for k in range(20)}

    async def test_waiting_ends_when_something_comes(self, channel: Channel) -> None:
        iterator = channel.consume("c", wait=2 * PATIENCE)
        waiting = asyncio.ensure_future(anext(iterator))
        await asyncio.sleep(0)
        await channel.put(records(1))
        assert (await within(PATIENCE, waiting)).records[0].data == b"0"
        await close(iterator)

    async def test_a_cancelled_consumer_holds_nothing(self, channel: Channel) -> None:
        for n in range(min(10, self.CUTS)):
            task = asyncio.create_task(self.drain(channel, f"c{n}", 1))
            await channel.put(records(5, start=5 * n))
            for _ in range(n):
                await asyncio.sleep(0)
            task.cancel()
            (got,) = await asyncio.gather(task, return_exceptions=True)
            rest = await within(PATIENCE, self.drain(channel, f"c{n}"))
            if isinstance(got, asyncio.CancelledError):
                assert all(numbers[-1] == 5 * n + int(key[1:]) for key, numbers in rest.items())
            assert await self.drain(channel, f"c{n}") == {}

    # ----------------------------------------------------------------- producing

    async def test_the_order_of_each_of_several_producers_is_kept(self, channel: Channel) -> None:
        async def produce(producer: int) -> None:
            for start in range(0, 60, 12):
                numbered = [(f"k{n % 4}", b"%d/%d" % (producer, n)) for n in range(start, start + 12)]
                await channel.put([ChannelRecord(key, data) for key, data in numbered])

        await asyncio.gather(*(produce(producer) for producer in range(3)))
        seen: dict[tuple[str, str], list[int]] = {}
        async for batch in self.consume(channel, limit=50):
            for record in batch.records:
                producer, _, n = record.data.decode().partition("/")
                seen.setdefault((record.key, producer), []).append(int(n))
            await batch.settle()
        assert seen == {(f"k{k}", f"{p}"): list(range(k, 60, 4)) for k in range(4) for p in range(3)}

    async def test_records_are_of_any_size_up_to_the_limit(self, channel: Channel) -> None:
        sizes = [0, 1, self.RECORD - 2, 0, 1]
        await channel.put([ChannelRecord("k0", b"x" * size) for size in sizes])
        got = [record async for batch in self.settled(channel) for record in batch.records]
        assert [len(record.data) for record in got] == sizes
        assert {record.data.strip(b"x") for record in got} == {b""}

    @pytest.mark.parametrize("key", ["k", "\u00e9"])
    async def test_a_record_over_the_limit_is_refused_and_none_is_put(
        self, channel: Channel, key: str
    ) -> None:
        large = ChannelRecord(key, b"x" * (self.RECORD + 1 - len(key.encode())))
        with pytest.raises(Permanent):
            await channel.put([*records(3), large, *records(3)])
        assert await self.drain(channel) == {}

    # ----------------------------------------------------------------- backpressure

    async def test_who_settles_nothing_gets_one_batch_of_each_partition(self, channel: Channel) -> None:
        await channel.put(records(400, keys=40))

        async def taken() -> list[ChannelBatch]:
            return [batch async for batch in self.consume(channel, limit=5)]

        batches = await within(PATIENCE, taken())
        partitions = [batch.records[0].partition for batch in batches]
        assert len(set(partitions)) == len(partitions)
        for batch, where in zip(batches, partitions, strict=True):
            assert 1 <= len(batch.records) <= 5
            assert {record.partition for record in batch.records} == {where}
        assert sum(map(len, (await self.drain(channel)).values())) == 400

    async def test_a_batch_is_bounded_however_much_there_is(self, channel: Channel) -> None:
        await channel.put([ChannelRecord("k", b"%d" % n + b" " * 1_000_000) for n in range(13)])
        seen: list[int] = []
        async for batch in self.settled(channel):
            assert sum(len(record.data) for record in batch.records) <= self.BATCH
            seen += numbers(batch)
        assert seen == list(range(13))

    # ----------------------------------------------------------------- holds

    async def test_a_hold_that_is_extended_outlasts_its_time(
        self, channel: Channel, clock: ManualClock
    ) -> None:
        await channel.put(records(10, keys=1))
        one, two = self.consume(channel), self.consume(channel)
        first = await anext(one)
        for _ in range(2):
            await self.elapse(clock, 0.6 * self.HOLD)
            assert await first.extend()
        waiting = asyncio.ensure_future(anext(two))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        await first.settle(2)
        await close(one)
        assert numbers(await within(PATIENCE, waiting)) == list(range(2, 10))
        await close(two)

    async def test_a_hold_that_was_lost_cannot_be_extended(
        self, channel: Channel, clock: ManualClock
    ) -> None:
        await channel.put(records(10, keys=1))
        one, two = self.consume(channel, limit=4), self.consume(channel, limit=4)
        slow = await anext(one)
        await self.vanish(clock)
        fast = await within(PATIENCE, anext(two))
        assert not await slow.extend()
        assert await fast.extend()
        await fast.settle()
        assert not await fast.extend()
        await close(one, two)

    async def test_a_settled_batch_is_no_concern_of_the_next(self, channel: Channel) -> None:
        await channel.put(records(10, keys=1))
        iterator = self.consume(channel, limit=4)
        first = await anext(iterator)
        await first.settle(2)
        second = await anext(iterator)
        await first.settle()
        await first.settle(0)
        assert await second.extend()
        await close(iterator)
        assert await self.drain(channel) == {"k0": list(range(2, 10))}

    # ----------------------------------------------------------------- replay

    async def test_a_consumer_is_rewound_to_the_beginning(self, channel: Channel) -> None:
        await channel.put(records(30))
        everything = {name: await self.drain(channel, name) for name in ("one", "two")}
        await channel.rewind("one")
        assert await self.drain(channel, "two") == {}
        assert await self.drain(channel, "one", limit=4) == everything["one"]
        assert await self.drain(channel, "one") == {}

    async def test_single_partitions_are_rewound_to_a_position(self, channel: Channel) -> None:
        await channel.put(records(60, keys=20))
        by_partition: dict[int, list[ChannelRecord]] = {}
        async for batch in self.settled(channel, limit=7):
            by_partition.setdefault(batch.records[0].partition, []).extend(batch.records)
        where, there = max(by_partition.items(), key=lambda each: len(each[1]))
        for n in (len(there) // 2, 1, len(there)):
            await channel.rewind("c", {where: there[n - 1].position})
            again = [record async for batch in self.settled(channel) for record in batch.records]
            assert again == there[n:]

    async def test_who_held_what_is_rewound_settles_nothing(self, channel: Channel) -> None:
        await channel.put(records(10, keys=1))
        iterator = self.consume(channel, limit=4)
        await (await anext(iterator)).settle()
        held = await anext(iterator)
        assert numbers(held) == [4, 5, 6, 7]
        await channel.rewind("c")
        assert not await held.extend()
        await held.settle()
        again = await within(PATIENCE, anext(iterator))
        assert numbers(again) == [0, 1, 2, 3]
        await again.settle(2)
        await held.settle()
        await close(iterator)
        assert await self.drain(channel) == {"k0": list(range(2, 10))}

    async def test_what_is_not_rewound_is_held_on(self, channel: Channel) -> None:
        await channel.put(records(100, keys=50))
        iterator = self.consume(channel, limit=1)
        first, second = await anext(iterator), await anext(iterator)
        await channel.rewind("c", {first.records[0].partition: 0})
        assert not await first.extend()
        assert await second.extend()
        for batch in (first, second):
            await batch.settle()
        await close(iterator)
        left = {n for key in (await self.drain(channel)).values() for n in key}
        assert set(range(100)) - left == set(numbers(second))

    # ----------------------------------------------------------------- lag

    async def test_lag_is_right_after_each_step(self, channel: Channel) -> None:
        await channel.put(records(10, keys=1))
        assert not any(lag.owner or lag.position for lag in await channel.lag("c"))
        iterator = self.consume(channel, limit=4)
        batch = await anext(iterator)
        where, positions = batch.records[0].partition, [record.position for record in batch.records]
        self.check_lag((await self.lags(channel))[where], 0, 10)
        assert (await self.lags(channel))[where].owner
        await batch.settle(3)
        self.check_lag((await self.lags(channel))[where], positions[2], 7)
        second = await anext(iterator)
        assert (await self.lags(channel))[where].owner
        await second.settle()
        await close(iterator)
        lag = (await self.lags(channel))[where]
        self.check_lag(lag, second.records[-1].position, 3)
        assert not lag.owner
        assert not any(lag.owner or lag.position for lag in await channel.lag("other"))
        await channel.rewind("c", {where: positions[0]})
        self.check_lag((await self.lags(channel))[where], positions[0], 9)
        assert await self.drain(channel) == {"k0": list(range(1, 10))}
        assert (await self.lags(channel))[where].records in (0, None)

    def check_lag(self, lag: Lag, position: int, left: int) -> None:
        """`lag` says so, as far as it is known."""
        assert lag.position == position
        assert lag.records in (left, None)
        assert lag.seconds is None or lag.seconds >= 0
        assert not lag.ended

    # ----------------------------------------------------------------- life

    async def test_reopening_finds_everything(self, opener: Opener) -> None:
        if not self.persistent:
            pytest.skip("nothing is kept")
        async with opener() as backend:
            await backend.channel("changes").put(records(10, keys=1))
            iterator = self.consume(backend.channel("changes"), limit=4)
            await (await anext(iterator)).settle()
            await close(iterator)
        async with opener() as backend:
            assert await self.drain(backend.channel("changes")) == {"k0": [4, 5, 6, 7, 8, 9]}
            assert await self.drain(backend.channel("changes"), "new") == {"k0": list(range(10))}


def note(seen: dict[str, list[int]], batch: Sequence[ChannelRecord]) -> None:
    """The numbers of `batch` follow those of its keys in `seen`."""
    for record in batch:
        seen.setdefault(record.key, []).append(int(record.data))
