"""``docs/lambda.md`` keeps its word: its lane runs, its tables are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowlane import Event, Unit
from flowlane.aws_lambda import Object, objects
from flowlane.aws_lambda.refusals import REFUSALS
from flowlane.aws_lambda.wanted import Sweep, understand
from flowlane.compose import load_lane
from flowlane.ports import ObjectInfo
from tests.aws_lambda.test_wanted import bridged, s3, sns

PAGE = (Path(__file__).parents[2] / "docs" / "lambda.md").read_text()
CODE = PAGE.split("```python\n")[1].split("```")[0]


def rows(heading: str) -> list[list[str]]:
    """The table under `heading`."""
    table = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return found[2:]


def test_what_is_refused_is_listed_with_its_reason() -> None:
    known = [[each.what, each.why, each.instead] for each in REFUSALS]
    assert rows("What is not served") == [row for n, row in enumerate(known) if row not in known[:n]]


def test_every_field_of_an_object_is_told_of() -> None:
    told = [row[0].strip("`") for row in rows("Objects of S3")]
    assert told == [field.name for field in msgspec.structs.fields(Object)]


def test_the_input_of_the_sweep_is_one() -> None:
    assert understand(PAGE.split("```json\n")[1].split("```")[0], "drops") == [Sweep()]


def test_a_schedules_own_input_is_one() -> None:
    (text,) = re.findall(r'`(\{"flowlane": "run".*?\})`', PAGE)
    (wanted,) = understand(text.replace("<aws.scheduler.scheduled-time>", "2024-05-01T12:00:00Z"), "drops")
    assert getattr(wanted, "slot", "") == "2024-05-01T12:00:00Z"


class _Drops:
    """As much of a context as the page's discovery asks: a bucket with one object."""

    there = ObjectInfo("s3://bucket/a%20b.csv", etag='"e"')

    async def head(self, url: str) -> ObjectInfo | None:
        return self.there if url == self.there.url else None

    async def list(self, url: str) -> Any:
        yield self.there


@pytest.mark.parametrize(
    ("by", "event"),
    [
        ("event", s3("a+b.csv")),
        ("event", {"Records": [s3("a%20b.csv")]}),
        ("event", sns({"Records": [s3("a+b.csv")]})),
        ("event", bridged("a b.csv")),
        ("event", bridged("a+b.csv")),
        ("schedule", {"flowlane": "run"}),
    ],
)
async def test_its_lane_finds_the_same_unit_whether_it_is_told_or_looks(
    tmp_path: Path, by: str, event: Any
) -> None:
    (tmp_path / "drops.py").write_text(CODE)
    lane = load_lane(str(tmp_path / "drops.py"))
    stage = lane.stage_on(lane.triggered)
    assert stage is not None
    data = stage.unit(slot="s", by=by, event=event)
    trigger = Event("e", "drops", "lane.triggered", "drops/run/s", "2024-05-01T12:00:00Z", data, 1)
    assert len(objects(trigger)) == (by == "event")
    found: list[Unit] = [unit async for unit in stage.handler(trigger, _Drops())]
    assert [(getattr(unit, "url", ""), getattr(unit, "etag", "")) for unit in found] == [
        ("s3://bucket/a%20b.csv", '"e"')
    ]
