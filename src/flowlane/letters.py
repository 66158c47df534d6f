"""Dead letters: units whose deliveries a queue gave up end as dead, so that their runs end.

An embedded queue gives nothing up. One outside does, by its own count of receives, where the log never got to
count an attempt: the message could not be read, the process died before it could say anything, a function was
throttled. The log decides here, too, what becomes of the unit.
"""

from __future__ import annotations

import logging

from flowlane import events
from flowlane.attempt import Attempt
from flowlane.completion import complete_after
from flowlane.deadline import Deadline
from flowlane.engine import Engine
from flowlane.errors import ConfigError, Permanent, VersionConflict
from flowlane.events import Event
from flowlane.handling import Handling
from flowlane.ports import Delivery
from flowlane.state import progress, status

logger = logging.getLogger("flowlane")

#: Dead letters seen to in one sweep, at most.
LIMIT = 1000
#: Events that come with a delivery of their own; on an ordered stage only the last does.
_PUBLISHED = frozenset({events.ATTEMPT_FAILED, events.ATTEMPT_CONTINUED, events.UNIT_REDRIVEN})


async def bury(engine: Engine, lane: str) -> int:
    """See to what the queues of the lane's stages gave up: how many units ended as dead for it. What the log
    does not know of, and what cannot be seen to, is told of in a warning and stays where it is.

    Raises:
        Retryable: the log or the queue is away; the next sweep goes on.
    """
    if engine.backend.exact_queue:
        return 0
    # What a channel carries is not given up: the log counts the attempts.
    queues = [
        queue
        for queue, handling in engine.queues.items()
        if handling.stage.lane == lane and handling.via == "queue"
    ]
    died = 0
    try:
        letters = await engine.backend.given_up(queues, LIMIT)
    except (ConfigError, Permanent) as error:
        logger.warning("lane %s: what its queues gave up is left there: %s", lane, error)
        return 0
    for letter in letters:
        try:
            died += await _see_to(engine, letter)
        except (ConfigError, Permanent) as error:
            # Of this one alone: those behind it have runs of their own that wait for them.
            logger.warning(
                "%s: what queue %s gave up is left there: %s", letter.event.subject, letter.stage, error
            )
    return died


async def _see_to(engine: Engine, letter: Delivery) -> bool:
    """Whether the unit that `letter` is about ended as dead by this."""
    head, handling = letter.head, engine.queues[letter.stage]
    if head is None:
        logger.warning(
            "the queue of stage %s gave up an event of %s, which the log does not know: look at it, and "
            "delete it: is this the backend that it came from?",
            letter.stage,
            letter.event.subject,
        )
        return False
    if status(head) != "open" and head.version > 1:
        await engine.repeat_obligations(head)
    elif engine.handling_of(head) is handling and not await _is_owed_another(engine, letter, handling):
        if (wait := engine.at_work(head, handling.stage)) > 0:
            await letter.nack(delay=wait)  # it outlived its message: it may well end by itself
            return False
        return await _end(engine, letter, head, handling)
    await letter.ack()
    return False


async def _is_owed_another(engine: Engine, letter: Delivery, handling: Handling) -> bool:
    """Whether the unit has gone on to another delivery since: this one was left over, and given up as such.
    An ordered stage retries and continues with the delivery that it has."""
    async for event in engine.backend.read(letter.event.subject, after=letter.event.version):
        if event.type in _PUBLISHED and (not handling.stage.order or event.type == events.UNIT_REDRIVEN):
            return True
    return False


async def _end(engine: Engine, letter: Delivery, head: Event, handling: Handling) -> bool:
    reason = f"its queue gave its message up after {letter.attempt} receives"
    if known := progress(head).reason:
        reason = f"{reason}; before that: {known}"
    attempt = Attempt(engine, handling, letter, head, Deadline())
    commit = attempt.renounce(head, reason)
    result = await engine.commit(commit)
    if isinstance(result, VersionConflict):
        return False  # somebody has just decided: the next sweep sees what
    logger.warning("%s dead: %s", head.subject, reason)
    await complete_after(engine, commit, result)
    return True
