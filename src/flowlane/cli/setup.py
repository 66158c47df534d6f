"""``flowlane plugins`` and ``init``: what is installed, and what a lane needs before it runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from flowlane import events
from flowlane.cli.screen import Screen
from flowlane.cli.session import Answer, Session
from flowlane.cli.text import plural
from flowlane.compose import open_application
from flowlane.errors import ConfigError, redact
from flowlane.lane import Lane, duration
from flowlane.plugins import Registry
from flowlane.ports import Deployable, Deployment, QueueSpec


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
        made = await app.backend.create(_queues(lane))
        document: dict[str, Any] = {
            "lane": lane.name,
            "backend": redact(session.settings.backend),
            "made": list(made),
            "queues": [stage.queue for stage in lane.stages if stage.via == "queue"],
            "channels": [stage.queue for stage in lane.stages if stage.via == "channel"],
            "open": 0,
            "dead": 0,
        }
        for index in ("open", "dead"):
            async for head in app.backend.units(lane.name, index):
                document[index] += head.type != events.RECORD_PARKED

    def show(screen: Screen) -> None:
        screen.line(f"{document['backend']} is ready for lane {lane.name}")
        if made:
            screen.line(f"made: {', '.join(made)}")
        for kind in ("queues", "channels"):
            if document[kind]:
                screen.line(f"{kind}: {', '.join(document[kind])}")
        screen.line(f"{plural(document['open'], 'open unit')}, {document['dead']:,} dead")

    return Answer(document, show)


async def show_template(session: Session, lane: Lane, reference: str, variables: Sequence[str]) -> Answer:
    """What has something else make what the backend lacks for the lane; nothing is made."""
    async with open_application([lane], session.settings) as app:
        if not isinstance(app.backend, Deployable):
            raise ConfigError(
                f"{redact(session.settings.backend)} is made by opening it, there is no template of it: name "
                "the backend that is to be deployed by --backend aws://NAME"
            )
        every = duration(lane.every) if lane.every is not None else 0.0
        deployment = Deployment(lane.name, _packed(reference), every, _queues(lane), variables)
        document = app.backend.template(deployment)

    def show(screen: Screen) -> None:
        for line in json.dumps(document, indent=2).splitlines():
            screen.line(line)

    return Answer(document, show)


def _queues(lane: Lane) -> list[QueueSpec]:
    return [
        QueueSpec(
            stage.queue,
            float(stage.policy.lease),
            float(stage.policy.timeout),
            bool(stage.order),
            stage.policy.retries,
            stage.policy.concurrency,
            stage.via,
        )
        for stage in lane.stages
    ]


def _packed(reference: str) -> str:
    """The lane's reference within a package: a path out of this folder is that of a file in the package's."""
    path = PurePath(reference)
    return path.name if path.is_absolute() or ".." in path.parts else reference
