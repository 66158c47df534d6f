"""A backend whose channels are sharded streams in memory, and a clock that a test can move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

from flowlane.backends.memory import MemoryBackend, open_backend
from flowlane.ports import Backend, Channel, Environment
from flowlane.shards import ShardedChannel
from flowlane.testing.backend_model import Opener
from flowlane.testing.manual import ManualClock
from flowlane.testing.sharded import MemoryShards


class FlowingClock(ManualClock):
    """Goes on by itself, and is moved forward besides."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + self._seconds

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Sharded:
    """A log in memory, and channels whose records are in `shards` shards each, at first."""

    def __init__(self, log: MemoryBackend, clock: ManualClock, shards: int, hold: float) -> None:
        self.log, self._clock, self._shards, self._hold = log, clock, shards, hold
        self._channels: dict[str, Channel] = {}

    def channel(self, name: str) -> Channel:
        if name not in self._channels:
            shards = MemoryShards(self._clock, self._shards, pace=1.0)
            self._channels[name] = ShardedChannel(
                name, shards, self.log, self._clock, put=shards.put, hold=self._hold
            )
        return self._channels[name]


def opener(clock: ManualClock, shards: int, hold: float) -> Opener:
    """Opens a new one each time."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Backend]:
        async with open_backend("memory://", Environment(clock, cast("Any", None))) as log:
            yield cast("Backend", Sharded(log, clock, shards, hold))

    def open_it() -> AbstractAsyncContextManager[Backend]:
        return opened()

    return open_it
