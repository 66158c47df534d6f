"""``zip_tables``: zips of many tables' rows, each file of them loaded into the table that its manifest names.

Discovery lists the zips and gives each new one (by URL and ETag) the next generation. A drop is looked into
by ranged reads of its directory and of the manifests: every data file becomes a member, which carries where
it lies. A member is read lazily and loaded; rows of an older drop never replace those of a later one, in
whatever order drops and members are loaded.

What the bytes of a drop decide is decided once, when it is looked into; what the lane decides (its
allow-list, password, limits, mode) is decided when a member is loaded, so a redrive follows a changed lane.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, get_args

import msgspec

from flowlane.errors import ConfigError, Damaged, Permanent, redact
from flowlane.events import Event
from flowlane.lane import Lane, Policy
from flowlane.ports import Archive, Context, Enricher, Mapper, TableSpec
from flowlane.recipes.drops import (
    HELD,
    Drop,
    Generations,
    Looking,
    Member,
    final,
    new_drops,
    pin,
    read_manifest,
)
from flowlane.recipes.manifest import Declared
from flowlane.recipes.values import inferred, keyed
from flowlane.status import LogView
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.kinds import kind_of
from flowlane.streams.zip.entry import ZipLimits

Mode = Literal["upsert", "append"]
Verify = Literal["content", "stream"]
Types = Literal["text", "infer"]

#: So many times the members that are loaded at once may be at hand, most of them waiting for their table's
#: turn, so that those of other tables are found behind them.
_ROOM: Final = 3
#: Dead units that the status tells of by name and reason.
SHOWN: Final = 50
_SECRETS: Final = ("env://", "secretsmanager://")


def zip_tables(
    name: str,
    *,
    source: str,
    to: str,
    tables: Collection[str] | Mapping[str, str],
    every: str | None = "5m",
    csv: CsvFormat | None = None,
    limits: ZipLimits | None = None,
    mode: Mode = "upsert",
    password: str | None = None,
    verify: Verify = "content",
    per_table: int = 4,
    types: Types = "text",
    map: Mapper | None = None,
    enrich: Enricher | None = None,
    policy: Policy | None = None,
) -> Lane:
    """A lane that loads each data file of the zips at `source` into the table of `to` that its manifest says.

    `source` is a folder, a pattern, or one zip by its URL; `to` a sink's URI without table and key. `tables`
    says which may be written, and made where they are missing: a list of names or globs, a mapping of names
    in manifests to tables, or ``"*"``. A zip that is put under the same name again is loaded again; of two
    that have rows of one table the later one (by date, then URL) wins, row by row.

    Columns of a key have the type that the manifest declares; others are the texts of the CSV, or with
    ``types="infer"`` numbers, booleans and nulls where they are written as JSON has them.
    ``verify="content"`` proves a member (sizes and CRC-32) before its first row is written, ``"stream"`` at
    its end. `password` is a secret reference. At most `per_table` members of one table are loaded at once in
    one process. `map` and `enrich` see records before their keys get their types.

    Raises:
        ConfigError: a setting cannot be used; said with what to write instead.
    """
    _check(source, to, password, per_table)
    allowed = Allowed(tables)
    limits = limits or ZipLimits()
    loading = Loading(to, csv or CsvFormat(), limits, mode, password, verify, types, map, enrich)
    policy = policy or Policy()
    lane = Lane(name, every=every, policy=policy)
    at_hand = policy.concurrency * (_ROOM if per_table < policy.concurrency else 1)

    def opened(ctx: Context, unit: Drop | Member) -> AbstractAsyncContextManager[Archive]:
        return ctx.archive(unit.url, etag=pin(unit.etag), limits=limits, password=password)

    @lane.stage(on=lane.triggered, concurrency=1)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Generations | Drop]:
        mark = await ctx.recall(Generations)
        last = mark.last if mark else 0
        while drops := await new_drops(ctx, source):
            for drop in drops:
                last += 1
                # Before the drop: a number that is never used does no harm, one that is given twice would.
                yield Generations(last=last)
                yield msgspec.structs.replace(drop, generation=last)
            if len(drops) < HELD:
                break

    @lane.stage(on=Drop, concurrency=min(4, policy.concurrency))
    async def look(event: Event, ctx: Context) -> AsyncIterator[Member]:
        drop = event.data
        with final(drop.etag):
            async with opened(ctx, drop) as archive:
                async for member in Looking(ctx, drop, archive, limits).members():
                    yield member

    @lane.stage(on=Member, concurrency=at_hand)
    async def load(event: Event, ctx: Context) -> None:
        member = event.data
        with _told(member), final(member.etag):
            if member.fault:
                raise Permanent(member.fault)
            declared = member.declared
            if declared is None:
                async with opened(ctx, member) as archive:
                    declared = await read_manifest(archive, member, limits)
            if declared is None:
                ctx.skip(f"{member.entry}: no manifest names it")
                return
            spec = loading.spec(declared, allowed.target(declared.table))
            async with ctx.turn(f"table {spec.name}", per_table), ctx.turn("all", policy.concurrency):
                await loading.load(ctx, member, spec)

    @lane.view("refused")
    async def refused(log: LogView) -> dict[str, str]:
        found: dict[str, str] = {}
        more = 0
        async for unit, reason in log.dead():
            if len(found) < SHOWN:
                found[unit] = reason
            else:
                more += 1
        return found | ({"more": f"{more:,} more: see `flowlane dead`"} if more else {})

    return lane


class Allowed:
    """The tables that a lane may write, by the names that manifests give them.

    Raises:
        ConfigError: `tables` is no such list.
    """

    def __init__(self, tables: Any) -> None:
        if isinstance(tables, str) and tables != "*":
            raise ConfigError(f"tables={tables!r}: write a list, tables=[{tables!r}], or '*' for any table")
        names = [tables] if isinstance(tables, str) else list(tables) if _is_list(tables) else []
        targets = tables.values() if isinstance(tables, Mapping) else ()
        if not names or not all(isinstance(name, str) and name for name in (*names, *targets)):
            raise ConfigError(
                f"tables={tables!r}: name the tables that may be written: a list of names or globs, a "
                "mapping from names in manifests to tables, or '*' for any table that a manifest names"
            )
        self._targets = dict(tables) if isinstance(tables, Mapping) else {name: name for name in names}
        self._globs = [name for name in names if not isinstance(tables, Mapping) and set(name) & set("*?[")]

    def target(self, name: str) -> str:
        """The table that rows for `name`, a plain name, are to be written to.

        Raises:
            Permanent: none may be.
        """
        if name in self._targets:
            return self._targets[name]
        if any(fnmatchcase(name, glob) for glob in self._globs):
            return name
        raise Permanent(f"table {name!a} is not allowed: add it to tables= of the lane, then redrive")


@dataclass(frozen=True)
class Loading:
    """How members are loaded.

    Raises:
        ConfigError: a setting is not of those that there are.
    """

    to: str
    csv: CsvFormat
    limits: ZipLimits
    mode: Mode
    password: str | None
    verify: Verify
    types: Types
    map: Mapper | None
    enrich: Enricher | None

    def __post_init__(self) -> None:
        for name, known in (("mode", Mode), ("verify", Verify), ("types", Types)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise ConfigError(f"{name}={value!r}: must be {' or '.join(get_args(known))}")
        if not isinstance(self.csv, CsvFormat):
            raise ConfigError(f"csv={self.csv!r}: must be a CsvFormat(...)")
        if not isinstance(self.limits, ZipLimits):
            raise ConfigError(f"limits={self.limits!r}: must be ZipLimits(...)")

    def spec(self, declared: Declared, table: str) -> TableSpec:
        """The table that rows declared so are written to.

        Raises:
            Permanent: they are to replace others of their key, and have none.
        """
        if self.mode == "append":
            return TableSpec(table)
        if not declared.key:
            raise Permanent(
                f"its manifest names no partition_key for table {declared.table}: have it named, or load "
                "with mode='append'"
            )
        types = tuple((key.name, key.type) for key in declared.key)
        return TableSpec(table, tuple(key.name for key in declared.key), "upsert", types=types)

    async def load(self, ctx: Context, member: Member, spec: TableSpec) -> None:
        """Load `member` into the table `spec`."""
        rows = ctx.rows(
            member.url,
            entry=member.entry,
            etag=pin(member.etag),
            verify=self.verify,
            password=self.password,
            csv=self.csv,
            limits=self.limits,
            format=member.format,
        )
        if self.types == "infer":
            rows = rows.map(inferred)
        if self.map is not None:
            rows = rows.map(self.map)
        if self.enrich is not None:
            rows = rows.enrich(self.enrich)
        if spec.types:
            rows = rows.map(keyed(spec.types, alike=self._are_alike(member)))
        await ctx.load(rows, to=self.to, into=spec)

    def _are_alike(self, member: Member) -> bool:
        """Whether all records of `member` have the same columns when they get their keys."""
        changed = self.map is not None or self.enrich is not None
        name = member.entry.name.rpartition("/")[2]
        return not changed and kind_of(name, member.format).rows == "csv"


def _is_list(tables: Any) -> bool:
    return isinstance(tables, Mapping | list | tuple | set | frozenset)


def _check(source: Any, to: Any, password: Any, per_table: Any) -> None:
    for name, uri in (("source", source), ("to", to)):
        if not isinstance(uri, str) or "://" not in uri:
            raise ConfigError(f"{name}={uri!r} is no URL: write one, such as file:///data/drops/")
    if "@" in source.partition("://")[2].partition("/")[0]:
        raise ConfigError(f"source={redact(source)}: has a user in it, whose password would be in the log")
    if password is not None and not str(password).startswith(_SECRETS):
        raise ConfigError("password= is no secret reference: write env://NAME or secretsmanager://name")
    if not isinstance(per_table, int) or isinstance(per_table, bool) or per_table < 1:
        raise ConfigError(f"per_table={per_table!r}: must be a whole number of at least 1")


@contextmanager
def _told(member: Member) -> Iterator[None]:
    """Says of which member a refusal speaks, or a proof that failed."""
    name = str(member.entry)
    try:
        yield
    except (Permanent, Damaged, ConfigError) as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error
