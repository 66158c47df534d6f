"""Members of zips: the reader alone, a late one over HTTP, many small ones; against what one would use.

``zip-member``: one deflated CSV. The reader is fed what a loop around isal is fed, and proves sizes and CRC
as that does. "proven" is the proof of ``verify="content"`` over HTTP, directory and all, with its hops;
"rows, content" is that and then the rows, parsed and cut into batches; "rows, stream" is those alone.
``zip-late``: the last of 2,000 members over HTTP, in wall time, from nothing known to its bytes (HEAD, end of
the archive, directory, member) and from its entry to its rows, as a lane has it; stream-unzip has to inflate
all that comes before. ``zip-many``: all of 2,000 members out of one file, directory and all.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from typing import Any

from benchmarks import zips
from benchmarks.harness import Bar, Candidate, Case, peak_mb, python
from benchmarks.zip_server import serving

SIZE = 1 << 30
MANY = 2000
SMALL = 100_000
BLOCK = 1 << 20
CHUNK = 64 << 10  #: stream-unzip's own default, and the best for a loop around isal
ASYNC_CHUNK = 256 << 10
WARM, TIMES = 1, 9  #: of a late member: what is not counted, and what the median is of


@contextmanager
def one(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """One member of that size."""
    made = zips.one_member(scratch, size or SIZE)
    path = zips.written(made, scratch / "one.zip")
    check = (made.size, made.crc, made.rows)
    unzip = (
        [Candidate("unzip -p", python("zip_member", "unzip", path, *check))] if shutil.which("unzip") else []
    )
    with serving(made.layout) as url:
        yield [
            Candidate("flowlane", python("zip_member", "reader", path, *check)),
            Candidate("isal loop", python("zip_member", "isal", path, *check)),
            Candidate("stream-unzip", python("zip_member", "stream", path, *check)),
            *unzip,
            Candidate("flowlane, proven", python("zip_member", "proven", url, *check)),
            Candidate("flowlane, rows, content", python("zip_member", "content", url, *check)),
            Candidate("flowlane, rows, stream", python("zip_member", "rows", url, *check)),
        ]


MEMBER = Case(
    "zip-member",
    "one deflated CSV out of a zip, MB of its bytes per CPU second",
    one,
    {"speed": "MB/s-cpu", "rate": "MB/s", "peak": "peak MB"},
    [
        Bar("flowlane", "speed", "at least", 2.4, "stream-unzip"),
        Bar("flowlane", "speed", "at least", 0.85, "isal loop"),
        Bar("flowlane", "peak", "at most", 60),
        Bar("flowlane, proven", "peak", "at most", 60),
    ],
    peer="stream-unzip",
)


@contextmanager
def late(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """The last of many."""
    made = zips.many_members(scratch, size or MANY, SMALL)
    check = (made.size, made.crc, made.rows)
    with serving(made.layout) as url:
        yield [
            Candidate("flowlane", python("zip_member", "late", url, *check)),
            Candidate("flowlane, entry known", python("zip_member", "known", url, *check)),
            Candidate("stream-unzip", python("zip_member", "scan", url, *check)),
        ]


LATE = Case(
    "zip-late",
    "the last of 2,000 members over HTTP, wall time",
    late,
    {"once": "per second", "milliseconds": "ms", "peak": "peak MB"},
    [
        Bar("flowlane", "once", "at least", 100, "stream-unzip"),
        Bar("flowlane", "peak", "at most", 60),
    ],
    peer="stream-unzip",
    rounds=5,
)


@contextmanager
def many(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """All of many."""
    made = zips.many_members(scratch, size or MANY, SMALL)
    path = made.layout[0][0]
    check = (made.size, made.crc, made.rows)
    unzip = (
        [Candidate("unzip -p", python("zip_member", "unzip", path, *check))] if shutil.which("unzip") else []
    )
    yield [
        Candidate("flowlane", python("zip_member", "run", path, *check)),
        Candidate("flowlane, one by one", python("zip_member", "each", path, *check)),
        Candidate("async_stream_unzip", python("zip_member", "async", path, *check)),
        Candidate("stream-unzip", python("zip_member", "stream", path, *check)),
        *unzip,
    ]


ALL = Case(
    "zip-many",
    "2,000 members of 100 KB out of one file, MB of their bytes per CPU second",
    many,
    {"speed": "MB/s-cpu", "rate": "MB/s", "peak": "peak MB"},
    [
        Bar("flowlane", "speed", "at least", 4, "async_stream_unzip"),
        Bar("flowlane", "peak", "at most", 60),
    ],
    peer="async_stream_unzip",
)

CASES = (MEMBER, LATE, ALL)


def blocks(path: str, size: int) -> Iterator[bytes]:
    """The archive, as it would come from a store."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # raw
        while block := file.read(size):
            yield block


