"""``flowlane plugins`` and ``init``: what is installed, and what a lane needs before it runs."""

from __future__ import annotations

from typing import Any

from flowlane.cli.screen import Screen
from flowlane.cli.session import Answer, Session
from flowlane.cli.text import plural
from flowlane.compose import open_application
from flowlane.errors import redact
from flowlane.lane import Lane
from flowlane.plugins import Registry
from flowlane.ports import QueueSpec


async def show_plugins() -> Answer:
    """What opens which scheme."""
    provided = Registry.load().provided()
    names = ("kind", "scheme", "plugin", "path")

    def show(screen: Screen) -> None:
        screen.table(names, [[item[name] for name in names] for item in provided])

    return Answer({"plugins": provided}, show)


async def prepare(session: Session, lane: Lane) -> Answer:
    """Have the backend make what it lacks for the lane, and say what is there."""
    async with open_application([lane], session.settings) as app:
        made = await app.backend.create(
            [
                QueueSpec(
                    stage.queue,
                    float(stage.policy.lease),
                    float(stage.policy.timeout),
                    bool(stage.order),
                    stage.policy.retries,
                )
                for stage in lane.stages
            ]
        )
        document: dict[str, Any] = {
            "lane": lane.name,
            "backend": redact(session.settings.backend),
            "made": list(made),
            "queues": [stage.queue for stage in lane.stages],
            "open": 0,
            "dead": 0,
        }
        for index in ("open", "dead"):
            async for _ in app.backend.units(lane.name, index):
                document[index] += 1

    def show(screen: Screen) -> None:
        screen.line(f"{document['backend']} is ready for lane {lane.name}")
        if made:
            screen.line(f"made: {', '.join(made)}")
        screen.line(f"queues: {', '.join(document['queues'])}")
        screen.line(f"{plural(document['open'], 'open unit')}, {document['dead']:,} dead")

    return Answer(document, show)
