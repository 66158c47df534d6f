"""The worker: one process that runs lanes, until a run is drained or until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from flowlane.committer import lasting, ordinary
from flowlane.compose import Application
from flowlane.deadline import Deadline
from flowlane.errors import FlowlaneError, Retryable
from flowlane.lane import Completed, Lane, Notify, duration, stream_of
from flowlane.pump import Pump
from flowlane.reasons import describe
from flowlane.report import Report, read_report
from flowlane.state import progress, status
from flowlane.sweep import sweep

logger = logging.getLogger("flowlane")

#: Seconds that SIGTERM leaves to running attempts: half to reach a safe point, half to commit.
GRACE = 20.0
#: Seconds that a second one leaves; little enough for attempts to be cut off at once (see ``Deadline``).
LAST = 5.0
_SWEEP_EVERY = 15.0
#: Seconds that a queue is waited for by a process that ends with its run: a queue outside gives back what was
#: asked for when the wait has ended, and not before.
_POLL = 1.0
_DEAD_LISTED = 1000
#: How often `run_once` asks a log that is away, and its longest pause, seconds.
_TRIES = 8
_LONGEST_PAUSE = 6.0
#: Seconds between looks whether a run is over, at first, and where a look costs requests; every how many of
#: these is a thorough one.
_LOOK = 0.25
_LONGEST_LOOK = 2.0
_THOROUGH = 8

T = TypeVar("T")


async def run_once(
    app: Application, lane: Lane, *, slot: str = "", event: Any = None, deadline: Deadline | None = None
) -> Report:
    """Trigger `lane` once and drain: its own run, and runs that an earlier process left open.

    Returns when every unit of them has ended (retries included) or the deadline is near.
    """
    clock = app.clock
    began = clock.monotonic()
    slot = slot or f"{app.engine.stamp()}-{clock.token()[:6]}"
    deadline = deadline or Deadline()

    async def trigger() -> str:
        by = "run" if event is None else "event"
        run, _ = await app.engine.trigger(lane.name, slot, by=by, event=event)
        return run

    left = await _insisting(app, deadline, partial(_open_runs, app, lane))
    run = await _insisting(app, deadline, trigger)
    # Where nothing is left, the sweep has nothing to do yet; it is dozens of requests where they cost.
    swept = housekeeping(app, [lane], at_once=bool(left) or app.backend.exact_queue)
    async with Pump(app.engine, deadline, poll=_POLL) as pump, swept:
        await pump.until(_drained(app, lane, run, left))
    report = await _insisting(app, deadline, partial(report_of, app, lane, run))
    report.seconds = round(clock.monotonic() - began, 3)
    return report


async def _open_runs(app: Application, lane: Lane) -> set[str]:
    return {head.run async for head in app.backend.units(lane.name, "open") if head.run}


async def _insisting(app: Application, deadline: Deadline, ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask`, which may be repeated, gives; asked again while the log is away and the deadline is not
    near, a few times, with pauses of half a minute at most between all of them.

    Raises:
        Retryable: it was away to the end.
    """
    for tried in range(1, _TRIES):
        try:
            return await ask()
        except (Retryable, asyncio.CancelledError) as raised:
            error = ordinary(raised)
            if deadline.near(app.clock.monotonic()):
                raise error from raised
            logger.warning("the log is away, it is asked again: %s", describe(error))
        await app.clock.sleep(min(_LONGEST_PAUSE, 0.5 * 2**tried) * (0.5 + app.clock.random() / 2))
    return await ask()


async def _drained(app: Application, lane: Lane, run: str, left: set[str]) -> None:
    """Return when `run` is over, what it owes after that (notices) too, and so is what was `left` before."""
    looks, pause = 0, _LOOK
    while True:
        moved = app.engine.moved
        looks += 1
        try:
            if not await _owed(app, lane, run, left, thorough=looks % _THOROUGH == 0):
                return
        except (Retryable, asyncio.CancelledError) as error:
            known = describe(ordinary(error))
            logger.warning("lane %s: cannot tell yet whether %s is over: %s", lane.name, run, known)
        try:
            async with asyncio.timeout(pause):
                await moved.wait()
        except TimeoutError:
            # Another process may end it, of which nobody tells this one; to ask may cost.
            pause = _LOOK if app.backend.exact_queue else min(1.5 * pause, _LONGEST_LOOK)


async def _owed(app: Application, lane: Lane, run: str, left: set[str], *, thorough: bool) -> bool:
    """Whether somebody has to go on for `run`, or for a run that was `left`. The index may lag, and to list
    it may cost many requests: where it does, the runs' own streams are asked first, and it confirms that all
    is over. `thorough`: it is asked anyway, since it alone tells what nobody can go on with."""
    busy = set[str]() if app.backend.exact_queue else await _busy(app, lane, {run, *left})
    if busy and not thorough:
        return True
    waited = busy
    stuck: set[str] = set()
    async for owed in app.backend.units(lane.name, "open"):
        if app.engine.handling_of(owed) is None:
            # What an older release of the lane left to a stage that is gone would be waited for in vain, and
            # so would the end of its run.
            stuck.add(owed.run)
        elif owed.run == run or owed.run in left:
            if status(owed) != "closed":
                return True
            waited.add(owed.run)
    if waited - stuck:
        return True
    head = (await app.backend.last([run]))[run]
    return run not in stuck and status(head) not in ("settled", "dead")


