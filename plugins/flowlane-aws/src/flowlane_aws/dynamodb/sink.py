"""The DynamoDB sink: an item is put if the table does not hold a later row for its key.

What is later stands in every item, in the attribute ``_flowlane`` (another name by ``bookkeeping=``), a map:

====  ====================================================================================================
``g``  the generation of the unit
``u``  the unit (a digest of its stream's name)
``s``  the split (a digest of its id)
``t``  the token of the attempt that wrote the item, or claimed it
``r``  the place in the split: the first row of the batch x 10^9, plus the place in the batch
====  ====================================================================================================

A later generation replaces an earlier one, whatever the order of arrival. Within a generation, a later place
in the same split replaces an earlier one, and another split of the same unit gives way to no earlier attempt;
units that share a generation have no order, and the last to arrive stays. So a batch that is written again
changes nothing, and neither does a straggler: the rest of a batch of an attempt that was overtaken.

DynamoDB has no place to keep a token but in an item, and an item of flowlane's own in somebody's table would
be found by whoever reads it. So the first item that a split put is where its attempts meet: each leaves its
token there (``t``) and looks there before every batch whether a later one has come. Its key is what
``Writer.resume`` says. Where a later generation has written that item there is nothing to meet at any more,
and the conditions alone keep order.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any, Final

import msgspec
from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.connectors.hop import hop
from flowlane.errors import Fenced, Permanent
from flowlane.ports import Bad, Batch, Record, Split, UnitRef
from flowlane_aws.clients import asking
from flowlane_aws.dynamodb.forms import Item, send
from flowlane_aws.dynamodb.pace import Delivery, patient
from flowlane_aws.dynamodb.table import Table
from flowlane_aws.dynamodb.values import Items, Misfit

_BATCH: Final = 10**9  # places of one batch: more records than memory holds
#: Bytes of the mark, at most, without its name (see ``dynamodb_values``).
_MARK: Final = 3 + 5 * 2 + 3 * 21 + 11 + 8

_CONDITION: Final = (
    "NOT attribute_type(#f.g, :n) OR #f.g < :g OR (#f.g = :g AND (#f.u <> :u "
    "OR (#f.s = :s AND #f.r < :r) OR (#f.s <> :s AND #f.t <= :t)))"
)
#: Records that are made into items in one go, off the loop: some 3 ms. Until they are made, the loop waits
#: for the interpreter lock wherever it has let go of it, to hash or to send; and 5 ms at most, each time.
_SLICE: Final = 500
_encode: Final = msgspec.json.Encoder().encode


class DynamoSink:
    """See ``ports.Sink``. A record is a whole item: what it lacks, the item has no more. Of the records of a
    batch that share a key the last one stays. With an empty `mark` items are put as they come, on no
    condition: for a table that one unit owns."""

    def __init__(self, client: Any, clock: Clock, table: Table, delivery: Delivery, mark: str) -> None:
        self._client = client
        self._clock = clock
        self._table = table
        self._delivery = delivery
        self._mark = mark

    @asynccontextmanager
    async def open(self, split: Split, unit: UnitRef, resume: str = "") -> AsyncIterator[ItemWriter]:
        """See ``Sink.open``.

        Raises:
            Fenced: a later attempt has been here.
        """
        meeting = None
        if self._mark:
            meeting = Meeting(self._client, self._clock, self._table.name, self._mark, unit, resume)
            await meeting.look()
        yield ItemWriter(
            self._clock, self._table, self._delivery, Making(self._table, self._mark, split, unit), meeting
        )


class ItemWriter:
    """See ``ports.Writer``."""

    def __init__(
        self, clock: Clock, table: Table, delivery: Delivery, making: Making, meeting: Meeting | None
    ) -> None:
        self._clock = clock
        self._table = table
        self._delivery = delivery
        self._making = making
        self._meeting = meeting

    @property
    def position(self) -> None:
        """See ``Writer.position``: only the log knows."""
        return None

    @property
    def resume(self) -> str:
        """See ``Writer.resume``: the key of the item where the split's attempts meet."""
        return self._meeting.key.decode() if self._meeting else ""

    @property
    def unfinished(self) -> tuple[str, str]:
        """See ``Writer.unfinished``: nothing is."""
        return "", ""

    @property
    def changes(self) -> Sequence[str]:
        """See ``Writer.changes``: a table has no columns, and is made when it is opened."""
        return ()

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """See ``Writer.write``. Without conditions there is no ``Fenced``, and a batch written again is put
        again.

        Raises:
            Retryable: throttled, or away, for too long; the batch may be written in part.
        """
        if self._meeting:
            await self._meeting.look()
        bad: list[Bad] = []
        keys: dict[int, bytes] = {}
        refused = await self._delivery.put(self._made(batch, bad, keys))
        bad += [_bad(batch, item.number, reason) for item, reason in refused]
        if self._meeting and not self._meeting.key:
            standing = keys.keys() - {item.number for item, _ in refused}
            self._meeting.key = keys[min(standing)] if standing else b""
        bad.sort(key=lambda found: found.row)
        return bad

    async def _made(
        self, batch: Batch, bad: list[Bad], keys: dict[int, bytes]
    ) -> AsyncGenerator[Sequence[Item]]:
        """The items of `batch`, slice by slice, so that some are sent while others are made. What can be no
        item goes to `bad`; the keys of items, by their numbers, to `keys`."""
        slices = self._making.slices(batch)
        while (found := await hop(self._clock, next, slices, None)) is not None:
            items, misfits = found
            bad += misfits
            keys |= {item.number: item.key for item in items}
            yield items

    async def finish(self) -> None:
        """See ``Writer.finish``: every row is visible already."""
        if self._meeting:
            await self._meeting.look()