# ------------------------------------------------------------------ each: bytes, and the last CRC


def isal(path: str) -> tuple[int, int]:
    """A loop around isal, which knows where the data begins, and checks nothing but the CRC."""
    from isal import isal_zlib

    inflate, crc, size, skip = isal_zlib.decompressobj(-15), 0, 0, 0
    for block in blocks(path, CHUNK):
        data = block
        if not size:
            skip = 30 + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
            data = block[skip:]
        while not inflate.eof:
            out = inflate.decompress(data, ASYNC_CHUNK)
            crc = isal_zlib.crc32(out, crc)
            size += len(out)
            data = inflate.unconsumed_tail
            if not data and len(out) < ASYNC_CHUNK:
                break
        if inflate.eof:
            return size, crc
    return size, crc


def stream(path: str) -> tuple[int, int]:
    """stream-unzip, as its users call it."""
    from zlib import crc32

    from stream_unzip import stream_unzip

    size = 0
    last = b""
    for _, _, chunks in stream_unzip(blocks(path, CHUNK)):
        for chunk in chunks:
            size += len(chunk)
            last = chunk
    return size, crc32(last)


async def reader(path: str) -> tuple[int, int]:
    """flowlane's reader of one member, with what the directory says."""
    from flowlane.streams.zip.member import Member

    archive = await entries_of(Path(path).as_uri())
    member, size = Member(archive[0]), 0
    for block in blocks(path, BLOCK):
        for piece in member.feed(block):
            size += len(piece)
        if member.ended:
            break
    member.close()
    return size, archive[0].crc


async def run(path: str) -> tuple[int, int]:
    """flowlane's archive, asked for all members."""
    from flowlane.archive import open_archive
    from flowlane.clock import SystemClock
    from flowlane.connectors.file import FileStore

    clock, size = SystemClock(), 0
    async with open_archive(FileStore(clock), clock, Path(path).as_uri()) as archive:
        async for _, data in archive.read_all(archive.entries):
            assert isinstance(data, bytes), data
            size += len(data)
        return size, archive.entries[-1].crc


async def each(path: str) -> tuple[int, int]:
    """flowlane's archive, asked for one member after the other: a request for each."""
    from flowlane.archive import open_archive
    from flowlane.clock import SystemClock
    from flowlane.connectors.file import FileStore

    clock, size = SystemClock(), 0
    async with open_archive(FileStore(clock), clock, Path(path).as_uri()) as archive:
        for entry in archive.entries:
            size += len(await archive.read(entry))
        return size, archive.entries[-1].crc


async def entries_of(url: str) -> Sequence[Any]:
    """What the directory says."""
    from flowlane.archive import open_archive
    from flowlane.clock import SystemClock
    from flowlane.connectors.file import FileStore

    clock = SystemClock()
    async with open_archive(FileStore(clock), clock, url) as archive:
        return archive.entries


async def async_stream(path: str) -> tuple[int, int]:
    """stream-unzip's asynchronous face."""
    from zlib import crc32

    from stream_unzip import async_stream_unzip

    async def incoming() -> AsyncIterator[bytes]:
        for block in blocks(path, ASYNC_CHUNK):
            yield block

    size, last = 0, 0
    async for _, _, chunks in async_stream_unzip(incoming(), chunk_size=ASYNC_CHUNK):
        last = 0
        async for chunk in chunks:
            size += len(chunk)
            last = crc32(chunk, last)
    return size, last


def unzip(path: str) -> tuple[int, int]:
    """``unzip -p``; its own CRC check is what tells it that all is well."""
    from subprocess import PIPE, Popen

    size = 0
    with Popen(["unzip", "-p", path], stdout=PIPE) as process:
        assert process.stdout is not None
        while block := process.stdout.read(BLOCK):
            size += len(block)
    assert process.returncode == 0
    return size, -1


# ------------------------------------------------------------------ over HTTP


@asynccontextmanager
async def web() -> AsyncIterator[Any]:
    """An environment whose one store is HTTP."""
    from flowlane.clock import SystemClock
    from flowlane.connectors.http import open_store
    from flowlane.ports import Environment

    class Web:
        async def store(self, url: str) -> Any:
            return store

    environment = Environment(SystemClock(), Web(), allow_private_hosts=True)  # type: ignore[arg-type]
    async with open_store("http://", environment) as store:
        yield environment