async def _busy(app: Application, lane: Lane, runs: set[str]) -> set[str]:
    """Those of `runs` that are not over by their own streams, or whose notices are not."""
    heads = await app.backend.last(sorted(runs))
    busy = {run for run, head in heads.items() if status(head) not in ("settled", "dead")}
    notices = {
        stream_of(lane.name, kind(run=run, round=progress(head).opened, outcome="settled", report={})): run
        for run, head in heads.items()
        if run not in busy
        for kind in (Completed, Notify)
    }
    for stream, notice in (await app.backend.last(list(notices))).items():
        if status(notice) == "open" and app.engine.handling_of(notice) is not None:
            busy.add(notices[stream])
    return busy


async def report_of(app: Application, lane: Lane, run: str) -> Report:
    """What the run of that stream has come to, with its dead units."""
    head = (await app.backend.last([run]))[run]
    report = await read_report(app.backend, lane, head)
    async for dead in app.backend.units(lane.name, "dead"):
        if dead.run == run and dead.subject != run and len(report.dead) < _DEAD_LISTED:
            report.dead.append({"unit": dead.subject, "reason": progress(dead).reason})
    report.changes = [
        {"unit": told["unit"], "change": told["change"]} for told in app.engine.changes if told["run"] == run
    ]
    return report


async def serve(app: Application, stop: asyncio.Event, deadline: Deadline) -> None:
    """Run the lanes (or the one stage that the settings name) until `stop`: fire their schedules, sweep, and
    handle deliveries.

    Once stopped, nothing new is taken; what runs reaches its next safe point or is cut off at the deadline,
    which the caller moves close.
    """
    async with asyncio.TaskGroup() as tasks:
        schedules = [
            tasks.create_task(lasting(_schedule, app, lane)) for lane in app.lanes if lane.every is not None
        ]
        try:
            only = app.settings.stage
            async with Pump(app.engine, deadline, only=only) as pump, housekeeping(app, app.lanes):
                await pump.until(_stopped(stop))
        finally:
            for schedule in schedules:
                schedule.cancel()


async def _stopped(stop: asyncio.Event) -> None:
    await stop.wait()


async def _schedule(app: Application, lane: Lane) -> None:
    """Open the run of every slot, from the current one on; whoever comes second finds it open."""
    every = max(1.0, duration(lane.every or 0))  # a slot's name is its second: there is one in each
    while True:
        now = app.clock.now().timestamp()
        due = now - now % every
        slot = datetime.fromtimestamp(due, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            await app.engine.trigger(lane.name, slot, by="schedule")
        except (Retryable, asyncio.CancelledError) as error:
            known = describe(ordinary(error))
            logger.warning("lane %s: slot %s not opened yet: %s", lane.name, slot, known)
            await app.clock.sleep(1 + app.clock.random())
            continue
        await app.clock.sleep(max(0.0, due + every - app.clock.now().timestamp()) + 0.001)


@asynccontextmanager
async def housekeeping(app: Application, lanes: list[Lane], *, at_once: bool = True) -> AsyncIterator[None]:
    """Sweep `lanes` periodically while the context is open, for the first time `at_once` or a while later."""

    async def forever() -> None:
        swept = lanes if at_once else []
        while True:
            for lane in swept:
                try:
                    await sweep(app.engine, lane.name)
                except (FlowlaneError, asyncio.CancelledError) as error:
                    # One lane's trouble, which may last for ever: the others are swept all the same.
                    logger.warning(
                        "lane %s: the sweep is left for later, `flowlane sweep` repeats it: %s",
                        lane.name,
                        describe(ordinary(error)),
                    )
            leases = [float(stage.policy.lease) for lane in lanes for stage in lane.stages]
            await app.clock.sleep(min([_SWEEP_EVERY, *leases]) * (0.75 + app.clock.random() / 2))
            swept = lanes

    async with asyncio.TaskGroup() as tasks:
        sweeping = tasks.create_task(lasting(forever), name="flowlane-sweep")
        try:
            yield
        finally:
            sweeping.cancel()


def stop_on_signals(
    loop: asyncio.AbstractEventLoop, app_clock: Callable[[], float], stop: asyncio.Event, deadline: Deadline
) -> None:
    """SIGTERM and SIGINT set `stop` and leave ``GRACE`` seconds; a second one cuts off what runs and leaves
    ``LAST`` to log it; a third ends the process, which a handler that swallows its cancellation would keep
    for ever."""
    numbers = (signal.SIGTERM, signal.SIGINT)

    def told() -> None:
        deadline.margin = GRACE
        deadline.at = app_clock() + (LAST if stop.is_set() else GRACE)
        if stop.is_set():
            for number in numbers:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in numbers:
        loop.add_signal_handler(number, told)
