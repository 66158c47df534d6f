"""``sns://``: notices arrive at a topic's subscribers, in the form that SNS takes."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane import ConfigError, Context, Event, Lane, Policy, Unit
from flowlane.clock import SystemClock
from flowlane.compose import open_application
from flowlane.connections import OpenConnections
from flowlane.errors import Retryable
from flowlane.plugins import Registry
from flowlane.settings import Settings
from flowlane.worker import run_once
from flowlane_aws.clients import open_client
from flowlane_aws.sns import CUT_NOTE, KEY_ATTRIBUTE, SUBJECT, TEXT, id_of, subject_of, text_of
from tests import servers

BOTH = pytest.mark.parametrize("which", ["ministack", "moto"])
KEY = "toy/notify/toy/run/2024-01-01T00:00:00Z@0#0/send"


class Topic:
    """A topic with a queue subscribed to it."""

    def __init__(self, sns: Any, sqs: Any, arn: str, queue: str) -> None:
        self.sns, self.sqs, self.arn, self.queue = sns, sqs, arn, queue

    async def arrived(self, expected: int) -> list[dict[str, Any]]:
        """The notices that have come to the queue, `expected` of them, and none besides."""
        found: dict[str, dict[str, Any]] = {}
        for _ in range(20):
            wait = 1 if len(found) < expected else 0
            answer = await self.sqs.receive_message(
                QueueUrl=self.queue, MaxNumberOfMessages=10, WaitTimeSeconds=wait
            )
            for message in answer.get("Messages", ()):
                found[message["MessageId"]] = json.loads(message["Body"])
                await self.sqs.delete_message(QueueUrl=self.queue, ReceiptHandle=message["ReceiptHandle"])
            if not answer.get("Messages") and len(found) >= expected:
                break
        return list(found.values())


@asynccontextmanager
async def a_topic(name: str = "news") -> AsyncIterator[Topic]:
    fifo = {"FifoQueue": "true"} if name.endswith(".fifo") else {}
    async with open_client("sns") as sns, open_client("sqs") as sqs:
        attributes = {"FifoTopic": "true"} if fifo else {}
        arn = (await sns.create_topic(Name=name, Attributes=attributes))["TopicArn"]
        queue = (await sqs.create_queue(QueueName=f"inbox-{name}", Attributes=fifo))["QueueUrl"]
        about = await sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])
        await sns.subscribe(TopicArn=arn, Protocol="sqs", Endpoint=about["Attributes"]["QueueArn"])
        yield Topic(sns, sqs, arn, queue)


@asynccontextmanager
async def notifier(url: str) -> AsyncIterator[Any]:
    async with AsyncExitStack() as stack:
        connections = OpenConnections(Registry.load(), SystemClock(), stack, allow_private=False)
        async with connections.notifier(url) as opened:
            yield opened


@BOTH
async def test_a_notice_arrives_with_subject_text_and_key(which: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(which)
    async with a_topic() as topic, notifier(f"sns://{topic.arn}") as sns:
        await sns.send("toy: run 1 settled", "Run 1\n\tgrün\n", idempotency_key=KEY)
        (told,) = await topic.arrived(1)
    assert told["Subject"] == "toy: run 1 settled"
    assert told["Message"] == "Run 1\n\tgrün\n"
    assert told["MessageAttributes"] == {KEY_ATTRIBUTE: {"Type": "String", "Value": KEY}}


@BOTH
async def test_what_sns_would_refuse_is_made_to_fit(which: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(which)
    async with a_topic() as topic, notifier(f"sns://{topic.arn}") as sns:
        await sns.send("ä\r\nline " * 60, "\x00ü\U0001f600" * 60_000, idempotency_key="k\n " * 100)
        (told,) = await topic.arrived(1)
    assert len(told["Subject"]) == SUBJECT
    assert told["Subject"].startswith("\\xe4 line \\xe4 line")
    assert len(told["Message"].encode()) <= TEXT
    assert told["Message"].endswith(CUT_NOTE)
    assert re.fullmatch("[0-9a-f]{64}", told["MessageAttributes"][KEY_ATTRIBUTE]["Value"])


@BOTH
async def test_a_fifo_topic_drops_a_notice_sent_again(which: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(which)
    async with a_topic("news.fifo") as topic, notifier(f"sns://{topic.arn}") as sns:
        for _ in range(2):
            await sns.send("toy: run 1 settled", "once", idempotency_key=KEY)
        await sns.send("toy: run 2 settled", "another", idempotency_key=KEY + "2")
        told = await topic.arrived(2)
    assert [each["Message"] for each in told] == ["once", "another"]


class Thing(Unit, key="n"):
    n: int


@BOTH
async def test_a_lane_tells_its_topic_of_its_run(
    which: str, request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    request.getfixturevalue(which)
    async with a_topic() as topic:
        lane = Lane("toy", policy=Policy(notify=f"sns://{topic.arn}", backoff=0.01))

        @lane.stage(on=lane.triggered)
        async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
            for n in range(3):
                yield Thing(n=n)

        @lane.stage(on=Thing, retries=0)
        async def load(event: Event, ctx: Context) -> None:
            if event.data.n == 1:
                raise ValueError("torn")

        async with open_application([lane], Settings(backend=f"sqlite:///{tmp_path}/f.db")) as app:
            await run_once(app, lane, slot="1")
            await run_once(app, lane, slot="1")
        (told,) = await topic.arrived(1)
    assert told["Subject"] == "toy: run 1 failed: 1 unit is dead"
    assert "toy/thing/1: ValueError: torn" in told["Message"]


@BOTH
async def test_a_topic_that_is_not_there_is_said(which: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(which)
    arn = "arn:aws:sns:us-east-1:000000000000:nowhere"
    with pytest.raises(ConfigError, match=f"publishing to {arn}: it does not exist .*create it"):
        async with notifier(f"sns://{arn}") as sns:
            await sns.send("s", "t", idempotency_key="k")


@pytest.mark.parametrize(
    "arn",
    [
        "",
        "news",
        "arn:aws:sqs:us-east-1:000000000000:q",
        "arn:aws:sns:us-east-1:1:n",
        "arn:aws:sns:us-east-1:000000000000:n/x",
    ],
)
async def test_what_is_no_topic_is_refused(arn: str) -> None:
    with pytest.raises(ConfigError, match="names no topic: write sns://arn:aws:sns:REGION:ACCOUNT:TOPIC"):
        async with notifier(f"sns://{arn}"):
            pass


async def test_the_region_is_the_topics_and_nobody_there_is_worth_another_try(
    monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    for name, value in servers.environment(closed).items():
        monkeypatch.setenv(name, value)
    async with notifier("sns://arn:aws:sns:eu-west-3:000000000000:news") as sns:
        assert sns._client.meta.region_name == "eu-west-3"
        with pytest.raises(Retryable, match="publishing to arn:aws:sns:eu-west-3:000000000000:news: "):
            await sns.send("s", "t", idempotency_key="k")


@given(st.text(max_size=300))
def test_every_subject_is_as_sns_wants_it(given_subject: str) -> None:
    said = subject_of(given_subject)
    assert 0 < len(said) < 100
    assert re.fullmatch("[!-~]([ -~]*)", said)


@given(st.text(max_size=50), st.integers(0, 3), st.sampled_from(["", "x", "ü"]))
def test_every_text_is_utf8_of_a_length_that_sns_takes(given_text: str, lines: int, more: str) -> None:
    body = text_of(given_text + "\n" * lines + more * (TEXT + 1))
    assert 0 < len(body.encode()) <= TEXT
    assert not set(body) & {chr(n) for n in (*range(9), *range(11, 32), 127)}
    assert body.endswith(CUT_NOTE) == bool(more)


@given(st.text(max_size=300), st.text(max_size=300))
def test_ids_are_what_fifo_takes_and_tell_keys_apart(one: str, other: str) -> None:
    assert re.fullmatch("[!-~]{1,128}", id_of(one))
    assert (id_of(one) == id_of(other)) == (one == other)
