"""For how long a queue hides its messages: at least while the function may work on them, and no longer than
they are to wait.

AWS refuses an event source mapping whose queue does not (Lambda developer guide, "Configuring a queue"), but
not a queue that is changed later, nor a function whose time-out is. Then a second invocation would be handed
what the first one still holds: nothing would be lost or doubled by that, but little would come to its end.

A message that is reported failed stays hidden for the rest of that time, if nobody shortens it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Final, Protocol, runtime_checkable

from flowlane.errors import ConfigError, FlowlaneError, Retryable

logger = logging.getLogger("flowlane")

#: Seconds that a queue is asked for how long it hides messages, and that showing messages again may take.
_PATIENCE: Final = 5.0
#: What AWS advises for a queue, in time-outs of its function.
_ADVISED: Final = 6


@runtime_checkable
class Leasing(Protocol):
    """What a backend offers besides, if it can ask queues that are outside of it."""

    async def lease_of(self, queue: str) -> float | None:
        """Seconds for which the queue of that ARN hides a message that was received; ``None`` if it is not
        known.

        Raises:
            Retryable: the queue did not answer.
            Permanent, ConfigError: it may not be asked.
        """
        ...

    async def show_again(self, queue: str, due: Mapping[str, float]) -> None:
        """The messages of that queue (an ARN) that were received under the receipts in `due` are handed out
        again after as many seconds. A stale receipt is fine.

        Raises:
            Retryable, Permanent, ConfigError: some are not, and wait for as long as they are hidden.
        """
        ...


class Visibility:
    """Checks each queue once; one that is refused again each time, so that mending it is enough."""

    def __init__(self) -> None:
        self._checked: set[str] = set()

    async def check(self, backend: object, queue: str, seconds: float) -> None:
        """`seconds` are what the function has for an invocation.

        Raises:
            ConfigError: `queue` (an ARN; empty: no queue) shows messages again before; the message names the
                number needed.
        """
        if not queue or queue in self._checked or math.isinf(seconds) or not isinstance(backend, Leasing):
            return
        try:
            async with asyncio.timeout(min(_PATIENCE, seconds / 4)):  # most of the time is for the messages
                lease = await backend.lease_of(queue)
        except (Retryable, TimeoutError):
            return  # asked again with the next batch
        except FlowlaneError as error:
            logger.warning(
                "cannot see for how long %s hides messages: %s (sqs:GetQueueAttributes is needed)",
                queue,
                error,
            )
            lease = None
        need = math.ceil(seconds)
        if lease is not None and lease < need:
            raise ConfigError(
                f"the queue {queue} hides a message for {lease:g} s, but this function may work on "
                f"it for {need} s: set the queue's VisibilityTimeout to at least {need} s, or better "
                f"{_ADVISED * need} s"
            )
        self._checked.add(queue)


async def show_again(backend: object, queue: str, due: Mapping[str, float], left: float) -> None:
    """Have messages that are reported failed handed out again after as many seconds as `due` says by their
    receipts, if `backend` can, and within the `left` seconds. Otherwise they wait for as long as they are
    hidden, which costs time and nothing else."""
    if not due or not isinstance(backend, Leasing):
        return
    try:
        async with asyncio.timeout(min(_PATIENCE, left)):
            await backend.show_again(queue, due)
    except (FlowlaneError, TimeoutError) as error:
        why = str(error) or "it took too long"
        logger.warning("%d messages of %s come again later than they could: %s", len(due), queue, why)
