"""The ports: what the engine needs from the world, as protocols.

A backend, store, source, sink, database, notifier or secrets provider is whatever keeps the promises
written here; ``flowlane.testing`` ships the suites that check them. Lifetime is ``async with`` everywhere,
times are seconds, sizes bytes, positions and ranges half open.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import msgspec

from flowlane.clock import Clock
from flowlane.errors import VersionConflict
from flowlane.events import Event
from flowlane.state import Counts, Position, RunTally

if TYPE_CHECKING:
    from flowlane.lane import Fact

# --------------------------------------------------------------------------- log and queue


class Append(msgspec.Struct, frozen=True, gc=False):
    """`events` go to `stream`, whose head must have version `expected` (0: the stream must not exist)."""

    stream: str
    expected: int
    events: Sequence[Event]


class Publish(msgspec.Struct, frozen=True, gc=False):
    """`event`, appended by this commit or standing in the log, is owed to the queue of `stage`.

    ``repeat=True`` marks the sweep's reminder: a backend that knows the unit to be queued or leased still
    drops it; one that cannot know (SQS) sends it, because deliveries may repeat anyway.
    """

    event: Event
    stage: str
    delay: float = 0.0
    repeat: bool = False


class Tally(msgspec.Struct, frozen=True, gc=False):
    """What a commit adds to the counters of one (run, round); applied with the commit or not at all."""

    run: str
    round: int
    stage: str
    found: int = 0
    settled: int = 0
    dead: int = 0
    skipped: int = 0
    superseded: int = 0
    redriven: int = 0
    counts: Counts | None = None
    closed: bool = False


@runtime_checkable
class Delivery(Protocol):
    """One event handed to one stage, held under a lease until it is acked, nacked or the lease ends.

    ``head`` is the last event of the event's stream, read when the delivery was received (``None``: the log
    does not know the stream). ``attempt`` counts receives of this message, from 1, as far as the queue knows.
    """

    @property
    def event(self) -> Event: ...
    @property
    def stage(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def head(self) -> Event | None: ...

    async def ack(self) -> None:
        """The message is gone from the queue. A stale ack (the lease ended) does nothing."""
        ...

    async def nack(self, *, delay: float = 0) -> None:
        """The message is delivered again, not before `delay`. A stale nack does nothing."""
        ...

    async def extend(self, seconds: float) -> bool:
        """The lease ends `seconds` from now; False if it had been lost: then stop having effects."""
        ...


class Commit(msgspec.Struct, frozen=True, gc=False):
    """All that a stage decided, applied atomically or not at all.

    At most ``events.MAX_ACTIONS`` appended events and tallies together.
    """

    appends: Sequence[Append] = ()
    publish: Sequence[Publish] = ()
    tally: Sequence[Tally] = ()
    ack: Delivery | None = None


class Committed(msgspec.Struct, frozen=True, gc=False):
    """A commit that was applied. ``tally``: of the (run, round)s it counted in, those that were complete as
    of this commit or a later one, with their counters; a round that is not in it was not complete then.
    ``None``: the backend does not say, ask ``Backend.tally``."""

    tally: Mapping[tuple[str, int], RunTally] | None = None


Index = Literal["open", "dead"]


class Backend(Protocol):
    """A log and a queue that commit together, and channels. Opened by URI, closed by leaving its context.

    Safe for use by many tasks, and by as many processes as the URI can be opened by.
    """

    @property
    def exact_queue(self) -> bool:
        """Whether the queue knows what it holds, and so drops a repeated publish (``Publish.repeat``)."""
        ...

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        """Apply each commit atomically, in order; one answer for each.

        A commit in conflict changes nothing and does not keep the others from being applied. When this
        raises (or is cancelled), any of them may or may not have been applied: re-read the stream and look
        for your own event's id. A stale ack inside a commit is ignored, the commit stands.

        Raises:
            Permanent: a commit holds more than ``MAX_ACTIONS`` actions; none was applied.
            Retryable: the store cannot be reached or did not answer.
        """
        ...

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        """The last event of each stream that exists; consistent with every commit answered before."""
        ...

    def read(self, stream: str, *, after: int = 0) -> AsyncIterator[Event]:
        """The events of `stream` with a version greater than `after`, in order."""
        ...

    def scan(self, lane: str, *, run: str | None = None) -> AsyncIterator[Event]:
        """Every event of `lane` (of one `run` of it), each stream's in order; for people, not decisions."""
        ...

    def units(self, lane: str, index: Index) -> AsyncIterator[Event]:
        """The heads of the lane's streams that are in `index` (see ``state.index``): found without scanning
        history. May lag behind the log; never misses a stream for good."""
        ...

    async def runs(self, lane: str, limit: int) -> Sequence[Event]:
        """The heads of the last `limit` runs of `lane`, in the order in which they were triggered; found
        without scanning history. For people: may lag behind the log."""
        ...

    async def tally(self, run: str, round: int) -> RunTally:
        """The counters of one (run, round), read in the order closed, settled, found, each consistently: if
        they say that all is settled, it is."""
        ...

    async def receive(
        self, stages: Sequence[str], limit: int, *, lease: float, wait: float = 0
    ) -> Sequence[Delivery]:
        """At most `limit` deliveries that are due, of any of `stages`, each leased for `lease` seconds.

        Waits up to `wait` seconds for the first one. What is not settled within its lease is delivered
        again. At least once, in no particular order.
        """
        ...

    def channel(self, name: str) -> Channel:
        """The ordered channel called `name`; made when first put to."""
        ...

    async def purge(self) -> None:
        """Empty every queue (as an operator might, by mistake): the log is untouched, runs still complete."""
        ...


