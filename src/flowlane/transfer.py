"""The transfer: split -> batches -> writer, and object -> upload; resumable, fenced, counted.

Effect before position: a batch is in the sink before the log says so, and the sink refuses to take it twice,
so a crash anywhere costs a repetition and never a record. The log's position, not the sink's, is where
reading resumes: batches in between are cut the same way again, counted, and found done by the sink.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from flowlane import events
from flowlane.deadline import Interrupted
from flowlane.errors import (
    BadRecord,
    ConfigError,
    Damaged,
    Fenced,
    Incomplete,
    Permanent,
    Retryable,
    Superseded,
    VersionConflict,
    redact,
)
from flowlane.ports import (
    Bad,
    Batch,
    Body,
    Cut,
    Enricher,
    Mapper,
    ObjectInfo,
    Record,
    Sink,
    Source,
    Split,
    Store,
    Upload,
    Writer,
)
from flowlane.state import Counts, Position, Transfer
from flowlane.streams.inflate import prove
from flowlane.streams.members import inflater

if TYPE_CHECKING:
    from flowlane.attempt import Attempt

#: Below so many records an error budget is not yet held against a unit: one bad row in ten proves nothing.
BUDGET_FLOOR = 1000


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


# --------------------------------------------------------------------------- bytes


async def copy(  # the parameters are the promise of ``Context.copy``
    attempt: Attempt,
    url: str,
    to: str,
    verify: str,
    headers: Mapping[str, str] | None,
    etag: str,
    overwrite: bool,
) -> ObjectInfo:
    """See ``ports.Context.copy``."""
    if verify not in ("content", "length"):
        raise ConfigError(f"verify={verify!r}: must be content or length")
    name = attempt.next_name("copy")
    state = attempt.transfer(name)
    if state.done:
        return ObjectInfo(to, size=state.position.offset, etag=state.etag)
    await attempt.start()
    source = await attempt.engine.connections.store(url)
    target = await attempt.engine.connections.store(to)
    landed = await _landed(attempt, target, to, state.whole)
    if landed is not None:
        _done(attempt, name, state.whole, state.etag)
        return landed
    owner = f"{attempt.unit}#{attempt.progress.token}"
    resume, position = (state.upload, state.position.offset) if state.etag else ("", 0)
    async with target.upload(
        to, owner=owner, resume=resume, position=position, overwrite=overwrite
    ) as upload:
        if upload.position != position or not position:
            state = Transfer(high=state.high)
        work = _Copy(attempt, name, state, upload, url, verify == "content")
        await work.log(events.UPLOAD_OPENED)
        try:
            await work.run(source, headers, etag)
            return await work.publish()
        except Fenced as error:
            if isinstance(error, VersionConflict) or attempt.lost:
                raise
            if work.whole and not overwrite and await target.head(to) is not None:
                raise  # another object stands there
            raise work.robbed(error) from error


class _Copy:
    """One object on its way through one upload: every block proven, counted and checksummed as it passes."""

    def __init__(
        self, attempt: Attempt, name: str, state: Transfer, upload: Upload, url: str, decode: bool
    ) -> None:
        self.attempt = attempt
        self.name = name
        self.state = state
        self.upload = upload
        self.url = url
        self.where = redact(url)
        self.prover = prove(url.partition("?")[0]) if decode else None
        self.offset = 0
        self.crc = 0
        self.whole = False  # read to its end, and proven
        self._crc32 = inflater().crc32
        self.logged_at = attempt.engine.clock.monotonic()

    async def log(self, kind: str) -> None:
        """Append the upload's state; moved on means further than any attempt before."""
        self.state = msgspec.structs.replace(self.state, upload=self.upload.id)
        self.attempt.progress.transfers[self.name] = self.state
        await self.attempt.record(kind, moved=False)
        self.logged_at = self.attempt.engine.clock.monotonic()

    async def run(self, source: Store, headers: Mapping[str, str] | None, etag: str) -> None:
        """Move the bytes into the upload, and prove them whole."""
        goal = self.state.position.offset
        if self.prover is None:
            self.offset, self.crc = goal, self.state.position.crc
        pin = self.state.etag or etag
        try:
            async with source.read(self.url, start=self.offset, etag=pin, headers=headers) as body:
                self.state = msgspec.structs.replace(self.state, etag=body.info.etag)
                if self.prover is None and not body.proven_length:
                    raise Permanent(
                        f"{self.where}: neither a length nor a checksum tells whether it is whole"
                    )
                await self._pass_on(body, goal)
            self._prove()
            self.whole = True
        except (Damaged, Permanent, ConfigError):
            await self._discard()
            raise
        except Superseded:
            await self._discard()
            if etag:
                raise
            raise Incomplete(f"{self.where} was replaced while it was being read: starting afresh") from None
        except Retryable:
            await self._keep()
            raise

    async def _pass_on(self, body: Body, goal: int) -> None:
        clock = self.attempt.engine.clock
        rhythm = float(self.attempt.stage.policy.lease) / 3
        async for block in body:
            if not self.offset:
                check_magic(self.where, block)
            cut = max(0, min(goal - self.offset, len(block)))
            if cut:  # a resumed upload holds these already; the decoder needs to see them again
                await self._digest(block[:cut])
                if self.offset == goal and self.crc != self.state.position.crc:
                    raise Superseded(f"{self.where}: its first {goal:,} bytes are not those read before")
            if cut < len(block):
                rest = block[cut:] if cut else block
                await self._digest(rest)
                await self.upload.write(rest)
            if self.offset > goal and self.attempt.near_deadline():
                await self._keep()
                raise Interrupted(f"{self.offset:,} bytes of {self.where} have landed so far")
            if clock.monotonic() - self.logged_at > rhythm:
                if self.offset > goal:
                    await self._mark()
                await self.log(events.BATCH_WRITTEN)  # on the way to the goal too: somebody is at work

    async def _digest(self, block: bytes) -> None:
        if self.prover is None:
            self.crc = self._crc32(block, self.crc)
        else:
            with self._refuted():
                self.crc = await self.attempt.engine.clock.offload(lambda: self._decode(block))
        self.offset += len(block)

    def _decode(self, block: bytes) -> int:
        assert self.prover is not None
        self.prover.feed(block)
        return self._crc32(block, self.crc)

    def _prove(self) -> None:
        if not self.offset:
            raise Damaged(f"{self.where}: the body is empty")
        if self.prover is not None:
            with self._refuted():
                self.prover.close()

    @contextmanager
    def _refuted(self) -> Iterator[None]:
        """Whatever decoding refutes cannot be built upon, and is said with where it came from."""
        try:
            yield
        except Incomplete as error:
            raise Damaged(f"{self.where}: {error}") from None

    async def _keep(self) -> None:
        """What is uploaded so far survives this attempt, if the source can be pinned to go on from there."""
        if not self.state.etag:
            await self._discard()
            return
        await self._mark()

    async def _mark(self) -> None:
        """Whoever comes next may go on from here, if the source can be pinned."""
        if not self.state.etag:
            return
        flushed = await self.upload.flush()
        if flushed == self.offset:
            position = Position(self.offset, 0, self.crc)
            if self.offset > self.state.high:
                self.attempt.note_move()
            high = max(self.state.high, self.offset)
            self.state = msgspec.structs.replace(self.state, position=position, high=high)
        self.attempt.progress.transfers[self.name] = self.state

    async def _discard(self) -> None:
        await self.upload.abort()
        self.state = Transfer(high=self.state.high)
        self.attempt.progress.transfers[self.name] = self.state

    def robbed(self, error: Fenced) -> Incomplete:
        """A former attempt, come back to life, has taken the upload over. It gets no further, since the log
        refuses it; and if it is this attempt that has been overtaken, the log refuses its next word."""
        self.state = Transfer(high=self.state.high)
        self.attempt.progress.transfers[self.name] = self.state
        return Incomplete(f"{error}: starting afresh")

    async def publish(self) -> ObjectInfo:
        """Make the object visible, whole."""
        # The log first: it refuses whoever has been overtaken, and it tells the next attempt, should this one
        # die in between, by what to know the object for its own.
        whole = Position(self.offset, 0, self.crc)
        await self._mark()
        self.state = msgspec.structs.replace(self.state, whole=whole)
        await self.log(events.BATCH_WRITTEN)
        landed = await self.upload.commit()
        _done(self.attempt, self.name, whole, self.state.etag)
        return landed


