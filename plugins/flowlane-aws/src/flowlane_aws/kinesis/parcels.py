"""What becomes an entry of a call: a record by itself, or many of one shard put together into one."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, Final, NamedTuple

import msgspec

from flowlane.ports import ChannelRecord
from flowlane.streams import kpl
from flowlane.streams.aggregate import EACH, pack
from flowlane_aws.kinesis.lines import Lines, Parcel
from flowlane_aws.kinesis.ranges import Ranges, partition_key

#: Bytes of data and keys in one call, at most, unless a single record is larger. AWS takes ten times as much;
#: encoding, hashing and signing that would hold the loop for too long, and one shard takes this per second.
CALL_BYTES: Final = 1 << 20
#: Bytes that are put together, at most: six of the units that PutRecords is billed by. More save no CPU to
#: speak of; a third of it, which is what the library has by default, takes more (``benchmarks/channel.py``).
PACK_BYTES: Final = 150 << 10
#: The same in one call of what is put together: four full ones. As much is put together between two turns of
#: the loop, which takes some 2 ms.
_CALL_PACKED: Final = 4 * PACK_BYTES
#: The partition key of aggregates, as of the Kinesis Producer Library's: it says nothing, the hash key does.
_PACKED: Final = "a"

Entry = dict[str, Any]


class Singles:
    """Records as they are, those of one key in one line: `total` of them; ``left`` are not stored yet."""

    stale = False

    def __init__(self, total: int) -> None:
        self.total = self.left = total
        self.lines = Lines(CALL_BYTES)

    def add(self, records: Sequence[ChannelRecord]) -> None:
        """They come behind what was added before."""
        add = self.lines.add
        for record in records:
            key = partition_key(record.key)
            add(Parcel(key, single(record, key), (record,), len(record.data) + len(key)))

    def prepare(self) -> bool:
        """They are ready as they are."""
        return False

    def flush(self) -> bool:
        """Nothing is kept back."""
        return False

    def stored(self, parcel: Parcel, shard: str) -> None:
        """It is, in `shard`."""
        self.lines.stored(parcel)
        self.left -= 1


class _Pile(msgspec.Struct, eq=False, gc=False):
    """Records of a shard that are kept back until there are more of them. ``ends``: where each one's bytes
    end, about, counted from the first that ever came; ``base``: where those of the first begin."""

    shard: str
    start: str
    records: list[ChannelRecord]
    ends: list[int]
    base: int = 0

    def add(self, some: Sequence[ChannelRecord]) -> None:
        """They come on top; there are some."""
        sizes = [len(record.key) + len(record.data) + EACH for record in some]
        sizes[0] += self.ends[-1] if self.ends else self.base
        self.ends += accumulate(sizes)
        self.records += some

    def full(self) -> Iterator[_Load]:
        """What is kept back no longer, as there is more: each load as large as may be."""
        at = 0
        while at + 1 < len(self.ends) and self.ends[-1] > (most := self.base + PACK_BYTES):
            end = max(at + 1, bisect_right(self.ends, most, at))
            yield self._load(at, end)
            at, self.base = end, self.ends[end - 1]
        del self.records[:at], self.ends[:at]

    def rest(self) -> Iterator[_Load]:
        """What is left."""
        if self.records:
            yield self._load(0, len(self.records))
            self.base = self.ends[-1]
            self.records, self.ends = [], []

    def _load(self, at: int, end: int) -> _Load:
        return _Load(self.shard, self.start, self.records[at:end], self.ends[end - 1] - self.base)


class _Load(NamedTuple):
    """Records of a shard that are to be put together, which makes about `size` bytes."""

    shard: str
    start: str
    records: Sequence[ChannelRecord]
    size: int


class Packs:
    """Records put together, those of one shard in one line, and so those of one key: `total` of them, of
    which ``left`` are not known to be stored where they belong.

    Each aggregate says by its hash key which shard it is for. It may be gone by then, split or merged: then
    the answer names another one. If it holds a record that does not belong into that shard, all of it is put
    again, once nothing is under way and the shards are known anew: readers leave such a record out, and the
    Kinesis Client Library leaves out the others that came with it, too (``AggregatorUtil.deaggregate``).

    A record is wrapped though it is alone: Lambda handles what has different partition keys in parallel, so
    all of a shard are to bear the same. Only what would be too large for `largest` bytes then goes bare.
    """

    def __init__(self, total: int, ranges: Ranges, largest: int) -> None:
        self.total = self.left = total
        self.plans = 0  #: how often they were set out
        self._largest = largest
        self._set_out(ranges)

    def _set_out(self, ranges: Ranges) -> None:
        self.plans += 1
        self.lines = Lines(_CALL_PACKED)
        self.stale = False  #: whether the stream has other shards by now; then nothing more is to be taken
        self._ranges = ranges
        self._piles = [_Pile(shard, start, [], []) for shard, start in ranges.open]
        self._loads: deque[_Load] = deque()
        self._astray: list[tuple[Parcel, str]] = []

    def add(self, records: Sequence[ChannelRecord]) -> None:
        """They come behind what was added before. Some are kept back, until there are more of their shard."""
        for pile, some in zip(self._piles, self._ranges.split(records), strict=True):
            if some:
                pile.add(some)
                self._loads += pile.full()

    def flush(self) -> bool:
        """Nothing is kept back any longer; whether something was."""
        for pile in self._piles:
            self._loads += pile.rest()
        return bool(self._loads)

    def prepare(self) -> bool:
        """Some of what is not kept back is put together, a call's worth; whether there was any."""
        size = 0
        while self._loads and size < _CALL_PACKED:
            load = self._loads.popleft()
            size += load.size
            self.lines.add(Parcel(load.shard, self._entry(load), load.records, load.size))
        return size > 0

    def _entry(self, load: _Load) -> Entry:
        packed = pack([record.key for record in load.records], [record.data for record in load.records])
        if len(load.records) == 1 and len(packed) + len(_PACKED) > self._largest:
            return single(load.records[0], load.records[0].key)
        return {"Data": packed, "PartitionKey": _PACKED, "ExplicitHashKey": load.start}

    def stored(self, parcel: Parcel, shard: str) -> None:
        """It is, in `shard`."""
        if shard == parcel.line:
            self.lines.stored(parcel)
            self.left -= len(parcel.records)
        else:
            self.stale = True
            self._astray.append((parcel, shard))

    def replan(self, ranges: Ranges) -> list[ChannelRecord]:
        """What is not stored, or not where it belongs: to be added again, before anything else is, for the
        shards of `ranges`. Nothing is under way."""
        again: list[Sequence[ChannelRecord]] = []
        for parcel, shard in self._astray:
            if all(ranges.holds(shard, record.key) for record in parcel.records):
                self.left -= len(parcel.records)
            else:
                again.append(parcel.records)
        again += [parcel.records for parcel in chain.from_iterable(self.lines.drain().values())]
        again += [load.records for load in self._loads]
        again += [pile.records for pile in self._piles]
        self._set_out(ranges)
        return [*chain.from_iterable(again)]


def single(record: ChannelRecord, key: str) -> Entry:
    """`record` under the partition key `key`, as PutRecords takes it. What is an aggregate by itself is
    wrapped into one more: readers are to find it as it is, and not what is in it."""
    data = record.data
    if data.startswith(kpl.MAGIC) and kpl.unpack(data) is not None:
        data = pack([key], [data])
    return {"Data": data, "PartitionKey": key}
