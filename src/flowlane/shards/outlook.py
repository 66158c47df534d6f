"""What a worker sees of all shards of its stream: the list, the leases, and what waits behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from math import inf
from typing import Final, TypeVar

from flowlane.clock import Clock
from flowlane.errors import Retryable
from flowlane.shards.balance import View
from flowlane.shards.leases import Leases
from flowlane.shards.port import Shard, Shards

T = TypeVar("T")

#: Pages without records that one look goes through, at most.
_PAGES: Final = 5


class Outlook:
    """See the module. The list of shards is asked for every ``hold`` seconds, and when a shard has ended."""

    def __init__(self, shards: Shards, leases: Leases, clock: Clock, hold: float) -> None:
        self._shards, self._leases, self._clock, self._hold = shards, leases, clock, hold
        self.listed: dict[str, Shard] = {}
        self._listed_at = -inf
        self._ended: frozenset[str] = frozenset()
        self._pending: dict[str, tuple[float, float]] = {}  # of what stands so since then, known since when

    async def refresh(self) -> None:
        """What is seen is as new as this call; of the list of shards, as new as is said above.

        Raises:
            Retryable: the service or the log is away.
            ConfigError: the stream cannot be read.
        """
        if self._clock.monotonic() - self._listed_at >= self._hold:
            await self._list()
        await self._leases.refresh(self.listed)
        ended = frozenset(shard for shard in self.listed if self._leases.known(shard).lease.ended)
        if ended - self._ended:
            await self._list()  # those that it was split or merged into may be there only now
            await self._leases.refresh(self.listed)
        self._ended = ended

    async def _list(self) -> None:
        began = self._clock.monotonic()
        self.listed = {shard.id: shard for shard in await self._shards.shards()}
        self._listed_at = began

    def views(self) -> list[View]:
        """The shards that may be read: their parents are read to their ends, and they are not yet."""
        return [self._view(shard) for shard in self.listed.values() if self._is_open(shard)]

    def _is_open(self, shard: Shard) -> bool:
        def ended(shard: str) -> bool:
            return shard not in self.listed or self._leases.known(shard).lease.ended

        return not ended(shard.id) and all(ended(parent) for parent in shard.parents)

    def _view(self, shard: Shard) -> View:
        known, now = self._leases.known(shard.id), self._clock.monotonic()
        of, found = self._pending.get(shard.id, (-inf, 0.0))
        pending = now - found if of == known.since else None
        asked = now - known.asked if known.asked is not None else None
        return View(shard.id, known.lease, now - known.since, pending, asked)

    async def look(self, shard: str) -> bool:
        """Whether anything is to be done behind the place of the lease of `shard`: records, or that it ended.

        Raises:
            Retryable: the service is away.
        """
        known = self._leases.known(shard)
        reader = self._shards.read(self.listed[shard], known.lease.place, limit=1)
        something = True  # if only empty pages came until now: its newest record is somewhere behind them
        for _ in range(_PAGES):
            page = await reader.page()
            something = bool(page.records) or page.ended
            if something or not page.behind:
                break
            something = True
        if not something:
            self._pending.pop(shard, None)
        elif self._pending.get(shard, (-inf, 0.0))[0] != known.since:
            self._pending[shard] = (known.since, self._clock.monotonic())
        return something

    async def look_around(self, me: str) -> None:
        """Look behind the leases of others that have stood still for a third of ``hold``: whether there is
        something that their owners should be doing. Of many workers about one looks each time, by chance."""
        views = [view for view in self.views() if view.lease.owner]
        others = len({view.lease.owner for view in views} - {me})
        still = [view.shard for view in views if view.lease.owner != me and view.still >= self._hold / 3]
        await beside(self._glance, [shard for shard in still if self._clock.random() * others < 1])

    async def _glance(self, shard: str) -> None:
        with suppress(Retryable):  # it is looked at again at the next turn
            await self.look(shard)


async def beside(call: Callable[[T], Awaitable[None]], each: Iterable[T]) -> None:
    """``call(one)`` for each one, beside each other and to their ends; raises the first error of any."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(_caught(call, one)) for one in each]
    for error in [task.result() for task in running]:
        if error is not None:
            raise error


async def _caught(call: Callable[[T], Awaitable[None]], one: T) -> Exception | None:
    try:
        await call(one)
    except Exception as error:  # noqa: BLE001  # raised by ``beside``, and not as a group
        return error
    return None
