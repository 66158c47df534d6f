"""The sweep: the lane's periodic housekeeping, which makes good what a crash or a lost message left owed.

It finds its work in the log's ``open`` index, never by reading history, and may run anywhere, any number of
times at once: all it does is repeat obligations.
"""

from __future__ import annotations

import logging
from datetime import datetime
from functools import partial
from math import inf

import msgspec

from flowlane.completion import complete
from flowlane.conveyor import CONSUMER
from flowlane.engine import Engine
from flowlane.errors import ConfigError, FlowlaneError, Permanent, Retryable
from flowlane.events import Event
from flowlane.handling import Handling
from flowlane.lane import Stage
from flowlane.letters import bury
from flowlane.ports import Commit, Publish
from flowlane.state import progress, status

logger = logging.getLogger("flowlane")

#: Seconds beyond a stage's timeout after which a silent unit is queued again, where the queue cannot tell.
MARGIN = 60.0
#: Seconds for which a dead unit's unfinished uploads are kept, for a redrive to go on with.
KEEP = 7 * 86400.0
_GROUP = 64


class Swept(msgspec.Struct):
    """What one sweep handed to the queues that commits had owed them, ended as dead (see ``letters``), found
    open, queued again, and itself completed; how many unfinished uploads of dead units it discarded; and how
    many open units are owed to which stages that the lane does not have. Of open units it may have looked at
    some only (see ``Backend.units``), unless it was thorough."""

    resent: int = 0
    died: int = 0
    open: int = 0
    requeued: int = 0
    completed: int = 0
    discarded: int = 0
    stranded: dict[str, int] = msgspec.field(default_factory=dict)


async def sweep(engine: Engine, lane: str, *, thorough: bool = False) -> Swept:
    """Queue the lane's units again that no queue holds, and complete the runs of which nothing is left. A run
    that cannot be completed is told of in a warning, and the rest is swept all the same. `thorough`: look at
    units, too, that another sweep has looked at or that were at work a moment ago.

    Raises:
        Retryable: the log is away; nothing is lost by that, the next sweep does the same.
    """
    swept = Swept()
    owed: list[Publish] = []
    try:
        swept.resent = await engine.backend.resend(lane)
        swept.died = await bury(engine, lane)
        silent = _Silent(engine)
        patience = None if thorough else partial(_patience, engine)
        async for head in engine.backend.units(lane, "open", patience):
            swept.open += 1
            if status(head) == "closed":
                swept.completed += await _complete(engine, head)
            elif (handling := engine.handling_of(head)) is None:
                swept.stranded[head.stage] = swept.stranded.get(head.stage, 0) + 1
            elif await silent.is_due(head, handling):
                owed.append(handling.publish(head, repeat=True))
            if len(owed) == _GROUP:
                swept.requeued += await _publish(engine, owed)
                owed = []
        swept.requeued += await _publish(engine, owed)
        async for head in engine.backend.units(lane, "dead", None if thorough else _until_discarded):
            swept.discarded += await _discard(engine, head)
    except OSError as error:
        raise Retryable(f"sweep of {lane}: {error}") from error
    for stage, count in swept.stranded.items():
        logger.warning(
            "lane %s: open units are owed to a stage %s (%d of them), which it does not have: "
            "give the stage that handles them this name=",
            lane,
            stage,
            count,
        )
    return swept


async def _complete(engine: Engine, head: Event) -> bool:
    """Complete the run whose head is `head` if nothing of it is left; one that cannot be completed is told of
    and stays open, and keeps nobody from sweeping the rest."""
    try:
        return await complete(engine, head.subject, progress(head).opened)
    except Retryable:
        raise
    except FlowlaneError as error:
        logger.warning(
            "run %s cannot be completed and stays open: %s (`flowlane trace LANE %s` shows what it holds)",
            head.subject,
            error,
            head.subject,
        )
        return False


class _Silent:
    """Which units have been silent for too long, in one sweep."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._passed: dict[str, float] = {}

    async def is_due(self, head: Event, handling: Handling) -> bool:
        """Whether the unit is to be queued again. Embedded queues know, and drop what they still hold; of a
        channel it is known how far it is."""
        if handling.via == "queue" and self._engine.backend.exact_queue:
            return True
        age = _age(self._engine, head)
        if age <= _silence(head, handling.stage):
            return False
        return handling.via == "queue" or age - MARGIN > await self._behind(handling)

    async def _behind(self, handling: Handling) -> float:
        """Of the channel of that stage: all that was put more than so many seconds ago is settled."""
        engine, queue = self._engine, handling.queue
        if queue not in self._passed:
            now = engine.clock.now().timestamp()
            try:
                lags = await engine.backend.channel(queue).lag(CONSUMER)
            except (ConfigError, Permanent) as error:
                logger.warning("channel %s cannot say how far it is, nothing is put again: %s", queue, error)
                return inf
            self._passed[queue] = now - engine.marks[queue].passed(lags, now)
        return self._passed[queue]


def _silence(head: Event, stage: Stage) -> float:
    """Seconds for which an open unit may be silent, where the queue cannot tell whether it holds it."""
    return float(stage.policy.timeout) + progress(head).delay + MARGIN


def _patience(engine: Engine, head: Event) -> float:
    handling = engine.handling_of(head)
    return MARGIN if handling is None else _silence(head, handling.stage)


def _until_discarded(head: Event) -> float:
    return KEEP


async def _discard(engine: Engine, head: Event) -> int:
    """Give up the uploads that a unit left unfinished which has long been dead; how many. A redrive begins
    them anew. While it is not redriven they are asked for again: that they are gone already is fine."""
    if _age(engine, head) < KEEP:
        return 0
    left = [t for t in progress(head).transfers.values() if t.upload and t.to and not t.done]
    for transfer in left:
        try:
            store = await engine.connections.store(transfer.to)
            await store.discard(transfer.to, transfer.left or transfer.upload)
        except FlowlaneError as error:
            logger.warning("%s: its unfinished upload is left: %s", head.subject, error)
    return len(left)


def _age(engine: Engine, head: Event) -> float:
    return engine.clock.now().timestamp() - datetime.fromisoformat(head.time).timestamp()


async def _publish(engine: Engine, owed: list[Publish]) -> int:
    if owed:
        await engine.backend.commit([Commit(publish=owed)])
    return len(owed)
