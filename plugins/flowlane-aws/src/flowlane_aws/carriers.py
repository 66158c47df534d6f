"""What carries deliveries to stages: queues, and the channels of those stages that are ``via="channel"``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from flowlane.errors import ConfigError, FlowlaneError
from flowlane.events import encode
from flowlane.ports import Channel, ChannelRecord, Publish
from flowlane_aws.bounded import all_of
from flowlane_aws.queue.queue import Queues

logger = logging.getLogger("flowlane")


class Carriers:
    """Hands over what is published, each to what carries it; for many tasks at once."""

    def __init__(self, queues: Queues, channel: Callable[[str], Channel]) -> None:
        self._queues = queues
        self._channel = channel
        #: Why a channel takes nothing. Who receives next is told: what was not put is waited for in vain.
        self.refused: ConfigError | None = None

    async def send(self, owed: Sequence[Publish]) -> Sequence[bool]:
        """For each of `owed`, whether its queue or its channel has it now; see ``Queues.send``. For one that
        may not be there nothing is raised, but logged. Of one stage's channel that goes for all of `owed`
        together: it does not say which of them it has (to put all of them again keeps the order).

        Those of one group are put in the order given, groups beside one another. None may have a delay: a
        channel keeps nothing back.
        """
        answers = [False] * len(owed)
        queued = [number for number, publish in enumerate(owed) if publish.via == "queue"]
        put: dict[str, list[int]] = {}
        for number, publish in enumerate(owed):
            if publish.via == "channel":
                put.setdefault(publish.stage, []).append(number)
        calls = [partial(self._put, stage, owed, some, answers) for stage, some in put.items()]
        if queued:
            calls.append(partial(self._send, owed, queued, answers))
        await all_of(calls)
        return answers

    async def _send(self, owed: Sequence[Publish], numbers: Sequence[int], answers: list[bool]) -> None:
        accepted = await self._queues.send([owed[number] for number in numbers])
        for number, done in zip(numbers, accepted, strict=True):
            answers[number] = done

    async def _put(
        self, stage: str, owed: Sequence[Publish], numbers: Sequence[int], answers: list[bool]
    ) -> None:
        try:
            await self._channel(stage).put([_record(owed[number]) for number in numbers])
        except FlowlaneError as error:
            logger.warning("stage %s: %d deliveries may not be sent yet: %s", stage, len(numbers), error)
            if isinstance(error, ConfigError):
                self.refused = error
            return
        for number in numbers:
            answers[number] = True


def _record(publish: Publish) -> ChannelRecord:
    """An event is never as large as a record may be, so it goes whole. A stage that has lost its order key
    has each unit as a group of its own."""
    return ChannelRecord(publish.group or publish.event.subject, encode(publish.event))
