"""Which shard takes a record: the one whose range of hash keys the MD5 of the partition key lies in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from hashlib import md5, sha256
from typing import Any, Final, NamedTuple

from botocore.exceptions import ClientError

from flowlane.errors import Retryable
from flowlane.ports import ChannelRecord
from flowlane_aws.clients import asking, code_of

#: Keys whose shard is kept in mind, at most.
_KEYS: Final = 1 << 16
_KEY_UNITS: Final = 256  # UTF-16 units in a partition key, at most
#: Codes of ListShards for what passes: the stream is being made, or the shards changed between two pages.
_PASSING: Final = frozenset({"ExpiredNextTokenException", "ResourceInUseException"})


class Range(NamedTuple):
    """A shard that takes records, and the lowest hash key that is its (decimal, as ``ExplicitHashKey``)."""

    shard: str
    start: str


class Ranges:
    """The shards of a stream as they were listed: ``open`` those that took records, in the order of their
    ranges. What is put later tells of changes since."""

    def __init__(self, shards: Sequence[Mapping[str, Any]]) -> None:
        self._bounds: dict[str, tuple[bytes, bytes]] = {}
        taking: list[tuple[bytes, Range]] = []
        for shard in shards:
            of = shard["HashKeyRange"]
            start, end = (_hash(int(of[name])) for name in ("StartingHashKey", "EndingHashKey"))
            self._bounds[shard["ShardId"]] = (start, end)
            if "EndingSequenceNumber" not in shard["SequenceNumberRange"]:
                taking.append((start, Range(shard["ShardId"], of["StartingHashKey"])))
        taking.sort()
        self.open = [range_ for _, range_ in taking]
        self._boxes = _Boxes([start for start, _ in taking])

    def split(self, records: Sequence[ChannelRecord]) -> list[list[ChannelRecord]]:
        """For each shard of ``open`` those of `records` that it takes, in order, each under the partition key
        that it gets."""
        boxes = self._boxes
        try:
            for record in records:
                boxes[record.key](record)
        finally:
            found = boxes.emptied()  # whatever happens: the next ones are somebody else's
        return found

    def holds(self, shard: str, key: str) -> bool:
        """Whether records with this partition key belong into `shard`, open or not; no, if it is unknown."""
        start, end = self._bounds.get(shard, (b"\1", b""))
        return start <= _hash_of(key) <= end


class _Boxes(dict[str, Callable[[ChannelRecord], None]]):
    """A box for each shard, by the keys of what it takes. Which one that is takes 1 us to work out when a key
    is first met, and 50 ns later on."""

    def __init__(self, starts: Sequence[bytes]) -> None:
        super().__init__()
        self._starts = starts
        self._boxes: list[list[ChannelRecord]] = [[] for _ in starts]

    def __missing__(self, key: str) -> Callable[[ChannelRecord], None]:
        if partition_key(key) != key:
            return self._renamed
        if len(self) >= _KEYS:
            self.clear()
        place = max(0, bisect_right(self._starts, _hash_of(key)) - 1)
        self[key] = put = self._boxes[place].append
        return put

    def _renamed(self, record: ChannelRecord) -> None:
        key = partition_key(record.key)
        self[key](ChannelRecord(key, record.data))

    def emptied(self) -> list[list[ChannelRecord]]:
        """What was in the boxes, which stay where they are."""
        found = [box.copy() for box in self._boxes]
        for box in self._boxes:
            box.clear()
        return found


def partition_key(key: str) -> str:
    """`key` as Kinesis takes it: itself, or its SHA-256 where it is empty, too long or no text."""
    if key.isascii() and 0 < len(key) <= _KEY_UNITS:
        return key
    try:
        if 0 < len(key.encode("utf-16-le")) <= 2 * _KEY_UNITS:
            return key
    except UnicodeEncodeError:
        pass  # a lone surrogate
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


async def ranges_of(client: Any, stream: str) -> Ranges:
    """The shards of `stream` as they are now.

    Raises:
        ConfigError: there is no such stream, or its shards may not be listed.
        Retryable: Kinesis is away, or the stream is being made or changed.
    """
    what = f"listing the shards of the Kinesis stream {stream}"
    shards: list[Mapping[str, Any]] = []
    asked: dict[str, str] = {"StreamName": stream}
    try:
        while asked:
            async with asking(what, passing=_PASSING):
                answer = await client.list_shards(**asked)
            shards += answer.get("Shards", ())
            token = answer.get("NextToken")
            asked = {"NextToken": token} if token else {}
    except ClientError as error:
        raise Retryable(f"{what}: {code_of(error)}: the stream is changing, it is tried again") from error
    ranges = Ranges(shards)
    if not ranges.open:
        raise Retryable(f"{what}: none of them takes records; it is tried again")
    return ranges


def _hash(value: int) -> bytes:
    """A hash key; in bytes, they are in the order of the numbers."""
    return value.to_bytes(16)


def _hash_of(key: str) -> bytes:
    return md5(key.encode(), usedforsecurity=False).digest()
