"""A member of 20 GB under deadlines of 60 s: its rows into SQLite behind Lambda's entry point.

Every invocation passes over what the ones before have loaded: inflated, not parsed. The archive is made of
one piece that the server sends again and again; rows have 4 KB, of which the lane keeps the number. Checked:
the count of rows and the sum of their numbers.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import zips
from benchmarks.harness import Bar, Candidate, Case, peak_mb, python
from benchmarks.stores import invoke
from benchmarks.zip_server import serving

SIZE = 20_000_000_000
DEADLINE = 60.0
LEAST = 3.0


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """The archive on a server; a smaller one has shorter deadlines."""
    size = size or SIZE
    deadline = max(LEAST, DEADLINE * size / SIZE) if size < SIZE else DEADLINE
    made = zips.one_member(scratch, size, rows=zips.wide_rows)
    with serving(made.layout) as url:
        yield [
            Candidate(
                "flowlane", python("zip_resume", url, made.size, made.rows, made.total, deadline, scratch)
            )
        ]


CASE = Case(
    "zip-resume",
    "rows of a member of 20 GB into SQLite behind Lambda's entry point, 60 s an invocation",
    opened,
    {
        "speed": "MB/s",
        "invocations": "invocations",
        "longest": "longest s",
        "peak": "peak MB",
        "cpu": "CPU s",
    },
    [
        Bar("flowlane", "invocations", "at least", 2),
        Bar("flowlane", "peak", "at most", 150),
        Bar("flowlane", "share", "at most", 1),
    ],
    rounds=1,
)


def lane_of(url: str, to: str) -> Any:
    """A lane that loads one member."""
    from flowlane import Context, Event, Lane, Unit

    class Found(Unit, key=("url",)):
        url: str

    lane = Lane("resume")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield Found(url=url)

    @lane.stage(on=Found, name="load")
    async def load(event: Event, ctx: Context) -> None:
        rows = ctx.rows(event.data.url, entry=0).map(lambda record: {"number": int(record["number"])})
        await ctx.load(rows, to=to)

    return lane


def main(url: str, size: int, rows: int, total: int, deadline: float, scratch: Path) -> dict[str, float]:
    """The candidate, in this process."""
    folder = scratch / f"resume-{time.monotonic_ns()}"
    folder.mkdir()
    table = folder / "rows.db"
    began, cpu = time.perf_counter(), time.process_time()
    lane = lane_of(url, f"sqlite:///{table}?table=rows")
    invocations, longest, report = invoke(lane, folder, deadline, FLOWLANE_ALLOW_PRIVATE_HOSTS="1")
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert (report["outcome"], report["units"]["settled"]) == ("settled", 1), report
    found = sqlite3.connect(table).execute("SELECT count(*), sum(number) FROM rows").fetchone()
    assert found == (rows, total), f"{found}, not {(rows, total)}"
    return {
        "speed": size / seconds / 1e6,
        "invocations": invocations,
        "longest": longest,
        "share": longest / deadline,
        "peak": peak_mb(),
        "cpu": cpu,
    }


if __name__ == "__main__":
    where, size, rows, total, seconds, folder = sys.argv[1:]
    print(json.dumps(main(where, int(size), int(rows), int(total), float(seconds), Path(folder))))
