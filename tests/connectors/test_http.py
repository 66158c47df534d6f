from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, cast

import pytest
import zstandard

from flowlane.clock import SystemClock
from flowlane.connectors import fetch as wire
from flowlane.connectors import http
from flowlane.connectors.guard import refused
from flowlane.errors import ConfigError, Damaged, FlowlaneError, Incomplete, Permanent, Retryable, Superseded
from flowlane.ports import Connections, Environment, ObjectInfo, Store
from flowlane.testing.lying_server import Lie, LyingServer
from flowlane.testing.store_suite import ReadableSuite, fetch, noise


class Impatient(SystemClock):
    """The real clock, but nobody is kept waiting; remembers who would have been."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
async def server() -> AsyncIterator[LyingServer]:
    async with LyingServer() as server:
        yield server


@asynccontextmanager
async def opened(*, allow_private_hosts: bool = True) -> AsyncIterator[http.HttpStore]:
    environment = Environment(Impatient(), cast(Connections, None), allow_private_hosts)
    async with http.open_store("http://", environment) as store:
        yield store


@pytest.fixture
async def store() -> AsyncIterator[http.HttpStore]:
    async with opened() as store:
        yield store


@pytest.fixture
def base(server: LyingServer) -> str:
    return server.url("/")


class TestHttpStore(ReadableSuite):
    """The store as it is, on an honest server."""

    @pytest.fixture(autouse=True)
    def _server(self, server: LyingServer) -> None:
        self.server = server

    async def put(self, store: Store, url: str, data: bytes) -> None:
        self.server.serve(url[len(self.server.url("")) :], data)


class TestHttpStoreIgnoringRanges(TestHttpStore):
    """The same promises on a server that knows no ranges."""

    async def put(self, store: Store, url: str, data: bytes) -> None:
        self.server.serve(url[len(self.server.url("")) :], data, ranges="ignored")


class TestHttpStoreChunked(TestHttpStore):
    """... that gives ranges in chunks, without a length."""

    says_sizes = False

    async def put(self, store: Store, url: str, data: bytes) -> None:
        self.server.serve(url[len(self.server.url("")) :], data, chunked=True)


class TestHttpStoreInShortRanges(TestHttpStore):
    """... that always gives half of the range asked for."""

    async def put(self, store: Store, url: str, data: bytes) -> None:
        self.server.serve(url[len(self.server.url("")) :], data, ranges="short")


# --------------------------------------------------------------------------- head


async def test_head_tells_absent_from_unknown(store: http.HttpStore, server: LyingServer) -> None:
    assert await store.head(server.url("/404")) is None
    assert await store.head(server.serve("/410", b"", status=410)) is None
    for status in (500, 502, 503, 504, 408, 425, 429):
        with pytest.raises(Retryable, match=f"status {status}"):
            await store.head(server.serve("/a", b"", status=status))
    for status in (400, 401, 403, 407, 418, 451, 204, 304, 300):
        with pytest.raises(Permanent, match=f"status {status}"):
            await store.head(server.serve("/a", b"", status=status))


@pytest.mark.parametrize("status", [405, 501, 400, 403])
async def test_a_server_without_head_is_asked_for_one_byte(
    store: http.HttpStore, server: LyingServer, status: int
) -> None:
    url = server.serve("/a", noise(5000), head=status)
    info = await store.head(url)
    assert info is not None
    assert (info.size, info.etag[:1]) == (5000, '"')
    assert [(r.method, r.range) for r in server.requests] == [("HEAD", ""), ("GET", "bytes=0-0")]
    assert await store.head(server.serve("/b", b"", head=status)) == ObjectInfo(
        server.url("/b"), size=0, etag='"e3b0c44298fc1c14"'
    )
    ignoring = await store.head(server.serve("/c", noise(5000), head=status, ranges="ignored"))
    assert ignoring is not None
    assert ignoring.size == 5000


async def test_weak_and_malformed_etags_are_none(store: http.HttpStore, server: LyingServer) -> None:
    for etag in ('W/"abc"', "abc", '"a"b"', "", "W/"):
        info = await store.head(server.serve("/a", b"x", etags=[etag]))
        assert info is not None
        assert info.etag == ""


async def test_headers_are_sent_and_described(store: http.HttpStore, server: LyingServer) -> None:
    modified = "Wed, 27 Nov 2019 04:00:00 GMT"
    url = server.serve("/a", b"x", headers={"Last-Modified": modified, "Content-Type": "application/gzip"})
    info = await store.head(url, headers={"Authorization": "Bearer b", "X-Mine": "1"})
    assert info is not None
    assert (info.modified, info.content_type) == (modified, "application/gzip")
    sent = server.requests[-1].headers
    assert (sent["authorization"], sent["x-mine"], sent["accept-encoding"]) == ("Bearer b", "1", "identity")
    await store.head(url, headers={"accept-encoding": "gzip", "user-agent": "mine"})
    sent = server.requests[-1].headers
    assert (sent["accept-encoding"], sent["user-agent"]) == ("gzip", "mine"), (
        "the user's headers replace ours"
    )


async def test_retry_after_is_honoured(store: http.HttpStore, server: LyingServer) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(hours=9), usegmt=True)
    hours = (8 * 3600, 9 * 3600)  # however long the machine takes until it is asked
    for value, least, most in (("7", 7, 7), (later, *hours), ("Wed, 27 Nov 2019 04:00:00 GMT", 0, 0)):
        url = server.serve("/a", b"", status=503, headers={"Retry-After": value})
        with pytest.raises(Retryable) as caught:
            await store.head(url)
        assert caught.value.delay is not None
        assert least <= caught.value.delay <= most
    for value in ("soon", "-1", "1e9", "", "\u00b2", "Wed, 99 Nov 2019"):
        assert wire.retry_after(value, datetime.now(UTC)) is None
    assert wire.retry_after("9" * 400, datetime.now(UTC)) == 86400
    noon = datetime(2024, 2, 29, 12, tzinfo=UTC)
    assert wire.retry_after("Thu, 29 Feb 2024 12:01:30 GMT", noon) == 90
    huge = "9" * 26
    for value in (f"{huge} Nov 2024 04:00:00", f"27 Nov {huge} 04:00:00", f"27 Nov 2024 04:00:00 +{huge}"):
        assert wire.retry_after(f"Wed, {value} GMT", datetime.now(UTC)) is None


# --------------------------------------------------------------------------- bodies that break


@pytest.mark.parametrize("fault", ["cut", "reset"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_broken_body_is_taken_up_where_it_broke(
    store: http.HttpStore, server: LyingServer, fault: str, *, chunked: bool
) -> None:
    data = noise(5_000_000)
    url = server.serve("/a", data, times=1, chunked=chunked, **{fault: 2_500_000})
    assert await fetch(store, url) == data
    first, second = server.requests
    assert first.range == ""
    start = int(second.range.removeprefix("bytes=").removesuffix("-"))
    assert 0 <= start <= 2_500_000
    assert second.headers["if-match"].startswith('"')


async def test_a_body_that_breaks_at_every_byte(store: http.HttpStore, server: LyingServer) -> None:
    data = noise(300)
    for cut in range(300):
        url = server.serve("/a", data, cut=cut, times=1)
        assert await fetch(store, url) == data
        assert server.gets("/a") == 2 * (cut + 1)


async def test_chunks_whose_ends_come_later_than_their_data(store: http.HttpStore) -> None:
    """What ends a chunk may come by itself (RFC 9112, 7.1): nothing, and not the end."""
    data = noise(300_000)

    async def turn() -> None:
        for _ in range(20):  # of the loop, in which the client is, too: it has read what was written
            await asyncio.sleep(0)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for at in range(0, 0 if asked.startswith(b"HEAD") else len(data), 100_000):
            for part in (b"186a0\r\n" + data[at : at + 100_000], b"\r\n"):
                writer.write(part)
                await writer.drain()
                await turn()
        writer.write(b"" if asked.startswith(b"HEAD") else b"0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        assert await fetch(store, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a") == data


async def test_resumes_go_on_while_there_is_progress(
    store: http.HttpStore, server: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "PROGRESS", 1000)
    data = noise(20_000)
    url = server.serve("/a", data, cut=1000)
    assert await fetch(store, url) == data
    assert server.gets("/a") == 20
    url = server.serve("/b", data, cut=999)
    with pytest.raises(Incomplete, match=r"cut at byte 5,994 of 20,000.* gave up"):
        await fetch(store, url)


async def test_a_server_that_recovers_is_waited_for(store: http.HttpStore, server: LyingServer) -> None:
    data = noise(10_000)
    url = server.serve("/a", data, cut=5000, times=1)
    async with store.read(url) as body:
        blocks = aiter(body)
        got = await anext(blocks)
        server.serve("/a", data, status=503, times=3)
        got += await anext(blocks)
    assert got == data
    server.serve("/a", data, cut=5000, times=1)
    async with store.read(url) as body:
        blocks = aiter(body)
        await anext(blocks)
        server.serve("/a", data, status=429, headers={"Retry-After": "60"})
        with pytest.raises(Retryable, match="status 429") as caught:
            await anext(blocks)
        assert caught.value.delay == 60


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
async def test_without_a_strong_etag_nothing_is_resumed(
    store: http.HttpStore, server: LyingServer, etag: str
) -> None:
    url = server.serve("/a", noise(10_000), cut=5000, times=1, etags=[etag])
    with pytest.raises(Incomplete, match=r"cut at byte 5,000 of 10,000.*without a strong ETag"):
        await fetch(store, url)
    url = server.serve("/b", noise(10_000), cut=0, times=1, etags=[etag])
    assert await fetch(store, url) == noise(10_000), "nothing was handed out: it may begin again"


async def test_an_object_replaced_meanwhile_is_superseded(store: http.HttpStore, server: LyingServer) -> None:
    for deaf in (False, True):
        url = server.serve("/a", noise(10_000), cut=5000, etags=['"one"', '"two"'], deaf=deaf)
        with pytest.raises(Superseded):
            await fetch(store, url)
        assert [r.range for r in server.requests if r.method == "GET"][-1] == "bytes=5000-"
    url = server.serve("/b", noise(10_000), cut=5000, etags=['"one"', ""], deaf=True)
    with pytest.raises(Incomplete, match="no ETag"):
        await fetch(store, url)
    url = server.serve("/c", noise(10_000), etags=['"one"'])
    for start in (0, 5):
        with pytest.raises(Superseded):
            await fetch(store, url, start=start, etag='"other"')
    url = server.serve("/d", noise(10_000), cut=5000, etags=['"one"'])
    async with store.read(url) as body:
        blocks = aiter(body)
        await anext(blocks)
        server.serve("/d", noise(9_000), etags=['"one"'])
        with pytest.raises(Incomplete, match="9,000 bytes, 10,000 before, with one ETag"):
            await anext(blocks)


async def test_an_etag_that_head_does_not_bear_out_supersedes_nothing(
    store: http.HttpStore, server: LyingServer
) -> None:
    changing = [f'"{turn}"' for turn in range(9)]  # and HEAD always has the next one
    url = server.serve("/a", noise(100), etags=changing, deaf=True)
    assert await fetch(store, url, etag='"0"') == noise(100)
    with pytest.raises(Incomplete, match=r'is "1", no longer "0"; but HEAD says "2"'):
        await fetch(store, url, etag='"0"')
    # The one that was asked for is the one that HEAD still tells of.
    url = server.serve("/b", noise(100), etags=['"1"'], headers={"ETag": '"0"'}, deaf=True, times=1)
    with pytest.raises(Incomplete, match=r'is "0", no longer "1"; but HEAD says "1"'):
        await fetch(store, url, etag='"1"')
    url = server.serve("/c", noise(100), etags=['"1"'], status=412, times=1)
    with pytest.raises(Incomplete, match=r'is no longer "1"; but HEAD says "1"'):
        await fetch(store, url, etag='"1"')
    # Where HEAD says nothing, the answer is believed.
    url = server.serve("/d", noise(100), etags=['"1"'], deaf=True, head=503)
    with pytest.raises(Superseded, match=r'is "1", no longer "0"$'):
        await fetch(store, url, etag='"0"')


async def test_an_object_gone_is_incomplete(store: http.HttpStore, server: LyingServer) -> None:
    url = server.serve("/a", noise(10_000), cut=5000)
    async with store.read(url) as body:
        blocks = aiter(body)
        await anext(blocks)
        server.remove("/a")
        with pytest.raises(Incomplete, match="status 404: the object is gone"):
            await anext(blocks)


async def test_ranges_are_believed_only_if_they_say_what_they_are(
    store: http.HttpStore, server: LyingServer
) -> None:
    data = noise(10_000)
    for ranges, says in (
        ("shifted", "asked from byte 100, answered from 101"),
        ("silent", "Content-Range ''"),
    ):
        url = server.serve("/a", data, ranges=ranges)
        with pytest.raises(Incomplete, match=says):
            await fetch(store, url, start=100)
    url = server.serve("/early", data, headers={"Content-Range": "bytes 50-9949/10000"})
    with pytest.raises(Incomplete, match="answered from 50"):
        await fetch(store, url, start=100)
    for said in (
        "bytes 100-50/10000",
        "bytes 100-9999/500",
        "bytes */10000",
        "bytes 100-200/10000",
        "rows 1-2/3",
    ):
        url = server.serve("/b", data, headers={"Content-Range": said})
        with pytest.raises(Incomplete):
            await fetch(store, url, start=100)
    url = server.serve("/c", data, chunked=True, headers={"Content-Range": "bytes 100-5000/10000"})
    with pytest.raises(Incomplete, match="more bytes came"):
        await fetch(store, url, start=100)


async def test_a_range_ignored_in_the_middle_is_skipped_if_pinned(
    store: http.HttpStore, server: LyingServer
) -> None:
    data = noise(5_000_000)
    url = server.serve("/a", data, cut=2_000_000, times=1)
    async with store.read(url) as body:
        blocks = aiter(body)
        got = await anext(blocks)
        server.serve("/a", data, ranges="ignored")
        async for block in blocks:
            got += block
    assert got == data


async def test_lengths_that_lie(store: http.HttpStore, server: LyingServer) -> None:
    data = noise(10_000)
    longer = server.serve("/longer", data, length=10_001)
    with pytest.raises(Incomplete):
        await fetch(store, longer)
    # What is too much is found out if it arrives with the rest; if later, the body is what was announced.
    shorter = server.serve("/shorter", data, length=9_999)
    with contextlib.suppress(Retryable):
        assert await fetch(store, shorter) == data[:9_999]
    unknown = server.serve("/unknown", data, length=-1)
    async with store.read(unknown) as body:
        assert not body.proven_length
        assert body.info.size == -1
        assert b"".join([block async for block in body]) == data
    chunked = server.serve("/chunked", data, chunked=True)
    async with store.read(chunked) as body:
        assert body.proven_length
        assert body.info.size == -1


async def test_a_body_without_a_length_is_as_long_as_head_says(
    store: http.HttpStore, server: LyingServer
) -> None:
    members = [gzip.compress(b"one"), gzip.compress(b"two")]
    whole, end = b"".join(members), len(members[0])
    # As a proxy sends it whose own server died.
    chunks = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (end, members[0])
    for lie in (
        Lie(length=-1, cut=end),
        Lie(length=-1, cut=end, etags=["W/weak"]),
        Lie(raw=b"HTTP/1.1 200 OK\r\n" + chunks, times=1),
    ):
        with pytest.raises(Incomplete, match=f"ended at byte {end}, HEAD says that there are {len(whole)}"):
            await fetch(store, server.serve("/cut.gz", whole, lie))
    for lie in (
        Lie(length=-1),
        Lie(chunked=True),
        Lie(length=-1, cut=end, head=404),
        Lie(length=-1, cut=end, head=401),
        Lie(length=-1, cut=end, etags=['"a"', '"b"']),
        Lie(length=-1, cut=end, head=405, ranges="ignored"),
        Lie(length=-1, cut=end, headers={"Content-Encoding": "gzip"}),  # HEAD may mean what it is decoded
    ):
        url = server.serve("/told.gz", whole, lie)
        assert await fetch(store, url) == (whole[:end] if lie.cut >= 0 else whole)
    assert await fetch(store, server.serve("/busy.gz", whole, chunked=True, head=502)) == whole
    with pytest.raises(Retryable, match=r"HEAD .*: status 502"):
        await fetch(store, server.serve("/down.gz", whole, length=-1, cut=end, head=502))


async def test_a_hanging_server_times_out(
    store: http.HttpStore, server: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "ANSWER_TIMEOUT", 0.1)
    with pytest.raises(Retryable, match="no answer within"):
        await store.head(server.serve("/a", b"x", hang=0))


async def test_a_hanging_body_is_resumed(store: http.HttpStore, server: LyingServer) -> None:
    data = noise(10_000)
    async with asyncio.timeout(60), store.read(server.serve("/a", data, hang=5000, times=1)) as body:
        response = cast(Any, body)._response
        while response.content.total_bytes < 5000:  # noqa: ASYNC110 - aiohttp has no event for it
            await asyncio.sleep(0.001)
        # Only now: a machine that stalls must not be taken for a server that does.
        protocol = response.connection.protocol
        assert protocol.read_timeout == wire.READ_TIMEOUT
        protocol.read_timeout = 0.1
        protocol.start_timeout()
        assert b"".join([block async for block in body]) == data
    assert [r.range for r in server.requests] == ["", "bytes=5000-"]


async def test_what_has_come_slowly_is_handed_out(server: LyingServer) -> None:
    """Who reads looks at his deadline between blocks: he must not wait for a whole one for an hour."""

    class Slow(Impatient):
        def monotonic(self) -> float:
            return 2.0 * super().monotonic() + 10.0 * next(self.ticks)

        ticks = itertools.count()

    async with wire.open_session(allow_private_hosts=True) as session:
        store = http.HttpStore(session, Slow())
        url = server.serve("/a", noise(50_000), hang=20_000)
        async with asyncio.timeout(60), store.read(url) as body:
            blocks = aiter(body)
            got = b""
            while len(got) < 20_000:
                block = await anext(blocks)
                assert len(block) >= 4096 or len(got) + len(block) == 20_000
                got += block
    assert got == noise(50_000)[:20_000]


async def test_a_slow_consumer_of_a_half_closed_connection(
    store: http.HttpStore, server: LyingServer
) -> None:
    """aiohttp issue 13348: a body was declared short when its sender closed first."""
    data = noise(12_000_000)
    async with store.read(server.serve("/a", data, headers={"Connection": "close"})) as body:
        got = b""
        async for block in body:
            got += block
            await asyncio.sleep(0.01)
    assert got == data
    assert server.gets("/a") == 1


async def test_backpressure_bounds_what_is_read_ahead(store: http.HttpStore, server: LyingServer) -> None:
    data = bytes(64 << 20)
    async with store.read(server.serve("/a", data)) as body:
        await anext(aiter(body))
        response = cast(Any, body)._response
        for _ in range(50):
            await asyncio.sleep(0.002)
        assert response.content.total_bytes < 8 << 20


# --------------------------------------------------------------------------- what is refused


async def test_encoded_bodies_are_refused_unless_the_name_says_so(
    store: http.HttpStore, server: LyingServer
) -> None:
    data = gzip.compress(b"hello")
    label = {"Content-Encoding": "gzip"}
    assert await fetch(store, server.serve("/a.json.gz", data, headers=label) + "?x=.json") == data
    for path, encoding in (("/a.json", "gzip"), ("/a.gz", "br"), ("/a.gz", "gzip, br"), ("/a.gz", "zstd")):
        with pytest.raises(Incomplete, match="encoded as"):
            await fetch(store, server.serve(path, data, headers={"Content-Encoding": encoding}))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("cut", [-1, 1, 3, 12])
async def test_what_was_compressed_twice_is_refused(
    store: http.HttpStore, server: LyingServer, suffix: str, cut: int
) -> None:
    """A server that compresses whatever it sends, asked or not; its label says so, and tells it from one that
    describes the object."""
    pack = gzip.compress if suffix == "gz" else zstandard.compress
    # Each packed a single time: gzip writes the second of the day into its header.
    once, nothing = pack(noise(50_000)), pack(b"")
    twice = pack(once)
    label = {"Content-Encoding": "gzip" if suffix == "gz" else "zstd"}
    lie = Lie(headers=label, cut=cut, times=1 if cut >= 0 else -1)
    url = server.serve(f"/twice.{suffix}", twice, lie)
    with pytest.raises(Damaged, match="compressed already"):
        await fetch(store, url)
    assert await fetch(store, server.serve(f"/once.{suffix}", once, headers=label)) == once
    assert await fetch(store, server.serve(f"/as-it-is.{suffix}", twice)) == twice
    assert await fetch(store, server.serve(f"/odd.{suffix}", b"no such thing", headers=label))
    assert await fetch(store, server.serve(f"/empty.{suffix}", nothing, headers=label)) == nothing


async def test_transfer_codings_that_nobody_asked_for_are_refused(
    store: http.HttpStore, server: LyingServer
) -> None:
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    with pytest.raises(Incomplete, match="sent as gzip"):
        await fetch(store, server.serve("/a.gz", b"", raw=raw))


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 two hundred OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        b"\xff\xfe" * 5000,
    ],
    ids=range(12),
)
async def test_what_is_not_http_is_retryable(store: http.HttpStore, server: LyingServer, raw: bytes) -> None:
    url = server.serve("/a", b"", raw=raw)
    with pytest.raises(Retryable) as caught:
        await fetch(store, url)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 3000


async def test_redirects_are_followed_five_times(store: http.HttpStore, server: LyingServer) -> None:
    data = noise(1000)
    server.serve("/5", data)
    for n in range(5):
        server.serve(f"/{n}", b"", redirect=f"/{n + 1}" if n % 2 else server.url(f"/{n + 1}"))
    assert await fetch(store, server.url("/0")) == data
    info = await store.head(server.url("/0"))
    assert info is not None
    assert (info.url, info.size) == (server.url("/0"), 1000)
    server.serve("/loop", b"", redirect="/loop")
    with pytest.raises(Retryable, match="more than 5 redirects"):
        await store.head(server.url("/loop"))


async def test_credentials_stay_with_their_origin(store: http.HttpStore, server: LyingServer) -> None:
    secrets = {"Authorization": "Bearer b", "Cookie": "c", "X-Api-Key": "k"}
    async with LyingServer() as other:
        other.serve("/there", b"x")
        server.serve("/same", b"", redirect="/away")
        server.serve("/away", b"", redirect=other.url("/there"))
        async with store.read(server.url("/same"), start=0, end=1, headers=secrets) as body:
            assert [block async for block in body] == [b"x"]
        assert server.requests[1].headers["x-api-key"] == "k"
        arrived = other.requests[0].headers
    assert not {"authorization", "cookie", "x-api-key"} & arrived.keys()
    assert arrived["range"] == "bytes=0-0"


@pytest.mark.parametrize(
    "location",
    ["ftp://host/a", "file:///etc/passwd", "http://[::1", "http://host:99999/", "gopher:x", "//[::1]:80@/"],
)
async def test_redirects_elsewhere_are_refused(
    store: http.HttpStore, server: LyingServer, location: str
) -> None:
    with pytest.raises(Permanent, match="redirects to"):
        await store.head(server.serve("/a", b"", redirect=location))


async def test_a_redirect_that_cannot_be_sent_condemns_the_object_only(
    store: http.HttpStore, server: LyingServer
) -> None:
    for location in ("http://a..b/", f"http://{'x' * 70}.example/"):
        with pytest.raises((Permanent, Retryable)):
            await store.head(server.serve("/a", b"", redirect=location))


async def test_what_a_server_says_reaches_no_terminal(store: http.HttpStore, server: LyingServer) -> None:
    for location in ("http://nothing\x0ehere.invalid/", "//[::\x07]:99/", "ftp://h\x1b[2J/\x07"):
        with pytest.raises(FlowlaneError) as caught:
            await store.head(server.serve("/a", b"", redirect=location))
        assert str(caught.value).isprintable()


async def test_a_user_stays_with_its_origin(store: http.HttpStore, server: LyingServer) -> None:
    """A Location in full leads to the same origin as a relative one."""
    async with LyingServer() as other:
        other.serve("/c", b"x")
        server.serve("/a", b"", redirect=server.url("/b"))
        server.serve("/b", b"", redirect=other.url("/c"))
        await store.head(server.url("/a").replace("//", "//me:p%40w@"))
        sent = [request.headers.get("authorization") for request in server.requests]
        assert sent == ["Basic bWU6cEB3"] * 2
        assert "authorization" not in other.requests[0].headers


def test_a_redirect_from_https_to_http_is_refused() -> None:
    with pytest.raises(Permanent, match="from https to"):
        wire._hop(wire.parse("https://example.org/a"), "http://example.org/a")


async def test_no_connection_is_retryable(store: http.HttpStore) -> None:
    with socket.socket() as deaf:  # bound, lest somebody else gets the port, and not listening
        deaf.bind(("127.0.0.1", 0))
        with pytest.raises(Retryable, match="no connection"):
            await store.head(f"http://127.0.0.1:{deaf.getsockname()[1]}/a")
    with pytest.raises(Retryable, match="no connection"):
        await store.head("http://nothing.invalid/a")


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1]:80@/",
        "http://",
        "ftp://host/a",
        "http:///a",
        "host/a",
        "",
        "http://host:0/",
        "http://[x/",
    ],
)
async def test_urls_that_cannot_be_asked_are_refused(store: http.HttpStore, url: str) -> None:
    with pytest.raises(ConfigError):
        await store.head(url)


async def test_headers_that_cannot_be_sent_are_refused(store: http.HttpStore, server: LyingServer) -> None:
    with pytest.raises(ConfigError) as caught:
        await store.head(server.url("/a"), headers={"X": "secret\r\nInjected: 1"})
    assert "secret" not in str(caught.value)
    assert server.requests == []


async def test_it_neither_lists_nor_writes(store: http.HttpStore, server: LyingServer) -> None:
    with pytest.raises(ConfigError, match="no listing"):
        await anext(aiter(store.list(server.url("/*"))))
    with pytest.raises(ConfigError, match="choose a file:// or s3:// target"):
        async with store.upload(server.url("/a"), owner="one"):
            pass


@pytest.mark.parametrize(
    "path", ["/a%20b%2Fc%3f", "/a+b;c=d,e", "/%C3%BC", "/a%7Eb", "/x?sig=a%2Fb%3D&y=%20"]
)
async def test_urls_are_sent_as_they_are(store: http.HttpStore, server: LyingServer, path: str) -> None:
    await store.head(server.url(path))
    assert server.requests[0].path == path


async def test_urls_in_plain_writing_are_encoded(store: http.HttpStore, server: LyingServer) -> None:
    await store.head(server.url("/ä b/100%.gz"))
    assert server.requests[0].path == "/%C3%A4%20b/100%25.gz"


async def test_errors_keep_secrets(store: http.HttpStore, server: LyingServer) -> None:
    secret = "s3cr3t"
    url = server.url(f"/a?signature={secret}").replace("http://", f"http://user:{secret}@")
    faults: list[dict[str, Any]] = [
        {"status": 500},
        {"status": 403},
        {"status": 412},
        {"cut": 5, "etags": [""]},
        {"raw": b"junk\r\n\r\n"},
        {"redirect": f"ftp://x/?{secret}"},
        {"redirect": f"/a?{secret}"},
        {"redirect": f"http://user:{secret}@[/"},
        {"headers": {"Content-Encoding": "br"}},
    ]
    for fault in faults:
        server.serve("/a", noise(100), **fault)
        with pytest.raises(FlowlaneError) as caught:
            await fetch(store, url)
        error: BaseException | None = caught.value
        assert secret not in str(error)
        assert "/a" in str(error)
    for bad in (f"http://user:{secret}@/", f"http://[u:{secret}@h", f"ftp://u:{secret}@h/?{secret}"):
        with pytest.raises(ConfigError) as refusal:
            await store.head(bad)
        assert secret not in str(refusal.value)


# --------------------------------------------------------------------------- addresses


HOSTS = """
    127.0.0.1 127.1 127.0.1 127.255.255.254 2130706433 0x7f000001 0x7f.1 0x7f.0x0.0x0.0x1 017700000001
    0177.0.0.1 0177.1 127.0.0.01 0 0.0.0.0 0x0 localhost LOCALHOST localhost. 127.0.0.1. user@127.0.0.1
    example.org:80@127.0.0.1 example.org%40127.0.0.1 [::1] [0:0:0:0:0:0:0:1] [::] [::ffff:127.0.0.1]
    [::ffff:7f00:1] [0:0:0:0:0:ffff:127.0.0.1] [::127.0.0.1] [64:ff9b::127.0.0.1] [2002:7f00:1::]
    [2001:0:7f00:1::] [fe80::1] [fd00:ec2::254] [ff02::1] 169.254.169.254 0xa9fea9fe 10.0.0.1 172.16.0.1
    192.168.0.1 100.100.100.200 224.0.0.1 255.255.255.255 192.0.2.1 198.18.0.1
    \uff11\uff12\uff17.0.0.1 \u2460\u2461\u2466.0.0.1 127\u30020\u30020\u30021
    \u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3