# --------------------------------------------------------------------------- channel


class ChannelRecord(msgspec.Struct, frozen=True):
    """`data` under `key`; ``position`` orders the records of one partition, set by the channel."""

    key: str
    data: bytes
    partition: int = 0
    position: int = 0


class ChannelBatch(Protocol):
    """Consecutive records of one partition; unsettled ones are handed out again."""

    @property
    def records(self) -> Sequence[ChannelRecord]: ...

    async def settle(self, count: int | None = None) -> None:
        """The consumer's position moves past the first `count` records (all by default); never back."""
        ...


class Channel(Protocol):
    """Ordered, partitioned, replayable transport; at least once, order kept per key."""

    async def put(self, records: Sequence[ChannelRecord]) -> None:
        """All records are stored when this returns, those of one key in the order given."""
        ...

    def consume(self, consumer: str, *, limit: int = 500, wait: float = 0) -> AsyncIterator[ChannelBatch]:
        """Batches from `consumer`'s own position on (from the beginning for a new name), until none came
        for `wait` seconds. The next batch of a partition is handed out when the last one was settled."""
        ...


# --------------------------------------------------------------------------- bytes


class ObjectInfo(msgspec.Struct, frozen=True):
    """An object as a store describes it. ``size`` is -1 where the store does not say; ``etag`` is empty
    where there is none that pins the content (a weak one pins nothing and is not given)."""

    url: str
    size: int = -1
    etag: str = ""
    modified: str = ""
    content_type: str = ""


class Body(Protocol):
    """The bytes of an object (or a range), streamed; iterate once."""

    @property
    def info(self) -> ObjectInfo:
        """The whole object's description, as the answer itself gave it."""
        ...

    @property
    def proven_length(self) -> bool:
        """Whether the transport itself tells a whole body from a cut one (a length, or chunking)."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Non-empty blocks of at most about 1 MiB.

        Raises (while iterating):
            Incomplete: the body ended before its end, and could not be taken up where it ended.
            Superseded: the object was replaced meanwhile.
        """
        ...


class Upload(Protocol):
    """One object being written; nobody can see it before ``commit`` returns.

    ``id`` names the unfinished upload, so that another process can take it up (``Store.upload(resume=)``);
    ``position`` counts the bytes that are safely in it. Leaving the context without a commit keeps what
    ``position`` counts, for a later attempt; ``abort`` discards it.
    """

    @property
    def id(self) -> str: ...
    @property
    def position(self) -> int: ...

    async def write(self, block: bytes) -> None:
        """`block` follows what was written so far; counted by ``position`` now or after ``flush``."""
        ...

    async def flush(self) -> int:
        """Everything written survives the death of this process; returns ``position``."""
        ...

    async def commit(self) -> ObjectInfo:
        """The object appears, whole, under its URL.

        With ``overwrite=False`` an object that stands there already wins: if its bytes are the same this is
        success (an earlier attempt got through), otherwise

        Raises:
            Fenced: another object stands there; nothing was changed.
        """
        ...

    async def abort(self) -> None:
        """The unfinished upload and all it took up are gone. Aborting twice is fine."""
        ...


