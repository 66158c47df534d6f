"""Events: CloudEvents 1.0 envelopes, their JSON, and the upcasting of old payloads.

An event is a fact in one stream of the log. On every wire it is CloudEvents 1.0 structured JSON
(CloudEvents spec 1.0.2, sections 2.4 "Context attributes" and JSON format section 3); what the spec has
no attribute for is an extension, named in lower case as the spec demands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from flowlane.errors import ConfigError, Permanent

#: An event longer than this (bytes of structured JSON) is refused; bulk belongs into a store, by reference.
MAX_EVENT_BYTES: Final = 256 * 1024

#: Below this a payload makes no event too long, unless its names are absurd; encoding every event to know its
#: exact length would cost more than all the rest of a commit in memory.
SURELY_FITS: Final = MAX_EVENT_BYTES - 8192

#: How many appended events and tallies one commit may hold (DynamoDB's TransactWriteItems limit).
MAX_ACTIONS: Final = 100

Raw = msgspec.Raw

EMPTY: Final = msgspec.Raw(b"{}")

# The types of the engine's own events. A unit's first event has the type its class declares.
ATTEMPT_STARTED: Final = "attempt.started"
ATTEMPT_FAILED: Final = "attempt.failed"
ATTEMPT_CONTINUED: Final = "attempt.continued"
ATTEMPT_ALIVE: Final = "attempt.alive"
UPLOAD_OPENED: Final = "upload.opened"
SPLIT_PROVEN: Final = "split.proven"
BATCH_WRITTEN: Final = "batch.written"
STEP_DONE: Final = "step.done"
DISCOVERY_PROGRESS: Final = "discovery.progress"
UNIT_SETTLED: Final = "unit.settled"
UNIT_SKIPPED: Final = "unit.skipped"
UNIT_SUPERSEDED: Final = "unit.superseded"
UNIT_DEAD: Final = "unit.dead"
UNIT_REDRIVEN: Final = "unit.redriven"
RUN_COMPLETED: Final = "run.completed"
RUN_REDRIVEN: Final = "run.redriven"
RECORD_PARKED: Final = "record.parked"

# The types of the events in a lease's stream (``shards.leases``): facts, owed to no stage.
SHARD_TAKEN: Final = "shard.taken"
SHARD_SETTLED: Final = "shard.settled"
SHARD_HELD: Final = "shard.held"
SHARD_WANTED: Final = "shard.wanted"
SHARD_RELEASED: Final = "shard.released"
SHARD_ENDED: Final = "shard.ended"
SHARD_REWOUND: Final = "shard.rewound"

LANE_TRIGGERED: Final = "lane.triggered"
LANE_COMPLETED: Final = "lane.completed"
LANE_FAILED: Final = "lane.failed"
LANE_DEAD: Final = "lane.dead"
LANE_NOTIFY: Final = "lane.notify"


class Event(msgspec.Struct, frozen=True, tag_field="specversion", tag="1.0", omit_defaults=True, gc=False):
    """One fact: a CloudEvents 1.0 envelope.

    ``data`` is the payload: JSON bytes (``msgspec.Raw``) in the log and on wires; the typed unit in the
    event that a stage's handler is given. On the wire, what has its default is left out (a missing
    ``datacontenttype`` stands for JSON: JSON format 1.0.2, section 3.1).
    """

    id: str
    source: str  #: the lane
    type: str
    subject: str  #: the stream, i.e. the unit of work
    time: str  #: RFC 3339, UTC
    if TYPE_CHECKING:
        data: Any = EMPTY
    else:  # decoded as JSON bytes; a constructor does not look at types
        data: msgspec.Raw = EMPTY
    version: int = 0  #: extension: place in the stream, from 1
    run: str = ""  #: extension: the stream of the run that caused it
    round: int = 0  #: extension: the run's round (its count of redrives)
    cause: str = ""  #: extension: id of the event whose handling caused it
    stage: str = ""  #: extension: the stage that is owed this event (first events) or wrote it
    cut: str = ""  #: extension, first events only: the cutting policy, "rows/bytes"
    schema: int = 1  #: extension: version of the payload's schema
    traceparent: str = ""  #: extension "Distributed Tracing"
    partitionkey: str = ""  #: extension "Partitioning": the unit's group, where its stage has an order key
    datacontenttype: str = "application/json"


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Event)
_raw_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])

_TAB, _LF, _CR = b"\t\n\r"  # as numbers: those are found several times as fast in bytes

encode_data = _encoder.encode


def encode(event: Event) -> bytes:
    """`event` as structured JSON, in one line: what is below U+0020 is escaped, or left out between values.

    Raises:
        Permanent: the event is longer than ``MAX_EVENT_BYTES``.
    """
    raw = _encoder.encode(event)
    if _LF in raw or _CR in raw or _TAB in raw:  # never in a string: somebody's layout of the payload
        raw = msgspec.json.format(raw, indent=-1)
    if len(raw) > MAX_EVENT_BYTES:
        raise Permanent(
            f"event {event.type} of {event.subject} has {len(raw):,} bytes, "
            f"the limit is {MAX_EVENT_BYTES:,}: "
            "put the bulk into a store and its URL into the event"
        )
    return raw


def decode(raw: bytes | str) -> Event:
    """The event in `raw`, its payload left as JSON bytes (``msgspec.Raw``).

    Raises:
        Permanent: `raw` is not a CloudEvents 1.0 event, or is longer than ``MAX_EVENT_BYTES``.
    """
    if len(raw) > MAX_EVENT_BYTES:
        raise Permanent(f"an event of {len(raw):,} bytes was refused: the limit is {MAX_EVENT_BYTES:,}")
    try:
        fields = _raw_decoder.decode(raw)
        event = _decoder.decode(raw)
    except (ValueError, RecursionError) as error:  # of msgspec (its DecodeError) and of Unicode
        raise Permanent(f"not a CloudEvents 1.0 event: {error}") from None
    if "specversion" not in fields:  # msgspec takes a missing tag for the only one there is
        raise Permanent("not a CloudEvents 1.0 event: Object missing required field `specversion`")
    return event


class Reference(msgspec.Struct, frozen=True, tag_field="flowlane", tag="reference"):
    """Where in the log an event stands: what a queue carries for one that is too long for its messages,
    as JSON ``{"flowlane": "reference", "stream": ..., "version": ..., "id": ...}``."""

    stream: str
    version: int
    id: str


def refer(event: Event) -> Reference:
    """The reference to `event`, which must stand in the log."""
    return Reference(event.subject, event.version, event.id)


Upcaster = Callable[[Any], Any]


def upcast(
    raw: msgspec.Raw, schema: int, current: int, upcasters: dict[int, Upcaster], what: str
) -> msgspec.Raw:
    """The payload `raw`, written under `schema`, as the `current` schema has it.

    Each upcaster is pure and takes a decoded payload of version n to n + 1.

    Raises:
        Permanent: `schema` is newer than `current` (another release wrote it): the unit is parked, so
            that the newer release can take it up; nothing is guessed. Or an upcaster fails.
        ConfigError: an upcaster is missing.
    """
    if schema == current:
        return raw
    if schema > current:
        raise Permanent(
            f"{what} was written with schema {schema}, this release knows {current}: upgrade, then redrive"
        )
    for n in range(schema, current):
        if n not in upcasters:
            raise ConfigError(f"{what} has no upcaster from schema {n} to {n + 1}: add one to its class")
    n = schema
    try:
        value = msgspec.json.decode(raw)
        for n in range(schema, current):  # told below
            value = upcasters[n](value)
        return msgspec.Raw(_encoder.encode(value))
    except Exception as error:
        raise Permanent(
            f"{what}: the upcaster from schema {n} to {n + 1} failed ({type(error).__name__}: {error})"
        ) from error
