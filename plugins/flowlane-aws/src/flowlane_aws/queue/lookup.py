"""Which SQS queue is a stage's: looked up by name when first needed, and remembered while it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from botocore.exceptions import ClientError

from flowlane.errors import ConfigError
from flowlane_aws.clients import PATIENCE, asking, code_of
from flowlane_aws.names import Names

#: What SQS answers where there is no such queue (by its query protocol, and by that of JSON).
MISSING: Final = frozenset({"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"})

#: Bytes that a queue is taken to accept where it does not say (the API's limit before 2025).
_UNSAID: Final = 262_144


class Queue(msgspec.Struct, frozen=True):
    """The queue of one stage, or its dead-letter queue; `ordered`: a FIFO queue."""

    stage: str
    name: str
    url: str
    ordered: bool


class Limits(msgspec.Struct, frozen=True):
    """What a queue is set to: the longest message it takes (bytes), after how many receives it gives one up
    (0: never), and for how long a message is hidden that is received without saying so (seconds)."""

    longest: int
    receives: int
    visibility: float


class Redrive(msgspec.Struct, rename="camel"):
    """A queue's ``RedrivePolicy``: after how many receives it moves a message, and into which queue."""

    max_receive_count: int = 0
    dead_letter_target_arn: str = ""

    @classmethod
    def of(cls, attributes: Mapping[str, str]) -> Redrive:
        """That of a queue with those attributes; it is never moved where there is none."""
        try:
            # Not strict: the number is a string where somebody wrote it so.
            return msgspec.json.decode(attributes.get("RedrivePolicy") or "{}", type=cls, strict=False)
        except msgspec.DecodeError:
            return cls()


class Lookup:
    """Finds queues with one call for each."""

    def __init__(self, client: Any, names: Names) -> None:
        self._client = client
        self._names = names
        self._queues: dict[tuple[str, bool], Queue] = {}
        self._limits: dict[str, Limits] = {}
        self._lock = asyncio.Lock()

    async def queue(self, stage: str) -> Queue:
        """The queue of `stage`: a standard one, or (where the stage has an order key) a FIFO one.

        Raises:
            ConfigError: there is none, with what to do; or it may not be asked for.
            Retryable: SQS is away.
        """
        return self._queues.get((stage, False)) or await self._find(stage, dead=False)

    async def dead(self, stage: str) -> Queue:
        """Where the queue of `stage` puts what it gives up; raises as ``queue`` does."""
        return self._queues.get((stage, True)) or await self._find(stage, dead=True)

    async def _find(self, stage: str, *, dead: bool) -> Queue:
        async with self._lock:
            if known := self._queues.get((stage, dead)):  # found while this waited
                return known
            for ordered in (False, True):
                name = self._name(stage, ordered=ordered, dead=dead)
                if url := await self.url(name):
                    found = self._queues[stage, dead] = Queue(stage, name, url, ordered)
                    return found
        raise self._missing(self._name(stage, ordered=False, dead=dead))

    def _name(self, stage: str, *, ordered: bool, dead: bool) -> str:
        names = self._names
        return names.dead(stage, ordered=ordered) if dead else names.queue(stage, ordered=ordered)

    async def url(self, name: str) -> str:
        """The URL of the queue called `name`; empty if there is none."""
        try:
            async with asking(f"looking for queue {name}", passing=MISSING):
                return str((await self._client.get_queue_url(QueueName=name))["QueueUrl"])
        except ClientError:  # passed: it is missing
            return ""

    async def limits(self, queue: Queue) -> Limits:
        """What `queue` is set to, as of when it was first asked for."""
        known = self._limits.get(queue.url)
        if known is None:
            async with self.asking(queue, "asking what it takes of"):
                wanted = ["MaximumMessageSize", "RedrivePolicy", "VisibilityTimeout"]
                answer = await self._client.get_queue_attributes(QueueUrl=queue.url, AttributeNames=wanted)
            known = self._limits[queue.url] = _limits(answer.get("Attributes", {}))
        return known

    @asynccontextmanager
    async def asking(
        self, queue: Queue, doing: str, *, seconds: float = PATIENCE, passing: Collection[str] = ()
    ) -> AsyncIterator[None]:
        """As ``clients.asking``, about `queue`; one that has gone is forgotten.

        Raises:
            ConfigError: it is gone, with what to do; besides what ``clients.asking`` raises.
        """
        try:
            async with asking(f"{doing} queue {queue.name}", seconds=seconds, passing={*passing, *MISSING}):
                yield
        except ClientError as error:
            if code_of(error) not in MISSING:
                raise
            self._queues = {key: known for key, known in self._queues.items() if known.url != queue.url}
            self._limits.pop(queue.url, None)
            raise self._missing(queue.name) from error

    def _missing(self, name: str) -> ConfigError:
        where = self._client.meta.region_name
        return ConfigError(
            f"there is no queue {name} in {where}: `flowlane init LANE --backend {self._names.uri}` "
            "makes it, or set the region and account that it is in"
        )


def _limits(attributes: Mapping[str, str]) -> Limits:
    return Limits(
        int(attributes.get("MaximumMessageSize", 0)) or _UNSAID,
        Redrive.of(attributes).max_receive_count,
        float(attributes.get("VisibilityTimeout", 0)),
    )
