"""The oracle: what must hold of a log once everything has come to rest, whatever went wrong on the way.

It looks only at the log (and ``jobs`` at the lake and the tables), never at the engine. Each check returns
what it found violated, in words; an empty list is a pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

import msgspec

from flowlane import events
from flowlane.events import Event
from flowlane.lane import Lane
from flowlane.ports import Backend
from flowlane.state import Counts, StageTally, fold, progress, status

TERMINAL = frozenset(
    {events.UNIT_SETTLED, events.UNIT_SKIPPED, events.UNIT_SUPERSEDED, events.UNIT_DEAD},
)
_AFTER_THE_END = {events.UNIT_REDRIVEN, events.RUN_REDRIVEN, events.RUN_COMPLETED}
_COUNTERS = ("found", "settled", "dead", "skipped", "superseded", "redriven")


class Log:
    """One lane's log, read whole: ``events`` in the order in which they were committed."""

    def __init__(self, lane: Lane, history: Sequence[Event]) -> None:
        self.lane = lane
        self.events = history
        self.streams: dict[str, list[Event]] = {}
        for event in history:
            self.streams.setdefault(event.subject, []).append(event)

    @classmethod
    async def read(cls, backend: Backend, lane: Lane) -> Log:
        """All of `lane` in `backend`."""
        return cls(lane, [event async for event in backend.scan(lane.name)])

    def units(self, prefix: str = "") -> dict[str, list[Event]]:
        """The streams that stages are owed (no facts), of those whose name begins with lane and `prefix`."""
        start = f"{self.lane.name}/{prefix}"
        return {
            name: stream
            for name, stream in self.streams.items()
            if stream[0].stage and name.startswith(start)
        }

    def facts(self, kind: str) -> list[Event]:
        """Every version of the facts of type `kind`, in order."""
        return [event for event in self.events if event.type == kind and not event.stage]

    def runs(self) -> dict[str, list[Event]]:
        """The streams of runs."""
        return {name: stream for name, stream in self.units().items() if stream[0].run == name}


async def check(backend: Backend, lane: Lane) -> list[str]:
    """Everything that must hold of the log of `lane` at rest."""
    log = await Log.read(backend, lane)
    found = check_streams(log)
    if not found:  # without whole streams the rest means nothing
        found = check_ends(log) + check_tokens(log) + check_notices(log) + await check_tallies(backend, log)
    open_units = [head.subject async for head in backend.units(lane.name, "open")]
    return found + [f"{subject} is in the index of open units for ever" for subject in open_units]


def check_streams(log: Log) -> list[str]:
    """Streams are gapless, events unique, and each belongs to one run."""
    found = []
    for name, stream in log.streams.items():
        try:
            fold(stream)
        except ValueError as error:
            found.append(f"{name}: {error}")
        if stream[0].stage and len({event.run for event in stream}) > 1:
            found.append(f"{name} belongs to several runs")
    ids = Counter(event.id for event in log.events)
    return found + [f"event {name} is in the log {n} times" for name, n in ids.items() if n > 1]


def check_ends(log: Log) -> list[str]:
    """Every unit ended exactly once per round, and nothing came after; every round was completed once."""
    found = []
    for name, stream in log.units().items():
        if status(stream[-1]) in ("open", "closed"):
            found.append(f"{name} never ended: its last event is {stream[-1].type}")
        ended = False
        for event in stream:
            if event.type == events.UNIT_REDRIVEN:
                ended = False
            elif ended and event.type not in _AFTER_THE_END:
                found.append(f"{name}: {event.type} (version {event.version}) after its end")
            elif event.type in TERMINAL:
                ended = True
    for name, stream in log.runs().items():
        now = progress(stream[-1])
        done = [
            sorted({*progress(event).completed} - {*progress(before).completed})
            for before, event in pairwise(stream)
            if event.type == events.RUN_COMPLETED
        ]
        if not all(done) or sorted(chain.from_iterable(done)) != list(range(now.opened + 1)):
            found.append(f"{name}: of rounds 0 to {now.opened}, these were completed: {done}")
    return found