"""


def corpus(port: int) -> list[str]:
    """URLs that lead to this machine or its network, however they are written."""
    return [f"http://{host}:{port}/" for host in HOSTS.split()]


async def test_no_request_reaches_this_machine_or_its_network(
    server: LyingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = corpus(int(server.url("").rpartition(":")[2]))
    assert len(urls) >= 40
    async with opened(allow_private_hosts=False) as store:
        monkeypatch.setattr(socket.socket, "connect", _no_connection)
        asyncio.get_running_loop().sock_connect = _no_connection  # type: ignore[method-assign, assignment]
        for url in urls:
            for act in (store.head(url), fetch(store, url)):
                with pytest.raises((Permanent, ConfigError, Retryable)) as caught:
                    await act
                assert isinstance(caught.value, Permanent | ConfigError) or "no connection" in str(
                    caught.value
                )
        for literal in ("127.0.0.1", "[::1]", "169.254.169.254", "0x7f.1", "localhost"):
            with pytest.raises(Permanent, match="set FLOWLANE_ALLOW_PRIVATE_HOSTS=1 to allow"):
                await store.head(f"http://{literal}/")
        with pytest.raises(Permanent, match=r"host 10\.0\.0\.1: address 10\.0\.0\.1 is private"):
            await store.head("http://10.0.0.1/x")
    assert (server.connections, server.requests) == (0, [])


async def _no_connection(*_: object) -> None:
    raise AssertionError("a connection was attempted")


async def test_no_redirect_reaches_this_machine(server: LyingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hop is let through, as if it were public; what it redirects to is not."""
    async with LyingServer() as canary:
        port = canary.url("").rpartition(":")[2]
        allowed = iter(["", *["loopback"] * 1000])
        monkeypatch.setattr(
            wire, "refused", lambda address: next(allowed) if address == "127.0.0.1" else refused(address)
        )
        async with opened(allow_private_hosts=False) as store:
            server.serve("/start", b"ok")
            assert await fetch(store, server.url("/start")) == b"ok"
            for url in corpus(int(port)):
                server.serve("/hop", b"", redirect=url.encode("ascii", "ignore").decode())
                server.serve("/start", b"", redirect="/hop")
                with pytest.raises((Permanent, ConfigError, Retryable)):
                    await store.head(server.url("/start"))
        assert canary.connections == 0


