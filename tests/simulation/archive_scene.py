"""The scene of ``http_archive``: a retry, a 404, a dead unit, and a deadline that one hour does not meet."""

from __future__ import annotations

import gzip
import random
from datetime import timedelta
from typing import Any

from flowlane.lane import Lane, Policy
from flowlane.recipes import http_archive
from flowlane.testing.faults import Process
from flowlane.testing.jobs import EPOCH
from flowlane.testing.stores import Page
from tests.simulation.lab import Lab
from tests.simulation.scene import Scene

KINDS = ("good", "flaky", "missing", "truncated", "slow", "good")
BODIES = [
    gzip.compress(random.Random(n).randbytes(60 if kind != "slow" else 14_000), mtime=0)
    for n, kind in enumerate(KINDS)
]

_PORTS = frozenset(
    {
        "backend.commit",
        "backend.last",
        "backend.read",
        "backend.receive",
        "backend.resend",
        "backend.tally",
        "backend.units",
        "body.read",
        "delivery.ack",
        "delivery.extend",
        "delivery.nack",
        "store.discard",
        "store.head",
        "store.read",
        "store.upload",
        "upload.abort",
        "upload.commit",
        "upload.flush",
        "upload.write",
    }
)


def lanes(process: Process) -> list[Lane]:
    """One slot for the landing stage, so that the deadline finds deliveries that are not begun."""
    archive = http_archive(
        "archive",
        url="web://archive/{t:%Y-%m-%d}-{t.hour}.json.gz",
        start="2024-01-01T00",
        until=EPOCH.replace(hour=0) + timedelta(hours=len(KINDS)),
        to="lake://raw/",
        max_gap="1h",
        policy=Policy(
            concurrency=2, retries=4, timeout=60.0, backoff=0.1, backoff_cap=0.1, lease=1.5, hops=5
        ),
    )
    return [archive]


def publish(lab: Lab) -> None:
    """What the web has."""
    for hour, (kind, body) in enumerate(zip(KINDS, BODIES, strict=True)):
        page = Page(data=body)
        if kind == "flaky":
            page.breaks = 1
        elif kind == "truncated":
            page.cut, page.cuts = len(body) - 9, -1
        elif kind == "slow":
            page.pause, page.block = 0.6, 4096  # long enough to be landed in several parts
        if kind != "missing":
            lab.world.web.publish(f"web://archive/2024-01-01-{hour}.json.gz", page)


def effects(lab: Lab) -> dict[str, Any]:
    """The lake, and what came to be seen in it."""
    landings = sorted((landing.url, landing.data) for landing in lab.world.lake.landings)
    return {"lake": dict(sorted(lab.world.lake.objects.items())), "landings": landings}


ARCHIVE = Scene(
    name="archive",
    lanes=lanes,
    publish=publish,
    effects=effects,
    doubled=lambda event: event.subject.endswith("T04:00:00Z"),
    belated=lambda event: event.subject.endswith("T00:00:00Z"),
    ports=_PORTS,
)
