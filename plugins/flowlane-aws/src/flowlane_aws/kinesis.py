"""Channels on Kinesis: records are put, those of one key in order. They are read behind a Lambda mapping.

PutRecords goes on with the records that follow a failed one, so it keeps no order by itself (API reference).
Therefore no call holds two records of one key, and a record is sent when the one before it of its key is
stored. What is put under many keys, as changes of rows are, still goes out in full calls; under a single key
it is one record per round trip.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import ConfigError, Permanent, Retryable
from flowlane.ports import ChannelBatch, ChannelRecord
from flowlane_aws.clients import asking, code_of

#: Records in one call, at most (API reference of PutRecords).
CALL_RECORDS: Final = 500
#: Bytes of data and keys in one call, at most, unless a single record is larger. AWS takes ten times as much;
#: encoding, hashing and signing that would hold the loop for too long, and one shard takes this per second.
CALL_BYTES: Final = 1 << 20
#: Bytes of data and key in one record, at most, where the stream was not made to take larger ones.
RECORD_BYTES: Final = 1 << 20
#: Tries for one record, at most; with the pauses between them that is some 15 s.
TRIES: Final = 12
#: Seconds between two calls once records are refused, at most (on average half of it): at first, in the end.
_PACE: Final = 0.1
_SLOWEST: Final = 5.0
_KEY_UNITS: Final = 256  # UTF-16 units in a partition key, at most
_THROTTLES: Final = frozenset(
    {"KMSThrottlingException", "LimitExceededException", "ProvisionedThroughputExceededException"}
)


class KinesisChannel:
    """See ``ports.Channel``: a stream that exists, for producing.

    At least once: what was sent in vain as far as this process knows (a lost reply) is sent again, so
    whoever reads tells records by what they hold, never by their sequence numbers.
    """

    def __init__(self, stream: str, client: Any, clock: Clock) -> None:
        self._stream, self._client, self._clock = stream, client, clock
        self._what = f"putting to the Kinesis stream {stream}"
        self._pace = 0.0  # seconds between two calls, at most; grows while records are refused
        self._largest = RECORD_BYTES

    async def put(self, records: Sequence[ChannelRecord]) -> None:
        """See ``Channel.put``. When this raises, any of the records may have been stored, yet none before the
        one that precedes it under its key: putting all of them again keeps the order of what comes last.

        Raises:
            Permanent: a record is larger than the stream takes; none was put.
            Retryable: the stream's shards are still too busy after ``TRIES`` tries, or Kinesis is away.
            ConfigError: there is no such stream, or it may not be written to.
        """
        lines = _Lines(records)
        await self._check(lines)
        tries: Counter[int] = Counter()
        while call := lines.next_call():
            await self._clock.sleep(self._pace * self._clock.random())
            refused = await self._send([lines.entries[number] for number in call])
            spent = ""
            for number, why in zip(call, refused, strict=True):
                if not why:
                    lines.stored(number)
                    continue
                lines.refused(number)
                tries[number] += 1
                if tries[number] == TRIES:
                    spent = why
            if spent:
                raise Retryable(
                    f"{self._what}: {lines.left} of {len(records)} records are not stored, one was refused "
                    f"{TRIES} times ({spent}): add shards, or put less at once",
                    delay=self._pace,
                )
            self._adapt(sum(map(bool, refused)) / len(call))

    def consume(self, consumer: str, *, limit: int = 500, wait: float = 0) -> AsyncIterator[ChannelBatch]:
        """Raises:
        ConfigError: always.
        """
        raise ConfigError(
            f"channel {self._stream}: Kinesis is consumed behind a Lambda mapping; "
            "the worker's own consumer is not there yet"
        )

    async def _check(self, lines: _Lines) -> None:
        """Refuse what is too large before anything is sent: Kinesis would refuse the whole call."""
        number, size = max(enumerate(lines.sizes), key=lambda each: each[1], default=(0, 0))
        if size > self._largest:
            # Only now: a stream may have been made to take larger ones (UpdateMaxRecordSize).
            async with asking(f"asking how large the records of Kinesis stream {self._stream} may be"):
                answer = await self._client.describe_stream_summary(StreamName=self._stream)
            limit = answer["StreamDescriptionSummary"].get("MaxRecordSizeInKiB", RECORD_BYTES >> 10)
            self._largest = limit << 10
        if size > self._largest:
            raise Permanent(
                f"{self._what}: record {number} has {size:,} bytes with its key, the stream takes "
                f"{self._largest:,}: raise the stream's limit, or store the data and put its URL"
            )

    async def _send(self, entries: Sequence[dict[str, Any]]) -> list[str]:
        """One call. For each record why it was refused; empty if it is stored."""
        try:
            async with asking(self._what, passing=_THROTTLES):
                answer = await self._client.put_records(StreamName=self._stream, Records=entries)
        except ClientError as error:
            return [code_of(error)] * len(entries)
        results = answer["Records"]
        if len(results) != len(entries):
            raise Retryable(f"{self._what}: {len(results)} answers to {len(entries)} records")
        return [result.get("ErrorCode", "") for result in results]

    def _adapt(self, share: float) -> None:
        """Slow down while most of a call is refused, and recover once nothing is. A few refusals are one busy
        shard's, whose records come again in the next call: the others are not to wait for them."""
        if not share:
            self._pace = self._pace / 2 if self._pace > _PACE else 0.0
        elif share > 0.5:
            self._pace = min(_SLOWEST, max(_PACE, self._pace * 2))
        else:
            self._pace = max(_PACE, self._pace)


class _Lines:
    """Records on their way, in one line per key: the first of each line may be sent, oldest ones first."""

    def __init__(self, records: Sequence[ChannelRecord]) -> None:
        keys = [partition_key(record.key) for record in records]
        self.entries = [
            {"Data": record.data, "PartitionKey": key} for record, key in zip(records, keys, strict=True)
        ]
        self.sizes = [len(record.data) + len(key.encode()) for record, key in zip(records, keys, strict=True)]
        self.left = len(records)
        self._keys = keys
        self._lines: dict[str, deque[int]] = {}
        for number, key in enumerate(keys):
            self._lines.setdefault(key, deque()).append(number)
        self._first = [line.popleft() for line in self._lines.values()]  # a heap: they are in order

    def next_call(self) -> list[int]:
        """The numbers of the next records to send; taken, until they are ``stored`` or ``refused``."""
        call: list[int] = []
        size = 0
        while self._first and len(call) < CALL_RECORDS:
            size += self.sizes[self._first[0]]
            if call and size > CALL_BYTES:
                break
            call.append(heapq.heappop(self._first))
        return call

    def stored(self, number: int) -> None:
        """The next one of its line may be sent."""
        self.left -= 1
        line = self._lines[self._keys[number]]
        if line:
            heapq.heappush(self._first, line.popleft())

    def refused(self, number: int) -> None:
        """It may be sent again."""
        heapq.heappush(self._first, number)


def partition_key(key: str) -> str:
    """`key` as Kinesis takes it: itself, or its SHA-256 where it is empty, too long or no text."""
    try:
        if 0 < len(key.encode("utf-16-le")) <= 2 * _KEY_UNITS:
            return key
    except UnicodeEncodeError:
        pass  # a lone surrogate
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
