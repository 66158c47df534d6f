"""The pump: keeps a stage's slots busy with deliveries, watches their time, and keeps their leases.

Long-lived slots take deliveries from a small buffer; no task is made for a delivery. The buffer holds what
is worked off in a quarter of a second, so a slow stage hoards nothing that another worker could do.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import TracebackType

from flowlane.attempt import Attempt, Outcome
from flowlane.deadline import Deadline, Interrupted
from flowlane.engine import Engine, describe
from flowlane.errors import Fenced, Retryable
from flowlane.handling import Handling
from flowlane.ports import Delivery

logger = logging.getLogger("flowlane")

#: Deliveries of one stage held by one worker, at most, and how many seconds' worth of them.
PREFETCH = 512
HORIZON = 0.25
_POLL = 5.0


class Slot:
    """One of a stage's long-lived tasks: what it works on, since when, and why it was interrupted."""

    __slots__ = ("attempt", "began", "delivery", "task", "why")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.delivery: Delivery | None = None
        self.attempt: Attempt | None = None
        self.began = 0.0
        self.why: BaseException | None = None

    def interrupt(self, why: BaseException) -> None:
        """Cancel what the slot is doing; it goes on with `why` as the attempt's end."""
        if self.why is None and self.task is not None:
            self.why = why
            self.task.cancel()


