"""``flowlane dead``, ``redrive`` and ``sweep``: what waits, and putting it back to work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from flowlane.cli.screen import Screen
from flowlane.cli.session import FAILED, Answer, Session
from flowlane.cli.text import plural
from flowlane.compose import open_application
from flowlane.lane import Lane
from flowlane.parking import parked_records
from flowlane.redrive import dead_units, redrive
from flowlane.state import progress
from flowlane.sweep import sweep


async def show_dead(session: Session, lane: Lane, limit: int) -> Answer:
    """The dead units of `lane`, at most `limit` of them by name, and the records that were passed over."""
    count = passed_over = 0
    listed: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    async with open_application([lane], session.settings) as app:
        async for head in dead_units(app.backend, lane.name):
            count += 1
            if len(listed) < limit:
                now = progress(head)
                listed.append(
                    {
                        "unit": head.subject,
                        "stage": head.stage,
                        "attempts": max(1, now.attempt),
                        "time": head.time,
                        "run": head.run,
                        "reason": now.reason,
                    }
                )
        async for head, record in parked_records(app.backend, lane.name):
            passed_over += 1
            if len(records) < limit:
                known = {"record": head.subject, "stage": head.stage, "time": head.time}
                records.append({**known, **msgspec.structs.asdict(record)})

    def show(screen: Screen) -> None:
        if listed:
            names = ("unit", "stage", "attempts", "reason")
            screen.table(names, [[unit[name] for name in names] for unit in listed])
        if count > len(listed):
            screen.line(f"and {plural(count - len(listed), 'unit')} more; --limit lists them")
        if not count:
            screen.line(f"lane {lane.name} has no dead units")
        if records:
            screen.line()
            screen.line(f"{plural(passed_over, 'record')} of channels passed over")
            columns = ("record", "bytes", "reason")
            screen.table(columns, [[record[name] for name in columns] for record in records])

    document = {"lane": lane.name, "count": count, "dead": listed}
    return Answer({**document, "passed_over": passed_over, "records": records}, show)


async def put_back(session: Session, lane: Lane, units: Sequence[str], reference: str) -> Answer:
    """Redrive `units` of `lane` (named as ``dead`` lists them, the lane's name may be left out), or all; it
    has failed if some of them had to be left as they are."""
    prefix = f"{lane.name}/"
    wanted = [unit if unit.startswith(prefix) else prefix + unit for unit in units]
    async with open_application([lane], session.settings) as app:
        revived = await redrive(app.engine, lane.name, wanted)

    def show(screen: Screen) -> None:
        if revived:
            screen.line(f"{plural(len(revived), 'unit')} put back to work", "bold")
            screen.line(f"a worker goes on with them, or `flowlane run {reference}` does")
        elif not revived.skipped:
            screen.line(f"lane {lane.name} has no dead units: nothing to redrive")
        for reason in revived.skipped.values():
            screen.line(f"left as it is: {reason}", "bold red")

    skipped = [{"stream": stream, "reason": reason} for stream, reason in revived.skipped.items()]
    document = {"lane": lane.name, "count": len(revived), "redriven": list(revived), "skipped": skipped}
    return Answer(document, show, FAILED if skipped else 0)


async def sweep_lane(session: Session, lane: Lane) -> Answer:
    """One sweep of `lane`."""
    async with open_application([lane], session.settings) as app:
        swept = await sweep(app.engine, lane.name, thorough=True)

    def show(screen: Screen) -> None:
        screen.line(
            f"lane {lane.name}: {swept.open:,} open, {swept.requeued:,} queued again, "
            f"{plural(swept.completed, 'run')} completed"
            + (f", {swept.died:,} given up by their queue" if swept.died else "")
            + "".join(f", {n:,} owed to {stage}, which is no stage" for stage, n in swept.stranded.items())
        )

    return Answer({"lane": lane.name, **msgspec.to_builtins(swept)}, show)
