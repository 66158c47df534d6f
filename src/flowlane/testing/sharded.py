"""A sharded stream in memory, which a test can split, merge and trim: see ``shards.Shards``."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from hashlib import md5
from typing import Final

import msgspec

from flowlane.backends.common import News
from flowlane.clock import Clock
from flowlane.errors import Permanent
from flowlane.ports import ChannelRecord
from flowlane.shards import Page, Place, Shard, position

#: What a record may have of data and key together, in bytes.
RECORD_BYTES: Final = 1 << 20
#: What a page may have of data, in bytes, unless it is a single number's.
PAGE_BYTES: Final = 10 << 20
_HASHES: Final = 1 << 128


class _Stored(msgspec.Struct, frozen=True):
    """A record, its place among all of the stream, and when (``Clock.monotonic``) it was put."""

    number: int
    sub: int
    record: ChannelRecord
    at: float

    @property
    def sequence(self) -> str:
        return f"{self.number:020d}"


class _Shard:
    """One shard: the hashes of its keys are from ``first`` to ``last``."""

    def __init__(self, shard: Shard, first: int, last: int) -> None:
        self.shard, self.first, self.last = shard, first, last
        self.records: list[_Stored] = []
        self.closed = False


class MemoryShards:
    """See ``shards.Shards``; ``count`` shards at first, over which records are put by the MD5 of their keys.

    A page has at most ``page`` numbers. At the end of a shard a reader waits for ``pace`` seconds, or until
    something is put. ``fault`` is told of each call (``"list"`` or ``"read"``) and may raise what it likes.
    Safe for the tasks of one loop.
    """

    def __init__(
        self,
        clock: Clock,
        count: int = 4,
        *,
        page: int = 100,
        pace: float = 0.05,
        fault: Callable[[str], None] = lambda call: None,
    ) -> None:
        self._clock = clock
        self.page, self.pace, self.fault = page, pace, fault
        self.news = News()
        self._number = 0
        self._made = 0
        self._shards: dict[str, _Shard] = {}
        step = _HASHES // count
        for n in range(count):
            self._add((), n * step, _HASHES - 1 if n == count - 1 else (n + 1) * step - 1)

    # ----------------------------------------------------------------- the service

    async def shards(self) -> Sequence[Shard]:
        """See ``Shards.shards``."""
        self.fault("list")
        return [each.shard for each in self._shards.values()]

    def read(self, shard: Shard, place: Place, *, limit: int | None = None) -> MemoryReader:
        """See ``Shards.read``."""
        return MemoryReader(self, shard.id, place, min(limit or self.page, self.page))

    async def put(self, records: Sequence[ChannelRecord], *, together: bool = False) -> None:
        """Store `records`; ``together``: those that go to one shard under one number.

        Raises:
            Permanent: one is larger than ``RECORD_BYTES``; none was put.
        """
        for record in records:
            size = len(record.data) + len(record.key.encode())
            if size > RECORD_BYTES:
                raise Permanent(f"a record of {size:,} bytes was refused: the limit is {RECORD_BYTES:,}")
        self.store(records, together=together)

    def store(self, records: Sequence[ChannelRecord], *, together: bool = False) -> None:
        """As ``put``, at once, of records none of which is too large."""
        at = self._clock.monotonic()
        used: dict[str, tuple[int, int]] = {}
        for record in records:
            where = self.where(record.key)
            number, sub = used.get(where, (0, 0))
            if not number or not together:
                self._number += 1
                number, sub = self._number, 0
            used[where] = (number, sub + 1)
            self._store(where, number, sub, record, at)
        self.news()

    def _store(self, where: str, number: int, sub: int, record: ChannelRecord, at: float) -> None:
        shard = self._shards[where]
        placed = ChannelRecord(record.key, record.data, shard.shard.number, position(str(number), sub))
        shard.records.append(_Stored(number, sub, placed, at))

    # ----------------------------------------------------------------- what a test does to it

    def where(self, key: str) -> str:
        """The id of the open shard that `key` belongs to."""
        digest = int.from_bytes(md5(key.encode(), usedforsecurity=False).digest())
        return next(
            id for id, one in self._shards.items() if not one.closed and one.first <= digest <= one.last
        )

    @property
    def open(self) -> list[str]:
        """The ids of the open shards, by their hashes."""
        return sorted((id for id, one in self._shards.items() if not one.closed), key=self._first)

    def split(self, shard: str) -> tuple[str, str]:
        """Close `shard`; the ids of the two that its keys belong to from now on."""
        parent = self._close(shard)
        middle = (parent.first + parent.last) // 2
        one = self._add((shard,), parent.first, middle)
        two = self._add((shard,), middle + 1, parent.last)
        self.news()
        return one, two

    def merge(self, left: str, right: str) -> str:
        """Close two neighbours; the id of the shard that their keys belong to from now on."""
        assert self._shards[left].last + 1 == self._shards[right].first, "these are no neighbours"
        one, two = self._close(left), self._close(right)
        merged = self._add((left, right), one.first, two.last)
        self.news()
        return merged

    def trim(self, shard: str, keep: int = 0) -> None:
        """Only the last `keep` records of `shard` are left; a closed one without any is listed no longer."""
        found = self._shards[shard]
        del found.records[: max(0, len(found.records) - keep)]
        if found.closed and not found.records:
            del self._shards[shard]

    def _first(self, shard: str) -> int:
        return self._shards[shard].first

    def _close(self, shard: str) -> _Shard:
        found = self._shards[shard]
        assert not found.closed, f"{shard} is closed already"
        found.closed = True
        return found

    def _add(self, parents: tuple[str, ...], first: int, last: int) -> str:
        shard = Shard(f"shard-{self._made:04d}", self._made, parents)
        self._made += 1
        self._shards[shard.id] = _Shard(shard, first, last)
        return shard.id

    # ----------------------------------------------------------------- for readers

    def page_behind(self, shard: str, place: Place, limit: int) -> tuple[Page, Place]:
        """What is behind `place` now, at most `limit` numbers of it, and the place behind that."""
        found = self._shards.get(shard)
        if found is None:
            return Page(ended=True), place
        start = 0
        if place.sequence:
            sub = float("inf") if place.whole else place.sub
            start = bisect_right(found.records, (int(place.sequence), sub), key=lambda r: (r.number, r.sub))
        end = _end_of_page(found.records, start, limit)
        records = found.records[start:end]
        rest = len(found.records) > end
        behind = self._clock.monotonic() - found.records[end].at if rest else 0.0
        page = Page(
            [one.record for one in records],
            [one.sequence for one in records],
            max(behind, 0.001) if rest else 0.0,
            found.closed and not rest,
        )
        return page, page.place(len(records) - 1) if records else place


def _end_of_page(records: Sequence[_Stored], start: int, limit: int) -> int:
    """Where the page ends that begins at `start`: all that bear one number are in it, or none."""
    numbers = size = 0
    for end in range(start, len(records)):
        size += len(records[end].record.data)
        if end == start or records[end].number != records[end - 1].number:
            numbers += 1
            if numbers > limit or (size > PAGE_BYTES and end > start):
                return end
    return len(records)


class MemoryReader:
    """See ``shards.Reader``."""

    def __init__(self, shards: MemoryShards, shard: str, place: Place, limit: int) -> None:
        self._shards, self._shard, self._place, self._limit = shards, shard, place, limit
        self._at_end = False

    async def page(self) -> Page:
        """See ``Reader.page``."""
        seen = self._shards.news.count
        await asyncio.sleep(0)
        self._shards.fault("read")
        page, place = self._look()
        if self._at_end and not page.records and not page.ended:
            await self._shards.news.wait(seen, self._shards.pace)
            page, place = self._look()
        self._at_end = not page.records
        self._place = place
        return page

    def _look(self) -> tuple[Page, Place]:
        return self._shards.page_behind(self._shard, self._place, self._limit)
