"""``flowlane worker``: lanes served until SIGTERM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowlane.cli.screen import Screen
from flowlane.cli.session import Answer, Session, until_told
from flowlane.compose import open_application
from flowlane.errors import ConfigError, redact
from flowlane.lane import Lane
from flowlane.worker import serve


async def work(session: Session, lanes: Sequence[Lane]) -> None:
    """Serve `lanes`; what is served is said at once, so that whoever waits for it knows.

    Raises:
        ConfigError: FLOWLANE_STAGE names a stage that none of the lanes has.
    """
    only = session.settings.stage
    served = [stage for lane in lanes for stage in lane.stages if only in ("", stage.name)]
    if not served:
        known = ", ".join(sorted({stage.name for lane in lanes for stage in lane.stages}))
        raise ConfigError(f"FLOWLANE_STAGE={only!r}: no lane given has such a stage; there are {known}")
    async with open_application(lanes, session.settings) as app:
        stop, deadline = until_told(app)
        document: dict[str, Any] = {
            "backend": redact(session.settings.backend),
            "lanes": [
                {
                    "lane": lane.name,
                    "every": lane.every,
                    "stages": [stage.name for stage in served if stage.lane == lane.name],
                }
                for lane in lanes
            ],
        }
        session.say(Answer(document, lambda screen: _show(screen, document)))
        await serve(app, stop, deadline)


def _show(screen: Screen, document: dict[str, Any]) -> None:
    for lane in document["lanes"]:
        schedule = f"every {lane['every']}" if lane["every"] else "when triggered"
        stages = ", ".join(lane["stages"]) or "none"
        screen.line(f"serving {lane['lane']} ({schedule}; stages {stages}) on {document['backend']}")
