"""``aws://`` keeps a backend's promises: the shipped suite, on MiniStack."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest

from flowlane.testing.backend_model import Storage, check_against_model
from flowlane.testing.backend_suite import BackendSuite
from flowlane.testing.manual import ManualClock
from tests.aws_backend import RealClock, storage_on


class TestOnMiniStack(BackendSuite):
    """Leases are SQS's: whole seconds, by its own clock; an ack after the end of one may still count."""

    persistent = True
    exact_leases = False
    LEASE: ClassVar[float] = 2.0
    CUTS: ClassVar[int] = 4

    @pytest.fixture
    def clock(self) -> ManualClock:
        return RealClock()

    @pytest.fixture
    def storage(self, clock: ManualClock, ministack: str) -> Storage:
        return storage_on(clock)

    async def elapse(self, clock: ManualClock, seconds: float) -> None:
        await asyncio.sleep(seconds + 0.1)  # the stand-in's time, which nobody can move

    @pytest.mark.parametrize("examples", [2])  # every step asks some fifty times
    def test_it_does_what_the_model_does(self, storage: Storage, clock: ManualClock, examples: int) -> None:
        check_against_model(storage, clock, examples)
