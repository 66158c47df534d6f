"""The short way signs as the SDK does, gives what the SDK gives, and fails and tries again as it does."""

from __future__ import annotations

import asyncio
import sys
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import BotoCoreError, ClientError
from hypothesis import given
from hypothesis import strategies as st

from flowlane_aws.brisk import PIECE, BriskClient, Signer
from flowlane_aws.clients import open_client
from flowlane_aws.dynamodb.forms import HOT as WRITING
from flowlane_aws.queue.queue import HOT
from tests.aws_wire import Answer
from tests.fault_proxy import (
    Exchange,
    Fault,
    FaultProxy,
    changed,
    cut,
    lost_reply,
    lost_request,
    refused,
    throttled,
)
from tests.servers import CREDENTIALS

TYPE = "application/x-amz-json-1.0"
#: Headers that differ from one request to the next, or tell the SDK's own counting of them.
OF_ONE_REQUEST = {"authorization", "x-amz-date", "amz-sdk-invocation-id", "amz-sdk-request"}
words = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1)


@given(
    body=st.binary(),
    key=words,
    secret=words,
    token=st.none() | words,
    now=st.datetimes(min_value=datetime(2000, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001  # has its zone
)
def test_requests_are_signed_as_by_the_sdk(
    body: bytes, key: str, secret: str, token: str | None, now: datetime
) -> None:
    signer = Signer("sqs", "eu-west-1", "sqs.eu-west-1.amazonaws.com")
    ours = signer.sign(body, TYPE, "AmazonSQS.X", ReadOnlyCredentials(key, secret, token, None), now)
    request = AWSRequest(
        "POST",
        "https://sqs.eu-west-1.amazonaws.com/",
        headers={"Content-Type": TYPE, "X-Amz-Target": "AmazonSQS.X"},
        data=body,
    )
    with patch("botocore.auth.get_current_datetime", lambda: now):
        SigV4Auth(Credentials(key, secret, token), "sqs", "eu-west-1").add_auth(request)
    assert ours["Authorization"] == request.headers["Authorization"]
    assert ours.get("X-Amz-Security-Token") == request.headers.get("X-Amz-Security-Token")


async def send(sqs: Any, url: str) -> Any:
    entries = [{"Id": str(n), "MessageBody": f"wört {n}", "DelaySeconds": 0} for n in range(3)]
    return await sqs.send_message_batch(QueueUrl=url, Entries=entries)


async def test_the_short_way_leads_to_the_same(ministack: str) -> None:
    async with open_client("sqs") as slow, open_client("sqs", brisk=HOT) as quick:
        assert isinstance(quick, BriskClient)
        url = (await quick.create_queue(QueueName="brisk"))["QueueUrl"]
        seen: list[str] = []
        quick.meta.events.register("before-send.sqs", lambda request, **_: seen.append(request.url))
        for client in (slow, quick):
            sent = await send(client, url)
            assert sorted(one["Id"] for one in sent["Successful"]) == ["0", "1", "2"]
        got: list[Any] = []
        for client in (quick, slow):
            answer = await client.receive_message(
                QueueUrl=url, MaxNumberOfMessages=3, AttributeNames=["ApproximateReceiveCount"]
            )
            got += answer["Messages"]
            entries = [
                {"Id": str(n), "ReceiptHandle": one["ReceiptHandle"]}
                for n, one in enumerate(answer["Messages"])
            ]
            done = await client.delete_message_batch(QueueUrl=url, Entries=entries)
            assert len(done["Successful"]) == len(entries)
        assert sorted(one["Body"] for one in got) == sorted(2 * [f"wört {n}" for n in range(3)])
        assert {one["Attributes"]["ApproximateReceiveCount"] for one in got} == {"1"}
        assert not seen  # the SDK sent none of these


async def test_requests_are_told_apart_by_nothing_that_matters(ministack: str) -> None:
    heads: list[dict[str, str]] = []

    async def keep(exchange: Exchange) -> bool:
        heads.append({k: v for k, v in exchange.request.headers.items() if k not in OF_ONE_REQUEST})
        return await exchange.answer(await exchange.forward())

    async with (
        FaultProxy(ministack) as proxy,
        open_client("sqs", endpoint=proxy.url) as slow,
        open_client("sqs", endpoint=proxy.url, brisk=HOT) as quick,
    ):
        url = (await slow.create_queue(QueueName="brisk-heads"))["QueueUrl"]
        proxy.inject("sqs.SendMessageBatch", keep, times=-1)
        for client in (slow, quick):
            for body in ("short", "x" * PIECE):  # with JSON around it in pieces, and saying how many bytes
                await client.send_message_batch(QueueUrl=url, Entries=[{"Id": "0", "MessageBody": body}])
    lengths = [int(head.pop("content-length")) for head in heads]
    assert all(lengths)
    assert heads[0] == heads[1] == heads[2] == heads[3]


async def test_errors_are_those_of_the_sdk(ministack: str) -> None:
    async with open_client("sqs") as slow, open_client("sqs", brisk=HOT) as quick:
        said = []
        for client in (slow, quick):
            url = f"{ministack}/000000000000/nosuch"
            with pytest.raises(ClientError) as failed:
                await client.receive_message(QueueUrl=url)
            assert isinstance(failed.value, client.exceptions.QueueDoesNotExist)
            said.append(str(failed.value))
        assert said[0] == said[1]


def page(answer: Answer) -> None:
    """An error page of something in between, with a status as if all were well."""
    answer.body = b"<html>"


def latin(answer: Answer) -> None:
    """No UTF-8."""
    answer.body = b'{"a":"\xff"}'


FAULTS = {
    "latin": changed(latin),
    "cut": cut(10),
    "reset": cut(10, reset=True),
    "throttled": throttled(),
    "page": changed(page),
}
#: Those of whole answers.
ONCE = ("page", "latin")


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_goes_wrong_is_tried_again(ministack: str, fault: str) -> None:
    async with FaultProxy(ministack) as proxy, open_client("sqs", endpoint=proxy.url, brisk=HOT) as sqs:
        url = (await sqs.create_queue(QueueName=f"brisk-{fault}"))["QueueUrl"]
        await send(sqs, url)
        struck = proxy.inject("sqs.ReceiveMessage", FAULTS[fault], times=1 if fault in ONCE else 2)
        answer = await sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=0)
        assert struck.fired == (1 if fault in ONCE else 2)
        assert answer["Messages"]


@pytest.mark.parametrize(
    ("region", "settings", "url"),
    [
        ("us-gov-west-1", {"AWS_USE_FIPS_ENDPOINT": "true"}, "https://dynamodb.us-gov-west-1.amazonaws.com/"),
        ("us-iso-east-1", {"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "dynamodb.us-iso-east-1.api.aws.ic.gov/"),
        ("eu-west-1", {"AWS_USE_FIPS_ENDPOINT": "true"}, "https://dynamodb-fips.eu-west-1.amazonaws.com/"),
        (
            "eu-west-1",
            {"AWS_ACCOUNT_ID": "123456789012"},
            "https://123456789012.ddb.eu-west-1.amazonaws.com/",
        ),
        ("eu-west-1", {"AWS_ENDPOINT_URL": "http://host:1/path"}, ""),
        ("local", {}, "http://localhost:8000/"),
    ],
)
async def test_requests_go_where_the_sdk_s_do(
    monkeypatch: pytest.MonkeyPatch, region: str, settings: dict[str, str], url: str
) -> None:
    for name, value in {**CREDENTIALS, **settings}.items():
        monkeypatch.setenv(name, value)
    async with open_client("dynamodb", region=region, brisk=WRITING) as client:
        asked: list[str] = []

        def stop(request: Any, **_: Any) -> None:
            asked.append(request.url)
            raise ConnectionError

        client.meta.events.register("before-send.dynamodb", stop)
        with pytest.raises(ConnectionError):
            await client.list_tables()  # by the SDK
        way = await client._find_way(client.meta.service_model.operation_model("PutItem"), {"TableName": "t"})
        assert asked[0].endswith(url or "http://host:1/path")
        assert (way.url if way else "") == (asked[0] if url else "")
        assert way is None or way.signer._region == ("us-east-1" if region == "local" else region)


async def test_there_is_no_other_way_than_the_settings_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CREDENTIALS, "AWS_ACCOUNT_ID_ENDPOINT_MODE": "required"}.items():
        monkeypatch.setenv(name, value)
    async with open_client("dynamodb", brisk=WRITING) as client:
        with pytest.raises(BotoCoreError, match="AccountIdEndpointMode is required"):
            await client.put_item(TableName="t", Item={})


async def test_a_call_that_is_cancelled_leaves_its_connection_free(ministack: str) -> None:
    async with (
        FaultProxy(ministack) as proxy,
        open_client("sqs", endpoint=proxy.url, connections=2, brisk=HOT) as sqs,
    ):
        url = (await sqs.create_queue(QueueName="brisk-cancelled"))["QueueUrl"]
        came = asyncio.Event()

        async def hang(exchange: Exchange) -> bool:
            came.set()
            return await exchange.hang()

        hung = proxy.inject("sqs.ReceiveMessage", hang, times=5)
        for _ in range(5):
            call = asyncio.create_task(sqs.receive_message(QueueUrl=url))
            await came.wait()
            came.clear()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(sqs.receive_message(QueueUrl=url))
        assert hung.fired == 5


async def test_quota_of_tries_that_helped_is_given_back(ministack: str) -> None:
    """The SDK's standard mode has 500 for a client, and takes 5 for each further try: it would be used up
    after a hundred."""
    async with FaultProxy(ministack) as proxy, open_client("sqs", endpoint=proxy.url, brisk=HOT) as sqs:
        url = (await sqs.create_queue(QueueName="brisk-quota"))["QueueUrl"]
        handler = next(
            found.__self__
            for found in sqs.meta.events._emitter._lookup_cache["needs-retry.sqs.CreateQueue"]
            if hasattr(found, "__self__")
        )
        for _ in range(2):
            proxy.inject("sqs.ReceiveMessage", throttled(), times=1)
            await sqs.receive_message(QueueUrl=url)
            proxy.clear()
        assert handler._retry_quota._quota.available_capacity == 500
        proxy.inject("sqs.ReceiveMessage", throttled(), times=-1)
        with pytest.raises(ClientError):
            await sqs.receive_message(QueueUrl=url)
        assert handler._retry_quota._quota.available_capacity == 490


async def test_a_failure_s_traceback_holds_no_key(ministack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY")
    async with FaultProxy(ministack) as proxy, open_client("sqs", endpoint=proxy.url, brisk=HOT) as sqs:
        proxy.inject("sqs.ReceiveMessage", lost_request(), times=-1)
        with pytest.raises(BotoCoreError) as failed:
            await sqs.receive_message(QueueUrl=f"{ministack}/000000000000/q")
    shown = "".join(traceback.TracebackException.from_exception(failed.value, capture_locals=True).format())
    assert "brisk.py" in shown
    assert "CANARY" not in shown


async def test_credentials_are_refreshed_between_calls(
    ministack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a role are: by a process here, each of whose tokens is about to expire."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    (tmp_path / "made.py").write_text(
        "import json, pathlib\n"
        f"count = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "count.write_text(made := (count.read_text() if count.exists() else '') + 'I')\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': made, 'SecretAccessKey': made, 'SessionToken': made, "
        f"'Expiration': {soon!r}}}))\n"
    )
    program = f"{sys.executable} {tmp_path / 'made.py'}"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    tokens: list[str] = []

    async def keep(exchange: Exchange) -> bool:
        headers = exchange.request.headers
        assert f"Credential={headers['x-amz-security-token']}/" in headers["authorization"]
        tokens.append(headers["x-amz-security-token"])
        return await exchange.answer(await exchange.forward())

    async with FaultProxy(ministack) as proxy, open_client("sqs", endpoint=proxy.url, brisk=HOT) as sqs:
        url = (await sqs.create_queue(QueueName="brisk-role"))["QueueUrl"]
        proxy.inject("sqs.ReceiveMessage", keep, times=-1)
        for _ in range(3):
            await sqs.receive_message(QueueUrl=url)
    assert len({*tokens}) == 3


async def test_a_proxy_is_used(ministack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FaultProxy(ministack) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        async with open_client(
            "dynamodb", endpoint="http://dynamodb.example.org:81", brisk=WRITING
        ) as client:
            await made(client, "brisk-proxied")
            await client.put_item(**put("brisk-proxied"))
        assert proxy.calls["dynamodb.PutItem"] == 1


# ---------------------------------------------------------------------- DynamoDB, whose refusals are common


def wrong_crc(answer: Answer) -> None:
    """As DynamoDB sends it, if not for these bytes."""
    answer.headers["x-amz-crc32"] = "1"


async def made(client: Any, name: str) -> None:
    await client.create_table(
        TableName=name,
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )


def put(table: str, key: str = "a", **more: Any) -> dict[str, Any]:
    """A put that is refused where the item is there."""
    return {
        "TableName": table,
        "Item": {"id": {"S": key}, "n": {"N": "1"}, **more},
        "ConditionExpression": "attribute_not_exists(id)",
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }


def told(error: ClientError) -> dict[str, Any]:
    """What there is to know of `error`, but for what differs from one request to the next."""
    response: dict[str, Any] = dict(error.response)
    response["ResponseMetadata"] = response["ResponseMetadata"]["HTTPStatusCode"]
    return response


@pytest.mark.parametrize("operation", ["put_item", "transact_write_items"])
async def test_a_refusal_is_asked_for_once_and_told_as_by_the_sdk(ministack: str, operation: str) -> None:
    name = f"brisk-{operation.replace('_', '-')}"
    call = {"put_item": "dynamodb.PutItem", "transact_write_items": "dynamodb.TransactWriteItems"}[operation]
    params = (
        put(name) if operation == "put_item" else {"TransactItems": [{"Put": put(name, k)} for k in "ab"]}
    )
    async with (
        FaultProxy(ministack) as proxy,
        open_client("dynamodb", endpoint=proxy.url) as slow,
        open_client("dynamodb", endpoint=proxy.url, brisk=WRITING) as quick,
    ):
        await made(quick, name)
        await quick.put_item(**put(name))
        said = []
        for client in (slow, quick):
            proxy.calls.clear()
            with pytest.raises(ClientError) as failed:
                await getattr(client, operation)(**params)
            assert proxy.calls == {call: 1}
            said.append((type(failed.value).__name__, str(failed.value), told(failed.value)))
        assert said[0] == said[1]
        assert '"n": {"N": "1"}' in repr(said[1][2]).replace("'", '"')  # the item that is in the way


FAILURES: dict[str, tuple[Fault, type[Exception]]] = {
    "throttled": (throttled(), ClientError),
    "away": (refused(500, "InternalServerError"), ClientError),
    "refused": (refused(400, "ValidationException"), ClientError),
    "page": (changed(page), BotoCoreError),
    "crc": (changed(wrong_crc), BotoCoreError),
    "lost request": (lost_request(), BotoCoreError),
    "lost reply": (lost_reply(), BotoCoreError),
    "cut": (cut(-1), BotoCoreError),
}


@pytest.mark.parametrize("fault", FAILURES)
@pytest.mark.parametrize("attempts", [1, 2])
async def test_there_are_as_many_tries_as_the_client_has(ministack: str, fault: str, attempts: int) -> None:
    injected, error = FAILURES[fault]
    name = f"brisk-{fault.replace(' ', '-')}-{attempts}"
    async with (
        FaultProxy(ministack) as proxy,
        open_client("dynamodb", endpoint=proxy.url, attempts=attempts, brisk=WRITING) as client,
    ):
        await made(client, name)
        struck = proxy.inject("dynamodb.PutItem", injected, times=-1)
        with pytest.raises(error):
            await client.put_item(TableName=name, Item={"id": {"S": "a"}})
        assert struck.fired == (1 if fault == "refused" else attempts)
        proxy.clear()
        struck = proxy.inject("dynamodb.PutItem", injected, times=attempts - 1)
        if fault != "refused" or attempts == 1:
            await client.put_item(TableName=name, Item={"id": {"S": "a"}})
            assert struck.fired == attempts - 1


async def test_bytes_and_large_items_arrive(ministack: str) -> None:
    async with open_client("dynamodb") as slow, open_client("dynamodb", brisk=WRITING) as quick:
        await made(slow, "brisk-large")
        items = [{"id": {"S": str(n)}, "b": {"B": b"\x00\xff"}, "t": {"S": "ä" * 150_000}} for n in range(3)]
        actions = [{"Put": {"TableName": "brisk-large", "Item": item}} for item in items]
        await quick.transact_write_items(TransactItems=actions)
        for item in items:
            found = await slow.get_item(TableName="brisk-large", Key={"id": item["id"]})
            assert found["Item"] == item
            short = await quick.get_item(TableName="brisk-large", Key={"id": item["id"]})
            assert short["Item"] == {**item, "b": {"B": "AP8="}}
