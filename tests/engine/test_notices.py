"""``Policy.notify``: every rest of a run is told of, by a unit of work of its own; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane import ConfigError, Context, Event, Lane, Permanent, Policy, Retryable, Unit, events
from flowlane.backends.memory import MemoryBackend
from flowlane.compose import open_application
from flowlane.deadline import Deadline
from flowlane.hookspecs import Provides, hookimpl
from flowlane.lane import Completed, Notify, Trigger, stream_of
from flowlane.notices import LISTED, subject, text
from flowlane.plugins import Registry
from flowlane.ports import Append, Commit, Environment, Publish
from flowlane.pump import Pump
from flowlane.redrive import redrive
from flowlane.report import Report
from flowlane.settings import Settings
from flowlane.state import fold
from flowlane.sweep import sweep
from flowlane.testing import stores
from flowlane.testing.faults import DIE_AFTER, DIE_BEFORE, REFUSE, UNKNOWN, CrashAt, Process
from flowlane.testing.oracle import check
from flowlane.worker import report_of, run_once
from tests.engine.test_engine import Bench, Thing, virtual

RUN = "toy/run/1"
NOTICE = f"toy/notify/{RUN}@0"
KEY = f"{NOTICE}#0/send"
TOLD = Policy(retries=3, timeout=60.0, backoff=1.0, backoff_cap=2.0, lease=6.0, notify="board://wall")


class Board:
    """Where the notifier of these tests hangs its notices: subject, text and key of each send."""

    def __init__(self) -> None:
        self.sends: list[tuple[str, str, str]] = []
        self.before: Callable[[int], Awaitable[None]] | None = None
        self.after: Callable[[int], Awaitable[None]] | None = None

    async def send(self, subject: str, text: str, *, idempotency_key: str) -> None:
        number = len(self.sends) + 1
        if self.before is not None:
            await self.before(number)
        self.sends.append((subject, text, idempotency_key))
        if self.after is not None:
            await self.after(number)

    @property
    def keys(self) -> list[str]:
        return [key for _, _, key in self.sends]


BOARD = Board()


@asynccontextmanager
async def open_board(uri: str, environment: Environment) -> AsyncIterator[Board]:
    assert uri == "board://wall"
    yield BOARD


@hookimpl
def flowlane_provides() -> Sequence[Provides]:
    return [Provides("notifier", "board", f"{__name__}:open_board")]


@pytest.fixture(autouse=True)
def _clean_board() -> None:
    BOARD.__init__()  # type: ignore[misc]  # the plugin is found by its module, which is imported once


def registry() -> Registry:
    plugin = ModuleType("a_plugin")
    vars(plugin)["flowlane_provides"] = flowlane_provides
    return Registry({"testing": stores.plugin, "board": plugin})


def telling(test: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
    """`test` in virtual time, with the board in its registry."""

    async def with_board(bench: Bench) -> None:
        bench.registry = registry()
        await test(bench)

    with_board.__name__, with_board.__doc__, with_board.__module__ = (
        test.__name__,
        test.__doc__,
        test.__module__,
    )
    return virtual(with_board)


class Toy:
    """A lane with so many things, of which some are bad, and what its own stages are told."""

    def __init__(self, things: int = 3, bad: Sequence[int] = (), policy: Policy = TOLD) -> None:
        self.things, self.bad = things, set(bad)
        self.told: list[Completed] = []
        self.lane = Lane("toy", policy=policy)
        self.lane.stage(on=self.lane.triggered, name="find")(self.find)
        self.lane.stage(on=Thing, name="load")(self.load)

    def with_stages(self) -> Toy:
        self.lane.stage(on=self.lane.completed, name="cheer")(self.tell)
        self.lane.stage(on=self.lane.failed, name="moan")(self.tell)
        return self

    async def find(self, event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in range(self.things):
            yield Thing(n=n)

    async def load(self, event: Event, ctx: Context) -> None:
        if event.data.n in self.bad:
            raise Permanent(f"thing {event.data.n} is\nbad")

    async def tell(self, event: Event, ctx: Context) -> None:
        self.told.append(event.data)


# --------------------------------------------------------------------------- that it is told, once


@telling
async def test_a_settled_run_is_told_of_without_a_stage_of_the_users(bench: Bench) -> None:
    report = await bench.run(Toy().lane)
    assert report.outcome == "settled"
    (told,) = BOARD.sends
    assert told[0] == "toy: run 1 settled"
    assert told[1].startswith("Run toy/run/1 of lane toy has settled\n\nunits    3 found, 3 settled, 0 dead")
    assert told[2] == KEY
    assert await bench.types(NOTICE) == ["lane.notify", "attempt.started", "step.done", "unit.settled"]


@telling
async def test_a_failed_run_is_told_of_with_its_dead_units(bench: Bench) -> None:
    report = await bench.run(Toy(bad=[0, 2]).lane)
    assert report.units == {"found": 3, "settled": 3, "dead": 2, "skipped": 0, "superseded": 0}
    ((said, body, _),) = BOARD.sends
    assert said == "toy: run 1 failed: 2 units are dead"
    assert "\ndead\n  toy/thing/0: thing 0 is bad\n  toy/thing/2: thing 2 is bad\n\n`flowlane dead`" in body


@telling
async def test_a_discovery_that_died_is_told_of_with_its_reason(bench: Bench) -> None:
    lane = Lane("toy", policy=TOLD)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        raise Permanent("no such folder")

    await bench.run(lane)
    ((said, body, _),) = BOARD.sends
    assert said == "toy: run 1 failed: discovery died: no such folder"
    assert "dead\n  toy/run/1: no such folder\n" in body


@telling
async def test_many_dead_units_are_counted_and_a_few_of_them_named(bench: Bench) -> None:
    await bench.run(Toy(LISTED + 5, range(LISTED + 5)).lane)
    body = BOARD.sends[0][1]
    assert body.count(" is bad\n") == LISTED
    assert "\n  and 5 more\n" in body


@telling
async def test_a_notice_that_died_is_no_dead_unit_of_the_next_one(bench: Bench) -> None:
    toy = Toy(bad=[0])

    @toy.lane.stage(on=toy.lane.failed, retries=0)
    async def moan(event: Event, ctx: Context) -> None:
        raise Permanent("no voice")

    await bench.run(toy.lane)
    async with bench.app(toy.lane) as app:
        await redrive(app.engine, "toy", ["toy/thing/0"])
        await run_once(app, toy.lane, slot="2")
    body = next(body for _, body, key in BOARD.sends if key.startswith(f"toy/notify/{RUN}@1"))
    assert "after a redrive: 1 unit is dead" in body
    assert "no voice" not in body


@telling
async def test_the_users_stage_and_the_notifier_are_both_told(bench: Bench) -> None:
    good, bad = Toy().with_stages(), Toy(bad=[1]).with_stages()
    await bench.run(good.lane)
    bench.backend = MemoryBackend(bench.clock)
    await bench.run(bad.lane)
    assert [data.outcome for data in good.told + bad.told] == ["settled", "failed"]
    assert [said for said, _, _ in BOARD.sends] == [
        "toy: run 1 settled",
        "toy: run 1 failed: 1 unit is dead",
    ]


@telling
async def test_neither_of_the_two_waits_for_the_other(bench: Bench) -> None:
    """A user's stage that dies keeps nobody from being notified, and the other way round."""

    async def refuse(number: int) -> None:
        raise Permanent("the wall is full")

    toy = Toy(policy=replace(TOLD, retries=0))

    @toy.lane.stage(on=toy.lane.completed)
    async def cheer(event: Event, ctx: Context) -> None:
        raise Permanent("no voice")

    await bench.run(toy.lane)
    assert len(BOARD.sends) == 1
    BOARD.before = refuse
    other = Toy(policy=replace(TOLD, retries=0)).with_stages()
    bench.backend = MemoryBackend(bench.clock)
    await bench.run(other.lane)
    assert [data.outcome for data in other.told] == ["settled"]


