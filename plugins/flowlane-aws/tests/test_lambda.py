"""The function on ``aws://``: its queues' messages come as Lambda's payloads; S3 tells, and is read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest

from flowlane import ConfigError, Context, Event, Lane, Policy, Unit
from flowlane.aws_lambda import objects
from flowlane.aws_lambda.function import Function
from flowlane.compose import open_application
from flowlane.settings import Settings
from flowlane.state import progress, status
from tests.aws_lambda.deliver import BACKEND, Mapping
from tests.aws_lambda.toys import Remaining, failed

QUICK = Policy(backoff="1ms", backoff_cap="2ms", retries=100)


class Drop(Unit, key=("url", "etag")):
    url: str
    etag: str


class Part(Unit, key=("name", "n")):
    name: str
    n: int


def of_log(*streams: str) -> dict[str, Event]:
    """The heads of those streams."""

    async def read() -> dict[str, Event]:
        lane = Lane("any")
        lane.stage(on=lane.triggered)(nothing)
        async with open_application([lane], Settings(backend=BACKEND)) as app:
            return dict(await app.backend.last(list(streams)))

    return asyncio.run(read())


async def nothing(event: Event, ctx: Context) -> None: ...


def function(lane: Lane) -> Function:
    """`lane` behind Lambda, on the stand-in that the environment points at."""
    return Function(lambda settings: lane, environment={"FLOWLANE_BACKEND": BACKEND})


def landing() -> Lane:
    """Copies the objects that S3 tells of."""
    lane = Lane("drops", policy=QUICK)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for told in objects(event):
            found = await told.located(ctx)
            yield Drop(url=found.url, etag=found.etag)

    @lane.stage(on=Drop)
    async def land(event: Event, ctx: Context) -> None:
        name = event.data.url.rpartition("/")[2]
        await ctx.copy(event.data.url, to=f"s3://lake/{name}", etag=event.data.etag)

    return lane


def bridged(key: str, etag: str) -> dict[str, Any]:
    """The EventBridge event of an object created in ``drops``."""
    about = {"key": key, "size": 1, "etag": etag.strip('"'), "sequencer": "0A"}
    detail = {"bucket": {"name": "drops"}, "object": about}
    return {"detail-type": "Object Created", "source": "aws.s3", "id": key, "detail": detail}


@pytest.mark.usefixtures("ministack")
def test_what_s3_tells_of_is_found_and_landed_once_whichever_way_it_is_told() -> None:
    s3: Any = boto3.client("s3")
    lane = landing()
    keys = ["plain.csv", "a b+c.csv", "100%25 é,(1).csv"]
    for bucket in ("drops", "lake"):
        s3.create_bucket(Bucket=bucket)
    with function(lane) as call:
        mapping = Mapping(call)
        queues = mapping.create(lane)
        mapping.sqs.create_queue(QueueName="told")
        told = mapping.sqs.get_queue_url(QueueName="told")["QueueUrl"]
        target = {"QueueArn": mapping.arn(told), "Events": ["s3:ObjectCreated:*"]}
        s3.put_bucket_notification_configuration(
            Bucket="drops", NotificationConfiguration={"QueueConfigurations": [target]}
        )
        put = {key: s3.put_object(Bucket="drops", Key=key, Body=f"of {key}".encode()) for key in keys}
        bodies = mapping.drain([told])
        assert sum(body.count("ObjectCreated") for body in bodies) == len(keys)
        for key in keys:
            assert call(bridged(key, put[key]["ETag"]), Remaining(20))["outcome"] == "open"
        mapping.drain(queues)
    landed = {item["Key"] for item in s3.list_objects_v2(Bucket="lake")["Contents"]}
    assert landed == set(keys)
    for key in keys:
        assert s3.get_object(Bucket="lake", Key=key)["Body"].read() == f"of {key}".encode()


@pytest.mark.usefixtures("ministack")
@pytest.mark.parametrize(
    ("stored", "told"), [("a+b", "a+b"), ("a b", "a+b"), ("a+b", "a%2Bb"), ("a%2Bb", "a%2Bb"), ("a b", "a b")]
)
def test_a_key_by_eventbridge_is_found_raw_or_decoded(stored: str, told: str) -> None:
    s3: Any = boto3.client("s3")
    lane = landing()
    for bucket in ("drops", "lake"):
        s3.create_bucket(Bucket=bucket)
    etag = s3.put_object(Bucket="drops", Key=stored, Body=b"x")["ETag"]
    with function(lane) as call:
        mapping = Mapping(call)
        queues = mapping.create(lane)
        call(bridged(told, etag), Remaining(20))
        mapping.drain(queues)
    assert [item["Key"] for item in s3.list_objects_v2(Bucket="lake")["Contents"]] == [stored]


@pytest.mark.usefixtures("ministack")
def test_a_fifo_queue_keeps_its_order_and_a_standard_one_loses_nothing_whatever_fails() -> None:
    lane = Lane("parts", policy=QUICK)
    tries: dict[tuple[str, int], int] = {}
    done: list[tuple[str, int]] = []

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in range(4):
            for name in "ab":
                yield Part(name=name, n=n)

    @lane.stage(on=Part, order="name")
    async def load(event: Event, ctx: Context) -> None:
        key = (event.data.name, event.data.n)
        tries[key] = tries.get(key, 0) + 1
        if tries[key] == 1 and event.data.n % 2:
            raise OSError("the first time never works")
        done.append(key)

    with function(lane) as call:
        mapping = Mapping(call)
        queues = mapping.create(lane)
        assert [url.endswith(".fifo") for url in sorted(queues)] == [False, True]
        run = call({"specversion": "1.0", "id": "1", "source": "s", "type": "t"}, Remaining(20))["run"]
        mapping.drain(queues)
    for name in "ab":
        assert [n for other, n in done if other == name] == [0, 1, 2, 3]
    head = of_log(run)[run]
    assert status(head) == "settled"
    assert progress(head).report["units"]["settled"] == 8


@pytest.mark.usefixtures("ministack")
def test_a_sweep_runs_here_and_leaves_alone_what_is_on_its_way() -> None:
    lane = Lane("lost", policy=Policy(timeout=1))
    handled: list[int] = []

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        handled.append(1)

    with function(lane) as call:
        mapping = Mapping(call)
        queues = mapping.create(lane)
        run = call({"specversion": "1.0", "id": "1", "source": "s", "type": "t"}, Remaining(20))["run"]
        answer = call({"flowlane": "sweep"}, Remaining(20))
        assert (answer["lane"], answer["swept"]["open"]) == ("lost", 1)
        mapping.drain(queues)
        assert call({"flowlane": "sweep"}, Remaining(20))["swept"]["open"] == 0
    assert handled == [1]
    assert status(of_log(run)[run]) == "settled"


@pytest.mark.parametrize("stand_in", ["ministack", "moto"])
def test_a_queue_that_hides_its_messages_for_too_short_is_refused(
    stand_in: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(stand_in)
    lane = Lane("short")
    lane.stage(on=lane.triggered)(nothing)
    with function(lane) as call:
        mapping = Mapping(call)
        mapping.create(lane)
        mapping.sqs.create_queue(QueueName="told", Attributes={"VisibilityTimeout": "15"})
        url = mapping.sqs.get_queue_url(QueueName="told")["QueueUrl"]
        event = {"specversion": "1.0", "id": "1", "source": "s", "type": "t"}
        mapping.sqs.send_message(QueueUrl=url, MessageBody=json.dumps(event))
        with pytest.raises(ConfigError, match=r"told hides a message for 15 s, .* at least 20 s"):
            mapping.deliver(url)
        mapping.sqs.set_queue_attributes(QueueUrl=url, Attributes={"VisibilityTimeout": "20"})
        arn = "arn:aws:sqs:us-east-1:000000000000:unknown"
        record = {
            "messageId": "m",
            "body": json.dumps(event),
            "eventSource": "aws:sqs",
            "eventSourceARN": arn,
        }
        assert failed(call({"Records": [record]}, Remaining(20))) == []
        mapping.sqs.send_message(QueueUrl=url, MessageBody=json.dumps(event))
        assert mapping.deliver(url) == [json.dumps(event)]


@pytest.mark.usefixtures("ministack")
def test_an_event_too_long_for_its_queue_comes_by_reference() -> None:
    lane = Lane("long", policy=QUICK)
    handled: list[int] = []

    class Long(Unit, key="n"):
        n: int
        text: str

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in range(3):
            yield Long(n=n, text="x" * 5000)

    @lane.stage(on=Long)
    async def load(event: Event, ctx: Context) -> None:
        assert event.data.text == "x" * 5000
        handled.append(event.data.n)

    with function(lane) as call:
        mapping = Mapping(call)
        queues = mapping.create(lane)
        for url in queues:
            mapping.sqs.set_queue_attributes(QueueUrl=url, Attributes={"MaximumMessageSize": "1024"})
        run = call({"specversion": "1.0", "id": "1", "source": "s", "type": "t"}, Remaining(20))["run"]
        bodies = mapping.drain(queues)
    assert sum(body.startswith('{"flowlane":"reference"') for body in bodies) == 3
    assert sorted(handled) == [0, 1, 2]
    assert status(of_log(run)[run]) == "settled"
