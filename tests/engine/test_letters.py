"""Dead letters: what a queue outside gave up ends its unit, if the log says that nobody else will."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest

from flowlane import Context, Event, Lane, Policy, Unit, events
from flowlane.backends.memory import MemoryBackend
from flowlane.compose import Application, open_application
from flowlane.errors import ConfigError, Permanent
from flowlane.letters import bury
from flowlane.ports import Append, Commit, Delivery, Tally
from flowlane.settings import Settings
from flowlane.state import progress, status
from flowlane.sweep import Swept, sweep
from flowlane.testing.manual import ManualClock
from flowlane.testing.units import applied, following, listed
from flowlane.worker import report_of
from tests.aws_lambda.model import Queue
from tests.aws_lambda.outside import Letter, OutsideBackend


class Thing(Unit, key="n"):
    n: int
    customer: str = "c"


lane = Lane("toy", policy=Policy(lease=30.0))


@lane.stage(on=lane.triggered)
async def find(event: Event, ctx: Context) -> AsyncIterator[Thing]:
    for n in range(2):
        yield Thing(n=n)


@lane.stage(on=Thing)
async def load(event: Event, ctx: Context) -> None: ...


@lane.stage(on=lane.dead)
async def mourn(event: Event, ctx: Context) -> None: ...


in_order = Lane("toy", policy=Policy(lease=30.0))
in_order.stage(on=in_order.triggered)(find)
in_order.stage(on=Thing, order="customer")(load)


class Case:
    """A run of two units that are found, and what a sweep makes of them."""

    def __init__(self, app: Application, backend: OutsideBackend, clock: ManualClock, run: str) -> None:
        self.app, self.backend, self.clock, self.run = app, backend, clock, run

    async def head(self, n: int = 0) -> Event:
        stream = f"toy/thing/{n}"
        return (await self.backend.last([stream]))[stream]

    async def first(self, n: int = 0) -> Event:
        return (await listed(self.backend.read(f"toy/thing/{n}")))[0]

    async def append(self, kind: str, n: int = 0, **progress: object) -> Event:
        """The unit's next event, as an attempt would log it now."""
        own = following(await self.head(n), kind, **progress)
        own = msgspec.structs.replace(own, time=self.app.engine.stamp())
        tally = (Tally(self.run, 0, "load", settled=1),) if kind == events.UNIT_SETTLED else ()
        await applied(self.backend, Commit((Append(own.subject, own.version - 1, (own,)),), (), tally))
        return own

    async def letter(self, n: int = 0, event: Event | None = None) -> Letter:
        return Letter(self.backend, event or await self.first(n), "toy/load")

    async def sweep(self) -> Swept:
        return await sweep(self.app.engine, "toy")


@asynccontextmanager
async def case_of(lane: Lane) -> AsyncIterator[Case]:
    clock = ManualClock()
    backend = OutsideBackend(clock, Queue())
    async with open_application([lane], Settings(), clock=clock, backend=backend) as app:
        run, _ = await app.engine.trigger("toy", "s")
        first = (await backend.last([run]))[run]
        settled = following(first, events.UNIT_SETTLED, children=2)
        unit = msgspec.structs.replace(first, type="thing", stage="load")
        found = [
            msgspec.structs.replace(
                unit, id=f"u{n}", subject=f"toy/thing/{n}", data=msgspec.Raw(b'{"n":%d}' % n)
            )
            for n in range(2)
        ]
        appends = [Append(run, 1, (settled,)), *(Append(one.subject, 0, (one,)) for one in found)]
        tally = (Tally(run, 0, "find", closed=True), Tally(run, 0, "load", found=2))
        await applied(backend, Commit(appends, (), tally))
        yield Case(app, backend, clock, run)


@pytest.fixture
async def case() -> AsyncIterator[Case]:
    async with case_of(lane) as case:
        yield case


async def test_a_unit_whose_message_was_given_up_is_dead_and_its_run_ends(case: Case) -> None:
    await case.append(events.UNIT_SETTLED, 1)
    letter = await case.letter()
    assert await bury(case.app.engine, "toy") == 1
    assert case.backend.letters == []
    head = await case.head()
    assert status(head) == "dead"
    assert progress(head).reason == "its queue gave its message up after 10 receives"
    assert head.cause == letter.event.id
    assert (await case.backend.last([case.run]))[case.run].type == events.RUN_COMPLETED
    report = await report_of(case.app, lane, case.run)
    assert (report.outcome, report.units["dead"], report.units["settled"]) == ("failed", 1, 2)
    notices = [e.data for e in await listed(case.backend.scan("toy")) if e.type == events.LANE_DEAD]
    assert len(notices) == 1
    assert (await case.sweep()).died == 0
    assert (await case.head()) == head


async def test_why_its_last_attempt_failed_is_told_along(case: Case) -> None:
    last = await case.append(events.ATTEMPT_FAILED, reason="no luck")
    await case.letter(event=last)
    assert (await case.sweep()).died == 1
    assert progress(await case.head()).reason.endswith("after 10 receives; before that: no luck")


