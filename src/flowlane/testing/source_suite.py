"""The contract of ``ports.Source`` as tests; a source's test file subclasses the suite.

::

    class TestMySource(SourceSuite):
        @pytest.fixture
        async def source(self, tmp_path):
            ...  # with at least one split of 20 records or more
            async with open_source(uri, environment) as source:
                yield source
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, ClassVar

import pytest

from flowlane.errors import Superseded
from flowlane.ports import Batch, Cut, Source, Split
from flowlane.state import Position


async def splits_of(source: Source) -> list[Split]:
    """All splits."""
    async with aclosing(source.splits()) as splits:
        return [split async for split in splits]


async def read(source: Source, split: Split, cut: Cut, start: Position | None = None) -> list[Batch]:
    """All batches from `start` on."""
    async with aclosing(source.read(split, start or Position(), cut)) as batches:
        return [batch async for batch in batches]


def plain(batches: Sequence[Batch]) -> list[Any]:
    """What must be the same every time; how much was read for a batch may differ."""
    return [(b.start, b.end, b.records, b.bad) for b in batches]


class SourceSuite:
    """What every source promises. Needs the fixture ``source``."""

    #: Policies that the splits are cut by; a row of the source should have between 5 and 1,000 bytes.
    cuts: ClassVar[Sequence[Cut]] = (Cut(), Cut(7, 1 << 20), Cut(1, 1 << 20), Cut(1000, 50), Cut(3, 100))

    async def test_there_is_enough_to_test_with(self, source: Source) -> None:
        counts = [sum(len(b.records) for b in await read(source, s, Cut())) for s in await splits_of(source)]
        assert max(counts) >= 20

    async def test_splits_come_in_the_same_order(self, source: Source) -> None:
        first = await splits_of(source)
        assert await splits_of(source) == first
        assert len({split.id for split in first}) == len(first)

    async def test_a_split_is_read_in_the_same_order(self, source: Source) -> None:
        for split in await splits_of(source):
            for cut in self.cuts:
                assert plain(await read(source, split, cut)) == plain(await read(source, split, cut))

    async def test_no_cut_changes_what_is_read(self, source: Source) -> None:
        for split in await splits_of(source):
            read_by = [await read(source, split, cut) for cut in self.cuts]
            first, *others = ([r for b in batches for r in b.records] for batches in read_by)
            assert all(other == first for other in others)
            bad = [[x for b in batches for x in b.bad] for batches in read_by]
            assert all(other == bad[0] for other in bad)

    async def test_batches_follow_one_another(self, source: Source) -> None:
        for split in await splits_of(source):
            for cut in self.cuts:
                at = Position()
                for batch in await read(source, split, cut):
                    assert batch.start == at
                    at = batch.end
                    assert at.row - batch.start.row == len(batch.records) + len(batch.bad) > 0
                    assert at.offset > batch.start.offset
                    assert all(batch.start.row <= bad.row < at.row for bad in batch.bad)

    async def test_batches_are_cut_by_the_policy(self, source: Source) -> None:
        for split in await splits_of(source):
            for cut in self.cuts:
                batches = await read(source, split, cut)
                for batch in batches[:-1]:
                    rows, span = batch.end.row - batch.start.row, batch.end.offset - batch.start.offset
                    assert rows == cut.rows or (rows < cut.rows and span >= cut.size)
                assert all(batch.end.row - batch.start.row <= cut.rows for batch in batches[-1:])

    async def test_a_read_goes_on_from_any_batch(self, source: Source) -> None:
        for split in await splits_of(source):
            for cut in self.cuts if split.replayable else ():
                whole = await read(source, split, cut)
                for number, batch in enumerate(whole[:30], 1):
                    assert plain(await read(source, split, cut, batch.end)) == plain(whole[number:])

    async def test_another_past_is_told(self, source: Source) -> None:
        for split in await splits_of(source):
            if split.replayable:
                first = (await read(source, split, self.cuts[1]))[0]
                wrong = Position(first.end.offset, first.end.row, first.end.crc ^ 1)
                with pytest.raises(Superseded):
                    await read(source, split, self.cuts[1], wrong)
                with pytest.raises(Superseded):
                    await read(source, split, self.cuts[1], Position(1 << 50, 1 << 30, 1))

    async def test_a_proof_goes_forward_and_changes_nothing_that_is_read(self, source: Source) -> None:
        for split in await splits_of(source):
            whole = await read(source, split, Cut(3))
            for batch in [None, *whole[:5]]:
                at = batch.end if batch and split.replayable else Position()
                async with aclosing(source.prove(split, at)) as proving:
                    passed = [count async for count in proving]
                assert passed == sorted(set(passed))
                rest = [later for later in whole if later.start.row >= at.row]
                assert plain(await read(source, split, Cut(3), at)) == plain(rest)

    async def test_a_proof_may_be_left_at_any_time(self, source: Source) -> None:
        for split in await splits_of(source):
            whole = plain(await read(source, split, Cut(3)))
            async with aclosing(source.prove(split, Position())) as proving:
                await anext(proving, None)
            assert plain(await read(source, split, Cut(3))) == whole

    async def test_a_read_may_be_left_at_any_time(self, source: Source) -> None:
        split = (await splits_of(source))[0]
        whole = plain(await read(source, split, Cut(1)))
        for _ in range(3):
            async with aclosing(source.read(split, Position(), Cut(1))) as batches:
                async for batch in batches:
                    assert plain([batch]) == whole[:1]
                    break
        assert plain(await read(source, split, Cut(1))) == whole

    async def test_reads_do_not_disturb_one_another(self, source: Source) -> None:
        split = (await splits_of(source))[0]
        whole = plain(await read(source, split, Cut(3)))
        together = await asyncio.gather(*(read(source, split, Cut(3)) for _ in range(4)))
        assert all(plain(batches) == whole for batches in together)

    async def test_a_cancelled_read_is_over(self, source: Source) -> None:
        split = (await splits_of(source))[0]
        whole = plain(await read(source, split, Cut(1)))
        for turns in range(1, 12):
            task = asyncio.create_task(read(source, split, Cut(1)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            try:
                assert plain(await task) == whole
            except asyncio.CancelledError:
                assert task.cancelled()
        assert plain(await read(source, split, Cut(1))) == whole