@telling
async def test_every_rest_of_a_redriven_run_is_told_of_once(bench: Bench) -> None:
    toy = Toy(100, range(100))
    await bench.run(toy.lane)
    toy.bad = {7}
    async with bench.app(toy.lane) as app:
        await redrive(app.engine, "toy")  # three rounds, and one rest
        await run_once(app, toy.lane, slot="2")
        toy.bad = set()
        await redrive(app.engine, "toy")
        await run_once(app, toy.lane, slot="3")
    of_run = [said for said, _, key in BOARD.sends if key.startswith(f"toy/notify/{RUN}@")]
    assert of_run == [
        "toy: run 1 failed: 100 units are dead",
        "toy: run 1 failed: 1 unit is dead",
        "toy: run 1 settled",
    ]
    assert len(set(BOARD.keys)) == len(BOARD.keys)
    assert await check(bench.backend, toy.lane) == []


@telling
async def test_a_storm_of_redelivered_batches_sends_one_notice(bench: Bench) -> None:
    """Every delivery there ever was, fifty times again, to two processes: while the run is at work, when it
    has ended, and when the notice has."""
    toy = Toy(5, [2])
    async with bench.app(toy.lane) as app, bench.app(toy.lane) as other:
        queues = {stage.name: stage.queue for stage in toy.lane.stages}

        async def storm() -> None:
            firsts = [event async for event in bench.backend.scan("toy") if event.version == 1]
            again = [Publish(event, queues[event.stage]) for event in firsts if event.stage]
            for _ in range(50):
                await bench.backend.commit([Commit(publish=again)])

        async with Pump(app.engine, Deadline()), Pump(other.engine, Deadline()):
            await app.engine.trigger("toy", "1")
            for _ in range(4):
                await storm()
                await asyncio.sleep(2.0)
            await sweep(app.engine, "toy")
            await asyncio.sleep(60.0)
    assert BOARD.keys == [KEY]
    assert await check(bench.backend, toy.lane) == []


