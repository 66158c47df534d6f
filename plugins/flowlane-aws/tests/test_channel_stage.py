"""Stages whose deliveries a channel carries: what commits put to their streams, and what is owed to them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec
import pytest
from botocore.exceptions import EndpointConnectionError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlane import events
from flowlane.errors import ConfigError, Retryable
from flowlane.events import Event
from flowlane.ports import Commit, Publish, QueueSpec
from flowlane.testing.units import LANE, append, applied, discover, following, found
from flowlane_aws.backend import AwsBackend
from flowlane_aws.clients import open_client
from flowlane_aws.log import items
from flowlane_aws.log.commits import GRACE
from tests.aws_backend import RealClock, Requests, counting, new_name, opened
from tests.aws_wire import Answer
from tests.fault_proxy import FaultProxy, changed, refused

CUT = EndpointConnectionError(endpoint_url="http://gone")
STAGE = "suite/apply"
SPECS = [
    QueueSpec("load", 30, 60),
    QueueSpec(STAGE, 30, 60, ordered=True, via="channel"),
    QueueSpec("suite/other", 30, 60, ordered=True, via="channel"),
]


@pytest.fixture
def requests() -> Iterator[Requests]:
    with counting() as requests:
        yield requests


@pytest.fixture
def clock() -> RealClock:
    return RealClock()


@pytest.fixture
async def backend(ministack: str, requests: Requests, clock: RealClock) -> AsyncIterator[AwsBackend]:
    async with opened(new_name(), clock) as backend:
        await backend.create(SPECS)
        yield backend


def unit(key: str, group: str = "g", *, stage: str = STAGE) -> Event:
    return msgspec.structs.replace(found(key, stage=stage), partitionkey=group)


def put(event: Event, **more: Any) -> Publish:
    return Publish(event, event.stage, group=event.partitionkey, via="channel", **more)


def begin(*units: Event, **more: Any) -> Commit:
    """All `units` begin in one commit, and are published to their stage's channel."""
    return Commit([append(event) for event in units], [put(event, **more) for event in units])


async def streamed(backend: AwsBackend, stage: str = STAGE) -> dict[str, list[bytes]]:
    """What the stage's stream holds, by partition key, in the order of each shard."""
    name = backend._names.stream(stage)
    got: dict[str, list[bytes]] = {}
    async with open_client("kinesis") as kinesis:
        for shard in (await kinesis.list_shards(StreamName=name))["Shards"]:
            at = await kinesis.get_shard_iterator(
                StreamName=name, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
            )
            answer = await kinesis.get_records(ShardIterator=at["ShardIterator"])
            for record in answer["Records"]:
                got.setdefault(record["PartitionKey"], []).append(record["Data"])
    return got


def as_put(*published: Event) -> dict[str, list[bytes]]:
    got: dict[str, list[bytes]] = {}
    for event in published:
        got.setdefault(event.partitionkey, []).append(events.encode(event))
    return got


def cutting(requests: Requests, operation: str = "PutRecords", error: Exception = CUT) -> None:
    def look(asked: str, parameters: dict[str, Any]) -> None:
        if asked == operation:
            raise error

    requests.before.append(look)


# --------------------------------------------------------------------------- putting


class Acked:
    """A delivery that something else than a queue of the backend brought."""

    done = False

    async def ack(self) -> None:
        """See ``ports.Delivery``."""
        self.done = True


async def test_what_a_channel_brought_is_acked_though_the_queues_are_away(
    backend: AwsBackend, requests: Requests
) -> None:
    await applied(backend, discover(found("q")))
    (queued,) = await backend.receive(["load"], 1, lease=30, wait=5)
    cutting(requests, "DeleteMessageBatch")
    brought: Any = Acked()
    await applied(backend, Commit([append(unit("a"))], ack=queued), Commit([append(unit("b"))], ack=brought))
    assert requests["DeleteMessageBatch"]
    assert brought.done


async def test_what_is_published_is_put_whole_under_its_group_and_owed_no_longer(
    backend: AwsBackend, clock: RealClock
) -> None:
    several = [unit(f"u{n}", f"g{n % 3}") for n in range(12)]
    long = unit("long", "g1")
    long = msgspec.structs.replace(long, data=msgspec.Raw(msgspec.json.encode({"text": "x" * 200_000})))
    await applied(backend, begin(*several[:6]), begin(*several[6:]), begin(long))
    assert await streamed(backend) == as_put(*several, long)
    assert await backend.receive(["load"], 10, lease=30) == []
    clock.set(GRACE + 1)
    assert await backend.resend(LANE) == 0


async def test_one_commit_serves_queues_and_channels_together(backend: AwsBackend) -> None:
    queued, here, there = found("q"), unit("a"), unit("b", stage="suite/other")
    both = Commit(
        [append(each) for each in (queued, here, there)], [Publish(queued, "load"), put(here), put(there)]
    )
    await applied(backend, both)
    assert [d.event.subject for d in await backend.receive(["load"], 10, lease=30)] == [queued.subject]
    assert await streamed(backend) == as_put(here)
    assert await streamed(backend, "suite/other") == as_put(there)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(groups=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), min_size=1, max_size=5))
