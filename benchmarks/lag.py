"""How long the event loop is kept from its other work at full speed: while archives are landed and decoded,
and while members of zips are proven, inflated and parsed.

A task asks to be woken every millisecond and notes how much later it is. Only while an archive is on its way:
an idle loop would make every figure look good. The bare loop, which decodes on the loop itself, shows what
not caring costs.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import zip_member, zip_server, zips
from benchmarks.archive import PIECE, make_piece
from benchmarks.harness import Bar, Candidate, Case, python
from benchmarks.landing import bare
from benchmarks.server import serving

SIZE = 1 << 30
TICK = 0.001
HOURS = 8
MEMBER = 8  #: a member has so much less: parsing takes its time
MEMBERS = 4


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """One archive of that size, or eight of an eighth of it at once."""
    size = size or SIZE
    piece = scratch / "piece.gz"
    unit, _ = make_piece(piece, min(PIECE, size // HOURS))
    count = max(1, round(size / unit / HOURS))
    made = zips.one_member(scratch, size // MEMBER)
    with (
        serving(piece, count * HOURS) as large,
        serving(piece, count) as small,
        zip_server.serving(made.layout) as zipped,
    ):
        yield [
            Candidate("one archive", python("lag", "one", large, scratch)),
            Candidate("eight at once", python("lag", "eight", small, scratch)),
            Candidate("rows of a member", python("lag", "member", zipped, scratch)),
            Candidate("of four at once", python("lag", "members", zipped, scratch)),
            Candidate("bare loop", python("lag", "bare", large, scratch)),
        ]


CASE = Case(
    "lag",
    "event-loop lag while landing and decoding 1 GiB, 1 ms sampler, busy time only",
    opened,
    {"p99": "p99 ms", "median": "median ms", "max": "maximum ms", "samples": "samples", "busy": "busy s"},
    [
        Bar("one archive", "p99", "at most", 20),
        Bar("eight at once", "p99", "at most", 20),
        Bar("rows of a member", "p99", "at most", 20),
        Bar("of four at once", "p99", "at most", 20),
    ],
)


class Sampler:
    """The lags, in milliseconds, of the ticks that began while `busy`."""

    def __init__(self) -> None:
        self.lags: list[float] = []
        self.busy = 0
        self.seconds = 0.0

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            busy, began = self.busy, time.perf_counter()
            await asyncio.sleep(TICK)
            passed = time.perf_counter() - began
            if busy:
                self.lags.append((passed - TICK) * 1000)
                self.seconds += passed


async def flowlane(base: str, folder: Path, hours: int, sampler: Sampler) -> None:
    """Land `hours` archives, verified by content; busy is while any of them is being landed."""
    from flowlane.compose import open_application
    from flowlane.recipes import http_archive
    from flowlane.settings import Settings
    from flowlane.worker import run_once

    lane = http_archive(
        "land",
        url=base + "/{t:%Y-%m-%d}-{t.hour}.json.gz",
        start="2024-01-01T00",
        until=f"2024-01-01T{hours:02}",
        to=folder.as_uri(),
    )
    landing = lane.stages[1]

    async def land(event: Any, ctx: Any) -> None:
        sampler.busy += 1
        await landing.handler(event, ctx)
        sampler.busy -= 1

    lane.stages[1] = replace(landing, handler=land)
    settings = Settings(backend=f"sqlite:///{folder / 'log.db'}", allow_private_hosts=True)
    async with open_application([lane], settings) as app:
        report = await run_once(app, lane)
    assert (report.outcome, report.units["settled"]) == ("settled", hours), report


async def members(url: str, count: int) -> None:
    """The rows of the same member, proven and read `count` times at once."""
    async with zip_member.web() as environment, asyncio.TaskGroup() as tasks:
        for _ in range(count):
            tasks.create_task(zip_member.rows(environment, url, proves=True, entry=0))


async def measured(kind: str, base: str, folder: Path) -> dict[str, float]:
    """One candidate, sampled."""
    sampler = Sampler()
    sampling = asyncio.create_task(sampler.run())
    if kind in ("member", "members"):
        sampler.busy = 1
        await members(base, MEMBERS if kind == "members" else 1)
        sampler.busy = 0
    elif kind == "bare":
        sampler.busy = 1
        await bare(base, folder)
        sampler.busy = 0
    else:
        await flowlane(base, folder, HOURS if kind == "eight" else 1, sampler)
    sampling.cancel()
    for path in folder.glob("*.gz"):
        path.unlink()
    lags = sorted(sampler.lags)
    return {
        "p99": lags[int(len(lags) * 0.99)],
        "median": median(lags),
        "max": lags[-1],
        "samples": len(lags),
        "busy": sampler.seconds,
    }


def main(kind: str, base: str, scratch: Path) -> dict[str, float]:
    """One candidate, in this process."""
    folder = scratch / f"{kind}-{time.monotonic_ns()}"
    folder.mkdir()
    return asyncio.run(measured(kind, base, folder))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
