"""A shard that a worker holds, and the batches of it that are handed out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Protocol

from flowlane.ports import ChannelRecord
from flowlane.shards.leases import Lease
from flowlane.shards.port import Page, Place, Shard


class Held:
    """The page at hand, from ``at`` on nothing of it is settled, and the batch of it that is ``out``.

    ``touched``: a moment (``Clock.monotonic``) before the last event of ours was appended to the lease.
    ``idle`` is set while all that is at hand has been settled. ``looked``: how often a batch had been asked
    for when the last look began that found the end of what the shard has. ``lost``: it is another's, or about
    to be.
    """

    def __init__(self, shard: Shard, lease: Lease, touched: float) -> None:
        self.shard = shard
        self.place = lease.place
        self.settled = lease.settled
        self.touched = touched
        self.page = Page()
        self.at = 0
        self.out: Batch | None = None
        self.lost = False
        self.idle = asyncio.Event()
        self.idle.set()
        self.looked = 0
        self.task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether a batch may be handed out."""
        return not (self.lost or self.out or self.idle.is_set())

    def turn(self, page: Page) -> None:
        """`page`, which has records, is at hand now."""
        self.page, self.at = page, 0
        self.idle.clear()

    def hand_out(self, settling: Settling, limit: int) -> Batch:
        """The next batch, of at most `limit` records."""
        self.out = Batch(settling, self, self.page.records[self.at : self.at + limit])
        return self.out

    def past(self, count: int) -> tuple[Place, bool]:
        """The place behind the next `count` records at hand, and whether the shard ends there."""
        end = self.at + count
        return self.page.place(end - 1), self.page.ended and end == len(self.page.records)

    def move(self, count: int) -> None:
        """The next `count` records at hand are settled."""
        self.place, _ = self.past(count)
        self.settled += count
        self.at += count
        if self.at == len(self.page.records):
            self.page = Page()
            self.idle.set()

    def lose(self) -> None:
        """It is no longer ours: nothing of it is handed out or settled any more."""
        self.lost, self.out = True, None
        if self.task is not None:
            self.task.cancel()
            self.task = None  # what it was cancelled with holds its frames, and they its pages and this


class Settling(Protocol):
    """Who handed a batch out."""

    def settle(self, held: Held, count: int) -> Awaitable[None]: ...
    def renew(self, held: Held) -> Awaitable[bool]: ...


class Batch:
    """See ``ports.ChannelBatch``."""

    __slots__ = ("_held", "_settling", "records")

    def __init__(self, settling: Settling, held: Held, records: Sequence[ChannelRecord]) -> None:
        self._settling, self._held, self.records = settling, held, records

    async def settle(self, count: int | None = None) -> None:
        """See ``ChannelBatch.settle``: one event, none if `count` is 0.

        Raises:
            Retryable: the log is away, and it is not known whether this is settled: try again, or have it
                handed out again.
        """
        if self._held.out is self:
            await self._settling.settle(self._held, len(self.records[:count]))

    async def extend(self) -> bool:
        """See ``ChannelBatch.extend``: an event at most every third of ``hold``.

        Raises:
            Retryable: the log is away, and it is not known whether this is held any longer.
        """
        return self._held.out is self and await self._settling.renew(self._held) and self._held.out is self
