"""What earlier releases stored is read by this one: each log folds to the states that it did then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

import flowlane
from flowlane import Event, events
from flowlane.events import decode, encode
from flowlane.ports import Append, Commit, Committed
from flowlane.state import Progress, fold
from flowlane.status import LogView
from flowlane.testing.clock import VirtualLoop, run
from tests.golden import make

GOLDEN = sorted(make.HERE.glob("*/*.jsonl"))


def name_of(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def read(file: Path) -> tuple[list[Event], dict[str, Any]]:
    """The events in `file`, and what they were expected to come to."""
    log = [decode(line) for line in file.read_bytes().splitlines()]
    return log, json.loads(file.with_suffix(".json").read_text())


def streams(log: list[Event]) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in log:
        found.setdefault(event.subject, []).append(event)
    return found


def test_this_release_has_golden_logs() -> None:
    here = {name_of(file) for file in GOLDEN}
    assert {f"{flowlane.__version__}/{name}" for name in make.LANES} <= here, "python -m tests.golden.make"


@pytest.mark.parametrize("file", GOLDEN, ids=name_of)
def test_every_event_is_read_and_written_as_it_was(file: Path) -> None:
    lines = file.read_bytes().splitlines()
    for line in lines:
        event = decode(line)
        assert decode(encode(event)) == event
        assert json.loads(line).items() <= json.loads(encode(event)).items(), "nothing is lost on the way"
        if file.parent.name == flowlane.__version__:
            assert encode(event) == line
    assert file.stat().st_size < 100_000


@pytest.mark.parametrize("file", GOLDEN, ids=name_of)
def test_a_log_folds_to_what_it_folded_to_then(file: Path) -> None:
    log, expected = read(file)
    found = streams(log)
    assert set(found) == set(expected["states"])
    for name, stream in found.items():
        status, progress = fold(stream)
        then = expected["states"][name]
        assert status == then["status"], name
        assert progress == msgspec.convert(then["progress"], Progress), name


@pytest.mark.parametrize("file", GOLDEN, ids=name_of)
def test_a_lane_goes_on_from_an_old_log(file: Path) -> None:
    """The log of an earlier release in this one's backend: its views are the same, nothing is found anew."""
    log, expected = read(file)
    build, _ = make.LANES[file.stem]

    async def main(loop: VirtualLoop) -> None:
        world = make.Site(loop, build())
        for event in log:
            answers = await world.backend.commit(
                [Commit((Append(event.subject, event.version - 1, (event,)),))]
            )
            assert all(isinstance(answer, Committed) for answer in answers)
        if "hours" in expected:
            make.publish(world)
            world.clock.offset += 7200
            async with world.app() as app:
                view = await world.lane.views["hours"](LogView(app.engine, world.lane.name))
            assert json.loads(msgspec.json.encode(view)).items() >= expected["hours"].items()
        report = await world.run("afterwards")
        assert (report["outcome"], report["units"]["found"]) == ("settled", 0)

    run(main)


#: What the logs must have been through, so that it is known to be read.
ARCHIVE = {
    events.LANE_TRIGGERED,
    events.ATTEMPT_STARTED,
    events.ATTEMPT_FAILED,
    events.ATTEMPT_CONTINUED,
    events.UPLOAD_OPENED,
    events.UNIT_SETTLED,
    events.UNIT_DEAD,
    events.UNIT_REDRIVEN,
    events.RUN_REDRIVEN,
    events.RUN_COMPLETED,
    "hour",
    "bookmark",
}
ORDERS = {
    events.DISCOVERY_PROGRESS,
    events.STEP_DONE,
    events.BATCH_WRITTEN,
    events.UNIT_SKIPPED,
    events.UNIT_SUPERSEDED,
    events.LANE_DEAD,
    events.LANE_FAILED,
    events.LANE_COMPLETED,
    "drop",
    "mark",
}


@pytest.mark.parametrize(("name", "kinds"), [("archive", ARCHIVE), ("orders", ORDERS)])
def test_a_log_made_now_tells_of_everything(name: str, kinds: set[str]) -> None:
    log, expected = make.record(name)
    assert kinds <= {event.type for event in log}
    assert make.record(name) == (log, expected), "the same release makes the same log"
    if name == "archive":
        assert expected["hours"]["missing"] == [["2024-01-01T03:00:00Z", "2024-01-01T03:00:00Z"]]
        assert expected["hours"]["bookmark"] == "2024-01-01T10:00:00Z"
        assert expected["hours"]["dead"] == {}


@pytest.mark.parametrize("file", GOLDEN, ids=name_of)
def test_a_golden_log_tells_of_everything(file: Path) -> None:
    log, _ = read(file)
    if file.parent.name == "0.1.0":
        assert {"archive": ARCHIVE, "orders": ORDERS}[file.stem] <= {event.type for event in log}
