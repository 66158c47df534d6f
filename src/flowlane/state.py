"""State as a fold: pure functions over events, without clock, chance or I/O.

Every event that the engine appends to a unit's stream carries the unit's cumulative ``Progress``, so the
state of a unit is its last event: one read resumes it anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from flowlane import events
from flowlane.events import Event

Status = Literal["open", "closed", "settled", "skipped", "superseded", "dead"]


class Counts(msgspec.Struct, omit_defaults=True, gc=False):
    """Records and bytes that went through. Conserved: in + expanded = out + skipped + quarantined."""

    records_in: int = 0
    expanded: int = 0
    records_out: int = 0
    skipped: int = 0
    quarantined: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def add(self, other: Counts) -> None:
        """Add `other` to this one."""
        self.records_in += other.records_in
        self.expanded += other.expanded
        self.records_out += other.records_out
        self.skipped += other.skipped
        self.quarantined += other.quarantined
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out

    def since(self, earlier: Counts) -> Counts:
        """What has been added to `earlier` to make this one."""
        return Counts(
            self.records_in - earlier.records_in,
            self.expanded - earlier.expanded,
            self.records_out - earlier.records_out,
            self.skipped - earlier.skipped,
            self.quarantined - earlier.quarantined,
            self.bytes_in - earlier.bytes_in,
            self.bytes_out - earlier.bytes_out,
        )

    @property
    def conserved(self) -> bool:
        """Whether every record that came in is accounted for."""
        return self.records_in + self.expanded == self.records_out + self.skipped + self.quarantined


class Position(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A place in a split: decoded bytes before it, records before it, CRC-32 of those bytes.

    Skipping to it costs inflating, not parsing; the CRC tells whether the bytes skipped are the same ones.
    """

    offset: int = 0
    row: int = 0
    crc: int = 0


