"""The memory backend keeps the promises of the ports."""

from __future__ import annotations

from typing import Any, cast

import pytest

from flowlane.backends.memory import open_backend
from flowlane.errors import ConfigError
from flowlane.ports import Environment
from flowlane.testing.backend_model import Storage
from flowlane.testing.backend_suite import BackendSuite
from flowlane.testing.carried_suite import CarriedSuite
from flowlane.testing.channel_suite import ChannelSuite
from flowlane.testing.manual import ManualClock
from flowlane.testing.units import applied, discover, found


class MemoryStorage:
    @pytest.fixture
    def storage(self, clock: ManualClock) -> Storage:
        return lambda: lambda: open_backend("memory://", Environment(clock, cast("Any", None)))


class TestBackend(MemoryStorage, BackendSuite):
    pass


class TestCarried(MemoryStorage, CarriedSuite):
    pass


class TestChannel(MemoryStorage, ChannelSuite):
    pass


async def test_leases_that_are_over_take_no_memory() -> None:
    async with open_backend("memory://", Environment(ManualClock(), cast("Any", None))) as backend:
        await applied(backend, discover(found("a")))
        for _ in range(5000):
            (delivery,) = await backend.receive(["load"], 1, lease=1e9)
            await delivery.nack()
        assert len(backend._leases) < 2500


@pytest.mark.parametrize("uri", ["memory://name", "memory:///path", "sqlite://"])
async def test_a_memory_backend_has_no_name(uri: str) -> None:
    with pytest.raises(ConfigError, match="memory://"):
        async with open_backend(uri, Environment(ManualClock(), cast("Any", None))):
            pass