async def test_a_group_is_put_in_the_order_of_its_commits(
    backend: AwsBackend, groups: list[list[str]], requests: Requests
) -> None:
    before = await streamed(backend)
    commits = [
        [unit(f"{requests.total()}-{n}-{m}", g) for m, g in enumerate(some)] for n, some in enumerate(groups)
    ]
    await applied(backend, *(begin(*some) for some in commits))
    now = await streamed(backend)
    told = {group: data[len(before.get(group, [])) :] for group, data in now.items()}
    assert {g: data for g, data in told.items() if data} == as_put(*(e for some in commits for e in some))


# --------------------------------------------------------------------------- owing


async def test_what_could_not_be_put_is_put_by_the_sweep_in_its_order(
    backend: AwsBackend, requests: Requests, clock: RealClock
) -> None:
    first, second, other = unit("a"), unit("b"), unit("c", "h")
    cutting(requests)
    await applied(backend, begin(first))  # the commit stands
    await applied(backend, begin(second, other))
    requests.before.clear()
    assert await streamed(backend) == {}
    assert await backend.resend(LANE) == 0  # its own process may be about to
    clock.set(GRACE + 1)
    assert await backend.resend(LANE) == 3
    assert await streamed(backend) == as_put(first, second, other)
    assert await backend.resend(LANE) == 0


