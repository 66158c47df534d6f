"""Many drops of the same two tables, loaded by two workers that are killed over and over: handled out of
order, handed out twice, and in the end the tables are as if one drop had been loaded after the other."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from examples.tpch import pack
from flowlane.compose import open_application
from flowlane.lane import Lane
from flowlane.ports import Backend, Commit, Publish
from flowlane.settings import Settings
from flowlane.state import status
from flowlane.testing.oracle import Log, check
from flowlane.worker import run_once
from tests.kills.campaign import Killer
from tests.kills.victim import lane_of

TABLES = ("customers", "orders")
_KEYS, _ROWS = 500, 120
_BEGIN = 1_700_000_000  # of the drops' times of modification, a second between each
_EVOLVED = 7  # the first drop with the new column
_AT_ONCE = 4  # drops that come before each start of a worker
_DOUBLED = 30  # units handed out once more at a time

Rows = dict[int, dict[str, Any]]


def rows(drop: int, table: str) -> Rows:
    """What a drop has of a table, by key: every drop has other keys, and a later one has one column more."""
    keys = random.Random(f"{drop} {table}").sample(range(_KEYS), _ROWS)
    more = {"note": f"note {drop}"} if drop >= _EVOLVED else {}
    return {key: {"id": key, "state": f"{table} of drop {drop}", **more} for key in keys}


def archive(drop: int) -> bytes:
    """The zip of a drop."""
    files = {}
    for table in TABLES:
        found = list(rows(drop, table).values())
        lines = [",".join(found[0]), *(",".join(map(str, row.values())) for row in found)]
        files[f"{table}.csv"] = "".join(f"{line}\n" for line in lines)
        manifest = {"table": table, "partition_key": "id", "partition_key_type": "N"}
        files[f"{table}.json"] = json.dumps(manifest)
    return pack(files)


def expected(drops: int) -> dict[str, Rows]:
    """The tables after so many drops, one after the other."""
    tables: dict[str, Rows] = {table: {} for table in TABLES}
    for drop in range(drops):
        for table, known in tables.items():
            for key, row in rows(drop, table).items():
                known[key] = {**known.get(key, {}), **row}
    return tables


def read_tables(path: Path) -> dict[str, Rows]:
    """The tables as they are, without flowlane's own columns and without what is not there."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        tables: dict[str, Rows] = {}
        for table in TABLES:
            found = [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]
            tables[table] = {
                row["id"]: {n: value for n, value in row.items() if n[0] != "_" and value is not None}
                for row in found
            }
        return tables


class DropsCampaign(Killer):
    """The kills of workers that load drops; then the reckoning."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        (folder / "drops").mkdir()
        self.settings |= {
            "source": (folder / "drops").as_uri() + "/",
            "to": f"sqlite:///{folder}/tables.db",
        }
        self.drops = 0
        self.starts = 0
        self.doubled = 0
        self.inversions = 0

    def run(self, kills: int, seconds: float) -> None:
        """Kill so many times (or until the time is up), then see everything through without kills."""
        self.kill(kills, time.monotonic() + seconds)
        asyncio.run(self._see_through())

    def before_start(self) -> None:
        """More drops have come; now and then, what was handed out already is handed out again."""
        for _ in range(_AT_ONCE):
            self._lay()
        self.starts += 1
        if self.starts % 5 == 0:
            asyncio.run(self._double())

    def _lay(self) -> None:
        path = self.folder / "drops" / f"{self.drops:05}.zip"
        part = path.with_suffix(".part")
        part.write_bytes(archive(self.drops))
        os.utime(part, (_BEGIN + self.drops, _BEGIN + self.drops))
        part.rename(path)
        self.drops += 1

    async def _double(self) -> None:
        lane, settings = lane_of(self.settings), Settings(backend=self.settings["backend"])
        async with open_application([lane], settings) as app:
            await self._redeliver(app.backend, lane)

    async def _redeliver(self, backend: Backend, lane: Lane) -> None:
        log = await Log.read(backend, lane)
        queues = {stage.name: stage.queue for stage in lane.stages}
        firsts = [stream[0] for stream in log.units("member/").values()]
        chosen = self.chance.sample(firsts, min(_DOUBLED, len(firsts)))
        again = [Publish(event, queues[event.stage], group=event.partitionkey) for event in chosen]
        await backend.commit([Commit(publish=again)])
        self.doubled += len(again)

    async def _see_through(self) -> None:
        """Let one undisturbed worker finish, then compare tables and log with what must be."""
        lane, settings = lane_of(self.settings), Settings(backend=self.settings["backend"])
        async with open_application([lane], settings) as app:
            await self._redeliver(app.backend, lane)
            report = await run_once(app, lane)
            assert report.outcome == "settled", report
            assert await check(app.backend, lane) == []
            log = await Log.read(app.backend, lane)
        members = log.units("member/")
        assert {status(stream[-1]) for stream in members.values()} == {"settled"}
        assert len(members) == self.drops * len(TABLES)
        self.inversions = sum(inversions(log, table) for table in TABLES)
        assert read_tables(self.folder / "tables.db") == expected(self.drops)


def inversions(log: Log, table: str) -> int:
    """How many pairs of drops of a table were settled in the other order than that of their generations."""
    units = {name: msgspec.json.decode(stream[0].data) for name, stream in log.units("member/").items()}
    settled: Sequence[int] = [
        units[event.subject]["generation"]
        for event in log.events
        if event.type == "unit.settled"
        and event.subject in units
        and units[event.subject]["declared"]["table"] == table
    ]
    return sum(earlier > later for earlier, later in combinations(settled, 2))


def main() -> int:
    """``python -m tests.kills.drops 100``: so many kills, then the reckoning."""
    with TemporaryDirectory() as folder:
        campaign = DropsCampaign(Path(folder), seed=random.randrange(10**9))
        campaign.run(int(sys.argv[1]), seconds=3600)
        print(f"{sum(campaign.hits.values())} kills {dict(campaign.hits)}, {campaign.misses} hit nothing")
        print(f"{campaign.drops} drops of {len(TABLES)} tables, {campaign.doubled} units handed out twice")
        print(f"{campaign.inversions} pairs settled out of order: the tables are as loaded in order")
    return 0


if __name__ == "__main__":
    sys.exit(main())