@pytest.mark.parametrize("end", [events.UNIT_SETTLED, events.UNIT_DEAD])
async def test_of_a_unit_that_has_ended_it_is_just_removed(case: Case, end: str) -> None:
    await case.letter()
    before = await case.append(end)
    assert (await case.sweep()).died == 0
    assert (await case.head(), case.backend.letters) == (before, [])


async def test_what_its_end_owed_is_done_all_the_same(case: Case) -> None:
    """Its process died between the end and the check whether the run is complete."""
    await case.append(events.UNIT_SETTLED, 0)
    await case.append(events.UNIT_SETTLED, 1)
    await case.letter()
    assert await bury(case.app.engine, "toy") == 0
    assert status((await case.backend.last([case.run]))[case.run]) == "settled"


@pytest.mark.parametrize("kind", [events.ATTEMPT_FAILED, events.ATTEMPT_CONTINUED, events.UNIT_REDRIVEN])
async def test_one_left_over_from_before_the_unit_went_on_is_just_removed(case: Case, kind: str) -> None:
    await case.letter()
    later = await case.append(kind)
    await case.append(events.BATCH_WRITTEN)
    case.clock.advance(100)
    assert (await case.sweep()).died == 0
    assert case.backend.letters == []
    assert status(await case.head()) == "open"
    await case.letter(event=later)
    assert (await case.sweep()).died == 1


@pytest.mark.parametrize("kind", [events.ATTEMPT_FAILED, events.ATTEMPT_CONTINUED])
async def test_an_ordered_stage_goes_on_with_the_same_message(kind: str) -> None:
    async with case_of(in_order) as case:
        await case.letter()
        await case.append(kind)
        assert (await case.sweep()).died == 1
        assert status(await case.head()) == "dead"


async def test_an_ordered_unit_that_was_redriven_has_another() -> None:
    async with case_of(in_order) as case:
        await case.letter()
        await case.append(events.UNIT_REDRIVEN)
        assert (await case.sweep()).died == 0
        assert case.backend.letters == []


async def test_an_attempt_that_is_at_work_is_left_to_end(case: Case) -> None:
    letter = await case.letter()
    await case.append(events.ATTEMPT_STARTED, attempt=1)
    case.clock.advance(10)
    assert (await case.sweep()).died == 0
    assert case.backend.letters == [letter]
    assert letter.delays == [pytest.approx(20, abs=0.1)]
    case.clock.advance(21)
    assert (await case.sweep()).died == 1


async def test_a_unit_that_is_owed_to_another_stage_goes_on(case: Case) -> None:
    Letter(case.backend, await case.first(), "toy/find")
    assert (await case.sweep()).died == 0
    assert case.backend.letters == []
    assert status(await case.head()) == "open"


async def test_what_the_log_does_not_know_is_told_of_and_stays(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = msgspec.structs.replace(await case.first(), subject="toy/thing/9")
    letter = await case.letter(event=stranger)
    await case.letter(1)
    assert (await case.sweep()).died == 1
    assert case.backend.letters == [letter]
    assert "gave up an event of toy/thing/9, which the log does not know" in caplog.text


async def test_somebody_who_decides_at_the_same_time_is_not_overruled(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await case.letter()
    given = await case.backend.given_up(["toy/load"], 9)
    end = await case.append(events.UNIT_SETTLED)

    async def as_before(stages: Sequence[str], limit: int) -> Sequence[Delivery]:
        return given

    with monkeypatch.context() as patch:
        patch.setattr(case.backend, "given_up", as_before)
        assert (await case.sweep()).died == 0
    assert (await case.head(), case.backend.letters) == (end, [letter])
    await case.sweep()
    assert (await case.head(), case.backend.letters) == (end, [])


@pytest.mark.parametrize("kind", [ConfigError, Permanent])
async def test_a_queue_that_may_not_be_asked_stops_no_sweep(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    async def refuse(stages: Sequence[str], limit: int) -> Sequence[Delivery]:
        raise kind("not allowed")

    monkeypatch.setattr(case.backend, "given_up", refuse)
    swept = await case.sweep()
    assert (swept.died, swept.open) == (0, 3)
    assert "lane toy: what its queues gave up is left there: not allowed" in caplog.text


async def test_one_that_cannot_be_seen_to_keeps_no_other_from_it(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What its end owed cannot be done (its run's report is too long, say), and it comes first."""
    await case.append(events.UNIT_SETTLED, 1)
    case.backend.letters = [await case.letter(1), await case.letter()]

    async def refused(head: Event) -> None:
        raise Permanent("its run cannot be completed")

    monkeypatch.setattr(case.app.engine, "repeat_obligations", refused)
    assert (await case.sweep()).died == 1
    assert status(await case.head()) == "dead"
    assert "toy/thing/1: what queue toy/load gave up is left there: its run" in caplog.text


async def test_a_queue_that_knows_what_it_holds_is_not_asked() -> None:
    class Asked(MemoryBackend):
        async def given_up(self, stages: Sequence[str], limit: int) -> Sequence[Delivery]:
            raise AssertionError("it gives nothing up")

    clock = ManualClock()
    async with open_application([lane], Settings(), clock=clock, backend=Asked(clock)) as app:
        assert await bury(app.engine, "toy") == 0
