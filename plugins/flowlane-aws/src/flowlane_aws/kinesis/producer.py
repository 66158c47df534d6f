"""Putting to Kinesis: those records of one key in order.

What is put under many keys, as changes of rows are, goes out in full calls, several of them at once; under a
single key it is one record per round trip, unless records are put together (see ``parcels``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Final

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import Permanent, Retryable
from flowlane.ports import ChannelRecord
from flowlane_aws.bounded import Flights, owned_tasks
from flowlane_aws.clients import asking, code_of
from flowlane_aws.kinesis.lines import Parcel
from flowlane_aws.kinesis.parcels import Entry, Packs, Singles, single
from flowlane_aws.kinesis.ranges import Ranges, partition_key, ranges_of

#: The calls that are worth the short way (``brisk``).
HOT: Final = ("PutRecords",)
#: Bytes of data and key in one record, at most, where the stream was not made to take larger ones.
RECORD_BYTES: Final = 1 << 20
#: Tries for one record, at most; with the pauses between them that is some 15 s.
TRIES: Final = 12
#: Calls of one put that are under way at once.
AT_ONCE: Final = 4
#: Seconds between two calls once records are refused, at most (on average half of it): at first, in the end.
_PACE: Final = 0.1
_SLOWEST: Final = 5.0
#: Bytes that a key takes at most, with what wraps a record.
_KEY_BYTES: Final = 1024
#: Records that are looked at before others have their turn: some milliseconds' worth.
_SLICE: Final = 2000
_THROTTLES: Final = frozenset(
    {"KMSThrottlingException", "LimitExceededException", "ProvisionedThroughputExceededException"}
)

_Plan = Singles | Packs
_Answer = tuple[Sequence[Parcel], Sequence[Mapping[str, Any]]]


class Producer:
    """Puts to a stream that exists; with `aggregate`, records of one shard put together as the Kinesis
    Producer Library does it, which whoever reads has to know.

    At least once: what was sent in vain as far as this process knows (a lost reply) is sent again, so
    whoever reads tells records by what they hold, never by their sequence numbers.
    """

    def __init__(self, stream: str, client: Any, clock: Clock, *, aggregate: bool = False) -> None:
        self._stream, self._client, self._clock = stream, client, clock
        self._what = f"putting to the Kinesis stream {stream}"
        self._pace = 0.0  # seconds between two calls, at most; grows while records are refused
        self._largest = RECORD_BYTES
        self._aggregate = aggregate
        self._ranges: Ranges | None = None

    async def put(self, records: Sequence[ChannelRecord]) -> None:
        """See ``Channel.put``. When this raises, any of the records may have been stored, yet none before the
        one that precedes it under its key: putting all of them again keeps the order of what comes last.

        Raises:
            Permanent: a record is larger than the stream takes; none was put.
            Retryable: the stream's shards are still too busy after ``TRIES`` tries, or Kinesis is away.
            ConfigError: there is no such stream, or it may not be written to.
        """
        await self._check(records)
        if records:
            plan = await self._plan(len(records))
            async with owned_tasks() as group, Flights[_Answer](group) as flights:
                await self._carry(records, plan, flights)

    async def _check(self, records: Sequence[ChannelRecord]) -> None:
        """Refuse what is too large before anything is sent: Kinesis would refuse the whole call."""
        number = 0
        for some in _slices(records):
            if max([len(record.data) for record in some]) + _KEY_BYTES > self._largest:
                await self._check_each(some, number)
            number += len(some)
            await self._clock.sleep(0)

    async def _check_each(self, records: Sequence[ChannelRecord], first: int) -> None:
        for number, record in enumerate(records, first):
            entry = single(record, partition_key(record.key))
            size = len(entry["Data"]) + len(entry["PartitionKey"].encode())
            if size > self._largest:
                await self._find_largest()
            if size > self._largest:
                raise Permanent(
                    f"{self._what}: record {number} has {size:,} bytes with its key, the stream takes "
                    f"{self._largest:,}: raise the stream's limit, or store the data and put its URL"
                )

    async def _find_largest(self) -> None:
        """Only when it matters: a stream may have been made to take larger records (UpdateMaxRecordSize)."""
        async with asking(f"asking how large the records of Kinesis stream {self._stream} may be"):
            answer = await self._client.describe_stream_summary(StreamName=self._stream)
        summary = answer.get("StreamDescriptionSummary", {})
        limit = summary.get("MaxRecordSizeInKiB", RECORD_BYTES >> 10)
        self._largest = limit << 10

    async def _plan(self, total: int) -> _Plan:
        if not self._aggregate:
            return Singles(total)
        if self._ranges is None:
            self._ranges = await ranges_of(self._client, self._stream)
        return Packs(total, self._ranges, self._largest)

    # ----------------------------------------------------------------- calls

    async def _carry(self, records: Sequence[ChannelRecord], plan: _Plan, flights: Flights[_Answer]) -> None:
        """All of `records` are stored."""
        slices = _slices(records)
        while True:
            await self._fill(plan, slices, flights)
            if not flights and not plan.stale:
                return
            for call, results in await flights.landed() if flights else ():
                self._settle(plan, call, results)
            if isinstance(plan, Packs) and plan.stale and not flights:
                slices = chain(_slices(await self._replan(plan)), slices)

    async def _fill(
        self, plan: _Plan, slices: Iterator[Sequence[ChannelRecord]], flights: Flights[_Answer]
    ) -> None:
        """As many calls are under way as may be, and while they are, what follows is prepared. A call that is
        not full goes only by itself: what it lacks may well be ready when another one has landed."""
        while not plan.stale:
            while plan.lines.full and len(flights) < (1 if self._pace else AT_ONCE):
                self._launch(plan, flights)
            if plan.lines.enough:
                break
            if not plan.prepare():
                if (some := next(slices, None)) is not None:
                    plan.add(some)
                elif not plan.flush():
                    break
            await self._clock.sleep(0)
        if not flights and not plan.stale:
            self._launch(plan, flights)

    def _launch(self, plan: _Plan, flights: Flights[_Answer]) -> None:
        if call := plan.lines.take():
            flights.start(partial(self._call, call))

    async def _call(self, call: Sequence[Parcel]) -> _Answer:
        await self._clock.sleep(self._pace * self._clock.random())
        return call, await self._send([parcel.entry for parcel in call])

    async def _send(self, entries: Sequence[Entry]) -> Sequence[Mapping[str, Any]]:
        """One call. For each entry the shard that has it, or why it was refused."""
        try:
            async with asking(self._what, passing=_THROTTLES):
                answer = await self._client.put_records(StreamName=self._stream, Records=entries)
        except ClientError as error:
            return [{"ErrorCode": code_of(error)}] * len(entries)
        results: Sequence[Mapping[str, Any]] = answer.get("Records", ())
        told = sum([1 for result in results if result.get("ErrorCode") or result.get("ShardId")])
        if not len(results) == told == len(entries):
            raise Retryable(f"{self._what}: {told} answers to {len(entries)} records")
        return results

    def _settle(self, plan: _Plan, call: Sequence[Parcel], results: Sequence[Mapping[str, Any]]) -> None:
        """`plan` and the pace are as what came of a call has it.

        Raises:
            Retryable: one of its entries was refused ``TRIES`` times.
        """
        refused, spent = 0, ""
        for parcel, result in zip(call, results, strict=True):
            if not (why := result.get("ErrorCode")):
                plan.stored(parcel, result["ShardId"])
                continue
            refused += 1
            parcel.tries += 1
            plan.lines.refused(parcel)
            if parcel.tries == TRIES:
                spent = why
        self._adapt(refused / len(call))
        if spent:
            raise Retryable(
                f"{self._what}: {plan.left} of {plan.total} records are not stored, one was refused "
                f"{TRIES} times ({spent}): add shards, or put less at once",
                delay=self._pace,
            )

    def _adapt(self, share: float) -> None:
        """Slow down while most of a call is refused, and recover once nothing is. A few refusals are one busy
        shard's, whose records come again in the next call: the others are not to wait for them."""
        if not share:
            self._pace = self._pace / 2 if self._pace > _PACE else 0.0
        elif share > 0.5:
            self._pace = min(_SLOWEST, max(_PACE, self._pace * 2))
        else:
            self._pace = max(_PACE, self._pace)

    async def _replan(self, plan: Packs) -> list[ChannelRecord]:
        """The stream's shards have changed: `plan` is made for those it has now. See ``Packs.replan``."""
        if plan.plans == TRIES:
            raise Retryable(f"{self._what}: its shards change faster than records are put", delay=_SLOWEST)
        await self._clock.sleep((plan.plans - 1) * _PACE * self._clock.random())
        self._ranges = await ranges_of(self._client, self._stream)
        return plan.replan(self._ranges)


def _slices(records: Sequence[ChannelRecord]) -> Iterator[Sequence[ChannelRecord]]:
    for at in range(0, len(records), _SLICE):
        yield records[at : at + _SLICE]
