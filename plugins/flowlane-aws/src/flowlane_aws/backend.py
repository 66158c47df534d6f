"""``aws://name``: a log on DynamoDB, queues on SQS and channels on Kinesis that keep a backend's promises.

Log and queue cannot commit together here. So events that are owed to a queue say so until the queue has
accepted them; what a commit leaves undone when its process dies, the sweep does (``resend``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from flowlane.errors import ConfigError, FlowlaneError, Permanent, VersionConflict, redact
from flowlane.events import Event, Reference
from flowlane.lane import duration
from flowlane.ports import (
    Channel,
    Commit,
    Committed,
    Delivery,
    Deployment,
    Environment,
    Index,
    Patience,
    Publish,
    QueueSpec,
)
from flowlane.state import RunTally
from flowlane_aws.bounded import all_of, each, owned_tasks
from flowlane_aws.carriers import Carriers
from flowlane_aws.clients import open_client
from flowlane_aws.lazy import LazyClient
from flowlane_aws.log.commits import Draft, is_timer
from flowlane_aws.log.log import Log
from flowlane_aws.log.making import create
from flowlane_aws.log.table import HOT as REQUESTS
from flowlane_aws.log.table import Table
from flowlane_aws.names import Names, checked
from flowlane_aws.queue.queue import HOT, Queues
from flowlane_aws.queue.receiving import Received

if TYPE_CHECKING:
    from flowlane_aws.channels import Channels

logger = logging.getLogger("flowlane")

_Rounds = Mapping[tuple[str, int], RunTally | None]
_NONE: Final[Mapping[tuple[str, int], RunTally]] = {}


class AwsDelivery(msgspec.Struct, eq=False):
    """See ``ports.Delivery``."""

    event: Event
    stage: str
    attempt: int
    head: Event | None
    received: Received
    queues: Queues

    async def ack(self) -> None:
        await self.queues.delete([self.received])

    async def nack(self, *, delay: float = 0) -> None:
        await self.queues.release(self.received, delay)

    async def extend(self, seconds: float) -> bool:
        return await self.queues.extend(self.received, seconds)


class AwsBackend:
    """See ``ports.Backend``. Safe for many tasks of one loop, and for any number of processes.

    A commit that has begun goes on to its end though its caller is cancelled; `tasks` owns it.
    """

    exact_queue = False  # see ``ports.Backend``

    def __init__(
        self,
        names: Names,
        log: Log,
        table: Table,
        queues: Queues,
        channels: Callable[[], Channels],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._names = names
        self._log = log
        self._table = table
        self.queues = queues
        self._channels = channels
        self._carriers = Carriers(queues, self.channel)
        self._tasks = tasks
        #: Why the log took no commit the last time. Whoever receives next is told, and ends: attempts whose
        #: commits are refused would come again for ever.
        self._refused: ConfigError | None = None

    # ----------------------------------------------------------------- committing

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        result = await asyncio.shield(self._tasks.create_task(self._caught(work), name="flowlane-aws commit"))
        if isinstance(result, Exception):
            if isinstance(result, ConfigError):
                self._refused = result
            raise result
        return result

    async def _caught(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict] | Exception:
        try:
            return await self._commit(work)
        except Exception as error:  # noqa: BLE001  # the caller's, if there still is one; not the group's
            return error

    async def _commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        drafts = await self._log.append(work)
        applied = [one for one in drafts if isinstance(one.answer, Committed)]
        # What follows cannot undo the commits, and whatever of it fails is made good by others.
        after: list[Callable[[], Coroutine[Any, Any, _Rounds | None]]] = [
            partial(self._completed, applied),
            partial(self._send, applied),
            partial(self._follow, self._log.mark, applied, "index marks are left to the next sweep"),
            partial(self._follow, self._delete, applied, "messages that are done with come again"),
        ]
        rounds, *_ = await all_of(after)
        return [_told(one, rounds) for one in _checked(drafts)]

    async def _send(self, applied: Sequence[Draft]) -> None:
        """Hand over what the commits publish, and note in the log what its queues and channels have not."""
        publishes = [publish for one in applied for publish in one.commit.publish]
        if not publishes:
            return
        now = [publish for publish in publishes if not is_timer(publish)]
        unsent = [publish for publish in publishes if is_timer(publish)]
        try:
            accepted = await self._carriers.send(now)
        except FlowlaneError as error:
            logger.warning("%d deliveries are left to the sweep: %s", len(now), error)
            accepted = [False] * len(now)
        unsent += [publish for publish, done in zip(now, accepted, strict=True) if not done]
        marked = {publish.event.id for one in applied for publish in one.marked}
        left = {publish.event.id for publish in unsent}
        sent = [publish for publish in now if publish.event.id in marked - left]
        bare = [publish for publish in unsent if publish.event.id not in marked]
        await self._follow(self._log.clear, sent, "what is sent already may be sent again")
        if bare:
            await self._owe(applied, bare)

    async def _owe(self, applied: Sequence[Draft], bare: Sequence[Publish]) -> None:
        """Have the log note what the queues have not taken of events that stood in it before; a commit that
        is nothing but such publishing has failed if that cannot be noted either."""
        try:
            await self._log.owe(bare)
        except FlowlaneError as error:
            ids = {publish.event.id for publish in bare}
            for one in applied:
                if any(publish.event.id in ids for publish in one.bare):
                    if one.commit.appends or one.commit.tally:
                        logger.warning("a delivery is left to the sweep's reminders: %s", error)
                    else:
                        one.answer = error

    async def _delete(self, applied: Sequence[Draft]) -> None:
        for one in applied:
            if one.commit.ack is not None and not isinstance(one.commit.ack, AwsDelivery):
                # A channel brought it, or a payload of Lambda, whose answer settles it: that asks nobody, and
                # does not depend on whether the queues can be reached.
                await one.commit.ack.ack()
        acked = [one.commit.ack.received for one in applied if isinstance(one.commit.ack, AwsDelivery)]
        if acked:
            await self.queues.delete(acked)

    async def _completed(self, applied: Sequence[Draft]) -> _Rounds | None:
        try:
            return await self._log.completed(applied)
        except FlowlaneError as error:
            logger.info("whether a run is complete is asked for once more: %s", error)
            return None

    async def _follow(
        self, work: Callable[[Any], Coroutine[Any, Any, None]], of: Any, otherwise: str
    ) -> None:
        try:
            await work(of)
        except FlowlaneError as error:
            logger.warning("%s: %s", otherwise, error)

    async def resend(self, lane: str) -> int:
        count = 0
        held: set[tuple[str, str]] = set()  # groups: behind what is not sent, nothing of them is
        async for portion in self._log.owed(lane):
            owed = [publish for publish in portion if (publish.stage, publish.group) not in held]
            if not owed:
                continue
            accepted = await self._carriers.send(owed)
            held |= {
                (p.stage, p.group) for p, done in zip(owed, accepted, strict=True) if p.group and not done
            }
            left = {publish.event.id for publish in portion if (publish.stage, publish.group) in held}
            left |= {publish.event.id for publish, done in zip(owed, accepted, strict=True) if not done}
            sent = [publish for publish in owed if publish.event.id not in left]
            await self._log.clear(sent)
            count += sum(accepted)
        return count

    # ----------------------------------------------------------------- the log

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        return await self._log.last(streams)

    def read(self, stream: str, *, after: int = 0) -> AsyncIterator[Event]:
        return self._log.read(stream, after=after)

    def scan(self, lane: str, *, run: str | None = None) -> AsyncIterator[Event]:
        return self._log.scan(lane, run=run)

    def units(self, lane: str, index: Index, patience: Patience | None = None) -> AsyncIterator[Event]:
        return self._log.units(lane, index, patience)

    async def runs(self, lane: str, limit: int) -> Sequence[Event]:
        return await self._log.runs(lane, limit)

    async def tally(self, run: str, round: int) -> RunTally:
        return await self._log.tally(run, round)

    # ----------------------------------------------------------------- queues

    async def receive(
        self, stages: Sequence[str], limit: int, *, lease: float, wait: float = 0
    ) -> Sequence[Delivery]:
        refused = self._refused or self._carriers.refused
        if refused is not None:
            self._refused = self._carriers.refused = None
            raise refused
        return await self._with_heads(await self.queues.receive(stages, limit, lease=lease, wait=wait))

    async def given_up(self, stages: Sequence[str], limit: int) -> Sequence[Delivery]:
        return await self._with_heads(await self.queues.given_up(stages, limit))

    async def _with_heads(self, received: Sequence[Received]) -> Sequence[Delivery]:
        if not received:
            return []
        try:
            heads = await self._log.heads([one.event for one in received])
        except BaseException:
            # Nobody handles them: others may have them before their leases end.
            await each([partial(self.queues.release, one, 0) for one in received])
            raise
        return [
            AwsDelivery(one.event, one.stage, one.attempt, heads.get(one.event.subject), one, self.queues)
            for one in received
        ]

    async def lease_of(self, queue: str) -> float | None:
        """See ``flowlane.aws_lambda.visibility.Leasing``."""
        return await self.queues.lease_of(queue)

    async def show_again(self, queue: str, due: Mapping[str, float]) -> None:
        """See ``flowlane.aws_lambda.visibility.Leasing``."""
        await self.queues.show_again(queue, due)

    async def create(self, queues: Sequence[QueueSpec]) -> Sequence[str]:
        made = [self._table.name] if await create(self._table) else []
        made += await self.queues.create(queues)
        return [*made, *await self._channels().create(queues)]

    def template(self, deployment: Deployment) -> Mapping[str, Any]:
        """See ``ports.Deployable``: a CloudFormation template."""
        from flowlane_aws.deploy import template  # a function is started without

        return template(self._names, deployment)

    async def purge(self) -> None:
        await self.queues.purge()

    def channel(self, name: str) -> Channel:
        return self._channels().channel(name, self)

    def stream_of(self, channel: str) -> str:
        """See ``flowlane.aws_lambda.channels.Streaming``."""
        return self._names.stream(channel)


def _checked(drafts: Sequence[Draft]) -> Sequence[Draft]:
    """`drafts`, each of which is known to be applied or in conflict.

    Raises:
        FlowlaneError: what one of them ended with that is not; what is wrong for good comes first, so that
            the caller tries them one by one.
    """
    failed = [one.answer for one in drafts if isinstance(one.answer, FlowlaneError)]
    failed = [error for error in failed if not isinstance(error, VersionConflict)]
    for error in sorted(failed, key=lambda error: not isinstance(error, Permanent)):
        raise error
    return drafts


def _told(one: Draft, rounds: _Rounds | None) -> Committed | VersionConflict:
    """The answer to a commit, with those rounds of its that are complete."""
    if isinstance(one.answer, VersionConflict):
        return one.answer
    keys = [(tally.run, tally.round) for tally in one.commit.tally]
    if not keys:
        return Committed(_NONE)
    if rounds is None:
        return Committed()
    return Committed({key: tally for key in keys if (tally := rounds.get(key)) is not None})


# --------------------------------------------------------------------------- factory


@asynccontextmanager
async def open_backend(
    uri: str,
    environment: Environment,
    *,
    region: str = "",
    endpoint: str = "",
    table: str = "",
    queue_prefix: str = "",
    aggregate: str | bool = False,
    hold: str = "",
) -> AsyncIterator[AwsBackend]:
    """The backend that `uri` names: ``aws://name``, whose table, queues and streams are called ``name-...``.

    ``table`` and ``queue_prefix`` name single ones otherwise. ``aggregate=true`` has channels put small
    records together, as the Kinesis Producer Library does (see ``kinesis.producer``); ``hold`` is how long a
    shard whose owner has vanished is left alone (``30s``). Region, endpoint and credentials are the SDK's
    settings where they are not given. Nothing is asked of AWS before it is used, and nothing is ever made but
    by ``create``.

    Raises:
        ConfigError: the name, or one that follows from it, is none that AWS takes; or an option is wrong.
    """
    parts = urlsplit(uri)
    if parts.scheme != "aws" or not parts.netloc or parts.path.strip("/") or "@" in parts.netloc:
        raise ConfigError(f"{redact(uri)}: write aws://name, of which table and queues are called name-...")
    together = str(aggregate).lower()
    if together not in ("true", "false"):
        raise ConfigError(f"{redact(uri)}: aggregate={aggregate!r}: say true or false")
    try:
        held = duration(hold) if hold else None
    except ConfigError as error:
        raise ConfigError(f"{redact(uri)}: hold={hold}: {error}") from None
    names = checked(Names(parts.netloc, table, queue_prefix, region, together == "true", hold))
    clock = environment.clock
    # Left in this order: commits under way end before the clients are closed.
    async with AsyncExitStack() as stack, owned_tasks() as tasks:

        def client(service: str, **settings: Any) -> LazyClient:
            opening = partial(open_client, service, region=region, endpoint=endpoint, **settings)
            return LazyClient(opening, stack, tasks)

        log_table = Table(client("dynamodb", read_timeout=5.0, brisk=REQUESTS), names.log, clock, names.uri)
        log = Log(log_table, clock)

        async def resolve(reference: Reference) -> Event | None:
            return await log.event(reference.stream, reference.version)

        queues = Queues(client("sqs", brisk=HOT), names, clock, resolve, tasks)

        @cache
        def channels() -> Channels:
            from flowlane_aws.channels import RECORDS, Channels  # a process without a channel starts without

            return Channels(names, client("kinesis", brisk=RECORDS), clock, hold=held)

        yield AwsBackend(names, log, log_table, queues, channels, tasks)
