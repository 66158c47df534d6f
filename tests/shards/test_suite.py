"""The sharded consumer keeps the promises of ``ports.Channel``."""

from __future__ import annotations

from typing import ClassVar

import pytest

from flowlane.testing.backend_model import Storage
from flowlane.testing.channel_suite import ChannelSuite
from flowlane.testing.manual import ManualClock
from tests.shards.stream import FlowingClock, opener


class TestInMemory(ChannelSuite):
    HOLD: ClassVar[float] = 30.0

    @pytest.fixture
    def clock(self) -> ManualClock:
        return FlowingClock()

    @pytest.fixture(params=[2, 7])
    def storage(self, clock: ManualClock, request: pytest.FixtureRequest) -> Storage:
        return lambda: opener(clock, request.param, self.HOLD)