def _done(attempt: Attempt, name: str, whole: Position, etag: str) -> None:
    moved = Counts(bytes_in=whole.offset, bytes_out=whole.offset)
    attempt.progress.counts.add(moved)
    attempt.progress.transfers[name] = Transfer(position=whole, etag=etag, done=True, counts=moved)


async def _landed(attempt: Attempt, target: Store, to: str, whole: Position) -> ObjectInfo | None:
    """The object under `to`, if it is the one that an earlier attempt had proven and was about to show."""
    if not whole.offset:
        return None
    found = await target.head(to)
    if found is None or found.size not in (-1, whole.offset):
        return None
    length, crc = 0, 0
    async with target.read(to, etag=found.etag) as body:
        async for block in body:
            crc = inflater().crc32(block, crc)
            length += len(block)
    return found if (length, crc) == (whole.offset, whole.crc) else None


# --------------------------------------------------------------------------- records


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
        async for split in splits:
            number += 1
            if number > work.state.split:
                await work.run(source, sink, split)
    return await work.end()


class _Load:
    """The splits of one source on their way into one sink."""

    def __init__(self, attempt: Attempt, name: str, state: Transfer, rows: Selection, cut: Cut) -> None:
        self.attempt = attempt
        self.name = name
        self.state = state
        self.rows = rows
        self.cut = cut

    async def run(self, source: Source, sink: Sink, split: Split) -> None:
        """Load one split from where the log says it stands, and make its effect visible."""
        state = self.state
        if state.position.offset or state.position.row:
            if state.etag != split.etag:
                raise Superseded(f"{split.url} was replaced while it was being loaded")
            if not split.replayable:
                raise Permanent(
                    f"{split.url} cannot be read in the same order twice, "
                    f"and {state.position.row:,} rows of it "
                    "went out: give it a key to read by"
                )
        async with sink.open(split, self.attempt.ref, state.upload) as writer:
            stands = writer.position
            if stands is not None and stands.row < state.position.row:
                state = self._begin_again()
            async with aclosing(source.read(split, state.position, self.cut)) as batches:
                async for batch in batches:
                    await self._write(split, writer, batch)
            await writer.finish()
        self.state = msgspec.structs.replace(
            self.state,
            split=self.state.split + 1,
            position=Position(),
            high=0,
            etag="",
            upload="",
            before=self.state.counts,
        )
        await self._log(moved=True)

    def _begin_again(self) -> Transfer:
        """The sink has lost what the log counted on (an unfinished upload, say): the split from its start."""
        lost = self.state.counts.since(self.state.before)
        progress = self.attempt.progress
        progress.counts = progress.counts.since(lost)
        counts = self.state.counts.since(lost)
        self.state = msgspec.structs.replace(self.state, position=Position(), upload="", counts=counts)
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
        went.records_out = len(batch.records) - len(refused_by_sink)
        went.quarantined = len(bad)
        if bad:
            await self.attempt.engine.quarantine(self.attempt, split, batch.start, bad)
        counts = self.attempt.progress.counts
        counts.add(went)
        total = msgspec.structs.replace(self.state.counts)
        total.add(went)
        moved = batch.end.row > self.state.high
        self.state = msgspec.structs.replace(
            self.state,
            position=batch.end,
            high=max(self.state.high, batch.end.row),
            etag=split.etag,
            upload=writer.resume,
            counts=total,
        )
        await self._log(moved=moved)
        self._check_budget(counts)
        if self.attempt.near_deadline():
            raise Interrupted(f"{batch.end.row:,} rows of {split.url} are loaded so far")

    async def _log(self, *, moved: bool) -> None:
        self.attempt.progress.transfers[self.name] = self.state
        await self.attempt.record(events.BATCH_WRITTEN, moved=moved)

    def _check_budget(self, counts: Counts) -> None:
        budget = self.attempt.stage.policy.error_budget
        if counts.records_in >= BUDGET_FLOOR and counts.quarantined > budget * counts.records_in:
            raise Permanent(
                f"{counts.quarantined:,} of {counts.records_in:,} records are bad, "
                f"more than the error budget of "
                f"{budget:.2%}: see the quarantine, fix the source or the map, then redrive"
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
            bad.append(Bad(row, str(error), repr(record)[:1000]))
            continue
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


def check_magic(where: str, block: bytes) -> None:
    """Raises:
    Damaged: the body does not begin as a file of its name's kind does (an error page, say).
    """
    for suffix, magic in ((".gz", b"\x1f\x8b"), (".zst", b"\x28\xb5\x2f\xfd"), (".zip", b"PK")):
        if where.endswith(suffix) and not block.startswith(magic):
            raise Damaged(f"{where} is not a {suffix} file: it begins with {bytes(block[:40])!r}")


def quarantine_url(folder: str, attempt: Attempt, split: Split, start: Position) -> str:
    """Where the bad records of one batch go: the same place however often the batch is repeated."""
    name = f"{_plain(split.id)}-{start.row:012d}.jsonl"
    return f"{folder.rstrip('/')}/{attempt.lane}/{_plain(attempt.unit)}/{name}"


def _plain(name: str) -> str:
    """A name for a folder or file that tells of `name` and is nobody else's."""
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[-60:].strip('-')}-{digest}"
