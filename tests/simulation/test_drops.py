"""The scene of ``zip_tables``: what it shows, that its guard is needed, and that queues may be purged."""

from __future__ import annotations

import asyncio
from itertools import combinations
from typing import Any

import msgspec
import pytest

from flowlane.attempt import Attempt
from flowlane.ports import UnitRef
from flowlane.state import progress, status
from flowlane.testing.clock import VirtualLoop, run
from flowlane.testing.oracle import Log
from tests.simulation.crashes import scenario
from tests.simulation.drops_scene import DROPS, effects, expected
from tests.simulation.lab import Lab


def inversions(log: Log) -> int:
    """How many members were settled after one of a later drop of the same table."""
    members = {name: msgspec.json.decode(stream[0].data) for name, stream in log.units("member/").items()}
    order = [
        (members[event.subject]["declared"]["table"], members[event.subject]["generation"])
        for event in log.events
        if event.type == "unit.settled" and event.subject in members
    ]
    return sum(one[0] == other[0] and one[1] > other[1] for one, other in combinations(order, 2))


async def undisturbed(loop: VirtualLoop) -> tuple[dict[str, Any], Log]:
    """What comes of one run, and its log."""
    lab = Lab(loop, DROPS.lanes)
    DROPS.publish(lab)
    assert await lab.until_done(lab.process(), lab.run()) == ""
    assert await lab.violations() == []
    return effects(lab), await lab.log()


def test_the_older_drop_comes_last_and_changes_nothing_that_the_newer_one_has() -> None:
    found, log = run(undisturbed)
    assert found["tables"] == expected()
    assert inversions(log) == 2  # both tables
    dead = {
        name: progress(stream[-1]).reason
        for name, stream in log.units().items()
        if status(stream[-1]) == "dead" and stream[0].run != name
    }
    assert len(dead) == 2
    assert any("3.zip" in name for name in dead)
    assert any("salaries" in reason and "not allowed" in reason for reason in dead.values())
    ((_, data),) = found["quarantine"].items()
    bad = msgspec.json.decode(data)
    assert (bad["row"], bad["url"], bad["member"]) == (8, "web://drops/1.zip", "customers.csv")


def test_without_generations_the_older_drop_would_win(monkeypatch: pytest.MonkeyPatch) -> None:
    def ref(self: Attempt) -> UnitRef:
        return UnitRef(self.unit, self.progress.token)

    monkeypatch.setattr(Attempt, "ref", property(ref))
    found, _ = run(undisturbed)
    assert found["tables"] != expected()


def test_a_member_goes_on_behind_the_deadline_and_is_not_proven_again() -> None:
    result = scenario(DROPS)
    assert result.wrong == []
    assert {"split.proven", "attempt.continued"} <= result.kinds
    assert result.normal["tables"] == expected()


def test_every_queue_is_purged_in_the_middle_and_all_is_loaded() -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, DROPS.lanes)
        DROPS.publish(lab)
        done = loop.create_task(lab.until_done(lab.process(), lab.run()))
        for _ in range(10):
            await asyncio.sleep(0.5)
            await lab.memory.purge()
        assert not done.done()
        assert await done == ""
        assert await lab.violations() == []
        assert effects(lab)["tables"] == expected()

    run(main)
