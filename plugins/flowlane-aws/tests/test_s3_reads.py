"""Reading from S3: whatever happens to a body, the object that was pinned comes out, or a typed error."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from flowlane.errors import ConfigError, Incomplete, Retryable, Superseded
from flowlane.testing.lying_server import Lie, LyingServer
from flowlane.testing.store_suite import fetch, noise
from flowlane_aws.s3.body import MAX_RESUMES
from flowlane_aws.s3.store import S3Store
from tests import servers
from tests.fault_proxy import FaultProxy, cut, refused
from tests.s3_stores import BASE, BUCKET, acquired, narrow, opened

DATA = noise(3_000_000)
URL = "s3://bucket/a%20b.bin"
PATH = "/bucket/a%20b.bin"


def refusal(code: str) -> bytes:
    """The body of an error of S3's."""
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told</Message></Error>".encode()


@pytest.fixture
async def liar(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LyingServer]:
    """A server that speaks as much S3 as reading needs, and lies as told."""
    async with LyingServer() as server:
        for name, value in servers.environment(server.url("")).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
async def store(liar: LyingServer) -> AsyncIterator[S3Store]:
    async with opened(bucket=False) as store:
        yield store
        assert acquired(store) == 0, "a connection was lost"


@pytest.mark.parametrize(
    "lie",
    [
        Lie(cut=1_500_000, times=1),
        Lie(cut=0, times=1),
        Lie(cut=2_999_999, times=1),
        Lie(reset=1_500_000, times=1),
        Lie(reset=700_000, times=MAX_RESUMES),
        Lie(cut=1_100_000, times=2, ranges="short"),
        Lie(cut=1_500_000, times=2, ranges="ignored"),
        Lie(cut=1_500_000, ranges="ignored", times=1),
    ],
)
@pytest.mark.parametrize(("start", "end"), [(0, None), (1_000_001, None), (1_000_001, 2_900_000)])
async def test_a_broken_body_is_taken_up_where_it_broke(
    store: S3Store, liar: LyingServer, lie: Lie, start: int, end: int | None
) -> None:
    liar.serve(PATH, DATA, lie)
    assert await fetch(store, URL, start=start, end=end) == DATA[start:end]
    again = [request for request in liar.requests if request.method == "GET"][1:]
    assert again or 0 <= lie.cut >= len(DATA) - start, "the body was meant to break"
    assert all("if-match" in request.headers for request in again), "a resume is pinned"


async def test_a_range_that_is_ignored_costs_its_beginning_and_no_more(
    store: S3Store, liar: LyingServer
) -> None:
    liar.serve(PATH, DATA, ranges="ignored")
    assert await fetch(store, URL, start=2_000_000) == DATA[2_000_000:]


@pytest.mark.parametrize(
    ("lie", "error", "said"),
    [
        (Lie(cut=0), Incomplete, "gave up after 5 resumes"),
        (
            Lie(cut=1_500_000, ranges="shifted"),
            Incomplete,
            "from byte 1,500,000, answered from 1,500,001",
        ),
        (Lie(cut=1_500_000, ranges="silent"), Incomplete, "status 206 with Content-Range ''"),
        (Lie(cut=1_500_000, etags=('"a"', '"b"')), Superseded, "no longer the one"),
        (Lie(cut=1_500_000, etags=('"a"', '"b"'), deaf=True), Superseded, 'is "b", no longer "a"'),
        (Lie(cut=1_500_000, etags=('"a"', ""), deaf=True), Incomplete, "the answer has no ETag"),
    ],
)
async def test_what_is_not_the_rest_of_the_same_object_is_refused(
    store: S3Store, liar: LyingServer, lie: Lie, error: type[Exception], said: str
) -> None:
    liar.serve(PATH, DATA, lie)
    with pytest.raises(error, match=f"^s3://bucket/a%20b.bin: .*{said}"):
        await fetch(store, URL)


async def test_a_body_that_goes_away_in_the_middle_is_missed(store: S3Store, liar: LyingServer) -> None:
    liar.serve(PATH, DATA, cut=1_500_000)
    async with store.read(URL) as body:
        blocks = aiter(body)
        assert await anext(blocks)
        liar.remove(PATH)
        with pytest.raises(Incomplete, match="gone"):
            [block async for block in blocks]


async def test_a_body_that_stands_still_is_taken_up(liar: LyingServer) -> None:
    liar.serve(PATH, DATA, hang=1_500_000, times=2)
    async with narrow(liar.url(""), connections=1, read_timeout=0.2) as store:
        assert await fetch(store, URL) == DATA