@telling
async def test_reading_folding_and_purging_send_nothing(bench: Bench) -> None:
    """What is built from the log anew, a queue lost, a run triggered again: the notice stays the only one."""
    toy = Toy()
    await bench.run(toy.lane)
    await bench.backend.purge()
    async with bench.app(toy.lane) as app:
        await run_once(app, toy.lane, slot="1")
        await sweep(app.engine, "toy")
        assert (await report_of(app, toy.lane, RUN)).outcome == "settled"
    assert fold(await bench.stream(NOTICE))[0] == "settled"
    assert BOARD.keys == [KEY]


# --------------------------------------------------------------------------- logged before it is sent


@telling
async def test_the_attempt_is_in_the_log_before_it_is_sent(bench: Bench) -> None:
    seen: list[list[str]] = []

    async def look(number: int) -> None:
        seen.append(await bench.types(NOTICE))

    BOARD.before = look
    await bench.run(Toy().lane)
    assert seen == [["lane.notify", "attempt.started"]]


@pytest.mark.parametrize("sent", [False, True])
def test_a_process_killed_between_log_and_send_is_made_good_under_the_same_key(sent: bool) -> None:
    """Killed before the notice is out, or after and before that is logged: another process sends it, and the
    key tells that it is the same one."""

    @telling
    async def scenario(bench: Bench) -> None:
        toy = Toy(bad=[1])
        first = Process("first", bench.loop, bench.backend, bench.world)
        dead: list[str] = []

        async def die(number: int) -> None:
            if not dead:
                dead.append("first")
                first.kill()
                await asyncio.Event().wait()

        BOARD.before, BOARD.after = (None, die) if sent else (die, None)

        async def main(process: Process) -> None:
            settings = Settings(backend="memory://")
            async with open_application(
                [toy.lane],
                settings,
                clock=process.clock,
                registry=bench.registry,
                backend=process.backend,
            ) as app:
                await run_once(app, toy.lane, slot="1")

        await first.start(main).ended
        assert dead
        assert (await bench.types(NOTICE))[-1] == "step.done"  # of the look at the dead units
        second = Process("second", bench.loop, bench.backend, bench.world)
        assert await second.start(main).ended is None
        assert BOARD.keys == ([KEY, KEY] if sent else [KEY])
        assert len({(said, body) for said, body, _ in BOARD.sends}) == 1, "and it says the same"
        assert (await bench.types(NOTICE))[-1] == "unit.settled"

    scenario()


