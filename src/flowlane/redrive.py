"""Redrive: dead units back to work, in the next round of their run."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flowlane import events
from flowlane.engine import Engine
from flowlane.errors import ConfigError, VersionConflict
from flowlane.events import Event
from flowlane.ports import Append, Commit, Publish, Tally
from flowlane.state import failure, progress, status

#: Units in one round: what fits into one commit with the run's own event and the tallies.
GROUP = 40
_TRIES = 5


async def redrive(engine: Engine, lane: str, units: Sequence[str] = ()) -> list[str]:
    """Put the dead units of `lane` (all, or those named by stream) back to work; returns their streams.

    Each group of them is a new round of its run, opened by one commit: it exists whole or not at all. What
    the units had done stays done: they go on from their last position.

    Raises:
        ConfigError: a unit named is not dead.
    """
    wanted = set(units)
    by_run: dict[str, list[Event]] = {}
    async for head in engine.backend.units(lane, "dead"):
        if not wanted or head.subject in wanted:
            by_run.setdefault(head.run, []).append(head)
    missing = wanted - {head.subject for heads in by_run.values() for head in heads}
    if missing:
        raise ConfigError(f"{min(missing)} is not a dead unit of lane {lane}: `flowlane dead` lists them")
    revived: list[str] = []
    for run, heads in by_run.items():
        # A dead discovery last: once it is at work again, nobody else may append to the run's stream.
        heads.sort(key=lambda head: head.subject == run)
        for i in range(0, len(heads), GROUP):
            revived += await _open_round(engine, run, heads[i : i + GROUP])
    return revived


async def _open_round(engine: Engine, run: str, heads: list[Event]) -> list[str]:
    for _ in range(_TRIES):
        last = await engine.backend.last([run, *(head.subject for head in heads)])
        alive = [last[head.subject] for head in heads if _is_dead(last[head.subject])]
        if not alive:
            return []
        if status(last[run]) == "open":
            raise ConfigError(
                f"{run} is still discovering: redrive when that has ended (see `flowlane status`)"
            )
        commit = _round(engine, last[run], alive)
        if not isinstance(await engine.commit(commit), VersionConflict):
            return [head.subject for head in alive]
    raise ConfigError(f"{run} is being changed by somebody else all the time: try again later")


def _is_dead(head: Event) -> bool:
    """Whether a redrive may revive it; a run whose discovery died may be waiting for other rounds to end."""
    if head.subject == head.run:
        return status(head) in ("dead", "closed") and bool(failure(head))
    return status(head) == "dead"


def _round(engine: Engine, run: Event, dead: list[Event]) -> Commit:
    now = progress(run)
    now.reason = failure(run)
    number = now.opened + 1
    now.opened = number
    counted: dict[str, int] = {}
    appends: list[Append] = []
    publish: list[Publish] = []
    for head in dead:
        handling = engine.handling_of(head)
        if handling is None:
            raise ConfigError(f"{head.subject} is owed to stage {head.stage!r}, which the lane no longer has")
        revived = _revived(engine, head, number, now if head.subject == run.subject else None)
        appends.append(Append(head.subject, head.version, (revived,)))
        publish.append(Publish(revived, handling.stage.queue))
        if handling.stage.counted:
            counted[handling.stage.name] = counted.get(handling.stage.name, 0) + 1
    discovering = any(head.subject == run.subject for head in dead)
    if not discovering:
        own = _event(engine, events.RUN_REDRIVEN, run, number, msgspec.Raw(events.encode_data(now)))
        appends.insert(0, Append(run.subject, run.version, (own,)))
    tally = [Tally(run.subject, number, stage, found=n, redriven=n) for stage, n in counted.items()]
    if not discovering:
        tally.append(Tally(run.subject, number, run.stage, closed=True))
    return Commit(appends, publish, tally)


def _revived(engine: Engine, head: Event, number: int, run: object) -> Event:
    now = progress(head)
    now.attempt = now.hops = 0
    now.reason = ""
    now.tallied = now.counts
    if run is not None:
        now.opened = number
    return _event(engine, events.UNIT_REDRIVEN, head, number, msgspec.Raw(events.encode_data(now)))


def _event(engine: Engine, kind: str, head: Event, number: int, data: msgspec.Raw) -> Event:
    made = engine.event(kind, head, version=head.version + 1, data=data, cause=head.id, stage=head.stage)
    return msgspec.structs.replace(made, round=number)
