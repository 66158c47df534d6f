"""Clients reach the stand-ins, and what AWS answers becomes one of flowlane's errors, in one line."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from flowlane.errors import ConfigError, FlowlaneError, Permanent, Retryable
from flowlane_aws.clients import asking, open_client
from tests import servers
from tests.aws_wire import Answer
from tests.fault_proxy import Exchange, FaultProxy, refused


@pytest.mark.parametrize("which", ["ministack", "moto"])
async def test_a_client_works_and_says_what_is_missing(which: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(which)
    async with open_client("sqs") as sqs:
        async with asking("creating queue q"):
            made = await sqs.create_queue(QueueName="q")
        with pytest.raises(ConfigError, match=r"^looking for queue p: it does not exist \(.*create it"):
            async with asking("looking for queue p"):
                await sqs.get_queue_url(QueueName="p")
        assert made["QueueUrl"].endswith("/q")


async def test_no_region_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="region"):
        async with open_client("sqs"):
            pass


async def test_no_profile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    with pytest.raises(ConfigError, match=r"profile \(nosuch\) could not be found"):
        async with open_client("sqs", region="eu-west-1"):
            pass


async def test_an_endpoint_that_does_not_exist_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in servers.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_USE_DUALSTACK_ENDPOINT", "true")
    with pytest.raises(ConfigError, match="dualstack"):
        async with open_client("sqs", region="eu-isoe-west-1"):
            pass
    async with open_client("dynamodb", region="local") as dynamodb:
        with pytest.raises(ConfigError, match=r"listing tables: .*Dualstack and local"):
            async with asking("listing tables"):
                await dynamodb.list_tables()


async def test_a_page_that_is_none_of_awss_is_tried_again(ministack: str) -> None:
    """A proxy's, say, where XML is to come: the SDK's error for that is of none of its kinds."""

    async def page(exchange: Exchange) -> bool:
        return await exchange.answer(Answer(200, {"content-type": "text/html"}, b"<html><br>Wait</html>"))

    async with FaultProxy(ministack) as proxy:
        proxy.inject("sns.ListTopics", page)
        async with open_client("sns", endpoint=proxy.url, attempts=1) as sns:
            with pytest.raises(Retryable, match=r"^listing topics: ResponseParserError: .*invalid XML"):
                async with asking("listing topics"):
                    await sns.list_topics()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "InvalidSignatureException", "Signature expired: 20260101T000000Z is now earlier than 2026"),
        (400, "InvalidSignatureException", "Signature not yet current: 20260101T000000Z is still later"),
        (403, "SignatureDoesNotMatch", "Signature expired: 20260101T000000Z is now earlier than 2026"),
        (403, "RequestTimeTooSkewed", "The difference between the request time and the current time"),
    ],
)
async def test_what_was_frozen_while_it_was_sent_is_worth_another_try(
    ministack: str, status: int, code: str, message: str
) -> None:
    async with FaultProxy(ministack) as proxy, open_client("dynamodb", endpoint=proxy.url) as dynamodb:
        proxy.inject("dynamodb.ListTables", refused(status, code, message), times=-1)
        with pytest.raises(Retryable, match="listing tables: signed too long ago, or too early"):
            async with asking("listing tables"):
                await dynamodb.list_tables()


async def test_nobody_there_is_worth_another_try(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in servers.environment(closed).items():
        monkeypatch.setenv(name, value)
    async with open_client("sqs") as sqs:
        with pytest.raises(Retryable, match="listing queues: "):
            async with asking("listing queues"):
                await sqs.list_queues()


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("KMSAccessDeniedException", ConfigError, "not allowed .*see that its KMS key"),
        ("KMS.DisabledException", ConfigError, "not allowed .*see that its KMS key"),
        ("KmsInvalidState", ConfigError, "not allowed .*see that its KMS key"),
        ("KMS.ThrottlingException", Retryable, "throttled"),
        ("KmsThrottled", Retryable, "throttled"),
    ],
)
async def test_a_key_that_cannot_be_used_is_told_of_and_a_busy_one_waited_for(
    ministack: str, code: str, kind: type[FlowlaneError], said: str
) -> None:
    """As the services call it: Kinesis, SQS as it once spoke (and S3), SQS as it speaks in JSON."""
    async with FaultProxy(ministack) as proxy, open_client("dynamodb", endpoint=proxy.url) as dynamodb:
        proxy.inject("dynamodb.ListTables", refused(400, code), times=-1)
        with pytest.raises(kind, match=said):
            async with asking("listing tables"):
                await dynamodb.list_tables()


async def test_a_refusal_is_permanent(ministack: str) -> None:
    async with open_client("dynamodb") as dynamodb:
        with pytest.raises(Permanent, match="asking for nothing: refused"):
            async with asking("asking for nothing"):
                await dynamodb.create_table(TableName="x", KeySchema=[], AttributeDefinitions=[])


async def test_connections_that_died_in_a_freeze_cost_one_try(ministack: str) -> None:
    """Twenty were kept; each is found to be dead when it is used again, and not before. Three tries are made
    for a call: they must not all go to dead ones."""
    kept: set[asyncio.StreamWriter] = set()
    dead: set[asyncio.StreamWriter] = set()
    found: list[asyncio.StreamWriter] = []
    relays: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if writer in dead:
                    return
                writer.write(data)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        relays.add(task)
        url = urlsplit(ministack)
        upstream, sender = await asyncio.open_connection(url.hostname, url.port)
        kept.add(writer)
        back = asyncio.create_task(pass_on(upstream, writer))
        try:
            with suppress(OSError):
                while data := await reader.read(1 << 16):
                    if writer in dead:
                        found.append(writer)
                        break
                    sender.write(data)
        finally:
            writer.transport.abort()
            sender.transport.abort()
            await asyncio.wait([back])

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with open_client("dynamodb", endpoint=endpoint) as dynamodb:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(20):
                    tasks.create_task(dynamodb.list_tables())
            assert len(kept) == 20
            dead |= kept
            async with asking("listing tables"):
                await dynamodb.list_tables()
            assert len(found) == 1
        await asyncio.wait(relays)