async def test_a_name_with_only_private_addresses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Happy eyeballs tries several addresses and merges their errors."""

    async def resolve(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 80, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 80)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80)),
        ]

    async with opened(allow_private_hosts=False) as store:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        with pytest.raises(Permanent, match=r"host rebound\.example: .*ALLOW_PRIVATE"):
            await store.head("http://rebound.example/")


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
)
def test_public_addresses_are_allowed(address: str) -> None:
    assert refused(address) == ""


# --------------------------------------------------------------------------- connections


async def test_cancelling_leaks_no_connections(store: http.HttpStore, server: LyingServer) -> None:
    url = server.serve("/a", noise(3_000_000), drip=0.0005)
    for n in range(100):
        task = asyncio.ensure_future(fetch(store, url))
        for _ in range(n % 20):
            await asyncio.sleep(0.0002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert cast(Any, store)._session.connector._acquired == set()
    assert await fetch(store, server.serve("/b", b"x")) == b"x"


async def test_a_body_left_early_gives_its_connection_back(
    store: http.HttpStore, server: LyingServer
) -> None:
    url = server.serve("/a", noise(8_000_000))
    for _ in range(20):
        async with store.read(url) as body:
            await anext(aiter(body))
    assert cast(Any, store)._session.connector._acquired == set()


async def test_whole_bodies_share_a_connection(store: http.HttpStore, server: LyingServer) -> None:
    url = server.serve("/a", noise(100_000))
    for _ in range(10):
        await fetch(store, url)
        await store.head(url)
    assert server.connections == 1


def test_the_errno_that_marks_a_refusal_is_none() -> None:
    assert wire._REFUSED not in errno.errorcode
