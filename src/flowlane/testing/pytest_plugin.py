"""The pytest plugin that flowlane installs (entry point ``pytest11``): fixtures for tests of one's own lanes.

::

    def test_my_lane_survives(flowlane_virtual):
        async def main(loop):  # an hour in here takes milliseconds
            await asyncio.sleep(3600)

        flowlane_virtual(main, seed=7)


    def test_under_trouble(flowlane_simulator):
        for seed in range(20):
            outcome = flowlane_simulator(seed)
            assert outcome.violations == []

It imports nothing of flowlane before a fixture is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from flowlane.testing.simulator import Outcome


@pytest.fixture
def flowlane_virtual() -> Callable[..., Any]:
    """``flowlane.testing.clock.run``: runs ``main(loop)`` on virtual time, in the order of `seed`."""
    from flowlane.testing.clock import run

    return run


@pytest.fixture
def flowlane_simulator() -> Callable[..., Outcome]:
    """``flowlane.testing.simulator.simulate``: what a seed of the simulator comes to."""
    from flowlane.testing.simulator import simulate

    return simulate
