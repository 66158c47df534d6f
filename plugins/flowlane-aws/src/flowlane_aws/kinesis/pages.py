"""What GetRecords answers, and the records in it: aggregates are unpacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import md5
from typing import Any, Final

import msgspec

from flowlane.clock import Clock
from flowlane.ports import ChannelRecord
from flowlane.shards import SUBS, position
from flowlane.streams import kpl

#: Records after which the loop is given way to, and the bytes that cost as much as one of them.
SLICE: Final = 2_000
_BYTES: Final = 512
#: Bytes of an aggregate that is unpacked on the loop, at most: its digest alone takes 2 ms for each MiB.
_LARGE: Final = 1 << 20
#: Keys whose hash is kept in mind, at most.
_KEYS: Final = 1 << 16
#: The last hash key that there is, and the digits that one can have.
ALL: Final = (1 << 128) - 1
_DIGITS: Final = len(str(ALL))


class Got(msgspec.Struct, rename="pascal", gc=False):
    """A record as GetRecords gives it; what is not asked for here is not parsed."""

    sequence_number: str
    partition_key: str
    data: bytes


class Answer(msgspec.Struct, rename="pascal", gc=False):
    """The answer of GetRecords. Without ``next_shard_iterator`` the shard is closed and read to its end."""

    records: list[Got]
    next_shard_iterator: str | None = None
    millis_behind_latest: int | None = None


def answer(told: Any) -> Answer:
    """`told` by the brisk client, or by the SDK's own."""
    return told if isinstance(told, Answer) else msgspec.convert(told, Answer, builtin_types=(bytes,))


class Hashes(dict[str, int]):
    """Of partition keys, the hash keys (MD5), worked out when first asked for; for all shards of a stream."""

    def __missing__(self, key: str) -> int:
        if len(self) >= _KEYS:
            self.clear()
        digest = md5(key.encode(), usedforsecurity=False).digest()
        self[key] = found = int.from_bytes(digest)
        return found


class Span:
    """The hash keys of one shard, ``first`` and ``last`` included, and the digits in its sequence numbers."""

    def __init__(self, first: int, last: int, digits: int = 0, hashes: Hashes | None = None) -> None:
        self._first, self._last = first, last
        self.whole = first <= 0 and last >= ALL
        self.digits = digits
        self._hashes = Hashes() if hashes is None else hashes

    def has(self, record: kpl.UserRecord) -> bool:
        """Whether `record` belongs here: by its explicit hash key, or by its partition key's MD5."""
        if explicit := record.hash_key:
            fits = len(explicit) <= _DIGITS and explicit.isdecimal()
            return fits and self._first <= int(explicit) <= self._last
        return self._first <= self._hashes[record.key] <= self._last


class Unpacking:
    """Makes the records of one shard of what GetRecords gave, in slices: nothing holds the loop for long.

    Records of an aggregate whose keys are another shard's are left out, and counted in ``strangers``: they
    got here while shards were split, and their producer, who was told of the wrong shard, puts them again (so
    the Kinesis Producer Library; the Client Library leaves them out, too). To hand them out would break the
    order of their keys.
    """

    def __init__(self, number: int, span: Span, clock: Clock) -> None:
        self._number, self._span, self._clock = number, span, clock
        self.records: list[ChannelRecord] = []
        self.sequences: list[str] = []
        self.strangers = 0
        self._work = 0  # since the loop was given way to, in records

    async def add(self, got: Sequence[Got]) -> None:
        """The records of `got` stand behind those that are there."""
        for one in got:
            aggregated = one.data.startswith(kpl.MAGIC) and await self._several(one)
            if not aggregated:
                place = position(one.sequence_number)
                self.records.append(ChannelRecord(one.partition_key, one.data, self._number, place))
                self.sequences.append(one.sequence_number)
            self._work += 1 + len(one.data) // _BYTES
            if self._work >= SLICE:
                await self._give_way()

    async def _several(self, one: Got) -> bool:
        """The records in `one` are there, if it is an aggregate; otherwise nothing is."""
        records, sequences, strangers = len(self.records), len(self.sequences), self.strangers
        first = at = position(one.sequence_number)
        try:
            for piece in _pieces(one.data):
                self._take(piece, at, one.sequence_number)
                at += len(piece)
                self._work += len(piece)
                if self._work >= SLICE:
                    await self._give_way()
        except kpl.Unusual:
            del self.records[records:], self.sequences[sequences:]
            self.strangers = strangers
            return await self._odd(one, first)
        return True

    async def _odd(self, one: Got, first: int) -> bool:
        """The same of one that is large, or not as producers write it."""
        several = await self._clock.offload(partial(kpl.unpack, one.data))
        if several is None or len(several) > SUBS:  # more than can be told apart: one record, as it is
            return False
        for start in range(0, len(several), SLICE):
            self._take(several[start : start + SLICE], first + start, one.sequence_number)
            await self._give_way()
        return True

    def _take(self, several: Sequence[kpl.UserRecord], first: int, sequence: str) -> None:
        """`several` of one aggregate are there, the first of them at position `first`."""
        number = self._number
        if self._span.whole:
            found = [ChannelRecord(one.key, one.data, number, at) for at, one in enumerate(several, first)]
        else:
            has = self._span.has
            found = [
                ChannelRecord(one.key, one.data, number, at)
                for at, one in enumerate(several, first)
                if has(one)
            ]
        self.strangers += len(several) - len(found)
        self.records += found
        self.sequences += [sequence] * len(found)

    async def _give_way(self) -> None:
        self._work = 0
        await self._clock.sleep(0)


def _pieces(data: bytes) -> Iterator[Sequence[kpl.UserRecord]]:
    """See ``kpl.pieces``. What is too large for the loop is for ``_odd``; the others hold fewer records than
    ``SUBS``, since each takes six bytes at least."""
    if len(data) > _LARGE:
        raise kpl.Unusual
    return kpl.pieces(data)
