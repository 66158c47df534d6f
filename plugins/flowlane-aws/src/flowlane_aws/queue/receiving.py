"""Receiving: messages of SQS queues as the events that they are about."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any, Final

import msgspec

from flowlane.clock import Clock
from flowlane.errors import ConfigError, FlowlaneError, Permanent, Retryable
from flowlane.events import Event, Reference
from flowlane_aws.bounded import each
from flowlane_aws.clients import PATIENCE
from flowlane_aws.queue.lookup import Lookup, Queue
from flowlane_aws.queue.message import read
from flowlane_aws.queue.sending import BATCH

logger = logging.getLogger("flowlane")

#: Seconds for which SQS hides a message from its receive on, at most (ReceiveMessage, VisibilityTimeout).
LONGEST_LEASE: Final = 43_200
#: Seconds for which SQS waits for a message, at most (ReceiveMessage, WaitTimeSeconds).
_LONGEST_POLL: Final = 20
#: Seconds that several queues are waited for at once: none keeps the others' messages waiting longer.
_TURN: Final = 1
#: Seconds that are not worth another call.
_MOMENT: Final = 0.05
#: Seconds that are waited for a poll that should have ended, and for its messages to be given back.
_OVERDUE: Final = 2
#: Calls that follow at once where the first brought all that one can.
_BURST: Final = 8
#: Seconds that whoever was handed a dead letter has for it, before it is handed out again.
_HOLD: Final = 300
_ATTRIBUTES: Final = ("ApproximateReceiveCount",)

#: Finds the event that a reference is to; ``None``: the log does not have it.
Resolve = Callable[[Reference], Awaitable[Event | None]]


class Received(msgspec.Struct, eq=False):
    """A message about `event`, for `stage`, received for the `attempt`-th time (a dead letter: given up after
    so many), and hidden from others from `since` to `until`, by this process's own clock."""

    stage: str
    event: Event
    attempt: int
    queue: Queue
    id: str
    receipt: str
    since: float
    until: float