class Store(Protocol):
    """Where bytes live, by URL."""

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """The object's description; ``None`` if the store says for certain that there is none.

        Raises:
            Retryable: the store did not say (5xx, throttling, no connection).
            Permanent: the store refuses (401, 403, ...).
        """
        ...

    def list(self, url: str) -> AsyncIterator[ObjectInfo]:
        """The objects that match `url`, whose last segments may hold ``* ? [...] **``, in order of URL."""
        ...

    def read(
        self,
        url: str,
        *,
        start: int = 0,
        end: int | None = None,
        etag: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Body]:
        """The bytes [start, end) of the object, pinned to `etag` where one is given.

        Raises (on entering or while iterating):
            Superseded: the object's ETag is another one.
            Incomplete: there is no such object (any more), or its body is cut.
            Retryable, Permanent: as for ``head``.
        """
        ...

    def upload(
        self, url: str, *, owner: str, resume: str = "", position: int = 0, overwrite: bool = False
    ) -> AbstractAsyncContextManager[Upload]:
        """A new upload to `url`, or the unfinished one named `resume`, taken up at exactly `position` (what
        it holds beyond is dropped); a fresh one, at 0, if it is gone or holds less than that.

        `owner` names the attempt (unit and token): no two owners ever share an upload's bytes, so whoever
        resumes takes the bytes over under its own name, and the former owner's writes and commit are refused.

        Raises:
            Permanent, Retryable, ConfigError: the target cannot be written.
        """
        ...


# --------------------------------------------------------------------------- records


Record = dict[str, Any]


class Bad(msgspec.Struct, frozen=True):
    """A record that could not be read or was refused: where it was, what was wrong, what it looked like."""

    row: int
    reason: str
    raw: str


class Split(msgspec.Struct, frozen=True):
    """A piece of a source, read in the same order every time while ``replayable``."""

    id: str
    url: str
    etag: str = ""
    size: int = -1
    replayable: bool = True
    first: str = ""
    last: str = ""


class Cut(msgspec.Struct, frozen=True):
    """The cutting policy: a batch ends at `rows` records or `size` decoded bytes, whichever comes first.
    Written into a unit's first event, so that no later release cuts an old unit otherwise."""

    rows: int = 10_000
    size: int = 8 << 20

    def __str__(self) -> str:
        return f"{self.rows}/{self.size}"

    @classmethod
    def parse(cls, text: str) -> Cut:
        """The inverse of ``str``; the default policy for an empty text."""
        if not text:
            return cls()
        rows, _, size = text.partition("/")
        return cls(int(rows), int(size))


class Batch(msgspec.Struct):
    """Consecutive records of one split: [start, end) in source coordinates, and what was unreadable there."""

    records: list[Record]
    start: Position
    end: Position
    bad: list[Bad]
    size: int = 0  #: bytes read from the source for it, as stored there


class Source(Protocol):
    """Where records come from; opened by URI."""

    def splits(self) -> AsyncGenerator[Split]:
        """The pieces, in the same order while the source is unchanged."""
        ...

    def read(self, split: Split, position: Position, cut: Cut) -> AsyncGenerator[Batch]:
        """The batches of `split` from `position` on (``Position()``: the beginning), cut by `cut` alone: the
        same batches every time.

        Raises:
            Incomplete: the split cannot be proven to have been read whole.
            Permanent: nothing could ever prove it (neither length nor checksum).
            Superseded: it is no longer what was listed.
        """
        ...


class UnitRef(msgspec.Struct, frozen=True):
    """Who writes: the unit's stream, its generation among units of one target, the attempt's token."""

    stream: str
    token: int
    generation: int = 0


class TableSpec(msgspec.Struct, frozen=True):
    """The table wanted: its name, key columns, and how rows meet what is there."""

    name: str
    key: tuple[str, ...] = ()
    mode: Literal["append", "upsert"] = "append"
    schema: Literal["evolve", "freeze", "quarantine"] = "evolve"


class Writer(Protocol):
    """One unit's way into one target, under one token."""

    @property
    def position(self) -> Position | None:
        """Where the sink itself says this unit's split stands; ``None`` where only the log knows.

        Less than the log knows of means that what had been written is gone: the split begins again."""
        ...

    @property
    def resume(self) -> str:
        """What ``Sink.open`` is given to go on behind the last batch written; empty if it needs nothing."""
        ...

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """The batch's records are in the target, once: a batch that ends at or before ``position`` changes
        nothing. Returns the records that the target refuses, which were left out.

        Raises:
            Fenced: a later token or generation has taken over; nothing was written.
        """
        ...

    async def finish(self) -> None:
        """The split is whole: make the effect visible where it is not yet. Repeatable."""
        ...


class Sink(Protocol):
    """Where records go; opened by URI."""

    def open(self, split: Split, unit: UnitRef, resume: str = "") -> AbstractAsyncContextManager[Writer]: ...


