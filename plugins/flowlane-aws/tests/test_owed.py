"""What a commit owes to the queues, and who makes good what a process that died did not get to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from flowlane import Context, Event, Lane, Policy, Unit, events
from flowlane.compose import Application, open_application
from flowlane.errors import Retryable, VersionConflict
from flowlane.ports import Commit, Publish, QueueSpec
from flowlane.settings import Settings
from flowlane.state import status
from flowlane.sweep import sweep
from flowlane.testing.units import LANE, append, applied, discover, found, listed, settle, within
from flowlane.worker import run_once
from flowlane_aws.backend import AwsBackend
from flowlane_aws.log.commits import GRACE
from tests.aws_backend import RealClock, Requests, counting, new_name, opened

pytestmark = pytest.mark.long

CUT = EndpointConnectionError(endpoint_url="http://gone")


class Died(Exception):  # it stands for no error: nothing of the process goes on
    """The process ended here."""


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
        await backend.create([QueueSpec("load", 30, 60)])
        yield backend


def always(operation: str, error: Exception) -> Any:
    def look(asked: str, parameters: dict[str, Any]) -> None:
        if asked == operation:
            raise error

    return look


async def received(backend: AwsBackend) -> list[str]:
    return [d.event.subject for d in await backend.receive(["load"], 10, lease=30, wait=0)]


async def test_what_was_sent_is_owed_no_longer(backend: AwsBackend, clock: RealClock) -> None:
    await applied(backend, *(discover(found(f"u{n}")) for n in range(30)))
    clock.set(GRACE + 1)
    assert await backend.resend(LANE) == 0


async def test_what_could_not_be_sent_is_sent_by_the_sweep(
    backend: AwsBackend, requests: Requests, clock: RealClock
) -> None:
    event = found("a")
    requests.before.append(always("SendMessageBatch", CUT))
    await applied(backend, discover(event))  # the commit stands
    requests.before.clear()
    assert await backend.resend(LANE) == 0  # its own process may be about to
    assert await received(backend) == []
    clock.set(GRACE + 1)
    assert await backend.resend("suite2") == 0
    assert await backend.resend(LANE) == 1
    assert await received(backend) == [event.subject]
    assert await backend.resend(LANE) == 0


async def test_what_was_sent_and_not_noted_is_sent_once_more(
    backend: AwsBackend, requests: Requests, clock: RealClock
) -> None:
    event = found("a")
    requests.before.append(always("BatchExecuteStatement", CUT))
    await applied(backend, discover(event))
    requests.before.clear()
    clock.set(GRACE + 1)
    assert [await backend.resend(LANE) for _ in range(2)] == [1, 0]
    assert await received(backend) == [event.subject] * 2


@pytest.mark.parametrize(("code", "resent", "asked"), [("ThrottlingError", 0, 2), ("AccessDenied", 1, 1)])
async def test_a_mark_that_is_not_taken_away_is_tried_again_or_told_of(
    backend: AwsBackend,
    requests: Requests,
    clock: RealClock,
    caplog: pytest.LogCaptureFixture,
    code: str,
    resent: int,
    asked: int,
) -> None:
    client = await backend._table.client.opened()
    refusals = iter([code])

    def refuse(parsed: dict[str, Any], **_: Any) -> None:
        for refused in refusals:
            parsed["Responses"][0] = {"Error": {"Code": refused, "Message": "no"}}

    def lose(params: dict[str, Any], **_: Any) -> None:  # it was not done, either
        params["body"] = params["body"].replace(b"REMOVE unsent", b"REMOVE other_one", not requests["lost"])
        requests["lost"] += 1

    client.meta.events.register("before-call.dynamodb.BatchExecuteStatement", lose)
    client.meta.events.register("after-call.dynamodb.BatchExecuteStatement", refuse)
    await applied(backend, discover(found("a")))
    assert requests["BatchExecuteStatement"] == asked
    assert ("AccessDenied" in caplog.text) is (code == "AccessDenied")
    clock.set(GRACE + 1)
    assert await backend.resend(LANE) == resent


async def test_what_sqs_cannot_delay_so_long_waits_in_the_log(
    backend: AwsBackend, requests: Requests, clock: RealClock
) -> None:
    event = found("a")
    await applied(backend, discover(event, delay=1000))
    assert requests["SendMessageBatch"] == 0
    clock.set(900)
    assert await backend.resend(LANE) == 0
    clock.set(101)
    assert await backend.resend(LANE) == 1
    assert await received(backend) == [event.subject]


async def test_an_older_event_that_is_published_is_owed_too(
    backend: AwsBackend, requests: Requests, clock: RealClock
) -> None:
    late, refused = found("late"), found("refused")
    await applied(backend, Commit((append(late),)), Commit((append(refused),)))
    await applied(backend, Commit((), (Publish(late, "load", 1000.0),)))
    requests.before.append(always("SendMessageBatch", CUT))
    await applied(backend, Commit((), (Publish(refused, "load"),)))
    requests.before.append(always("UpdateItem", CUT))
    with pytest.raises(Retryable):  # neither sent nor noted: the caller is to know
        await backend.commit([Commit((), (Publish(refused, "load"),))])
    requests.before.clear()
    clock.set(GRACE + 1)
    assert await backend.resend(LANE) == 1
    assert await received(backend) == [refused.subject]
    clock.set(1000)
    assert await backend.resend(LANE) == 1


async def test_an_ack_that_got_lost_is_a_delivery_that_comes_again(
    backend: AwsBackend, requests: Requests
) -> None:
    await applied(backend, discover(found("a")))
    (delivery,) = await backend.receive(["load"], 1, lease=1, wait=5)
    requests.before.append(always("DeleteMessageBatch", CUT))
    await applied(backend, settle(delivery))
    requests.before.clear()
    (again,) = await within(20, backend.receive(["load"], 1, lease=30, wait=10))
    assert again.head is not None
    assert status(again.head) == "settled"


async def test_a_delivery_that_lambda_received_is_acked_its_own_way(backend: AwsBackend) -> None:
    class Carried:
        event = head = found("a")
        stage, attempt, acked = "load", 1, 0

        async def ack(self) -> None:
            self.acked += 1

        async def nack(self, *, delay: float = 0) -> None: ...
        async def extend(self, seconds: float) -> bool:
            return True

    lost, carried = Carried(), Carried()
    await applied(backend, Commit((append(carried.event),)), settle(carried))
    assert carried.acked == 1
    (answer,) = await backend.commit([settle(lost)])
    assert isinstance(answer, VersionConflict)
    assert lost.acked == 0


async def test_heads_of_ten_deliveries_are_one_request(backend: AwsBackend, requests: Requests) -> None:
    units = [found(f"u{n}") for n in range(10)]
    await applied(backend, *map(discover, units))
    requests.clear()
    got = await backend.receive(["load"], 10, lease=30, wait=5)
    assert len(got) == 10
    assert (requests["BatchGetItem"], requests["Query"]) == (1, 0)


async def test_who_cannot_read_the_log_keeps_no_messages(backend: AwsBackend, requests: Requests) -> None:
    await applied(backend, discover(found("a")))
    requests.before.append(always("BatchGetItem", CUT))
    with pytest.raises(Retryable):
        await backend.receive(["load"], 1, lease=600, wait=5)
    requests.before.clear()
    assert [d.attempt for d in await backend.receive(["load"], 1, lease=30, wait=5)] == [2]


async def test_a_delivery_of_another_log_has_no_head(backend: AwsBackend) -> None:
    await backend.queues.send([Publish(found("elsewhere"), "load")])
    (delivery,) = await backend.receive(["load"], 1, lease=30, wait=5)
    assert delivery.head is None


# --------------------------------------------------------------------------- a whole run


class Thing(Unit, key="n"):
    n: int


def lane_of(effects: list[int]) -> Lane:
    lane = Lane("crash", policy=Policy(lease=2.0, timeout=30.0))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Thing]:
        for n in range(5):
            yield Thing(n=n)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        effects.append(event.data.n)

    return lane


#: Where the process dies: how often it has asked for what when the next such request is (not) made.
POINTS = [
    ("before", "SendMessageBatch", 1),  # the run's first event is in the log, and its message is not sent
    ("before", "SendMessageBatch", 2),  # so are the five units
    ("after", "SendMessageBatch", 1),  # sent, and still marked as owed
    ("after", "SendMessageBatch", 2),
    ("before", "DeleteMessageBatch", 1),  # committed, and not acked
    ("before", "DeleteMessageBatch", 2),
    ("after", "TransactWriteItems", 1),  # committed, and nobody was told
    ("after", "TransactWriteItems", 2),
    ("after", "PutItem", 1),
    ("after", "PutItem", 2),  # the run is complete, and nobody was told
]


def dying(when: str, operation: str, nth: int, dead: asyncio.Event) -> Any:
    """A hook after whose `nth` time every request fails: nothing of the process goes on, and it is `dead`."""
    left = nth

    def look(asked: str, parameters: dict[str, Any]) -> None:
        nonlocal left
        if asked == operation and not dead.is_set():
            left -= 1
            if left == 0:
                dead.set()
        if dead.is_set():
            raise Died(f"{when} {operation}")

    return look


@pytest.mark.parametrize(("when", "operation", "nth"), POINTS)
async def test_a_run_whose_process_died_ends_after_the_sweep(
    when: str, operation: str, nth: int, ministack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowlane_aws.log.commits.GRACE", 0.0)  # the sweep comes at once
    effects: list[int] = []
    lane = lane_of(effects)
    settings = Settings(backend=f"aws://{new_name()}")
    async with open_application([lane], settings) as app:
        await app.backend.create([QueueSpec(stage.queue, 2.0, 30.0) for stage in lane.stages])
    dead = asyncio.Event()
    with counting() as requests:
        look = dying(when, operation, nth, dead)
        (requests.before if when == "before" else requests.after).append(look)
        if when == "after":
            requests.before.append(lambda asked, parameters: look("", parameters))
        await _run_until_it_dies(lane, settings, dead)
    assert dead.is_set()
    async with open_application([lane], settings) as app:
        await _drain(app, lane)
        heads = {e.subject: e async for e in app.backend.scan(lane.name)}
        run = (await app.backend.runs(lane.name, 1))[0]
        stream = await listed(app.backend.read(run.subject))
        tally = await app.backend.tally(run.subject, 0)
    assert set(effects) == set(range(5))
    assert [e.type for e in stream].count(events.RUN_COMPLETED) == 1
    assert {status(head) for head in heads.values()} == {"settled"}
    assert len(heads) == 6
    assert tally.complete
    assert tally.stages["load"].settled == tally.stages["load"].found == 5


async def _run_until_it_dies(lane: Lane, settings: Settings, dead: asyncio.Event) -> None:
    """And a second longer: where nobody looks, it finds out."""
    try:
        async with open_application([lane], settings) as app, asyncio.timeout(120) as patience:

            async def end() -> None:
                await dead.wait()
                patience.reschedule(asyncio.get_running_loop().time() + 1)

            async with asyncio.TaskGroup() as tasks:
                ending = tasks.create_task(end())
                await run_once(app, lane, slot="one")
                ending.cancel()
    except* (Died, TimeoutError, Retryable):
        pass


async def _drain(app: Application, lane: Lane) -> None:
    """Sweep, and work until nothing is open, as a worker does."""
    from flowlane.deadline import Deadline
    from flowlane.pump import Pump

    async with asyncio.timeout(120), Pump(app.engine, Deadline()) as pump:
        while True:
            await sweep(app.engine, lane.name)
            if not await listed(app.backend.units(lane.name, "open")):
                return
            await pump.until(asyncio.sleep(0.3))
