"""Every port call of the http_archive lane as a crash point, in every mode: lake and log come to the same."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from flowlane.testing.faults import MODES
from tests.simulation.crashes import PORTS, crash, scenario


def test_the_scenario_has_all_that_it_is_to_have() -> None:
    calm = scenario()
    assert calm.wrong == []
    assert set(calm.calls) == PORTS, "a port method of the lane was never reached, or a new one is"
    states = {name.rpartition("/")[2]: unit.get("state") for name, unit in calm.normal["log"].items()}
    assert states["2024-01-01T03:00:00Z"] == "dead"
    assert "2024-01-01T02:00:00Z" not in states
    assert calm.normal["log"]["archive/bookmark"]["payload"]["gaps"] == [["2024-01-01T02:00:00Z"] * 2]
    assert {"attempt.failed", "attempt.continued"} <= calm.kinds


@pytest.mark.parametrize("mode", MODES)
def test_a_crash_at_any_call_changes_nothing(mode: str) -> None:
    calm = scenario()
    points = range(1, len(calm.calls) + 1)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = pool.map(crash, points, [mode] * len(points), chunksize=32)
        bad = {
            f"call {n} ({calm.calls[n - 1]}), {mode}": texts
            for n, texts in zip(points, found, strict=True)
            if texts
        }
    assert not bad, bad
