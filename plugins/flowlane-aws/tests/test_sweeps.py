"""What a sweep looks at, and what a run waits for, on indexes that lag and cost; what is resent, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
from botocore.exceptions import EndpointConnectionError

from flowlane import Context, Event, Lane, Policy, Unit, events
from flowlane.clock import rfc3339
from flowlane.compose import open_application
from flowlane.errors import Retryable
from flowlane.ports import Commit, QueueSpec
from flowlane.settings import Settings
from flowlane.sweep import sweep
from flowlane.testing.units import LANE, RUN, append, applied, discover, following, found, listed
from flowlane.worker import run_once
from flowlane_aws.backend import AwsBackend
from flowlane_aws.log.commits import GRACE
from tests.aws_backend import RealClock, Requests, counting, new_name, opened

pytestmark = pytest.mark.long

CUT = EndpointConnectionError(endpoint_url="http://gone")
#: Seconds for which a unit may be silent here.
QUIET = 100.0


@pytest.fixture
def requests() -> Iterator[Requests]:
    with counting() as requests:
        yield requests


@pytest.fixture
def clock() -> RealClock:
    return RealClock()


@pytest.fixture
def name() -> str:
    return new_name()


@pytest.fixture
async def backend(
    ministack: str, requests: Requests, clock: RealClock, name: str
) -> AsyncIterator[AwsBackend]:
    async with opened(name, clock) as backend:
        await backend.create([QueueSpec("load", 30, 60), QueueSpec("inorder", 30, 60, ordered=True)])
        requests.clear()
        yield backend


def quiet(head: Event) -> float:
    return QUIET


def now(event: Event, clock: RealClock) -> Event:
    return msgspec.structs.replace(event, time=rfc3339(clock.now()))


async def overdue(backend: AwsBackend) -> list[str]:
    return sorted([head.subject async for head in backend.units(LANE, "open", quiet)])


def times(count: int, operation: str, where: str = "") -> Any:
    """A hook that cuts the first `count` requests of `operation` that have `where` in them."""
    left = count

    def look(asked: str, parameters: dict[str, Any]) -> None:
        nonlocal left
        if asked == operation and left and where in str(parameters):
            left -= 1
            raise CUT

    return look


class TestWhatIsOverdue:
    async def test_it_is_listed_once_and_again_when_it_has_been_silent_twice_as_long(
        self, backend: AwsBackend, clock: RealClock, requests: Requests, name: str
    ) -> None:
        units = [now(found(f"u{n}"), clock) for n in range(60)]
        names = sorted(unit.subject for unit in units)
        await applied(backend, Commit([append(unit) for unit in units]))
        requests.clear()
        assert await overdue(backend) == []
        assert requests == {"Query": 16}  # nothing is read of what is young
        clock.set(QUIET + 1)
        async with opened(name, clock) as other:
            requests.clear()
            assert await overdue(backend) == names
            assert requests["Query"] == 16
            assert requests["BatchGetItem"] <= 16
            requests.clear()
            assert await overdue(other) == await overdue(backend) == []
            assert requests == {"Query": 32}
            clock.set(QUIET - 50)
            assert await overdue(other) == []
            clock.set(51)
            assert await overdue(other) == names
        assert len(await listed(backend.units(LANE, "open"))) == 60

    async def test_of_two_at_once_one_is_told(
        self, backend: AwsBackend, clock: RealClock, requests: Requests, name: str
    ) -> None:
        await applied(backend, Commit((append(now(found("a"), clock)),)))
        clock.set(QUIET + 1)
        async with opened(name, clock) as other:
            told: list[list[str]] = []
            rival = other.units(LANE, "open", quiet)
            swap = backend._log._table.swap

            async def late(*arguments: Any) -> list[bool]:
                """The rival has read the same marks, and claims them first."""
                told.append([head.subject for head in await listed(rival)])
                return await swap(*arguments)

            backend._log._table.swap = late  # type: ignore[method-assign, assignment] # where they meet
            told.append(await overdue(backend))
        assert told == [["suite/a"], []]

    async def test_it_is_looked_at_when_it_may_be_overdue_and_not_before(
        self, backend: AwsBackend, clock: RealClock, requests: Requests
    ) -> None:
        first = now(found("a"), clock)
        await applied(backend, Commit((append(first),)))
        clock.set(61)
        await applied(backend, Commit((append(now(following(first, events.ATTEMPT_STARTED), clock)),)))
        assert await overdue(backend) == []  # looked at, and 100 s begin now
        clock.set(QUIET - 50)
        requests.clear()
        assert await overdue(backend) == []
        assert requests == {"Query": 16}
        clock.set(51)
        assert await overdue(backend) == [first.subject]

    async def test_it_is_looked_at_within_an_hour_however_long_it_has_been_silent(
        self, backend: AwsBackend, clock: RealClock
    ) -> None:
        await applied(backend, Commit((append(now(found("a"), clock)),)))
        clock.set(86_400)
        assert await overdue(backend) == ["suite/a"]
        clock.set(3601)
        assert await overdue(backend) == ["suite/a"]

    async def test_a_closed_run_is_always_listed(self, backend: AwsBackend, clock: RealClock) -> None:
        run = now(found("run/1", run=RUN), clock)
        await applied(backend, Commit((append(run, now(following(run), clock)),)))
        assert [await overdue(backend) for _ in range(2)] == [[RUN]] * 2
        clock.set(5000)
        assert [await overdue(backend) for _ in range(2)] == [[RUN]] * 2

    async def test_a_run_that_is_not_discovered_is_not_queued_with_every_sweep(
        self, backend: AwsBackend, clock: RealClock
    ) -> None:
        await applied(backend, Commit((append(now(found("run/1", run=RUN), clock)),)))
        clock.set(5000)
        assert [await overdue(backend) for _ in range(2)] == [[RUN], []]
        clock.set(301)
        assert await overdue(backend) == [RUN]

    async def test_an_index_that_lags_is_not_believed_and_not_mended(
        self, backend: AwsBackend, requests: Requests
    ) -> None:
        first = found("a")
        await applied(backend, Commit((append(first),)))
        kept: list[dict[str, Any]] = []

        def lag(parsed: dict[str, Any], **_: Any) -> None:
            kept.extend(parsed.get("Items", ()))
            parsed["Items"] = parsed["Items"] or kept

        client = await backend._table.client.opened()
        client.meta.events.register("after-call.dynamodb.Query", lag)
        assert await listed(backend.units(LANE, "open")) != []
        client.meta.events.unregister("after-call.dynamodb.Query", lag)
        await applied(backend, Commit((append(following(first)),)))

        def stale(parsed: dict[str, Any], **_: Any) -> None:
            parsed["Items"] = kept[:1]

        client.meta.events.register("after-call.dynamodb.Query", stale)
        requests.clear()
        try:
            assert await listed(backend.units(LANE, "open")) == []
        finally:
            client.meta.events.unregister("after-call.dynamodb.Query", stale)
        assert requests["UpdateItem"] == 0


async def test_a_run_that_is_redriven_is_found_though_its_process_died(
    backend: AwsBackend, requests: Requests
) -> None:
    run = found("run/1", run=RUN)
    ended = following(following(run), events.RUN_COMPLETED, completed=[0])
    again = following(ended, events.RUN_REDRIVEN, opened=1, completed=[0])
    await applied(backend, Commit((append(run, following(run)),)))
    await applied(backend, Commit((append(ended),)))
    assert await listed(backend.units(LANE, "open")) == []
    died = False

    def die(asked: str, parameters: dict[str, Any]) -> None:
        nonlocal died
        if died:
            raise CUT
        died = asked == "PutItem"

    requests.before.append(die)
    await applied(backend, Commit((append(again),)))
    requests.before.clear()
    assert await listed(backend.units(LANE, "open")) == [again]


async def test_a_backlog_is_queued_again_once_and_not_with_every_sweep(
    ministack: str, clock: RealClock, requests: Requests
) -> None:
    lane = lane_of([])
    settings = await made(lane)
    async with open_application([lane], settings, clock=clock) as app:
        things = [
            msgspec.structs.replace(
                found(f"thing/{n}", lane="once"), type="thing", time=rfc3339(clock.now()), run="once/run/1"
            )
            for n in range(30)
        ]
        await applied(app.backend, Commit([append(thing) for thing in things]))
        assert (await sweep(app.engine, "once")).requeued == 0
        clock.set(91)  # the stage's timeout and the margin
        assert [(await sweep(app.engine, "once")).requeued for _ in range(3)] == [30, 0, 0]
        assert (await sweep(app.engine, "once", thorough=True)).requeued == 30
        clock.set(95)
        requests.clear()
        assert (await sweep(app.engine, "once")).requeued == 30
        assert requests["Query"] == 36  # the partitions of what is owed, open and dead
        assert requests["BatchGetItem"] + requests["BatchExecuteStatement"] <= 2 * 16


class TestResending:
    async def test_a_group_is_resent_in_the_order_of_its_commits(
        self, backend: AwsBackend, requests: Requests, clock: RealClock
    ) -> None:
        """They are of many streams, and so of all shards."""
        units = [found(f"u{n}", stage="inorder") for n in range(40)]
        requests.before.append(times(10_000, "SendMessageBatch"))
        for at in range(0, 40, 4):
            await applied(backend, *(discover(unit, group="g") for unit in units[at : at + 4]))
        requests.before.clear()
        sent: list[str] = []

        def look(asked: str, parameters: dict[str, Any]) -> None:
            if asked == "SendMessageBatch":
                sent.extend(entry["MessageDeduplicationId"] for entry in parameters["Entries"])

        requests.before.append(look)
        clock.set(GRACE + 1)
        assert await backend.resend(LANE) == 40
        assert sent == [unit.id for unit in units]

    async def test_behind_what_is_not_sent_nothing_of_its_group_is(
        self, backend: AwsBackend, requests: Requests, clock: RealClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flowlane_aws.log.log.GETS", 1)  # each comes in a portion of its own
        units = [found(f"u{n}", stage="inorder") for n in range(4)]
        requests.before.append(times(10_000, "SendMessageBatch"))
        for unit, group in zip(units, "ggfg", strict=True):
            await applied(backend, discover(unit, group=group))
        requests.before.clear()
        clock.set(GRACE + 1)

        def refuse(asked: str, parameters: dict[str, Any]) -> None:
            if asked == "SendMessageBatch" and units[0].id in str(parameters):
                raise CUT

        requests.before.append(refuse)
        assert await backend.resend(LANE) == 1
        requests.before.clear()
        assert await backend.resend(LANE) == 3


# --------------------------------------------------------------------------- flowlane run


class Thing(Unit, key="n"):
    n: int


def lane_of(told: list[str], *, lease: float = 10.0) -> Lane:
    lane = Lane("once", policy=Policy(lease=lease, timeout=30.0))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Thing]:
        for n in range(5):
            yield Thing(n=n)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None: ...

    @lane.stage(on=lane.completed)
    async def tell(event: Event, ctx: Context) -> None:
        told.append(event.data.outcome)

    return lane


async def made(lane: Lane) -> Settings:
    settings = Settings(backend=f"aws://{new_name()}")
    async with open_application([lane], settings) as app:
        await app.backend.create([QueueSpec(stage.queue, 10.0, 30.0) for stage in lane.stages])
    return settings


async def test_a_small_run_asks_for_little(ministack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowlane.worker._SWEEP_EVERY", 3600.0)  # what comes by the clock is not counted
    monkeypatch.setattr("flowlane.worker._THOROUGH", 1_000_000)
    lane = lane_of([], lease=3600.0)
    settings = await made(lane)
    with counting() as requests:
        async with open_application([lane], settings) as app:
            await run_once(app, lane, slot="one")
    # Twice the 16 partitions of what is open and once the 4 of what is dead, and some for counters.
    assert requests["Query"] < 80


async def test_a_run_waits_for_its_notices_though_the_index_lags(ministack: str) -> None:
    told: list[str] = []
    lane = lane_of(told)
    settings = await made(lane)
    async with open_application([lane], settings) as app:
        client = await app.backend._table.client.opened()  # type: ignore[attr-defined] # of AwsBackend

        def lag(parsed: dict[str, Any], model: Any, **_: Any) -> None:
            if any("waiting" in item for item in parsed.get("Items", ()) if "event" not in item):
                parsed["Items"] = []

        client.meta.events.register("after-call.dynamodb.Query", lag)
        report = await run_once(app, lane, slot="one")
    assert report.outcome == "settled"
    assert told == ["settled"]


@pytest.mark.parametrize(
    ("operation", "where", "count"),
    [
        ("Query", "#open#", 40),  # the first listing, which asks 16 partitions at once
        ("PutItem", "", 10),  # the trigger, which the engine tries 4 times
        ("Query", "#dead#", 10),  # the report
    ],
)
async def test_connections_that_break_for_a_while_end_no_run(
    operation: str, where: str, count: int, ministack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowlane.worker._LONGEST_PAUSE", 0.01)
    told: list[str] = []
    lane = lane_of(told)
    settings = await made(lane)
    with counting() as requests:
        requests.before.append(times(count, operation, where))
        async with open_application([lane], settings) as app:
            report = await run_once(app, lane, slot="one")
    assert report.outcome == "settled"
    assert told == ["settled"]


async def test_a_log_that_is_away_for_good_is_said(ministack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowlane.worker._LONGEST_PAUSE", 0.01)
    lane = lane_of([])
    settings = await made(lane)
    with counting() as requests:
        requests.before.append(times(10_000, "Query"))
        async with open_application([lane], settings) as app:
            with pytest.raises(Retryable):
                await run_once(app, lane, slot="one")
    assert requests["PutItem"] == 0
