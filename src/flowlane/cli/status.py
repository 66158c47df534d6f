"""``flowlane status``: a lane's last runs, what is open or dead, and the lane's own views."""

from __future__ import annotations

from typing import Any

import msgspec

from flowlane import events
from flowlane.cli.coverage import read_coverage, show_coverage
from flowlane.cli.screen import Screen
from flowlane.cli.session import Answer, Session
from flowlane.cli.text import plural
from flowlane.compose import Application, open_application
from flowlane.conveyor import CONSUMER
from flowlane.errors import FlowlaneError, Permanent
from flowlane.events import Event
from flowlane.lane import Lane
from flowlane.report import read_report
from flowlane.state import status
from flowlane.status import LogView


async def show_status(session: Session, lane: Lane, days: int, runs: int) -> Answer:
    """The state of `lane`, with at most `runs` runs, and `days` days in a map."""
    async with open_application([lane], session.settings) as app:
        document: dict[str, Any] = {
            "lane": lane.name,
            "runs": [await _run(app, head) for head in await app.backend.runs(lane.name, runs)],
            "open": 0,
            "dead": 0,
            "passed_over": 0,
            "channels": await _channels(app, lane),
            "views": {},
        }
        async for head in app.backend.units(lane.name, "open"):
            document["open"] += head.subject != head.run
        async for head in app.backend.units(lane.name, "dead"):
            document["passed_over" if head.type == events.RECORD_PARKED else "dead"] += 1
        for name, view in lane.views.items():
            try:
                # As JSON has it, for people too: a view answers the same to both, or is refused for both.
                shown = await view(LogView(app.engine, lane.name))
                document["views"][name] = msgspec.json.decode(msgspec.json.encode(shown))
            except FlowlaneError:
                raise
            except Exception as error:
                raise Permanent(
                    f"the view {name!r} of lane {lane.name} raised {type(error).__name__}: {error}"
                ) from error
    return Answer(document, lambda screen: _show(screen, document, days))


async def _channels(app: Application, lane: Lane) -> list[dict[str, Any]]:
    """How far each stage is in the partitions of its channel. Positions are text: they are larger than a
    number in JSON may be."""
    found: list[dict[str, Any]] = []
    for stage in lane.stages:
        if stage.via == "channel":
            lags = await app.backend.channel(stage.queue).lag(CONSUMER)
            found += [
                {"stage": stage.name, **msgspec.structs.asdict(lag), "position": str(lag.position)}
                for lag in lags
            ]
    return found


async def _run(app: Application, head: Event) -> dict[str, Any]:
    report = await read_report(app.backend, app.engine.lanes[head.source], head)
    now = status(head)
    state = {"open": "discovering", "closed": "running"}.get(now, report.outcome)
    return {
        "run": head.subject,
        "state": state,
        "time": head.time,
        "reason": report.reason,
        "units": report.units,
        "records": report.records,
        "bytes": report.bytes,
    }


def _show(screen: Screen, document: dict[str, Any], days: int) -> None:
    screen.line(
        f"lane {document['lane']}: {plural(document['open'], 'open unit')}, {document['dead']:,} dead"
    )
    if document["runs"]:
        screen.table(
            ["run", "state", "found", "settled", "dead", "bytes out", "reason"],
            [
                [
                    run["run"],
                    run["state"],
                    *(run["units"][name] for name in ("found", "settled", "dead")),
                    run["bytes"]["out"],
                    run["reason"],
                ]
                for run in document["runs"]
            ],
        )
    else:
        screen.line("no run yet")
    if document["passed_over"]:
        number = plural(document["passed_over"], "record")
        screen.line(f"{number} of channels passed over: `flowlane dead` says why", "bold red")
    show_channels(screen, document["channels"])
    for name, view in document["views"].items():
        screen.line()
        coverage = read_coverage(view)
        if coverage is None:
            _show_view(screen, name, view)
        else:
            show_coverage(screen, name, coverage, days)


def show_channels(screen: Screen, partitions: list[dict[str, Any]]) -> None:
    """Those with something left, or somebody at work, or of which nothing is known; the rest is counted."""
    idle = [each for each in partitions if not each["owner"] and (each["ended"] or _read_up(each))]
    busy = [each for each in partitions if each not in idle]
    if busy:
        screen.line()
        rows = [
            [each["stage"], each["partition"], each["owner"], *(_behind(each[it]) for it in _LAG)]
            for each in busy
        ]
        screen.table(["stage", "partition", "owner", "records behind", "seconds behind"], rows)
    if idle:
        screen.line(f"{plural(len(idle), 'partition')} of channels with nothing left when last read")


_LAG = ("records", "seconds")


def _read_up(partition: dict[str, Any]) -> bool:
    """Whether nothing was left of it, as far as its channel says: one that was never read says nothing."""
    known = [partition[it] for it in _LAG if partition[it] is not None]
    return bool(known) and not any(known)


def _behind(number: float | None) -> int | str:
    return "?" if number is None else round(number)


def _show_view(screen: Screen, name: str, value: Any, depth: int = 0) -> None:
    """Any other view: nested names and values, one a line."""
    indent = "  " * depth
    if isinstance(value, dict | list) and value:
        screen.line(f"{indent}{name}:")
        items = value.items() if isinstance(value, dict) else [("-", item) for item in value]
        for key, item in items:
            _show_view(screen, str(key), item, depth + 1)
    else:
        screen.line(f"{indent}{name}: {'none' if value in (None, {}, []) else value}")
