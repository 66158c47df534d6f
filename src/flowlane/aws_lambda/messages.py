"""The messages of a queue or a stream, handled one by one and answered for together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from flowlane.aws_lambda.answer import Answer
from flowlane.aws_lambda.invocation import Invocation
from flowlane.aws_lambda.payload import Batch, Message
from flowlane.aws_lambda.visibility import show_again
from flowlane.aws_lambda.wanted import understand
from flowlane.compose import Application
from flowlane.deadline import Deadline
from flowlane.engine import describe
from flowlane.lane import Lane

logger = logging.getLogger("flowlane")


async def handle(app: Application, lane: Lane, batch: Batch, deadline: Deadline) -> dict[str, Any]:
    """Handle the messages of `batch`, in order where their source keeps one; the answer for AWS.

    A message that fails is logged with its reason and keeps no other from being handled. One that is known to
    go on at a certain time comes again then, where the backend can see to it.
    """
    answer = Answer(batch)
    invocation = Invocation(app, lane, deadline)
    unfinished: dict[int, set[str]] = {}
    delays: dict[int, float] = {}

    def fail(index: int, reason: str, delay: float | None = None) -> None:
        answer.fail(index)
        if delay is not None:
            delays[index] = delay
        _log(lane, batch, batch.messages[index], reason)

    async def one_after_the_other(sequence: list[int]) -> None:
        for place, index in enumerate(sequence):
            if answer.again(index):
                return
            if invocation.near:
                fail(index, "not begun: too little of the function's time is left", 0.0)
                return
            try:
                message = batch.messages[index]
                wanted = understand(message.body, lane.name)
                runs = {run for each in wanted if (run := await invocation.take(each, message.attempt))}
                if left := await invocation.unended(runs):
                    unfinished[index] = left
                    # What follows waits for it; if it should end in the last moment, that is seen below.
                    for later in sequence[place + 1 : place + 2]:
                        fail(later, f"not begun: {_told(left)} before it took all of the function's time")
                    return
            except Exception as error:  # noqa: BLE001  # each message's own failure
                fail(index, describe(error), getattr(error, "delay", None))
                return

    async with invocation.open(), asyncio.TaskGroup() as tasks:
        for sequence in batch.sequences():
            tasks.create_task(one_after_the_other(sequence))
    over = await invocation.look(set().union(*unfinished.values()))
    for index, runs in unfinished.items():
        if left := runs.difference(over):
            fail(index, f"not finished in time: {_told(left)} goes on when the message comes again")
    rest = deadline.rest(app.clock.monotonic())
    await show_again(app.backend, batch.queue, _due(batch, answer, delays), rest)
    return answer.document()


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
