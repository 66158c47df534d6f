"""A stage whose units a channel brings, under crashes at every port call, pauses past its holds, and losses:
judged by table and log alone."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from flowlane import Context, Event, Lane, Permanent, Policy, Retryable, Unit
from flowlane.backends.common import CHANNEL_LEASE
from flowlane.conveyor import CONSUMER
from flowlane.deadline import Deadline
from flowlane.testing.clock import VirtualLoop, run
from flowlane.testing.faults import MODES, CrashAt, Process
from tests.simulation.lab import Lab

POLICY = Policy(concurrency=2, retries=8, timeout=60.0, backoff=0.1, backoff_cap=0.2, lease=1.5, batch=2)
CUSTOMERS, EACH = "ab", 3
TABLE = "table://changes"


class Change(Unit, key=("customer", "n")):
    """Records to load in the order in which the changes of their customer come."""

    customer: str
    n: int


def lanes(process: Process) -> Sequence[Lane]:
    """Three changes of each of two customers; some fail at first, and one for good."""
    lane = Lane("change", policy=POLICY)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> Any:
        for n in range(EACH):
            for customer in CUSTOMERS:
                yield Change(customer=customer, n=n)

    @lane.stage(on=Change, order="customer", via="channel")
    async def apply(event: Event, ctx: Context) -> None:
        change = (event.data.customer, event.data.n)
        if change == ("b", 0):
            raise Permanent("it never fits")
        if change in (("a", 0), ("b", 1)) and ctx.attempts_left == POLICY.retries:
            raise Retryable("busy")
        await ctx.load(ctx.rows(f"rows://{change[0]}/{change[1]}"), to=TABLE)

    return [lane]


def publish(lab: Lab) -> None:
    """What there is to load: three records of each change."""
    for customer in CUSTOMERS:
        for n in range(EACH):
            rows = [{"customer": customer, "n": n, "row": row} for row in range(3)]
            lab.world.tables.publish(f"rows://{customer}/{n}", [rows])


async def wrong(lab: Lab, *, ordered: bool = True) -> list[str]:
    """What table and log show that they should not: each record once, those of a customer in order."""
    rows = [(row["customer"], row["n"], row["row"]) for row in lab.world.tables.tables[TABLE].rows]
    wanted = [(c, n, row) for c in CUSTOMERS for n in range(EACH) for row in range(3) if (c, n) != ("b", 0)]
    found = [] if Counter(rows) == Counter(wanted) else [f"the table has {Counter(rows)}"]
    if ordered and sorted(rows, key=lambda row: row[0]) != wanted:
        found.append(f"out of order: {sorted(rows, key=lambda row: row[0])}")
    return found + await lab.violations()


def crashed(number: int, mode: str) -> tuple[list[str], int]:
    """The run with a fault at that port call (0: none), and another process after one that died."""
    faults = CrashAt(number, mode)

    async def main(loop: VirtualLoop) -> list[str]:
        lab = Lab(loop, lanes)
        publish(lab)
        first = lab.process(faults)
        # It has to end in the middle of its work, and what it goes on with stays in its place.
        deadline = Deadline(first.clock.monotonic() + 2.0, 1.0)
        stuck = await lab.until_done(first, lab.run(deadline=deadline), again=lab.run(), faults=faults)
        stuck = stuck or await lab.until_done(lab.process(faults), lab.run(), faults=faults)
        return ([stuck] if stuck else []) + await wrong(lab)

    return run(main, seed=number), len(faults.calls)


@pytest.mark.parametrize("mode", MODES)
def test_a_crash_at_any_call_changes_nothing(mode: str) -> None:
    found, calls = crashed(0, "")
    assert found == []
    assert calls > 50
    # Each mode takes other calls: every call is a crash point in one of them.
    for number in range(1 + MODES.index(mode), calls + 1, len(MODES)):
        assert crashed(number, mode)[0] == [], f"call {number}, {mode}"


def test_nothing_is_left_of_a_crash() -> None:
    """What stays costs all later simulations of its process: each looks through all tasks that there are."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(known), asyncio.Task) for known in gc.get_objects())

    crashed(40, MODES[0])
    before = alive()
    for number, mode in enumerate(MODES, 40):
        crashed(number, mode)
        assert alive() <= before


@pytest.mark.parametrize("seed", range(12))
def test_processes_that_pause_past_their_holds_and_die_change_nothing(seed: int) -> None:
    async def main(loop: VirtualLoop) -> list[str]:
        lab = Lab(loop, lanes)
        publish(lab)
        processes = [lab.process(latency=0.3).start(lab.handle()) for _ in range(3)]
        for _ in range(3):
            await asyncio.sleep(loop.rng.uniform(0.2, 3.0))
            victim = loop.rng.choice(processes)
            if loop.rng.random() < 0.5:
                await victim.freeze(loop.rng.uniform(1.0, 3 * CHANNEL_LEASE))
            else:
                victim.kill()
                processes.remove(victim)
                processes.append(lab.process(latency=0.3).start(lab.handle()))
        for process in processes:
            process.kill()
        stuck = await lab.until_done(lab.process(), lab.run())
        return ([stuck] if stuck else []) + await wrong(lab)

    assert run(main, seed=seed) == []


def test_what_the_channel_loses_again_and_again_is_made_good() -> None:
    """An operator moves the position past all that is there, in the middle of a run. The order of what was
    lost is nobody's promise."""

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        publish(lab)
        process = lab.process(latency=0.1)
        done = loop.create_task(lab.until_done(process, lab.run()))
        for _ in range(3):
            await asyncio.sleep(1.0)
            channel = lab.memory.channel("change/apply")
            ends = {lag.partition: lag.position + (lag.records or 0) for lag in await channel.lag(CONSUMER)}
            await channel.rewind(CONSUMER, ends)
        assert await done == ""
        assert await wrong(lab, ordered=False) == []

    run(main, seed=1)


def test_a_replay_from_the_beginning_changes_nothing() -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        publish(lab)
        done = loop.create_task(lab.until_done(lab.process(latency=0.1), lab.run()))
        for _ in range(4):
            await asyncio.sleep(1.0)
            await lab.memory.channel("change/apply").rewind(CONSUMER)
        assert await done == ""
        events = len((await lab.log()).events)
        await lab.memory.channel("change/apply").rewind(CONSUMER)
        again = lab.process().start(lab.handle())
        await asyncio.sleep(5.0)
        again.kill()
        assert [lag.records for lag in await lab.memory.channel("change/apply").lag(CONSUMER)] == [0, 0]
        assert (await lab.log()).events[events:] == []
        assert await wrong(lab) == []

    run(main, seed=1)
