"""The demo: a day of hourly archives, served on loopback with everything that goes wrong in real life, lands
in a local lake; a second run lands nothing new.

The archives are made of the real events in $FLOWLANE_CORPUS/gharchive where that is set, of generated ones of
the same shape elsewhere. The lane is examples/gharchive.py, unchanged: only where it looks and lands is set.
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

from flowlane.testing.lying_server import LyingServer

LANE = Path(__file__).with_name("gharchive.py")
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


async def flowlane(*arguments: str, environment: dict[str, str]) -> tuple[int, str]:
    """Run the command line tool; its exit code and output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "flowlane", *arguments, env=environment, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def main() -> int:
    """Two runs, the checks, and the story; 0 if everything is as promised."""
    with tempfile.TemporaryDirectory(prefix="flowlane-demo-") as folder:
        lake = Path(folder) / "lake"
        async with LyingServer() as server:
            good = serve_day(server)
            environment = {
                **os.environ,
                "FLOWLANE_BACKEND": f"sqlite:///{folder}/flowlane.db",
                "FLOWLANE_ALLOW_PRIVATE_HOSTS": "1",  # loopback is private
                "GHARCHIVE_URL": server.url("").rstrip("/"),
                "GHARCHIVE_LAKE": lake.as_uri() + "/",
            }
            print(f"\n$ flowlane run {LANE.parent.name}/{LANE.name}")
            first_code, first = await flowlane("run", str(LANE), environment=environment)
            print(first)
            fetched = sum(request.method == "GET" for request in server.requests)

            print(f"$ flowlane run {LANE.parent.name}/{LANE.name}   # once more")
            _, second = await flowlane("run", str(LANE), "--json", environment=environment)
            again = json.loads(second)
            fetched_again = sum(request.method == "GET" for request in server.requests) - fetched
            print(f"{again['units']['found']} archives found, {fetched_again} fetched\n")

            print(f"$ flowlane status {LANE.parent.name}/{LANE.name}")
            _, status = await flowlane("status", str(LANE), environment=environment)
            print(status)
        landed = {path.name: path.read_bytes() for path in lake.rglob("*") if path.is_file()}
        checks = {
            f"{len(good)} archives landed, byte for byte": landed == good,
            "the missing, the truncated and the error page left no file": len(landed) == 21,
            "the run said so: exit code 1": first_code == 1,
            "the second run landed nothing and fetched nothing": again["units"]["found"]
            == fetched_again
            == 0,
            "status names each refused hour": all(
                f"{DAY}T{h:02d}" in status for h in (MISSING, TRUNCATED, ERROR_PAGE)
            ),
        }
        for promise, kept in checks.items():
            print(f"{'ok  ' if kept else 'FAIL'} {promise}")
        return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
