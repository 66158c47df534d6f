"""The engine: all delivery semantics, the same under a worker and under Lambda.

A delivery is a hint that a unit may be owed work; the log decides. What an attempt decides goes into one
commit with the versions it saw; a conflict means that somebody else decided first.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from flowlane import events
from flowlane.attempt import Attempt, Outcome
from flowlane.clock import Clock, rfc3339
from flowlane.committer import Committer
from flowlane.completion import complete, complete_after
from flowlane.deadline import Deadline, Interrupted
from flowlane.discovery import chunk
from flowlane.errors import ConfigError, Fenced, Permanent, Retryable, Superseded, VersionConflict
from flowlane.events import Event
from flowlane.handling import Handling
from flowlane.lane import Fact, Lane, Stage, Trigger, stream_of
from flowlane.marks import Marks
from flowlane.ports import (
    Append,
    Backend,
    Commit,
    Committed,
    Connections,
    Delivery,
)
from flowlane.reasons import describe, leaf
from flowlane.state import status
from flowlane.turns import Turns

if TYPE_CHECKING:
    from flowlane.pump import Slot

logger = logging.getLogger("flowlane")

#: Event types that only a running attempt appends: a young one means that somebody is at work.
_AT_WORK = frozenset(
    {
        events.ATTEMPT_STARTED,
        events.ATTEMPT_ALIVE,
        events.UPLOAD_OPENED,
        events.SPLIT_PROVEN,
        events.BATCH_WRITTEN,
        events.STEP_DONE,
        events.DISCOVERY_PROGRESS,
    }
)
_COMMIT_TRIES = 4
_CHANGES = 200
#: What ends more than the one attempt. All else that is no ``Exception`` is a unit's own trouble: a panic in
#: a library that is written in Rust, say.
_ENDS = (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit)


class Engine:
    """Handles deliveries of its lanes against one backend.

    ``handle`` never raises for what a stage does: a unit ends settled, dead, or owed to a later delivery.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        backend: Backend,
        connections: Connections,
        clock: Clock,
        *,
        quarantine: str = "",
    ) -> None:
        self.lanes = {lane.name: lane for lane in lanes}
        self.backend = backend
        self.connections = connections
        self.clock = clock
        self.committer = Committer(self)
        self.quarantine = quarantine  #: URI of the folder for bad records, where a stage's policy names none
        #: Every stage's queue, with its handling.
        self.queues: dict[str, Handling] = {}
        self._types: dict[tuple[str, str], Handling] = {}
        for lane in lanes:
            lane.check()
            for stage in lane.stages:
                handling = Handling(stage, chunk(len(lane.stages)))
                self.queues[stage.queue] = self._types[lane.name, stage.on] = handling
            self._connect(lane)
        self._prefix = clock.token()
        self.turns = Turns()
        self.copies = 0  #: under way, see ``landing``
        self.marks: defaultdict[str, Marks] = defaultdict(Marks)  #: by channel
        self.changes: deque[dict[str, str]] = deque(maxlen=_CHANGES)  #: see ``note_change``
        self._under_way: set[Attempt] = set()  # those that ``process`` handles at this moment
        self._count = 0
        self._stamp = ("", -1.0)
        #: Set and replaced whenever a run completes here: wakes who waits for one.
        self.moved = asyncio.Event()

    def _connect(self, lane: Lane) -> None:
        """Tell each stage of `lane` that may yield units which stage handles what it yields."""
        units = {
            stage.unit: self.queues[stage.queue] for stage in lane.stages if stage.on == stage.unit.unit_type
        }
        for stage in lane.stages:
            if stage.counted or stage.on == events.LANE_TRIGGERED:
                self.queues[stage.queue].yields = units

    # ------------------------------------------------------------------ names and events

    def handling(self, lane: str, kind: str) -> Handling | None:
        """The stage of `lane` that handles events of type `kind`."""
        return self._types.get((lane, kind))

    def handling_of(self, head: Event) -> Handling | None:
        """The stage that the open unit whose head is `head` is owed to."""
        return self.queues.get(f"{head.source}/{head.stage}")

    def next_id(self) -> str:
        """An event id that nobody else makes."""
        self._count += 1
        return f"{self._prefix}{self._count}"

    def stamp(self, now: float | None = None) -> str:
        """The wall time as it stands in events, to the millisecond; `now`: the monotonic clock's."""
        text, until = self._stamp
        if now is None:
            now = self.clock.monotonic()
        if now >= until:
            text = rfc3339(self.clock.now())
            self._stamp = (text, now + 0.001)
        return text

    def event(
        self, kind: str, origin: Event, *, version: int, data: msgspec.Raw, cause: str, stage: str
    ) -> Event:
        """An event of the stream, run and round of `origin`."""
        return Event(
            self.next_id(),
            origin.source,
            kind,
            origin.subject,
            self.stamp(),
            data,
            version,
            origin.run,
            origin.round,
            cause,
            stage,
            "",
            1,
            origin.traceparent,
            origin.partitionkey,
        )

    def note_change(self, run: str, unit: str, change: str) -> None:
        """A load changed its target beyond rows: the last of these are kept for reports; the log has more."""
        told = {"run": run, "unit": unit, "change": change}
        if told not in self.changes:
            self.changes.append(told)
            logger.info("%s: %s", unit, change, extra={"run": run, "unit": unit})

    # ------------------------------------------------------------------ triggering

    async def trigger(self, lane: str, slot: str, *, by: str = "run", event: Any = None) -> tuple[str, bool]:
        """Open the run of `lane` named by `slot`: its stream, and whether this call opened it.

        Raises:
            ConfigError: the log is missing, or may not be used: nothing was started.
            Retryable: the log is away; whether the run is open is unknown.
        """
        handling = self._types[lane, events.LANE_TRIGGERED]
        trigger = Trigger(slot=slot, by=by, at=self.stamp(), event=event)
        run = stream_of(lane, trigger)
        first = Event(
            self.next_id(),
            lane,
            events.LANE_TRIGGERED,
            run,
            self.stamp(),
            msgspec.Raw(events.encode_data(trigger)),
            1,
            run,
            0,
            _attribute(event, "id"),
            handling.stage.name,
            handling.cut,
            1,
            _attribute(event, "traceparent"),
        )
        opening = Commit((Append(run, 0, (first,)),), (handling.publish(first),))
        try:
            result = await self.commit(opening)
        except Retryable as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            raise
        return run, not isinstance(result, VersionConflict)

    # ------------------------------------------------------------------ committing

    async def commit(self, commit: Commit, *, unsure: bool = False) -> Committed | VersionConflict:
        """Commit, and find out what became of it where the answer was lost; `unsure`: it has been tried
        before, and nobody knows with what success.

        Raises:
            Retryable: it is still unknown, or certain not to have been applied.
        """
        own = commit.appends[0].events[0] if commit.appends else None
        error: Exception | None = None
        for tried in range(_COMMIT_TRIES):
            try:
                result = await self.committer.commit(commit)
                if not (unsure and own is not None and isinstance(result, VersionConflict)):
                    return result
                # It may be in conflict with itself: the answer to an earlier try was lost.
                return await self.look_up(own) or result
            except Permanent:
                raise
            except Exception as raised:  # noqa: BLE001  # whatever it was, the log knows the truth
                error, unsure = raised, True
            with suppress(Exception):  # the log is away: try again
                known = await self.look_up(own)
                if known is not None:
                    return known
            if tried < _COMMIT_TRIES - 1:
                await self.clock.sleep(0.05 * 2**tried * self.clock.random())
        assert error is not None
        raise Retryable(f"the log did not take a commit: {describe(error)}") from error

    async def look_up(self, own: Event | None) -> Committed | VersionConflict | None:
        """What became of the commit whose own event is `own`: it was applied, or something else was in its
        place, or (``None``) nothing is there."""
        if own is None:
            return None
        async for found in self.backend.read(own.subject, after=own.version - 1):
            if found.id == own.id:
                return Committed()
            last = await self.backend.last([own.subject])
            return VersionConflict({own.subject: last[own.subject].version})
        return None

    # ------------------------------------------------------------------ handling one delivery

    async def process(self, delivery: Delivery, deadline: Deadline, slot: Slot) -> Attempt | Outcome:
        """Handle one delivery up to, and not including, its last commit.

        Returns the attempt, whose last commit has been handed to the committer, or the outcome where there
        was none to make. Cancellation passes through.
        """
        handling = self.queues.get(delivery.stage)
        head = delivery.head
        if handling is None or head is None:
            return "failed"
        event = delivery.event
        if head.version > 1 and status(head) != "open":  # no stream ends with its first event
            await self.repeat_obligations(head)
            await delivery.ack()
            return "settled"
        attempt = Attempt(self, handling, delivery, head, deadline)
        attempt.began = slot.began
        try:
            if delivery.attempt > 1 or head.version != event.version:
                wait = self.at_work(head, handling.stage)
                if wait > 0 and not self._was_ours(head):
                    await delivery.nack(delay=wait)
                    return "released"
                self._under_way.add(attempt)
                commit = await self._take_over(attempt)
                if commit is not None:
                    self.committer.submit(commit, attempt)
                    return attempt
            first = head if head.version == 1 else await self._first(head.subject)
            attempt.event = handling.typed(first)
            self._under_way.add(attempt)
            slot.attempt = attempt
            if handling.generator:
                await self._discover(handling, attempt)
            elif (result := await handling.handler(attempt.event, attempt)) is not None:
                raise Permanent(
                    f"stage {handling.name} returned {result!r:.60}: return nothing; yield the units you find"
                )
            if attempt.beating is not None or attempt.unsure is not None:
                await attempt.hush()
            attempt.outcome = "settled"
            self.committer.submit(attempt.conclude(attempt.kind), attempt)
            return attempt
        except _ENDS:
            raise
        except BaseException as error:  # noqa: BLE001  # a stage may raise anything; see ``leaf``
            return await self._failed(attempt, slot.attempt is not None, error)
        finally:
            self._under_way.discard(attempt)

    async def _failed(self, attempt: Attempt, begun: bool, error: BaseException) -> Attempt | Outcome:
        if begun or isinstance(error, Permanent | ConfigError | Fenced):
            return await self.fail(attempt, error)
        # Log or queue are away. Nothing was attempted, so nothing failed: the lease runs out.
        logger.warning("%s is left for later: %s", attempt.unit, describe(error))
        return "released"

    def _was_ours(self, head: Event) -> bool:
        """Whether the attempt that `head` tells of was made here, and is over: no reason to wait for it."""
        return head.id.startswith(self._prefix) and all(
            attempt.unit != head.subject for attempt in self._under_way
        )

    def at_work(self, head: Event, stage: Stage) -> float:
        """How long to leave the unit alone, seconds. A courtesy, not a lock: versions decide who may commit,
        so a wrong clock costs a repetition at worst."""
        if head.type not in _AT_WORK:
            return 0.0
        lease = float(stage.policy.lease)
        age = self.clock.now().timestamp() - _seconds(head.time)
        return lease - age + 0.01 if 0 <= age < lease else 0.0

    async def _take_over(self, attempt: Attempt) -> Commit | None:
        """Count the attempt before it begins, since the last one may have killed its process."""
        allowed = attempt.stage.policy.retries + 1
        if attempt.progress.attempt >= allowed:
            reason = (
                attempt.progress.reason or "the process died, ran out of memory or lost its lease each time"
            )
            return attempt.conclude("unit.dead", f"{allowed} attempts did not finish: {reason}")
        await attempt.start()
        return None

    async def _first(self, stream: str) -> Event:
        async for event in self.backend.read(stream):
            return event
        raise Permanent(f"the stream {stream} has lost its first event")

    async def _discover(self, handling: Handling, attempt: Attempt) -> None:
        found = handling.handler(attempt.event, attempt)
        findings, clock, deadline = attempt.findings, self.clock, attempt.deadline
        try:
            async for item in found:
                if type(item) not in handling.yields and isinstance(item, Fact):
                    await findings.conclude(attempt, item)
                    now = clock.monotonic()
                else:
                    now = clock.monotonic()
                    findings.add(attempt, item, now)
                if findings.due(now) or attempt.lost or now >= deadline.nears:
                    await attempt.flush()
                    if attempt.near_deadline():
                        raise Interrupted(f"{attempt.progress.children:,} units registered so far")
        except BaseException:
            await found.aclose()
            raise

    # ------------------------------------------------------------------ when it goes wrong

    async def fail(self, attempt: Attempt, error: BaseException) -> Attempt | Outcome:
        """What becomes of a unit whose attempt ended with `error`; hands the commit to the committer."""
        error = leaf(error)
        await attempt.hush()
        now = attempt.progress
        policy = attempt.stage.policy
        if isinstance(error, Fenced) and await self._overtaken(attempt, error):
            return await self.conflict(attempt.delivery)
        commit: Commit
        if isinstance(error, Interrupted):
            # An attempt that began just before the deadline has not had its chance: no hop is counted for it.
            fair = self.clock.monotonic() - attempt.began >= attempt.deadline.margin
            now.hops = 0 if attempt.moved else now.hops + fair
            if now.hops > policy.hops:
                commit = self._dead(attempt, f"no progress in {policy.hops} continuations in a row: {error}")
            else:
                now.attempt = max(0, now.attempt - 1) if attempt.started else now.attempt
                attempt.outcome = "continued"
                commit = attempt.postpone(events.ATTEMPT_CONTINUED, 0.0)
        elif isinstance(error, Superseded):
            attempt.outcome = "settled"
            commit = attempt.conclude("unit.superseded", describe(error))
        elif isinstance(error, Permanent | ConfigError | Fenced):
            commit = self._dead(attempt, describe(error))
        else:
            if not attempt.started or now.attempt == 0:
                now.attempt += 1
            if now.attempt > policy.retries:
                commit = self._dead(attempt, describe(error))
            else:
                delay = policy.delay(now.attempt, self.clock.random())
                if isinstance(error, Retryable) and error.delay is not None:
                    delay = max(delay, min(error.delay, float(policy.backoff_cap)))
                attempt.outcome = "retried"
                commit = attempt.postpone(events.ATTEMPT_FAILED, delay, describe(error))
        self._tell(attempt, error)
        self.committer.submit(commit, attempt)
        return attempt

    def _tell(self, attempt: Attempt, error: BaseException) -> None:
        level = logging.WARNING if attempt.outcome == "dead" else logging.INFO
        if logger.isEnabledFor(level):
            about = {"lane": attempt.lane, "run": attempt.run, "stage": attempt.stage.name}
            about["unit"] = attempt.unit
            logger.log(level, "%s %s: %s", attempt.unit, attempt.outcome, describe(error), extra=about)
            if not isinstance(error, Interrupted | Fenced):
                logger.debug("%s: what ended its attempt", attempt.unit, exc_info=error, extra=about)

    def _dead(self, attempt: Attempt, reason: str) -> Commit:
        attempt.outcome = "dead"
        return attempt.conclude("unit.dead", reason)

    async def _overtaken(self, attempt: Attempt, error: Fenced) -> bool:
        """Whether the log says that another attempt has the unit, or has moved on a fact that this one wanted
        to; a refusal without that is permanent."""
        if attempt.lost or (isinstance(error, VersionConflict) and attempt.findings.has_facts):
            return True
        head = (await self.backend.last([attempt.unit])).get(attempt.unit)
        return head is None or head.version != attempt.version

    async def conflict(self, delivery: Delivery) -> Outcome:
        """Somebody else decided first: if the unit has ended, see that what it owes is done; otherwise leave
        the delivery to come again, since whoever decided may die before the end."""
        stream = delivery.event.subject
        head = (await self.backend.last([stream])).get(stream)
        if head is not None and status(head) != "open":
            await self.repeat_obligations(head)
            await delivery.ack()
            return "settled"
        stage = self.queues[delivery.stage].stage
        logger.debug("%s: somebody else decided first; left alone for now", stream)
        await delivery.nack(delay=stage.policy.delay(1, self.clock.random()))
        return "conflict"

    async def resolve(
        self, commit: Commit, attempt: Attempt, result: Committed | VersionConflict | BaseException
    ) -> None:
        """See a last commit through that did not simply succeed, and do what a success owes."""
        try:
            await self._see_through(commit, attempt, result)
        except Exception:  # noqa: BLE001  # the log is away; the lease will run out and the unit come again
            logger.warning("%s: its end is not logged yet, the log does not answer", attempt.unit)
            attempt.outcome = "released"

    async def _see_through(
        self, commit: Commit, attempt: Attempt, result: Committed | VersionConflict | BaseException
    ) -> None:
        try:
            lost = isinstance(result, BaseException) and not isinstance(result, VersionConflict)
            if lost:
                result = await self.commit(commit, unsure=True)
            while isinstance(result, VersionConflict):
                commit = attempt.end_again(result)
                result = await self.commit(commit)
            assert isinstance(result, Committed)
            if attempt.again >= 0:
                await self._give_back(attempt)
            elif lost:
                await attempt.delivery.ack()  # of a queue that does not commit along with the log
            await complete_after(self, commit, result)
        except VersionConflict:
            attempt.outcome = await self.conflict(attempt.delivery)
        except Permanent as error:
            await self._refused(attempt, error)

    async def _give_back(self, attempt: Attempt) -> None:
        """The delivery stays at the head of its group and comes again, when it is due or its lease ends."""
        try:
            await attempt.delivery.nack(delay=attempt.again)
        except Exception as error:  # noqa: BLE001  # the queue is away; the lease will run out
            logger.debug("%s: its delivery is not given back: %s", attempt.unit, describe(error))

    async def _refused(self, attempt: Attempt, error: Permanent) -> None:
        """The log will never take what the attempt decided (an event is too long, say): the unit is dead,
        with the progress that the log does hold."""
        head = (await self.backend.last([attempt.unit]))[attempt.unit]
        if head.version != attempt.version:
            attempt.outcome = await self.conflict(attempt.delivery)
            return
        attempt.outcome = "dead"
        commit = attempt.renounce(head, describe(error))
        result = await self.commit(commit)
        if isinstance(result, VersionConflict):
            attempt.outcome = await self.conflict(attempt.delivery)
        else:
            await complete_after(self, commit, result)

    async def repeat_obligations(self, head: Event) -> None:
        """Do again what the end of a unit owed: the check whether its run is complete."""
        if head.run:
            await complete(self, head.run, head.round)


def _attribute(event: Any, name: str) -> str:
    """The text that an outer event (decoded JSON, or an ``Event``) has under `name`; empty without one."""
    value = event.get(name) if isinstance(event, Mapping) else getattr(event, name, None)
    return value if isinstance(value, str) else ""


def _seconds(time: str) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return 0.0


__all__ = ["Engine", "describe"]
