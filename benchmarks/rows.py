"""Rows of a CSV into a SQLite table, end to end, beside the loop around the driver that one would write.

flowlane runs a whole lane: a run, its log (a SQLite file of its own), one unit that loads the rows in batches
of 10,000, each a transaction with its position and the writer's token. The loop reads with ``csv.reader`` and
has ``executemany`` write as many rows a transaction, by the same upsert, into the same table with the same
settings of the file. Once from a plain file, once from a deflated member of a zip: there flowlane inflates
twice, since it proves the member before its first row is written; the loop has ``zipfile``, which proves it
at its end. The rows in the table are compared with those of the file after the clock has stopped.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
import sqlite3
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

from benchmarks.engine import Meter
from benchmarks.harness import Bar, Candidate, Case, peak_mb, python

ROWS = 500_000
BATCH = 10_000
COLUMNS = ("id", "customer", "status", "total", "day", "priority", "clerk", "ship", "comment")
#: The upsert that flowlane's sink makes of a table with the key ``id``.
UPSERT = (
    f"INSERT INTO orders ({', '.join(COLUMNS)}, _flowlane_generation) "
    f"VALUES ({', '.join('?' * (len(COLUMNS) + 1))}) ON CONFLICT (id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in (*COLUMNS[1:], "_flowlane_generation"))
    + " WHERE excluded._flowlane_generation >= orders._flowlane_generation"
)
TABLE = (
    f"CREATE TABLE orders ({', '.join(f'{name} TEXT' for name in COLUMNS)}, "
    "_flowlane_generation INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (id))"
)


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """The rows, in a file and in a zip."""
    rows = size or ROWS
    make(scratch, rows)
    yield [
        Candidate(name, python("rows", kind, scratch, rows))
        for name, kind in (
            ("flowlane, file", "flowlane-csv"),
            ("executemany, file", "loop-csv"),
            ("flowlane, zip", "flowlane-zip"),
            ("executemany, zip", "loop-zip"),
        )
    ]


CASE = Case(
    "rows",
    f"{ROWS:,} rows of a CSV into a SQLite table, end to end",
    opened,
    {"rate": "rows/s", "cpu_row": "CPU us a row", "peak": "peak MB"},
    [
        # Nobody promised a ratio: these keep what there is from getting worse.
        Bar("flowlane, file", "cpu_row", "at most", 3, "executemany, file"),
        Bar("flowlane, zip", "cpu_row", "at most", 3, "executemany, zip"),
    ],
    peer="executemany, file",
)


def row(number: int) -> list[str]:
    """One order, of about 110 bytes."""
    return [
        f"{number * 7919 % 10_000_000:08}",
        f"customer-{number % 4999}",
        "OPF"[number % 3],
        f"{number * 131 % 500_000 / 100:.2f}",
        f"1998-{number % 12 + 1:02}-{number % 28 + 1:02}",
        f"{number % 5 + 1}-PRIORITY",
        f"Clerk#{number % 1000:09}",
        "",
        f'even, "bold" deposits of {number}' if number % 10 == 0 else f"requests sleep, {number} of them",
    ]


def make(folder: Path, rows: int) -> None:
    """``orders.csv``, and ``orders.zip`` with the same as its second member."""
    path = folder / "orders.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(map(row, range(rows)))
    with zipfile.ZipFile(folder / "orders.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme.txt", "orders")
        archive.write(path, "orders.csv")


async def flowlane(source: Path, table: Path, rows: int) -> tuple[float, float]:
    """Wall and CPU seconds of a lane that loads `source`."""
    from flowlane import Context, Event, Lane, Unit
    from flowlane.compose import open_application
    from flowlane.settings import Settings
    from flowlane.worker import run_once

    class File(Unit, key="url"):
        url: str

    lane = Lane("bench")
    member = {"entry": "orders.csv"} if source.suffix == ".zip" else {}

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield File(url=source.as_uri())

    @lane.stage(on=File)
    async def load(event: Event, ctx: Context) -> None:
        await ctx.load(ctx.rows(event.data.url, **member), to=f"sqlite:///{table}?table=orders&key=id")

    settings = Settings(backend=f"sqlite:///{table.with_suffix('.log')}")
    async with open_application([lane], settings) as app:
        meter = Meter()
        report = await run_once(app, lane)
        spent = meter.lap()
    assert (report.outcome, report.units["settled"]) == ("settled", 1), report
    return spent


def loop(source: Path, table: Path) -> tuple[float, float]:
    """Wall and CPU seconds of the loop."""
    meter = Meter()
    with closing(sqlite3.connect(table, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(TABLE)
        if source.suffix == ".zip":
            with zipfile.ZipFile(source) as archive, archive.open("orders.csv") as member:
                insert(connection, io.TextIOWrapper(member, "utf-8", newline=""))
        else:
            with source.open(newline="", encoding="utf-8") as file:
                insert(connection, file)
    return meter.lap()


def insert(connection: sqlite3.Connection, file: IO[str]) -> None:
    """All rows of `file`, ``BATCH`` a transaction."""
    reader = csv.reader(file)
    next(reader)
    while batch := [(*values, 1) for values in islice(reader, BATCH)]:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(UPSERT, batch)
        connection.execute("COMMIT")


def check(table: Path, rows: int) -> None:
    """The table holds the rows of the file."""
    digest, expected = hashlib.sha256(), hashlib.sha256()
    for values in sorted(map(row, range(rows))):
        expected.update(json.dumps(values).encode())
    with closing(sqlite3.connect(table)) as connection:
        for values in connection.execute(f"SELECT {', '.join(COLUMNS)} FROM orders ORDER BY id"):
            digest.update(json.dumps([value or "" for value in values]).encode())
    assert digest.digest() == expected.digest(), "rows are missing or wrong"


def main(kind: str, folder: Path, rows: int) -> dict[str, float]:
    """One candidate, in this process."""
    way, _, form = kind.partition("-")
    source, table = folder / f"orders.{form}", folder / f"{kind}-{time.monotonic_ns()}.db"
    wall, cpu = asyncio.run(flowlane(source, table, rows)) if way == "flowlane" else loop(source, table)
    peak = peak_mb()
    check(table, rows)
    for path in folder.glob(f"{table.stem}.*"):
        path.unlink()
    return {"rate": rows / wall, "cpu_row": cpu / rows * 1e6, "peak": peak}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
