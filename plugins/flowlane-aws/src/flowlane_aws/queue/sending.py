"""Publishing: deliveries as batches of SQS messages, of which those that failed are sent again alone.

A batch holds at most 10 messages and 1 MiB (SQS API, ``SendMessageBatch``), and its answer may be a success
with failed entries in it. The log keeps what was not sent, so nothing is raised for it: it is answered.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from math import ceil
from typing import Any, Final

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import ConfigError, FlowlaneError, Retryable
from flowlane.ports import Publish
from flowlane_aws.bounded import all_of
from flowlane_aws.clients import code_of
from flowlane_aws.queue.lookup import Lookup, Queue
from flowlane_aws.queue.message import ALWAYS_FITS, LONGEST, length, write, write_reference

logger = logging.getLogger("flowlane")

#: Seconds by which a standard queue may delay a message, at most; a FIFO queue delays none by itself.
LONGEST_DELAY: Final = 900
#: Entries in one batch call of any kind, and bytes of the bodies in one that sends.
BATCH: Final = 10
_BATCH_BYTES: Final = 1_048_576
_TRIES: Final = 4
#: Seconds after which a batch that SQS did not answer is not tried again.
_PATIENCE: Final = 5.0

Entry = Mapping[str, Any]
Call = Callable[[Sequence[Entry]], Awaitable[Mapping[str, Any]]]


class Sender:
    """Sends to the queues of stages; for many tasks at once."""

    def __init__(self, client: Any, lookup: Lookup, clock: Clock) -> None:
        self._client = client
        self._lookup = lookup
        self._clock = clock
        #: Stages that turned out to have the wrong kind of queue.
        self.unfit: dict[str, ConfigError] = {}
        #: Stages whose queue took nothing the last time, and will not before somebody changes something.
        self.refused: dict[str, ConfigError] = {}

    async def send(self, owed: Sequence[Publish]) -> Sequence[bool]:
        """For each of `owed`, whether SQS has it now. Those of one group go one after the other: behind one
        that SQS does not take, none of its group is sent.

        Not sent is also what a queue cannot delay so long: more than ``LONGEST_DELAY``, or at all on FIFO.
        """
        by_stage: dict[str, list[int]] = {}
        for number, publish in enumerate(owed):
            by_stage.setdefault(publish.stage, []).append(number)
        answers = [False] * len(owed)
        await all_of([partial(self._to, stage, owed, some, answers) for stage, some in by_stage.items()])
        return answers

    async def _to(
        self, stage: str, owed: Sequence[Publish], numbers: Sequence[int], answers: list[bool]
    ) -> None:
        try:
            queue = await self._lookup.queue(stage)
            self._check(queue, [owed[number] for number in numbers])
            if queue.ordered:
                await self._in_order(queue, owed, numbers, answers)
            else:
                fit = [number for number in numbers if owed[number].delay <= LONGEST_DELAY]
                await self._send(queue, owed, fit, answers)
            self.refused.pop(stage, None)
        except FlowlaneError as error:
            if isinstance(error, ConfigError):
                self.refused[stage] = error
            left = sum(not answers[number] for number in numbers)
            logger.warning("stage %s: %d deliveries are not sent yet: %s", stage, left, error)

    def _check(self, queue: Queue, owed: Sequence[Publish]) -> None:
        if not queue.ordered and any(publish.group for publish in owed):
            self.unfit[queue.stage] = ConfigError(
                f"stage {queue.stage} has an order key, but its queue {queue.name} is a standard one, which "
                "keeps no order: drain and delete that queue, then run `flowlane init` again"
            )
            raise self.unfit[queue.stage]

    async def _in_order(
        self, queue: Queue, owed: Sequence[Publish], numbers: Sequence[int], answers: list[bool]
    ) -> None:
        """In waves of one message per group: an entry of a batch may fail while those behind it do not."""
        groups: dict[str, list[int]] = {}
        for number in numbers:
            groups.setdefault(_group(owed[number]), []).append(number)
        waiting = [list(reversed(group)) for group in groups.values()]
        while waiting:
            wave = {group[-1]: group for group in waiting if owed[group[-1]].delay <= 0}
            await self._send(queue, owed, list(wave), answers)
            waiting = []
            for number, group in wave.items():
                group.pop()
                if answers[number] and group:
                    waiting.append(group)

    async def _send(
        self, queue: Queue, owed: Sequence[Publish], numbers: Sequence[int], answers: list[bool]
    ) -> None:
        entries = [await self._entry(queue, owed[number], number) for number in numbers]

        async def send(batch: Sequence[Entry]) -> Mapping[str, Any]:
            async with self._lookup.asking(queue, "sending to", passing=_TOO_LONG):
                answer: Mapping[str, Any] = await self._client.send_message_batch(
                    QueueUrl=queue.url, Entries=batch
                )
                return answer

        async def one(batch: Sequence[Entry]) -> None:
            for name in await insisting(send, batch, self._clock, f"sending to queue {queue.name}"):
                answers[int(name)] = True

        await all_of(
            [partial(one, batch) for batch in _batches(entries)]
        )  # a failure leaves the others alone

    async def _entry(self, queue: Queue, publish: Publish, number: int) -> Entry:
        entry: dict[str, Any] = {"Id": str(number), "MessageBody": await self._body(queue, publish)}
        if queue.ordered:
            entry["MessageGroupId"] = _group(publish)
            # The event's own id: sent again it is dropped (for 5 minutes), while every retry or continuation
            # is an event of its own. A reminder is sent because the message seems lost: it is another one.
            again = f"@{self._clock.now().timestamp() // 60:.0f}" if publish.repeat else ""
            entry["MessageDeduplicationId"] = _name(publish.event.id + again)
        elif publish.delay > 0:
            entry["DelaySeconds"] = ceil(publish.delay)
        return entry

    async def _body(self, queue: Queue, publish: Publish) -> str:
        body = write(publish.event)
        if (size := length(body)) <= ALWAYS_FITS:
            return body
        limits = await self._lookup.limits(queue)
        return body if size <= min(limits.longest, LONGEST) else write_reference(publish.event)


async def insisting(call: Call, entries: Sequence[Entry], clock: Clock, what: str) -> Sequence[str]:
    """Make a batch call of `entries`, and again of those alone that failed by no fault of theirs, a few times
    with jitter between; the ids of those that succeeded. What failed for good is told of in one line.

    Raises:
        FlowlaneError: SQS did not answer (see ``clients.asking``); any of them may have been done.
    """
    done: list[str] = []
    left = list(entries)
    end = clock.monotonic() + _PATIENCE
    for tried in range(_TRIES):
        if tried:
            await clock.sleep(0.1 * 2**tried * clock.random())
        try:
            answer = await call(left)
        except Retryable:
            if tried == _TRIES - 1 or clock.monotonic() > end:
                raise
            continue
        except ClientError as error:  # passed: all of them together are too long for this server
            if code_of(error) not in _TOO_LONG or len(left) == 1:
                raise
            half = len(left) // 2
            return [
                *done,
                *await insisting(call, left[:half], clock, what),
                *await insisting(call, left[half:], clock, what),
            ]
        done += [entry["Id"] for entry in answer.get("Successful", ())]
        failed = {entry["Id"]: entry for entry in answer.get("Failed", ())}
        left = [e for e in left if e["Id"] in failed and not failed[e["Id"]].get("SenderFault")]
        if refused := [entry for entry in failed.values() if entry.get("SenderFault")]:
            logger.warning("%s: %d were refused (%s)", what, len(refused), refused[0].get("Code", ""))
        if not left:
            return done
    logger.warning("%s: %d failed %d times, and are left for later", what, len(left), _TRIES)
    return done


_TOO_LONG: Final = frozenset({"AWS.SimpleQueueService.BatchRequestTooLong", "BatchRequestTooLong"})


def _batches(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """`entries`, in order, in as few batches as their order allows."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        more = length(entry["MessageBody"])
        if batch and (len(batch) == BATCH or size + more > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += more
    if batch:
        yield batch


def _group(publish: Publish) -> str:
    """A stage that has lost its order key may still have a FIFO queue: each unit is its own group then."""
    return _name(publish.group or publish.event.subject)


def _name(text: str) -> str:
    """`text` as a group or deduplication id: 1 to 128 characters of ASCII without spaces."""
    if 0 < len(text) <= _LONGEST_NAME and text.isascii() and text.isprintable() and " " not in text:
        return text
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


_LONGEST_NAME: Final = 128
