"""The long proofs: ``python -m tests.prove --seconds 600`` (``make prove TIME=600``).

A proof is a function that is given a budget of seconds and returns what it showed; it raises
``AssertionError`` with the seed (or crash point) and what shows it again. Each gets its share of the time.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from zstandard import ZstdCompressor

from flowlane import CsvFormat, FlowlaneError, events
from flowlane.aws_lambda import objects
from flowlane.aws_lambda.payload import batch
from flowlane.aws_lambda.wanted import understand, understand_direct
from flowlane.backends.memory import MemoryBackend
from flowlane.streams import kpl
from flowlane.streams.csvrows import CsvRows
from flowlane.streams.inflate import decoder
from flowlane.streams.jsonrows import JsonRows
from flowlane.testing.channels import ShardedBackend
from flowlane.testing.faults import MODES
from flowlane.testing.simulator import Tally, again, campaign
from tests.aws_lambda.aggregate import aggregate
from tests.kills.campaign import Campaign
from tests.kills.channel import ChannelCampaign
from tests.kills.drops import DropsCampaign
from tests.simulation.channel_scene import scene
from tests.simulation.crashes import SCENES, calm, crash
from tests.streams.zip.fuzz import apart

Proof = Callable[[float], str]

_PROCESSES = 2
_CHUNK_SECONDS = 30.0
_CHUNK_SEEDS = 10_000


def seeds(seconds: float) -> str:
    """The simulator, from a random seed on."""
    first = random.SystemRandom().randrange(10**9)
    share = 10**8
    tallies: list[Tally] = []
    end = time.monotonic() + seconds
    # A process for every half minute: the tasks of simulated processes that died are never finished, and
    # what they hold on to is only gone with theirs.
    context = get_context("spawn")
    with ProcessPoolExecutor(_PROCESSES, mp_context=context, max_tasks_per_child=1) as pool:
        while (left := end - time.monotonic()) > 0:
            starts = [first + n * share for n in range(_PROCESSES)]
            tallies += pool.map(_campaign, starts, [min(left, _CHUNK_SECONDS)] * _PROCESSES)
            first += _CHUNK_SEEDS
    bad = {again(seed): texts for tally in tallies for seed, texts in tally.bad.items()}
    assert not bad, bad
    total = Tally()
    for tally in tallies:
        total.seeds += tally.seeds
        total.deliveries += tally.deliveries
        total.hours += tally.hours
        total.fired = dict(Counter(total.fired) + Counter(tally.fired))
    total.seconds = seconds
    assert not total.never or total.seeds < 300, f"never fired: {total.never}"
    return str(total)


def _campaign(first: int, seconds: float) -> Tally:
    return campaign(range(first, first + _CHUNK_SEEDS), seconds=seconds)


def channels(seconds: float) -> str:
    """Change records through channels and streams of shards, in trouble, from a random seed on."""
    logging.getLogger("flowlane").setLevel(logging.ERROR)
    seed, end, done = random.SystemRandom().randrange(10**9), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for backend in (MemoryBackend, ShardedBackend):
            wrong, _ = scene(seed + done, backend)
            assert not wrong, f"scene({seed + done}, {backend.__name__}): {wrong}"
        done += 1
    return f"{done:,} seeds: every change applied once and in order"


def crash_points(seconds: float) -> str:
    """Every port call of every scene as a crash point, in every mode, of which the suite leaves some out."""
    cells = [
        (name, call, mode)
        for name in SCENES
        for mode in MODES
        for call in range(1, len(calm(name).calls) + 1)
    ]
    random.SystemRandom().shuffle(cells)
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        shares = [cells[n::_PROCESSES] for n in range(_PROCESSES)]
        done = sum(pool.map(_points, shares, [seconds] * _PROCESSES))
    return f"{done:,} of {len(cells):,} crash points: effects and log as undisturbed"


def _points(cells: Sequence[tuple[str, int, str]], seconds: float) -> int:
    end = time.monotonic() + seconds
    for done, (name, call, mode) in enumerate(cells):
        if time.monotonic() > end:
            return done
        found = crash(name, call, mode)
        assert not found, f"crash({name!r}, {call}, {mode!r}): {found}"
    return len(cells)


def crash_pairs(seconds: float) -> str:
    """Crash points in pairs: the second one often hits what sees to the first."""
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        first = random.SystemRandom().randrange(10**9)
        done = list(pool.map(_pairs, [first + n for n in range(_PROCESSES)], [seconds] * 2))
    return f"{sum(done):,} pairs of crash points in random modes: effects and log as undisturbed"


def _pairs(seed: int, seconds: float) -> int:
    rng, end, done = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        name = rng.choice(list(SCENES))
        calls = len(calm(name).calls)
        one, other = rng.randrange(1, calls + 1), rng.randrange(1, 2 * calls)
        modes = rng.choice(MODES), rng.choice(MODES)
        found = crash(name, one, modes[0], (one + other, modes[1]))
        assert not found, f"crash({name!r}, {one}, {modes[0]!r}, ({one + other}, {modes[1]!r})): {found}"
        done += 1
    return done


def kills(seconds: float) -> str:
    """kill -9 of two workers on one SQLite file, each in the middle of effect, commit or ack."""
    with TemporaryDirectory() as folder:
        killing = Campaign(Path(folder), hours=500 + int(20 * seconds), seed=random.randrange(10**9))
        killing.run(kills=10**9, seconds=0.7 * seconds)  # the rest to see everything through
        return f"{sum(killing.hits.values()):,} kills {dict(killing.hits)}: nothing lost, nothing doubled"


def drop_kills(seconds: float) -> str:
    """kill -9 of two workers that load drops of the same tables, out of order and doubled."""
    with TemporaryDirectory() as folder:
        killing = DropsCampaign(Path(folder), seed=random.randrange(10**9))
        killing.run(kills=10**9, seconds=0.7 * seconds)  # as above
        killed = f"{sum(killing.hits.values()):,} kills {dict(killing.hits)}"
        return f"{killed}, {killing.drops:,} drops: tables as loaded in order"


def channel_kills(seconds: float) -> str:
    """kill -9 of three workers that apply the records of a stream, while one of its shards is split."""
    with TemporaryDirectory() as folder:
        records = int(5_000 * seconds)
        killing = ChannelCampaign(Path(folder), records, keys=10_000, seed=random.randrange(10**9))
        killing.run(timeout=10 * seconds + 60)
        return f"{records:,} records, {killing.kills} kills: applied in order, once in effect"


def archives(seconds: float) -> str:
    """Bent ZIP archives, read with their members: a typed error or the truth, in bounded time and memory."""
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        first = random.SystemRandom().randrange(10**9)
        done = sum(
            pool.map(apart, [first + n for n in range(_PROCESSES)], [seconds] * _PROCESSES), Counter[str]()
        )
    return f"{done.pop('archives'):,} archives, {dict(done)} of them or of their members"


def fuzz(seconds: float) -> str:
    """Junk into every decoder: a typed error or a value, never anything else."""
    chance, end, done = random.Random(), time.monotonic() + seconds, Counter[str]()
    while time.monotonic() < end:
        name, seed, target = chance.choice(JUNK)
        junk = bytearray(seed)
        for _ in range(chance.randrange(1, 8)):
            at = chance.randrange(len(junk) + 1)
            junk[at : at + chance.choice((0, 0, 1, 1, 8))] = chance.randbytes(chance.choice((0, 1, 1, 3)))
        said = ""
        try:
            target(bytes(junk))
        except FlowlaneError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{name} raised {error!r} for {bytes(junk)!r}") from error
        assert "\n" not in said, (name, bytes(junk))
        done[name] += 1
    return f"{sum(done.values()):,} inputs {dict(done)}"


def _decode(name: str) -> Callable[[bytes], object]:
    def target(junk: bytes) -> None:
        decoding = decoder(name)
        for at in range(0, len(junk), 7):
            for _piece in decoding.feed(junk[at : at + 7]):
                pass
        decoding.close()

    return target


def _rows(make: Callable[[], CsvRows | JsonRows]) -> Callable[[bytes], object]:
    def target(junk: bytes) -> None:
        rows = make()
        for at in range(0, len(junk), 11):
            list(rows.feed(junk[at : at + 11]))
        list(rows.close())

    return target


_EVENT = events.encode(
    events.Event(
        "1", "lane", "hour", "lane/hour/1", "2024-01-01T00:00:00.000Z", events.EMPTY, 1, "lane/run/1"
    )
)
_LAMBDA = msgspec.json.encode(
    {"Records": [{"s3": {"bucket": {"name": "b"}, "object": {"key": "a+b", "eTag": "e", "sequencer": "0A"}}}]}
)


def _lambda_event(junk: bytes) -> None:
    """The event, and whatever messages are in it."""
    try:
        value = msgspec.json.decode(junk)
    except (msgspec.DecodeError, UnicodeError):
        return
    if batch(value) is None:
        understand_direct(value, "lane")
        objects(value)


#: What is mutated, and what it is fed to.
JUNK: Sequence[tuple[str, bytes, Callable[[bytes], object]]] = (
    ("event", _EVENT, events.decode),
    ("message", _EVENT, lambda junk: understand(junk, "lane")),
    ("lambda event", _LAMBDA, _lambda_event),
    ("aggregate", aggregate(("a", _EVENT), ("b", _EVENT)), kpl.unpack),
    ("gzip", gzip.compress(b"one line\n" * 50, mtime=0) * 2, _decode("x.gz")),
    ("zstd", ZstdCompressor().compress(b"one line\n" * 50) * 2, _decode("x.zst")),
    ("csv", b'id,name\r\n1,"a, ""b""\nc"\n2,\xc3\xa9\n', _rows(lambda: CsvRows(CsvFormat()))),
    ("json lines", b'{"a": 1}\n{"b": [1, {"c": "\\u00e9"}]}\n\n', _rows(JsonRows)),
)


#: Every proof, and its share of the time.
PROOFS: Sequence[tuple[Proof, float]] = (
    (seeds, 3.0),
    (channels, 0.5),
    (crash_points, 0.5),
    (crash_pairs, 1.0),
    (kills, 1.5),
    (drop_kills, 1.0),
    (channel_kills, 0.5),
    (fuzz, 0.5),
    (archives, 0.5),
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