@pytest.mark.parametrize("mode", [DIE_BEFORE, DIE_AFTER, REFUSE, UNKNOWN])
def test_wherever_it_is_disturbed_the_run_is_told_of_under_one_key(mode: str) -> None:
    """At every single call of the backend: the process dies, or the call fails, or nobody knows."""

    async def disturbed(bench: Bench, number: int) -> bool:
        toy = Toy(2, bad=[1]).with_stages()
        process = Process(
            "first", bench.loop, bench.backend, bench.world, faults=CrashAt(number, mode), latency=0.01
        )

        async def main(process: Process) -> None:
            settings = Settings(backend="memory://")
            async with open_application(
                [toy.lane],
                settings,
                clock=process.clock,
                registry=bench.registry,
                backend=process.backend,
            ) as app:
                await run_once(app, toy.lane, slot="1")

        await process.start(main).ended
        reached = any(process.counters.fired.values())
        assert await Process("second", bench.loop, bench.backend, bench.world).start(main).ended is None
        assert set(BOARD.keys) == {KEY}
        assert len({(said, body) for said, body, _ in BOARD.sends}) == 1
        assert len(BOARD.keys) <= 2, "sent again only where the answer was lost"
        assert {data.outcome for data in toy.told} == {"failed"}
        assert await check(bench.backend, toy.lane) == []
        return reached

    number, reached = 1, True
    while reached:
        BOARD.__init__()  # type: ignore[misc]  # as above
        outcome: list[bool] = []

        @telling
        async def scenario(bench: Bench) -> None:
            outcome.append(await disturbed(bench, number))  # noqa: B023  # run at once

        scenario()
        reached = outcome[0]
        number += 1
    assert number > 30, "as many calls as a run makes"


@telling
async def test_a_send_that_fails_is_tried_again_by_the_policy(bench: Bench) -> None:
    tries: list[float] = []

    async def refuse(number: int) -> None:
        tries.append(bench.clock.monotonic())
        if len(tries) < 3:
            raise Retryable("the wall is wet") if len(tries) == 1 else OSError("no wall")

    BOARD.before = refuse
    report = await bench.run(Toy().lane)
    assert report.outcome == "settled"
    assert len(tries) == 3
    assert BOARD.keys == [KEY]
    assert (await bench.types(NOTICE)).count("attempt.failed") == 2


@telling
async def test_a_dead_notice_fails_no_run_and_is_put_back_by_a_redrive(bench: Bench) -> None:
    async def refuse(number: int) -> None:
        raise Retryable("the wall is gone")

    BOARD.before = refuse
    toy = Toy()
    report = await bench.run(toy.lane)
    assert (report.outcome, report.units["dead"]) == ("settled", 0)
    assert (await bench.state(RUN))[0] == "settled"
    assert (await bench.state(NOTICE))[0] == "dead"
    assert (await bench.types(NOTICE)).count("attempt.started") == 4, "the policy's budget"
    BOARD.before = None
    async with bench.app(toy.lane) as app:
        assert await redrive(app.engine, "toy") == [NOTICE]
        await run_once(app, toy.lane, slot="2")
    assert BOARD.keys[0] == KEY, "under the key that it was first tried with"
    assert (await bench.state(RUN))[1].opened == 0, "a notice is no round of its run"


@telling
async def test_a_notice_that_an_older_release_gave_keeps_the_notifier_from_nothing(bench: Bench) -> None:
    """The user's notice stands in the log already: the run completes, and the notifier is told."""
    toy = Toy().with_stages()
    async with bench.app(toy.lane) as app:
        report: dict[str, Any] = {}
        told = Completed(run=RUN, round=0, outcome="settled", report=report)
        stream = stream_of("toy", told)
        old = Event("old-1", "toy", events.LANE_COMPLETED, stream, app.engine.stamp(), version=1)
        await bench.backend.commit([Commit([Append(stream, 0, (old,))])])
        await run_once(app, toy.lane, slot="1")
    assert toy.told == []
    assert BOARD.keys == [KEY]


# --------------------------------------------------------------------------- how it is declared


