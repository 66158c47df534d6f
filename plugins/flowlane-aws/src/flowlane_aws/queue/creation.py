"""Making queues, for ``flowlane init``; never at run time. What they are set to holds for ``deploy``, too.

A unit's budget of attempts is kept in the log, which ends it with a reason. A queue gives a message up by its
count of receives, and that counts more than attempts: deliveries that were left alone, lost leases, a Lambda
that was throttled. So it must allow more receives than the log allows attempts, or healthy units would die.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, Final

import msgspec
from botocore.exceptions import ClientError

from flowlane.errors import ConfigError, Retryable
from flowlane.ports import QueueSpec
from flowlane_aws.bounded import all_of
from flowlane_aws.clients import asking
from flowlane_aws.names import Names
from flowlane_aws.queue.lookup import MISSING, Redrive
from flowlane_aws.queue.receiving import LONGEST_LEASE

#: Receives before a message is given up: twice the log's attempts, and no fewer than these (SQS's default).
_LEAST_RECEIVES: Final = 10
#: The same of an ordered stage, whose retries and continuations are all receives of one message.
_LEAST_RECEIVES_IN_ORDER: Final = 100
_MOST_RECEIVES: Final = 1000
#: Seconds that a message is kept: 4 days, and 14 (the most there is) once it was given up. On a standard
#: queue the time before that counts too, so a dead letter has 10 days at least.
_KEPT: Final = 345_600
_DEAD_KEPT: Final = 1_209_600
#: Seconds that a Lambda function may take; its queue's messages must be hidden for at least as long as it.
_LAMBDA: Final = 900
_LONGEST_MESSAGE: Final = 1_048_576

_Attributes = Mapping[str, str]


def settings(spec: QueueSpec) -> Mapping[str, Any]:
    """What the queue of `spec` is set to, but for when it shows messages again and where its dead letters go.

    Raises:
        ConfigError: no queue can be what `spec` wants.
    """
    if spec.lease > LONGEST_LEASE:
        raise ConfigError(
            f"stage {spec.name}: a lease of {spec.lease:g} s is longer than SQS hides a message (at most "
            f"{LONGEST_LEASE} s): choose a shorter one, it is renewed while the stage is at work"
        )
    wanted = {"MaximumMessageSize": _LONGEST_MESSAGE, "MessageRetentionPeriod": _KEPT}
    if not spec.ordered:
        return wanted
    # High throughput: the order is within groups, and so is what is dropped as sent twice.
    order = {"DeduplicationScope": "messageGroup", "FifoThroughputLimit": "perMessageGroupId"}
    return {**wanted, "FifoQueue": True, **order}


def settings_of_dead(spec: QueueSpec) -> Mapping[str, Any]:
    """The same of the queue for its dead letters."""
    return {"MessageRetentionPeriod": _DEAD_KEPT, **({"FifoQueue": True} if is_fifo(spec) else {})}


def is_fifo(spec: QueueSpec) -> bool:
    """Whether the queues of `spec` are FIFO ones. A channel keeps the order by itself, and what a mapping
    gives up of it (Lambda developer guide, on-failure destinations) no FIFO queue is sent."""
    return spec.ordered and spec.via == "queue"


def receives(spec: QueueSpec) -> int:
    """After how many receives the queue of `spec` gives a message up."""
    least = _LEAST_RECEIVES_IN_ORDER if spec.ordered else _LEAST_RECEIVES
    return min(max(2 * (spec.retries + 1), least), _MOST_RECEIVES)


def _texts(settings: Mapping[str, Any]) -> _Attributes:
    """`settings` as SQS has them."""
    return {name: "true" if value is True else str(value) for name, value in settings.items()}


async def create(client: Any, names: Names, specs: Sequence[QueueSpec]) -> Sequence[str]:
    """Make what is missing of the queues of `specs`: each with a dead-letter queue of its own, which is all
    that a channel has. A queue that has none given to it yet is given its own. What is set otherwise is left
    as somebody set it.

    Raises:
        ConfigError: a queue is of the wrong kind, gives messages up elsewhere or too soon; or it may not be
            asked for or made.
        Retryable: SQS is away, or has deleted a queue of that name within the last minute.
    """
    made = await all_of([_Making(client, names, spec).make for spec in specs], 8)
    return [name for some in made for name in some]


class _Making:
    """One stage's queue."""

    def __init__(self, client: Any, names: Names, spec: QueueSpec) -> None:
        self._client = client
        self._spec = spec
        self._name = names.queue(spec.name, ordered=spec.ordered)
        self._dead = names.dead(spec.name, ordered=is_fifo(spec))
        self._other = names.queue(spec.name, ordered=not spec.ordered)

    async def make(self) -> Sequence[str]:
        """See ``create``."""
        if self._spec.via == "channel":
            return await self._make_dead()
        wanted = settings(self._spec)
        if await self._attributes(self._other) is not None:
            raise self._wrong_kind()
        made = await self._make_dead()
        dead = (await self._attributes(self._dead) or {}).get("QueueArn", "")
        found = await self._attributes(self._name)
        if found is None:
            await self._create(self._name, {**_texts(wanted), **self._besides(dead)})
            made.append(self._name)
        elif not Redrive.of(found).dead_letter_target_arn:
            await self._set(self._name, {"RedrivePolicy": self._policy(dead)})
            made.append(f"the dead letters of {self._name}")
        else:
            self._check(Redrive.of(found), dead)
        return made

    async def _make_dead(self) -> list[str]:
        """The queue for dead letters is there; its name if it was made now."""
        if await self._attributes(self._dead) is not None:
            return []
        await self._create(self._dead, _texts(settings_of_dead(self._spec)))
        return [self._dead]

    def _wrong_kind(self) -> ConfigError:
        stage, other = self._spec.name, self._other
        why = (
            f"stage {stage} has an order key, but its queue {other} is a standard one, which keeps no order"
            if self._spec.ordered
            else f"stage {stage} has no order key, but its queue {other} is a FIFO one"
        )
        return ConfigError(
            f"{why}: let it drain and delete it (aws sqs delete-queue), then run `flowlane init` again"
        )

    def _check(self, policy: Redrive, dead: str) -> None:
        if policy.dead_letter_target_arn != dead:
            target = policy.dead_letter_target_arn.rpartition(":")[2]
            raise ConfigError(
                f"queue {self._name} gives messages up to {target}, where flowlane does not look for them: "
                f"set {self._dead} as its dead-letter queue"
            )
        least = self._spec.retries + 2
        if policy.max_receive_count < least:
            raise ConfigError(
                f"queue {self._name} gives a message up after {policy.max_receive_count} receives, but stage "
                f"{self._spec.name} may need {least}: set its maxReceiveCount to {receives(self._spec)}"
            )

    def _policy(self, dead: str) -> str:
        return msgspec.json.encode(Redrive(receives(self._spec), dead)).decode()

    def _besides(self, dead: str) -> _Attributes:
        # A worker says with each receive for how long; Lambda goes by what is set here, and no mapping may be
        # made where that is less than the function's timeout.
        hidden = min(max(self._spec.lease, min(self._spec.timeout, _LAMBDA)), LONGEST_LEASE)
        return {"RedrivePolicy": self._policy(dead), "VisibilityTimeout": str(max(1, ceil(hidden)))}

    # ------------------------------------------------------------------ calls

    async def _attributes(self, name: str) -> _Attributes | None:
        """Those of the queue called `name`; ``None`` if there is none."""
        try:
            async with asking(f"looking for queue {name}", passing=MISSING):
                url = (await self._client.get_queue_url(QueueName=name))["QueueUrl"]
                answer = await self._client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
                attributes: _Attributes = answer.get("Attributes") or {}
                return attributes
        except ClientError:  # passed: it is missing
            return None

    async def _create(self, name: str, attributes: _Attributes) -> None:
        """Whoever makes the same at the same time is fine: SQS answers with the queue that is there."""
        try:
            async with asking(f"making queue {name}", passing=_DELETED):
                await self._client.create_queue(QueueName=name, Attributes=attributes)
        except ClientError as error:
            raise Retryable(
                f"queue {name} was deleted less than 60 s ago, and SQS makes none of that name before: "
                "run `flowlane init` again then",
                delay=60,
            ) from error

    async def _set(self, name: str, attributes: _Attributes) -> None:
        async with asking(f"setting queue {name}"):
            url = (await self._client.get_queue_url(QueueName=name))["QueueUrl"]
            await self._client.set_queue_attributes(QueueUrl=url, Attributes=attributes)


_DELETED: Final = frozenset({"AWS.SimpleQueueService.QueueDeletedRecently", "QueueDeletedRecently"})
