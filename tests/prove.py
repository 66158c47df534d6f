"""The long proofs: ``python -m tests.prove --seconds 600`` (``make prove TIME=600``).

A proof is a function that is given a budget of seconds and returns what it showed; it raises
``AssertionError`` with the seed (or crash point) and what shows it again. Each gets its share of the time.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from flowlane.testing.faults import MODES
from flowlane.testing.simulator import Tally, again, campaign
from tests.simulation.crashes import calm, crash

Proof = Callable[[float], str]

_PROCESSES = 2


def seeds(seconds: float) -> str:
    """The simulator, from a random seed on."""
    first = random.SystemRandom().randrange(10**9)
    share = 10**8
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        tallies = list(pool.map(_campaign, [first + n * share for n in range(_PROCESSES)], [seconds] * 2))
    bad = {again(seed): texts for tally in tallies for seed, texts in tally.bad.items()}
    assert not bad, bad
    total = Tally()
    for tally in tallies:
        total.seeds += tally.seeds
        total.deliveries += tally.deliveries
        total.hours += tally.hours
        total.fired = dict(Counter(total.fired) + Counter(tally.fired))
        total.seconds = max(total.seconds, tally.seconds)
    assert not total.never or total.seeds < 300, f"never fired: {total.never}"
    return str(total)


def _campaign(first: int, seconds: float) -> Tally:
    return campaign(range(first, first + 10**8), seconds=seconds)


def crash_pairs(seconds: float) -> str:
    """Crash points in pairs: the second one often hits what sees to the first."""
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        first = random.SystemRandom().randrange(10**9)
        done = list(pool.map(_pairs, [first + n for n in range(_PROCESSES)], [seconds] * 2))
    return f"{sum(done):,} pairs of crash points in random modes: lake and log as undisturbed"


def _pairs(seed: int, seconds: float) -> int:
    rng, end, done = random.Random(seed), time.monotonic() + seconds, 0
    calls = len(calm().calls)
    while time.monotonic() < end:
        one, other = rng.randrange(1, calls + 1), rng.randrange(1, 2 * calls)
        modes = rng.choice(MODES), rng.choice(MODES)
        found = crash(one, modes[0], (one + other, modes[1]))
        assert not found, f"crash({one}, {modes[0]!r}, ({one + other}, {modes[1]!r})): {found}"
        done += 1
    return done


#: Every proof, and its share of the time.
PROOFS: Sequence[tuple[Proof, float]] = (
    (seeds, 3.0),
    (crash_pairs, 1.0),
)


def main() -> int:
    """Run all proofs; 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="for all of them together")
    parser.add_argument("--only", choices=[proof.__name__ for proof, _ in PROOFS], help="one of them")
    given = parser.parse_args()
    chosen = [(proof, share) for proof, share in PROOFS if given.only in (None, proof.__name__)]
    total, failed = sum(share for _, share in chosen), 0
    for proof, share in chosen:
        print(f"{proof.__name__}: {(proof.__doc__ or '').splitlines()[0]}", flush=True)
        try:
            print(f"  {proof(given.seconds * share / total)}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"  FAILED: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