async def test_a_notifier_that_nothing_opens_is_refused_at_the_start() -> None:
    policy = Policy(notify="pigeon://roof?token=feathers")
    with pytest.raises(ConfigError) as caught:
        async with open_application(
            [Toy(policy=policy).lane], Settings(backend="memory://"), registry=Registry.load()
        ):
            pass
    assert str(caught.value).startswith("'pigeon://roof' has scheme 'pigeon': as notifier, flowlane opens ")


def test_notify_is_of_the_lane_and_its_stage_has_a_name_of_its_own() -> None:
    lane = Lane("toy", policy=TOLD)
    assert [(stage.name, stage.queue, stage.counted) for stage in lane.stages] == [
        ("notify", "toy/notify", False)
    ]

    async def handler(event: Event, ctx: Context) -> None: ...

    with pytest.raises(ConfigError, match=r"notify= is for whole lanes: Lane\(..., policy=Policy\(notify="):
        lane.stage(on=Thing, notify="board://wall")(handler)
    with pytest.raises(ConfigError, match="the policy's notify= makes a stage 'notify': give yours a name="):
        lane.stage(on=Thing, name="notify")(handler)
    with pytest.raises(ConfigError, match="a stage is subscribed to a Unit class"):
        lane.stage(on="lane.notify")(handler)
    with pytest.raises(ConfigError, match="the type 'notify', whose streams are the engine's own"):
        lane.stage(on=Notify)(handler)
    assert Lane("toy").stages == []


@telling
async def test_the_notifiers_stage_lends_nobody_its_error_budget(bench: Bench) -> None:
    lane = Lane("toy", policy=replace(TOLD, error_budget=1.0))
    assert lane.stages[0].policy.error_budget == 0.0
    assert lane.stages[0].policy.retries == TOLD.retries


# --------------------------------------------------------------------------- what it says


def a_report(**changed: Any) -> Report:
    units = {"found": 1, "settled": 1, "dead": 0, "skipped": 0, "superseded": 0}
    records = {"in": 1234567, "expanded": 0, "out": 1234567, "skipped": 0, "quarantined": 0}
    given: dict[str, Any] = {
        "lane": "toy",
        "run": RUN,
        "outcome": "settled",
        "reason": "",
        "units": units,
        "records": records,
        "bytes": {"in": 5, "out": 6},
        "stages": [],
        "dead": [],
    }
    return Report(**(given | changed))


def test_the_text_in_full() -> None:
    stages: list[dict[str, Any]] = [
        {"stage": name, "units": {"found": n}, "records": {"in": n}, "bytes": {"in": n}}
        for n, name in enumerate(("find", "load"))
    ]
    report = a_report(outcome="failed", reason="1 unit is dead", stages=stages)
    report.units["dead"] = 1
    assert text(report, 2, [["toy/thing/1", "torn"]]) == (
        "Run toy/run/1 of lane toy has failed after 2 redrives: 1 unit is dead\n"
        "\n"
        "units    1 found, 1 settled, 1 dead, 0 skipped, 0 superseded\n"
        "records  1,234,567 in, 0 expanded, 1,234,567 out, 0 skipped, 0 quarantined\n"
        "bytes    5 in, 6 out\n"
        "\n"
        "stage find\n"
        "  units    0 found\n"
        "  records  0 in\n"
        "  bytes    0 in\n"
        "\n"
        "stage load\n"
        "  units    1 found\n"
        "  records  1 in\n"
        "  bytes    1 in\n"
        "\n"
        "dead\n"
        "  toy/thing/1: torn\n"
        "\n"
        "`flowlane dead` lists what is dead, `flowlane redrive` puts it back to work.\n"
    )


@given(st.text(max_size=600), st.text(max_size=600), st.text(min_size=1, max_size=30))
def test_whatever_reasons_hold_the_text_is_plain_and_the_subject_one_line(
    reason: str, why: str, slot: str
) -> None:
    run = stream_of("toy", Trigger(slot=slot))
    report = a_report(outcome="failed", reason=reason, run=run, dead=[{"unit": run, "reason": why}])
    said, body = subject(report), text(report, 0, [["toy/thing/1", why]])
    assert said.isprintable()
    assert all(line.isprintable() for line in body.split("\n"))
    assert body == text(report, 0, [["toy/thing/1", why]])
    assert max(map(len, body.split("\n"))) < 2000
