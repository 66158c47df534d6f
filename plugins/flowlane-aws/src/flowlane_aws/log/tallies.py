"""The counters of runs: sharded items that commits add to, and the order in which they are read.

One (run, round) is a partition of its own: ``0 closed``, then ``1 settled`` and ``2 found`` in shards, so
that commits that count at the same time seldom meet on one item (DynamoDB cancels all but one of such
transactions). An attribute is ``<stage>:<counter>``.

Completeness is read with two requests, ``closed`` and all of ``settled`` in one, all of ``found`` after it.
Counters only grow and ``settled`` never exceeds ``found``, so if what was settled at first equals what was
found later, it equalled it at that later moment too; ``closed`` was true by then, hence nobody was left who
could find anything more. What commits count before they read is in what they read, so that of the last ones
to settle at least one sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from flowlane.ports import Tally
from flowlane.state import Counts, RunTally, StageTally
from flowlane_aws.log.items import SHARDS, Item, text
from flowlane_aws.log.table import Table

#: (run, round, which item) -> attribute -> what is added.
Additions = dict[tuple[str, int, str], dict[str, int]]

CLOSED: Final = "0 closed"
_SETTLED: Final = "1 settled"
_FOUND: Final = "2 found"

#: Which item holds which counter; those of the records go with what settled.
_OF_FOUND: Final = ("found", "redriven")
_OF_SETTLED: Final = ("settled", "dead", "skipped", "superseded")
_OF_RECORDS: Final = tuple(field.name for field in msgspec.structs.fields(Counts))

#: Of so many rounds a process remembers how much was found at least.
_REMEMBERED: Final = 1024


def additions(tallies: Iterable[Tally]) -> Additions:
    """What `tallies` add, by item."""
    total: Additions = {}
    for tally in tallies:
        _add(total, tally, CLOSED, {"closed": int(tally.closed)})
        _add(total, tally, _FOUND, {name: getattr(tally, name) for name in _OF_FOUND})
        settled = {name: getattr(tally, name) for name in _OF_SETTLED}
        if tally.counts is not None:
            settled |= {f"records {name}": getattr(tally.counts, name) for name in _OF_RECORDS}
        _add(total, tally, _SETTLED, settled)
    return total


def _add(total: Additions, tally: Tally, item: str, numbers: Mapping[str, int]) -> None:
    for name, number in numbers.items():
        if number:
            into = total.setdefault((tally.run, tally.round, item), {})
            attribute = f"{tally.stage}:{name}"
            into[attribute] = into.get(attribute, 0) + number


def merge(total: Additions, more: Additions) -> None:
    """Add `more` to `total`."""
    for item, numbers in more.items():
        into = total.setdefault(item, {})
        for name, number in numbers.items():
            into[name] = into.get(name, 0) + number


def place(run: str, round: int, item: str, shard: int) -> Item:
    """The key of the item called `item`: of its `shard`, unless there is only one."""
    return {"pk": text(_partition(run, round)), "sk": text(item if item == CLOSED else f"{item} {shard:02d}")}


def _partition(run: str, round: int) -> str:
    # No stream is called like that: they begin with their lane's name, lanes with a letter.
    return f"#tally#{round}#{run}"


class Tallies:
    """Reads the counters of rounds."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._found: dict[tuple[str, int], Mapping[str, int]] = {}

    async def read(self, run: str, round: int) -> RunTally:
        """All of them, closed and settled before found."""
        tally = RunTally()
        _note(tally, await self._settled(run, round))
        _note(tally, await self._all_found(run, round))
        return tally

    async def complete(self, run: str, round: int) -> RunTally | None:
        """The counters of a round that is complete; ``None``, most often after one request, if it is not."""
        tally = RunTally()
        _note(tally, await self._settled(run, round))
        if not tally.closed:
            return None
        known = self._found.get((run, round), {})
        for stage, found in known.items():  # it is more by now, if anything
            if stage not in tally.stages or tally.stages[stage].settled < found:
                return None
        _note(tally, await self._all_found(run, round))
        return tally if tally.complete else None

    async def _settled(self, run: str, round: int) -> list[Mapping[str, Any]]:
        return await self._query("<", run, round)

    async def _all_found(self, run: str, round: int) -> list[Mapping[str, Any]]:
        items = await self._query(">=", run, round)
        tally = RunTally()
        _note(tally, items)
        self._found.pop((run, round), None)
        self._found[run, round] = {name: stage.found for name, stage in tally.stages.items() if stage.found}
        if len(self._found) > _REMEMBERED:
            del self._found[next(iter(self._found))]
        return items

    async def _query(self, operator: str, run: str, round: int) -> list[Mapping[str, Any]]:
        pages = self._table.query(_partition(run, round), (operator, _FOUND))
        return [item async for page in pages for item in page]


def _note(tally: RunTally, items: Sequence[Mapping[str, Any]]) -> None:
    """Add what `items` count to `tally`."""
    for item in items:
        for attribute, value in item.items():
            if attribute in ("pk", "sk"):
                continue
            name, _, counter = attribute.rpartition(":")
            stage = tally.stages.setdefault(name, StageTally())
            number = int(value["N"])
            if counter == "closed":
                tally.closed = tally.closed or number > 0
            elif counter.startswith("records "):
                counter = counter.removeprefix("records ")
                setattr(stage.counts, counter, getattr(stage.counts, counter) + number)
            else:
                setattr(stage, counter, getattr(stage, counter) + number)


__all__ = ["CLOSED", "SHARDS", "Additions", "Tallies", "additions", "merge", "place"]