async def rows(
    environment: Any, url: str, *, proves: bool, reads: bool = True, **named: Any
) -> tuple[int, int]:
    """The member's decoded bytes and rows; or how far its proof had come when it last told."""
    from flowlane.connectors.records import open_source
    from flowlane.ports import Cut
    from flowlane.state import Position

    verify = "content" if proves else "stream"
    async with open_source(url, environment, verify=verify, **named) as source:
        split = await anext(source.splits())
        told = [passed async for passed in source.prove(split, Position())]
        if not reads:
            return told[-1], 0
        end = Position()
        async with aclosing(source.read(split, Position(), Cut())) as batches:
            async for batch in batches:
                end = batch.end
        return end.offset, end.row


async def first(url: str, *, proves: bool, reads: bool) -> tuple[int, int]:
    """The first member, from nothing known."""
    async with web() as environment:
        return await rows(environment, url, proves=proves, reads=reads, entry=0)


async def last(url: str, *, known: bool) -> dict[str, float]:
    """The last member's bytes, or, its entry known, its rows: once to have everything imported and connected,
    and then the median of some times, as a running worker would."""
    async with web() as environment:
        entry, etag, _ = await _from_nothing(environment, url)
        times: list[float] = []
        for _ in range(WARM + TIMES):
            if known:
                began = time.perf_counter()
                offset, found = await rows(environment, url, proves=True, entry=entry, etag=etag)
                times.append(time.perf_counter() - began)
                assert offset >= entry.size * 0.99, offset
                assert found > SMALL / 200, found
            else:
                times.append((await _from_nothing(environment, url))[2])
    passed = median(times[WARM:])
    return {"once": 1 / passed, "milliseconds": passed * 1000, "peak": peak_mb()}


async def _from_nothing(environment: Any, url: str) -> tuple[Any, str, float]:
    """The last entry, the archive's ETag, and how long it took to have the entry's content."""
    from flowlane.archive import open_archive

    store, clock = await environment.connections.store(url), environment.clock
    began = time.perf_counter()
    async with open_archive(store, clock, url) as archive:
        entry, etag = archive.entries[-1], archive.info.etag
        assert len(await archive.read(entry)) == entry.size
    return entry, etag, time.perf_counter() - began


def scan(url: str) -> tuple[int, int]:
    """The last member by stream-unzip: all that lies before is inflated, too."""
    from zlib import crc32

    from stream_unzip import stream_unzip

    size = crc = 0
    with urllib.request.urlopen(url) as response:
        for _, _, chunks in stream_unzip(iter(lambda: response.read(CHUNK), b"")):
            crc = 0
            for chunk in chunks:
                crc = crc32(chunk, crc)
                size += len(chunk)
    return size, crc


def main(kind: str, where: str, size: int, crc: int, count: int) -> dict[str, float]:
    """One candidate, in this process."""
    if kind in ("late", "known"):
        return asyncio.run(last(where, known=kind == "known"))
    for module in IMPORTS:  # what a process that runs has loaded
        importlib.import_module(module)
    began, wall = time.process_time(), time.perf_counter()
    if kind in ("content", "rows", "proven"):
        seen = asyncio.run(first(where, proves=kind != "rows", reads=kind != "proven"))
        # The last step of a proof is not told of.
        right = seen == (size, count) if kind != "proven" else size - (32 << 20) < seen[0] <= size
        assert right, f"{seen}, not {size:,} bytes and {count:,} rows"
    else:
        found: Any = KINDS[kind](where)
        seen = asyncio.run(found) if asyncio.iscoroutine(found) else found
        assert seen[0] == size, f"{seen[0]:,} bytes, not {size:,}"
        assert seen[1] in (crc, -1) or kind == "stream", f"CRC {seen[1]:x}, not {crc:x}"
    seconds, passed = time.process_time() - began, time.perf_counter() - wall
    if kind == "unzip":
        usage = getrusage(RUSAGE_CHILDREN)
        seconds += usage.ru_utime + usage.ru_stime
    told = {
        "speed": size / seconds / 1e6,
        "rate": size / passed / 1e6,
        "peak": peak_mb(children=kind == "unzip"),
    }
    return told | {"once": 1 / passed, "milliseconds": passed * 1000}


KINDS: dict[str, Callable[[str], Any]] = {
    "isal": isal,
    "stream": stream,
    "unzip": unzip,
    "scan": scan,
    "reader": reader,
    "run": run,
    "each": each,
    "async": async_stream,
}
IMPORTS = (
    "isal.isal_zlib",
    "stream_unzip",
    "flowlane.archive",
    "flowlane.connectors.file",
    "flowlane.connectors.http",
    "flowlane.connectors.members",
)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))))
