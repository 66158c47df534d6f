"""Redrive: dead units back to work, in the next rounds of their run."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec

from flowlane import events
from flowlane.engine import Engine
from flowlane.errors import ConfigError, Permanent, Retryable, VersionConflict
from flowlane.events import Event
from flowlane.ports import Append, Backend, Commit, Publish, Tally
from flowlane.state import Progress, failure, progress, status

logger = logging.getLogger("flowlane")

#: Units in one round: what fits into one commit with the run's own event and the tallies.
GROUP = 40
_TRIES = 5


class Redriven(list[str]):
    """The streams of the units put back to work. ``skipped``: the runs, or units, that were left as they
    are, by stream, each with the reason and what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, str] = {}


async def dead_units(backend: Backend, lane: str) -> AsyncIterator[Event]:
    """The last events of what a redrive of `lane` may put back to work.

    A discovery that died is among them while units that it found are still at work, though the log has its
    run among the open ones then.
    """
    early: set[str] = set()
    async for head in backend.units(lane, "open"):
        if head.subject == head.run and _is_dead(head):
            early.add(head.subject)
            yield head
    async for head in backend.units(lane, "dead"):
        if head.subject not in early and head.type != events.RECORD_PARKED:
            yield head


async def redrive(engine: Engine, lane: str, units: Sequence[str] = ()) -> Redriven:
    """Put the dead units of `lane` (all, or those named by stream) back to work; returns their streams.

    Each group of them is a new round of its run, opened by one commit: it exists whole or not at all. What
    the units had done stays done: they go on from their last position. All rounds of a run are opened before
    the units of the first go to work, so that the run comes to rest, and is told of, once; if that is cut
    short, the sweep queues the units of the rounds that were opened.

    Units of one run come in the order in which they died, which is that of their order key where their stage
    has one. Notices (which do not count in their run) are put back without a round. What cannot be put back
    now is ``skipped`` with its reason, and the rest goes on.

    Raises:
        ConfigError: a unit named is not dead; nothing was put back.
        Retryable: the log is away; see ``flowlane dead`` for what is left to put back.
    """
    wanted = set(units)
    found = [head async for head in dead_units(engine.backend, lane) if not wanted or head.subject in wanted]
    by_run: dict[str, list[Event]] = {}
    for head in sorted(found, key=lambda head: head.time):
        by_run.setdefault(head.run, []).append(head)
    missing = wanted - {head.subject for head in found}
    for stream, head in (await engine.backend.last(sorted(missing))).items():
        if head.type == events.RECORD_PARKED:
            raise ConfigError(
                f"{stream} is a record of channel {lane}/{head.stage} that was passed over, and no unit: it "
                "cannot be redriven; put it right where it came from, and have it put again"
            )
    if missing:
        raise ConfigError(f"{min(missing)} is not a dead unit of lane {lane}: `flowlane dead` lists them")
    done = Redriven()
    for run, heads in by_run.items():
        await _redrive_run(engine, run, heads, done)
    return done


async def _redrive_run(engine: Engine, run: str, heads: list[Event], done: Redriven) -> None:
    notices: list[Event] = []
    counted: list[Event] = []
    for head in heads:
        handling = engine.handling_of(head)
        if handling is None:
            done.skipped[head.subject] = (
                f"{head.subject} is owed to stage {head.stage!r}, which the lane no longer has: "
                f"let a stage have that name (name={head.stage!r})"
            )
        elif handling.counted or head.subject == run:
            counted.append(head)
        else:
            notices.append(head)
    # A dead discovery last: once it is at work again, nobody else may append to the run's stream.
    counted.sort(key=lambda head: head.subject == run)
    owed: list[Publish] = []
    try:
        for i in range(0, len(notices), GROUP):
            put = await _put_back(engine, run, notices[i : i + GROUP], _without_a_round)
            done += [each.event.subject for each in put]
        alone = len(counted) <= GROUP  # otherwise the last would be queued before the first
        for i in range(0, len(counted), GROUP):
            put = await _put_back(engine, run, counted[i : i + GROUP], _round, publish=alone)
            done += [each.event.subject for each in put]
            owed += () if alone else put
    except (ConfigError, Permanent) as error:
        done.skipped[run] = str(error)
    await _publish(engine, owed)


