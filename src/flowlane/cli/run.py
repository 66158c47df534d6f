"""``flowlane run``: trigger a lane once, drain it, and say what became of everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowlane.cli.event import Given
from flowlane.cli.progress import Totals, showing
from flowlane.cli.screen import Cell, Screen
from flowlane.cli.session import FAILED, Answer, Session, until_told
from flowlane.cli.text import plural
from flowlane.compose import Application, open_application
from flowlane.lane import Lane, Trigger, stream_of
from flowlane.report import Report
from flowlane.state import status
from flowlane.worker import report_of, run_once

AGAIN = "interrupted; run again to go on"


@dataclass
class _Ended:
    """A run and the earlier ones that were drained with it."""

    report: Report
    opened: bool = True
    interrupted: bool = False
    drained: list[Report] = field(default_factory=list)

    @property
    def code(self) -> int:
        reports = [self.report, *self.drained]
        return FAILED if any(report.outcome != "settled" for report in reports) else 0

    def document(self) -> dict[str, Any]:
        """The pinned shape, and a little more."""
        return {
            **self.report.brief(),
            "opened": self.opened,
            "interrupted": self.interrupted,
            "drained": [report.brief() for report in self.drained],
        }


async def run_lane(session: Session, lane: Lane, given: Given | None) -> Answer:
    """Trigger and drain `lane`; `given` is the outer event, if there is one."""
    async with open_application([lane], session.settings) as app:
        stop, deadline = until_told(app)
        slot = given.slot if given else f"{app.engine.stamp()}-{app.clock.token()[:6]}"
        run = stream_of(lane.name, Trigger(slot=slot))
        opened = run not in await app.backend.last([run])
        earlier = {head.run async for head in app.backend.units(lane.name, "open") if head.run} - {run}
        async with showing(Totals(app, lane, [run, *sorted(earlier)]), stop, quiet=session.json):
            report = await run_once(
                app, lane, slot=slot, event=given.value if given else None, deadline=deadline
            )
        ended = _Ended(report, opened)
        ended.drained = [await report_of(app, lane, other) for other in sorted(earlier)]
        ended.interrupted = await _mark_open(app, lane, [report, *ended.drained])
        return Answer(ended.document(), lambda screen: _show(screen, ended), ended.code)


async def _mark_open(app: Application, lane: Lane, reports: list[Report]) -> bool:
    """A run that has not ended has not settled, and says why; whether one was interrupted."""
    heads = await app.backend.last([report.run for report in reports])
    unfinished = {
        report.run: report for report in reports if status(heads[report.run]) not in ("settled", "dead")
    }
    if not unfinished:
        return False
    reasons = dict.fromkeys(unfinished, AGAIN)
    async for head in app.backend.units(lane.name, "open"):
        if reasons.get(head.run) == AGAIN and app.engine.handling_of(head) is None:
            reasons[head.run] = (
                f"{head.subject} is owed to stage {head.stage!r}, which lane {lane.name} no longer has: "
                f"let a stage have that name (name={head.stage!r}) until it is done"
            )
    for run, report in unfinished.items():
        report.outcome = "failed"
        report.reason = f"{report.reason}; {reasons[run]}" if report.reason else reasons[run]
    return AGAIN in reasons.values()


def _show(screen: Screen, ended: _Ended) -> None:
    report = ended.report
    if not ended.opened:
        screen.line(f"the run of this event existed already, no other was opened: {report.run}")
    screen.line(f"{report.run}: {report.outcome} in {report.seconds:.1f} s", _STYLES[report.outcome])
    show_figures(screen, report)
    for other in ended.drained:
        units = plural(other.units["found"], "unit")
        screen.line(f"drained too: {other.run}: {other.outcome}, {units}", _STYLES[other.outcome])
    for each in [report, *ended.drained]:
        for told in each.changes:
            screen.line(f"changed by {told['unit']}: {told['change']}")
        for dead in each.dead:
            screen.line(f"dead {dead['unit']}: {dead['reason']}", "red")
    for each in [report, *ended.drained]:
        if each.reason:
            where = "" if each is report else f" {each.run}"
            screen.line(f"failed{where}: {each.reason}", "bold red")


_STYLES: Mapping[str, str] = {"settled": "bold green", "failed": "bold red"}


def show_figures(screen: Screen, report: Report) -> None:
    """The conservation table: units, then records, by stage."""
    total = {
        "stage": "total",
        "units": report.units,
        "records": report.records,
        "bytes": report.bytes,
        "conserved": all(stage["conserved"] for stage in report.stages),
    }
    stages = [stage for stage in report.stages if any((*stage["units"].values(), *stage["bytes"].values()))]
    listed = [*stages, total] if len(stages) != 1 else stages
    screen.table(
        ["units", "found", "settled", "dead", "skipped", "superseded", "bytes in", "bytes out"],
        [_units(stage) for stage in listed],
    )
    screen.table(
        ["records", "in", "+ expanded", "= out", "+ skipped", "+ quarantined", "conserved"],
        [_records(stage) for stage in listed],
    )


def _units(stage: Mapping[str, Any]) -> list[Cell]:
    names = ("found", "settled", "dead", "skipped", "superseded")
    units, size = stage["units"], stage["bytes"]
    return [stage["stage"], *(units[name] for name in names), size["in"], size["out"]]


def _records(stage: Mapping[str, Any]) -> list[Cell]:
    names = ("in", "expanded", "out", "skipped", "quarantined")
    records = stage["records"]
    return [stage["stage"], *(records[name] for name in names), "yes" if stage["conserved"] else "NO"]
