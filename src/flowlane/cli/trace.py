"""``flowlane trace``: what a run caused, each event under the one that caused it."""

from __future__ import annotations

from typing import Any

import msgspec

from flowlane import events
from flowlane.cli.screen import Screen
from flowlane.cli.session import Answer, Session
from flowlane.compose import open_application
from flowlane.errors import ConfigError
from flowlane.events import Event
from flowlane.lane import Lane, Trigger, stream_of
from flowlane.state import progress
from flowlane.status import causal_order


async def show_trace(session: Session, lane: Lane, run: str, limit: int) -> Answer:
    """The causal tree of `run` (a stream or a slot; the last one by default), at most `limit` events of it.

    Raises:
        ConfigError: the log has no such run.
    """
    async with open_application([lane], session.settings) as app:
        stream = await _find(app.backend, lane, run)
        found: list[Event] = []
        more = False
        if stream:
            async for event in app.backend.scan(lane.name, run=stream):
                if len(found) == limit:
                    more = True
                    break
                found.append(event)
    tree = causal_order(found)
    document = {
        "lane": lane.name,
        "run": stream or None,
        "more": more,
        "events": [_plain(depth, event) for depth, event in tree],
    }

    def show(screen: Screen) -> None:
        if not stream:
            screen.line(f"lane {lane.name} has no run yet")
        screen.tree([(depth, _label(lane.name, event)) for depth, event in tree])
        if more:
            screen.line(f"the first {limit:,} events; --limit shows more")

    return Answer(document, show)


async def _find(backend: Any, lane: Lane, run: str) -> str:
    if not run:
        return next((head.subject for head in await backend.runs(lane.name, 1)), "")
    stream = run if run.startswith(f"{lane.name}/") else stream_of(lane.name, Trigger(slot=run))
    head = (await backend.last([stream])).get(stream)
    if head is None or head.subject != head.run:
        raise ConfigError(f"lane {lane.name} has no run {run}: `flowlane status` lists the last ones")
    return stream


def _plain(depth: int, event: Event) -> dict[str, Any]:
    fields = {name: getattr(event, name) for name in event.__struct_fields__ if name != "data"}
    return {"depth": depth, **fields, "data": msgspec.json.decode(event.data)}


def _label(lane: str, event: Event) -> str:
    own = event.subject.removeprefix(f"{lane}/")
    parts = [event.type, own, f"v{event.version}", *_details(event), event.time]
    return "  ".join(parts)


def _details(event: Event) -> list[str]:
    """What the engine's own events say beyond their type."""
    if event.type in (events.LANE_TRIGGERED, events.LANE_DEAD, events.LANE_COMPLETED, events.LANE_FAILED):
        return []
    now = progress(event)
    details = []
    if event.round:
        details.append(f"round {event.round}")
    if event.type == events.ATTEMPT_STARTED and now.attempt > 1:
        details.append(f"attempt {now.attempt}")
    if event.type in (events.DISCOVERY_PROGRESS, events.UNIT_SETTLED) and now.children:
        details.append(f"{now.children:,} found")
    if event.type == events.ATTEMPT_FAILED:
        details.append(f"again after {now.delay:.1f} s")
    if event.type in (events.UNIT_SETTLED, events.UNIT_DEAD):
        details += [change for transfer in now.transfers.values() for change in transfer.changes]
    if event.type == events.RUN_COMPLETED:
        details.append(str(now.report.get("outcome", "")))
    elif now.reason:
        details.append(now.reason)
    return [detail for detail in details if detail]
