"""Real lanes under seeded trouble: nothing lost, nothing doubled, every fault kind having fired."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys

import msgspec
import pytest

from flowlane.backends.memory import MemoryBackend
from flowlane.testing.faults import Process
from flowlane.testing.simulator import KINDS, Tally, again, simulate

SEEDS = 300
#: In one test: a slow machine that has other tests to run needs minutes for all of them.
_SHARE = 100
_PROCESSES = 2
_SIMULATOR = ("-m", "flowlane.testing.simulator", "--json")


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, SEEDS, _SHARE))
def test_no_seed_shows_a_violation_and_every_fault_fires(first: int) -> None:
    each = _SHARE // _PROCESSES
    started = [
        subprocess.Popen(
            [sys.executable, *_SIMULATOR, "--seeds", f"{begin}:{begin + each}"], stdout=subprocess.PIPE
        )
        for begin in range(first, first + _SHARE, each)
    ]
    tallies = [msgspec.json.decode(process.communicate()[0], type=Tally) for process in started]
    bad = {again(seed): texts for tally in tallies for seed, texts in tally.bad.items()}
    assert not bad, bad
    assert sum(tally.seeds for tally in tallies) == _SHARE
    assert [kind for kind in KINDS if not any(kind in tally.fired for tally in tallies)] == []
    reached = {port for tally in tallies for port in tally.reached}
    assert {"writer.write", "upload.commit", "notify.post", "delivery.extend", "sink.open"} <= reached
    assert {"channel.next", "batch.settle", "batch.extend", "shards.list", "shards.page"} <= reached


def test_a_seed_is_the_same_every_time_in_every_process() -> None:
    here = simulate(7)
    script = "from flowlane.testing.simulator import simulate; print(simulate(7).hash)"
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert here.hash == simulate(7).hash == there.stdout.split()[-1]
    assert here.hash != simulate(8).hash


@pytest.mark.parametrize("kind", ["pause", "lost message", "clock offset"])
def test_each_kind_alone_is_harmless(kind: str) -> None:
    for seed in range(5):
        outcome = simulate(seed, [kind])
        assert outcome.violations == []


def test_nothing_is_left_of_a_seed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="flowlane")  # what is logged is kept by pytest, frames and all

    kinds = (Process, MemoryBackend, asyncio.Task)  # of the type: isinstance asks proxies of what is gone

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(known), kinds) for known in gc.get_objects())

    simulate(0)
    before = alive()
    for seed in (0, 2, 4):  # changes carried by a queue, by a stream, by a channel
        simulate(seed)
        assert alive() <= before


def test_it_runs_on_a_loop_of_its_own_within_another() -> None:
    async def main() -> str:
        return simulate(3).hash

    assert asyncio.run(main()) == simulate(3).hash
