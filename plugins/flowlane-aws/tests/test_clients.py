"""Clients reach the stand-ins, and what AWS answers becomes one of flowlane's errors, in one line."""

from __future__ import annotations

import pytest

from flowlane.errors import ConfigError, Permanent, Retryable
from flowlane_aws.clients import asking, open_client
from tests import servers


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


async def test_nobody_there_is_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in servers.environment(f"http://127.0.0.1:{servers.free_port()}").items():
        monkeypatch.setenv(name, value)
    async with open_client("sqs") as sqs:
        with pytest.raises(Retryable, match="listing queues: "):
            async with asking("listing queues"):
                await sqs.list_queues()


async def test_a_refusal_is_permanent(ministack: str) -> None:
    async with open_client("dynamodb") as dynamodb:
        with pytest.raises(Permanent, match="asking for nothing: refused"):
            async with asking("asking for nothing"):
                await dynamodb.create_table(TableName="x", KeySchema=[], AttributeDefinitions=[])