class Database(Protocol):
    """Where SQL runs."""

    def transaction(self) -> AbstractAsyncContextManager[Any]: ...
    async def ensure(self, spec: TableSpec) -> None: ...


class Notifier(Protocol):
    """Tells people; at least once."""

    async def send(self, subject: str, text: str, *, idempotency_key: str) -> None: ...


class Secrets(Protocol):
    """Resolves the references of one scheme."""

    async def get(self, reference: str) -> str:
        """The secret's value.

        Raises:
            ConfigError: there is none of that name; the message names the reference, never a value.
        """
        ...


class Connections(Protocol):
    """Opens by URI what lanes read from and write to; owns what it opened and closes it in the end."""

    async def store(self, url: str) -> Store: ...
    def source(self, url: str, options: Mapping[str, Any]) -> AbstractAsyncContextManager[Source]: ...
    def sink(self, url: str, options: Mapping[str, Any]) -> AbstractAsyncContextManager[Sink]: ...
    def notifier(self, url: str) -> AbstractAsyncContextManager[Notifier]: ...
    async def secret(self, reference: str) -> str: ...


class Environment(msgspec.Struct):
    """What a plugin's factory is given besides its URI and options.

    A factory is ``factory(uri, environment, *, option=..., ...)`` and returns an async context manager that
    yields the port; its keyword-only parameters are the options that the URI's query may set (as strings).
    """

    clock: Clock
    connections: Connections
    allow_private_hosts: bool = False


# --------------------------------------------------------------------------- what a handler is given

F = TypeVar("F", bound="Fact")
Mapper = Callable[[Record], "Record | list[Record] | None"]
Enricher = Callable[[list[Record]], Awaitable[list[Record]]]


class Rows(Protocol):
    """Records on their way from a source to ``Context.load``; nothing is read before that."""

    def map(self, function: Mapper) -> Rows:
        """Each record through a pure `function`: to a record, a list (expanded), or None (skipped).
        ``raise BadRecord(reason)`` sends the record to quarantine."""
        ...

    def enrich(self, function: Enricher) -> Rows:
        """Each batch through an async `function`, which returns as many records in the same order."""
        ...


class Context(Protocol):
    """What a stage may do to the world, so that it is logged, fenced, resumed and counted.

    Effects are named by their order in the handler, or by name, and found in the log again when the unit is
    handled once more: what was done is not done twice.
    """

    @property
    def lane(self) -> str: ...
    @property
    def run(self) -> str:
        """The stream of the run."""
        ...

    @property
    def unit(self) -> str:
        """The stream of the unit being handled."""
        ...

    def now(self) -> datetime:
        """The wall clock, in UTC."""
        ...

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """As ``Store.head``."""
        ...

    def list(self, url: str) -> AsyncIterator[ObjectInfo]:
        """As ``Store.list``."""
        ...

    async def recall(self, fact: type[F], **key: Any) -> F | None:
        """The last fact of its stream; yielding a newer one is refused if another one came in between."""
        ...

    def rows(self, url: str, **options: Any) -> Rows:
        """The records of the source at `url`."""
        ...

    async def load(self, rows: Rows, *, to: str, **options: Any) -> Counts:
        """Write `rows` to the sink `to`, in batches, resumed from the log.

        Raises:
            Permanent: the unit's error budget is spent, or the sink refuses for good.
            Retryable: anything that may pass.
        """
        ...

    async def copy(
        self,
        url: str,
        *,
        to: str,
        verify: Literal["content", "length"] = "content",
        headers: Mapping[str, str] | None = None,
        etag: str = "",
        overwrite: bool = False,
    ) -> ObjectInfo:
        """The object at `url` lands under `to`, its bytes untouched, whole and proven, or not at all.

        ``verify="content"`` decodes a ``.gz`` or ``.zst`` on the way through and demands its proper end.

        Raises:
            Incomplete: the body is cut or is not what its name says.
            Superseded: `etag` was given and the object has another one now.
        """
        ...

    async def step(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """``await function(*args)``, once it has been logged not again; its (JSON) result is in the log.

        At least once: a crash between the call and the log repeats it, with the same ``idempotency_key``,
        which is passed as a keyword if `function` takes one.
        """
        ...

    async def secret(self, reference: str) -> str:
        """The secret that `reference` (``env://NAME``, ``secretsmanager://name``) names."""
        ...

    @property
    def attempts_left(self) -> int:
        """Attempts that the policy still allows after this one."""
        ...

    def skip(self, reason: str) -> None:
        """The unit ends as skipped rather than settled."""
        ...
