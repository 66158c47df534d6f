"""S3's store as tests open it, on whatever the SDK's environment points at, and a look at its connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from flowlane.clock import SystemClock
from flowlane.ports import Connections, Environment
from flowlane_aws.clients import open_client
from flowlane_aws.s3.store import S3Store, open_store

BUCKET = "flowlane-test"
BASE = f"s3://{BUCKET}/deep/"


class HastyClock(SystemClock):
    """The machine's clock, but nobody sleeps; it can be pushed on."""

    pushed = 0.0

    def monotonic(self) -> float:
        """See ``Clock.monotonic``."""
        return SystemClock.monotonic() + self.pushed

    async def sleep(self, seconds: float) -> None:
        """Return at once."""
        await asyncio.sleep(0)


@asynccontextmanager
async def opened(*, clock: SystemClock | None = None, bucket: bool = True) -> AsyncIterator[S3Store]:
    """The store as lanes get it, with an empty bucket."""
    async with open_store("s3://", Environment(clock or HastyClock(), cast(Connections, None))) as store:
        if bucket:
            await store._client.create_bucket(Bucket=BUCKET)
        yield store


@asynccontextmanager
async def narrow(
    endpoint: str, *, connections: int = 10, read_timeout: float = 5.0
) -> AsyncIterator[S3Store]:
    """A store with few connections, or little patience, or another endpoint."""
    async with open_client(
        "s3", endpoint=endpoint, connections=connections, read_timeout=read_timeout
    ) as client:
        yield S3Store(client, HastyClock())


def acquired(store: S3Store) -> int:
    """How many connections of the store's pool are in use."""
    sessions: Any = store._client._endpoint.http_session._sessions
    return sum(len(session.connector._acquired) for session in sessions.values())
