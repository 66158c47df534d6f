"""The table that a sink writes to: described once, made if that is wanted, waited for until it is ready."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import ConfigError, Retryable
from flowlane_aws.clients import asking
from flowlane_aws.dynamodb.pace import patient
from flowlane_aws.dynamodb.values import Key

#: Seconds to wait for a table that is being made: usually it takes ten.
PATIENCE: Final = 120.0

_NAME: Final = re.compile(r"[a-zA-Z0-9_.-]{3,255}", re.ASCII)
_USABLE: Final = frozenset({"ACTIVE", "UPDATING"})
#: Bytes that a partition key and a sort key may have (Developer Guide, "Constraints").
_LIMITS: Final = {"HASH": 2048, "RANGE": 1024}


class Wanted(msgspec.Struct, frozen=True):
    """The key that a table is expected to have: ``sort`` is empty where it has one part, ``key`` where any
    will do, a type where the table's own will do (a table that is made gets ``S``)."""

    key: str = ""
    key_type: str = ""
    sort: str = ""
    sort_type: str = ""

    def parts(self) -> list[tuple[str, str, str]]:
        """(name, type, role) of each part."""
        named = ((self.key, self.key_type, "HASH"), (self.sort, self.sort_type, "RANGE"))
        return [part for part in named if part[0]]


class Table(msgspec.Struct, frozen=True):
    """What there is to know of a table: the parts of its key, and all attributes that are keys, those of its
    indexes too, by their names."""

    name: str
    key: tuple[Key, ...]
    typed: Mapping[str, Key]


def checked(name: str) -> str:
    """`name`, which may come from data.

    Raises:
        ConfigError: it can be no table's.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name[:80]!a} is no name of a DynamoDB table: 3 to 255 letters, digits, _, . and -, as in "
            "dynamodb://my-table"
        )
    return name


async def found(client: Any, clock: Clock, name: str, wanted: Wanted, *, create: bool) -> Table:
    """The table `name`, ready to be written to; made (billed by request) if there is none and `create`.

    Raises:
        ConfigError: there is no such table, it has another key, or may not be looked at or made.
        Retryable: it is not ready within ``PATIENCE``, or AWS did not answer.
    """
    described = await patient(clock, lambda: _described(client, name))
    if described is None and create:
        await patient(clock, lambda: _create(client, name, wanted))
    elif described is None:
        raise ConfigError(f"there is no DynamoDB table {name}: create it, or add create=true to its URI")
    until = clock.monotonic() + PATIENCE
    pause = 0.05
    while described is None or described["TableStatus"] not in _USABLE:
        status = "CREATING" if described is None else described["TableStatus"]
        # After CreateTable the table may not be seen for a moment.
        if status != "CREATING":
            raise _unusable(name, status)
        if clock.monotonic() > until:
            raise Retryable(f"DynamoDB table {name} is still being created after {PATIENCE:g} s")
        await clock.sleep(pause)
        pause = min(2 * pause, 5.0)
        described = await patient(clock, lambda: _described(client, name))
    return _fitting(_read(described), wanted)


async def _described(client: Any, name: str) -> Mapping[str, Any] | None:
    try:
        async with asking(f"describing DynamoDB table {name}", passing=("ResourceNotFoundException",)):
            answer = await client.describe_table(TableName=name)
    except ClientError:
        return None
    table: Mapping[str, Any] = answer["Table"]
    return table


async def _create(client: Any, name: str, wanted: Wanted) -> None:
    if not wanted.key:
        raise ConfigError(
            f"DynamoDB table {name} is to be created: say by which key=, as in key=id&key_type=S"
        )
    # In use: it is there, or is being made by somebody else right now.
    with suppress(ClientError):
        async with asking(f"creating DynamoDB table {name}", passing=("ResourceInUseException",)):
            await client.create_table(
                TableName=name,
                KeySchema=[{"AttributeName": part, "KeyType": role} for part, _, role in wanted.parts()],
                AttributeDefinitions=[
                    {"AttributeName": part, "AttributeType": type_ or "S"}
                    for part, type_, _ in wanted.parts()
                ],
                BillingMode="PAY_PER_REQUEST",
            )


def _unusable(name: str, status: str) -> ConfigError | Retryable:
    if status == "DELETING":
        return Retryable(f"DynamoDB table {name} is being deleted")
    return ConfigError(f"DynamoDB table {name} cannot be written to (its status is {status}): repair it")


def _read(described: Mapping[str, Any]) -> Table:
    types = {each["AttributeName"]: each["AttributeType"] for each in described["AttributeDefinitions"]}
    # The table's own key comes last: an attribute of it that is an index's key too has the stricter limit.
    typed: dict[str, Key] = {}
    for schema in (*_indexes(described), described["KeySchema"]):
        for part in schema:
            name = part["AttributeName"]
            limit = min(_LIMITS[part["KeyType"]], typed[name].limit if name in typed else 2048)
            typed[name] = Key(name, types[name], limit)
    own = sorted(described["KeySchema"], key=lambda part: str(part["KeyType"]))  # HASH, RANGE
    return Table(described["TableName"], tuple(typed[part["AttributeName"]] for part in own), typed)


def _indexes(described: Mapping[str, Any]) -> Iterator[list[dict[str, str]]]:
    for kind in ("GlobalSecondaryIndexes", "LocalSecondaryIndexes"):
        for index in described.get(kind) or ():
            yield index["KeySchema"]


def _fitting(table: Table, wanted: Wanted) -> Table:
    parts = wanted.parts()
    same = [key.name for key in table.key] == [name for name, _, _ in parts] and all(
        type_ in ("", key.type) for key, (_, type_, _) in zip(table.key, parts, strict=True)
    )
    if parts and not same:
        own = _key([(key.name, key.type) for key in table.key])
        asked = _key([(name, type_) for name, type_, _ in parts])
        raise ConfigError(
            f"DynamoDB table {table.name} has another key than {asked}: write {own}, or use another table"
        )
    return table


def _key(parts: Sequence[tuple[str, str]]) -> str:
    """Names and types of a key's `parts`, as URIs say them."""
    told = zip(("key", "sort"), parts, strict=False)
    return "&".join(f"{role}={name}&{role}_type={type_ or 'S'}" for role, (name, type_) in told)
