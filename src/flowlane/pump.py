"""The pump: keeps a stage's slots busy with deliveries, watches their time, and keeps their leases.

Long-lived slots take deliveries from a small buffer; no task is made for a delivery. The buffer holds what
is worked off in a quarter of a second, so a slow stage hoards nothing that another worker could do.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import TracebackType

import msgspec

from flowlane.attempt import Attempt, Outcome
from flowlane.committer import lasting, ordinary
from flowlane.conveyor import Conveyor
from flowlane.deadline import Deadline, Interrupted
from flowlane.engine import Engine
from flowlane.errors import ConfigError, Fenced, Retryable
from flowlane.handling import Handling
from flowlane.ports import Delivery
from flowlane.reasons import describe

logger = logging.getLogger("flowlane")

#: Deliveries of one stage held by one worker, at most, and how many seconds' worth of them.
PREFETCH = 512
HORIZON = 0.25
#: Seconds that a queue is waited for with one call, which leaving a pump may have to wait out.
_POLL = 5.0
#: Failures in a row, some six seconds' worth, with which a queue that is away is no passing trouble any more:
#: nothing else would say why a run stands still.
_AWAY = 6
#: Seconds after which what goes on though it was cancelled is cancelled once more, and after which its lease
#: is no longer kept.
AGAIN = 5.0
PATIENCE = 20.0
#: Seconds after the first of those held is settled that more are received, however few have been by then.
_FILL = 0.2
#: Seconds after which slots look whether the loop has turned, and after as many more wait until it has.
_TURN = 0.003


class Slot:
    """One of a stage's long-lived tasks: what it works on, since when, and why and when it was interrupted
    (and last told so)."""

    __slots__ = ("attempt", "began", "delivery", "since", "task", "told", "why")

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.delivery: Delivery | None = None
        self.attempt: Attempt | None = None
        self.began = 0.0
        self.why: BaseException | None = None
        self.since = self.told = 0.0

    def interrupt(self, why: BaseException, now: float) -> None:
        """Cancel what the slot is doing; it goes on with `why` as the attempt's end. Asked for again, cancel
        again after a while: a clean-up may hang, too."""
        assert self.task is not None
        if self.why is None:
            self.why, self.since = why, now
        elif now - self.told < AGAIN:
            return
        self.told = now
        self.task.cancel()


class _Held(msgspec.Struct, gc=False):
    """A delivery, and since when its lease runs. No tuple: the garbage collector, to which this is unknown,
    would go through hundreds of them, again and again."""

    delivery: Delivery
    since: float


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
        self.held: dict[int, _Held] = {}  # by the delivery's id
        self.target = self.concurrency
        self.room: asyncio.Future[None] | None = None  # whoever receives waits for it
        self.making: asyncio.Future[None] | None = None  # the room that comes by itself in a moment
        self.renewal: asyncio.Task[None] | None = None
        self.settled = 0
        self.since = 0.0
        self.conveyor: Conveyor | None = None  # where a channel brings its deliveries

    def feed(self, deliveries: Sequence[Delivery], now: float) -> None:
        """Put deliveries into the buffer and wake as many slots."""
        for delivery in deliveries:
            self.held[id(delivery)] = _Held(delivery, now)
        self.buffer.extend(deliveries)
        for _ in range(min(len(self.idle), len(deliveries))):
            waiting = self.idle.popleft()
            if not waiting.done():
                waiting.set_result(None)

    def release(self, delivery: Delivery) -> None:
        """The delivery is settled, one way or the other: there is room for another."""
        if self.held.pop(id(delivery), None) is not None:
            self.settled += 1
        if self.conveyor is not None:
            self.conveyor.released(delivery)
        room = self.room
        if room is not None and not room.done():
            # Half of what may be held at a time, or what there is in a moment: no slot is idle for long.
            if len(self.held) * 2 <= self.target:
                room.set_result(None)
            elif self.making is not room:
                self.making = room
                asyncio.get_running_loop().call_later(_FILL, _done, room)

    def adapt(self, now: float) -> None:
        """Hold from now on what is worked off in ``HORIZON`` at the pace since the last call."""
        rate = self.settled / max(now - self.since, 1e-9)
        self.settled, self.since = 0, now
        self.target = min(PREFETCH, max(self.concurrency, int(rate * HORIZON)))


class Pump:
    """Handles deliveries while its context is open; ``receiving`` ones of its own, or only those it is asked
    to ``handle``; of all stages, or of the one named `only`.

    Leaving the context waits for what runs, gives back what was not begun, and waits for the last commits,
    all of it only as long as the deadline leaves time.
    """

    def __init__(
        self,
        engine: Engine,
        deadline: Deadline,
        *,
        receiving: bool = True,
        only: str = "",
        poll: float = _POLL,
    ) -> None:
        self.engine = engine
        self.deadline = deadline
        self._awaited: dict[int, asyncio.Future[Outcome]] = {}
        self._receiving = receiving
        self._poll = poll
        self._stations = {
            queue: _Station(handling)
            for queue, handling in engine.queues.items()
            if only in ("", handling.stage.name)
        }
        self._stack = AsyncExitStack()
        self._receivers: list[asyncio.Task[None]] = []
        self._closing = False
        self._told: asyncio.Future[None] | None = None  # done once closing
        self._left = False  # the slots are cancelled for good
        self._waiting: deque[asyncio.Future[None]] = deque()  # slots that give way, in order
        self._turning = False  # the loop was asked to turn
        self._turn_ends = 0.0

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
        committer.on_ended, committer.deadline = self._ended, self.deadline
        async with self._conveying() as conveyors, committer, asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(self._keep_slots(), name="flowlane-slots")
            for station in self._stations.values():
                if self._receiving:
                    receive = lasting(self._receive, station)
                    self._receivers.append(tasks.create_task(receive, name=f"receive {station.queue}"))
            watch = [tasks.create_task(lasting(self._watch), name="flowlane-watch")]
            watch += [tasks.create_task(lasting(each.tend), name="flowlane-holds") for each in conveyors]
            try:
                yield
                returning = tasks.create_task(self._close(), name="flowlane-return")
                await asyncio.wait([keeper])
                if not await self.deadline.wait(self.engine.clock, [returning]):
                    returning.cancel()  # the queue is away; their leases run out
            finally:
                for task in (*watch, *self._receivers):
                    task.cancel()

    @asynccontextmanager
    async def _conveying(self) -> AsyncIterator[Sequence[Conveyor]]:
        """The conveyors of the stages that have one. What they hold is let go when nothing is at work any
        more and the last commits are through."""
        conveyors: list[Conveyor] = []
        for station in self._stations.values():
            if self._receiving and station.handling.via == "channel":
                station.conveyor = Conveyor(self.engine, station.handling, partial(self._lost, station))
                conveyors.append(station.conveyor)
        try:
            yield conveyors
        finally:
            closing = [asyncio.create_task(each.close(), name="flowlane-close") for each in conveyors]
            try:
                await self.deadline.wait(self.engine.clock, closing)
            finally:
                for task in closing:
                    task.cancel()  # log or channel are away: what is held is lost in a while
                    task.add_done_callback(_failure)
                for station in self._stations.values():
                    station.held.clear()  # no cycle may be left: see ``_Held``
                if closing:
                    await asyncio.wait(closing, timeout=0.05)

    async def _close(self) -> None:
        """Take nothing more, and give back what is not begun."""
        self._closing = True
        if self._told is not None:
            self._told.set_result(None)
        unbegun: list[Delivery] = []
        for task in self._receivers:
            task.cancel()
        for station in self._stations.values():
            if self._receiving:
                unbegun.extend(station.buffer)
                station.buffer.clear()
            while station.idle:
                waiting = station.idle.popleft()
                if not waiting.done():
                    waiting.set_result(None)
        for delivery in unbegun:
            self._stations[delivery.stage].release(delivery)
        await asyncio.gather(*map(self._give_back, unbegun))

    async def _keep_slots(self) -> None:
        """Own the slots until all have ended, or without those that have not when the deadline has come. They
        are no children of a group, which would wait for a handler that does not end, whatever the time."""
        clock = self.engine.clock
        slots: dict[asyncio.Task[None], Slot] = {}
        for station in self._stations.values():
            for slot in station.slots:
                slot.task = asyncio.create_task(self._work(station, slot), name=f"slot {station.queue}")
                slots[slot.task] = slot
        if not slots:
            return
        self._told = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([*slots, self._told], return_when=asyncio.FIRST_COMPLETED)
            if self._closing:
                await self.deadline.wait(clock, slots)
            for task in slots:
                if task.done() and (error := _failure(task)) is not None:
                    raise error
            if not self._closing:
                raise RuntimeError("a slot ended though nothing told it to: please report this")
        finally:
            self._left = True
            for task in slots:
                task.cancel()
                task.add_done_callback(_failure)  # whatever it is: nobody asks for it any more
            await asyncio.wait(slots, timeout=min(AGAIN, max(0.05, self.deadline.rest(clock.monotonic()))))
            self._leave([slot for task, slot in slots.items() if not task.done()])

    def _leave(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            if slot.attempt is not None:
                slot.attempt.lost = True  # should it ever go on, it may log nothing
            if slot.delivery is not None:
                logger.warning(
                    "%s: its handler does not end though it was cancelled, and is left behind; the unit "
                    "comes again when its lease runs out: see that the handler's clean-up ends",
                    slot.delivery.event.subject,
                )

    # ------------------------------------------------------------------ feeding

    async def handle(self, delivery: Delivery) -> Outcome:
        """Handle `delivery`; what became of it, once its last commit is through. "released" if that is not
        known when the deadline leaves no more time."""
        station = self._stations.get(delivery.stage)
        if station is None:
            return "failed"
        ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._awaited[id(delivery)] = ended
        try:
            station.feed([delivery], self.engine.clock.monotonic())
            return ended.result() if await self.deadline.wait(self.engine.clock, [ended]) else "released"
        finally:
            del self._awaited[id(delivery)]

    async def until(self, condition: Awaitable[None]) -> None:
        """Work until `condition` returns, or the deadline is near."""
        waiting = asyncio.ensure_future(condition)
        near = asyncio.ensure_future(self.deadline.comes(self.engine.clock))
        try:
            await asyncio.wait([waiting, near], return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
        finally:
            waiting.cancel()
            near.cancel()
            await asyncio.gather(waiting, near, return_exceptions=True)

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
                station.room = room_made = loop.create_future()
                try:
                    await room_made  # cancelled when nothing more is to be taken
                finally:
                    station.room = None
                continue
            try:
                if station.conveyor is not None:
                    got = await station.conveyor.receive(room, self._poll)
                else:
                    got = await self.engine.backend.receive(
                        [station.queue], room, lease=station.lease, wait=self._poll
                    )
            except ConfigError:  # the backend will never answer again: nothing is to be waited for
                raise
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # the queue is away: wait, with jitter, and ask again
                failures += 1
                level = logging.WARNING if failures < _AWAY else logging.ERROR
                via, known = station.handling.via, describe(ordinary(error))
                logger.log(level, "%s %s does not answer: %s", via, station.queue, known)
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
            began = clock.monotonic()
            if began >= self._turn_ends and (going := self._give_way(began)) is not None:
                await going
                continue
            delivery = buffer.popleft()
            slot.began = began
            result: Attempt | Outcome = "released"
            try:
                if began >= self.deadline.nears:
                    await self._give_back(delivery)
                else:
                    slot.delivery = delivery
                    result = await self.engine.process(delivery, self.deadline, slot)
            except asyncio.CancelledError:
                result = await self._cancelled(slot, delivery)
            except Exception:  # noqa: BLE001  # the log or the queue is away; the lease will run out
                result = "released"
            if slot.why is not None:
                self._take_back(slot)  # the attempt may have ended all the same: the next is not meant
                slot.why = None
            slot.delivery = None
            slot.attempt = None
            if type(result) is str:
                self._ended(delivery, result)

    def _give_way(self, now: float) -> asyncio.Future[None] | None:
        """Let the loop turn: handlers that wait for nothing would keep everybody else from it. What a slot is
        to wait for before it goes on: nothing, as long as it may be that the loop turns by itself."""
        loop = asyncio.get_running_loop()
        if self._turning:
            going: asyncio.Future[None] = loop.create_future()
            self._waiting.append(going)
            return going
        self._turning = True
        self._turn_ends = now + _TURN
        loop.call_soon(self._turn)
        return None

    def _turn(self) -> None:
        """The loop has turned: those that gave way go on, one at a time while turns are long."""
        now = self.engine.clock.monotonic()
        most = len(self._waiting) if now < self._turn_ends else 1
        self._turn_ends = now + _TURN
        while self._waiting and most > 0:
            going = self._waiting.popleft()
            most -= 1
            if not going.done():
                going.set_result(None)
        self._turning = bool(self._waiting)
        if self._turning:
            asyncio.get_running_loop().call_soon(self._turn)

    async def _give_back(self, delivery: Delivery) -> None:
        try:
            await delivery.nack()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # the queue is away; the lease will run out
            ordinary(error)

    def _take_back(self, slot: Slot) -> None:
        """The slot heeds its cancellation, whoever it came from, and goes on; unless it is to end."""
        assert slot.task is not None
        if self._left:
            raise asyncio.CancelledError
        while slot.task.uncancel():
            pass

    async def _cancelled(self, slot: Slot, delivery: Delivery) -> Attempt | Outcome:
        """What becomes of a delivery whose handling ended as cancelled: by the watch, which says why, or by
        nobody here. A handler that awaits what a library cancelled ends like that."""
        why = slot.why or Retryable(
            "the handler was cancelled from within: something that it awaited was, by a library perhaps"
        )
        self._take_back(slot)
        slot.delivery = None  # another interruption would hit what sees to this one
        try:
            if slot.attempt is not None:
                return await self.engine.fail(slot.attempt, why)
            if slot.why is not None:
                await self._give_back(delivery)
        except asyncio.CancelledError:
            self._take_back(slot)
        except Exception:  # noqa: BLE001, S110  # the log is away
            pass
        return "released"  # or the lease will run out

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
        async with asyncio.TaskGroup() as renewals:
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
                    # Never awaited here: a queue that does not answer would keep all else from being watched.
                    if station.renewal is None or station.renewal.done():
                        due = [
                            held.delivery
                            for held in station.held.values()
                            if now - held.since >= station.lease / 3
                        ]
                        if due:
                            station.renewal = renewals.create_task(self._renew(station, due, now))

    def _watch_time(self, station: _Station, now: float) -> None:
        over = self.deadline.over(now)
        for slot in station.slots:
            if slot.delivery is None:
                continue
            if slot.why is not None:
                slot.interrupt(slot.why, now)
                self._give_up(station, slot, now)
            elif over:
                slot.interrupt(Interrupted(_cut_off(slot)), now)
            elif slot.attempt is not None and slot.attempt.waiting:
                slot.began = now  # for others: its time begins when that is over
            elif now - slot.began > station.timeout:
                slot.interrupt(
                    Retryable(f"the attempt took longer than its timeout of {station.timeout:g} s"), now
                )

    def _give_up(self, station: _Station, slot: Slot, now: float) -> None:
        """Keep the lease no longer, where a handler was told to end and has not: somebody else may try."""
        assert slot.delivery is not None
        if now - slot.since < PATIENCE or id(slot.delivery) not in station.held:
            return
        station.release(slot.delivery)
        if slot.attempt is not None:
            slot.attempt.lost = True
        logger.warning(
            "%s: its handler does not end though it was cancelled %d s ago; its lease is kept no longer: see "
            "that the handler's clean-up ends",
            slot.delivery.event.subject,
            now - slot.since,
        )

    def _beat(self, station: _Station, now: float) -> None:
        """Let the log say that silent attempts are at work, so that nobody takes them over."""
        for slot in station.slots:
            attempt, delivery = slot.attempt, slot.delivery
            if attempt is None or delivery is None:
                continue
            attempt.beat(now, station.lease / 2)
            if attempt.lost and slot.why is None:
                self._lost(station, delivery)

    async def _renew(self, station: _Station, due: Sequence[Delivery], now: float) -> None:
        try:
            async with asyncio.timeout(station.lease / 3):
                answers = await asyncio.gather(
                    *(delivery.extend(station.lease) for delivery in due), return_exceptions=True
                )
        except TimeoutError:
            return  # asked again at the next tick; a lease that runs out meanwhile is found lost then
        for delivery, answer in zip(due, answers, strict=True):
            held = station.held.get(id(delivery))
            if held is None:
                continue
            if answer is True:
                held.since = now
            elif answer is False:
                self._lost(station, delivery)

    def _lost(self, station: _Station, delivery: Delivery) -> None:
        now = self.engine.clock.monotonic()
        for place, waiting in enumerate(station.buffer):
            if waiting is delivery:
                del station.buffer[place]
                station.release(delivery)
                return
        for slot in station.slots:
            if slot.delivery is delivery:
                if slot.attempt is not None:
                    slot.attempt.lost = True
                if slot.why is None:
                    logger.warning("%s: its lease was lost, the attempt is given up", delivery.event.subject)
                    slot.interrupt(Fenced(f"the lease on {delivery.event.subject} was lost"), now)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    """What a slot that has ended failed with, if it did."""
    if task.cancelled():
        return RuntimeError(f"{task.get_name()} was cancelled, and nobody here did it")
    return task.exception()


def _cut_off(slot: Slot) -> str:
    """Why the attempt of `slot` does not reach a safe point any more."""
    doing = slot.attempt.doing if slot.attempt is not None else ""
    end = "the process had to end before the stage reached a safe point"
    return f"{end}: {doing}" if doing else end
