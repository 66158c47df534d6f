"""One invocation's work: runs are opened and drained, deliveries handled, until the deadline is near.

With an embedded backend everything that a message causes is done inside the invocation, and a message whose
run is not finished in time is reported failed: when it comes again, it finds the run and goes on with it.
With a queue outside (``Backend.exact_queue`` is false) a run only has to be opened: its deliveries come by
themselves, as messages.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Final, Literal

import msgspec

from flowlane import events
from flowlane.aws_lambda.wanted import Start, Sweep, Wanted, restart
from flowlane.compose import Application
from flowlane.deadline import Deadline
from flowlane.engine import Engine
from flowlane.errors import Permanent, Retryable
from flowlane.events import Event, Reference
from flowlane.handling import Handling
from flowlane.lane import Lane
from flowlane.pump import Pump
from flowlane.reasons import describe
from flowlane.state import progress, status
from flowlane.sweep import Swept, sweep
from flowlane.worker import housekeeping

logger = logging.getLogger("flowlane")

#: Outcomes after which a message may be deleted: its unit has ended, or is owed to another delivery.
_DONE: Final = frozenset({"settled", "dead", "retried", "continued"})
_LOOK = 0.25
#: The first look at the log that also asks whether a run can go on at all; then every one twice as late.
_THOROUGH = 8

#: A run is over; or waits for a stage that is gone; or the deadline came before either.
End = Literal["over", "stuck", "near"]


class Carried(msgspec.Struct, eq=False):
    """A delivery that a Lambda payload carried; see ``ports.Delivery``.

    It is settled by the answer of its invocation, which follows what the engine makes of it; its lease is the
    queue's visibility timeout, which outlasts the invocation (AWS refuses a mapping where it does not).
    """

    event: Event
    stage: str
    attempt: int
    head: Event | None
    delay: float | None = None  #: seconds after which the engine wants to have it again

    async def ack(self) -> None:
        """The answer will not name the message."""

    async def nack(self, *, delay: float = 0) -> None:
        """The answer will name the message."""
        self.delay = delay

    async def extend(self, seconds: float) -> bool:
        """Held until the invocation ends."""
        return True


class Invocation:
    """What messages want, done within one invocation; see the module."""

    def __init__(self, app: Application, lane: Lane, deadline: Deadline) -> None:
        self._app = app
        self._lane = lane
        self._deadline = deadline
        self._embedded = app.backend.exact_queue
        self._pump = Pump(app.engine, deadline, receiving=self._embedded, only=app.settings.stage)
        self._awaited: dict[str, asyncio.Future[End]] = {}
        self._wake = asyncio.Event()

    @property
    def engine(self) -> Engine:
        """What the deliveries are handled by."""
        return self._app.engine

    @property
    def drains(self) -> bool:
        """Whether runs are drained here, rather than by the deliveries to come."""
        return self._embedded

    @property
    def left(self) -> float:
        """Seconds until nothing may be begun any more."""
        return self._deadline.left(self._app.clock.monotonic())

    @property
    def near(self) -> bool:
        """Whether nothing may be begun any more."""
        return self._deadline.near(self._app.clock.monotonic())

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Wait in here for the backend only as long as there is time to answer, and to say why: otherwise
        Lambda would end the function, which says nothing and loses the process.

        Raises:
            Retryable: there was no answer; what was asked for may be done all the same, as the log will say.
        """
        rest = self._deadline.rest(self._app.clock.monotonic())
        seconds = min(rest, self.left + self._deadline.margin / 2)
        timer = asyncio.timeout(seconds if math.isfinite(seconds) else None)
        try:
            async with timer:
                yield
        except TimeoutError:
            if not timer.expired():
                raise
            raise Retryable(
                f"the backend of lane {self._lane.name} did not answer in the {seconds:.3g} s that were "
                "left: it is tried again when the event comes again"
            ) from None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Work while the context is open; what runs when it is left reaches its next safe point."""
        async with self._pump:
            if not self._embedded:
                yield
                return
            async with housekeeping(self._app, [self._lane]), asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch(), name="flowlane-runs")
                try:
                    yield
                finally:
                    watching.cancel()

    async def take(self, wanted: Wanted, attempt: int = 1) -> str:
        """Do what is wanted, or (embedded) see to it that it is done; the stream of the run it belongs to, or
        nothing where that is done with.

        Raises:
            Permanent: it makes no sense to this lane's log.
            Retryable: not this time.
        """
        if isinstance(wanted, Sweep):
            await self.sweep()
            return ""
        async with self.in_time():
            if isinstance(wanted, Reference):
                wanted = await self._referred(wanted)
            head = await self.head(wanted) if isinstance(wanted, Event) else None
            if isinstance(wanted, Event) and head is None:
                if wanted.type != events.LANE_TRIGGERED:
                    raise self._unknown(wanted.subject)
                wanted = restart(wanted)
            if isinstance(wanted, Start):
                run, _ = await self._app.engine.trigger(
                    self._lane.name, wanted.slot, by=wanted.by, event=wanted.event
                )
                return run
        assert head is not None
        return await self.own(wanted, head, attempt)

    async def head(self, event: Event) -> Event | None:
        """The last event of the unit that `event` is of; ``None`` if the log knows none."""
        return (await self._app.backend.last([event.subject])).get(event.subject)

    async def _referred(self, reference: Reference) -> Event:
        """The event that the log has where `reference` says."""
        found: Event
        async for found in self._app.backend.read(reference.stream, after=reference.version - 1):
            if (found.version, found.id, found.source) == (reference.version, reference.id, self._lane.name):
                return found
            break
        raise self._unknown(reference.stream)

    def _unknown(self, stream: str) -> Permanent:
        return Permanent(
            f"the log does not know {stream:.200} as the message does, which is about lane "
            f"{self._lane.name}: is FLOWLANE_BACKEND the backend that it came from?"
        )

    async def sweep(self) -> Swept:
        """Sweep the lane, until the deadline is near.

        Raises:
            Retryable: it did not come to its end; what it did stands, and the next one does the rest.
        """
        left = self.left
        try:
            async with asyncio.timeout(left if math.isfinite(left) else None):
                return await sweep(self._app.engine, self._lane.name)
        except TimeoutError:
            raise Retryable(
                f"the sweep of lane {self._lane.name} did not come to its end in {left:.0f} s: what it did "
                "stands, the next one goes on; give the function more time if this is told again"
            ) from None

    async def own(self, event: Event, head: Event, attempt: int) -> str:
        """As ``take``, of the event of a unit whose last one is `head`; the log alone says what stage is owed
        it. An embedded backend has it in its own queue (or the sweep puts it there): there it need only be
        waited for."""
        handling = self._app.engine.handling_of(head)
        if handling is None or not head.run:
            raise Permanent(f"no stage of lane {self._lane.name} is owed the events of {head.subject:.200}")
        if not self._embedded:
            if (only := self._app.settings.stage) not in ("", handling.stage.name):
                raise Permanent(
                    f"{head.subject:.200} is for the stage {handling.stage.name}, and FLOWLANE_STAGE has "
                    f"this function handle {only} only: map each stage's queue to a function that handles it"
                )
            if (wait := self._backoff(head, handling)) > 0:
                raise Retryable(f"{head.subject} is not due again yet", delay=wait)
            carried = Carried(event, handling.stage.queue, attempt, head)
            outcome = await self._pump.handle(carried)
            if outcome == "again":
                said = f"{head.subject} goes on in its place: its stage has an order key"
                raise Retryable(said, delay=carried.delay)
            if outcome not in _DONE:
                raise Retryable(f"the delivery of {head.subject} ended as {outcome}", delay=carried.delay)
        return head.run

    def _backoff(self, head: Event, handling: Handling) -> float:
        """Seconds until a unit is due again that failed in its place: unlike a queue, a channel brings it at
        once."""
        if handling.via != "channel" or head.type != events.ATTEMPT_FAILED:
            return 0.0
        failed = datetime.fromisoformat(head.time).timestamp()
        delay = progress(head).delay
        return min(delay, failed + delay - self._app.clock.now().timestamp())

    async def end(self, run: str) -> End:
        """Wait until every unit of `run` has ended (what it owes after that, notices, too)."""
        if run not in self._awaited:
            self._awaited[run] = asyncio.get_running_loop().create_future()
            self._wake.set()
        return await asyncio.shield(self._awaited[run])

    async def unended(self, runs: set[str], *, needed: set[str] | None = None) -> set[str]:
        """Wait for the end of all `runs`, if they are drained here; those that have not ended in time.

        Raises:
            Permanent: one of them (of the `needed` ones) waits for a stage that is gone.
        """
        if not self.drains:
            return set()
        ends = dict(zip(runs, await asyncio.gather(*map(self.end, runs)), strict=True))
        for run, end in ends.items():
            if end == "stuck" and (needed is None or run in needed):
                raise stuck(self._lane, run)
        return {run for run, end in ends.items() if end == "near"}

    async def open_runs(self) -> tuple[set[str], set[str]]:
        """The runs of which the lane's stages are owed a unit, and those of which a stage is that is gone."""
        workable: set[str] = set()
        parked: set[str] = set()
        async for head in self._app.backend.units(self._lane.name, "open"):
            if head.run and status(head) == "open":
                (workable if self._app.engine.handling_of(head) else parked).add(head.run)
        return workable, parked

    async def look(self, runs: set[str], *, thorough: bool = False) -> dict[str, End]:
        """Those of `runs` that are over; if `thorough`, those that are stuck too."""
        heads = await self._app.backend.last(sorted(runs))
        over = {run for run, head in heads.items() if status(head) in ("settled", "dead")}
        if not over and not thorough:
            return {}
        workable, parked = await self.open_runs()
        ends: dict[str, End] = dict.fromkeys(over - workable, "over")
        if thorough:
            ends.update(dict.fromkeys(parked.intersection(runs) - workable - over, "stuck"))
        return ends

    async def _watch(self) -> None:
        """Answer all who wait for a run with one look at the log at a time."""
        engine, clock = self._app.engine, self._app.clock
        pause, looks, thorough = 0.001, 0, _THOROUGH
        while True:
            waiting = {run for run, future in self._awaited.items() if not future.done()}
            if not waiting:
                pause = 0.001
                await self._wake.wait()
                self._wake.clear()
                continue
            moved = engine.moved
            began = clock.monotonic()
            looks += 1
            ends = await self._ends(waiting, thorough=looks == thorough)
            if looks == thorough:
                thorough *= 2
            spent = clock.monotonic() - began
            for run, end in ends.items():
                self._awaited[run].set_result(end)
            if spent > 0.001:  # many runs: three parts of the time are theirs
                await clock.sleep(min(3 * spent, _LOOK))
            if ends:
                continue
            pause = min(2 * pause, _LOOK)
            try:
                async with asyncio.timeout(min(pause, max(0.001, self._deadline.left(clock.monotonic())))):
                    await moved.wait()
            except TimeoutError:
                continue

    async def _ends(self, waiting: set[str], *, thorough: bool) -> dict[str, End]:
        ends: dict[str, End] = {}
        try:
            ends = await self.look(waiting, thorough=thorough)
        except Exception as error:  # noqa: BLE001  # the log is away: ask again, until the deadline
            logger.warning("lane %s: cannot see how its runs stand: %s", self._lane.name, describe(error))
        return {run: ends.get(run, "near") for run in waiting} if self.near else ends


def stuck(lane: Lane, run: str) -> Permanent:
    """What is wrong with a run that cannot go on."""
    return Permanent(
        f"units of the run {run} wait for a stage that lane {lane.name} does not have (any more): "
        "deploy it again, with upcasters if their type has changed"
    )
