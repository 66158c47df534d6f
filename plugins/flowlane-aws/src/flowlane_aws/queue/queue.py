"""The queues of a lane's stages on SQS: one for each stage, and one for what that one gave up.

A message is a hint: it comes at least once, in no order (on a FIFO queue: in its group's), and what it is
about is decided by the log. SQS counts in whole seconds: leases and delays are rounded up to those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any, Final

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import Retryable
from flowlane.ports import Publish, QueueSpec
from flowlane_aws.bounded import all_of
from flowlane_aws.clients import asking, code_of
from flowlane_aws.names import Names
from flowlane_aws.queue.creation import create
from flowlane_aws.queue.lookup import MISSING, Lookup
from flowlane_aws.queue.receiving import LONGEST_LEASE, Received, Receiver, Resolve, whole
from flowlane_aws.queue.sending import BATCH, Entry, Sender, insisting

#: The operations that a busy worker makes all day long.
HOT: Final = ("ReceiveMessage", "SendMessageBatch", "DeleteMessageBatch")
#: What SQS answers about a receipt that holds nothing any more (the last: the message is gone).
_STALE: Final = frozenset(
    {
        "AWS.SimpleQueueService.MessageNotInflight",
        "MessageNotInflight",
        "ReceiptHandleIsInvalid",
        "InvalidParameterValue",
    }
)
_PURGING: Final = frozenset({"AWS.SimpleQueueService.PurgeQueueInProgress", "PurgeQueueInProgress"})


class Queues:
    """Sends to, receives from and settles with the queues that `names` names; for many tasks at once.

    `client` is an SQS client, the caller's to close; its read time-out must be longer than any ``wait``.
    Unless it says otherwise, a call raises ``ConfigError`` where a queue is missing or may not be used, and
    ``Retryable`` where SQS does not answer.
    """

    def __init__(
        self,
        client: Any,
        names: Names,
        clock: Clock,
        resolve: Resolve,
        tasks: asyncio.TaskGroup | None = None,
    ) -> None:
        self._client = client
        self._names = names
        self._clock = clock
        self._lookup = Lookup(client, names)
        self._sender = Sender(client, self._lookup, clock)
        self._receiver = Receiver(client, self._lookup, clock, resolve, tasks)

    async def send(self, owed: Sequence[Publish]) -> Sequence[bool]:
        """For each of `owed`, whether SQS has it now. For one that it has not, nothing is raised, but logged.

        Not sent are delays that the queue cannot keep, on a standard queue those of more than
        ``sending.LONGEST_DELAY`` and on a FIFO queue all: hand them in when they are due. Nor is, in its
        group, what follows something that was not sent.
        """
        return await self._sender.send(owed)

    async def receive(
        self, stages: Sequence[str], limit: int, *, lease: float, wait: float = 0
    ) -> Sequence[Received]:
        """At most `limit` messages that are due, of any of `stages`, hidden from others for `lease` seconds;
        waits up to `wait` seconds for the first. What cannot be read is logged, and left to its queue, which
        will give it up.

        A queue that takes nothing, or is of the wrong kind, is told of by this: nobody waits for what `send`
        answers, and what was not sent would be waited for in vain.

        Cancelled while it waits, what SQS still hands out to it is given back by a task of `tasks`, which
        ends some seconds after the wait; without `tasks`, that may stay hidden for `lease`.
        """
        for stage in stages:
            if wrong := self._sender.unfit.get(stage) or self._sender.refused.pop(stage, None):
                raise wrong
        return await self._receiver.receive(stages, limit, lease=lease, wait=wait)

    async def given_up(self, stages: Sequence[str], limit: int) -> Sequence[Received]:
        """At most `limit` messages that the queues of `stages` gave up, hidden from others for some minutes.
        Those that cannot be read are told of in one line with their number, and stay; so do all of a stage
        that has no dead-letter queue, which is told of once."""
        return await self._receiver.given_up(stages, limit)

    # ------------------------------------------------------------------ settling

    async def delete(self, received: Sequence[Received]) -> None:
        """The messages are gone, except those that somebody else has received since, or that SQS refused to
        delete: these are logged, and come again."""
        by_queue: dict[str, list[Received]] = {}
        for one in received:
            by_queue.setdefault(one.queue.url, []).append(one)
        batches = [some[i : i + BATCH] for some in by_queue.values() for i in range(0, len(some), BATCH)]
        await all_of([partial(self._delete, batch) for batch in batches])

    async def _delete(self, batch: Sequence[Received]) -> None:
        queue = batch[0].queue

        async def call(entries: Sequence[Entry]) -> Mapping[str, Any]:
            async with self._lookup.asking(queue, "deleting from"):
                answer = await self._client.delete_message_batch(QueueUrl=queue.url, Entries=entries)
            failed = [one for one in answer.get("Failed") or () if one.get("Code") not in _STALE]
            return {"Successful": answer.get("Successful") or (), "Failed": failed}

        entries = [{"Id": str(n), "ReceiptHandle": one.receipt} for n, one in enumerate(batch)]
        await insisting(call, entries, self._clock, f"deleting from queue {queue.name}")

    async def release(self, received: Received, delay: float = 0) -> None:
        """The message is handed out again, not before `delay` seconds, as far as SQS can hide it. One whose
        lease has ended is left alone."""
        now = self._clock.monotonic()
        if now < received.until:
            received.until = now
            await self._hide(received, now, ceil(max(0.0, delay)))

    async def extend(self, received: Received, seconds: float) -> bool:
        """Hide the message until `seconds` from now; False if its lease had ended, or cannot go on: SQS hides
        none for more than 12 hours from its receive."""
        now = self._clock.monotonic()
        if now >= received.until or now - received.since >= LONGEST_LEASE - 1:
            return False
        hidden = await self._hide(received, now, whole(seconds))
        if hidden is None:
            received.until = now
            return False
        received.until = now + hidden  # counted from before it was asked for
        return True

    async def _hide(self, received: Received, now: float, seconds: int) -> int | None:
        """Hide it for `seconds` from now, or what is left of the 12 hours: how many; none if it was lost."""
        seconds = min(seconds, int(LONGEST_LEASE - (now - received.since)))
        try:
            async with self._lookup.asking(received.queue, "holding a message of", passing=_STALE):
                await self._client.change_message_visibility(
                    QueueUrl=received.queue.url, ReceiptHandle=received.receipt, VisibilityTimeout=seconds
                )
        except ClientError:  # passed: the receipt is stale
            return None
        return seconds

    # ------------------------------------------------------------------ the queues themselves

    async def create(self, specs: Sequence[QueueSpec]) -> Sequence[str]:
        """What is missing for `specs` is there (see ``creation``); the names of what was made now.

        Raises:
            ConfigError: a queue of that name is there, and does not fit; others may have been made.
        """
        return await create(self._client, self._names, specs)

    async def visibility(self, stage: str) -> float:
        """Seconds for which the queue of `stage` hides a message from others when whoever receives it does
        not say for how long; Lambda does not."""
        return (await self._lookup.limits(await self._lookup.queue(stage))).visibility

    async def lease_of(self, arn: str) -> float | None:
        """Seconds for which the queue of that ARN, which may be any, hides a message; ``None`` if there is
        none that this client can see.

        Raises:
            ConfigError, Permanent, Retryable: it may not be asked, or did not answer.
        """
        parts = arn.split(":")  # arn:aws:sqs:region:account:name
        if len(parts) != 6 or parts[2] != "sqs":
            return None
        try:
            async with asking(f"asking how long queue {parts[5]} hides a message", passing=MISSING):
                found = await self._client.get_queue_url(QueueName=parts[5], QueueOwnerAWSAccountId=parts[4])
                answer = await self._client.get_queue_attributes(
                    QueueUrl=found["QueueUrl"], AttributeNames=["VisibilityTimeout", "QueueArn"]
                )
        except ClientError:  # passed: it is missing
            return None
        told = answer.get("Attributes", {})
        if told.get("QueueArn") != arn or "VisibilityTimeout" not in told:  # of that name in another region
            return None
        return float(told["VisibilityTimeout"])

    async def show_again(self, arn: str, due: Mapping[str, float]) -> None:
        """The messages of the queue of that ARN that were received under the receipts in `due` are handed out
        again after as many seconds. A stale receipt is fine.

        Raises:
            ConfigError, Permanent, Retryable: some are not, and wait for as long as they are hidden.
        """
        parts = arn.split(":")
        name = parts[-1]
        doing = f"showing messages of queue {name} again"
        async with asking(doing):
            found = await self._client.get_queue_url(QueueName=name, QueueOwnerAWSAccountId=parts[4])
        url = found["QueueUrl"]

        async def call(entries: Sequence[Entry]) -> Mapping[str, Any]:
            async with asking(doing):
                answer = await self._client.change_message_visibility_batch(QueueUrl=url, Entries=entries)
            failed = [one for one in answer.get("Failed") or () if one.get("Code") not in _STALE]
            return {"Successful": answer.get("Successful") or (), "Failed": failed}

        entries = [
            {"Id": str(n), "ReceiptHandle": receipt, "VisibilityTimeout": min(ceil(seconds), LONGEST_LEASE)}
            for n, (receipt, seconds) in enumerate(due.items())
        ]
        for first in range(0, len(entries), BATCH):
            await insisting(call, entries[first : first + BATCH], self._clock, doing)

    async def purge(self) -> None:
        """Empty every queue of this backend (see ``Names.has_queue``), dead letters included.

        Raises:
            Retryable: one was purged less than 60 seconds ago (as often as SQS allows).
        """
        prefix = self._names.of_queues
        token: dict[str, str] = {}
        while True:
            async with asking(f"listing queues {prefix}*"):
                page = await self._client.list_queues(QueueNamePrefix=prefix, MaxResults=1000, **token)
            urls = [
                url for url in page.get("QueueUrls") or () if self._names.has_queue(url.rpartition("/")[2])
            ]
            await all_of([partial(self._purge, url) for url in urls])
            if not page.get("NextToken"):
                return
            token = {"NextToken": page["NextToken"]}

    async def _purge(self, url: str) -> None:
        name = url.rpartition("/")[2]
        try:
            async with asking(f"purging queue {name}", passing=_PURGING | MISSING):
                await self._client.purge_queue(QueueUrl=url)
        except ClientError as error:
            if code_of(error) in _PURGING:
                raise Retryable(
                    f"queue {name} is being purged already: try again in 60 s", delay=60
                ) from error
