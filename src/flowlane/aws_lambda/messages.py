"""The messages of a queue or a stream, handled one by one and answered for together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from itertools import count
from typing import Any

import msgspec

from flowlane.aws_lambda import channels
from flowlane.aws_lambda.answer import Answer
from flowlane.aws_lambda.invocation import Invocation
from flowlane.aws_lambda.payload import STREAMS, Batch, Message
from flowlane.aws_lambda.visibility import show_again
from flowlane.aws_lambda.wanted import understand
from flowlane.compose import Application
from flowlane.deadline import Deadline
from flowlane.errors import Retryable
from flowlane.lane import Lane
from flowlane.reasons import describe

logger = logging.getLogger("flowlane")


async def handle(app: Application, lane: Lane, batch: Batch, deadline: Deadline) -> dict[str, Any]:
    """Handle the messages of `batch`, in order where their source keeps one; the answer for AWS.

    A message that fails is logged with its reason and keeps no other from being handled. One that is known to
    go on at a certain time comes again then, where the backend can see to it; a stream brings it again at
    once, so that time is waited for here, as far as the deadline lets it.
    """
    work = _Work(app, lane, batch, deadline)
    async with work.invocation.open(), asyncio.TaskGroup() as tasks:
        for sequence in batch.sequences():
            tasks.create_task(work.one_after_the_other(sequence))
    await work.look_again()
    rest = deadline.rest(app.clock.monotonic())
    await show_again(app.backend, batch.queue, _due(batch, work.answer, work.delays), rest)
    return work.answer.document()


class _Work:
    """A batch while it is worked on: its answer so far, and after how many seconds failed ones are due."""

    def __init__(self, app: Application, lane: Lane, batch: Batch, deadline: Deadline) -> None:
        self._clock, self._lane, self._batch = app.clock, lane, batch
        self._stage = channels.stage_of(app.engine, batch)
        self._unfinished: dict[int, set[str]] = {}
        self.invocation = Invocation(app, lane, deadline)
        self.answer = Answer(batch)
        self.delays: dict[int, float] = {}

    async def one_after_the_other(self, sequence: list[int]) -> None:
        """Handle the messages of those numbers, up to the first that fails."""
        for place, index in enumerate(sequence):
            if self.answer.again(index):
                return
            if self.invocation.near:
                self._fail(index, "not begun: too little of the function's time is left", 0.0)
                return
            try:
                if left := await self.invocation.unended(await self._insist(index)):
                    self._unfinished[index] = left
                    # What follows waits for it; if it should end in the last moment, that is seen below.
                    for later in sequence[place + 1 : place + 2]:
                        self._fail(
                            later, f"not begun: {_told(left)} before it took all of the function's time"
                        )
                    return
            except Exception as error:  # noqa: BLE001  # each message's own failure
                self._fail(index, describe(error), getattr(error, "delay", None))
                return

    async def _insist(self, index: int) -> set[str]:
        """Do what the message wants, as often as a stream would bring it in the time that is left; the runs
        that it belongs to."""
        for tried in count():
            try:
                return await self._take(index, tried)
            except Retryable as error:
                if self._batch.kind not in STREAMS or error.delay is None:
                    raise
                left = self.invocation.left
                # Where it does not fit, so much is waited for all the same: told of at once, the record would
                # come again at once, until its mapping gives it up.
                await self._clock.sleep(min(error.delay, left))
                if error.delay >= left:
                    raise
            if self.answer.again(index):
                break
        return set()

    async def _take(self, index: int, tried: int) -> set[str]:
        message, attempt = self._batch.messages[index], self._batch.attempt(index) + tried
        if self._stage is not None:
            run = await channels.take(self.invocation, self._stage, message, attempt, tried)
            return {run} if run else set()
        wanted = understand(message.body, self._lane.name)
        return {run for each in wanted if (run := await self.invocation.take(each, attempt))}

    async def look_again(self) -> None:
        """What was not finished when its time was over may be by now."""
        if not self._unfinished:
            return  # also where the log does not answer
        over = await self.invocation.look(set().union(*self._unfinished.values()))
        for index, runs in self._unfinished.items():
            if left := runs.difference(over):
                self._fail(index, f"not finished in time: {_told(left)} goes on when the message comes again")

    def _fail(self, index: int, reason: str, delay: float | None = None) -> None:
        self.answer.fail(index)
        if delay is not None:
            self.delays[index] = delay
        _log(self._lane, self._batch, self._batch.messages[index], reason)


def _due(batch: Batch, answer: Answer, delays: Mapping[int, float]) -> dict[str, float]:
    """After how many seconds messages of a queue are due again, by their receipts. What follows the first
    failure of a FIFO group is due with it: one that is hidden hides its group."""
    due: dict[str, float] = {}
    for sequence in batch.sequences():
        again = [index for index in sequence if answer.again(index)]
        if again and again[0] in delays:
            due |= {batch.messages[index].receipt: delays[again[0]] for index in again}
    due.pop("", None)
    return due


def _told(runs: set[str]) -> str:
    """The runs, in a sentence."""
    first, *rest = sorted(runs)
    return f"the run {first} (and {len(rest)} more)" if rest else f"the run {first}"


def _log(lane: Lane, batch: Batch, message: Message, reason: str) -> None:
    """One JSON line; never the body, which may hold anything."""
    line: Mapping[str, Any] = {
        "level": "error",
        "lane": lane.name,
        "source": batch.kind,
        "message": message.id.encode("utf-8", "backslashreplace").decode(),
        "attempt": message.attempt,
        "bytes": len(message.body),
        "reason": reason,
    }
    logger.error("%s", msgspec.json.encode(line).decode())
