"""The contract of ``ports.Sink`` as tests; a sink's test file subclasses the suite.

::

    class TestMySink(SinkSuite):
        @pytest.fixture
        async def sink(self, tmp_path):
            async with open_sink(uri, environment) as sink:
                yield sink

        async def contents(self):
            return ...  # every record that a reader of the target sees

The tests play the engine's part: ``Log`` is what it would have logged, and whatever was not logged is done
once more by the next attempt.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

import msgspec
import pytest

from flowlane.errors import Fenced
from flowlane.ports import Bad, Batch, Record, Sink, Split, UnitRef, Writer
from flowlane.state import Position


class Log(msgspec.Struct):
    """What the log says of one load: the position, what ``Writer.resume`` said there, what was refused."""

    position: Position = Position()
    resume: str = ""
    refused: dict[int, Sequence[Bad]] = msgspec.field(default_factory=dict)


def split(name: str = "a") -> Split:
    """A split to pretend to read from."""
    return Split(f"file:///in/{name}.csv", f"file:///in/{name}.csv", etag='"1"', size=1000)


def cut_up(records: Sequence[Record], rows: int, first: int = 0) -> list[Batch]:
    """`records` as batches of `rows` each, ten bytes a record."""
    batches, at = [], Position()
    for number in range(0, len(records), rows):
        some = [dict(record) for record in records[number : number + rows]]
        end = at.row + len(some)
        following = Position(10 * end, end, zlib.crc32(ascii(some).encode(), at.crc))
        batches.append(Batch(some, at, following, []))
        at = following
    return batches[first:]


async def write(writer: Writer, batch: Batch, log: Log | None) -> Sequence[Bad]:
    """The batch, as the engine would write it; logged if there is a `log`."""
    mine = msgspec.structs.replace(batch, records=[dict(record) for record in batch.records])
    refused = await writer.write(mine)
    if log is not None:
        log.position, log.resume = batch.end, writer.resume
        log.refused[batch.start.row] = refused
    return refused


class SinkSuite:
    """What every sink promises. Needs the fixture ``sink``, and ``contents``."""

    #: Records that the target takes; their ``id`` is what they are told apart (and upserted) by.
    records: ClassVar[Sequence[Record]] = [{"id": n, "text": f"number {n}", "part": n % 3} for n in range(20)]
    #: One that it does not take; ``None`` where there is none.
    refused: ClassVar[Record | None] = None
    unit: ClassVar[str] = "lane/unit/a"

    async def contents(self) -> list[Record]:
        """Every record that a reader of the target sees, in any order."""
        raise NotImplementedError

    def same(self, found: Record, wanted: Record) -> bool:
        """Whether `found` is what became of `wanted`."""
        return {name: found.get(name) for name in wanted} == wanted

    async def check(self, wanted: Sequence[Record]) -> None:
        """The target holds `wanted`, each record once."""
        found = sorted(await self.contents(), key=lambda record: int(record["id"]))
        wanted = sorted(wanted, key=lambda record: int(record["id"]))
        assert [int(r["id"]) for r in found] == [int(r["id"]) for r in wanted]
        assert all(self.same(a, b) for a, b in zip(found, wanted, strict=True))

    def by(self, token: int, stream: str = "", generation: int = 0) -> UnitRef:
        """An attempt."""
        return UnitRef(stream or self.unit, token, generation)

    async def load(
        self,
        sink: Sink,
        batches: Sequence[Batch],
        unit: UnitRef,
        log: Log | None = None,
        *,
        name: str = "a",
    ) -> Log:
        """Load what the log does not say is loaded, to the end."""
        log = log or Log()
        async with sink.open(split(name), unit, log.resume) as writer:
            if writer.position is not None and writer.position.row < log.position.row:
                log.position = Position()
            for batch in batches:
                if batch.start.row >= log.position.row:
                    await write(writer, batch, log)
            await writer.finish()
        return log

    # ------------------------------------------------------------------ once

    async def test_all_records_arrive(self, sink: Sink) -> None:
        await self.load(sink, cut_up(self.records, 6), self.by(1))
        await self.check(self.records)

    async def test_two_units_write_one_target(self, sink: Sink) -> None:
        mine, theirs = self.records[:10], self.records[10:]
        await self.load(sink, cut_up(mine, 4), self.by(1, "lane/unit/b"))
        await self.load(sink, cut_up(theirs, 4), self.by(1, "lane/unit/c"))
        await self.check(self.records)

    async def test_two_splits_of_one_unit(self, sink: Sink) -> None:
        await self.load(sink, cut_up(self.records[:10], 4), self.by(1), name="a")
        await self.load(sink, cut_up(self.records[10:], 4), self.by(1), name="b")
        await self.check(self.records)

    async def test_nothing_leaves_nothing(self, sink: Sink) -> None:
        await self.load(sink, [], self.by(1))
        assert await self.contents() == []

    async def test_a_batch_of_which_nothing_is_left_moves_the_position(self, sink: Sink) -> None:
        first, second, third, *_ = cut_up(self.records, 5)
        for batch in (first, third):
            batch.records = []
        log = Log()
        async with sink.open(split(), self.by(1), "") as writer:
            for batch in (first, second, third):
                await write(writer, batch, log)
        await self.load(sink, cut_up(self.records, 5), self.by(2), log)
        await self.check([*self.records[5:10], *self.records[15:]])

    # ------------------------------------------------------------------ again

    async def test_a_batch_is_written_once_however_often(self, sink: Sink) -> None:
        async with sink.open(split(), self.by(1), "") as writer:
            for batch in cut_up(self.records, 6):
                for _ in range(3):
                    await write(writer, batch, None)
            await writer.finish()
            await writer.finish()
        await self.check(self.records)

    @pytest.mark.parametrize("unlogged", [0, 1, 2])
    @pytest.mark.parametrize("written", range(5))
    async def test_the_next_attempt_goes_on_where_the_log_says(
        self, sink: Sink, written: int, unlogged: int
    ) -> None:
        """The first one died when it had written some batches, the last of which were not logged."""
        batches, log = cut_up(self.records, 5), Log()
        async with sink.open(split(), self.by(1), "") as writer:
            for number, batch in enumerate(batches[:written]):
                await write(writer, batch, log if number < written - unlogged else None)
        await self.load(sink, batches, self.by(2), log)
        await self.check(self.records)

    async def test_an_attempt_for_every_batch(self, sink: Sink) -> None:
        batches, log = cut_up(self.records, 3), Log()
        for number, batch in enumerate(batches):
            async with sink.open(split(), self.by(number + 1), log.resume) as writer:
                await write(writer, batch, log)
        await self.load(sink, batches, self.by(100), log)
        await self.check(self.records)

    @pytest.mark.parametrize("logged", range(5))
    async def test_dead_between_the_end_and_its_log_entry(self, sink: Sink, logged: int) -> None:
        batches, log = cut_up(self.records, 5), Log()
        async with sink.open(split(), self.by(1), "") as writer:
            for number, batch in enumerate(batches):
                await write(writer, batch, log if number < logged else None)
            await writer.finish()
        await self.check(self.records)
        await self.load(sink, batches, self.by(2), log)
        await self.check(self.records)

    async def test_what_is_refused_is_refused_again(self, sink: Sink) -> None:
        if self.refused is None:
            pytest.skip("this sink refuses nothing")
        records = [*self.records[:7], self.refused, *self.records[7:]]
        batches, log = cut_up(records, 5), Log()
        async with sink.open(split(), self.by(1), "") as writer:
            first = [await write(writer, batch, None) for batch in batches]
        assert [len(refused) for refused in first] == [0, 1, 0, 0, 0]
        assert first[1][0].reason
        assert 5 <= first[1][0].row < 10
        log = await self.load(sink, batches, self.by(2), Log())
        assert list(log.refused.values()) == first
        await self.check(self.records)

    # ------------------------------------------------------------------ fences

    async def test_a_zombie_changes_nothing(self, sink: Sink) -> None:
        batches, log = cut_up(self.records, 5), Log()
        async with sink.open(split(), self.by(1), "") as zombie:
            await write(zombie, batches[0], log)
            async with sink.open(split(), self.by(2), log.resume) as writer:
                with pytest.raises(Fenced):
                    await self._all(zombie, batches[1:])
                await write(writer, batches[1], log)
                with pytest.raises(Fenced):
                    await self._all(zombie, batches[1:])
                await write(writer, batches[2], log)
                await write(writer, batches[3], log)
                await writer.finish()
            await self.check(self.records)
            await self._harmless(zombie, batches[1:])
        await self.check(self.records)

    async def test_a_zombie_that_comes_back_is_refused_or_harmless(self, sink: Sink) -> None:
        batches = cut_up(self.records, 5)
        await self.load(sink, batches, self.by(5))
        with suppress(Fenced):
            await self.load(sink, batches, self.by(4))
        await self.check(self.records)

    async def _all(self, writer: Writer, batches: Sequence[Batch]) -> None:
        for batch in batches:
            await write(writer, batch, None)
        await writer.finish()

    async def _harmless(self, writer: Writer, batches: Sequence[Batch]) -> None:
        with suppress(Exception):  # however it is refused, the contents decide
            await self._all(writer, batches)


class KeyedSuite(SinkSuite):
    """What a sink promises besides that upserts by ``id``; its fixture ``sink`` does."""

    async def test_the_last_of_a_key_stays(self, sink: Sink) -> None:
        first = [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}, {"id": 1, "text": "c"}]
        await self.load(sink, cut_up(first, 10), self.by(1))
        await self.check([{"id": 1, "text": "c"}, {"id": 2, "text": "b"}])

    async def test_an_older_generation_never_comes_back(self, sink: Sink) -> None:
        newer: list[Any] = [{"id": n, "text": "new"} for n in range(10)]
        older: list[Any] = [{"id": n, "text": "old"} for n in range(15)]
        await self.load(sink, cut_up(newer, 4), self.by(1, "lane/unit/new", 7))
        await self.load(sink, cut_up(older, 4), self.by(1, "lane/unit/old", 6))
        await self.check(newer + older[10:])
        newest = [{"id": 0, "text": "newest"}]
        await self.load(sink, cut_up(newest, 4), self.by(1, "lane/unit/newest", 8))
        await self.check([*newest, *newer[1:], *older[10:]])

    @pytest.mark.parametrize("order", [(1, 2), (2, 1)])
    async def test_a_later_generation_replaces_a_record_whole(
        self, sink: Sink, order: tuple[int, int]
    ) -> None:
        """What is left of a key does not depend on which of two units came first."""
        written: dict[int, Record] = {1: {"id": 1, "text": "a", "part": 1}, 2: {"id": 1, "text": "b"}}
        for generation in order:
            unit = self.by(1, f"lane/unit/{generation}", generation)
            await self.load(sink, cut_up([{"id": 2, "text": "", "part": 2}], 1), unit, name="others")
            await self.load(sink, cut_up([written[generation]], 1), unit)
        await self.check([{"id": 1, "text": "b", "part": None}, {"id": 2, "text": "", "part": 2}])

    async def test_a_record_without_its_key_is_refused(self, sink: Sink) -> None:
        batch = cut_up([{"id": 1, "text": "a"}, {"text": "b"}, {"id": None, "text": "c"}], 10)[0]
        async with sink.open(split(), self.by(1), "") as writer:
            refused = await write(writer, batch, None)
            await writer.finish()
        assert [bad.row for bad in refused] == [1, 2]
        await self.check([{"id": 1, "text": "a"}])
