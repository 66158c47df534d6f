"""SQS queues: nothing is lost on the way in or out, whatever fails; leases, order, dead letters, creation."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlane.clock import SystemClock
from flowlane.errors import ConfigError, Retryable
from flowlane.events import MAX_EVENT_BYTES, Event, Reference, encode
from flowlane.ports import Publish, QueueSpec
from flowlane.testing.units import following, found, within
from flowlane_aws.bounded import owned_tasks
from flowlane_aws.clients import open_client
from flowlane_aws.names import Names
from flowlane_aws.queue.queue import Queues
from flowlane_aws.queue.receiving import Received

NAMES = Names("suite")
LOAD, COPY = QueueSpec("lane/load", 30, 60), QueueSpec("lane/copy", 30, 60)
INORDER = QueueSpec("lane/inorder", 30, 60, ordered=True)


class Impatient(SystemClock):
    """Jitter passes at once; leases and delays are the server's."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Log(dict[str, Event]):
    """Where references are looked up."""

    async def resolve(self, reference: Reference) -> Event | None:
        return self.get(f"{reference.stream}@{reference.version}")

    def holds(self, *events: Event) -> None:
        self.update({f"{event.subject}@{event.version}": event for event in events})


class Failing:
    """Lets entries of a client's batch calls fail as SQS does, at random: they are not in the request that is
    made, and are among the answer's ``Failed``; as a `fault` of ours, if there is one. ``calls`` counts what
    was asked for, by operation."""

    def __init__(self, client: Any, share: float, seed: int = 0, *, fault: str = "") -> None:
        self.share, self.fault, self.random = share, fault, random.Random(seed)
        self.calls: dict[str, int] = {}
        self.batches: list[list[dict[str, Any]]] = []
        self.lengths: dict[str, list[int]] = defaultdict(list)  # of the bodies sent, by queue
        events = client.meta.events
        events.register("provide-client-params.sqs", self._count)
        for operation in ("SendMessageBatch", "DeleteMessageBatch"):
            events.register(f"provide-client-params.sqs.{operation}", self._take_out)
            events.register(f"before-call.sqs.{operation}", self._nothing_left)
            events.register(f"after-call.sqs.{operation}", self._tell)

    def _count(self, model: Any, **_: Any) -> None:
        self.calls[model.name] = self.calls.get(model.name, 0) + 1

    def _take_out(self, params: dict[str, Any], context: dict[str, Any], **_: Any) -> dict[str, Any]:
        entries = params["Entries"]
        self.batches.append(list(entries))
        bodies = [entry["MessageBody"].encode() for entry in entries if "MessageBody" in entry]
        self.lengths[params["QueueUrl"]] += map(len, bodies)
        lost = [entry for entry in entries if self.random.random() < self.share]
        context["lost"] = lost
        return {**params, "Entries": [entry for entry in entries if entry not in lost]}

    def _nothing_left(self, params: dict[str, Any], context: dict[str, Any], **_: Any) -> Any:
        if json.loads(params["body"])["Entries"]:
            return None
        parsed = {"ResponseMetadata": {"HTTPStatusCode": 200}}
        self._tell(parsed, context)
        return type("Response", (), {"status_code": 200}), parsed

    def _tell(self, parsed: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        failed = [
            {"Id": entry["Id"], "SenderFault": bool(self.fault), "Code": self.fault or "InternalError"}
            for entry in context.get("lost", ())
        ]
        if failed:
            parsed["Failed"] = [*parsed.get("Failed", ()), *failed]
            context["lost"] = []


@pytest.fixture
async def sqs(ministack: str) -> AsyncIterator[Any]:
    async with open_client("sqs") as client:
        yield client


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def queues(sqs: Any, log: Log) -> Queues:
    made = Queues(sqs, NAMES, Impatient(), log.resolve)
    await made.create([LOAD, COPY, INORDER])
    return made


def publishes(
    count: int, stage: str = LOAD.name, *, group: str = "", delay: float = 0, data: Any = None
) -> list[Publish]:
    return [Publish(found(f"{stage}/{n}", data=data), stage, delay, group=group) for n in range(count)]


async def drain(queues: Queues, *stages: str, lease: float = 60) -> list[Received]:
    """All that is due now, deleted."""
    got: list[Received] = []
    while some := await queues.receive(stages or (LOAD.name,), 100, lease=lease):
        await queues.delete(some)
        got += some
    return got


def ids(received: Sequence[Received] | Sequence[Publish]) -> list[str]:
    return sorted(one.event.id for one in received)


# --------------------------------------------------------------------------- sending


async def test_what_is_sent_is_received(queues: Queues, sqs: Any) -> None:
    failing = Failing(sqs, 0)
    owed = [*publishes(25), *publishes(3, COPY.name)]
    assert await queues.send(owed) == [True] * 28
    assert failing.calls["SendMessageBatch"] == 4
    got = await drain(queues, LOAD.name, COPY.name)
    assert ids(got) == ids(owed)
    assert {(one.stage, one.event.id) for one in got} == {(one.stage, one.event.id) for one in owed}
    assert all(one.attempt == 1 for one in got)
    assert await queues.send([]) == []


sizes = st.sampled_from([0, 300, 1000, 1024, 2040, 2048, 60_000, 240_000, MAX_EVENT_BYTES - 400])
characters = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\x1f\x85\ufffe\uffff"), max_size=9
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    work=st.lists(st.tuples(st.sampled_from([LOAD.name, COPY.name]), sizes, characters), max_size=24),
    share=st.sampled_from([0.0, 0.3, 0.7]),
    seed=st.integers(0, 2**32),
)
async def test_whatever_fails_exactly_what_was_answered_for_arrives(
    ministack: str, work: list[tuple[str, int, str]], share: float, seed: int
) -> None:
    """``copy`` takes so little that most go by reference there."""
    log = Log()
    async with open_client("sqs") as client:
        queues = Queues(client, NAMES, Impatient(), log.resolve)
        await queues.create([LOAD, COPY])
        url = (await client.get_queue_url(QueueName=NAMES.queue(COPY.name)))["QueueUrl"]
        await client.set_queue_attributes(QueueUrl=url, Attributes={"MaximumMessageSize": "2048"})
        owed = []
        for n, (stage, size, name) in enumerate(work):
            fill = "x" * max(0, size - len(encode(found(f"{n}{name}", data={"t": name}))))
            owed.append(Publish(found(f"{n}{name}", data={"t": name + fill}), stage))
        log.holds(*(one.event for one in owed))
        failing = Failing(client, share, seed)
        answers = await queues.send(owed)
        assert max(failing.lengths[url], default=0) <= 2048  # the stand-in takes more, SQS would not
        sent = [one for one, accepted in zip(owed, answers, strict=True) if accepted]
        got: list[Received] = []
        while some := await queues.receive([LOAD.name, COPY.name], 100, lease=60):
            got += some
        assert ids(got) == ids(sent)
        by_id = {one.event.id: one for one in sent}
        for received in got:
            wanted = by_id[received.event.id]
            assert received.stage == wanted.stage
            assert _plain(received.event) == _plain(wanted.event)
        assert share > 0 or all(answers)
        await asyncio.gather(*(queues.release(one) for one in got))
        while got:  # as long as there are any: some are refused each time
            await queues.delete(got)
            got = list(await queues.receive([LOAD.name, COPY.name], 100, lease=60))
            await asyncio.gather(*(queues.release(one) for one in got))


