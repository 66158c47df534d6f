"""What a load leaves unfinished in a store is discarded once nobody will go on with it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flowlane import BadRecord, Context, Event, Lane, Permanent, Policy, Unit
from flowlane.backends.memory import MemoryBackend
from flowlane.clock import SystemClock
from flowlane.compose import open_application
from flowlane.connectors.parts import is_part
from flowlane.redrive import redrive
from flowlane.report import Report
from flowlane.settings import Settings
from flowlane.state import status
from flowlane.sweep import Swept, sweep
from flowlane.worker import run_once

ROWS = [{"n": str(n)} for n in range(100)]


class LaterClock(SystemClock):
    """The machine's clock, so many days later."""

    days = 0.0

    def now(self) -> datetime:
        """See ``Clock.now``."""
        return super().now() + timedelta(days=self.days)


class Found(Unit, key=("url",)):
    url: str


class Bench:
    """A lane that loads ``in.jsonl`` into the folder ``out``, `change` being its map."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "in.jsonl"
        self.write(ROWS)
        self.clock = LaterClock()
        self.backend = MemoryBackend(self.clock)
        self.quarantine = folder / "bad"
        self.change: Callable[[dict[str, Any]], Any] = lambda record: record

    def write(self, rows: list[dict[str, str]]) -> None:
        """The source has `rows`."""
        self.source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @property
    def parts(self) -> list[str]:
        """The unfinished uploads in the folder."""
        return [path.name for path in (self.folder / "out").iterdir() if is_part(path.name)]

    @property
    def rows(self) -> list[dict[str, str]]:
        """What the one object in the folder holds."""
        (path,) = [path for path in (self.folder / "out").iterdir() if not is_part(path.name)]
        return [json.loads(line) for line in path.read_text().splitlines()]

    def lane(self) -> Lane:
        """The lane."""
        policy = Policy(
            backoff="1ms", backoff_cap="2ms", batch=10, retries=2, quarantine=self.quarantine.as_uri()
        )
        lane = Lane("loads", policy=policy)

        @lane.stage(on=lane.triggered)
        async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
            yield Found(url=self.source.as_uri())

        @lane.stage(on=Found)
        async def load(event: Event, ctx: Context) -> None:
            rows = ctx.rows(event.data.url).map(self.change)
            await ctx.load(rows, to=f"{(self.folder / 'out').as_uri()}/?format=jsonl")

        return lane

    async def run(self, slot: str = "1", *, again: bool = False) -> Report:
        """Drain one run, after a redrive of what is dead, if asked for."""
        lane = self.lane()
        async with open_application(
            [lane], Settings(backend="memory://"), clock=self.clock, backend=self.backend
        ) as app:
            if again:
                await redrive(app.engine, lane.name)
            return await run_once(app, lane, slot=slot)

    async def swept(self) -> Swept:
        """What a sweep did."""
        lane = self.lane()
        async with open_application(
            [lane], Settings(backend="memory://"), clock=self.clock, backend=self.backend
        ) as app:
            return await sweep(app.engine, lane.name)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_what_a_dead_unit_had_loaded_is_kept_for_a_week(bench: Bench) -> None:
    def refuse(record: dict[str, Any]) -> dict[str, Any]:
        if record["n"] == "55":
            raise Permanent("no")
        return record

    bench.change = refuse
    report = await bench.run()
    assert report.units["dead"] == 1
    assert len(bench.parts) == 1
    bench.clock.days = 6
    assert (await bench.swept()).discarded == 0
    assert len(bench.parts) == 1
    bench.clock.days = 8
    assert (await bench.swept()).discarded == 1
    assert bench.parts == []
    bench.change = lambda record: record
    await bench.run(again=True)
    assert bench.rows == ROWS
    assert bench.parts == []


async def test_an_upload_that_was_never_logged_is_gone_when_its_object_is_there(bench: Bench) -> None:
    """The first attempt ends between making its upload and logging it: its bad records have no place."""
    bench.quarantine.write_text("in the way")
    bench.write([*ROWS[:5], {}, *ROWS[5:]])

    def refuse(record: dict[str, Any]) -> dict[str, Any]:
        if not record:
            raise BadRecord("nothing in it")
        return record

    bench.change = refuse
    assert (await bench.run()).units["dead"] == 1
    assert len(bench.parts) == 1
    bench.quarantine.unlink()
    await bench.run(again=True)
    assert bench.rows == ROWS
    assert bench.parts == []


async def test_nothing_is_left_of_a_unit_whose_source_was_replaced(bench: Bench) -> None:
    def replace(record: dict[str, Any]) -> dict[str, Any]:
        if record["n"] == "55":
            bench.write([{"n": "another"}])
            raise RuntimeError("the machine is gone")
        return record

    bench.change = replace
    assert (await bench.run()).units["settled"] == 1
    (head,) = (await bench.backend.last([f"loads/found/{bench.source.as_uri()}"])).values()
    assert head is not None
    assert status(head) == "superseded"
    assert list((bench.folder / "out").iterdir()) == []
