"""The log's table: its requests, each under a time-out, throttling waited out.

Every write here may be repeated: puts are conditional on a place that is free and tell their own event from
another's, transactions carry a token, removals and conditional updates come to the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import ConfigError, Permanent, Retryable
from flowlane_aws.bounded import all_of
from flowlane_aws.clients import asking, code_of
from flowlane_aws.log.items import INDEXES, Item, text

#: The operations that a busy worker makes all day long.
HOT: Final = (
    "PutItem",
    "TransactWriteItems",
    "UpdateItem",
    "BatchExecuteStatement",
    "Query",
    "BatchGetItem",
)
#: Seconds for one request, all of the SDK's tries included.
_PATIENCE: Final = 10.0
#: How often a request is made that AWS answers with "not now"; the SDK has tried three times by then.
_TRIES: Final = 5
#: The longest pause before another try, seconds.
_PAUSE: Final = 2.0

CONDITION: Final = "ConditionalCheckFailedException"
CANCELED: Final = "TransactionCanceledException"
_MISSING: Final = "ResourceNotFoundException"

#: Keys in one BatchGetItem, statements in one BatchExecuteStatement.
GETS: Final = 100
_STATEMENTS: Final = 25
#: Keys in one page of an index.
_LISTED: Final = 1000

#: What a statement of a batch may fail with and be tried again.
_NOT_NOW: Final = frozenset(
    {
        "InternalServerError",
        "ProvisionedThroughputExceeded",
        "RequestLimitExceeded",
        "ThrottlingError",
        "TransactionConflict",
    }
)


class Table:
    """The table called `name`; `backend` is the URI to name in messages."""

    def __init__(self, client: Any, name: str, clock: Clock, backend: str) -> None:
        self.client = client
        self.name = name
        self.clock = clock
        self.backend = backend

    async def pause(self, tried: int) -> None:
        """Wait before the try after `tried` ones: up to 50 ms doubled for each, full jitter."""
        await self.clock.sleep(min(_PAUSE, 0.05 * 2**tried) * self.clock.random())

    async def _ask(
        self,
        doing: str,
        request: Callable[..., Awaitable[Any]],
        passing: Collection[str] = (),
        **arguments: Any,
    ) -> Any:
        tried = 0
        while True:
            try:
                async with asking(f"{doing} {self.name}", seconds=_PATIENCE, passing={*passing, _MISSING}):
                    return await request(**arguments)
            except ClientError as error:
                if code_of(error) != _MISSING:
                    raise
                raise self._missing() from error
            except Retryable as error:
                tried += 1
                # No answer at all may take as long again each time: whoever asks has other ways then.
                if tried == _TRIES or not isinstance(error.__cause__, ClientError):
                    raise
            await self.pause(tried)

    def _missing(self) -> ConfigError:
        where = self.client.meta.region_name
        return ConfigError(
            f"there is no table {self.name} in {where}: `flowlane init LANE --backend {self.backend}` makes "
            "it, or set the region and account that it is in"
        )

    # ----------------------------------------------------------------- writing

    async def put(self, item: Item) -> Mapping[str, Any] | None:
        """Put `item` where none is; or what is there, and nothing was put.

        Raises:
            Retryable: it may have been put, or not.
            ConfigError: there is no such table, or no right to it.
        """
        try:
            await self._ask(
                "appending to",
                self.client.put_item,
                {CONDITION},
                TableName=self.name,
                Item=item,
                ConditionExpression="attribute_not_exists(pk)",
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            )
        except ClientError as error:
            refused: Any = error.response
            there: Mapping[str, Any] = refused.get("Item", {})
            return there
        return None

    def putting(self, item: Item) -> Mapping[str, Any]:
        """``put`` as an action of a transaction."""
        return {
            "Put": {
                "TableName": self.name,
                "Item": item,
                "ConditionExpression": "attribute_not_exists(pk)",
                "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
            }
        }

    def adding(self, where: Item, numbers: Mapping[str, int]) -> Mapping[str, Any]:
        """The addition of `numbers` to the item with the key `where`, as an action of a transaction."""
        terms = ", ".join(f"#n{n} :n{n}" for n in range(len(numbers)))
        return {
            "Update": {
                "TableName": self.name,
                "Key": where,
                "UpdateExpression": f"ADD {terms}",
                "ExpressionAttributeNames": {f"#n{n}": name for n, name in enumerate(numbers)},
                "ExpressionAttributeValues": {
                    f":n{n}": {"N": str(number)} for n, number in enumerate(numbers.values())
                },
            }
        }

    async def transact(self, actions: Sequence[Mapping[str, Any]], token: str) -> Sequence[Mapping[str, Any]]:
        """Do all `actions`; or none, and why not: one reason for each, with its ``Code`` ("None": not because
        of this one) and the ``Item`` in its way. Within ten minutes the same `token` does them once.

        Raises: as ``put``; and Permanent where DynamoDB takes no such actions.
        """
        try:
            await self._ask(
                "committing to",
                self.client.transact_write_items,
                {CANCELED},
                TransactItems=actions,
                ClientRequestToken=token,
            )
        except ClientError as error:
            refused: Any = error.response
            reasons: Sequence[Mapping[str, Any]] = refused.get("CancellationReasons", ())
            return reasons
        return ()

    async def update(
        self, where: Item, change: str, condition: str, names: Mapping[str, str], values: Mapping[str, Any]
    ) -> bool:
        """Make `change` on the item with the key `where` if `condition` holds; whether it did."""
        try:
            await self._ask(
                "marking in",
                self.client.update_item,
                {CONDITION},
                TableName=self.name,
                Key=where,
                UpdateExpression=change,
                ConditionExpression=condition,
                ExpressionAttributeNames=names,
                ExpressionAttributeValues=values,
            )
        except ClientError:  # passed: the condition
            return False
        return True

    async def remove(self, attribute: str, keys: Sequence[Item]) -> None:
        """Remove `attribute` from the items with `keys`, 25 in one request; those without it are left alone.

        Raises:
            Retryable: some may have it still.
            Permanent: it may not be removed.
        """
        statement = f'UPDATE "{self.name}" REMOVE {attribute} WHERE pk=? AND sk=?'
        await all_of(
            [
                partial(
                    self._execute,
                    [{"Statement": statement, "Parameters": [at["pk"], at["sk"]]} for at in some],
                )
                for some in in_portions(keys, _STATEMENTS)
            ]
        )

    async def swap(
        self, attribute: str, changes: Sequence[tuple[Item, Mapping[str, Any], Mapping[str, Any]]]
    ) -> list[bool]:
        """Of each key, and what `attribute` is and is to be there: whether it was, and this call changed it.

        Raises: as ``remove``.
        """
        where = f"WHERE pk=? AND sk=? AND {attribute}=?"
        statement = f'UPDATE "{self.name}" SET {attribute}=? {where}'  # noqa: S608  # both names are our own
        statements = [
            {"Statement": statement, "Parameters": [new, at["pk"], at["sk"], old]} for at, old, new in changes
        ]
        portions = [statements[at : at + _STATEMENTS] for at in range(0, len(statements), _STATEMENTS)]
        done = await all_of([partial(self._execute, some) for some in portions])
        return [each for some in done for each in some]

    async def _execute(self, statements: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Whether each of `statements` was done: not one whose item is none, or is not as it says."""
        done = [True] * len(statements)
        left, tried = list(range(len(statements))), 0
        while True:
            these = [statements[n] for n in left]
            answer = await self._ask("marking in", self.client.batch_execute_statement, Statements=these)
            errors = [each.get("Error", {}).get("Code", "") for each in answer["Responses"]]
            if wrong := set(errors) - _NOT_NOW - {"", "ConditionalCheckFailed"}:
                raise Permanent(f"marking in {self.name}: refused ({min(wrong)}): check the role's policy")
            for n, code in zip(left, errors, strict=True):
                done[n] = not code
            left = [n for n, code in zip(left, errors, strict=True) if code in _NOT_NOW]
            if not left:
                return done
            tried += 1
            if tried == _TRIES:
                raise Retryable(
                    f"marking in {self.name}: {len(left)} items were busy or throttled to the end"
                )
            await self.pause(tried)

    # ----------------------------------------------------------------- reading

    async def query(
        self, partition: str, sort: tuple[str, str] = ("", ""), *, index: str = "", newest: int = 0
    ) -> AsyncIterator[Sequence[Mapping[str, Any]]]:
        """The items of `partition`, page by page: of the table, consistently, or of `index`, as of a little
        before. `sort`: those only whose sort key compares so (an operator and a text); the `newest` ones,
        newest first, if it is said how many."""
        last: Mapping[str, Any] = {}
        while True:
            found, last = await self._page(partition, sort, index, newest, last)
            yield found
            if not last or newest:
                return

    async def listing(
        self, index: str, partitions: Sequence[str], sort: tuple[str, str] = ("", "")
    ) -> AsyncIterator[Sequence[Mapping[str, Any]]]:
        """The items of all `partitions` of `index` as ``query`` has them, one partition after the other; they
        are asked for their first pages together, since most have one, if any."""
        firsts = await all_of([partial(self._page, each_, sort, index, 0, {}) for each_ in partitions])
        for partition, (first, after) in zip(partitions, firsts, strict=True):
            yield first
            last = after
            while last:
                page, last = await self._page(partition, sort, index, 0, last)
                yield page

    async def merged(
        self, index: str, partitions: Sequence[str], sort: tuple[str, str]
    ) -> AsyncIterator[Mapping[str, Any]]:
        """The items of all `partitions` of `index` as ``query`` has them, in the order of their sort keys."""
        key = INDEXES[index][1]
        firsts = await all_of([partial(self._page, each_, sort, index, 0, {}) for each_ in partitions])
        pages = [(each_, deque(page), after) for each_, (page, after) in zip(partitions, firsts, strict=True)]
        while pages := [page for page in pages if page[1]]:
            at = min(range(len(pages)), key=lambda n: pages[n][1][0][key]["S"])
            partition, items, after = pages[at]
            yield items.popleft()
            while after and not items:
                page, after = await self._page(partition, sort, index, 0, after)
                items.extend(page)
            pages[at] = (partition, items, after)

    async def _page(
        self, partition: str, sort: tuple[str, str], index: str, newest: int, after: Mapping[str, Any]
    ) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]:
        """A page that begins `after` a key, and the key after which the next one does; empty at the end."""
        hash_key, range_key, _ = INDEXES[index] if index else ("pk", "sk", ())
        operator, value = sort
        arguments: dict[str, Any] = {"IndexName": index} if index else {"ConsistentRead": True}
        if newest:
            arguments |= {"ScanIndexForward": False, "Limit": newest}
        elif index:
            arguments["Limit"] = _LISTED
        if after:
            arguments["ExclusiveStartKey"] = after
        page = await self._ask(
            "reading",
            self.client.query,
            TableName=self.name,
            KeyConditionExpression="#p = :p" + (f" AND #s {operator} :s" if operator else ""),
            ExpressionAttributeNames={"#p": hash_key} | ({"#s": range_key} if operator else {}),
            ExpressionAttributeValues={":p": text(partition)} | ({":s": text(value)} if operator else {}),
            **arguments,
        )
        return page["Items"], page.get("LastEvaluatedKey") or {}

    async def newest(self, stream: str) -> Mapping[str, Any] | None:
        """The last item of `stream`, consistent with every write answered before."""
        items, _ = await self._page(stream, ("", ""), "", 1, {})
        return items[0] if items else None

    async def get(
        self, keys: Sequence[Item], attributes: Sequence[str] = ()
    ) -> Mapping[tuple[str, str], Mapping[str, Any]]:
        """The items with `keys` that exist, by their keys' texts, consistently; 100 in one request."""
        found: dict[tuple[str, str], Mapping[str, Any]] = {}
        calls = [partial(self._get, some, attributes) for some in in_portions(keys, GETS)]
        for items in await all_of(calls):
            found |= {(item["pk"]["S"], item["sk"]["S"]): item for item in items}
        return found

    async def _get(self, keys: Sequence[Item], attributes: Sequence[str]) -> list[Mapping[str, Any]]:
        request: dict[str, Any] = {"Keys": keys, "ConsistentRead": True}
        if attributes:
            request["ProjectionExpression"] = ", ".join(f"#a{n}" for n in range(len(attributes)))
            request["ExpressionAttributeNames"] = {f"#a{n}": name for n, name in enumerate(attributes)}
        left, items, tried = {self.name: request}, [], 0
        while True:
            answer = await self._ask("reading", self.client.batch_get_item, RequestItems=left)
            items += answer["Responses"].get(self.name, [])
            left = answer.get("UnprocessedKeys") or {}
            if not left:
                return items
            tried += 1
            if tried == 4 * _TRIES:  # some come with each answer, of 16 MB at most
                raise Retryable(f"reading {self.name}: throttled to the end")
            await self.pause(min(tried, _TRIES))


def in_portions(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """`items` in portions of `size`."""
    return [items[at : at + size] for at in range(0, len(items), size)]