def _plain(event: Event) -> tuple[Event, Any]:
    return msgspec.structs.replace(event, data=msgspec.Raw(b"")), json.loads(bytes(event.data))


async def test_failed_entries_are_sent_again_alone(queues: Queues, sqs: Any) -> None:
    failing = Failing(sqs, 0.5, seed=3)
    owed = publishes(10)
    assert all(await queues.send(owed))
    assert len(failing.batches) > 1
    asked = [[entry["Id"] for entry in batch] for batch in failing.batches]
    assert all(len(later) < len(earlier) for earlier, later in pairwise(asked))
    assert ids(await drain(queues)) == ids(owed)


async def test_what_sqs_refuses_is_not_insisted_upon(
    queues: Queues, sqs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing(sqs, 1, fault="InvalidMessageContents")
    assert await queues.send(publishes(3)) == [False] * 3
    assert failing.calls["SendMessageBatch"] == 1
    assert "3 were refused (InvalidMessageContents)" in caplog.text


async def test_a_batch_that_the_server_finds_too_long_is_halved(queues: Queues, sqs: Any) -> None:
    """As one would whose limit for a batch is that of 2025."""
    too_long = {"Error": {"Code": "AWS.SimpleQueueService.BatchRequestTooLong"}}

    def refuse(params: dict[str, Any], **_: Any) -> Any:
        if len(params["body"]) < 262_144:
            return None
        return type("Response", (), {"status_code": 400}), {
            **too_long,
            "ResponseMetadata": {"HTTPStatusCode": 400},
        }

    sqs.meta.events.register("before-call.sqs.SendMessageBatch", refuse)
    owed = publishes(8, data="x" * 100_000)
    assert all(await queues.send(owed))
    assert ids(await drain(queues)) == ids(owed)


async def test_a_batch_holds_what_sqs_takes(queues: Queues, sqs: Any) -> None:
    """The stand-in does not mind."""
    failing = Failing(sqs, 0)
    owed = [*publishes(9, data="ü" * 120_000), *publishes(13), *publishes(6, data="x" * 200_000)]
    assert all(await queues.send(owed))
    sizes = [[len(entry["MessageBody"].encode()) for entry in batch] for batch in failing.batches]
    assert all(len(batch) <= 10 and sum(batch) <= 1_048_576 for batch in sizes)
    assert sum(map(len, sizes)) == 28
    assert len(sizes) == 5


async def test_delays_are_kept_as_far_as_sqs_can(queues: Queues, sqs: Any) -> None:
    failing = Failing(sqs, 0)
    now, soon, later, never = (Publish(found(f"d{d}"), LOAD.name, d) for d in (0, 0.2, 900, 900.5))
    began = SystemClock.monotonic()
    assert await queues.send([now, soon, later, never]) == [True, True, True, False]
    (batch,) = failing.batches
    assert [entry.get("DelaySeconds") for entry in batch] == [None, 1, 900]
    came: dict[str, float] = {}
    async with asyncio.timeout(60):
        while len(came) < 2:
            for received in await queues.receive([LOAD.name], 10, lease=600, wait=5):
                came[received.event.id] = SystemClock.monotonic() - began
    assert list(came) == [now.event.id, soon.event.id]
    assert came[soon.event.id] >= 1


async def test_one_stage_without_a_queue_keeps_no_other_from_getting_its_own(
    queues: Queues, caplog: pytest.LogCaptureFixture
) -> None:
    mine, lost = publishes(1), publishes(1, "lane/gone")
    assert await queues.send([*lost, *mine]) == [False, True]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(
        "stage lane/gone: 1 deliveries are not sent yet: there is no queue suite-lane-gone"
    )
    assert ids(await drain(queues)) == ids(mine)


async def test_nobody_there_is_answered_not_raised(queues: Queues, sqs: Any) -> None:
    def away(**_: Any) -> Any:
        raise ConnectionResetError("gone")

    await queues.receive([LOAD.name], 1, lease=1)
    sqs.meta.events.register("before-call.sqs.*", away)
    assert await queues.send(publishes(12)) == [False] * 12
    with pytest.raises(Retryable):
        await queues.receive([LOAD.name], 1, lease=1)


async def test_a_batch_that_is_not_answered_for_is_tried_again(queues: Queues, sqs: Any) -> None:
    """Of an expired token, say, the SDK's own tries make nothing."""
    answers = [403, 403]

    def expired(**_: Any) -> Any:
        if not answers:
            return None
        status = answers.pop()
        error = {"Error": {"Code": "ExpiredTokenException"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return type("Response", (), {"status_code": status}), error

    sqs.meta.events.register("before-call.sqs.SendMessageBatch", expired)
    owed = publishes(3)
    assert await queues.send(owed) == [True] * 3
    assert ids(await drain(queues)) == ids(owed)


# --------------------------------------------------------------------------- order


def ordered(count: int, groups: str, seed: int = 0) -> list[Publish]:
    """`count` deliveries under groups chosen at random."""
    chance = random.Random(seed)
    return [Publish(found(f"o{n}"), INORDER.name, group=chance.choice(groups)) for n in range(count)]


async def by_group(queues: Queues, owed: Sequence[Publish]) -> dict[str, list[str]]:
    """What is received of each group, in the order of the receives, each deleted before the next."""
    groups = {one.event.id: one.group for one in owed}
    got: dict[str, list[str]] = {}
    for one in await drain(queues, INORDER.name):
        got.setdefault(groups[one.event.id], []).append(one.event.id)
    return got


def wanted(owed: Sequence[Publish]) -> dict[str, list[str]]:
    got: dict[str, list[str]] = {}
    for one in owed:
        got.setdefault(one.group, []).append(one.event.id)
    return got


@pytest.mark.parametrize("seed", range(4))
async def test_a_group_stays_in_order_whatever_fails(queues: Queues, sqs: Any, seed: int) -> None:
    failing = Failing(sqs, 0.6, seed)
    left = owed = ordered(30, "abc", seed)
    while left:
        answers = await queues.send(left)
        left = [one for one, sent in zip(left, answers, strict=True) if not sent]
    failing.share = 0
    assert await by_group(queues, owed) == wanted(owed)


async def test_of_a_group_one_is_handed_out_at_a_time(queues: Queues) -> None:
    owed = [Publish(found(f"g{n}"), INORDER.name, group="ab"[n % 2]) for n in range(6)]
    assert all(await queues.send(owed))
    got = await queues.receive([INORDER.name], 10, lease=60)
    assert ids(got) == ids(owed[:2])
    assert await queues.receive([INORDER.name], 10, lease=60) == []
    await queues.release(next(one for one in got if one.event.id == owed[0].event.id))
    (again,) = await queues.receive([INORDER.name], 10, lease=60)
    assert (again.event.id, again.attempt) == (owed[0].event.id, 2)
    await queues.delete(got)  # of the first, the receipt is stale by now
    await queues.delete([again])
    assert ids(await queues.receive([INORDER.name], 10, lease=60)) == ids(owed[2:4])


async def test_behind_what_is_not_sent_nothing_of_its_group_is(queues: Queues, sqs: Any) -> None:
    owed = [
        Publish(found("a1"), INORDER.name, group="a"),
        Publish(found("a2"), INORDER.name, 0.5, group="a"),  # a FIFO queue delays no message by itself
        Publish(found("a3"), INORDER.name, group="a"),
        Publish(found("b1"), INORDER.name, group="b"),
    ]
    assert await queues.send(owed) == [True, False, False, True]
    assert await by_group(queues, owed) == {"a": [owed[0].event.id], "b": [owed[3].event.id]}


async def test_what_is_sent_again_is_dropped_a_continuation_is_not(queues: Queues) -> None:
    first = Publish(found("a"), INORDER.name, group="a")
    again = Publish(following(first.event, "attempt.continued"), INORDER.name, group="a")
    for _ in range(2):
        assert await queues.send([first, again]) == [True, True]
    assert await by_group(queues, [first, again]) == wanted([first, again])


async def test_any_name_may_be_a_group(queues: Queues) -> None:
    names = [
        "",
        "x" * 128,
        "x" * 129,
        "x" * 500,
        "with space",
        "ü/☃",
        "a\nb",
        "a!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    ]
    owed = [Publish(found(f"n{n}"), INORDER.name, group=name) for n, name in enumerate(names)]
    assert all(await queues.send(owed))
    assert await by_group(queues, owed) == wanted(owed)


async def test_a_stage_with_an_order_key_on_a_standard_queue_is_refused(
    queues: Queues, caplog: pytest.LogCaptureFixture
) -> None:
    said = "stage lane/load has an order key, but its queue suite-lane-load is a standard one"
    assert await queues.send(publishes(2, group="a")) == [False, False]
    assert said in caplog.text
    with pytest.raises(ConfigError, match=said):
        await queues.receive([LOAD.name], 1, lease=1)
    assert await queues.receive([COPY.name], 1, lease=1) == []


# --------------------------------------------------------------------------- receiving


async def test_more_than_one_call_brings_is_received_at_once(queues: Queues, sqs: Any) -> None:
    owed = publishes(57)
    await queues.send(owed)
    failing = Failing(sqs, 0)
    got = [await queues.receive([LOAD.name], limit, lease=60) for limit in (23, 0, 100)]
    assert [len(some) for some in got] == [23, 0, 34]
    assert failing.calls["ReceiveMessage"] == 3 + 1 + 8
    assert ids([one for some in got for one in some]) == ids(owed)


async def test_every_stage_gets_its_turn(queues: Queues) -> None:
    await queues.send([*publishes(40), *publishes(2, COPY.name)])
    seen = [await queues.receive([LOAD.name, COPY.name], 1, lease=60) for _ in range(2)]
    assert {one.stage for some in seen for one in some} == {LOAD.name, COPY.name}
    both = await queues.receive([LOAD.name, COPY.name], 8, lease=60)
    assert len(both) <= 8
    assert {one.stage for one in both} == {LOAD.name, COPY.name}


@pytest.mark.parametrize("stages", [[LOAD.name], [COPY.name, LOAD.name, INORDER.name]])
async def test_who_waits_is_handed_what_comes(queues: Queues, stages: list[str]) -> None:
    waiting = asyncio.create_task(queues.receive(stages, 5, lease=600, wait=120))
    await queues.receive([COPY.name], 1, lease=9)  # by now the other waits
    owed = publishes(1)
    await queues.send(owed)
    assert ids(await within(60, waiting)) == ids(owed)


@pytest.mark.parametrize("wait", [0, 0.3, 1])
async def test_who_waits_in_vain_waits_no_longer(queues: Queues, sqs: Any, wait: float) -> None:
    waited: list[
        float
    ] = []  # what was asked for, of the clock and of SQS: what it took is the machine's affair

    class Noting(SystemClock):
        async def sleep(self, seconds: float) -> None:
            waited.append(seconds)
            await super().sleep(seconds)

    def note(params: dict[str, Any], **_: Any) -> None:
        waited.append(params["WaitTimeSeconds"])

    queues = Queues(sqs, NAMES, Noting(), Log().resolve)
    await queues.receive([LOAD.name], 1, lease=9)
    asked = Failing(sqs, 0).calls
    sqs.meta.events.register("provide-client-params.sqs.ReceiveMessage", note)
    began = SystemClock.monotonic()
    assert await queues.receive([LOAD.name], 1, lease=9, wait=wait) == []
    assert SystemClock.monotonic() - began + 0.05 >= wait
    assert sum(waited) <= wait + 0.05
    assert asked["ReceiveMessage"] <= 3


async def test_what_nobody_can_read_is_left_and_given_up(
    queues: Queues, sqs: Any, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    url = (await sqs.get_queue_url(QueueName=NAMES.queue(LOAD.name)))["QueueUrl"]
    dead = (await sqs.get_queue_url(QueueName=NAMES.dead(LOAD.name)))["QueueUrl"]
    lost = json.dumps({"flowlane": "reference", "stream": "s", "version": 1, "id": "e"})
    log.holds(other := found("other"))  # which stands where another event is referred to
    wrong = json.dumps({"flowlane": "reference", "stream": other.subject, "version": 1, "id": "e"})
    bodies = ["canary of a body", lost, wrong, '{"specversion":"1.0"}']
    for body in bodies:
        await sqs.send_message(QueueUrl=url, MessageBody=body)
    owed = publishes(2)
    await queues.send(owed)
    # Should the machine stand still for that second, one comes again.
    assert {*ids(await drain(queues, lease=1))} == {*ids(owed)}
    lines = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert len(lines) == 4
    assert all(
        line.startswith("message ") and " of queue suite-lane-load is left: " in line for line in lines
    )
    assert "canary" not in caplog.text
    assert "an event that the log does not have" in caplog.text
    policy = json.dumps({"maxReceiveCount": 1, "deadLetterTargetArn": await arn(sqs, dead)})
    await sqs.set_queue_attributes(QueueUrl=url, Attributes={"RedrivePolicy": policy})
    caplog.clear()
    while await held(sqs, dead) < 4:
        assert await queues.receive([LOAD.name], 10, lease=1, wait=2) == []
    caplog.clear()
    assert await queues.given_up([LOAD.name], 10) == []
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "queue suite-lane-load-dead holds 4 messages that cannot be read and are left there"
    )
    assert "canary" not in line
    assert await held(sqs, dead) == 4


async def arn(sqs: Any, url: str) -> str:
    answer = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
    return str(answer["Attributes"]["QueueArn"])


async def held(sqs: Any, url: str) -> int:
    """How many messages a queue has, hidden ones among them."""
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    answer = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)
    return sum(map(int, answer["Attributes"].values()))


async def test_a_reference_that_cannot_be_looked_up_now_comes_again(
    queues: Queues, sqs: Any, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = found("a", data="x" * 5000)
    url = (await sqs.get_queue_url(QueueName=NAMES.queue(LOAD.name)))["QueueUrl"]
    await sqs.set_queue_attributes(QueueUrl=url, Attributes={"MaximumMessageSize": "1024"})
    assert await queues.send([Publish(event, LOAD.name)]) == [True]
    assert await queues.receive([LOAD.name], 10, lease=1) == []  # the log does not have it
    log.holds(event)
    (received,) = await queues.receive([LOAD.name], 10, lease=60, wait=20)
    assert (received.event, received.attempt) == (event, 2)


async def test_leases_run_while_references_are_looked_up(
    queues: Queues, sqs: Any, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [found(f"a{n}", data="x" * 5000) for n in range(2)]
    log.holds(*units)
    url = (await sqs.get_queue_url(QueueName=NAMES.queue(LOAD.name)))["QueueUrl"]
    await sqs.set_queue_attributes(QueueUrl=url, Attributes={"MaximumMessageSize": "1024"})
    assert await queues.send([Publish(unit, LOAD.name) for unit in units]) == [True, True]
    one, other = await queues.receive([LOAD.name], 10, lease=60, wait=5)
    assert one.until == other.until


# --------------------------------------------------------------------------- leases


async def one(queues: Queues, lease: float = 60, wait: float = 0) -> Received:
    (received,) = await queues.receive([LOAD.name], 10, lease=lease, wait=wait)
    return received


async def test_a_lease_that_is_extended_holds(queues: Queues) -> None:
    await queues.send(publishes(1))
    held = await one(queues, lease=4)
    for seconds in (600, 600, 60):  # it replaces what was left, and does not add to it
        assert await queues.extend(held, seconds)
    assert await queues.receive([LOAD.name], 1, lease=1, wait=5) == []
    assert await queues.extend(held, 1)
    again = await one(queues, lease=60, wait=20)
    assert again.attempt == 2
    assert not await queues.extend(held, 60)
    await queues.release(held)  # does nothing: the message is somebody else's
    assert await queues.receive([LOAD.name], 1, lease=1) == []
    assert await queues.extend(again, 60)
    await queues.delete([again, again])
    assert not await queues.extend(again, 60)


async def test_of_a_lease_that_has_ended_sqs_is_not_even_asked(queues: Queues, sqs: Any) -> None:
    """A standard queue may take an old receipt for the message that somebody else has now."""
    await queues.send(publishes(1))
    stale = await one(queues, lease=1)
    again = await one(queues, lease=60, wait=20)
    asked = Failing(sqs, 0).calls
    assert not await queues.extend(stale, 60)
    await queues.release(stale)
    await queues.release(again, 60)
    await queues.release(again)  # settled already
    assert asked == {"ChangeMessageVisibility": 1}


async def test_sqs_is_believed_where_it_says_that_a_lease_is_lost(queues: Queues) -> None:
    await queues.send(publishes(1))
    held = await one(queues, lease=1)
    held.until += 60  # as if this clock had stood still
    again = await one(queues, lease=60, wait=20)
    await queues.delete([again])
    assert not await queues.extend(held, 60)
    assert not await queues.extend(held, 60)
    await queues.delete([held])


async def test_what_is_released_comes_when_it_is_due(queues: Queues) -> None:
    await queues.send(publishes(1))
    await queues.release(await one(queues))
    held = await one(queues)
    assert held.attempt == 2
    began = SystemClock.monotonic()
    await queues.release(held, 0.5)
    assert (await one(queues, wait=20)).attempt == 3
    assert SystemClock.monotonic() - began >= 0.5


async def test_no_message_is_held_beyond_the_12_hours_of_sqs(queues: Queues, sqs: Any) -> None:
    asked: list[int] = []

    def note(params: dict[str, Any], **_: Any) -> None:
        asked.append(params["VisibilityTimeout"])

    sqs.meta.events.register("provide-client-params.sqs.ChangeMessageVisibility", note)
    await queues.send(publishes(1))
    held = await one(queues, lease=50_000)
    assert held.until - held.since == pytest.approx(43_200)
    held.since -= 43_000
    assert await queues.extend(held, 900)
    await queues.release(held, 900)
    assert all(140 < seconds <= 200 for seconds in asked), "what is left of them, and of that all"
    held.until += 60
    held.since -= 300
    assert not await queues.extend(held, 900)
    assert len(asked) == 2


async def test_deletes_that_fail_are_tried_again_and_told_of(
    queues: Queues, sqs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await queues.send(publishes(25))
    got = await queues.receive([LOAD.name], 100, lease=60)
    failing = Failing(sqs, 0.5, seed=1)
    await queues.delete(got)
    assert failing.calls["DeleteMessageBatch"] > 3
    failing.share = 1
    await queues.send(publishes(1))
    failing.share = 0
    await queues.send(publishes(1))
    failing.share = 1
    await queues.delete([await one(queues)])
    assert "deleting from queue suite-lane-load: 1 failed 4 times, and are left for later" in caplog.text
    await queues.delete([])


async def test_a_stale_receipt_is_no_failure_of_a_delete(
    queues: Queues, sqs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As a FIFO queue answers it; what it held is somebody else's, or gone."""
    await queues.send(publishes(3))
    failing = Failing(sqs, 1, fault="ReceiptHandleIsInvalid")
    await queues.delete(await queues.receive([LOAD.name], 3, lease=60))
    assert failing.calls["DeleteMessageBatch"] == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# --------------------------------------------------------------------------- dead letters


async def give_up(queues: Queues, sqs: Any, count: int = 1) -> list[Publish]:
    """Deliveries in the dead-letter queue of ``load``."""
    owed = publishes(count)
    await queues.send(owed)
    url = (await sqs.get_queue_url(QueueName=NAMES.queue(LOAD.name)))["QueueUrl"]
    dead = (await sqs.get_queue_url(QueueName=NAMES.dead(LOAD.name)))["QueueUrl"]
    policy = {"deadLetterTargetArn": await arn(sqs, dead), "maxReceiveCount": "2"}
    await sqs.set_queue_attributes(QueueUrl=url, Attributes={"RedrivePolicy": json.dumps(policy)})
    while await held(sqs, dead) < count:
        for received in await queues.receive([LOAD.name], 100, lease=60):
            await queues.release(received)
    return owed


async def test_what_was_given_up_is_found_and_deleted(queues: Queues, sqs: Any) -> None:
    owed = await give_up(queues, sqs, 15)
    assert await queues.given_up([], 5) == await queues.given_up([LOAD.name], 0) == []
    some = await queues.given_up([COPY.name, LOAD.name, INORDER.name], 12)
    rest = await queues.given_up([LOAD.name, COPY.name], 100)
    assert (len(some), len(rest)) == (12, 3)
    assert ids([*some, *rest]) == ids(owed)
    assert {(letter.stage, letter.attempt) for letter in some} == {(LOAD.name, 2)}
    await queues.release(rest[0])
    (again,) = await queues.given_up([LOAD.name], 9)
    assert again.id == rest[0].id
    await queues.delete([*some, *rest[1:], again])
    dead = (await sqs.get_queue_url(QueueName=NAMES.dead(LOAD.name)))["QueueUrl"]
    assert await held(sqs, dead) == 0


async def test_a_stage_without_dead_letters_is_told_of_once(
    queues: Queues, sqs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    owed = await give_up(queues, sqs)
    dead = (await sqs.get_queue_url(QueueName=NAMES.dead(COPY.name)))["QueueUrl"]
    await sqs.delete_queue(QueueUrl=dead)
    assert ids(await queues.given_up([COPY.name, LOAD.name], 9)) == ids(owed)
    await queues.given_up([COPY.name], 9)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(
        "what the queue of stage lane/copy gives up cannot be seen: there is no queue suite-lane-copy-dead "
        "in us-east-1: `flowlane init LANE --backend aws://suite` makes it"
    )


async def test_what_a_poll_brings_that_nobody_waits_for_is_given_back(sqs: Any) -> None:
    await Queues(sqs, NAMES, SystemClock(), Log().resolve).create([LOAD])
    asked = asyncio.Event()
    sqs.meta.events.register("before-send.sqs.ReceiveMessage", lambda **_: asked.set())
    async with owned_tasks() as tasks:
        queues = Queues(sqs, NAMES, SystemClock(), Log().resolve, tasks)
        waiting = asyncio.create_task(queues.receive([LOAD.name], 1, lease=600, wait=5))
        await asked.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await queues.send(publishes(1))
    (again,) = await queues.receive([LOAD.name], 1, lease=1)
    assert again.attempt == 2  # the poll had it first


# --------------------------------------------------------------------------- the queues themselves


async def attributes(sqs: Any, name: str) -> dict[str, str]:
    url = (await sqs.get_queue_url(QueueName=name))["QueueUrl"]
    answer = await sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
    found: dict[str, str] = answer["Attributes"]
    return found


async def test_what_is_missing_is_made_and_nothing_else(sqs: Any) -> None:
    queues = Queues(sqs, NAMES, SystemClock(), Log().resolve)
    specs = [QueueSpec("lane/short", 2, 10), QueueSpec("lane/long", 1000, 7200, retries=20), INORDER]
    names = ["suite-lane-short", "suite-lane-long", "suite-lane-inorder"]
    made = [f"{name}{end}" for name in names[:2] for end in ("-dead", "")]
    made += [f"{names[2]}-dead.fifo", f"{names[2]}.fifo"]
    assert await queues.create(specs) == made
    before = {name: await attributes(sqs, name) for name in made}
    assert await queues.create(specs) == []
    assert {name: await attributes(sqs, name) for name in made} == before
    short, long, fifo = (
        before["suite-lane-short"],
        before["suite-lane-long"],
        before["suite-lane-inorder.fifo"],
    )
    assert [a["VisibilityTimeout"] for a in (short, long, fifo)] == ["10", "1000", "60"]
    policies = [json.loads(a["RedrivePolicy"]) for a in (short, long, fifo)]
    assert [policy["maxReceiveCount"] for policy in policies] == [12, 42, 100]
    assert [policy["deadLetterTargetArn"] for policy in policies] == [
        before[name]["QueueArn"] for name in (made[0], made[2], made[4])
    ]
    assert {before[made[n]]["MessageRetentionPeriod"] for n in (0, 2, 4)} == {"1209600"}
    assert (short["MaximumMessageSize"], fifo["FifoQueue"]) == ("1048576", "true")
    assert await queues.visibility("lane/long") == 1000


async def test_whoever_makes_them_at_the_same_time_is_fine(sqs: Any) -> None:
    several = [Queues(sqs, NAMES, SystemClock(), Log().resolve) for _ in range(4)]
    made = await asyncio.gather(*(queues.create([LOAD, COPY, INORDER]) for queues in several))
    assert {name for some in made for name in some} == {
        *(NAMES.queue(spec.name, ordered=spec.ordered) for spec in (LOAD, COPY, INORDER)),
        *(NAMES.dead(spec.name, ordered=spec.ordered) for spec in (LOAD, COPY, INORDER)),
    }
    assert await several[0].create([LOAD, COPY, INORDER]) == []


@pytest.mark.parametrize("was", [False, True])
async def test_a_queue_of_the_other_kind_is_refused(sqs: Any, was: bool) -> None:
    queues = Queues(sqs, NAMES, SystemClock(), Log().resolve)
    await queues.create([QueueSpec("lane/x", 30, 60, ordered=was)])
    wrong = (
        "has no order key, but its queue suite-lane-x.fifo is a FIFO one"
        if was
        else "has an order key, but its queue suite-lane-x is a standard one"
    )
    with pytest.raises(ConfigError, match=f"stage lane/x {wrong}"):
        await queues.create([QueueSpec("lane/x", 30, 60, ordered=not was)])


async def test_what_somebody_made_is_completed_or_refused(sqs: Any) -> None:
    queues = Queues(sqs, NAMES, SystemClock(), Log().resolve)
    mine = (await sqs.create_queue(QueueName="suite-lane-load", Attributes={"VisibilityTimeout": "7"}))[
        "QueueUrl"
    ]
    other = (await sqs.create_queue(QueueName="other"))["QueueUrl"]
    assert await queues.create([LOAD]) == ["suite-lane-load-dead", "the dead letters of suite-lane-load"]
    assert await queues.create([LOAD]) == []
    assert (await attributes(sqs, "suite-lane-load"))["VisibilityTimeout"] == "7"
    dead = (await attributes(sqs, "suite-lane-load-dead"))["QueueArn"]
    for count, target, said in (
        (50, await arn(sqs, other), "gives messages up to other, where flowlane does not look"),
        (6, dead, "after 6 receives, but stage lane/load may need 7: set its maxReceiveCount to 12"),
    ):
        policy = json.dumps({"maxReceiveCount": count, "deadLetterTargetArn": target})
        await sqs.set_queue_attributes(QueueUrl=mine, Attributes={"RedrivePolicy": policy})
        with pytest.raises(ConfigError, match=said):
            await queues.create([LOAD])


async def test_a_lease_that_sqs_cannot_keep_is_refused(sqs: Any) -> None:
    queues = Queues(sqs, NAMES, SystemClock(), Log().resolve)
    with pytest.raises(ConfigError, match="stage lane/load: a lease of 43201 s is longer"):
        await queues.create([QueueSpec("lane/load", 43_201, 60)])


async def test_a_missing_queue_is_said_and_found_once_it_is_there(queues: Queues, sqs: Any) -> None:
    said = (
        "there is no queue suite-lane-load in us-east-1: `flowlane init LANE --backend aws://suite` makes it"
    )
    await queues.send(publishes(1))
    assert await queues.visibility(LOAD.name) == 60
    held = await one(queues)
    url = (await sqs.get_queue_url(QueueName=NAMES.queue(LOAD.name)))["QueueUrl"]
    await sqs.delete_queue(QueueUrl=url)
    for call in (
        lambda: queues.receive([LOAD.name], 1, lease=1),
        lambda: queues.receive([LOAD.name], 1, lease=1),
        lambda: queues.extend(held, 60),
        lambda: queues.delete([held]),
        lambda: queues.visibility(LOAD.name),
    ):
        with pytest.raises(ConfigError, match=said):
            await call()
    for ordered in (False, True):  # under the same URL, and under another
        await queues.create([msgspec.structs.replace(LOAD, ordered=ordered, timeout=77)])
        assert await queues.send(publishes(1)) == [True]
        assert (await one(queues)).attempt == 1
        assert await queues.visibility(LOAD.name) == 77
        if not ordered:
            await sqs.delete_queue(QueueUrl=url)
            with pytest.raises(ConfigError, match=said):
                await queues.receive([LOAD.name], 1, lease=1)


async def test_purging_empties_every_queue_of_the_name(queues: Queues, sqs: Any) -> None:
    other = f"{NAMES.name}-b-lane-load"  # of another backend, called like this one and more
    strangers = [(await sqs.create_queue(QueueName=name))["QueueUrl"] for name in ("stranger", other)]
    for stranger in strangers:
        await sqs.send_message(QueueUrl=stranger, MessageBody="x")
    await give_up(queues, sqs)
    await queues.send([*publishes(3), *publishes(2, COPY.name), *ordered(3, "ab")])
    await queues.receive([LOAD.name], 1, lease=60)
    await queues.purge()
    assert await queues.receive([LOAD.name, COPY.name, INORDER.name], 9, lease=1) == []
    assert await queues.given_up([LOAD.name], 9) == []
    assert [await held(sqs, stranger) for stranger in strangers] == [1, 1]
