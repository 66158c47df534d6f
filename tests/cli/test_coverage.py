"""The map of an archive's periods."""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from flowlane.cli.coverage import Coverage, read_coverage, rows, show_coverage, stretches
from flowlane.cli.screen import Screen

START = datetime(2024, 1, 1, tzinfo=UTC)


def text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def hour(number: int) -> str:
    return text(START + timedelta(hours=number))


def view(hours: int, **more: Any) -> dict[str, Any]:
    bad = sum(len(more.get(name, ())) for name in ("landing", "pending", "dead"))
    return {"start": hour(0), "next": hour(hours), "step": 3600.0, "covered": hours - bad, **more}


def shown(of: dict[str, Any], days: int = 31, *, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding)
    coverage = read_coverage(of)
    assert coverage is not None
    show_coverage(Screen(stream), "hours", coverage, days)
    stream.flush()
    return raw.getvalue().decode(encoding).splitlines()


EVERYTHING = view(
    30,
    landing=[hour(29)],
    pending={hour(27): "404: not published (yet)", hour(28): "404: not published (yet)"},
    missing=[[hour(4), hour(6)]],
    dead={hour(9): "cut", hour(10): "cut", hour(12): "cut", hour(13): "an \x1b[31merror page"},
)


def test_the_map() -> None:
    assert shown({**EVERYTHING, "covered": 20}) == [
        "hours from 2024-01-01T00:00:00Z to 2024-01-02T06:00:00Z (excluded)",
        "2024-01-01 ████···██xx█xx██████████",
        "2024-01-02 ███░░▒",
        "█ covered 20  ▒ landing 1  ░ pending 2  x dead 4  · missing 3",
        "missing 2024-01-01T04:00:00Z .. 2024-01-01T06:00:00Z (3 periods): a permanent gap",
        "dead 2024-01-01T09:00:00Z .. 2024-01-01T10:00:00Z (2 periods): cut",
        "dead 2024-01-01T12:00:00Z: cut",
        r"dead 2024-01-01T13:00:00Z: an \x1b[31merror page",
        "pending 2024-01-02T03:00:00Z .. 2024-01-02T04:00:00Z (2 periods): 404: not published (yet)",
        "landing 2024-01-02T05:00:00Z",
    ]


def test_the_map_in_ascii() -> None:
    lines = shown(EVERYTHING, encoding="ascii")
    assert lines[1:3] == ["2024-01-01 ####...##xx#xx##########", "2024-01-02 ###??~"]


def test_only_the_last_days_are_mapped_but_everything_is_named() -> None:
    lines = shown(view(24 * 400, dead={hour(5): "cut"}), days=2)
    assert [line.split()[0] for line in lines[1:3]] == ["2025-02-02", "2025-02-03"]
    assert lines[3].startswith("█ covered")
    assert lines[4] == "dead 2024-01-01T05:00:00Z: cut"


def test_a_map_that_begins_in_the_middle_of_a_day() -> None:
    of = {"start": hour(22), "next": hour(25), "step": 3600.0, "covered": 3}
    assert shown(of)[1:3] == ["2024-01-01 " + " " * 22 + "██", "2024-01-02 █"]


def test_nothing_yet() -> None:
    assert shown(view(0))[1].startswith("█ covered 0")


@pytest.mark.parametrize(
    ("step", "periods", "first", "length"),
    [(300, 24, "2024-01-01T00", 12), (1800, 48, "2024-01-01", 48), (86400, 40, "2024-01", 31)],
)
def test_other_steps(step: float, periods: int, first: str, length: int) -> None:
    coverage = Coverage(START, START + periods * timedelta(seconds=step), step, periods)
    found = list(rows(coverage, stretches(coverage), 100))
    assert (found[0][0], len(found[0][1])) == (first, length)
    assert sum(state == "covered" for _, states in found for state in states) == periods


def test_a_version_of_an_archive_is_its_period() -> None:
    coverage = read_coverage(view(2, dead={f"{hour(1)}@%22abc%22": "cut"}))
    assert coverage is not None
    assert [stretch.first for stretch in stretches(coverage)] == [START + timedelta(hours=1)]


@pytest.mark.parametrize("other", [{}, {"start": "soon"}, [1], None, {**view(1), "step": 0}])
def test_another_view_is_no_coverage(other: Any) -> None:
    assert read_coverage(other) is None
