"""Proofs before a load, and what is passed over in a resumed one: once, and told of where time is short."""

from __future__ import annotations

import io
import random
import zipfile
from collections import deque
from typing import Any

import pytest
from msgspec.structs import replace

from flowlane import Context, Event, landing
from flowlane.archive import FIRST_READ
from flowlane.state import progress
from flowlane.testing.stores import Page
from tests.engine.test_engine import Bench, lane_of, only, virtual

URL = "web://somebody:secret@host/a.zip"
ROWS = 30_000
BLOCK = 16 << 10
OPENING = FIRST_READ / BLOCK  #: seconds until an archive's directory is there, at a block a second


def publish(bench: Bench, pause: float) -> int:
    """An archive with one deflated member, which comes a block in so many seconds; its packed size."""
    chance = random.Random(1)
    rows = b"id,note\n" + b"".join(b"%d,%032x\n" % (n, chance.getrandbits(128)) for n in range(ROWS))
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr(zipfile.ZipInfo("a.csv"), rows, zipfile.ZIP_DEFLATED)
        data = file.getvalue()
    bench.world.web.publish(URL, Page(data=data, pause=pause, block=BLOCK))
    return len(data)


def loading(**options: Any) -> Any:
    """A stage's handler that loads the member."""

    async def load(event: Event, ctx: Context) -> None:
        await ctx.load(ctx.rows(URL, entry=0, **options), to="table://t")

    return load


@virtual
async def test_a_proof_comes_first_and_once(bench: Bench) -> None:
    """A load that takes several continuations is proven by the first of them."""
    size = publish(bench, 1.0)
    lane = lane_of(loading(), timeout=500.0)
    whole = size / BLOCK
    report = await bench.run(lane, deadline=bench.in_seconds(OPENING + whole * 1.7), sound=False)
    assert report.units["settled"] == 0
    types = await bench.types("toy/thing/1")
    assert types.count("split.proven") == 1
    assert types.index("split.proven") < types.index("batch.written")
    report = await bench.run(lane, deadline=bench.in_seconds(OPENING + whole * 3))
    assert (report.outcome, report.records["out"]) == ("settled", ROWS)
    types = await bench.types("toy/thing/1")
    assert types.count("split.proven") == 1
    assert types.count("attempt.continued") >= 1
    proven = next(event for event in await bench.stream("toy/thing/1") if event.type == "split.proven")
    async with bench.app(lane) as app:
        head = replace(proven, time=app.engine.stamp())
        assert app.engine.at_work(head, lane.stages[-1]) > 0, "whoever is handed it besides leaves it alone"
    assert [row["id"] for row in bench.world.tables.tables["table://t"].rows] == [str(n) for n in range(ROWS)]


@virtual
async def test_a_member_verified_by_the_stream_is_read_once(bench: Bench) -> None:
    publish(bench, 0.0)
    report = await bench.run(lane_of(loading(verify="stream")))
    assert (report.outcome, report.records["out"]) == ("settled", ROWS)
    assert "split.proven" not in await bench.types("toy/thing/1")


@virtual
async def test_a_proof_that_needs_longer_than_there_is(bench: Bench) -> None:
    size = publish(bench, 1.0)
    lane = lane_of(loading(), timeout=500.0)
    for _ in range(3):
        await bench.run(lane, deadline=bench.in_seconds(OPENING + size / BLOCK * 0.8), sound=False)
    report = await bench.run(lane, deadline=bench.in_seconds(OPENING + size / BLOCK * 0.8), sound=False)
    reason = only(report)
    assert "no progress in 3 continuations in a row: the proof of web://host/a.zip had come to" in reason
    assert 'give it more time, or verify="stream"' in reason
    assert "secret" not in reason
    assert bench.world.tables.tables["table://t"].stands == {}, "nothing was opened to write"


@virtual
async def test_passing_over_that_needs_longer_than_there_is(bench: Bench) -> None:
    size = publish(bench, 1.0)
    lane = lane_of(loading(verify="stream"), timeout=500.0)
    whole = size / BLOCK
    await bench.run(lane, deadline=bench.in_seconds(whole * 0.9, 1.0), sound=False)
    assert "batch.written" in await bench.types("toy/thing/1")
    for _ in range(3):
        await bench.run(lane, deadline=bench.in_seconds(OPENING + whole * 0.2, 2.0), sound=False)
    report = await bench.run(lane, deadline=bench.in_seconds(OPENING + whole * 0.2, 2.0), sound=False)
    reason = only(report)
    assert "no progress in 3 continuations in a row" in reason
    assert "bytes of web://host/a.zip that were loaded before were still being passed over" in reason


@pytest.mark.parametrize("tagless", [True, False])
def test_what_cannot_be_gone_on_with_leaves_no_places_to_go_on_from(
    monkeypatch: pytest.MonkeyPatch, tagless: bool
) -> None:
    """A landing remembers where each write ended, for its next mark; without an ETag none will come."""
    most: list[int] = []

    class Remembered(deque[Any]):
        def append(self, place: Any) -> None:
            super().append(place)
            most.append(len(self))

    monkeypatch.setattr(landing, "deque", Remembered)

    @virtual
    async def land(bench: Bench) -> None:
        size = publish(bench, 1.0)
        bench.world.web.pages[URL].tagless = tagless

        async def copied(event: Event, ctx: Context) -> None:
            await ctx.copy(URL, to="lake://a.zip", verify="length")

        report = await bench.run(lane_of(copied, timeout=500.0))
        assert report.outcome == "settled"
        assert len(bench.world.lake.objects["lake://a.zip"]) == size

    land()
    assert bool(most) != tagless


@virtual
async def test_what_cannot_be_read_twice_is_logged_as_read_before_the_handler_goes_on(bench: Bench) -> None:
    """Who is cut short behind the load would else find rows of it written, and no way to pass them over."""
    bench.world.web.publish("web://host/a.csv", Page(data=b"id\n1\n", tagless=True))
    told: list[Event] = []

    async def load(event: Event, ctx: Context) -> None:
        await ctx.load(ctx.rows("web://host/a.csv"), to="table://t")
        told.extend(await bench.stream("toy/thing/1"))

    report = await bench.run(lane_of(load))
    assert (report.outcome, report.records["out"]) == ("settled", 1)
    assert progress(told[-1]).transfers["load-1"].position.row == 0
