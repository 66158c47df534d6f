"""``secretsmanager://``: text or a field of it, kept for an hour, asked for once however many ask."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from botocore.exceptions import ClientError

from flowlane import ConfigError, FlowlaneError, Retryable, veil
from flowlane.clock import SystemClock
from flowlane.connections import OpenConnections
from flowlane.plugins import Registry
from flowlane_aws.clients import asking, open_client
from flowlane_aws.secrets import RESPITE, TTL, SecretsManager
from tests import servers

BOTH = pytest.mark.parametrize("which", ["ministack", "moto"])
PASSWORD = "the-canary-of-the-secrets-manager"
RDS = json.dumps({"username": "loader", "password": PASSWORD, "port": 5432, "tls": True, "tags": {"a": 1}})


@pytest.fixture(autouse=True)
def _unveiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not told is not told here because it is not said, not because it is hidden in the end."""
    monkeypatch.setattr(veil, "_known", {})


class Moved(SystemClock):
    """The machine's clock, put forward by the tests."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return SystemClock.monotonic() + self.ahead


class Counted(SecretsManager):
    """Counts the requests that it makes."""

    requests = 0

    async def _client(self, region: str) -> Any:
        client = await super()._client(region)
        if not hasattr(client, "_counted"):
            client._counted = True
            client.meta.events.register("before-send.secretsmanager", self._count)
        return client

    def _count(self, **_: Any) -> None:
        self.requests += 1


@asynccontextmanager
async def manager() -> AsyncIterator[tuple[Counted, Moved, Any]]:
    async with AsyncExitStack() as stack, open_client("secretsmanager") as admin:
        clock = Moved()
        yield Counted(clock, stack), clock, admin


def chain(error: BaseException) -> str:
    """All that an error and those behind it have to show."""
    shown = ""
    following: BaseException | None = error
    while following is not None:
        shown += f"{following} {following!r} {vars(following)}"
        following = following.__cause__ or following.__context__
    return shown


# --------------------------------------------------------------------------- what is read


@BOTH
async def test_a_secret_is_its_text_or_a_field_of_it(which: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(which)
    async with manager() as (secrets, _, admin):
        plain = await admin.create_secret(Name="prod/api_token", SecretString=PASSWORD)
        whole = await admin.create_secret(Name="prod/db", SecretString=RDS)
        for reference, value in {
            "secretsmanager://prod/api_token": PASSWORD,
            f"secretsmanager://{plain['ARN']}": PASSWORD,
            "secretsmanager://prod/db": RDS,
            "secretsmanager://prod/db?key=password": PASSWORD,
            f"secretsmanager://{whole['ARN']}?key=username": "loader",
            "secretsmanager://prod%2Fdb?key=port": "5432",
            "secretsmanager://prod/db?region=us-east-1&key=tls": "true",
        }.items():
            assert await secrets.get(reference) == value, reference


@BOTH
async def test_what_cannot_be_read_is_said_without_a_value(
    which: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(which)
    async with manager() as (secrets, _, admin):
        await admin.create_secret(Name="db", SecretString=RDS)
        await admin.create_secret(Name="text", SecretString=PASSWORD)
        await admin.create_secret(Name="list", SecretString=json.dumps([PASSWORD]))
        await admin.create_secret(Name="bytes", SecretBinary=PASSWORD.encode())
        for reference, said in {
            "secretsmanager://none": "fetching secretsmanager://none: it does not exist",
            "secretsmanager://db?key=nothing": "the secret's JSON has no field 'nothing'",
            "secretsmanager://db?key=tags": "the field 'tags' is neither text nor a number",
            "secretsmanager://text?key=password": "the secret is no JSON object, it has no fields",
            "secretsmanager://list?key=password": "the secret is no JSON object, it has no fields",
            "secretsmanager://bytes": "holds bytes (SecretBinary): store it as text (SecretString)",
            "secretsmanager://": "names no secret: write secretsmanager://NAME?key=FIELD",
            "secretsmanager://arn:aws:s3:::x": "names no secret: write secretsmanager://NAME?key=FIELD",
            "secretsmanager://db?field=x": "option 'field' is unknown, empty or given twice; known: key",
            "secretsmanager://db?key=": "option 'key' is unknown, empty or given twice",
            "secretsmanager://db?key=a&key=b": "option 'key' is unknown, empty or given twice",
        }.items():
            with pytest.raises(ConfigError) as caught:
                await secrets.get(reference)
            assert said in str(caught.value), reference
            assert "\n" not in str(caught.value)
            assert PASSWORD not in chain(caught.value)


async def test_a_secret_that_is_being_deleted_is_said(ministack: str) -> None:
    async with manager() as (secrets, _, admin):
        await admin.create_secret(Name="old", SecretString=PASSWORD)
        await admin.delete_secret(SecretId="old", RecoveryWindowInDays=7)
        with pytest.raises(ConfigError, match=r"cannot be read \(InvalidRequestException\): check"):
            await secrets.get("secretsmanager://old")


async def test_it_is_opened_by_its_scheme_and_for_options(ministack: str) -> None:
    async with manager() as (_, _, admin), AsyncExitStack() as stack:
        await admin.create_secret(Name="db", SecretString=RDS)
        connections = OpenConnections(Registry.load(), SystemClock(), stack, allow_private=False)
        assert await connections.secret("secretsmanager://db?key=password") == PASSWORD
        # The topic's region is an option as any other one.
        await admin.create_secret(Name="where", SecretString="eu-central-1")
        url = "sns://arn:aws:sns:us-east-1:000000000000:t?region=secretsmanager%3A%2F%2Fwhere"
        async with connections.notifier(url) as topic:
            assert topic._client.meta.region_name == "eu-central-1"  # type: ignore[attr-defined]  # a ``Topic``


# --------------------------------------------------------------------------- how often it is asked for


@BOTH
async def test_a_secret_is_kept_for_an_hour(which: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(which)
    async with manager() as (secrets, clock, admin):
        await admin.create_secret(Name="db", SecretString=RDS)
        arn = (await admin.create_secret(Name="t", SecretString="one-value"))["ARN"]
        assert await secrets.get("secretsmanager://t") == "one-value"
        await admin.put_secret_value(SecretId=arn, SecretString="another")
        clock.ahead = TTL - 60
        assert await secrets.get("secretsmanager://t") == "one-value"
        assert secrets.requests == 1
        clock.ahead = TTL + 1
        assert await secrets.get("secretsmanager://t") == "another"
        assert secrets.requests == 2
        for field in ("username", "password", "port"):
            await secrets.get(f"secretsmanager://db?key={field}")
        assert secrets.requests == 3, "fields of one secret are one request"


async def test_a_refused_one_is_asked_for_anew(ministack: str) -> None:
    async with manager() as (secrets, _, admin):
        await admin.create_secret(Name="t", SecretString="one-value")
        await secrets.get("secretsmanager://t")
        await admin.put_secret_value(SecretId="t", SecretString="another")
        assert await secrets.get("secretsmanager://t", fresh=True) == "another"
        assert await secrets.get("secretsmanager://t") == "another"
        assert secrets.requests == 2


async def test_a_hundred_who_ask_at_once_are_one_request(ministack: str) -> None:
    async with manager() as (secrets, _, admin):
        await admin.create_secret(Name="t", SecretString="one-value")
        asking = [secrets.get("secretsmanager://t", fresh=n % 2 == 1) for n in range(100)]
        assert set(await asyncio.gather(*asking)) == {"one-value"}
        assert secrets.requests == 1
        refused = [secrets.get("secretsmanager://t", fresh=True) for _ in range(100)]
        assert set(await asyncio.gather(*refused)) == {"one-value"}
        assert secrets.requests == 2


async def test_who_asks_along_with_one_that_is_cancelled_has_an_answer(ministack: str) -> None:
    async with manager() as (secrets, _, admin):
        await admin.create_secret(Name="t", SecretString="one-value")
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(secrets.get("secretsmanager://t"))
            second = tasks.create_task(secrets.get("secretsmanager://t"))
            await asyncio.sleep(0)
            first.cancel()
        assert first.cancelled()
        assert second.result() == "one-value"


async def test_where_nobody_answers_all_who_ask_are_told_after_one_try(
    monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    for name, value in servers.environment(closed).items():
        monkeypatch.setenv(name, value)
    async with manager() as (secrets, _, _):
        asking = [secrets.get("secretsmanager://t") for _ in range(20)]
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(answer) for answer in answers} == {Retryable}
        assert secrets.requests <= 3, "the SDK's own tries of one call"


async def test_an_expired_secret_serves_a_little_longer_where_nobody_answers(
    ministack: str, closed: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with manager() as (secrets, clock, admin):
        await admin.create_secret(Name="t", SecretString=PASSWORD)
        await secrets.get("secretsmanager://t")

        def divert(request: Any, **_: Any) -> None:
            request.url = request.url.replace(ministack, closed)

        client = await secrets._client("")
        client.meta.events.register("before-sign.secretsmanager", divert)
        clock.ahead = TTL + 1
        with caplog.at_level(logging.WARNING, "flowlane"):
            assert await secrets.get("secretsmanager://t") == PASSWORD
            made = secrets.requests
            assert await secrets.get("secretsmanager://t") == PASSWORD
        assert secrets.requests == made, "and is not asked for again at once"
        assert "secretsmanager://t could not be fetched anew: " in caplog.text
        assert PASSWORD not in caplog.text
        with pytest.raises(Retryable):
            await secrets.get("secretsmanager://t", fresh=True)
        client.meta.events.unregister("before-sign.secretsmanager", divert)
        clock.ahead += RESPITE + 1
        await admin.put_secret_value(SecretId="t", SecretString="another")
        assert await secrets.get("secretsmanager://t") == "another"


async def test_nothing_of_the_cache_shows_a_secret(ministack: str) -> None:
    async with manager() as (secrets, _, admin):
        await admin.create_secret(Name="t", SecretString=PASSWORD)
        await secrets.get("secretsmanager://t")
        shown = repr(secrets) + repr(vars(secrets))
        assert PASSWORD not in shown
        kept = [each for each in gc.get_objects() if type(each).__module__ == "flowlane_aws.secrets"]
        assert kept
        assert PASSWORD not in repr(kept)


async def test_what_the_sdk_would_log_at_debug_level_is_not_logged(
    ministack: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The SDK's debug lines hold whole answers and signed headers."""
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "botocore"):
        async with manager() as (secrets, _, admin):
            await admin.create_secret(Name="t", SecretString=PASSWORD)
            assert await secrets.get("secretsmanager://t") == PASSWORD
    assert PASSWORD not in caplog.text
    assert "Authorization" not in caplog.text


async def test_a_refusal_says_so_without_the_request() -> None:
    """What AWS says of a wrong signature quotes the headers that were signed, session token included."""
    message = (
        "The request signature we calculated does not match the signature you provided. Check your key. "
        f"The Canonical String should have been 'POST / x-amz-security-token:{PASSWORD}'"
    )
    answer: Any = {"Error": {"Code": "SignatureDoesNotMatch", "Message": message}}
    with pytest.raises(FlowlaneError) as caught:
        async with asking("publishing"):
            raise ClientError(answer, "Publish")
    assert "does not match the signature you provided" in str(caught.value)
    assert PASSWORD not in str(caught.value)
