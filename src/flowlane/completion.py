"""Exact fan-in: a round of a run is completed once, when its discovery and every unit it found have ended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from flowlane import events
from flowlane.errors import VersionConflict
from flowlane.events import Event
from flowlane.lane import Completed, Unit, stream_of
from flowlane.ports import Append, Commit, Committed, Publish
from flowlane.report import read_report
from flowlane.state import Progress, failure, progress, status

if TYPE_CHECKING:
    from flowlane.engine import Engine
    from flowlane.handling import Handling


async def complete_after(engine: Engine, commit: Commit, result: Committed) -> None:
    """Complete the rounds that `commit` may have been the last of."""
    for tally in commit.tally:
        if not (tally.settled or tally.closed):
            continue
        known = result.tally
        if known is None or (tally.run, tally.round) in known:
            await complete(engine, tally.run, tally.round)


async def complete(engine: Engine, run: str, round: int) -> bool:
    """Append ``run.completed`` for `round` if all of it has ended and nobody has done so yet; whether it is
    completed."""
    if not (await engine.backend.tally(run, round)).complete:
        return False
    while True:
        head = (await engine.backend.last([run])).get(run)
        if head is None or status(head) == "open":
            return False
        now = progress(head)
        if round in now.completed:
            return True
        commit = await _completion(engine, head, now, round)
        if not isinstance(await engine.commit(commit), VersionConflict):
            engine.moved.set()
            engine.moved = asyncio.Event()
            return True


async def _completion(engine: Engine, head: Event, now: Progress, round: int) -> Commit:
    lane = engine.lanes[head.source]
    now.reason = failure(head)
    report = await read_report(engine.backend, lane, head)
    now.completed = sorted({*now.completed, round})
    now.report = report.brief()
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
    kind = lane.completed if report.outcome == "settled" else lane.failed
    handling = engine.handling(lane.name, kind)
    if handling is not None:
        told = Completed(run=head.subject, round=round, outcome=report.outcome, report=now.report)
        first = notice(engine, kind, told, own, handling)
        appends.append(Append(first.subject, 0, (first,)))
        publish.append(Publish(first, handling.queue))
    return Commit(appends, publish)


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
