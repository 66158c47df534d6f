"""Makes the golden logs of this release: run it when one is made, and commit what it writes.

    python -m tests.golden.make

It writes ``tests/golden/<version>/<lane>.jsonl`` (one event a line, in the order of their commits) and
``<lane>.json`` (what they fold to). Those of earlier releases are never touched again: ``test_golden.py``
reads them all, for ever, so a change that cannot read an old log fails.

Everything happens in virtual time, by one seed: the same release makes the same files.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

import flowlane
from flowlane import BadRecord, Context, Event, Fact, Lane, Permanent, Policy, Retryable, Superseded, Unit
from flowlane.backends.memory import MemoryBackend
from flowlane.compose import Application, open_application
from flowlane.deadline import Deadline
from flowlane.events import encode
from flowlane.plugins import Registry
from flowlane.ports import Backend, Record
from flowlane.recipes import http_archive
from flowlane.redrive import redrive
from flowlane.settings import Settings
from flowlane.state import fold
from flowlane.status import LogView
from flowlane.testing import stores
from flowlane.testing.clock import VirtualClock, VirtualLoop, run
from flowlane.testing.stores import Page, World, using
from flowlane.worker import run_once

HERE = Path(__file__).parent
SEED = 20240101
NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)
POLICY = Policy(retries=1, timeout=60, backoff=0.5, backoff_cap=2, lease=6, quarantine="lake://bad/", batch=4)


class Site(World):
    """The world of one log, with the process that looks at it."""

    def __init__(self, loop: VirtualLoop, lane: Lane, backend: Backend | None = None) -> None:
        self.clock = VirtualClock(loop, epoch=NOON)
        super().__init__(self.clock)
        self.lane = lane
        self.backend: Backend = backend or MemoryBackend(self.clock)

    @asynccontextmanager
    async def app(self) -> AsyncIterator[Application]:
        """The lane, opened as by one process."""
        with using(self):
            async with open_application(
                [self.lane],
                Settings(backend="memory://"),
                clock=self.clock,
                registry=Registry({"testing": stores.plugin}),
                backend=self.backend,
            ) as app:
                yield app

    async def run(self, slot: str, *, seconds: float = 0.0) -> dict[str, Any]:
        """The report of one run, stopped after so many seconds (0: not at all)."""
        now = self.clock.monotonic()
        deadline = Deadline(now + seconds + 2, 2.0) if seconds else None
        async with self.app() as app:
            return (await run_once(app, self.lane, slot=slot, deadline=deadline)).brief()

    async def redrive(self) -> list[str]:
        """Redrive all that is dead."""
        async with self.app() as app:
            return await redrive(app.engine, self.lane.name)


# --------------------------------------------------------------------------- http_archive


def archives() -> Lane:
    """Eight hours, of which one is always missing, one truncated at first, and one late."""
    return http_archive(
        "archive",
        url="web://archive/{t:%Y-%m-%d}-{t.hour}.json.gz",
        start="2024-01-01T00",
        until="2024-01-01T10",
        to="lake://raw/",
        max_gap="4h",
        policy=POLICY,
    )


def publish(world: World) -> dict[int, bytes]:
    """What the archive has: the whole bodies, by hour."""
    bodies = {
        h: gzip.compress(bytes((h * n) % 251 for n in range(300)), mtime=0) for h in range(10) if h != 3
    }
    for hour, body in bodies.items():
        page = Page(data=body)
        if hour == 1:
            page.breaks = 1  # broken once: a retry, taken up where it broke
        elif hour == 4:
            page.cut, page.cuts = len(body) - 5, 2  # truncated for as long as it is retried: dead
        elif hour == 5:
            page.busy = 1  # no answer at first
        elif hour == 6:
            page.pause = 2.0  # slow: goes on in another process
        elif hour == 9:
            page.appears = NOON.timestamp() + 3600  # late: pending, then there
        world.web.publish(f"web://archive/2024-01-01-{hour}.json.gz", page)
    return bodies


async def record_archives(world: Site) -> dict[str, Any]:
    """Three runs: stopped and continued; something dead; all well after a redrive."""
    publish(world)
    await world.run("1", seconds=5)
    await world.run("1")
    await world.redrive()
    world.clock.offset += 7200
    await world.run("2")
    async with world.app() as app:
        return {"hours": await world.lane.views["hours"](LogView(app.engine, world.lane.name))}


# --------------------------------------------------------------------------- a lane of one's own


class Drop(Unit, key=("url", "etag")):
    """Records to load."""

    url: str
    etag: str


class Mark(Fact, type="mark"):
    """How many runs there were."""

    runs: int = 0


def orders() -> Lane:
    """Every way for a unit to end, with steps, quarantine, facts and notices."""
    lane = Lane("orders", policy=POLICY)
    tries: dict[str, int] = {}

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        mark = await ctx.recall(Mark) or Mark()
        for name in ("good", "flaky", "gone", "empty", "broken"):
            yield Drop(url=f"rows://{name}", etag=f'"{name} 1"')
            await asyncio.sleep(0.7)  # long enough for the first ones to be registered before the last
        yield Mark(runs=mark.runs + 1)

    async def announce(text: str, *, idempotency_key: str) -> dict[str, str]:
        return {"said": text, "key": idempotency_key}

    @lane.stage(on=Drop, error_budget=1.0)
    async def load(event: Event, ctx: Context) -> None:
        name = event.data.url.removeprefix("rows://")
        tries[name] = tries.get(name, 0) + 1
        if name == "gone":
            raise Superseded("there is a newer one")
        if name == "empty":
            ctx.skip("nothing in it")
            return
        await ctx.step("announce", announce, f"loading {name} ☃")
        if name == "broken" and tries[name] < 2:
            raise Permanent('no such "column"\nin the source')
        await ctx.load(ctx.rows("rows://good").map(change), to=f"table://{name}")
        if name == "flaky" and tries[name] < 2:
            raise Retryable("busy", delay=1)

    def change(record: Record) -> Record:
        if record["n"] == 5:
            raise BadRecord("a five")
        return record

    @lane.stage(on=lane.dead)
    async def mourn(event: Event, ctx: Context) -> None:
        await ctx.step("mourn", announce, event.data.unit)

    @lane.stage(on=lane.failed)
    async def complain(event: Event, ctx: Context) -> None: ...

    @lane.stage(on=lane.completed)
    async def cheer(event: Event, ctx: Context) -> None: ...

    return lane


async def record_orders(world: Site) -> dict[str, Any]:
    """Two runs, and a redrive between them."""
    world.tables.publish("rows://good", [[{"n": n} for n in range(10)], [{"n": 10}]])
    await world.run("1")
    await world.redrive()
    await world.run("2")
    return {}


# --------------------------------------------------------------------------- writing

LANES = {"archive": (archives, record_archives), "orders": (orders, record_orders)}


def record(name: str) -> tuple[list[Event], dict[str, Any]]:
    """The log that this release makes of the lane called `name`, and what it comes to."""
    make, work = LANES[name]

    async def main(loop: VirtualLoop) -> tuple[list[Event], dict[str, Any]]:
        world = Site(loop, make())
        more = await work(world)
        log = [event async for event in world.backend.scan(name)]
        return log, {"states": states(log), **more}

    return run(main, seed=SEED)


def states(log: list[Event]) -> dict[str, Any]:
    """Status and progress of every stream, as plain values."""
    streams: dict[str, list[Event]] = {}
    for event in log:
        streams.setdefault(event.subject, []).append(event)
    return {
        name: dict(zip(("status", "progress"), msgspec.to_builtins(fold(stream)), strict=True))
        for name, stream in sorted(streams.items())
    }


def main() -> None:
    """Write the files of this release."""
    folder = HERE / flowlane.__version__
    folder.mkdir(exist_ok=True)
    for name in LANES:
        log, expected = record(name)
        (folder / f"{name}.jsonl").write_bytes(b"".join(encode(event) + b"\n" for event in log))
        text = json.dumps(expected, indent=1, ensure_ascii=False, sort_keys=True)
        (folder / f"{name}.json").write_text(text + "\n")
        print(f"{folder.name}/{name}: {len(log)} events in {len(expected['states'])} streams")


if __name__ == "__main__":
    main()
