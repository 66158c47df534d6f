"""The committer: which commits go to the log together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from flowlane import Context, Event
from flowlane.backends.memory import MemoryBackend
from flowlane.clock import Clock
from flowlane.errors import VersionConflict
from flowlane.lane import Policy
from flowlane.ports import Commit, Committed
from tests.engine.test_engine import Bench, Thing, lane_of, virtual

#: How many are handled at once; each turn of the loop ends as many.
AT_ONCE = 16
THINGS = 60 * AT_ONCE


class Grouped(MemoryBackend):
    """Notes how many commits come at a time, and takes `seconds` for them."""

    seconds = 0.0

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.sizes: list[int] = []

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        self.sizes.append(len(work))
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return await super().commit(work)


async def sizes_of(bench: Bench, *, seconds: float, busy: float = 0.0) -> list[int]:
    """Of how many commits each group was in a run of ``THINGS`` that each keep the loop `busy` for so many
    seconds, on a log that takes `seconds` for a group."""
    bench.backend = log = Grouped(bench.clock)
    log.seconds = seconds

    async def load(event: Event, ctx: Context) -> None:
        await asyncio.sleep(0)
        bench.loop._virtual += busy  # as a handler that computes

    policy = Policy(concurrency=AT_ONCE)
    report = await bench.run(lane_of(load, units=[Thing(n=n) for n in range(THINGS)], policy=policy))
    assert report.units["settled"] == THINGS
    return log.sizes


@virtual
async def test_what_a_busy_loop_brings_turn_by_turn_goes_to_a_log_outside_together(bench: Bench) -> None:
    sizes = await sizes_of(bench, seconds=0.01)
    whole = [n for n, size in enumerate(sizes) if size >= 8 * AT_ONCE]
    assert len(whole) >= 2, "as many as were received together, once the pace is known"
    assert whole == [*range(whole[0], whole[-1] + 1)], "none is split: a few now, and the others later"


@virtual
async def test_a_log_in_memory_is_not_kept_waiting(bench: Bench) -> None:
    sizes = await sizes_of(bench, seconds=0.0)
    assert max(sizes) <= 2 * AT_ONCE


@virtual
async def test_a_group_does_not_wait_for_long_however_busy_the_loop(bench: Bench) -> None:
    """Each turn brings more, and takes 10 ms: some four turns are a group."""
    sizes = await sizes_of(bench, seconds=0.001, busy=0.01 / AT_ONCE)
    assert 2 * AT_ONCE < max(sizes) <= 6 * AT_ONCE
