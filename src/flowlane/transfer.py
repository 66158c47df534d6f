"""The transfer: split -> batches -> writer; resumable, fenced, counted.

Effect before position: a batch is in the sink before the log says so, and the sink refuses to take it twice,
so a crash anywhere costs a repetition and never a record. The log's position, not the sink's, is where
reading resumes: batches in between are cut the same way again, counted, and found done by the sink.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from flowlane import events
from flowlane.deadline import Interrupted
from flowlane.errors import (
    BadRecord,
    Permanent,
    Superseded,
    redact,
)
from flowlane.landing import give_up, tidy
from flowlane.ports import (
    Bad,
    Batch,
    Cut,
    Enricher,
    Mapper,
    Record,
    Sink,
    Source,
    Split,
    Writer,
)
from flowlane.state import Counts, Position, Transfer
from flowlane.veil import conceal

if TYPE_CHECKING:
    from flowlane.attempt import Attempt

#: Below so many records an error budget is not yet held against a unit: one bad row in ten proves nothing.
BUDGET_FLOOR = 1000
#: Changes of its target that a unit's events tell of, at most.
MAX_CHANGES = 50


class Selection:
    """Records on their way: a source's URI, its options, and what is done to each record (``ports.Rows``)."""

    def __init__(self, url: str, options: Mapping[str, Any], steps: tuple[tuple[str, Any], ...] = ()) -> None:
        self.url = url
        self.options = dict(options)
        self.steps = steps

    def map(self, function: Mapper) -> Selection:
        """See ``ports.Rows``."""
        return Selection(self.url, self.options, (*self.steps, ("map", function)))

    def enrich(self, function: Enricher) -> Selection:
        """See ``ports.Rows``."""
        return Selection(self.url, self.options, (*self.steps, ("enrich", function)))


async def load(attempt: Attempt, rows: Selection, to: str, options: Mapping[str, Any]) -> Counts:
    """See ``ports.Context.load``."""
    name = attempt.next_name("load")
    state = attempt.transfer(name)
    if state.done:
        return state.counts
    await attempt.start()
    connections = attempt.engine.connections
    work = _Load(attempt, name, state, rows, Cut.parse(attempt.cut))
    options = {"schema": attempt.stage.policy.schema, **options}
    async with (
        connections.source(rows.url, rows.options) as source,
        connections.sink(to, options) as sink,
        aclosing(source.splits()) as splits,
    ):
        number = 0
        try:
            async for split in splits:
                number += 1
                if number > work.state.split:
                    await work.run(source, sink, split)
        except Superseded:
            await work.give_up()
            raise
    return await work.end()