async def test_a_busy_server_is_asked_again(ministack: str) -> None:
    async with FaultProxy(ministack) as proxy, opened() as store, narrow(proxy.url) as reader:
        await _put(store, BASE + "a.bin", DATA)
        rules = [
            proxy.inject("s3.GetObject", cut(1_500_000)),
            proxy.inject("s3.GetObject", refused(503, "SlowDown")),
        ]
        assert await fetch(reader, BASE + "a.bin") == DATA
        assert [rule.fired for rule in rules] == [1, 1]
        proxy.inject("s3.GetObject", refused(503, "SlowDown"), times=-1)
        with pytest.raises(Retryable, match=r"throttled \(SlowDown: injected\)"):
            await fetch(reader, BASE + "a.bin")


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("ExpiredToken", Retryable, "expired"),
        ("InvalidToken", ConfigError, "not allowed"),
        ("AuthorizationHeaderMalformed", ConfigError, "another region"),
    ],
)
async def test_head_says_why_it_is_refused(
    store: S3Store, liar: LyingServer, code: str, error: type[Exception], said: str
) -> None:
    """An answer to HEAD has no body, and 400 may mean anything."""
    for path in (PATH, "/bucket", "/bucket/"):
        liar.serve(path, refusal(code), status=400)
    with pytest.raises(error, match=said) as raised:
        await store.head(URL)
    assert "\n" not in str(raised.value)


async def test_a_version_that_is_read_is_read_to_its_end(ministack: str) -> None:
    """Replaced while it is read, in a bucket that keeps versions."""
    async with FaultProxy(ministack) as proxy, opened() as store, narrow(proxy.url) as reader:
        await store._client.put_bucket_versioning(
            Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"}
        )
        await _put(store, BASE + "a.bin", DATA)
        broken = proxy.inject("s3.GetObject", cut(1_500_000))
        blocks: list[bytes] = []
        async with reader.read(BASE + "a.bin") as body:
            async for block in body:
                if not blocks:
                    await _put(store, BASE + "a.bin", b"another")
                blocks.append(block)
        assert b"".join(blocks) == DATA
        assert broken.fired == 1
        proxy.inject("s3.GetObject", cut(3))
        assert await fetch(reader, BASE + "a.bin") == b"another"


async def _put(store: S3Store, url: str, data: bytes) -> None:
    async with store.upload(url, owner="put", overwrite=True) as upload:
        await upload.write(data)
        await upload.commit()


async def test_a_missing_bucket_is_said_in_one_line(ministack: str) -> None:
    async with opened(bucket=False) as store:
        url = "s3://no-such-bucket/a.bin"

        async def listed() -> None:
            async for _ in store.list("s3://no-such-bucket/*"):
                pass

        for act in (store.head(url), fetch(store, url), listed(), _put(store, url, b"x")):
            with pytest.raises(ConfigError, match=r"s3://no-such-bucket.*(exist|no such bucket)") as raised:
                await act
            assert "\n" not in str(raised.value)


async def test_cancelled_reads_lose_no_connection(ministack: str) -> None:
    """Issue 3, line 5: with 4 connections, one lost one would soon be missed."""
    seed = random.Random(3)
    async with opened() as store, narrow(ministack, connections=4) as reader:
        await _put(store, BASE + "a.bin", noise(2_000_000))
        inside = 0
        for _ in range(250):
            inside += sum(await asyncio.gather(*(_cancelled(reader, seed) for _ in range(4))))
        assert inside >= 300, "too few of them were cancelled inside of a body"
        assert acquired(reader) == 0
        async with asyncio.timeout(60):
            assert len(await fetch(reader, BASE + "a.bin", start=1_000_000)) == 1_000_000


async def _cancelled(reader: S3Store, seed: random.Random) -> bool:
    """One read, cancelled at a random offset, or while it is being opened; whether it was inside a body."""
    offset, turns = seed.randrange(2_000_000), seed.randrange(40)
    reached = asyncio.Event()

    async def read() -> None:
        start = seed.randrange(2_000_000)
        async with reader.read(BASE + "a.bin", start=start) as body:
            async for block in body:
                start += len(block)
                if start >= offset:
                    reached.set()

    early = seed.random() < 0.5
    task = asyncio.create_task(read())
    if not early:
        waiting = asyncio.create_task(reached.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    return not early
