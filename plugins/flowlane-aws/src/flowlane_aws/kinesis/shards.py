"""A Kinesis stream as a sharded stream: its shards, with their parents, and where each is read from."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import Any, Final
from weakref import WeakSet

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import Permanent, Retryable
from flowlane.shards import Place, Reader, Shard
from flowlane_aws.clients import asking, code_of
from flowlane_aws.kinesis.pages import ALL, Answer, Hashes, Span
from flowlane_aws.kinesis.reader import ShardReader, start

logger = logging.getLogger("flowlane")

#: The operations that are worth the short way (see ``brisk``), and what their answers are made.
HOT: Final = {"GetRecords": Answer}

#: Reads of a stream's shards that are under way at once; a shard is read once a second while it is idle.
_AT_ONCE: Final = 16
_ID: Final = re.compile(r"shardId-([0-9]{12,})")
#: Codes of ListShards for what passes: the stream is being made, or the shards changed between two pages.
_PASSING: Final = frozenset({"ExpiredNextTokenException", "ResourceInUseException"})
_WRONG: Final = "InvalidArgumentException"


class KinesisShards:
    """See ``shards.Shards``: the stream called `name`, which must be there when it is asked for something."""

    def __init__(self, name: str, client: Any, clock: Clock) -> None:
        self.name, self.client, self.clock = name, client, clock
        #: Bytes of data in a record, as of the last page of any shard; of large ones, while nothing is known.
        self.usual = 200 << 10
        #: Those that read on, until they are dropped: the more there are, the smaller are their pages.
        self.readers: WeakSet[ShardReader] = WeakSet()
        #: Reads under way. Hundreds that begin or end in one turn of the loop would hold it for too long.
        self.turns = asyncio.Semaphore(_AT_ONCE)
        self._spans: dict[str, Span] = {}
        self._hashes = Hashes()

    async def shards(self) -> Sequence[Shard]:
        """See ``Shards.shards``."""
        listed = await self._listed()
        self._spans = {one["ShardId"]: self._span(one) for one in listed}
        return [_shard(one) for one in listed]

    def read(self, shard: Shard, place: Place, *, limit: int | None = None) -> Reader:
        """See ``Shards.read``."""
        reader = ShardReader(self, shard, place, limit)
        if limit is None:
            self.readers.add(reader)
        return reader

    async def span(self, shard: Shard) -> Span:
        """The hash keys of `shard`; of one that is listed no longer, all: nothing of it is left out."""
        if shard.id not in self._spans:
            await self.shards()
        return self._spans.get(shard.id) or Span(0, ALL)

    async def iterator(self, shard: Shard, place: Place) -> str:
        """Where what is behind `place` begins; at the oldest record if `place` is none of this stream: it was
        deleted and made anew since. To be asked within ``asking``."""
        digits = (await self.span(shard)).digits
        asked = {"StreamName": self.name, "ShardId": shard.id}
        try:
            told = await self.client.get_shard_iterator(**asked, **start(place, digits))
        except ClientError as error:
            if code_of(error) != _WRONG or not place.sequence:
                raise
            logger.warning(
                "%s of the Kinesis stream %s has no record %s, it is read from its oldest one on: is the "
                "stream another one than it was?",
                shard.id,
                self.name,
                place.sequence,
            )
            told = await self.client.get_shard_iterator(**asked, **start(Place(), digits))
        if not (found := told.get("ShardIterator")):
            raise Retryable(f"asking where {shard.id} of the Kinesis stream {self.name} begins: no answer")
        return str(found)

    def _span(self, listed: dict[str, Any]) -> Span:
        keys = listed["HashKeyRange"]
        digits = len(listed["SequenceNumberRange"]["StartingSequenceNumber"])
        return Span(int(keys["StartingHashKey"]), int(keys["EndingHashKey"]), digits, self._hashes)

    async def _listed(self) -> list[dict[str, Any]]:
        what = f"listing the shards of the Kinesis stream {self.name}"
        found: list[dict[str, Any]] = []
        asked = {"StreamName": self.name}
        try:
            while asked:
                async with asking(what, passing=_PASSING):
                    told = await self.client.list_shards(**asked)
                found += told.get("Shards", ())
                asked = {"NextToken": told["NextToken"]} if told.get("NextToken") else {}
        except ClientError as error:
            raise Retryable(f"{what}: {code_of(error)}: the stream is changing, it is tried again") from error
        if not found:  # shards that are listed no longer would be given up, and taken for read to their ends
            raise Retryable(f"{what}: none is named, and a stream has one at least: it is asked again")
        return found


def _shard(listed: dict[str, Any]) -> Shard:
    """
    Raises:
        Permanent: the shard has another kind of name than Kinesis gives.
    """
    known = _ID.fullmatch(listed["ShardId"])
    if known is None:
        raise Permanent(f"shard {listed['ShardId']!r:.60} of a Kinesis stream has no number in its name")
    parents = (listed.get("ParentShardId"), listed.get("AdjacentParentShardId"))
    return Shard(listed["ShardId"], int(known[1]), tuple(parent for parent in parents if parent))
