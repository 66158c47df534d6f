"""The demo, in two acts: what goes wrong in real life does, and each lane runs twice.

A day of hourly archives, served on loopback, lands in a local lake. They are made of the real events in
$FLOWLANE_CORPUS/gharchive where that is set, of generated ones of the same shape elsewhere. Then zips of
TPC-H tables are loaded into a database, as the manifests in them say.

The lanes are examples/gharchive.py and examples/drops.py, unchanged: only where they look and land is set.
"""

import asyncio
import gzip
import json
import os
import random
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from examples import tpch
from flowlane.testing.lying_server import LyingServer

HOURS = Path(__file__).with_name("gharchive.py")
DROPS = Path(__file__).with_name("drops.py")
DAY = "2024-01-01"
MISSING, TRUNCATED, BUSY, ERROR_PAGE = 5, 9, 13, 17
PAGE = b"<!DOCTYPE html><html><body><h1>We'll be right back</h1></body></html>"


def events() -> list[bytes]:
    """Some thousand events, one JSON line each."""
    corpus = os.environ.get("FLOWLANE_CORPUS", "")
    folder = Path(corpus) / "gharchive"
    if corpus and folder.is_dir():
        lines = (folder / "2019-11-27-3.first100.json").read_bytes().splitlines(keepends=True)
        lines += gzip.decompress((folder / "sample.small.json.gz").read_bytes()).splitlines(keepends=True)
        print(f"serving {len(lines):,} real GitHub events from the corpus as 24 hourly archives")
        return [line if line.endswith(b"\n") else line + b"\n" for line in lines]
    print("serving generated events as 24 hourly archives (set FLOWLANE_CORPUS for real ones)")
    chance = random.Random(2024)
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    return [
        json.dumps(
            {
                "id": str(34_000_000_000 + n),
                "type": chance.choice(["PushEvent", "WatchEvent", "IssuesEvent", "ForkEvent"]),
                "actor": {"id": chance.randrange(10**8), "login": f"user{chance.randrange(5000)}"},
                "repo": {"id": chance.randrange(10**9), "name": f"org{n % 97}/repo{chance.randrange(900)}"},
                "payload": {"ref": "refs/heads/main", "head": f"{chance.getrandbits(160):040x}"},
                "public": True,
                "created_at": (begin + timedelta(seconds=n)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        ).encode()
        + b"\n"
        for n in range(4000)
    ]


def serve_day(server: LyingServer) -> dict[str, bytes]:
    """Serve the day's archives, four of them badly; what ought to land, by file name."""
    lines = events()
    chance = random.Random(1)
    good = {}
    for hour in range(24):
        chosen = chance.sample(lines, k=len(lines) // 3)
        half = len(chosen) // 2
        # Two gzip members: legal, and what many readers silently cut after the first.
        data = gzip.compress(b"".join(chosen[:half]), mtime=0) + gzip.compress(
            b"".join(chosen[half:]), mtime=0
        )
        name = f"{DAY}-{hour}.json.gz"
        path = f"/{name}"
        if hour == MISSING:
            continue  # 404
        if hour == TRUNCATED:
            server.serve(path, data[: len(data) // 2])  # cut at the source, with a length that matches
        elif hour == ERROR_PAGE:
            server.serve(path, PAGE, headers={"Content-Type": "text/html"})  # 200 OK
        else:
            good[name] = data
            if hour == BUSY:
                server.serve(path, data, status=503, times=3)  # three times busy, then it answers
            else:
                server.serve(path, data)
    return good


#: Whether a promise was kept, by the promise.
Checks = dict[str, bool]


class Console:
    """Where the commands run, and what of theirs is shown."""

    def __init__(self, folder: Path, lane: Path, **settings: str) -> None:
        self._lane = lane
        self._environment = {
            **os.environ,
            "FLOWLANE_BACKEND": f"sqlite:///{folder}/flowlane.db",
            "FLOWLANE_ALLOW_PRIVATE_HOSTS": "1",  # loopback is private
            **settings,
        }

    async def flowlane(self, verb: str, *options: str, remark: str = "") -> tuple[int, str]:
        """Run the command line tool on the lane; its exit code and output, which is shown but for JSON."""
        print(f"$ flowlane {verb} {self._lane.parent.name}/{self._lane.name}{remark}")
        command = [sys.executable, "-m", "flowlane", verb, str(self._lane), *options]
        process = await asyncio.create_subprocess_exec(
            *command, env=self._environment, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        if "--json" not in options:
            print(output.decode())
        return process.returncode or 0, output.decode()


async def archives(folder: Path) -> Checks:
    """The first act: hourly archives over HTTP into a lake."""
    lake = folder / "lake"
    async with LyingServer() as server:
        good = serve_day(server)
        print()
        place = {"GHARCHIVE_URL": server.url("").rstrip("/"), "GHARCHIVE_LAKE": lake.as_uri() + "/"}
        console = Console(folder, HOURS, **place)
        first_code, _ = await console.flowlane("run")
        fetched = sum(request.method == "GET" for request in server.requests)
        _, second = await console.flowlane("run", "--json", remark="   # once more")
        again = json.loads(second)["units"]["found"]
        fetched_again = sum(request.method == "GET" for request in server.requests) - fetched
        print(f"{again} archives found, {fetched_again} fetched\n")
        _, status = await console.flowlane("status")
    landed = {path.name: path.read_bytes() for path in lake.rglob("*") if path.is_file()}
    return {
        f"{len(good)} archives landed, byte for byte": landed == good,
        "the missing, the truncated and the error page left no file": len(landed) == 21,
        "the run said so: exit code 1": first_code == 1,
        "the second run landed nothing and fetched nothing": again == fetched_again == 0,
        "status names each refused hour": all(
            f"{DAY}T{h:02d}" in status for h in (MISSING, TRUNCATED, ERROR_PAGE)
        ),
    }


async def drops(folder: Path) -> Checks:
    """The second act: zips of many tables into one database."""
    source, database = folder / "drops", folder / "tables.db"
    source.mkdir()
    wanted = tpch.make_drops(source)
    sizes = ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in sorted(source.iterdir()))
    print(f"two drops of TPC-H tables, and one that was cut on its way: {sizes}\n")
    console = Console(folder, DROPS, DROPS_SOURCE=source.as_uri() + "/", DROPS_TO=f"sqlite:///{database}")
    first_code, _ = await console.flowlane("run")
    loaded = tpch.read_sqlite(database)
    _, second = await console.flowlane("run", "--json", remark="   # once more")
    again = json.loads(second)
    print(f"{again['units']['found']} drops found, {again['records']['in']} rows read\n")
    _, status = await console.flowlane("status")
    _, dead = await console.flowlane("dead")
    quarantined = [
        json.loads(line)
        for path in sorted((folder / "quarantine").rglob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    for row in quarantined:
        print(f"in quarantine: row {row['row']} of {row['member']} in {row['url']}: {row['reason']}\n")
    return {
        f"{sum(map(len, wanted.values())):,} rows in {len(wanted)} tables, each as its last drop has it": (
            loaded == wanted
        ),
        "the bad row is in quarantine, with its file and number": [row["row"] for row in quarantined]
        == [tpch.BAD_CUSTOMER - 1],
        "the table that nobody allowed was not made, and the run said so: exit code 1": (
            first_code == 1 and tpch.FORBIDDEN not in loaded
        ),
        "the second run found nothing and changed nothing": again["units"]["found"] == 0
        and again["records"]["in"] == 0
        and tpch.read_sqlite(database) == loaded,
        "status and dead name what was refused": "2 dead" in status
        and all(name in text for name in (tpch.FORBIDDEN, tpch.CUT) for text in (status, dead)),
    }


async def main() -> int:
    """Both acts, the story, and the checks; 0 if everything is as promised."""
    with tempfile.TemporaryDirectory(prefix="flowlane-demo-") as folder:
        place = Path(folder).resolve()
        acts = [await archives(place), await drops(place)]
    checks = {promise: kept for act in acts for promise, kept in act.items()}
    for promise, kept in checks.items():
        print(f"{'ok  ' if kept else 'FAIL'} {promise}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
