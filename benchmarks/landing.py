"""Landing one large archive: ``http_archive`` into a ``file://`` lake, as ``flowlane run`` does it.

The limits are curl writing the same body to the same file system, and a bare loop of GET (aiohttp), isal
decode and write in one process. flowlane syncs what it lands to the disk and curl does not, so curl is also
measured with a sync of its file. Every landed file is compared with what was served, byte by byte, after the
clock has stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.archive import PIECE, is_whole, make_piece
from benchmarks.harness import Bar, Candidate, Case, peak_mb, python
from benchmarks.server import serving

SIZE = 4 << 30
#: What the bare loop lets the inflater hand out at once: larger pieces leave the CPU's cache.
SLICE = 256 << 10


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """A server, and everybody who fetches from it."""
    size = size or SIZE
    piece = scratch / "piece.gz"
    unit, _ = make_piece(piece, min(PIECE, size))
    count = max(1, round(size / unit))
    with serving(piece, count) as base:
        yield [
            Candidate(name, python("landing", kind, base, piece, count, scratch))
            for name, kind in (
                ("curl", "curl"),
                ("flowlane, length", "length"),
                ("flowlane, content", "content"),
                ("bare loop", "bare"),
                ("curl and sync", "curl-sync"),
            )
        ]


CASE = Case(
    "landing",
    "one archive of 4 GiB from HTTP into a file:// lake, from a process of its own on loopback",
    opened,
    {"speed": "MB/s", "work_cpu": "CPU s", "peak": "peak MB", "wall": "s"},
    [
        Bar("flowlane, length", "peak", "at most", 100),
        Bar("flowlane, content", "peak", "at most", 100),
        Bar("flowlane, length", "speed", "at least", 0.5, "curl"),
        Bar("flowlane, content", "work_cpu", "at most", 1.2, "bare loop"),
    ],
    peer="curl",
)


async def flowlane(base: str, folder: Path, verify: str) -> Path:
    """One run of one hour."""
    from flowlane.compose import open_application
    from flowlane.recipes import http_archive
    from flowlane.settings import Settings
    from flowlane.worker import run_once

    lane = http_archive(
        "land",
        url=base + "/{t:%Y-%m-%d}-{t.hour}.json.gz",
        start="2024-01-01T00",
        until="2024-01-01T01",
        to=folder.as_uri(),
        verify="content" if verify == "content" else "length",
    )
    settings = Settings(backend=f"sqlite:///{folder / 'log.db'}", allow_private_hosts=True)
    async with open_application([lane], settings) as app:
        report = await run_once(app, lane)
    assert (report.outcome, report.units["settled"]) == ("settled", 1), report
    return folder / "2024-01-01-0.json.gz"


async def bare(base: str, folder: Path) -> Path:
    """GET, isal decode and write, and nothing else."""
    import aiohttp
    from isal import isal_zlib

    path = folder / "bare.gz"
    inflater = isal_zlib.decompressobj(31)
    decoded = 0
    async with (
        aiohttp.ClientSession(read_bufsize=1 << 20, auto_decompress=False) as session,
        session.get(base + "/bare") as response,
    ):
        with path.open("wb", buffering=0) as file:
            async for block in response.content.iter_any():
                file.write(block)
                data = block
                while data:
                    decoded += len(inflater.decompress(data, SLICE))
                    data = inflater.unconsumed_tail
                    if inflater.eof:
                        data = inflater.unused_data
                        inflater = isal_zlib.decompressobj(31)
    assert decoded > path.stat().st_size
    return path


async def curl(base: str, folder: Path, *, sync: bool) -> Path:
    """As a user would, by hand."""
    path = folder / "curl.gz"
    process = await asyncio.create_subprocess_exec("curl", "-sSf", "-o", path, base + "/curl")
    assert await process.wait() == 0
    if sync:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return path


def main(kind: str, base: str, piece: Path, count: int, scratch: Path) -> dict[str, float]:
    """One candidate, in this process."""
    folder = scratch / f"{kind}-{time.monotonic_ns()}"
    folder.mkdir()
    began, cpu = time.perf_counter(), cpu_seconds()
    if kind.startswith("curl"):
        path = asyncio.run(curl(base, folder, sync=kind == "curl-sync"))
    elif kind == "bare":
        path = asyncio.run(bare(base, folder))
    else:
        path = asyncio.run(flowlane(base, folder, kind))
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    peak = peak_mb(children=kind.startswith("curl"))
    size = piece.stat().st_size * count
    assert is_whole(path, piece, size), f"{path} is not what was served"
    path.unlink()
    return {"speed": size / seconds / 1e6, "work_cpu": cpu, "wall": seconds, "peak": peak}


def cpu_seconds() -> float:
    """CPU time of this process with all its threads, and of the children it has waited for."""
    every = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in every)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))))