class _Station:
    """The buffer and slots of one stage."""

    def __init__(self, handling: Handling) -> None:
        self.handling = handling
        self.queue = handling.stage.queue
        self.lease = float(handling.stage.policy.lease)
        self.timeout = float(handling.stage.policy.timeout)
        self.concurrency = handling.stage.policy.concurrency
        self.buffer: deque[Delivery] = deque()
        self.idle: deque[asyncio.Future[None]] = deque()
        self.slots = [Slot() for _ in range(self.concurrency)]
        self.held: dict[Delivery, float] = {}  # since when
        self.target = self.concurrency
        self.room: asyncio.Future[None] | None = None
        self.settled = 0
        self.since = 0.0

    def feed(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Put deliveries into the buffer and wake as many slots."""
        for delivery in deliveries:
            self.held[delivery] = now
        self.buffer.extend(deliveries)
        for _ in range(min(len(self.idle), len(deliveries))):
            waiting = self.idle.popleft()
            if not waiting.done():
                waiting.set_result(None)

    def release(self, delivery: Delivery) -> None:
        """The delivery is settled, one way or the other: there is room for another."""
        if self.held.pop(delivery, None) is not None:
            self.settled += 1
        room = self.room
        if room is not None and not room.done() and len(self.held) * 2 <= self.target:
            room.set_result(None)

    def adapt(self, now: float) -> None:
        """Hold from now on what is worked off in ``HORIZON`` at the pace since the last call."""
        rate = self.settled / max(now - self.since, 1e-9)
        self.settled, self.since = 0, now
        self.target = min(PREFETCH, max(self.concurrency, int(rate * HORIZON)))


class Pump:
    """Handles deliveries while its context is open; ``receiving`` ones of its own, or only those it is asked
    to ``handle``; of all stages, or of the one named `only`.

    Leaving the context waits for what runs (up to the deadline), gives back what was not begun, and waits for
    the last commits.
    """

    def __init__(self, engine: Engine, deadline: Deadline, *, receiving: bool = True, only: str = "") -> None:
        self.engine = engine
        self.deadline = deadline
        self._awaited: dict[int, asyncio.Future[Outcome]] = {}
        self._receiving = receiving
        self._stations = {
            queue: _Station(handling)
            for queue, handling in engine.queues.items()
            if only in ("", handling.stage.name)
        }
        self._stack = AsyncExitStack()
        self._receivers: list[asyncio.Task[None]] = []
        self._slots: list[asyncio.Task[None]] = []
        self._closing = False

    async def __aenter__(self) -> Pump:
        await self._stack.enter_async_context(self._open())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        committer = self.engine.committer
        committer.on_ended = self._ended
        async with committer, asyncio.TaskGroup() as tasks:
            for station in self._stations.values():
                for slot in station.slots:
                    slot.task = tasks.create_task(self._work(station, slot), name=f"slot {station.queue}")
                    self._slots.append(slot.task)
                if self._receiving:
                    receive = self._receive(station)
                    self._receivers.append(tasks.create_task(receive, name=f"receive {station.queue}"))
            watch = tasks.create_task(self._watch(), name="flowlane-watch")
            try:
                yield
                await self._close()
            finally:
                for task in (watch, *self._receivers):
                    task.cancel()

    async def _close(self) -> None:
        self._closing = True
        for task in self._receivers:
            task.cancel()
        for station in self._stations.values():
            while station.buffer and self._receiving:
                delivery = station.buffer.popleft()
                await self._give_back(delivery)
                station.release(delivery)
            while station.idle:
                waiting = station.idle.popleft()
                if not waiting.done():
                    waiting.set_result(None)
        if self._slots:
            await asyncio.wait(self._slots)

    # ------------------------------------------------------------------ feeding

    async def handle(self, delivery: Delivery) -> Outcome:
        """Handle `delivery`; what became of it, once its last commit is through."""
        station = self._stations.get(delivery.stage)
        if station is None:
            return "failed"
        ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._awaited[id(delivery)] = ended
        try:
            station.feed([delivery], self.engine.clock.monotonic())
            return await ended
        finally:
            del self._awaited[id(delivery)]

    async def until(self, condition: Awaitable[None]) -> None:
        """Work until `condition` returns, or the deadline is near."""
        waiting = asyncio.ensure_future(condition)
        try:
            while not waiting.done() and not self.deadline.near(self.engine.clock.monotonic()):
                left = self.deadline.left(self.engine.clock.monotonic())
                await asyncio.wait([waiting], timeout=min(0.2, left))
            if waiting.done():
                waiting.result()
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def _receive(self, station: _Station) -> None:
        clock = self.engine.clock
        loop = asyncio.get_running_loop()
        failures = 0
        while not self._closing:
            # Each slot has ended several since: the pace is known, without waiting for the next tick.
            if station.settled >= 4 * station.concurrency:
                station.adapt(clock.monotonic())
            room = station.target - len(station.held)
            if room <= 0 or self.deadline.near(clock.monotonic()):
                station.room = loop.create_future()
                try:
                    await asyncio.wait([station.room], timeout=0.2)
                finally:
                    station.room = None
                continue
            try:
                got = await self.engine.backend.receive(
                    [station.queue], room, lease=station.lease, wait=_POLL
                )
            except Exception as error:  # noqa: BLE001  # the queue is away: wait, with jitter, and ask again
                failures += 1
                logger.warning("queue %s does not answer: %s", station.queue, describe(error))
                await clock.sleep(min(30.0, 0.1 * 2**failures) * (0.5 + clock.random() / 2))
                continue
            failures = 0
            if got:
                station.feed(got, clock.monotonic())

    # ------------------------------------------------------------------ working

    async def _work(self, station: _Station, slot: Slot) -> None:
        clock = self.engine.clock
        loop = asyncio.get_running_loop()
        buffer = station.buffer
        while True:
            if not buffer:
                if self._closing:
                    return
                waiting = loop.create_future()
                station.idle.append(waiting)
                await waiting
                continue
            delivery = buffer.popleft()
            slot.began = clock.monotonic()
            if self.deadline.near(slot.began):
                await self._give_back(delivery)
                self._ended(delivery, "released")
                continue
            slot.delivery = delivery
            result: Attempt | Outcome
            try:
                result = await self.engine.process(delivery, self.deadline, slot)
            except asyncio.CancelledError:
                result = await self._interrupted(slot, delivery)
            except Exception:  # noqa: BLE001  # the log or the queue is away; the lease will run out
                result = "released"
            if slot.why is not None:
                await self._absorb(slot)
            slot.delivery = None
            slot.attempt = None
            if type(result) is str:
                self._ended(delivery, result)

    async def _give_back(self, delivery: Delivery) -> None:
        with suppress(Exception):  # the queue is away; the lease will run out
            await delivery.nack()

    async def _interrupted(self, slot: Slot, delivery: Delivery) -> Attempt | Outcome:
        why, task = slot.why, slot.task
        if why is None or task is None:
            raise asyncio.CancelledError
        if task.uncancel() > 0:
            raise asyncio.CancelledError
        try:
            if slot.attempt is None:
                await self._give_back(delivery)
                return "released"
            return await self.engine.fail(slot.attempt, why)
        except Exception:  # noqa: BLE001  # the log is away; the lease will run out
            return "released"
        finally:
            slot.why = None  # only now: a second interruption would hit what sees to the first

    async def _absorb(self, slot: Slot) -> None:
        """Take the cancellation that came when the attempt had just ended: it is not meant for the next."""
        assert slot.task is not None
        with suppress(asyncio.CancelledError):
            await self.engine.clock.sleep(0)
        slot.why = None
        if slot.task.uncancel() > 0:
            raise asyncio.CancelledError

    def _ended(self, delivery: Delivery, outcome: Outcome) -> None:
        if self._awaited:
            awaited = self._awaited.get(id(delivery))
            if awaited is not None and not awaited.done():
                awaited.set_result(outcome)
        self._stations[delivery.stage].release(delivery)

    # ------------------------------------------------------------------ watching

    async def _watch(self) -> None:
        clock = self.engine.clock
        tick = min(
            [
                1.0,
                *(s.lease / 4 for s in self._stations.values()),
                *(s.timeout / 4 for s in self._stations.values()),
            ]
        )
        while True:
            now = clock.monotonic()
            cut_off = self.deadline.at - self.deadline.margin / 2 - now
            await clock.sleep(min(tick, cut_off) if cut_off > 0 else tick / 10)
            now = clock.monotonic()
            for station in self._stations.values():
                self._watch_time(station, now)
                if now - station.since >= tick:
                    station.adapt(now)
                self._beat(station, now)
                await self._keep_leases(station, now)

    def _watch_time(self, station: _Station, now: float) -> None:
        over = self.deadline.over(now)
        for slot in station.slots:
            if slot.delivery is None:
                continue
            if over:
                slot.interrupt(Interrupted("the process had to end before the stage reached a safe point"))
            elif now - slot.began > station.timeout:
                slot.interrupt(
                    Retryable(f"the attempt took longer than its timeout of {station.timeout:g} s")
                )

    def _beat(self, station: _Station, now: float) -> None:
        """Let the log say that silent attempts are at work, so that nobody takes them over."""
        for slot in station.slots:
            attempt, delivery = slot.attempt, slot.delivery
            if attempt is None or delivery is None:
                continue
            attempt.beat(now, station.lease / 2)
            if attempt.lost:
                self._lost(station, delivery)

    async def _keep_leases(self, station: _Station, now: float) -> None:
        due = [held for held, since in station.held.items() if now - since >= station.lease / 3]
        if not due:
            return
        try:
            async with asyncio.timeout(station.lease / 3):
                answers = await asyncio.gather(
                    *(delivery.extend(station.lease) for delivery in due), return_exceptions=True
                )
        except TimeoutError:
            return  # asked again at the next tick; a lease that runs out meanwhile is found lost then
        for delivery, answer in zip(due, answers, strict=True):
            if delivery not in station.held:
                continue
            if answer is True:
                station.held[delivery] = now
            elif answer is False:
                self._lost(station, delivery)

    def _lost(self, station: _Station, delivery: Delivery) -> None:
        if delivery in station.buffer:
            station.buffer.remove(delivery)
            station.release(delivery)
            return
        for slot in station.slots:
            if slot.delivery is delivery:
                if slot.attempt is not None:
                    slot.attempt.lost = True
                logger.warning("%s: its lease was lost, the attempt is given up", delivery.event.subject)
                slot.interrupt(Fenced(f"the lease on {delivery.event.subject} was lost"))
