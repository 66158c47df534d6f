"""The conveyor: deliveries of a stage that come through a channel.

A batch of a channel holds one partition, and the partition's next batch comes when all of this one is done.
Of a batch the records of one key are handed out one after the other, those of different keys beside one
another. What is retried, or goes on later, keeps its place: its key waits. The position is an optimisation;
the log decides what becomes of each unit, as everywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Any

import msgspec

from flowlane import events
from flowlane.committer import ordinary
from flowlane.engine import Engine
from flowlane.errors import ConfigError, Permanent
from flowlane.events import Event
from flowlane.handling import Handling
from flowlane.parking import park, refusal, stray
from flowlane.ports import ChannelBatch, ChannelRecord, Delivery
from flowlane.reasons import describe

logger = logging.getLogger("flowlane")

#: The name under which a stage consumes its channel.
CONSUMER = "stage"
#: Records in a batch, for each unit that is handled at once and at most; and records not done that are held,
#: beyond which no further partition is asked for.
_EACH = 32
_BATCH = 512
_HELD = 8 * _BATCH
#: Seconds after which a hold is renewed (the channel knows how long it is, and writes no more than it must),
#: and for which the channel's answer to that is waited for.
_KEEP = 1.0
_PATIENCE = 10.0
#: Longer than any process lives: what an iteration holds is lost when it ends.
_FOREVER = 1e9
#: Bytes of events decoded before the loop gets its turn.
_SLICE = 1 << 20


class _Line:
    """The records of one key in a batch that are not done, in order, by their places in it. The first of them
    is at work (as `delivery`), or due, or will be."""

    __slots__ = ("attempt", "belt", "delivery", "places")

    def __init__(self, belt: _Belt) -> None:
        self.belt = belt
        self.places: deque[int] = deque()
        self.attempt = belt.attempt  #: of the first
        self.delivery: ChannelDelivery | None = None

    @property
    def record(self) -> ChannelRecord:
        """The first one."""
        return self.belt.batch.records[self.places[0]]


class _Belt:
    """A batch that is being worked off. `attempt`: what is known of how often its records were handed out."""

    __slots__ = ("attempt", "batch", "busy", "done", "left", "lines", "lost", "renewed", "tried")

    def __init__(self, batch: ChannelBatch, attempt: int, now: float) -> None:
        self.batch = batch
        self.attempt = attempt
        self.left = len(batch.records)
        self.done = bytearray(self.left)
        self.lost = False
        self.busy = False  # it is being renewed or settled
        self.renewed = now
        self.tried = False  # to settle it
        self.lines: dict[str, _Line] = {}
        for place, record in enumerate(batch.records):
            line = self.lines.get(record.key)
            if line is None:
                line = self.lines[record.key] = _Line(self)
            line.places.append(place)

    @property
    def partition(self) -> int:
        """Whose records they are."""
        return self.batch.records[0].partition

    @property
    def prefix(self) -> int:
        """How many of the first records are done."""
        end = self.done.find(0)
        return len(self.done) if end < 0 else end


class ChannelDelivery(msgspec.Struct, eq=False):
    """See ``ports.Delivery``; ``open`` until it is acked, nacked or left."""

    event: Event
    stage: str
    attempt: int
    head: Event | None
    line: _Line
    conveyor: Conveyor
    open: bool = True

    async def ack(self) -> None:
        """It is the turn of the next record of its key."""
        if self.open:
            self.conveyor.finish(self)

    async def nack(self, *, delay: float = 0) -> None:
        """The record keeps its place, and its key waits."""
        if self.open:
            self.conveyor.postpone(self, delay)

    async def extend(self, seconds: float) -> bool:
        """Whether the hold on its partition stands: ``Conveyor.tend`` renews it."""
        return not self.line.belt.lost


class Conveyor:
    """Hands out what the channel of one stage brings; `lost` is told of deliveries whose hold is lost.

    ``receive`` is called by one task at a time, while ``tend`` runs; ``close`` when nothing is at work any
    more.
    """

    def __init__(self, engine: Engine, handling: Handling, lost: Callable[[Delivery], None]) -> None:
        self._engine = engine
        self._handling = handling
        self._lost = lost
        self._limit = min(_BATCH, _EACH * handling.stage.policy.concurrency)
        self._channel = engine.backend.channel(handling.queue)
        self._batches: AsyncIterator[ChannelBatch] | None = None
        self._next: asyncio.Task[ChannelBatch | None] | None = None
        self._belts: dict[_Belt, None] = {}  # in order
        self._ready: deque[_Line] = deque()
        self._delayed: list[tuple[float, int, _Line]] = []
        self._count = 0  # breaks ties in the heap
        self._settled: set[int] = set()  # partitions of which this iteration has settled a batch
        self._wakes: set[asyncio.Future[None]] = set()
        self._refused: ConfigError | None = None  # why holds and positions will never be logged again

    # ------------------------------------------------------------------ handing out

    async def receive(self, limit: int, wait: float) -> Sequence[Delivery]:
        """At most `limit` deliveries whose turn it is, waited for up to `wait` seconds. Another partition is
        begun where those that were do not give as many.

        Raises:
            ConfigError: there is no such channel, or the log takes no commits.
            Retryable: log or channel are away; what was handed out may have been lost by that.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        while True:
            if (refused := self._refused or self._engine.committer.refused) is not None:
                raise refused
            self._take()
            self._promote()
            if self._ready:
                if got := await self._hand_out(limit):
                    return got
                continue
            left = end - loop.time()
            if left <= 0:
                return []
            self._ask()
            if self._delayed:
                left = min(left, self._delayed[0][0] - self._engine.clock.monotonic())
            await self._wait(max(0.001, left), [] if self._next is None else [self._next])

    def _ask(self) -> None:
        """Ask for the next batch, if there is room for one."""
        if self._next is None and sum([belt.left for belt in self._belts]) < _HELD:
            if self._batches is None:
                self._batches = self._channel.consume(CONSUMER, limit=self._limit, wait=_FOREVER)
            # Not awaited here: to be cancelled would end the iteration, and with it the holds on what is
            # still being worked off.
            self._next = asyncio.create_task(
                _following(self._batches), name=f"channel {self._handling.queue}"
            )

    def _take(self) -> None:
        """Begin the batch that has come, if one has."""
        if self._next is None or not self._next.done():
            return
        coming, self._next = self._next, None
        try:
            batch = coming.result()
        except BaseException:
            self._end()
            raise
        if batch is None:
            self._end()
            return
        # Nobody counts for how often a record was handed out. The first batch of a partition may have been
        # somebody's who died of it, so its attempts are logged before they begin, as a queue's second ones.
        attempt = 1 if batch.records[0].partition in self._settled else 2
        belt = _Belt(batch, attempt, self._engine.clock.monotonic())
        for other in [each for each in self._belts if each.partition == belt.partition and each.left]:
            self._lose(other)  # a partition is held once
        self._belts[belt] = None
        self._ready.extend(belt.lines.values())

    def _end(self) -> None:
        """The iteration has ended, and holds nothing any more; the next one begins anew."""
        self._batches = None
        self._settled.clear()
        for belt in list(self._belts):
            self._lose(belt)

    def _promote(self) -> None:
        now = self._engine.clock.monotonic()
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heappop(self._delayed)[2])

    async def _hand_out(self, limit: int) -> Sequence[Delivery]:
        """Deliveries of the first lines that are ready; of their records, those that are no events of the
        stage are parked instead."""
        lines: list[_Line] = []
        while self._ready and len(lines) < limit:
            line = self._ready.popleft()
            if not line.belt.lost:
                lines.append(line)
        try:
            found = await self._read(lines)
            heads = await self._engine.backend.last(
                list({event.subject: None for event in found.values() if isinstance(event, Event)})
            )
            fit: list[tuple[_Line, Event, Event]] = []
            for line, event in found.items():
                head = heads.get(event.subject) if isinstance(event, Event) else None
                wrong = (
                    event if isinstance(event, str) else refusal(self._engine, self._handling, event, head)
                )
                if not wrong and isinstance(event, Event) and head is not None:
                    fit.append((line, event, head))
                elif head is None and isinstance(event, Event) and self._may_pass(line):
                    lines.remove(line)
                    self._put_off(line, self._backoff(line))
                else:
                    await park(self._engine, self._handling, line.record, wrong)
                    lines.remove(line)
                    self._advance(line)
        except BaseException:
            self._ready.extendleft(reversed(lines))
            raise
        return [self._deliver(*each) for each in fit if not each[0].belt.lost]

    async def _read(self, lines: Iterable[_Line]) -> dict[_Line, Event | str]:
        """Of each line the event that is its first record, or why that is none."""
        found: dict[_Line, Event | str] = {}
        size = 0
        for line in lines:
            data = line.record.data
            size += len(data)
            if size > _SLICE:
                size = 0
                await self._engine.clock.sleep(0)
            try:
                event = events.decode(data)
            except Permanent as error:
                found[line] = str(error)
            else:
                found[line] = stray(self._handling, event) or event
        return found

    def _may_pass(self, line: _Line) -> bool:
        """Whether a stream that the log does not know may be known to it later, as far as the stage's budget
        goes: the log may have been restored to what it was a while ago, and be on its way."""
        tried = line.attempt - line.belt.attempt
        return tried < self._handling.stage.policy.retries

    def _backoff(self, line: _Line) -> float:
        tried = line.attempt - line.belt.attempt
        return self._handling.stage.policy.delay(tried + 1, self._engine.clock.random())

    def _deliver(self, line: _Line, event: Event, head: Event) -> Delivery:
        delivery = ChannelDelivery(event, self._handling.queue, line.attempt, head, line, self)
        line.delivery = delivery
        return delivery

    # ------------------------------------------------------------------ what becomes of it

    def finish(self, delivery: ChannelDelivery) -> None:
        """The record of `delivery` is done."""
        delivery.open = False
        delivery.line.delivery = None
        self._advance(delivery.line)

    def postpone(self, delivery: ChannelDelivery, delay: float) -> None:
        """The record of `delivery` comes again after `delay` seconds."""
        delivery.open = False
        delivery.line.delivery = None
        self._put_off(delivery.line, delay)

    def released(self, delivery: Delivery) -> None:
        """Nobody works on `delivery` any more. If nothing was decided, since log or channel are away, the
        record comes again as if its lease had run out."""
        if isinstance(delivery, ChannelDelivery) and delivery.open:
            self.postpone(delivery, float(self._handling.stage.policy.lease))

    def _advance(self, line: _Line) -> None:
        belt = line.belt
        belt.done[line.places.popleft()] = 1
        belt.left -= 1
        line.attempt = belt.attempt
        if line.places and not belt.lost:
            self._ready.append(line)
        if line.places or not belt.left:
            self._kick()

    def _put_off(self, line: _Line, delay: float) -> None:
        line.attempt += 1
        if not line.belt.lost:
            self._count += 1
            heappush(self._delayed, (self._engine.clock.monotonic() + delay, self._count, line))
            self._kick()

    def _lose(self, belt: _Belt) -> None:
        """The hold on `belt` is lost: another one has the records that are not settled."""
        belt.lost = True
        self._belts.pop(belt, None)
        for line in belt.lines.values():
            if line.delivery is not None:
                self._lost(line.delivery)

    # ------------------------------------------------------------------ waiting

    def _kick(self) -> None:
        for wake in self._wakes:
            if not wake.done():
                wake.set_result(None)

    async def _wait(self, seconds: float, besides: Sequence[asyncio.Task[ChannelBatch | None]] = ()) -> None:
        """Return when something has become of a record, or one of `besides` is done, or after `seconds`."""
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wakes.add(wake)
        awaited: list[asyncio.Future[Any]] = [wake, *besides]
        try:
            await asyncio.wait(awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._wakes.discard(wake)

    # ------------------------------------------------------------------ holding and settling

    async def tend(self) -> None:
        """Settle what is done, and keep the holds on the rest, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                if self._next is not None and self._next.done() and _failure(self._next) is None:
                    self._take()  # it is held as of now, though there may be no room for it for long
                now = self._engine.clock.monotonic()
                for belt in self._belts:
                    # What could not be settled is tried again a while later, as what could not be renewed.
                    due = not belt.busy and now - belt.renewed >= (_KEEP if belt.left or belt.tried else 0)
                    if due:
                        belt.busy, belt.renewed = True, now
                        tasks.create_task(self._renew(belt) if belt.left else self._settle(belt))
                await self._wait(_KEEP / 2)

    async def _renew(self, belt: _Belt) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                held = await belt.batch.extend()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # asked again in a while
            logger.debug("channel %s: a hold is not renewed: %s", self._handling.queue, ordinary(error))
            self._note(error)
        else:
            if not held and not belt.lost:
                logger.warning(
                    "channel %s: partition %d was lost to another consumer; what is not settled of it is "
                    "handled there",
                    self._handling.queue,
                    belt.partition,
                )
                self._lose(belt)
        finally:
            belt.busy = False
            self._kick()  # all of it may be done by now

    async def _settle(self, belt: _Belt) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await belt.batch.settle()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # tried again in a while
            known = describe(ordinary(error))
            logger.warning("channel %s: its position is not settled yet: %s", self._handling.queue, known)
            belt.tried = True
            self._note(error)
        else:
            self._settled.add(belt.partition)
            self._belts.pop(belt, None)
        finally:
            belt.busy = False
            self._kick()  # there is room for the next

    def _note(self, error: BaseException) -> None:
        """Where it is for good, whoever receives next is told, and ends: it would be tried for ever."""
        if isinstance(error, ConfigError):
            self._refused = error

    async def close(self) -> None:
        """Settle what is done as far as nothing before it is not, and let go of the rest."""
        belts, self._belts = self._belts, {}
        begun = [belt for belt in belts if belt.prefix]
        try:
            answers = await asyncio.gather(
                *(belt.batch.settle(belt.prefix) for belt in begun), return_exceptions=True
            )
        finally:
            if self._next is not None:
                self._next.cancel()
        for error in answers:
            if isinstance(error, Exception):
                logger.warning(
                    "channel %s: what is done comes once more, its position is not settled: %s",
                    self._handling.queue,
                    describe(error),
                )
        if self._next is not None:
            await asyncio.wait([self._next])
            if not self._next.cancelled():
                self._next.exception()  # whatever it was: nobody asks for it any more
        close = getattr(self._batches, "aclose", None)
        if close is not None:
            await close()


def _failure(task: asyncio.Task[ChannelBatch | None]) -> BaseException | None:
    """What `task`, which is done, failed with, if it did."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def _following(batches: AsyncIterator[ChannelBatch]) -> ChannelBatch | None:
    """The next of `batches`; nothing if it was the last."""
    return await anext(batches, None)
