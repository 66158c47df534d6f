"""Reads one shard, page by page: iterators are renewed, and the service's limits are kept."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from botocore.exceptions import ClientError

from flowlane.errors import Retryable
from flowlane.ports import ChannelRecord
from flowlane.shards import SUBS, Page, Place, Shard
from flowlane_aws.clients import asking, code_of
from flowlane_aws.kinesis.pages import Answer, Span, Unpacking, answer

if TYPE_CHECKING:
    from flowlane_aws.kinesis.shards import KinesisShards

logger = logging.getLogger("flowlane")

#: Seconds between two reads of a shard whose tip is reached, at least: five calls a second are all that it
#: stands, for all of its readers together (API reference, "Limits"). While nothing comes, they grow to
#: ``_SLOWEST``, which is what AWS recommends.
_PAUSE: Final = 0.2
_SLOWEST: Final = 1.0
#: Bytes of data in a page, more or less. GetRecords gives up to 10 MiB, which take 12 ms to parse on the loop
#: and then cost the shard five seconds (2 MiB a second); it can be told how many records, not how many bytes.
PAGE_BYTES: Final = 2 << 20
#: The same of all pages of a stream that a process has in memory: two of each shard that it reads.
PAGES_BYTES: Final = 64 << 20
_MOST: Final = 10_000  # records in a page (API reference)
#: Tries for one page, at most. After each that is throttled, a second goes by, more or less.
_TRIES: Final = 10
_THROTTLES: Final = frozenset(
    {"KMSThrottlingException", "LimitExceededException", "ProvisionedThroughputExceededException"}
)
_EXPIRED: Final = "ExpiredIteratorException"
_GONE: Final = "ResourceNotFoundException"
_PASSING: Final = _THROTTLES | {_EXPIRED, _GONE}


class ShardReader:
    """See ``shards.Reader``."""

    def __init__(self, stream: KinesisShards, shard: Shard, place: Place, most: int | None = None) -> None:
        self._stream, self._shard = stream, shard
        self._client, self._clock = stream.client, stream.clock
        self._what = f"reading {shard.id} of the Kinesis stream {stream.name}"
        self._place = place  # behind what was read so far
        self._iterator: str | None = None
        self._most = _MOST if most is None else most
        self._span: Span | None = None
        self._due = 0.0  # when the shard may be asked next
        self._pause = 0.0
        self._told = False  # of strangers

    async def page(self) -> Page:
        """See ``Reader.page``."""
        if self._span is None:  # that of a shard never changes
            self._span = await self._stream.span(self._shard)
        await self._clock.sleep(max(0.0, self._due - self._clock.monotonic()))
        limit = self._limit()
        got = await self._ask(limit)
        if got is None:
            return Page(ended=True)
        unpacking = Unpacking(self._shard.number, self._span, self._clock)
        await unpacking.add(got.records)
        self._tell(unpacking.strangers)
        behind = self._behind(got, limit)
        page = self._cut(unpacking, behind, ended=got.next_shard_iterator is None)
        # From here on nothing waits: a caller that is cancelled has either this page or its place before it.
        if got.records:
            self._place = Place(got.records[-1].sequence_number, 0, whole=True)
            self._stream.usual = max(1, sum(len(one.data) for one in got.records) // len(got.records))
        self._iterator = got.next_shard_iterator
        self._wait(records=bool(got.records), behind=bool(behind))
        return page

    def _wait(self, *, records: bool, behind: bool) -> None:
        """When the next read is due, behind a page that had `records` or none."""
        if records or behind:
            self._pause = 0.0 if records and behind else _PAUSE
        else:
            self._pause = min(_SLOWEST, self._pause * 2 or _PAUSE)
        self._due = self._clock.monotonic() + self._pause

    def _limit(self) -> int:
        """How many records are asked for."""
        share = min(PAGE_BYTES, PAGES_BYTES // (2 * max(1, len(self._stream.readers))))
        return max(1, min(self._most, share // self._stream.usual))

    def _behind(self, got: Answer, limit: int) -> float | None:
        """By how many seconds a page's end is behind the tip: never 0 if it was the limit that ended it."""
        behind = None if got.millis_behind_latest is None else got.millis_behind_latest / 1000
        if len(got.records) >= limit:
            return behind or 0.001
        return behind

    def _cut(self, unpacking: Unpacking, behind: float | None, *, ended: bool) -> Page:
        """The page, without what is not behind the place within its first sequence number."""
        records, sequences = unpacking.records, unpacking.sequences
        if self._place.sequence and not self._place.whole:
            number, sub = int(self._place.sequence), self._place.sub
            done = sum(1 for one in records[: sub + 1] if _is_done(one, number, sub))
            records, sequences = records[done:], sequences[done:]
        return Page(records, sequences, behind, ended)

    async def _ask(self, limit: int) -> Answer | None:
        """The next answer of GetRecords; ``None`` if there is no such shard any more."""
        code = ""
        for _ in range(_TRIES):
            try:
                async with self._stream.turns, asking(self._what, passing=_PASSING):
                    if self._iterator is None:
                        self._iterator = await self._stream.iterator(self._shard, self._place)
                    got = await self._client.get_records(ShardIterator=self._iterator, Limit=limit)
                return answer(got)
            except ClientError as error:
                code = code_of(error)
                if code == _GONE:
                    await self._check_gone()
                    return None
                if code == _EXPIRED:
                    self._iterator = None
                else:
                    await self._clock.sleep(0.5 + self._clock.random())
        why = "other readers take what the shard gives; add shards, or read it less often"
        if code == _EXPIRED:
            why = "iterators that were just given are too old already; see what delays or answers requests"
        raise Retryable(f"{self._what}: {code} {_TRIES} times in a row: {why}", delay=_SLOWEST)

    async def _check_gone(self) -> None:
        """That Kinesis knows nothing of a shard whose stream is there means that the retention is over.

        Raises:
            ConfigError: it is the stream that is not there.
            Retryable: the shard is listed all the same.
        """
        if any(shard.id == self._shard.id for shard in await self._stream.shards()):
            raise Retryable(f"{self._what}: the shard is listed, and cannot be found: it is tried again")

    def _tell(self, strangers: int) -> None:
        if strangers and not self._told:
            self._told = True
            logger.warning(
                "%s: %d records in aggregates have keys of other shards and are left out, from here on "
                "without a word: after a split their producer puts them again; one that does not mind the "
                "shards must not aggregate",
                self._what,
                strangers,
            )


def _is_done(record: ChannelRecord, number: int, sub: int) -> bool:
    sequence, at = divmod(record.position, SUBS)
    return sequence == number and at <= sub


def start(place: Place, digits: int) -> dict[str, Any]:
    """What GetShardIterator is told to begin behind `place`; sequence numbers of less than `digits` digits
    lost their leading zeros on the way (MiniStack's have some, and are compared as text)."""
    if not place.sequence:
        return {"ShardIteratorType": "TRIM_HORIZON"}
    return {
        "ShardIteratorType": "AFTER_SEQUENCE_NUMBER" if place.whole else "AT_SEQUENCE_NUMBER",
        "StartingSequenceNumber": place.sequence.zfill(digits),
    }
