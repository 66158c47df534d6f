"""Records out of S3 and into it, and objects copied over it, as lanes do it: opened by URI."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from flowlane import Context, Event, Lane, Policy, Unit
from flowlane.compose import open_application
from flowlane.connections import OpenConnections
from flowlane.plugins import Registry
from flowlane.ports import Batch, Sink, Source, Split, UnitRef
from flowlane.settings import Settings
from flowlane.state import Position
from flowlane.testing.source_suite import SourceSuite
from flowlane.testing.store_suite import fetch, noise
from flowlane.worker import run_once
from flowlane_aws.s3 import bytes as s3_bytes
from flowlane_aws.s3 import upload as s3_upload
from flowlane_aws.s3.store import S3Store
from tests.fault_proxy import Exchange, FaultProxy, refused
from tests.s3_stores import BASE, BUCKET, HastyClock, opened

SPLIT = Split("s", "s3://elsewhere/rows.csv")


@pytest.fixture
async def connections(ministack: str) -> AsyncIterator[OpenConnections]:
    async with AsyncExitStack() as stack:
        yield OpenConnections(Registry.load(), HastyClock(), stack, allow_private=False)


@pytest.fixture
async def store(ministack: str) -> AsyncIterator[S3Store]:
    async with opened() as store:
        yield store


async def _put(store: S3Store, url: str, data: bytes) -> None:
    async with store.upload(url, owner="put") as upload:
        await upload.write(data)
        await upload.commit()


class TestS3Source(SourceSuite):
    """Two objects, found by a pattern."""

    @pytest.fixture
    async def source(self, store: S3Store, connections: OpenConnections) -> AsyncIterator[Source]:
        rows = "".join(f"{n},name {n}\n" for n in range(60))
        await _put(store, BASE + "b.csv.gz", gzip.compress(f"id,name\n{rows}".encode()))
        await _put(store, BASE + "a.csv", b"id,name\n1,x\n2,y\n")
        async with connections.source(BASE + "*.csv*", {}) as source:
            yield source


def _batches(count: int, size: int) -> list[Batch]:
    """Batches of records that do not compress."""
    return [
        Batch(
            [{"n": n, "pad": f"{n}" * (size // 2)} for n in range(2 * number, 2 * number + 2)],
            Position(100 * number, 2 * number),
            Position(100 * number + 100, 2 * number + 2),
            [],
        )
        for number in range(count)
    ]


async def _load(
    sink: Sink, batches: Sequence[Batch], token: int, resume: str, stop: int | None
) -> tuple[str, Any]:
    """One attempt; it dies behind batch `stop`. What it logged, and where it had found the object."""
    async with sink.open(SPLIT, UnitRef("lane/unit", token), resume) as writer:
        stands = writer.position
        for number, batch in enumerate(batches):
            if number == stop:
                return writer.resume, stands
            await writer.write(batch)
        await writer.finish()
        return writer.resume, stands


@pytest.mark.parametrize(("size", "kept"), [(10, 0), (30_000, 4)])
async def test_a_sink_goes_on_where_the_store_has_it(
    store: S3Store, connections: OpenConnections, monkeypatch: pytest.MonkeyPatch, size: int, kept: int
) -> None:
    """S3 keeps large parts only: what is less has to be written again, and is; nothing is doubled or lost."""
    monkeypatch.setattr(s3_upload, "PART", 200_000)
    for module in (s3_upload, s3_bytes):
        monkeypatch.setattr(module, "SMALLEST", 100_000)
    batches = _batches(8, size)
    async with connections.sink(BASE + "out/?format=jsonl", {}) as sink:
        logged, _ = await _load(sink, batches, 1, "", 5)
        assert [info async for info in store.list(BASE)] == []
        again, stands = await _load(sink, batches, 2, logged, 6)
        assert stands == Position(100 * kept, 2 * kept)
        await _load(sink, batches, 3, again, None)
        await _load(sink, batches, 4, again, None)  # its commit was not heard of
    found = [info.url async for info in store.list(BASE)]
    assert len(found) == 1
    rows = [json.loads(line) for line in (await fetch(store, found[0])).splitlines()]
    assert rows == [record for batch in batches for record in batch.records]


async def test_a_copy_goes_on_from_the_last_part(
    store: S3Store, ministack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source breaks off for good in the first attempt; the second one reads from where the upload stands,
    which is less than the first one had written."""
    monkeypatch.setattr(s3_upload, "PART", 400_000)
    for module in (s3_upload, s3_bytes):
        monkeypatch.setattr(module, "SMALLEST", 300_000)
    data = noise(3_000_000)
    await _put(store, BASE + "in.bin", data)
    ranges: list[str] = []

    async def seen(exchange: Exchange) -> bool:
        ranges.append(exchange.request.headers.get("range", ""))
        return await exchange.answer(await exchange.forward(), cut=2_200_000 if len(ranges) == 1 else None)

    lane = Lane("copies", policy=Policy(backoff="1ms", backoff_cap="2ms"))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield Found(url=BASE + "in.bin")

    @lane.stage(on=Found)
    async def copy(event: Event, ctx: Context) -> None:
        await ctx.copy(event.data.url, to=BASE + "out.bin", verify="length")

    async with FaultProxy(ministack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.inject("s3.GetObject", seen)
        proxy.inject("s3.GetObject", refused(404, "NoSuchKey"))  # what would resume it
        proxy.inject("s3.GetObject", seen, times=-1)
        async with open_application([lane], Settings(backend="memory://")) as app:
            report = await run_once(app, lane)
    assert report.outcome == "settled"
    assert len(ranges) == 2
    position = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < position < 2_200_000
    assert await fetch(store, BASE + "out.bin") == data
    answer = await store._client.list_multipart_uploads(Bucket=BUCKET)
    assert not answer.get("Uploads")


class Found(Unit, key=("url",)):
    """An object to be copied."""

    url: str


async def test_a_load_goes_on_from_what_the_store_has(
    store: S3Store, connections: OpenConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what an attempt wrote, the store has large parts only: the next one reads on from there, not from
    the split's beginning, and every record is counted once."""
    monkeypatch.setattr(s3_upload, "PART", 40_000)
    for module in (s3_upload, s3_bytes):
        monkeypatch.setattr(module, "SMALLEST", 20_000)
    rows = [{"n": str(n), "pad": f"{n}" * 40} for n in range(1000)]
    await _put(store, BASE + "in.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    mapped: list[int] = []
    stops = [333, 777]

    def clean(record: dict[str, Any]) -> dict[str, Any]:
        mapped.append(int(record["n"]))
        if stops and mapped[-1] == stops[0]:
            stops.pop(0)
            raise RuntimeError("the machine is gone")
        return record

    lane = Lane("loads", policy=Policy(backoff="1ms", backoff_cap="2ms", batch=10))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield Found(url=BASE + "in.jsonl")

    @lane.stage(on=Found)
    async def load(event: Event, ctx: Context) -> None:
        await ctx.load(ctx.rows(event.data.url).map(clean), to=BASE + "out/?format=jsonl")

    async with open_application([lane], Settings(backend="memory://")) as app:
        report = await run_once(app, lane)
    assert report.outcome == "settled"
    assert (report.records["in"], report.records["out"]) == (1000, 1000)
    (found,) = [info.url async for info in store.list(BASE + "out/")]
    assert [json.loads(line) for line in (await fetch(store, found)).splitlines()] == rows
    assert mapped.count(0) == 1, "the split was read from its beginning again"
    assert mapped.count(330) == 2, "what was not safe was not written again"