class Transfer(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far one ``load`` or ``copy`` of a unit has come; ``done`` once its effect is visible."""

    split: int = 0
    position: Position = Position()
    high: int = 0  #: the furthest offset (loads: row) ever reached: moving on means passing it
    etag: str = ""
    upload: str = ""  #: what names the unfinished effect in the sink or store
    to: str = ""  #: the URL that the unfinished upload is to
    left: str = ""  #: loads: what names that upload in its store
    whole: Position = Position()  #: copies: the length and CRC of the proven object, once it may be visible
    done: bool = False
    counts: Counts = msgspec.field(default_factory=Counts)
    before: Counts = msgspec.field(default_factory=Counts)  #: loads: what the splits already done had come to
    standing: str = (
        ""  #: copies: the ETag of the object that stands there, compared with ``whole`` up to ``kept``
    )
    #: loads: where a sink stands that has not made safe what was written since
    kept: Position = Position()
    kept_counts: Counts = msgspec.field(default_factory=Counts)  #: loads: the counts at ``kept``
    proven: str = ""  #: loads: the ETag under which the current split was proven whole
    changes: tuple[str, ...] = ()  #: loads: what was changed of the target beyond rows


class Progress(msgspec.Struct, omit_defaults=True):
    """The cumulative state that each of the engine's events carries.

    ``attempt`` counts the attempts begun since the unit last moved, ``hops`` the continuations; ``token``
    is the version of the ``attempt.started`` in force.
    """

    attempt: int = 0
    token: int = 0
    hops: int = 0
    children: int = 0
    counts: Counts = msgspec.field(default_factory=Counts)
    steps: dict[str, Any] = msgspec.field(default_factory=dict)
    transfers: dict[str, Transfer] = msgspec.field(default_factory=dict)
    reason: str = ""
    delay: float = 0.0
    tallied: Counts | None = None  #: what earlier rounds have counted already
    opened: int = 0  #: run streams: the highest round opened
    completed: list[int] = msgspec.field(default_factory=list)  #: run streams: the rounds completed
    report: dict[str, Any] = msgspec.field(default_factory=dict)


_decoder = msgspec.json.Decoder(Progress)

_STATUS: dict[str, Status] = {
    events.UNIT_SETTLED: "settled",
    events.UNIT_SKIPPED: "skipped",
    events.UNIT_SUPERSEDED: "superseded",
    events.UNIT_DEAD: "dead",
    events.RECORD_PARKED: "dead",
}
_ENGINE = frozenset(
    {
        events.ATTEMPT_STARTED,
        events.ATTEMPT_FAILED,
        events.ATTEMPT_CONTINUED,
        events.ATTEMPT_ALIVE,
        events.UPLOAD_OPENED,
        events.SPLIT_PROVEN,
        events.BATCH_WRITTEN,
        events.STEP_DONE,
        events.DISCOVERY_PROGRESS,
        events.UNIT_SETTLED,
        events.UNIT_SKIPPED,
        events.UNIT_SUPERSEDED,
        events.UNIT_DEAD,
        events.UNIT_REDRIVEN,
        events.RUN_COMPLETED,
        events.RUN_REDRIVEN,
        events.RECORD_PARKED,
    }
)


def progress(head: Event) -> Progress:
    """The state of the unit whose last event is `head`."""
    if head.type in _ENGINE:
        return _decoder.decode(head.data)
    return Progress()


def status(head: Event) -> Status:
    """What has become of the unit whose last event is `head`.

    A run is ``closed`` once its discovery has ended, whichever way, and settled (or dead, if its discovery
    died) once every unit it found, in every round, has ended too.
    """
    known = _STATUS.get(head.type)
    if head.subject == head.run:
        if known is not None or head.type == events.RUN_REDRIVEN:
            return "closed"
        if head.type == events.RUN_COMPLETED:
            now = progress(head)
            if len(now.completed) <= now.opened:
                return "closed"
            return "dead" if now.reason else "settled"
    return known or "open"


def failure(head: Event) -> str:
    """Why the discovery of the run whose last event is `head` died; empty if it did not. One that was skipped
    has a reason too, which is none for the run to have failed."""
    return "" if head.type == events.UNIT_SKIPPED else progress(head).reason


def index(head: Event) -> Literal["open", "dead"] | None:
    """Which index of the log the stream of `head` belongs into: ``open`` while somebody still owes it work,
    ``dead`` while it waits for a redrive, none otherwise. Facts (which no stage is owed) are in none."""
    now = _STATUS.get(head.type)
    if now is None and head.type != events.RUN_COMPLETED:
        return "open" if head.stage else None
    if now is None or head.subject == head.run:
        now = status(head)
    return "open" if now == "closed" else "dead" if now == "dead" else None


def fold(stream: Iterable[Event]) -> tuple[Status, Progress]:
    """The state that the events of one stream, in order, add up to; equal to that of its last event.

    Raises:
        ValueError: the events are not one stream's, in order and without a gap.
    """
    head: Event | None = None
    for event in stream:
        if event.version != (head.version if head else 0) + 1 or (head and event.subject != head.subject):
            raise ValueError(f"not one stream in order at {event.subject} version {event.version}")
        head = event
    if head is None:
        raise ValueError("an empty stream has no state")
    return status(head), progress(head)


class StageTally(msgspec.Struct, omit_defaults=True, gc=False):
    """The counters of one stage in one round of a run; units, and what went through them."""

    found: int = 0
    settled: int = 0
    dead: int = 0
    skipped: int = 0
    superseded: int = 0
    redriven: int = 0
    counts: Counts = msgspec.field(default_factory=Counts)

    def add(self, other: StageTally) -> None:
        """Add `other` to this one."""
        self.found += other.found
        self.settled += other.settled
        self.dead += other.dead
        self.skipped += other.skipped
        self.superseded += other.superseded
        self.redriven += other.redriven
        self.counts.add(other.counts)


class RunTally(msgspec.Struct):
    """The counters of one (run, round)."""

    closed: bool = False
    stages: dict[str, StageTally] = msgspec.field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether discovery has ended and every unit found has a terminal event."""
        return self.closed and all(s.found == s.settled for s in self.stages.values())
