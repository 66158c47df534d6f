"""One invocation's work: runs are opened and drained, deliveries handled, until the deadline is near.

With an embedded backend everything that a message causes is done inside the invocation, and a message whose
run is not finished in time is reported failed: when it comes again, it finds the run and goes on with it.
With a queue outside (``Backend.exact_queue`` is false) a run only has to be opened: its deliveries come by
themselves, as messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Literal

import msgspec

from flowlane import events
from flowlane.aws_lambda import payload
from flowlane.aws_lambda.answer import Answer
from flowlane.aws_lambda.payload import Batch, Message
from flowlane.compose import Application
from flowlane.deadline import Deadline
from flowlane.engine import describe
from flowlane.errors import Permanent, Retryable
from flowlane.events import Event
from flowlane.lane import Lane
from flowlane.pump import Pump
from flowlane.state import status
from flowlane.worker import housekeeping, report_of

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

    async def ack(self) -> None:
        """The answer will not name the message."""

    async def nack(self, *, delay: float = 0) -> None:
        """The answer will name the message."""

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
    def drains(self) -> bool:
        """Whether runs are drained here, rather than by the deliveries to come."""
        return self._embedded

    @property
    def near(self) -> bool:
        """Whether nothing may be begun any more."""
        return self._deadline.near(self._app.clock.monotonic())

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

    async def take(self, wanted: Event | payload.Start, attempt: int = 1) -> str:
        """Do what is wanted, or (embedded) see to it that it is done; the stream of the run it belongs to.

        Raises:
            Permanent: it makes no sense to this lane's log.
            Retryable: not this time.
        """
        if isinstance(wanted, Event):
            head = (await self._app.backend.last([wanted.subject])).get(wanted.subject)
            if head is not None:
                return await self._own(wanted, head, attempt)
            if wanted.type != events.LANE_TRIGGERED:
                raise Permanent(
                    f"the log does not know {wanted.subject:.200}, which an event of lane {self._lane.name} "
                    "is about: is FLOWLANE_BACKEND the backend that it came from?"
                )
            wanted = payload.restart(wanted)
        run, _ = await self._app.engine.trigger(
            self._lane.name, wanted.slot, by=wanted.by, event=wanted.event
        )
        return run

    async def _own(self, event: Event, head: Event, attempt: int) -> str:
        """An event of a unit that the log knows; the log alone says what stage is owed it. An embedded
        backend has it in its own queue (or the sweep puts it there): there it need only be waited for."""
        handling = self._app.engine.handling_of(head)
        if handling is None or not head.run:
            raise Permanent(f"no stage of lane {self._lane.name} is owed the events of {head.subject:.200}")
        if not self._embedded:
            outcome = await self._pump.handle(Carried(event, handling.stage.queue, attempt, head))
            if outcome not in _DONE:
                raise Retryable(f"the delivery of {head.subject} ended as {outcome}")
        return head.run

    async def end(self, run: str) -> End:
        """Wait until every unit of `run` has ended (what it owes after that, notices, too)."""
        if run not in self._awaited:
            self._awaited[run] = asyncio.get_running_loop().create_future()
            self._wake.set()
        return await asyncio.shield(self._awaited[run])

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


async def handle(app: Application, lane: Lane, batch: Batch, deadline: Deadline) -> dict[str, Any]:
    """Handle the messages of `batch`, in order where their source keeps one; the answer for AWS.

    A message that fails is logged with its reason and keeps no other from being handled.
    """
    answer = Answer(batch)
    invocation = Invocation(app, lane, deadline)
    unfinished: dict[int, str] = {}

    def fail(index: int, reason: str) -> None:
        answer.fail(index)
        _log(lane, batch, batch.messages[index], reason)

    async def one_after_the_other(sequence: list[int]) -> None:
        for place, index in enumerate(sequence):
            if answer.again(index):
                return
            if invocation.near:
                fail(index, "not begun: too little of the function's time is left")
                return
            try:
                message = batch.messages[index]
                run = await invocation.take(payload.understand(message.body, lane.name), message.attempt)
                end = await invocation.end(run) if invocation.drains else "over"
                if end == "stuck":
                    raise _stuck(lane, run)
                if end == "near":
                    unfinished[index] = run
                    # What follows waits for it; if it should end in the last moment, that is seen below.
                    for later in sequence[place + 1 : place + 2]:
                        fail(later, f"not begun: the run {run} before it took all of the function's time")
                    return
            except Exception as error:  # noqa: BLE001  # each message's own failure
                fail(index, describe(error))
                return

    async with invocation.open(), asyncio.TaskGroup() as tasks:
        for sequence in batch.sequences():
            tasks.create_task(one_after_the_other(sequence))
    over = await invocation.look(set(unfinished.values()))
    for index, run in unfinished.items():
        if run not in over:
            fail(index, f"the run {run} is not finished: it goes on when the message comes again")
    return answer.document()


async def handle_direct(
    app: Application, lane: Lane, wanted: Event | payload.Start, deadline: Deadline
) -> dict[str, Any]:
    """Do what the function was invoked for; the run's report (of a run that is drained elsewhere: its name).

    Raises:
        Retryable: the run is not finished: the same event, sent again, goes on with it (as AWS does by itself
            where the invocation is an asynchronous one).
    """
    invocation = Invocation(app, lane, deadline)
    began = app.clock.monotonic()
    async with invocation.open():
        run, error = "", None
        try:
            if invocation.near:
                raise Retryable("nothing was begun: too little of the function's time is left")
            others, _ = await invocation.open_runs() if invocation.drains else (set(), set())
            run = await invocation.take(wanted)
            if invocation.drains:
                own, *_ = await asyncio.gather(*map(invocation.end, [run, *(others - {run})]))
                if own == "stuck":
                    raise _stuck(lane, run)
        except (Permanent, Retryable) as raised:
            error = raised
    if error is not None:
        raise error
    if not invocation.drains:
        return {"lane": lane.name, "run": run, "outcome": "open"}
    if run not in await invocation.look({run}):
        raise Retryable(f"the run {run} is not finished: send the same event again, and it goes on")
    report = await report_of(app, lane, run)
    report.seconds = round(app.clock.monotonic() - began, 3)
    return report.brief()


def _stuck(lane: Lane, run: str) -> Permanent:
    return Permanent(
        f"units of the run {run} wait for a stage that lane {lane.name} does not have (any more): "
        "deploy it again, with upcasters if their type has changed"
    )


def _log(lane: Lane, batch: Batch, message: Message, reason: str) -> None:
    """One JSON line; never the body, which may hold anything."""
    line: Mapping[str, Any] = {
        "level": "error",
        "lane": lane.name,
        "source": batch.kind,
        "message": message.id,
        "attempt": message.attempt,
        "bytes": len(message.body),
        "reason": reason,
    }
    logger.error("%s", msgspec.json.encode(line).decode())
