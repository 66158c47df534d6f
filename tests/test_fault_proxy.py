"""The fault proxy passes what it is not told to spoil, and spoils what it is told to."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from tests.aws_wire import Answer, Request
from tests.fault_proxy import (
    Exchange,
    Fault,
    FaultProxy,
    another_etag,
    changed,
    cut,
    hanging,
    ignored_range,
    lost_reply,
    lost_request,
    refused,
    slow,
    stalled,
    throttled,
    truncated,
)

OBJECT = hashlib.shake_256(b"object").digest(300_000)
BROKEN = (aiohttp.ClientError, ConnectionError)


class Upstream:
    """An honest server: objects by GET and HEAD, in ranges, and whatever else is put, remembered."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        self.broken = 0  # requests whose body did not come whole
        self.peers: list[object] = []  # of each request, the connection that it came on

    async def answer(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.read()
        except Exception:
            self.broken += 1
            raise
        self.seen.append((request.method, request.raw_path, body))
        self.peers.append(request.transport)
        if request.method in ("GET", "HEAD"):
            part = OBJECT[request.http_range]
            headers = {"ETag": '"e"', "X-Kept": "a b"}
            return web.Response(status=200 if part == OBJECT else 206, body=part, headers=headers)
        if request.query_string == "chunked":
            stream = web.StreamResponse()
            stream.enable_chunked_encoding()
            await stream.prepare(request)
            await stream.write(body[: len(body) // 2])
            await stream.write(body[len(body) // 2 :])
            return stream
        return web.Response(body=body)


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
async def proxy(upstream: Upstream) -> AsyncIterator[FaultProxy]:
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{tail:.*}", upstream.answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with FaultProxy(f"http://127.0.0.1:{runner.addresses[0][1]}") as proxy:
            yield proxy
    finally:
        await runner.cleanup()


@pytest.fixture
async def client(proxy: FaultProxy) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(proxy.url, timeout=timeout) as session:
        yield session


async def test_without_faults_nothing_is_changed(
    proxy: FaultProxy, upstream: Upstream, client: aiohttp.ClientSession
) -> None:
    async with client.get("/b/k%2Fl?x=a", headers={"Range": "bytes=5-9"}) as answer:
        assert (answer.status, await answer.read()) == (206, OBJECT[5:10])
        assert (answer.headers["ETag"], answer.headers["X-Kept"]) == ('"e"', "a b")
    async with client.head("/b/k") as answer:
        assert (answer.status, answer.content_length) == (200, len(OBJECT))
    async with client.put("/b/k", data=OBJECT, expect100=True) as answer:
        assert await answer.read() == OBJECT
    async with client.put("/b/k?chunked", data=OBJECT, chunked=True) as answer:
        assert await answer.read() == OBJECT
    assert [seen[:2] for seen in upstream.seen] == [
        ("GET", "/b/k%2Fl?x=a"),
        ("HEAD", "/b/k"),
        ("PUT", "/b/k"),
        ("PUT", "/b/k?chunked"),
    ]
    assert all(body == OBJECT for method, _, body in upstream.seen if method == "PUT")
    assert proxy.calls == {"s3.GetObject": 1, "s3.HeadObject": 1, "s3.PutObject": 2}


async def test_the_server_is_asked_on_one_connection_while_its_answers_come_whole(
    proxy: FaultProxy, upstream: Upstream, client: aiohttp.ClientSession
) -> None:
    for method in ("GET", "HEAD", "PUT"):
        async with client.request(method, "/b/k") as answer:
            await answer.read()
    proxy.inject("s3.PutObject", truncated(1000), times=-1)
    with pytest.raises(BROKEN):
        async with client.put("/b/k", data=OBJECT):
            pass
    async with client.get("/b/k") as answer:
        assert await answer.read() == OBJECT
    first, second, third, after = upstream.peers
    assert first is second is third is not after


async def test_a_rule_meets_the_calls_it_names(proxy: FaultProxy, client: aiohttp.ClientSession) -> None:
    second = proxy.inject("s3.GetObject", refused(500, "InternalError"), where="/b/this", nth=2, times=2)
    later = proxy.inject("s3.GetObject", refused(501, "Other"), where="bytes=7-", times=-1)
    proxy.inject("", refused(500, "InternalError"), where="/b/that", nth=2)

    async def status(method: str, path: str, range_: str = "bytes=0-") -> int:
        async with client.request(method, path, headers={"Range": range_}) as answer:
            return answer.status

    assert [await status("GET", "/b/this") for _ in range(4)] == [200, 500, 500, 200]
    assert [await status(method, "/b/that") for method in ("GET", "HEAD", "HEAD")] == [200, 500, 200]
    assert [await status("GET", "/b/this", "bytes=7-") for _ in range(2)] == [501, 501]
    assert (second.seen, second.fired, later.fired) == (6, 2, 2)
    proxy.clear()
    assert await status("GET", "/b/this", "bytes=7-") == 206
    assert proxy.calls == {"s3.GetObject": 1}


@pytest.mark.parametrize("at", [0, 1, 1000, -1])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_body_is_cut(proxy: FaultProxy, client: aiohttp.ClientSession, at: int, reset: bool) -> None:
    proxy.inject("s3.GetObject", cut(at, reset=reset))
    got = bytearray()

    async def read() -> None:
        async with client.get("/b/k") as answer:
            assert answer.content_length == len(OBJECT)
            async for block in answer.content.iter_any():
                got.extend(block)

    with pytest.raises(BROKEN):
        await read()
    assert OBJECT.startswith(bytes(got))
    assert len(got) <= at % len(OBJECT)
    if not reset:  # a reset may overtake what was sent before it
        assert len(got) == at % len(OBJECT)
    async with client.get("/b/k") as answer:
        assert await answer.read() == OBJECT


@pytest.mark.parametrize(
    ("fault", "applied"), [(lost_request(), 0), (lost_reply(), 1), (refused(503, "SlowDown"), 0)]
)
async def test_what_the_server_has_seen_of_a_failed_request(
    proxy: FaultProxy, upstream: Upstream, client: aiohttp.ClientSession, fault: Fault, applied: int
) -> None:
    rule = proxy.inject("s3.PutObject", fault, times=-1)
    with pytest.raises(BROKEN):
        async with client.put("/b/k", data=OBJECT, raise_for_status=True):
            pass
    assert len(upstream.seen) == applied * rule.fired
    assert rule.fired >= 1


async def test_a_reset_is_no_orderly_end(proxy: FaultProxy) -> None:
    proxy.inject("s3.GetObject", lost_request())
    port = int(proxy.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /b/k HTTP/1.1\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_a_request_is_truncated_on_its_way(
    proxy: FaultProxy, upstream: Upstream, client: aiohttp.ClientSession
) -> None:
    proxy.inject("s3.PutObject", truncated(1000), times=-1)
    with pytest.raises(BROKEN):
        async with client.put("/b/k", data=OBJECT):
            pass
    assert (upstream.seen, upstream.broken >= 1) == ([], True)


@pytest.mark.parametrize("applied", [False, True])
async def test_a_call_hangs_until_the_client_gives_up(
    proxy: FaultProxy, upstream: Upstream, client: aiohttp.ClientSession, applied: bool
) -> None:
    rule = proxy.inject("s3.PutObject", hanging(applied=applied))
    asking = asyncio.ensure_future(client.put("/b/k", data=b"x"))
    async with asyncio.timeout(60):
        while (rule.fired, len(upstream.seen)) != (1, applied):  # noqa: ASYNC110  # neither tells
            await asyncio.sleep(0.01)
    ended, _ = await asyncio.wait([asking], timeout=0.2)
    assert not ended
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    assert len(upstream.seen) == applied


async def test_a_body_stalls_until_the_client_gives_up(
    proxy: FaultProxy, client: aiohttp.ClientSession
) -> None:
    proxy.inject("s3.GetObject", stalled(1000))
    async with client.get("/b/k") as answer:
        assert await answer.content.readexactly(1000) == OBJECT[:1000]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await answer.content.readany()


async def test_an_answer_is_slow(proxy: FaultProxy, client: aiohttp.ClientSession) -> None:
    proxy.inject("s3.GetObject", slow(0.2))
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with client.get("/b/k") as answer:
        assert await answer.read() == OBJECT
    assert loop.time() - began >= 0.2


async def test_answers_are_changed(proxy: FaultProxy, client: aiohttp.ClientSession) -> None:
    def half(answer: Answer) -> None:
        answer.body = answer.body[::2]

    proxy.inject("s3.GetObject", changed(another_etag), where="/etag")
    proxy.inject("s3.GetObject", ignored_range(), where="/range")
    proxy.inject("s3.GetObject", changed(half), where="/half")
    async with client.get("/b/etag") as answer:
        assert (answer.headers.getall("ETag"), await answer.read()) == ([f'"{"0" * 32}"'], OBJECT)
    async with client.get("/b/range", headers={"Range": "bytes=5-9"}) as answer:
        assert (answer.status, await answer.read()) == (200, OBJECT)
    async with client.get("/b/half") as answer:
        assert await answer.read() == OBJECT[::2]


async def test_throttling_is_said_in_the_words_of_each_protocol(
    proxy: FaultProxy, client: aiohttp.ClientSession
) -> None:
    for call in ("s3.PutObject", "sqs.SendMessage", "sns.Publish"):
        proxy.inject(call, throttled())
    async with client.put("/b/k") as answer:
        assert (answer.status, "<Error><Code>SlowDown</Code>" in await answer.text()) == (503, True)
    async with client.post("/", headers={"X-Amz-Target": "AmazonSQS.SendMessage"}) as answer:
        assert (answer.status, (await answer.json(content_type=None))["__type"]) == (
            403,
            "injected#RequestThrottled",
        )
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/r/sns/aws4_request"}
    async with client.post("/", data={"Action": "Publish"}, headers=signed) as answer:
        assert (answer.status, "<Code>Throttled</Code>" in await answer.text()) == (429, True)


def test_calls_have_the_names_that_botocore_gives_them() -> None:
    def name(method: str, target: str, **headers: str) -> str:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return Request(method, target, named, b"").call

    assert name("POST", "/", x_amz_target="DynamoDB_20120810.PutItem") == "dynamodb.PutItem"
    assert name("POST", "/", x_amz_target="Kinesis_20131202.PutRecords") == "kinesis.PutRecords"
    assert name("POST", "/", x_amz_target="secretsmanager.GetSecretValue") == "secretsmanager.GetSecretValue"
    assert name("GET", "/b?list-type=2&prefix=a/") == "s3.ListObjectsV2"
    assert name("GET", "/b/?list-type=2") == "s3.ListObjectsV2"
    assert name("PUT", "/b") == "s3.CreateBucket"
    assert name("POST", "/b/k/l?uploads") == "s3.CreateMultipartUpload"
    assert name("PUT", "/b/k?partNumber=1&uploadId=u") == "s3.UploadPart"
    assert name("POST", "/b/k?uploadId=u") == "s3.CompleteMultipartUpload"
    assert name("DELETE", "/b/k?uploadId=u") == "s3.AbortMultipartUpload"
    assert name("GET", "/b/k?uploadId=u") == "s3.ListParts"
    assert name("PATCH", "/b/k") == "s3.PATCH"


async def test_the_proxy_ends_while_somebody_hangs(proxy: FaultProxy, client: aiohttp.ClientSession) -> None:
    arrived = asyncio.Event()

    async def fault(exchange: Exchange) -> bool:
        arrived.set()
        return await exchange.hang()

    async def ask() -> None:
        with pytest.raises(BROKEN):
            await client.get("/b/k")

    proxy.inject("s3.GetObject", fault)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(ask())
        await arrived.wait()
        await proxy.__aexit__(None, None, None)
