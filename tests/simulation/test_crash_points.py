"""Every port call of a scene as a crash point, in every mode: effects and log come to the same.

Of the scene of drops, each mode takes every fourth call here, so that each is a crash point in one of them;
FLOWLANE_ALL_CELLS=1 takes all, as the long proofs do.
"""

from __future__ import annotations

import logging
import os

import pytest

from flowlane.testing.faults import MODES
from tests.simulation.crashes import SCENES, crash, scenario

#: In one test: a slow machine that has other tests to run needs minutes for all of a mode's.
PARTS = 3


@pytest.mark.parametrize("name", SCENES)
def test_an_undisturbed_scene_reaches_every_port(name: str) -> None:
    calm = scenario(SCENES[name])
    assert calm.wrong == []
    assert set(calm.calls) == SCENES[name].ports, "a port method was never reached, or a new one is"
    assert {"attempt.failed", "attempt.continued"} <= calm.kinds


def test_the_archive_scene_has_all_that_it_is_to_have() -> None:
    calm = scenario(SCENES["archive"])
    states = {name.rpartition("/")[2]: unit.get("state") for name, unit in calm.normal["log"].items()}
    assert states["2024-01-01T03:00:00Z"] == "dead"
    assert "2024-01-01T02:00:00Z" not in states
    assert calm.normal["log"]["archive/bookmark"]["payload"]["gaps"] == [["2024-01-01T02:00:00Z"] * 2]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCENES)
def test_a_crash_at_any_call_changes_nothing(
    name: str, mode: str, part: int, caplog: pytest.LogCaptureFixture
) -> None:
    calm = scenario(SCENES[name])
    some = name == "drops" and not os.environ.get("FLOWLANE_ALL_CELLS")
    every = len(MODES) if some else 1
    points = range(1 + list(MODES).index(mode) % every, len(calm.calls) + 1, every)[part::PARTS]
    caplog.set_level(logging.ERROR, logger="flowlane")
    bad = {
        f"call {n} ({calm.calls[n - 1]}), {mode}": texts for n in points if (texts := crash(name, n, mode))
    }
    assert not bad, bad
