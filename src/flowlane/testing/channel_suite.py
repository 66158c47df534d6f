"""The contract of ``ports.Channel`` as tests; subclass as ``backend_suite`` says, with the same fixtures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

import pytest

from flowlane.ports import Backend, Channel, ChannelBatch, ChannelRecord
from flowlane.testing.backend_model import Opener
from flowlane.testing.backend_suite import Suite
from flowlane.testing.manual import ManualClock
from flowlane.testing.units import within


def records(count: int, keys: int = 5, start: int = 0) -> list[ChannelRecord]:
    """Records of `keys` keys in turn, numbered from `start`."""
    return [ChannelRecord(f"k{n % keys}", b"%d" % n) for n in range(start, start + count)]


class ChannelSuite(Suite):
    """Order by key, positions by consumer, batches held by one at a time."""

    #: Seconds after which a partition whose consumer vanished is another's.
    HOLD: ClassVar[float] = 30.0
    #: Seconds without a record after which a channel counts as read to its end.
    QUIET: ClassVar[float] = 0.0

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

    async def test_order_is_kept_per_key(self, channel: Channel) -> None:
        for start in range(0, 300, 30):
            await channel.put(records(30, start=start))
        seen = await self.drain(channel, limit=7)
        assert seen == {f"k{k}": list(range(k, 300, 5)) for k in range(5)}
        assert await self.drain(channel) == {}

    async def test_records_come_as_they_were_put(self, channel: Channel) -> None:
        data = [bytes(range(256)), b"", b"\x00", b"x" * 100_000]
        await channel.put([ChannelRecord('kéy "1"\n', each) for each in data])
        got: list[ChannelRecord] = []
        async for batch in self.consume(channel):
            got += batch.records
            await batch.settle()
        assert [record.data for record in got] == data
        assert {record.key for record in got} == {'kéy "1"\n'}
        assert len({record.partition for record in got}) == 1
        positions = [record.position for record in got]
        assert positions == sorted(set(positions))

    async def test_an_empty_channel_ends(self, backend: Backend, channel: Channel) -> None:
        await channel.put([])
        assert await within(30, self.drain(channel)) == {}
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
            seen.append([int(record.data) for record in batch.records])
            await batch.settle(1 if len(seen) == 1 else 0 if len(seen) == 2 else None)
        assert seen == [[0, 1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [9]]

    async def test_who_stops_gives_up_what_it_has_not_settled(self, channel: Channel) -> None:
        await channel.put(records(10))
        everything = {f"k{k}": [k, k + 5] for k in range(5)}
        for _ in range(2):
            iterator = self.consume(channel)
            await anext(iterator)
            await anext(iterator, None)
            await iterator.aclose()  # type: ignore[attr-defined]
        assert await self.drain(channel) == everything

    async def test_who_asks_on_without_settling_comes_to_an_end(self, channel: Channel) -> None:
        await channel.put(records(10, keys=1))

        async def count() -> int:
            return len([batch async for batch in self.consume(channel, limit=3)])

        assert await within(30, count()) == 1
        assert await self.drain(channel) == {"k0": list(range(10))}

    async def test_a_position_never_goes_back(self, channel: Channel, clock: ManualClock) -> None:
        await channel.put(records(10, keys=1))
        stale = self.consume(channel, limit=3)
        slow = await anext(stale)
        await self.elapse(clock, self.HOLD + 1)
        fast = self.consume(channel, limit=5)
        await (await anext(fast)).settle()
        await slow.settle()
        await slow.settle(1)
        assert [int(record.data) for record in (await anext(fast)).records] == [5, 6, 7, 8, 9]
        for iterator in (stale, fast):
            await iterator.aclose()  # type: ignore[attr-defined]

    async def test_a_stale_batch_frees_nobody_elses_hold(self, channel: Channel, clock: ManualClock) -> None:
        await channel.put(records(10, keys=1))
        iterators = [self.consume(channel, limit=4) for _ in range(3)]
        slow = await anext(iterators[0])
        await self.elapse(clock, self.HOLD + 1)
        fast = await anext(iterators[1])
        await slow.settle(0)
        waiting = asyncio.ensure_future(anext(iterators[2]))
        for _ in range(5):
            await asyncio.sleep(0)
        await fast.settle()
        third = await within(30, waiting)
        assert [int(record.data) for record in third.records] == [4, 5, 6, 7]
        for iterator in iterators:
            await iterator.aclose()  # type: ignore[attr-defined]

    async def test_a_partition_is_handed_to_one_at_a_time(self, channel: Channel, clock: ManualClock) -> None:
        await channel.put(records(10, keys=1))
        one, two = self.consume(channel, limit=4), self.consume(channel, limit=4)
        first = await anext(one)
        waiting = asyncio.ensure_future(anext(two))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        await first.settle()
        second = await within(30, waiting)
        assert [int(record.data) for record in second.records] == [4, 5, 6, 7]
        await one.aclose()  # type: ignore[attr-defined]
        await two.aclose()  # type: ignore[attr-defined]

    async def test_who_vanishes_loses_its_hold(self, channel: Channel, clock: ManualClock) -> None:
        await channel.put(records(10, keys=1))
        vanished = self.consume(channel)
        await anext(vanished)
        await self.elapse(clock, self.HOLD + 1)
        assert await within(30, self.drain(channel)) == {"k0": list(range(10))}
        await vanished.aclose()  # type: ignore[attr-defined]

    async def test_several_under_one_name_share_the_work(self, channel: Channel) -> None:
        seen: dict[str, list[int]] = {}

        async def work() -> None:
            async for batch in channel.consume("c", limit=3, wait=max(0.2, self.QUIET)):
                note(seen, batch.records)
                await asyncio.sleep(0)
                await batch.settle()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(work())
            for start in range(0, 200, 20):
                await channel.put(records(20, keys=20, start=start))
        assert seen == {f"k{k}": list(range(k, 200, 20)) for k in range(20)}

    async def test_waiting_ends_when_something_comes(self, channel: Channel) -> None:
        iterator = channel.consume("c", wait=60)
        waiting = asyncio.ensure_future(anext(iterator))
        await asyncio.sleep(0)
        await channel.put(records(1))
        assert (await within(30, waiting)).records[0].data == b"0"
        await iterator.aclose()  # type: ignore[attr-defined]

    async def test_a_cancelled_consumer_holds_nothing(self, channel: Channel) -> None:
        for n in range(10):
            task = asyncio.create_task(self.drain(channel, f"c{n}", 1))
            await channel.put(records(5, start=5 * n))
            for _ in range(n):
                await asyncio.sleep(0)
            task.cancel()
            (got,) = await asyncio.gather(task, return_exceptions=True)
            rest = await within(30, self.drain(channel, f"c{n}"))
            if isinstance(got, asyncio.CancelledError):
                assert all(numbers[-1] == 5 * n + int(key[1:]) for key, numbers in rest.items())
            assert await self.drain(channel, f"c{n}") == {}

    async def test_reopening_finds_everything(self, opener: Opener) -> None:
        if not self.persistent:
            pytest.skip("nothing is kept")
        async with opener() as backend:
            await backend.channel("changes").put(records(10, keys=1))
            async for batch in self.consume(backend.channel("changes"), limit=4):
                await batch.settle()
                break
        async with opener() as backend:
            assert await self.drain(backend.channel("changes")) == {"k0": [4, 5, 6, 7, 8, 9]}
            assert await self.drain(backend.channel("changes"), "new") == {"k0": list(range(10))}


def note(seen: dict[str, list[int]], batch: Sequence[ChannelRecord]) -> None:
    """The numbers of `batch` follow those of its keys in `seen`."""
    for record in batch:
        seen.setdefault(record.key, []).append(int(record.data))
