"""Log, queue and channels: what a backend is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from flowlane.errors import VersionConflict
from flowlane.events import Event
from flowlane.state import Counts, RunTally


class Append(msgspec.Struct, frozen=True, gc=False):
    """`events` go to `stream`, whose head must have version `expected` (0: the stream must not exist)."""

    stream: str
    expected: int
    events: Sequence[Event]


#: What carries deliveries to a stage: its queue, or the channel of the same name.
Via = Literal["queue", "channel"]


class Publish(msgspec.Struct, frozen=True, gc=False):
    """`event`, appended by this commit or standing in the log, is owed to the queue of `stage`.

    ``repeat=True`` marks the sweep's reminder: a backend that knows the unit to be queued or leased still
    drops it; one that cannot know (SQS) sends it, because deliveries may repeat anyway. ``group`` is the
    value of the stage's order key (``Event.partitionkey``): what is published to one stage under one group is
    received one after the other, in this order. Printable ASCII without spaces, at most 128 characters.

    ``via="channel"``: it is put to the channel called `stage` instead, under the key ``group``, as the JSON
    of the event; along with the commit where the backend can, otherwise owed until the channel has it. A
    channel has no delays, and does not know what it holds: reminders are put again.
    """

    event: Event
    stage: str
    delay: float = 0.0
    repeat: bool = False
    group: str = ""
    via: Via = "queue"


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

    At most ``events.MAX_ACTIONS`` appended events and tallies together. ``ack`` is of a delivery of this
    backend's queues, or of another source (a channel, a payload of Lambda): that one is acked once the commit
    has been applied, and not at all if it is in conflict or nobody knows.
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
Patience = Callable[[Event], float]


class QueueSpec(msgspec.Struct, frozen=True):
    """A stage's queue as it is wanted: ``name`` is what ``Publish.stage`` says; ``lease`` and ``timeout`` are
    the stage's, in seconds; ``ordered`` if it keeps the order within groups; ``retries`` are what the log
    allows a unit, so a queue that gives messages up must deliver them more often than that; ``concurrency``
    are the deliveries that one process handles at once. ``via="channel"``: it is a channel that is wanted."""

    name: str
    lease: float
    timeout: float
    ordered: bool = False
    retries: int = 5
    concurrency: int = 8
    via: Via = "queue"


class Deployment(msgspec.Struct, frozen=True):
    """A lane as it is to be deployed: its name, the reference by which its code is found where it is, the
    seconds between its runs (0: it has no schedule), its queues, and the names of environment variables that
    its code reads."""

    lane: str
    reference: str
    every: float
    queues: Sequence[QueueSpec]
    variables: Sequence[str] = ()


@runtime_checkable
class Deployable(Protocol):
    """What a backend offers besides, if something else can make what ``Backend.create`` makes."""

    def template(self, deployment: Deployment) -> Mapping[str, Any]:
        """What that something else is to be given, as JSON. Nothing is asked for or made.

        Raises:
            ConfigError: it cannot be made as the lane wants it.
        """
        ...


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

    def units(self, lane: str, index: Index, patience: Patience | None = None) -> AsyncIterator[Event]:
        """The heads of the lane's streams that are in `index` (see ``state.index``): found without scanning
        history. May lag behind the log; never misses a stream for good.

        A sweep says its `patience`, for how many seconds (60 at least) a stream with that head may be silent.
        Those that have not been for so long may be left out then; and so may those that somebody was told of
        in this way less long ago than they had been silent by then, and less than an hour ago. A run that is
        closed never is."""
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
        again. At least once, in no particular order; but of a group (``Publish.group``) of one stage only the
        message published first of those that are not acked, and none while that one is leased or delayed.
        """
        ...

    async def given_up(self, stages: Sequence[str], limit: int) -> Sequence[Delivery]:
        """At most `limit` deliveries that the queues of `stages` stopped delivering, after as many receives
        as their ``attempt`` says (dead letters). Held for some minutes, then handed out here again, and never
        to a stage: ``ack`` removes one. Those that nobody can read are told of and stay. A queue that gives
        nothing up has none."""
        ...

    def channel(self, name: str) -> Channel:
        """The ordered channel called `name`; made when first put to."""
        ...

    async def create(self, queues: Sequence[QueueSpec]) -> Sequence[str]:
        """What the backend lacks for `queues` is there (``flowlane init``); the names of what was made now.

        Repeatable; never called at run time. An embedded backend needs nothing made.

        Raises:
            ConfigError: something of that name is there and does not fit, or may not be made.
        """
        ...

    async def resend(self, lane: str) -> int:
        """Hand to the queues what commits of `lane` owed them a while ago and may not have got to; how many
        deliveries. A queue that commits along with the log owes nothing."""
        ...

    async def purge(self) -> None:
        """Empty every queue (as an operator might, by mistake): the log is untouched, runs still complete."""
        ...


class ChannelRecord(msgspec.Struct, frozen=True):
    """`data` under `key`; ``position`` orders the records of one partition, set by the channel."""

    key: str
    data: bytes
    partition: int = 0
    position: int = 0


class ChannelBatch(Protocol):
    """Consecutive records of one partition, held by one consumer of a name at a time; unsettled ones are
    handed out again."""

    @property
    def records(self) -> Sequence[ChannelRecord]: ...

    async def settle(self, count: int | None = None) -> None:
        """The consumer's position moves past the first `count` records (all by default); never back. The hold
        on the partition ends with it. If the hold had been lost, nothing changes that another one did."""
        ...

    async def extend(self) -> bool:
        """Held from now on for as long as a batch is at first; False if the hold had been lost (it ran out,
        the consumer was rewound, or the batch is settled): then stop having effects."""
        ...


class Lag(msgspec.Struct, frozen=True):
    """How far a consumer is behind in one partition: who holds it (an opaque name; empty: nobody), the
    position up to which it is settled (0: nothing is), and what is known of the rest: how many records, how
    many seconds ago the next of them was put (``None``: not known), and whether the partition has ended."""

    partition: int
    owner: str = ""
    position: int = 0
    records: int | None = None
    seconds: float | None = None
    ended: bool = False


class Channel(Protocol):
    """Ordered, partitioned, replayable transport; at least once, order kept per key."""

    async def put(self, records: Sequence[ChannelRecord]) -> None:
        """All records are stored when this returns, those of one key in the order given.

        Raises:
            Permanent: a record is larger than the channel takes (1 MiB of data and key, unless it was made to
                take more); none was put.
            Retryable: it is not known which are stored; to put all of them again keeps the order.
        """
        ...

    def consume(self, consumer: str, *, limit: int = 500, wait: float = 0) -> AsyncIterator[ChannelBatch]:
        """Batches of at most `limit` records from `consumer`'s own position on (from the beginning for a new
        name), until none came for `wait` seconds. The next batch of a partition is handed out when the last
        one was settled; no more is read ahead than that. Several iterators under one name, of any processes,
        share the partitions; one that vanishes loses what it holds after a while."""
        ...

    async def lag(self, consumer: str) -> Sequence[Lag]:
        """How far `consumer` is, for each partition that it has begun or that has records; for people: may be
        out of date. Takes nothing, moves nothing."""
        ...

    async def rewind(self, consumer: str, positions: Mapping[int, int] | None = None) -> None:
        """`consumer` is handed again what lies behind `positions` (by partition; as its records said), or all
        that the channel still has. Whoever holds one of these partitions has lost it: what was handed out
        before settles nothing any more."""
        ...