class _Load:
    """The splits of one source on their way into one sink."""

    def __init__(self, attempt: Attempt, name: str, state: Transfer, rows: Selection, cut: Cut) -> None:
        self.attempt = attempt
        self.name = name
        self.state = state
        self.rows = rows
        self.cut = cut
        self._to = state.to  #: the object in a store that the current split goes into, if it is one
        self._begun = True  #: whether earlier attempts may have been at the current split

    async def run(self, source: Source, sink: Sink, split: Split) -> None:
        """Load one split from where the log says it stands, and make its effect visible."""
        state = self.state
        if state.position.offset or state.position.row:
            if state.etag != split.etag:
                raise Superseded(f"{redact(split.url)} was replaced while it was being loaded")
            if not split.replayable:
                raise Permanent(
                    f"{redact(split.url)} cannot be read in the same order twice, "
                    f"and {state.position.row:,} rows of it "
                    "went out: give it a key to read by"
                )
        # To a sink, the same split loaded by another `load` of the handler is another split.
        into = split
        if self.name != "load-1":
            into = msgspec.structs.replace(split, id=f"{split.id}#{self.name}")
        await self._prove(source, split)
        state = self.state
        async with sink.open(into, self.attempt.ref, state.upload) as writer:
            self._to, _ = writer.unfinished
            if not state.upload:
                await self._tidy()
            stands = writer.position
            if stands is not None and stands.row < state.position.row:
                state = self._go_back(stands)
            wrote = 0
            async with aclosing(source.read(split, state.position, self.cut)) as batches:
                self.attempt.doing = _passing_over(split, state.position)
                async for batch in batches:
                    self.attempt.doing = ""
                    await self._write(into, writer, batch)
                    wrote += 1
            self.attempt.doing = ""
            await writer.finish()
        await self._tidy()
        self._begun = False
        self.state = msgspec.structs.replace(
            self.state,
            split=self.state.split + 1,
            position=Position(),
            high=0,
            etag="",
            upload="",
            to="",
            left="",
            proven="",
            before=self.state.counts,
            kept=Position(),
            kept_counts=Counts(),
        )
        if wrote == 1 and split.replayable and not state.position.row:
            # That one batch is in the log: the unit's next event, mostly its last one, tells the rest. An
            # attempt that is cut short before it repeats a batch: less than a commit for each small split.
            self.attempt.progress.transfers[self.name] = self.state
        else:
            await self._log(moved=True)

    async def _prove(self, source: Source, split: Split) -> None:
        """What can be proven of `split` is, before its first record goes out; once, where an ETag pins it."""
        if split.etag and self.state.proven == split.etag:
            return
        passed = 0
        async with aclosing(source.prove(split, self.state.position)) as proving:
            async for passed in proving:
                if self.attempt.near_deadline():
                    raise Interrupted(
                        f"the proof of {redact(split.url)} had come to {passed:,} bytes, and begins anew: it "
                        'alone needs longer than there is: give it more time, or verify="stream"'
                    )
        if passed and split.etag:
            self.state = msgspec.structs.replace(self.state, proven=split.etag)
            await self._log(moved=True, kind=events.SPLIT_PROVEN)

    def _go_back(self, stands: Position) -> Transfer:
        """The sink has less than the log knows of: go on from where it stands, if the counts there are known;
        if not (an unfinished upload is gone, say), from the split's start."""
        state = self.state
        known = bool(stands.row) and stands == state.kept
        counts = state.kept_counts if known else state.before
        progress = self.attempt.progress
        progress.counts = progress.counts.since(state.counts.since(counts))
        self.state = msgspec.structs.replace(
            state,
            position=stands if known else Position(),
            upload=state.upload if known else "",
            left=state.left if known else "",
            counts=msgspec.structs.replace(counts),
            kept=Position(),
            kept_counts=Counts(),
        )
        return self.state

    async def end(self) -> Counts:
        """All splits are in: remember it with the unit's next event."""
        self.state = msgspec.structs.replace(self.state, done=True)
        self.attempt.progress.transfers[self.name] = self.state
        return self.state.counts

    async def _write(self, split: Split, writer: Writer, batch: Batch) -> None:
        went = Counts(records_in=len(batch.records) + len(batch.bad), bytes_in=batch.size)
        bad = list(batch.bad)
        rows = _rows_of(batch)
        for kind, function in self.rows.steps:
            if kind == "map":
                batch.records, rows, refused = await self.attempt.engine.clock.offload(
                    partial(apply_map, function, batch.records, rows, went)
                )
                bad += refused
            else:
                batch.records = await _enrich(function, batch.records)
        # The sink counts the records it was given; what it refuses is told by where they came from.
        refused_by_sink = [
            msgspec.structs.replace(found, row=rows[found.row - batch.start.row])
            for found in await writer.write(batch)
        ]
        bad += refused_by_sink
        changes = self._note(writer.changes)
        went.records_out = len(batch.records) - len(refused_by_sink)
        went.quarantined = len(bad)
        if bad:
            await _quarantine(self.attempt, split, batch.start, bad)
        counts = self.attempt.progress.counts
        counts.add(went)
        total = msgspec.structs.replace(self.state.counts)
        total.add(went)
        moved = batch.end.row > self.state.high
        self._keep(writer.resume)
        to, left = writer.unfinished
        self.state = msgspec.structs.replace(
            self.state,
            position=batch.end,
            high=max(self.state.high, batch.end.row),
            etag=split.etag,
            upload=writer.resume,
            to=to,
            left=left,
            counts=total,
            changes=changes,
        )
        await self._log(moved=moved)
        self._check_budget(counts)
        if self.attempt.near_deadline():
            raise Interrupted(f"{batch.end.row:,} rows of {redact(split.url)} are loaded so far")

    def _note(self, changes: Sequence[str]) -> tuple[str, ...]:
        """All that has been changed of the target so far, with `changes`."""
        known = self.state.changes
        for change in changes:
            self.attempt.engine.note_change(self.attempt.run, self.attempt.unit, change)
            if change not in known and len(known) < MAX_CHANGES:
                known = (*known, change)
        return known

    def _keep(self, resume: str) -> None:
        """Remember where the sink stood before this batch, if it would still be resumed there."""
        state = self.state
        if not resume or resume != state.upload:
            kept, counts = Position(), Counts()
        elif state.kept.row:
            return
        else:
            kept, counts = state.position, state.counts
        self.state = msgspec.structs.replace(state, kept=kept, kept_counts=counts)

    async def _tidy(self) -> None:
        """Leave no unfinished upload of earlier attempts to the object that the current split went into."""
        if self._to and self._begun:
            await tidy(self.attempt, await self.attempt.engine.connections.store(self._to), self._to)

    async def give_up(self) -> None:
        """Nobody will go on with what is unfinished: leave nothing of it."""
        if self._to:
            await give_up(self.attempt, self._to, self.state.left)

    async def _log(self, *, moved: bool, kind: str = events.BATCH_WRITTEN) -> None:
        self.attempt.progress.transfers[self.name] = self.state
        await self.attempt.record(kind, moved=moved)

    def _check_budget(self, counts: Counts) -> None:
        budget = self.attempt.stage.policy.error_budget
        if counts.records_in >= BUDGET_FLOOR and counts.quarantined > budget * counts.records_in:
            raise Permanent(
                f"{counts.quarantined:,} of {counts.records_in:,} records are bad, "
                f"more than the error budget of "
                f"{budget:.2%}: see the quarantine, fix the source or the map, then redrive"
            )


