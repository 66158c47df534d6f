"""What becomes an entry of a call: a record by itself, or many of one shard put together into one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from flowlane.ports import ChannelRecord
from flowlane.streams import kpl
from flowlane.streams.aggregate import AROUND, EACH, pack
from flowlane_aws.kinesis.lines import Lines, Parcel
from flowlane_aws.kinesis.ranges import Ranges

#: Bytes of data and keys in one call, at most, unless a single record is larger. AWS takes ten times as much;
#: encoding, hashing and signing that would hold the loop for too long, and one shard takes this per second.
CALL_BYTES: Final = 1 << 20
#: Bytes that are put together, at most: six of the units that PutRecords is billed by. More save no CPU to
#: speak of; a third of it, which is what the library has by default, takes more (``benchmarks/channel.py``).
PACK_BYTES: Final = 150 << 10
#: The same in one call of what is put together: four full ones.
_CALL_PACKED: Final = 4 * PACK_BYTES
_KEY_UNITS: Final = 256  # UTF-16 units in a partition key, at most
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
            key = record.key
            if not (key.isascii() and 0 < len(key) <= _KEY_UNITS):
                key = partition_key(key)
            add(Parcel(key, single(record, key), (record,), len(record.data) + len(key)))

    def flush(self) -> None:
        """Nothing is kept back."""

    def stored(self, parcel: Parcel, shard: str) -> None:
        """It is, in `shard`."""
        self.lines.stored(parcel)
        self.left -= 1


class _Pile(msgspec.Struct, eq=False, gc=False):
    """Records of one shard that are to be put together, and the bytes that makes, about."""

    shard: str
    start: str
    records: list[ChannelRecord]
    size: int = 0


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
        self._piles = [_Pile(shard, start, []) for shard, start in ranges.open]
        self._astray: list[tuple[Parcel, str]] = []

    def add(self, records: Sequence[ChannelRecord]) -> None:
        """They come behind what was added before. Some are kept back, until there are more of their shard."""
        piles, places = self._piles, self._ranges.places
        for record in records:
            key = record.key
            if not (key.isascii() and 0 < len(key) <= _KEY_UNITS):
                key = partition_key(key)
                record = ChannelRecord(key, record.data)  # noqa: PLW2901  # the same under another name
            pile = piles[places[key]]
            size = len(record.data) + len(key) + EACH
            if size + pile.size > PACK_BYTES:
                self._close(pile)
            pile.records.append(record)
            pile.size += size

    def flush(self) -> None:
        """Nothing is kept back any longer."""
        for pile in self._piles:
            self._close(pile)

    def _close(self, pile: _Pile) -> None:
        if pile.records:
            self.lines.add(Parcel(pile.shard, self._entry(pile), pile.records, pile.size))
            pile.records, pile.size = [], 0

    def _entry(self, pile: _Pile) -> Entry:
        if len(pile.records) == 1 and pile.size + AROUND + len(_PACKED) > self._largest:
            return single(pile.records[0], pile.records[0].key)
        packed = pack([record.key for record in pile.records], [record.data for record in pile.records])
        return {"Data": packed, "PartitionKey": _PACKED, "ExplicitHashKey": pile.start}

    def stored(self, parcel: Parcel, shard: str) -> None:
        """It is, in `shard`."""
        if shard == parcel.line:
            self.lines.stored(parcel)
            self.left -= len(parcel.records)
        else:
            self.stale = True
            self._astray.append((parcel, shard))

    def replan(self, ranges: Ranges) -> None:
        """What is not stored, or not where it belongs, is set out anew for the shards of `ranges`; nothing is
        under way."""
        again: dict[str, Sequence[ChannelRecord]] = {}
        for parcel, shard in self._astray:
            if all(ranges.holds(shard, record.key) for record in parcel.records):
                self.left -= len(parcel.records)
            else:
                again[parcel.line] = parcel.records
        waiting, piles = self.lines.drain(), self._piles
        self._set_out(ranges)
        for pile in piles:
            self.add(again.get(pile.shard, ()))
            for parcel in waiting.get(pile.shard, ()):
                self.add(parcel.records)
            self.add(pile.records)


def single(record: ChannelRecord, key: str) -> Entry:
    """`record` under the partition key `key`, as PutRecords takes it. What is an aggregate by itself is
    wrapped into one more: readers are to find it as it is, and not what is in it."""
    data = record.data
    if data.startswith(kpl.MAGIC) and kpl.unpack(data) is not None:
        data = pack([key], [data])
    return {"Data": data, "PartitionKey": key}


def partition_key(key: str) -> str:
    """`key` as Kinesis takes it: itself, or its SHA-256 where it is empty, too long or no text."""
    try:
        if 0 < len(key.encode("utf-16-le")) <= 2 * _KEY_UNITS:
            return key
    except UnicodeEncodeError:
        pass  # a lone surrogate
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
