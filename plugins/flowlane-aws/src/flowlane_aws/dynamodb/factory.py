"""``dynamodb://table?key=pk&sort=sk``: tables of DynamoDB as sinks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from flowlane.errors import ConfigError, redact
from flowlane.ports import Environment, TableSpec
from flowlane_aws.clients import open_client
from flowlane_aws.dynamodb import table as dynamodb_table
from flowlane_aws.dynamodb.forms import HOT, Batches, Form, Puts, Transactions, lean
from flowlane_aws.dynamodb.pace import MOST, Delivery, Pace
from flowlane_aws.dynamodb.sink import DynamoSink

_FORMS: Final[dict[str, type[Transactions | Puts]]] = {"transactions": Transactions, "puts": Puts}
#: Single puts: more of them at once make up for their being small.
_MOST_PUTS: Final = 2 * MOST
_YES: Final = frozenset({"1", "yes", "true", "on"})
_NO: Final = frozenset({"0", "no", "false", "off"})


@asynccontextmanager
async def open_sink(
    uri: str,
    environment: Environment,
    *,
    key: str = "",
    sort: str = "",
    key_type: str = "",
    sort_type: str = "",
    create: str | bool | None = None,
    exactly: str | bool = True,
    form: str = "transactions",
    bookkeeping: str = "_flowlane",
    mode: str = "",
    schema: str = "evolve",
    region: str = "",
    endpoint: str = "",
    into: TableSpec | None = None,
) -> AsyncIterator[DynamoSink]:
    """Records as items of the table, replacing those of the same key; see ``DynamoSink``.

    `key`, `sort` and their types (S, N, B) are the table's own if not given; where they are, they have to be.
    ``create=true`` makes a table that is missing, billed by request. ``exactly=false`` puts on no condition
    (BatchWriteItem): for a table that one unit owns. `form`: of conditional writing, ``transactions`` of 100
    or single ``puts``, slower at half the write units (and possible where transactions are not, as in global
    tables of strong consistency).

    A lane that learns of the table from data says table, key and types by `into`, under ``dynamodb://``; one
    that is missing is made then, unless ``create=false``.

    Needs the permissions DescribeTable, PutItem, GetItem and UpdateItem; BatchWriteItem for
    ``exactly=false``; CreateTable for ``create=true``.

    Raises:
        ConfigError: an option is wrong, or the table is missing, another one, or may not be used.
        Retryable: AWS did not answer, or the table is not ready.
    """
    name = uri.partition("://")[2].rstrip("/")
    if into is not None:
        name, key, key_type, sort, sort_type = _said_by(uri, into, name, key, key_type, sort, sort_type)
        mode = mode or into.mode
    name = dynamodb_table.checked(name)
    wanted = _wanted(uri, key, key_type, sort, sort_type)
    making = _flag(uri, "create", (into is not None) if create is None else create)
    exact = _flag(uri, "exactly", exactly)
    if mode not in ("", "upsert"):
        raise ConfigError(
            f"{redact(uri)}: mode={mode!r}: a DynamoDB table has keys, so it can only be upsert"
        )
    if schema != "evolve":
        raise ConfigError(
            f"{redact(uri)}: schema={schema!r}: a DynamoDB table has no columns to hold to: evolve"
        )
    if form not in _FORMS:
        raise ConfigError(f"{redact(uri)}: form={form!r}: must be {' or '.join(_FORMS)}")
    if exact and not bookkeeping:
        raise ConfigError(f"{redact(uri)}: bookkeeping= is empty: name an attribute, or use exactly=false")
    # One try each: what fails is tried again here, at a pace that the table's answers set.
    async with open_client(
        "dynamodb", region=region, endpoint=endpoint, connections=_MOST_PUTS, attempts=1, brisk=HOT
    ) as client:
        lean(client)
        table = await dynamodb_table.found(client, environment.clock, name, wanted, create=making)
        if exact and bookkeeping in table.typed:
            raise ConfigError(
                f"{redact(uri)}: {bookkeeping} is a key of the table: choose another bookkeeping="
            )
        writing: Form = _FORMS[form](client, name) if exact else Batches(client, name)
        pace = Pace(_MOST_PUTS if writing.count == 1 else MOST)
        delivery = Delivery(environment.clock, writing, pace)
        yield DynamoSink(client, environment.clock, table, delivery, bookkeeping if exact else "")


def _said_by(uri: str, into: TableSpec, *given: str) -> tuple[str, str, str, str, str]:
    """Table, key and types as `into` says them, none of which may be `given` by the URI too."""
    if any(given):
        raise ConfigError(
            f"{redact(uri)}: names a table or a key, and so does the lane: leave them out of the URI"
        )
    if not 1 <= len(into.key) <= 2:
        raise ConfigError(
            f"{redact(uri)}: the key of table {into.name} has {len(into.key)} columns: one or two"
        )
    types = dict(into.types)
    parts = [(name, types.get(name, "")) for name in into.key] + [("", "")]
    return into.name, *parts[0], *parts[1]


def _wanted(uri: str, key: str, key_type: str, sort: str, sort_type: str) -> dynamodb_table.Wanted:
    for option, value in (("key_type", key_type), ("sort_type", sort_type)):
        if value not in ("", "S", "N", "B"):
            raise ConfigError(f"{redact(uri)}: {option}={value!r}: must be S (text), N (number) or B (bytes)")
    if not key and (sort or key_type or sort_type):
        raise ConfigError(f"{redact(uri)}: sort= and types of keys need a key=")
    if (key and key == sort) or (sort_type and not sort):
        raise ConfigError(f"{redact(uri)}: sort= must name another attribute than key=")
    return dynamodb_table.Wanted(key, key_type, sort, sort_type)


def _flag(uri: str, option: str, value: Any) -> bool:
    text = str(value).lower()
    if text not in _YES | _NO:
        raise ConfigError(f"{redact(uri)}: {option}={value!r}: say true or false")
    return text in _YES
