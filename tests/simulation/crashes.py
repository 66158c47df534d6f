"""The scenario of the crash points: one run of ``http_archive`` with a retry, a 404, a dead unit, and a
deadline that the slow hour does not meet; and the normal form in which its outcome is compared."""

from __future__ import annotations

import asyncio
import gzip
import logging
import random
from datetime import timedelta
from functools import cache
from typing import Any

import msgspec

from flowlane.deadline import Deadline
from flowlane.lane import Lane, Policy
from flowlane.recipes import http_archive
from flowlane.state import progress, status
from flowlane.testing.clock import Deadlock, VirtualLoop, run
from flowlane.testing.faults import CrashAt, Process
from flowlane.testing.jobs import EPOCH
from flowlane.testing.stores import Page
from tests.simulation.lab import Lab

KINDS = ("good", "flaky", "missing", "truncated", "slow", "good")
BODIES = [
    gzip.compress(random.Random(n).randbytes(60 if n != 4 else 190), mtime=0) for n in range(len(KINDS))
]

#: Every port method that the lane must reach in the undisturbed run.
PORTS = frozenset(
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


def lane(process: Process) -> list[Lane]:
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
            page.pause = 0.6
        if kind != "missing":
            lab.world.web.publish(f"web://archive/2024-01-01-{hour}.json.gz", page)


class Result(msgspec.Struct):
    """What one run of the scenario came to."""

    wrong: list[str]
    normal: dict[str, Any]
    calls: list[str]
    kinds: set[str]  #: the types of all events


def scenario(number: int = 0, mode: str = "", *more: tuple[int, str], seed: int = 0) -> Result:
    """Run it with a fault at that port call (0: none), restarting whatever dies, and drain."""
    faults = CrashAt(number, mode, *more)

    async def main(loop: VirtualLoop) -> Result:
        lab = Lab(loop, lane)
        publish(lab)
        first = lab.process(faults)
        deadline = Deadline(first.clock.monotonic() + 2.0, 1.0)
        doubled = loop.create_task(_double(lab))  # what is being landed is delivered once more
        wrong = [await lab.until_done(first, lab.run(deadline=deadline), again=lab.run(), faults=faults)]
        await doubled
        await lab.redeliver(lambda event: event.subject.endswith("T00:00:00Z"))
        wrong.append(await lab.until_done(lab.process(faults), lab.run(), faults=faults))
        wrong += await lab.violations()
        wrong += [f"asyncio complains: {text}" for text in loop.complaints]
        normal = await normal_form(lab)
        kinds = {event.type for event in (await lab.log()).events}
        return Result([text for text in wrong if text], normal, faults.calls, kinds)

    try:
        return run(main, seed=seed)
    except Deadlock as error:
        return Result([f"deadlock: {error}"], {}, faults.calls, set())


async def _double(lab: Lab) -> None:
    await asyncio.sleep(0.3)
    await lab.redeliver(lambda event: event.subject.endswith("T04:00:00Z"))


async def normal_form(lab: Lab) -> dict[str, Any]:
    """Lake and log without ids, times and attempts: states, counts, payloads, bookmark, reports, bytes."""
    log = await lab.log()
    streams: dict[str, Any] = {}
    for name, stream in log.streams.items():
        first, last = stream[0], stream[-1]
        known: dict[str, Any] = {"type": first.type, "stage": first.stage, "cut": first.cut}
        if first.stage:
            now = progress(last)
            known["state"] = status(last)
            known["counts"] = msgspec.to_builtins(now.counts)
            known["ends"] = [event.type for event in stream if event.type.startswith(("unit.", "run."))]
            known["completed"] = now.completed
            known["report"] = {
                key: value for key, value in now.report.items() if key not in ("dead", "seconds")
            }
        data = msgspec.json.decode(first.data if first.stage else last.data)
        on_the_way = ("at", "by", "heard")
        known["payload"] = {key: value for key, value in data.items() if key not in on_the_way}
        streams[name] = known
    landings = sorted((landing.url, landing.data) for landing in lab.world.lake.landings)
    return {"log": streams, "lake": dict(sorted(lab.world.lake.objects.items())), "landings": landings}


def difference(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two normal forms differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            text
            for key in sorted({*one, *other})
            for text in difference(one.get(key), other.get(key), f"{path}/{key}")
        ]
    return [] if one == other else [f"{path}: {one!r:.200} is not {other!r:.200}"]


@cache
def calm() -> Result:
    """The undisturbed run."""
    return scenario()


def crash(number: int, mode: str, *more: tuple[int, str]) -> list[str]:
    """What differs from the undisturbed run if that call goes wrong."""
    logging.getLogger("flowlane").setLevel(logging.ERROR)  # that the log is away is no news here
    result = scenario(number, mode, *more)
    return result.wrong + difference(result.normal, calm().normal)
