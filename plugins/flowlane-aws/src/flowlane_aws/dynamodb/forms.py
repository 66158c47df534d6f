"""The forms in which items are put: one by one, in transactions, in batches; what became of each item.

Requests are made as bytes, not as the SDK's parameters: its serialiser walks every value of every item (most
of a transaction's cost), and does so on the loop. Signing, pool, credentials and errors stay the SDK's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

import msgspec
from botocore.exceptions import ClientError

from flowlane_aws.clients import asking, code_of

#: The operations that rows are made of.
HOT: Final = ("PutItem", "TransactWriteItems", "BatchWriteItem", "GetItem", "UpdateItem")
_BODY: Final = "flowlane_body"

#: Asked too often, or in each other's way: of calls, and of the reasons of a cancelled transaction.
_THROTTLES: Final = frozenset(
    {
        "LimitExceededException",
        "ProvisionedThroughputExceeded",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "ThrottlingError",
        "ThrottlingException",
    }
)
_CONFLICTS: Final = frozenset(
    {"ReplicatedWriteConflictException", "TransactionConflict", "TransactionConflictException"}
)
#: What is wrong with an item, or with one of several.
_UNFIT: Final = frozenset(
    {
        "ItemCollectionSizeLimitExceeded",
        "ItemCollectionSizeLimitExceededException",
        "ValidationError",
        "ValidationException",
    }
)
#: The table holds this row, or a later one, already.
_STANDS: Final = frozenset({"ConditionalCheckFailed", "ConditionalCheckFailedException"})
#: Bytes of one call: they are signed and sent on the loop, at about 4 ms a MB.
_LARGEST: Final = 2_000_000
_CANCELLED: Final = "TransactionCanceledException"
_PASSING: Final = _THROTTLES | _CONFLICTS | _UNFIT | _STANDS | {_CANCELLED}


class Item(msgspec.Struct, frozen=True, gc=False):
    """One record on its way: its place in its batch, its key as JSON, what its form sends for it as JSON, and
    its size as DynamoDB counts it."""

    number: int
    key: bytes
    body: bytes
    size: int


class Answer(msgspec.Struct):
    """What became of the items of one call: those not named here are in the table, or stand there already.

    ``again``: may be sent again, after a pause if ``busy``. ``throttled``: the service wants fewer calls.
    ``contended``: those of ``again`` that are in another transaction right now, if that is all that is wrong.
    ``halve``: one of several is refused, and nobody says which."""

    again: Sequence[Item] = ()
    contended: Sequence[Item] = ()
    refused: Sequence[tuple[Item, str]] = ()
    busy: bool = False
    throttled: bool = False
    halve: bool = False


class Form(Protocol):
    """A way to put items."""

    what: str  #: it is about, for messages
    count: int  #: items in one call, at most
    size: int  #: their bytes, at most

    async def put(self, items: Sequence[Item]) -> Answer:
        """Put `items`, which have different keys; may be repeated.

        Raises:
            Retryable, ConfigError, Permanent: see ``clients.asking``; any of the items may be in the table.
        """
        ...


def chunks(items: Sequence[Item], form: Form) -> Iterator[list[Item]]:
    """`items` as calls of `form`."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        # What is sent may be longer than what is stored: escaped characters, base64.
        length = max(item.size, len(item.body))
        if chunk and (len(chunk) == form.count or size + length > form.size):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += length
    if chunk:
        yield chunk


class Puts:
    """PutItem, each on its condition: one write unit a KB, one request an item."""

    count = 1
    size = _LARGEST

    def __init__(self, client: Any, table: str) -> None:
        self._client, self._table, self.what = client, table, _writing(table)

    async def put(self, items: Sequence[Item]) -> Answer:
        """See ``Form.put``."""
        (item,) = items
        try:
            async with asking(self.what, passing=_PASSING):
                await send(self._client, "put_item", item.body, TableName=self._table)
        except ClientError as error:
            return _failed(error, items)
        return Answer()


class Transactions:
    """TransactWriteItems, each item on its condition: two write units a KB, 100 items a request.

    One failed condition cancels all; those that failed need not be written, the others are sent again."""

    count = 100
    size = _LARGEST  # of 4 MB

    def __init__(self, client: Any, table: str) -> None:
        self._client, self._table, self.what = client, table, _writing(table)

    async def put(self, items: Sequence[Item]) -> Answer:
        """See ``Form.put``."""
        tables = [{"Put": {"TableName": self._table}}]
        try:
            async with asking(self.what, passing=_PASSING):
                await send(self._client, "transact_write_items", self.request(items), TransactItems=tables)
        except ClientError as error:
            if code_of(error) == _CANCELLED:
                return _cancelled(error, items)
            return _failed(error, items)
        return Answer()

    def request(self, items: Sequence[Item]) -> bytes:
        """What is sent for `items`."""
        # Without a ClientRequestToken: it would be good for ten minutes, the conditions are for ever.
        return b'{"TransactItems":[%b]}' % b",".join([b'{"Put":%b}' % item.body for item in items])