class Receiver:
    """Receives from the queues of stages; see ``queue.Queues``."""

    def __init__(
        self,
        client: Any,
        lookup: Lookup,
        clock: Clock,
        resolve: Resolve,
        tasks: asyncio.TaskGroup | None = None,
    ) -> None:
        self._client = client
        self._lookup = lookup
        self._clock = clock
        self._resolve = resolve
        self._tasks = tasks
        self._turn = 0
        self._told: set[str] = set()  # stages whose dead letters cannot be asked for

    # ------------------------------------------------------------------ deliveries

    async def receive(
        self, stages: Sequence[str], limit: int, *, lease: float, wait: float
    ) -> Sequence[Received]:
        """See ``queue.Queues.receive``."""
        if not stages or limit <= 0:
            return []
        self._turn = (self._turn + 1) % len(stages)  # another stage comes first each time: none starves
        queues = [await self._lookup.queue(s) for s in (*stages[self._turn :], *stages[: self._turn])]
        end = self._clock.monotonic() + wait
        while True:
            got = await self._round(queues, limit, lease, end - self._clock.monotonic())
            left = end - self._clock.monotonic()
            if got or left <= _MOMENT:
                return got
            if left < 1 or limit < len(queues):  # SQS, which counts in seconds, is not asked to wait
                await self._clock.sleep(min(left, _TURN))

    async def _round(
        self, queues: Sequence[Queue], limit: int, lease: float, left: float
    ) -> Sequence[Received]:
        """Ask every queue once, for even shares of what is left of `limit`."""
        poll = 0
        if limit >= len(queues):
            poll = max(0, min(int(left + _MOMENT), _LONGEST_POLL if len(queues) == 1 else _TURN))
        got: list[Received] = []
        pending = list(queues)
        while pending and len(got) < limit:
            now, pending = pending[: limit - len(got)], pending[limit - len(got) :]
            share = (limit - len(got)) // len(now)
            got += await _all([partial(self._share, queue, share, lease, poll) for queue in now])
        return got

    async def _share(self, queue: Queue, share: int, lease: float, poll: int) -> Sequence[Received]:
        """Up to `share` messages: those of one call and, if it brought all that one can, of several more."""
        # One call to a FIFO queue may bring several of one group, of which only the first is to be handed
        # out; giving the others back would count as receives of theirs.
        most = 1 if queue.ordered else BATCH
        got = [*await self._read(queue, min(share, most), lease, poll)]
        left = share - len(got)
        if len(got) == most and left > 0:
            sizes = [min(most, left - n * most) for n in range(min(_BURST, ceil(left / most)))]
            got += await _all([partial(self._read, queue, size, lease, 0) for size in sizes])
        return got

    async def _read(self, queue: Queue, size: int, lease: float, poll: int) -> Sequence[Received]:
        """What one call brings; what of it cannot be read is logged, and left to the queue to give up."""
        got: list[Received] = []
        messages = await self._call(queue, size, whole(lease), poll)
        now = self._clock.monotonic()  # their leases run while what they refer to is looked up
        for message in messages:
            try:
                got.append(await self._received(queue, message, whole(lease), now))
            except (Permanent, Retryable) as error:
                logger.warning("message %s of queue %s is left: %s", message["MessageId"], queue.name, error)
        return got

    async def _call(self, queue: Queue, size: int, hidden: int, poll: int) -> Sequence[Mapping[str, Any]]:
        if not poll or self._tasks is None:
            return await self._ask(queue, size, hidden, poll)
        asking = asyncio.ensure_future(self._ask(queue, size, hidden, poll))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._tasks.create_task(self._return(queue, asking, poll), name="flowlane-aws poll")
            raise

    async def _return(
        self, queue: Queue, asking: asyncio.Task[Sequence[Mapping[str, Any]]], poll: int
    ) -> None:
        """Have what a poll brings that nobody waits for any more handed out again at once. SQS may not notice
        that a client has gone: until the poll ends, it may give messages to nobody, hidden for a lease."""
        try:
            async with asyncio.timeout(poll + _OVERDUE):
                messages = await asking
        except Exception:  # noqa: BLE001  # none came, or their leases run out; nobody is there to be told
            return
        entries = [
            {"Id": str(n), "ReceiptHandle": message["ReceiptHandle"], "VisibilityTimeout": 0}
            for n, message in enumerate(messages)
        ]
        if not entries:
            return
        try:
            async with self._lookup.asking(queue, "giving back messages of", seconds=_OVERDUE):
                await self._client.change_message_visibility_batch(QueueUrl=queue.url, Entries=entries)
        except FlowlaneError as error:
            logger.warning("%d messages come again when their leases end: %s", len(entries), error)

    async def _ask(self, queue: Queue, size: int, hidden: int, poll: int) -> Sequence[Mapping[str, Any]]:
        async with self._lookup.asking(queue, "receiving from", seconds=poll + PATIENCE):
            answer = await self._client.receive_message(
                QueueUrl=queue.url,
                MaxNumberOfMessages=size,
                WaitTimeSeconds=poll,
                VisibilityTimeout=hidden,
                MessageSystemAttributeNames=_ATTRIBUTES,
            )
            return answer.get("Messages") or ()

    async def _received(self, queue: Queue, message: Mapping[str, Any], hidden: int, now: float) -> Received:
        """Raises:
        Permanent: nobody can tell what the message is about.
        Retryable: the log, which can, is away.
        """
        found = read(message["Body"])
        if isinstance(found, Reference):
            event = await self._resolve(found)
            if event is None or event.id != found.id:
                raise Permanent("it refers to an event that the log does not have")
            found = event
        count = int(message.get("Attributes", {}).get("ApproximateReceiveCount", 1))
        name, receipt = message["MessageId"], message["ReceiptHandle"]
        return Received(queue.stage, found, count, queue, name, receipt, now, now + hidden)

    # ------------------------------------------------------------------ dead letters

    async def given_up(self, stages: Sequence[str], limit: int) -> Sequence[Received]:
        """See ``queue.Queues.given_up``."""
        if not stages or limit <= 0:
            return []
        self._turn = (self._turn + 1) % len(stages)
        got: list[Received] = []
        for stage in (*stages[self._turn :], *stages[: self._turn]):
            if len(got) < limit:
                got += await self._dead_letters(stage, limit - len(got))
        return got

    async def _dead_letters(self, stage: str, limit: int) -> Sequence[Received]:
        try:
            dead = await self._lookup.dead(stage)
        except ConfigError as error:
            if stage not in self._told:
                self._told.add(stage)
                logger.warning("what the queue of stage %s gives up cannot be seen: %s", stage, error)
            return []
        got: list[Received] = []
        unreadable: list[str] = []
        while len(got) + len(unreadable) < limit:
            messages = await self._call(dead, min(BATCH, limit - len(got) - len(unreadable)), _HOLD, 0)
            if not messages:
                break
            now = self._clock.monotonic()
            for message in messages:
                try:
                    got.append(await self._received(dead, message, _HOLD, now))
                except Permanent as error:
                    unreadable.append(f"{message['MessageId']}: {error}")
        if unreadable:
            logger.warning(
                "queue %s holds %d messages that cannot be read and are left there (%s): look at them, then "
                "delete them or purge the queue",
                dead.name,
                len(unreadable),
                unreadable[0],
            )
        if got:
            given = (await self._lookup.limits(await self._lookup.queue(stage))).receives
            for received in got:
                received.attempt = given or received.attempt
        return got


async def _all(calls: Sequence[Callable[[], Coroutine[Any, Any, Sequence[Received]]]]) -> list[Received]:
    """What all of them bring. One that SQS does not answer counts only where no other brings anything: what
    was received is hidden from everybody else."""
    got: list[Received] = []
    errors: list[Exception] = []
    for answer in await each(calls):
        if isinstance(answer, Exception):
            errors.append(answer)
        else:
            got += answer
    fatal = [error for error in errors if not isinstance(error, Retryable)]
    if fatal or (errors and not got):
        raise (fatal or errors)[0]
    return got


def whole(lease: float) -> int:
    """Seconds as SQS counts them: `lease` at least, as far as it goes."""
    return min(max(1, ceil(lease)), LONGEST_LEASE)