class Making:
    """A unit's records of one split as items, and as what is sent for them."""

    def __init__(self, table: Table, mark: str, split: Split, unit: UnitRef) -> None:
        self._table = table
        self._mark = mark
        self._names = tuple(key.name for key in table.key)
        self._reserve = len(mark.encode()) + _MARK if mark else 0
        self._items = Items(table.typed, frozenset(self._names), self._reserve)
        of = {
            "g": {"N": str(unit.generation)},
            "u": {"S": _digest(unit.stream, 8)},
            "s": {"S": _digest(split.id, 6)},
            "t": {"N": str(unit.token)},
        }
        # What is sent around an item and, twice, its place: encoded once, not for every item.
        condition = {"ConditionExpression": _CONDITION, "ExpressionAttributeNames": {"#f": mark}}
        values = {":n": {"S": "N"}, **{f":{name}": value for name, value in of.items()}}
        self._before = b'{"TableName":%b,"Item":' % _encode(table.name)
        self._marked = b',%b:{"M":{%b,"r":{"N":"' % (_encode(mark), _encode(of)[1:-1])
        self._asked = b'"}}}},%b,"ExpressionAttributeValues":{%b,":r":{"N":"' % (
            _encode(condition)[1:-1],
            _encode(values)[1:-1],
        )
        self._after = b'"}}}'

    def slices(self, batch: Batch) -> Iterator[tuple[list[Item], list[Bad]]]:
        """`batch` as items with different keys, and the records that can be none: slice by slice, each of
        which takes some 10 ms. The last one comes first: of records that share a key the last one stays, and
        is known then."""
        taken: set[bytes] = set()
        for stop in range(len(batch.records), 0, -_SLICE):
            yield self._slice(batch, range(max(0, stop - _SLICE), stop), taken)

    def _slice(self, batch: Batch, numbers: range, taken: set[bytes]) -> tuple[list[Item], list[Bad]]:
        items: list[Item] = []
        bad: list[Bad] = []
        for number in reversed(numbers):
            try:
                item = self._item(batch.start.row, number, batch.records[number])
            except Misfit as error:
                bad.append(_bad(batch, number, str(error)))
                continue
            if item.key not in taken:
                taken.add(item.key)
                items.append(item)
        items.reverse()
        return items, bad

    def _item(self, row: int, number: int, record: Record) -> Item:
        if self._mark and self._mark in record:
            raise Misfit(
                f"its field {self._mark} is flowlane's own: rename it, or choose another bookkeeping="
            )
        item, size = self._items.item(record)
        key = _encode({name: item[name] for name in self._names})
        body = _encode(item)
        if self._mark:
            place = b"%d" % (row * _BATCH + number)
            body = b"".join((self._before, body[:-1], self._marked, place, self._asked, place, self._after))
        return Item(number, key, body, size + self._reserve)