async def _publish(engine: Engine, owed: list[Publish]) -> None:
    for i in range(0, len(owed), GROUP):
        try:
            await engine.commit(Commit(publish=owed[i : i + GROUP]))
        except Retryable as error:
            logger.warning("units put back are not queued yet, the next sweep does that: %s", error)
            return


_Decide = Callable[[Engine, Event, list[Event]], Awaitable[Commit]]


async def _put_back(
    engine: Engine, run: str, heads: list[Event], decide: _Decide, *, publish: bool = True
) -> Sequence[Publish]:
    """Commit what `decide` makes of those of `heads` that are dead still; what their queues are owed for
    it, which is published along with it if `publish`."""
    for _ in range(_TRIES):
        last = await engine.backend.last([run, *(head.subject for head in heads)])
        dead = [last[head.subject] for head in heads if _is_dead(last[head.subject])]
        if not dead:
            return ()
        commit = await decide(engine, last[run], dead)
        owed = commit.publish
        if not publish:
            commit = msgspec.structs.replace(commit, publish=())
        if not isinstance(await engine.commit(commit), VersionConflict):
            return owed
    raise ConfigError(f"{run} is being changed by somebody else all the time: try again later")


def _is_dead(head: Event) -> bool:
    """Whether a redrive may revive it; a run whose discovery died may be waiting for other rounds to end."""
    if head.subject == head.run:
        return status(head) in ("dead", "closed") and bool(failure(head))
    return status(head) == "dead"


async def _without_a_round(engine: Engine, run: Event, dead: list[Event]) -> Commit:
    """Notices do not count in their run: it stays as complete as it is."""
    revived = [_revived(engine, head, progress(head), head.round) for head in dead]
    return Commit(
        [Append(event.subject, event.version - 1, (event,)) for event in revived],
        [_owed(engine, event) for event in revived],
    )


async def _round(engine: Engine, run: Event, dead: list[Event]) -> Commit:
    if status(run) == "open":
        raise ConfigError(
            f"{run.subject} is still discovering: redrive when that has ended (see `flowlane status`)"
        )
    now = progress(run)
    now.reason = failure(run)
    now.opened = number = now.opened + 1
    now.steps, now.transfers, now.report = {}, {}, {}  # as ``run.completed``: the event has a limit
    appends: list[Append] = []
    counted: dict[str, int] = {}
    discovering = False
    for head in dead:
        if head.subject == run.subject:
            discovering = True
            died = progress(await _death(engine, run))
            # Not of the death: what has become of the run since.
            died.opened, died.completed = number, now.completed
            revived = _revived(engine, head, died, number)
        else:
            revived = _revived(engine, head, progress(head), number)
            counted[head.stage] = counted.get(head.stage, 0) + 1
        appends.append(Append(head.subject, head.version, (revived,)))
    publish = [_owed(engine, append.events[0]) for append in appends]
    tally = [Tally(run.subject, number, stage, found=n, redriven=n) for stage, n in counted.items()]
    if not discovering:
        own = _event(engine, events.RUN_REDRIVEN, run, number, now)
        appends.insert(0, Append(run.subject, run.version, (own,)))
        tally.append(Tally(run.subject, number, run.stage, closed=True))
    return Commit(appends, publish, tally)


async def _death(engine: Engine, run: Event) -> Event:
    """The event with which the discovery of `run` died: it has the steps to go on from, which those of the
    run's rounds leave out."""
    if run.type == events.UNIT_DEAD:
        return run
    death = run
    async for event in engine.backend.read(run.subject):
        if event.type == events.UNIT_DEAD:
            death = event
    return death


def _revived(engine: Engine, head: Event, now: Progress, number: int) -> Event:
    now.attempt = now.hops = 0
    now.reason = ""
    now.tallied = now.counts
    return _event(engine, events.UNIT_REDRIVEN, head, number, now)


def _owed(engine: Engine, revived: Event) -> Publish:
    handling = engine.handling_of(revived)
    assert handling is not None, "what no stage handles was skipped"
    return handling.publish(revived)


def _event(engine: Engine, kind: str, head: Event, number: int, now: Progress) -> Event:
    data = msgspec.Raw(events.encode_data(now))
    made = engine.event(kind, head, version=head.version + 1, data=data, cause=head.id, stage=head.stage)
    return msgspec.structs.replace(made, round=number)