def _passing_over(split: Split, position: Position) -> str:
    """What is done until the first batch, for whoever has to say that it took too long."""
    if not position.offset:
        return ""
    return (
        f"the {position.offset:,} bytes of {redact(split.url)} that were loaded before were still being "
        "passed over: give it more time"
    )


def _rows_of(batch: Batch) -> list[int]:
    """The row of the source that each of the batch's records comes from."""
    unreadable = {found.row for found in batch.bad}
    rows = [row for row in range(batch.start.row, batch.end.row) if row not in unreadable]
    # A source whose rows are not its records: as good as can be told, and none lost for it.
    rows += [batch.end.row] * (len(batch.records) - len(rows))
    return rows[: len(batch.records)]


def apply_map(
    function: Mapper, records: list[Record], rows: list[int], went: Counts
) -> tuple[list[Record], list[int], list[Bad]]:
    """Each of `records`, which come from those `rows`, through `function`: those kept, their rows, and the
    bad ones; skipped and expanded ones are counted in `went`."""
    kept: list[Record] = []
    kept_rows: list[int] = []
    bad: list[Bad] = []
    for row, record in zip(rows, records, strict=True):
        try:
            result: Any = function(record)  # the user's: may be anything
        except BadRecord as error:
            bad.append(Bad(row, conceal(str(error)), repr(record)[:1000]))
            continue
        except Exception as error:
            error.add_note(f"row {row}")
            raise
        if result is None:
            went.skipped += 1
        elif isinstance(result, dict):
            kept.append(result)
            kept_rows.append(row)
        elif isinstance(result, list) and all(isinstance(item, dict) for item in result):
            went.expanded += len(result) - 1 if result else 0
            went.skipped += 0 if result else 1
            kept.extend(result)
            kept_rows.extend([row] * len(result))
        else:
            raise Permanent(
                f"map returned {type(result).__name__}: return a record, a list of records, or None"
            )
    return kept, kept_rows, bad


async def _enrich(function: Enricher, records: list[Record]) -> list[Record]:
    result: Any = await function(records)  # the user's: may be anything
    if not isinstance(result, list) or len(result) != len(records):
        raise Permanent("enrich must return a list of as many records as it was given, in the same order")
    if not all(isinstance(item, dict) for item in result):
        raise Permanent("enrich must return records, which are dicts")
    return list(result)


async def _quarantine(attempt: Attempt, split: Split, start: Position, bad: Sequence[Bad]) -> None:
    """Put bad records aside, before the batch they came with is logged; repeatable."""
    engine = attempt.engine
    folder = attempt.stage.policy.quarantine or engine.quarantine
    if not folder:
        raise Permanent(
            f"{len(bad)} of its records are bad, and this backend has no place for them: give the lane a "
            f"Policy(quarantine=...) such as s3://bucket/quarantine/ (the first one: {bad[0].reason:.200})"
        )
    url = quarantine_url(folder, attempt, split, start)
    store = await engine.connections.store(url)
    where = {"unit": attempt.unit, "url": split.url}
    if split.member:
        where["member"] = split.member
    lines = b"".join(
        events.encode_data({**where, "row": b.row, "reason": b.reason, "raw": b.raw}) + b"\n" for b in bad
    )
    owner = f"{attempt.unit}#{attempt.progress.token}"
    async with store.upload(url, owner=owner, overwrite=True) as upload:
        await upload.write(lines)
        await upload.commit()


def quarantine_url(folder: str, attempt: Attempt, split: Split, start: Position) -> str:
    """Where the bad records of one batch go: the same place however often the batch is repeated."""
    name = f"{_plain(split.id)}-{start.row:012d}.jsonl"
    return f"{folder.rstrip('/')}/{attempt.lane}/{_plain(attempt.unit)}/{name}"


def _plain(name: str) -> str:
    """A name for a folder or file that tells of `name` and is nobody else's."""
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[-60:].strip('-')}-{digest}"