async def test_behind_what_is_not_put_nothing_of_its_group_is(
    backend: AwsBackend, requests: Requests, clock: RealClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowlane_aws.log.log.GETS", 1)  # each by a call of its own
    units = [unit("a"), unit("b"), unit("c", "h")]
    cutting(requests)
    await applied(backend, begin(*units))
    calls = 0

    def first_fails(asked: str, parameters: dict[str, Any]) -> None:
        nonlocal calls
        calls += asked == "PutRecords"
        if asked == "PutRecords" and calls == 1:
            raise CUT

    requests.before[:] = [first_fails]
    clock.set(GRACE + 1)
    assert await backend.resend(LANE) == 1
    assert await streamed(backend) == as_put(units[2])
    assert await backend.resend(LANE) == 2
    assert await streamed(backend) == as_put(*units)


async def test_what_was_put_and_not_noted_is_put_once_more(
    backend: AwsBackend, requests: Requests, clock: RealClock
) -> None:
    event = unit("a")
    cutting(requests, "BatchExecuteStatement")
    await applied(backend, begin(event))
    requests.before.clear()
    clock.set(GRACE + 1)
    assert [await backend.resend(LANE) for _ in range(2)] == [1, 0]
    assert await streamed(backend) == as_put(event, event)


async def test_a_channel_has_no_delays_so_the_log_keeps_them(backend: AwsBackend, clock: RealClock) -> None:
    event, bare = unit("a"), msgspec.structs.replace(unit("b"), partitionkey="")
    await applied(backend, begin(event, delay=1000.0), begin(bare, delay=1000.0))
    assert await streamed(backend) == {}
    clock.set(900)
    assert await backend.resend(LANE) == 0
    clock.set(101)
    assert await backend.resend(LANE) == 2
    # A stage that has lost its order key puts each unit under its own name.
    assert await streamed(backend) == as_put(event) | {bare.subject: [events.encode(bare)]}


async def test_an_older_event_is_put_again_and_owed_where_it_cannot_be(
    backend: AwsBackend, requests: Requests, clock: RealClock
) -> None:
    event = unit("a")
    await applied(backend, begin(event))
    reminder = Commit(publish=[put(event, repeat=True)])
    await applied(backend, reminder)
    cutting(requests)
    await applied(backend, reminder)
    cutting(requests, "UpdateItem")
    with pytest.raises(Retryable):  # neither put nor noted: the caller is to know
        await backend.commit([reminder])
    requests.before.clear()
    clock.set(GRACE + 1)
    assert await backend.resend(LANE) == 1
    assert await streamed(backend) == as_put(event, event, event)


async def test_a_queue_that_is_away_keeps_no_channel_waiting(
    backend: AwsBackend, requests: Requests, clock: RealClock
) -> None:
    queued, event = found("q"), unit("a")
    cutting(requests, "SendMessageBatch")
    await applied(backend, Commit([append(queued), append(event)], [Publish(queued, "load"), put(event)]))
    requests.before.clear()
    assert await streamed(backend) == as_put(event)
    clock.set(GRACE + 1)
    assert await backend.resend(LANE) == 1
    assert await streamed(backend) == as_put(event)


async def test_a_missing_stream_leaves_the_commit_and_says_what_makes_it(
    backend: AwsBackend, clock: RealClock, caplog: pytest.LogCaptureFixture
) -> None:
    event = unit("a", stage="suite/late")
    await applied(backend, begin(event))
    stream = f"{backend._names.name}-suite.late"
    assert f"putting to the Kinesis stream {stream}: it does not exist" in caplog.text
    assert "`flowlane init` makes what stages need" in caplog.text
    await backend.create([QueueSpec("suite/late", 30, 60, ordered=True, via="channel")])
    clock.set(GRACE + 1)
    assert await backend.resend(LANE) == 1
    assert await streamed(backend, "suite/late") == as_put(event)


@pytest.mark.parametrize("via", ["queue", "channel"])
def test_what_is_owed_is_read_as_it_was_written(via: Any) -> None:
    publishes = [Publish(unit("a"), "lane/one", group="g", via=via), Publish(unit("a"), "lane/two")]
    item = items.item_of(publishes[0].event, "stamp") | items.owing(
        publishes[0].event, 0.0, "stamp", publishes
    )
    owed = items.owed_by(item)
    assert [(p.stage, p.group, p.via) for p in owed] == [(p.stage, p.group, p.via) for p in publishes]
    # A queue's stays as it was before there were channels, for processes of that release.
    assert len(json.loads(item["owed"]["S"])[1]) == 2


async def test_a_settling_commit_acks_and_publishes_to_the_next_channel(backend: AwsBackend) -> None:
    first, child = found("q"), unit("child")
    await applied(backend, discover(first))
    (delivery,) = await backend.receive(["load"], 1, lease=30, wait=5)
    await applied(backend, Commit([append(following(first)), append(child)], [put(child)], ack=delivery))
    assert await streamed(backend) == as_put(child)
    assert await backend.receive(["load"], 1, lease=30) == []


# --------------------------------------------------------------------------- making streams


async def test_streams_are_made_on_demand_with_queues_for_dead_letters(ministack: str) -> None:
    async with opened(name := new_name()) as backend:
        made = await backend.create(SPECS)
        assert await backend.create(SPECS) == []
    assert made[1:] == [
        f"{name}-load-dead",
        f"{name}-load",
        f"{name}-suite-apply-dead",
        f"{name}-suite-other-dead",
        f"{name}-suite.apply",
        f"{name}-suite.other",
    ]
    async with open_client("kinesis") as kinesis:
        answer = await kinesis.describe_stream_summary(StreamName=f"{name}-suite.apply")
    told = answer["StreamDescriptionSummary"]
    assert (told["StreamStatus"], told["StreamModeDetails"]) == ("ACTIVE", {"StreamMode": "ON_DEMAND"})
    assert told["RetentionPeriodHours"] == 96  # as long as queues keep messages


def standing(*statuses: str) -> Any:
    """Answers to DescribeStreamSummary in which the stream's status is each of `statuses` in turn."""
    left: Sequence[str] = statuses

    def change(answer: Answer) -> None:
        nonlocal left
        said = json.loads(answer.body)
        said["StreamDescriptionSummary"]["StreamStatus"], *left = left
        answer.body = json.dumps(said).encode()
        left = left or [said["StreamDescriptionSummary"]["StreamStatus"]]

    return changed(change)


class Patient(RealClock):
    """Its sleeps are over at once, and counted."""

    def __init__(self) -> None:
        super().__init__()
        self.slept = 0.0

    async def sleep(self, seconds: float) -> None:
        self.slept += seconds


@pytest.mark.parametrize(
    ("statuses", "slept", "error"),
    [
        (("CREATING", "CREATING", "ACTIVE"), 2, ""),
        (("UPDATING",), 0, ""),
        (("DELETING",), 0, "is being deleted, .* run `flowlane init` again in a minute"),
        (("CREATING",), 5, "not active after 5 s"),
    ],
)
async def test_a_stream_is_waited_for_and_one_that_goes_is_refused(
    ministack: str, monkeypatch: pytest.MonkeyPatch, statuses: tuple[str, ...], slept: int, error: str
) -> None:
    monkeypatch.setattr("flowlane_aws.kinesis.creation._PATIENCE", 5)
    async with FaultProxy(ministack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.inject("kinesis.DescribeStreamSummary", standing(*statuses), times=-1)
        async with opened(name := new_name(), clock := Patient()) as backend:
            if error:
                with pytest.raises(Retryable, match=f"{name}-suite.apply {error}|{error}"):
                    await backend.create(SPECS[1:2])
            else:
                assert f"{name}-suite.apply" in await backend.create(SPECS[1:2])
    assert clock.slept == slept


async def test_a_stream_that_may_not_be_made_is_told_of(
    ministack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FaultProxy(ministack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.inject("kinesis.CreateStream", refused(400, "AccessDeniedException", "no"), times=-1)
        async with opened(name := new_name()) as backend:
            with pytest.raises(ConfigError, match=f"making Kinesis stream {name}-suite.apply: not allowed"):
                await backend.create(SPECS[1:2])


async def test_who_receives_is_told_that_a_stream_takes_nothing(
    ministack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run would wait for ever for what it cannot hand over."""
    async with FaultProxy(ministack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        async with opened(new_name()) as backend:
            await backend.create(SPECS)
            proxy.inject("kinesis.PutRecords", refused(400, "AccessDeniedException", "no"))
            await applied(backend, begin(unit("a")))
            with pytest.raises(ConfigError, match=r"apply.*not allowed"):
                await backend.receive(["load"], 10, lease=30)
            assert not await backend.receive(["load"], 10, lease=30), "told once"