class Batches:
    """BatchWriteItem, on no condition: one write unit a KB, 25 items a request, what comes last stays."""

    count = 25
    size = _LARGEST  # of 16 MB

    def __init__(self, client: Any, table: str) -> None:
        self._client, self._table, self.what = client, table, _writing(table)

    async def put(self, items: Sequence[Item]) -> Answer:
        """See ``Form.put``."""
        tables: dict[str, Any] = {self._table: []}
        try:
            async with asking(self.what, passing=_PASSING):
                answer = await send(
                    self._client, "batch_write_item", self.request(items), RequestItems=tables
                )
        except ClientError as error:
            return _failed(error, items)
        left = answer.get("UnprocessedItems", {}).get(self._table, ())
        if not left:
            return Answer()
        again = _unprocessed(items, [each["PutRequest"]["Item"] for each in left])
        return Answer(again, busy=True, throttled=True)

    def request(self, items: Sequence[Item]) -> bytes:
        """What is sent for `items`."""
        puts = b",".join([b'{"PutRequest":{"Item":%b}}' % item.body for item in items])
        return b'{"RequestItems":{"%b":[%b]}}' % (self._table.encode(), puts)


def _writing(table: str) -> str:
    return f"writing to DynamoDB table {table}"


def _failed(error: ClientError, items: Sequence[Item]) -> Answer:
    """A call that failed as a whole."""
    code = code_of(error)
    if code in _STANDS:
        return Answer()
    if code in _UNFIT:
        if len(items) > 1:
            return Answer(items, halve=True)
        return Answer(refused=[(items[0], _reason(error.response["Error"]))])
    if code in _CONFLICTS:
        return Answer(items, contended=items, busy=True)
    if code in _THROTTLES:
        return Answer(items, busy=True, throttled=True)
    raise error  # not in ``_PASSING``


def _cancelled(error: ClientError, items: Sequence[Item]) -> Answer:
    """A cancelled transaction: its reasons stand in the order of its items (service model,
    ``TransactionCanceledException``)."""
    reasons: Sequence[Mapping[str, Any]] = error.response.get("CancellationReasons", ())
    if len(reasons) != len(items):
        return Answer(items, busy=True, halve=len(items) > 1)
    codes = [str(reason.get("Code", "None")) for reason in reasons]
    refused = [
        (item, _reason(reason))
        for item, code, reason in zip(items, codes, reasons, strict=True)
        if code in _UNFIT
    ]
    settled = _UNFIT | _STANDS
    again = [item for item, code in zip(items, codes, strict=True) if code not in settled]
    throttled = not _THROTTLES.isdisjoint(codes)
    contended = [item for item, code in zip(items, codes, strict=True) if code in _CONFLICTS]
    busy = throttled or len(again) == len(items) or bool(contended)
    return Answer(again, () if throttled else contended, refused, busy=busy, throttled=throttled)


def _reason(said: Mapping[str, Any]) -> str:
    return "the table refuses it: " + " ".join(str(said.get("Message") or said.get("Code")).split())[:300]


def _unprocessed(items: Sequence[Item], left: Sequence[Mapping[str, Any]]) -> Sequence[Item]:
    """Those of `items` that came back, told by their key."""
    names = list(msgspec.json.decode(items[0].key))
    back = {_identity({name: item[name] for name in names}) for item in left}
    again = [item for item in items if _identity(msgspec.json.decode(item.key)) in back]
    # One that cannot be told (a number written another way, say): putting an item twice does no harm.
    return again if len(again) == len(left) else items


def _identity(key: Mapping[str, Mapping[str, Any]]) -> bytes:
    return msgspec.json.encode(key)


# ---------------------------------------------------------------------- bytes for the SDK


def lean(client: Any) -> None:
    """From now on ``send`` works with `client`; its other calls are as they were."""
    client.meta.events.register("provide-client-params.dynamodb", _take)
    client.meta.events.register("before-call.dynamodb", _give)


async def send(
    client: Any,
    operation: Literal["put_item", "transact_write_items", "batch_write_item", "get_item", "update_item"],
    body: bytes,
    **named: Any,
) -> Mapping[str, Any]:
    """Call `operation` with `body`, which is its request as JSON. `named` is what of it the SDK has to see:
    its endpoint rules look for the table."""
    call: Callable[..., Any] = getattr(client, operation)
    answer: Mapping[str, Any] = await call(**named, **{_BODY: body})
    return answer


def _take(params: dict[str, Any], context: dict[str, Any], **_: Any) -> dict[str, Any] | None:
    if _BODY not in params:
        return None
    context[_BODY] = params[_BODY]
    return {name: value for name, value in params.items() if name != _BODY}


def _give(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    if _BODY in context:
        params["body"] = context[_BODY]