def check_tokens(log: Log) -> list[str]:
    """An attempt's token is the version of its first event; tokens never go back."""
    found = []
    for name, stream in log.units().items():
        token = 0
        for event in stream:
            now = progress(event).token
            if event.type == events.ATTEMPT_STARTED and now != event.version:
                found.append(f"{name}: the attempt begun by version {event.version} has token {now}")
            if now < token:
                found.append(f"{name}: token {now} after token {token}")
            token = now
    return found


def check_notices(log: Log) -> list[str]:
    """Whoever is subscribed was told once each time a run had come to rest, and once of each death."""
    found = []
    told = Counter(s[0].type for s in log.units("notice/").values())
    notified = len(log.units("notify/"))
    rests = sum(
        event.type == events.RUN_COMPLETED and status(event) in ("settled", "dead")
        for stream in log.runs().values()
        for event in stream
    )
    kinds = {stage.on for stage in log.lane.stages}
    if {events.LANE_COMPLETED, events.LANE_FAILED} <= kinds and sum(told.values()) != rests:
        found.append(f"{sum(told.values())} notices were given, and runs came to rest {rests} times")
    if events.LANE_NOTIFY in kinds and notified != rests:
        found.append(f"{notified} notices were owed to the notifier, and runs came to rest {rests} times")
    if events.LANE_DEAD in kinds:
        own = {events.LANE_COMPLETED, events.LANE_FAILED, events.LANE_DEAD, events.LANE_NOTIFY}
        deaths = sum(
            event.type == events.UNIT_DEAD and stream[0].type not in own
            for stream in log.units().values()
            for event in stream
        )
        notices = len(log.units("dead/"))
        if notices != deaths:
            found.append(f"{notices} notices were given of {deaths} deaths")
    return found


async def check_tallies(backend: Backend, log: Log) -> list[str]:
    """The counters are what counting the log again gives, by round; the records, by run."""
    found = []
    counted = {stage.name for stage in log.lane.stages if stage.counted}
    recount = _recount(log, counted)
    for run, stream in log.runs().items():
        total = Counts()
        for number in range(progress(stream[-1]).opened + 1):
            tally = await backend.tally(run, number)
            if not tally.complete:
                found.append(f"{run}, round {number} is not complete by its tally")
            for stage in sorted(counted):
                kept = tally.stages.get(stage, StageTally())
                true = recount.get((run, number, stage), StageTally())
                total.add(kept.counts)
                found += [
                    f"{run}, round {number}, stage {stage}: {name} is {getattr(kept, name)} "
                    f"in the tally and {getattr(true, name)} in the log"
                    for name in _COUNTERS
                    if getattr(kept, name) != getattr(true, name)
                ]
        units = [s for s in log.units().values() if s[0].run == run and s[0].stage in counted]
        true_counts = _sum(progress(stream[-1]).counts for stream in units if stream[0].subject != run)
        if total != true_counts:
            found.append(f"{run}: {total} in the tallies, {true_counts} in the log")
        if not total.conserved:
            found.append(f"{run}: {total} is not conserved")
    return found


def _recount(log: Log, counted: set[str]) -> dict[tuple[str, int, str], StageTally]:
    result: dict[tuple[str, int, str], StageTally] = {}
    for stream in log.units().values():
        first = stream[0]
        if first.stage not in counted:
            continue
        for event in stream:
            tally = result.setdefault((event.run, event.round, first.stage), StageTally())
            tally.found += event.version == 1 or event.type == events.UNIT_REDRIVEN
            tally.redriven += event.type == events.UNIT_REDRIVEN
            tally.settled += event.type in TERMINAL
            tally.dead += event.type == events.UNIT_DEAD
            tally.skipped += event.type == events.UNIT_SKIPPED
            tally.superseded += event.type == events.UNIT_SUPERSEDED
    return result


def _sum(parts: Iterable[Counts]) -> Counts:
    total = Counts()
    for part in parts:
        total.add(part)
    return total


def describe(log: Log, subject: str) -> str:
    """One stream, an event a line: for people who look at a violation."""
    return "\n".join(
        f"  {event.version:3} {event.time} r{event.round} {event.type:18} {_short(event)}"
        for event in log.streams.get(subject, ())
    )


def _short(event: Event) -> str:
    return bytes(msgspec.Raw(event.data))[:160].decode()
