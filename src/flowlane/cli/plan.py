"""``flowlane plan``: what a run would move, before anything moves."""

from __future__ import annotations

from typing import Any

import msgspec

from flowlane.cli.screen import Screen
from flowlane.cli.session import Answer, Session
from flowlane.cli.text import plural, size
from flowlane.compose import open_application
from flowlane.lane import Lane
from flowlane.plan import Planned, plan


async def show_plan(session: Session, lane: Lane, limit: int) -> Answer:
    """The units that a run of `lane` would register now, at most `limit` of them by name; totals over all."""
    planned: list[Planned] = []
    stages: dict[str, dict[str, int]] = {}
    async with open_application([lane], session.settings) as app:
        async for unit in plan(app.engine, lane):
            figures = stages.setdefault(unit.stage, {"units": 0, "bytes": 0, "unknown": 0})
            figures["units"] += 1
            if unit.size < 0:
                figures["unknown"] += 1
            else:
                figures["bytes"] += unit.size
            if len(planned) < limit:
                planned.append(unit)
    total = {name: sum(stage[name] for stage in stages.values()) for name in ("units", "bytes", "unknown")}
    document: dict[str, Any] = {
        "lane": lane.name,
        **total,
        "stages": [{"stage": name, **figures} for name, figures in stages.items()],
        "planned": msgspec.to_builtins(planned),
    }
    return Answer(document, lambda screen: _show(screen, document, planned))


def _show(screen: Screen, document: dict[str, Any], planned: list[Planned]) -> None:
    if planned:
        screen.table(
            ["unit", "stage", "bytes", "url"],
            [[unit.unit, unit.stage, unit.size if unit.size >= 0 else "?", unit.url] for unit in planned],
        )
    left = document["units"] - len(planned)
    if left:
        screen.line(f"and {plural(left, 'unit')} more; --limit lists them")
    unknown = f", and {document['unknown']:,} of unknown size" if document["unknown"] else ""
    screen.line(
        f"a run of {document['lane']} would move {plural(document['units'], 'unit')}, "
        f"{document['bytes']:,} bytes ({size(document['bytes'])}){unknown}"
    )
