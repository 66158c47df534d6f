"""Channels on Kinesis keep the promises of a channel: the shipped suite, on MiniStack."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from flowlane.ports import Backend
from flowlane.testing.backend_model import Opener, Storage
from flowlane.testing.channel_suite import ChannelSuite
from flowlane.testing.manual import ManualClock
from tests.aws_backend import RealClock, new_name, opened

#: The channels that the suite uses.
CHANNELS = ("changes", "other")


class PushedClock(RealClock):
    """Goes on by itself, and can be pushed: nobody waits for a hold to run out, nor loses one to a machine
    that stands still for seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._pushed = 0.0

    def advance(self, seconds: float) -> None:
        self._pushed += seconds

    def monotonic(self) -> float:
        return super().monotonic() + self._pushed


class TestOnMiniStack(ChannelSuite):
    """Leases are in the log, on DynamoDB."""

    persistent = True
    HOLD: ClassVar[float] = 10.0
    CUTS: ClassVar[int] = 4

    @pytest.fixture
    def clock(self) -> ManualClock:
        return PushedClock()

    @pytest.fixture
    def storage(self, clock: ManualClock, ministack: str) -> Storage:
        def storage() -> Opener:
            name, made = new_name(), False

            @asynccontextmanager
            async def opening() -> AsyncIterator[Backend]:
                nonlocal made
                async with opened(name, clock) as backend:
                    channels = backend._channels()
                    channels._hold = self.HOLD
                    if not made:
                        await backend.create([])
                        for channel in CHANNELS:  # of two shards: on demand the stand-in makes one
                            await channels._client.create_stream(StreamName=f"{name}-{channel}", ShardCount=2)
                        made = True
                    yield backend

            return opening

        return storage
