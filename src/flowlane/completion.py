"""Exact fan-in: a run is completed each time it comes to rest, when its discovery and every unit found, in
every round that is open, have ended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from flowlane import events
from flowlane.errors import VersionConflict
from flowlane.events import Event
from flowlane.lane import Completed, Notify, Unit, stream_of
from flowlane.ports import Append, Commit, Committed
from flowlane.report import build_report
from flowlane.state import Progress, RunTally, failure, progress, status

if TYPE_CHECKING:
    from flowlane.engine import Engine
    from flowlane.handling import Handling


async def complete_after(engine: Engine, commit: Commit, result: Committed) -> None:
    """Complete the runs that `commit` may have been the last of."""
    for tally in commit.tally:
        if not (tally.settled or tally.closed):
            continue
        key = (tally.run, tally.round)
        if result.tally is None:
            await complete(engine, *key)
        elif key in result.tally:
            await complete(engine, *key, known=result.tally[key])


async def complete(engine: Engine, run: str, round: int, *, known: RunTally | None = None) -> bool:
    """Append ``run.completed`` if `round` has ended, and every other round of `run` that is not completed
    has too; whether this call did. Otherwise whoever ends the last one does. `known`: the counters of
    `round`, where it is known to have ended.

    Raises:
        Permanent: the log refuses the event, and will again.
        Retryable: the log is away.
    """
    ended = {} if known is None else {round: known}
    if known is None and not await _has_ended(engine, run, round, ended):
        return False
    while True:
        head = (await engine.backend.last([run])).get(run)
        if head is None or status(head) != "closed":
            return False
        now = progress(head)
        if not await _have_ended(engine, run, now, ended):
            return False
        commit = await _completion(engine, head, now, ended)
        result = await engine.commit(commit)
        if isinstance(result, VersionConflict) and run not in result.heads:
            # An older release told of each round by itself: of this one while others were still at work.
            result = await engine.commit(_without(commit, result))
        if not isinstance(result, VersionConflict):
            engine.moved.set()
            engine.moved = asyncio.Event()
            return True


async def _has_ended(engine: Engine, run: str, round: int, ended: dict[int, RunTally]) -> bool:
    """Whether `round` has, which it then has for good: it is put into `ended`."""
    tally = await engine.backend.tally(run, round)
    if tally.complete:
        ended[round] = tally
    return tally.complete


async def _have_ended(engine: Engine, run: str, now: Progress, ended: dict[int, RunTally]) -> bool:
    """Whether all rounds have that are not completed. They are looked at in no order, so that of many the
    ends of each cost a few looks to find one that is at work, whichever end first."""
    completed = {*now.completed, *ended}
    left = [number for number in range(now.opened + 1) if number not in completed]
    while left:
        at = int(engine.clock.random() * len(left))
        left[at], left[-1] = left[-1], left[at]
        if not await _has_ended(engine, run, left.pop(), ended):
            return False
    return True


async def _completion(engine: Engine, head: Event, now: Progress, ended: dict[int, RunTally]) -> Commit:
    lane = engine.lanes[head.source]
    now.reason = failure(head)
    rounds = range(now.opened + 1)
    tallies = [ended.get(n) or await engine.backend.tally(head.subject, n) for n in rounds]
    report = build_report(lane, head, now, tallies)
    now.completed = list(rounds)
    now.report = report.brief()
    # An event has a limit. Of what the discovery had done, the event that ended it knows: see ``redrive``.
    now.steps, now.transfers = {}, {}
    own = msgspec.structs.replace(
        engine.event(
            events.RUN_COMPLETED,
            head,
            version=head.version + 1,
            data=msgspec.Raw(events.encode_data(now)),
            cause=head.id,
            stage=head.stage,
        ),
        round=max(now.opened, head.round),
    )
    appends = [Append(head.subject, head.version, (own,))]
    publish = []
    outcome = lane.completed if report.outcome == "settled" else lane.failed
    for kind, unit in ((outcome, Completed), (events.LANE_NOTIFY, Notify)):
        handling = engine.handling(lane.name, kind)
        if handling is not None:
            # Named by the last round: another one is opened before the run can come to rest again.
            told = unit(run=head.subject, round=now.opened, outcome=report.outcome, report=now.report)
            first = notice(engine, kind, told, own, handling)
            appends.append(Append(first.subject, 0, (first,)))
            publish.append(handling.publish(first))
    return Commit(appends, publish)


def _without(commit: Commit, known: VersionConflict) -> Commit:
    """`commit` without the notices that exist already."""
    return Commit(
        [append for append in commit.appends if append.stream not in known.heads],
        [publish for publish in commit.publish if publish.event.subject not in known.heads],
    )


def notice(engine: Engine, kind: str, unit: Unit, origin: Event, handling: Handling) -> Event:
    """The first event of a unit that tells of `origin`; its handling does not count in the run."""
    return Event(
        engine.next_id(),
        origin.source,
        kind,
        stream_of(origin.source, unit),
        engine.stamp(),
        msgspec.Raw(events.encode_data(unit)),
        1,
        origin.run,
        origin.round,
        origin.id,
        handling.name,
        handling.cut,
        1,
        origin.traceparent,
    )
