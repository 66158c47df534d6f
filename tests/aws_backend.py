"""What the tests of ``aws://`` share: a real clock, storages of their own, and a count of requests."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from aiobotocore.session import AioSession

from flowlane.clock import SystemClock
from flowlane.ports import Backend, Environment, QueueSpec
from flowlane.testing.backend_model import Opener, Storage
from flowlane.testing.backend_suite import ORDERED, QUEUES
from flowlane.testing.manual import ManualClock
from flowlane_aws.backend import AwsBackend, open_backend
from flowlane_aws.clients import open_client
from flowlane_aws.queue import creation

_numbers = count(1)

#: Every queue that the suites publish to or receive from.
STAGES = (*QUEUES, "none")


class RealClock(ManualClock):
    """What a stand-in's leases go by; its wall clock can be set."""

    def __init__(self) -> None:
        super().__init__()
        self._off = timedelta()

    def advance(self, seconds: float) -> None:
        raise AssertionError("nobody moves a real clock: let it elapse")

    def set(self, seconds: float) -> None:
        self._off += timedelta(seconds=seconds)

    def now(self) -> datetime:
        return datetime.now(UTC) + self._off

    def monotonic(self) -> float:
        return time.monotonic()

    def token(self) -> str:
        return SystemClock().token()  # nobody else's, in whatever process: AWS remembers them

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@asynccontextmanager
async def opened(name: str, clock: ManualClock | None = None) -> AsyncIterator[AwsBackend]:
    """``aws://name`` on the stand-in that the environment points at."""
    environment = Environment(clock or RealClock(), None)  # type: ignore[arg-type] # it opens nothing else
    async with open_backend(f"aws://{name}", environment) as backend:
        yield backend


def new_name() -> str:
    """The name of a backend that is nowhere yet."""
    return f"s{next(_numbers)}"


async def _make(specs: Sequence[QueueSpec], backend: AwsBackend) -> None:
    """As ``backend.create`` makes queues, its nine calls each by the short way: a third of a test's CPU."""
    async with open_client("sqs", brisk=("CreateQueue", "GetQueueUrl", "GetQueueAttributes")) as sqs:
        await creation.create(sqs, backend._names, specs)


def storage_on(clock: ManualClock, stages: Iterable[str] = STAGES) -> Storage:
    """New, empty storages, each of a name of its own; made when they are first opened."""

    def storage() -> Opener:
        name, made = new_name(), False

        @asynccontextmanager
        async def opening() -> AsyncIterator[Backend]:
            nonlocal made
            async with opened(name, clock) as backend:
                if not made:
                    await backend.create([])
                    await _make([QueueSpec(s, 30.0, 60.0, s == ORDERED) for s in stages], backend)
                    made = True
                yield backend

        return opening

    return storage


class Requests(Counter[str]):
    """How often each operation was asked for by clients that were made while they are counted.

    What one of ``before`` (given the operation and its parameters) raises is raised in the request's place;
    what one of ``after`` raises, in place of its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Callable[[str, dict[str, Any]], None]] = []
        self.after: list[Callable[[str, dict[str, Any]], None]] = []


@contextmanager
def counting() -> Iterator[Requests]:
    """Counts the requests of every client that is opened meanwhile: the SDK's retries are none of theirs."""
    requests = Requests()
    session: Any = AioSession
    create = session._create_client

    def begin(model: Any, params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        context["asked"] = params
        requests[model.name] += 1
        for look in requests.before:
            look(model.name, params)

    def end(http_response: Any, model: Any, context: dict[str, Any], **_: Any) -> None:
        for look in requests.after if http_response.status_code < 300 else ():
            look(model.name, context["asked"])

    async def counted(self: AioSession, *args: Any, **kwargs: Any) -> Any:
        client = await create(self, *args, **kwargs)
        client.meta.events.register_first("provide-client-params", begin)
        client.meta.events.register_last("after-call", end)
        return client

    session._create_client = counted
    try:
        yield requests
    finally:
        session._create_client = create