class Meeting:
    """Where the attempts at one split meet: ``key`` is the item's, as JSON; empty while there is none."""

    def __init__(self, client: Any, clock: Clock, table: str, mark: str, unit: UnitRef, resume: str) -> None:
        """Begin with what ``Writer.resume`` said in an earlier attempt.

        Raises:
            Permanent: it never said so.
        """
        self.key = resume.encode()
        self._client = client
        self._clock = clock
        self._table = table
        self._mark = mark
        self._unit = unit
        self._u = _digest(unit.stream, 8)
        if self.key:
            try:
                msgspec.json.decode(self.key, type=dict[str, dict[str, str]])
            except msgspec.MsgspecError:
                raise Permanent(f"DynamoDB table {table}: cannot be resumed by {resume[:200]!r}") from None

    async def look(self) -> None:
        """This attempt's token is left where the attempts meet, and no later one is.

        Raises:
            Fenced: a later one is.
        """
        while self.key and (token := await patient(self._clock, self._token)) is not None:
            if token > self._unit.token:
                raise Fenced(
                    f"{self._unit.stream}: attempt {token} writes to DynamoDB table {self._table} now, "
                    f"this one is {self._unit.token}"
                )
            if token == self._unit.token or await patient(self._clock, self._leave):
                return

    async def _token(self) -> int | None:
        """The token there; ``None`` if the item is another unit's by now, or nobody's, or gone."""
        asked = {
            "TableName": self._table,
            "Key": msgspec.Raw(self.key),
            "ConsistentRead": True,
            "ProjectionExpression": "#f",
            "ExpressionAttributeNames": {"#f": self._mark},
        }
        async with asking(f"reading DynamoDB table {self._table}"):
            answer = await send(self._client, "get_item", _encode(asked), TableName=self._table)
        mark = answer.get("Item", {}).get(self._mark, {}).get("M", {})
        return int(mark["t"]["N"]) if mark.get("u", {}).get("S") == self._u else None

    async def _leave(self) -> bool:
        """Leave the token; False if it has become somebody else's in between."""
        asked = {
            "TableName": self._table,
            "Key": msgspec.Raw(self.key),
            "UpdateExpression": "SET #f.t = :t",
            "ConditionExpression": "#f.u = :u AND #f.t < :t",
            "ExpressionAttributeNames": {"#f": self._mark},
            "ExpressionAttributeValues": {":t": {"N": str(self._unit.token)}, ":u": {"S": self._u}},
        }
        refused = ("ConditionalCheckFailedException",)
        try:
            async with asking(f"writing to DynamoDB table {self._table}", passing=refused):
                await send(self._client, "update_item", _encode(asked), TableName=self._table)
        except ClientError:
            return False
        return True


def _bad(batch: Batch, number: int, reason: str) -> Bad:
    try:
        raw = repr(batch.records[number])[:1000]
    except Exception as error:  # noqa: BLE001  # a value's own, or an integer of over 4,300 digits
        raw = f"a record that cannot be shown: {type(error).__name__}"
    return Bad(batch.start.row + number, reason, raw)


def _digest(text: str, size: int) -> str:
    """`size` bytes that tell `text` from others, as text."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()
    return urlsafe_b64encode(digest).decode().rstrip("=")
