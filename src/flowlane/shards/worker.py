"""One worker: an iteration over what a consumer is owed of a sharded stream, beside others of its name.

Its tasks belong to the iteration: a keeper, which looks at the leases, takes shards, asks for some and hands
over others, and for each shard held a reader, one page ahead of what is handed out.

A hold is renewed by what is settled. Besides, an event is appended only where a batch is handed out or
extended and the last event is a third of ``hold`` old. A shard that is idle costs no event at all: whether
its owner is alive does not matter until something comes, and that is found out by looking (``Outlook``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import Any, Final, Self, TypeVar

import msgspec

from flowlane import events
from flowlane.backends.common import News
from flowlane.clock import Clock
from flowlane.committer import ordinary
from flowlane.errors import FlowlaneError, Retryable
from flowlane.shards.balance import plan
from flowlane.shards.held import Batch, Held
from flowlane.shards.leases import Change, Lease, Leases
from flowlane.shards.outlook import Outlook, beside
from flowlane.shards.port import Shards

T = TypeVar("T")

logger = logging.getLogger("flowlane")

#: Seconds for giving everything back when an iteration ends; what is not given back is taken after ``hold``.
_LEAVING: Final = 5.0
#: Seconds between two tries while the service or the log is away, at most.
_PAUSE: Final = 5.0

#: What the keepers of a process look at when one of them has done it, and not only at their next turn.
_TELLING: Final = frozenset(
    {events.SHARD_RELEASED, events.SHARD_WANTED, events.SHARD_ENDED, events.SHARD_REWOUND}
)

replace = msgspec.structs.replace


class Worker:
    """See the module. ``hold``: for how many seconds a lease must have stood still, while there was something
    to do, before another worker takes it."""

    def __init__(
        self, shards: Shards, leases: Leases, clock: Clock, *, hold: float, limit: int, wait: float
    ) -> None:
        self._shards, self._leases, self._clock = shards, leases, clock
        self._hold, self._limit, self._wait = hold, max(1, limit), wait
        self._tick = hold / 3
        self.me = clock.token()
        self._outlook = Outlook(shards, leases, clock, hold)
        self._held: dict[str, Held] = {}
        self._wanted: set[str] = set()  # what may be ours by now, or be owed to us, and is not held yet
        self._surveyed = -inf
        self._asking = False  # whether somebody waits for a batch
        self._asked = 0  # how often somebody has begun to
        self._asked_last = -inf
        self._starving: float | None = None  # since when (Clock.monotonic) there was none
        self._turn = 0
        self._survey_turn = asyncio.Lock()
        self._news = News()  # for who iterates: pages, and what becomes of shards
        self._bell = News()  # for the keeper
        self._tasks = asyncio.TaskGroup()
        self._failure: Exception | None = None
        self._over = False

    # ----------------------------------------------------------------- for who iterates

    async def __aenter__(self) -> Self:
        """Shards are taken and read while the context is open. Leaving it gives them back, and leaves no task
        behind; what was handed out and not settled comes again, to whoever has its shard next."""
        # No generator: a loop that ends with an iteration that nobody closed would close it beside that.
        self._leases.listeners[self] = self._notice
        await self._tasks.__aenter__()
        self._keeper = self._start(self._tasks, "keeper", self._keep)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._over = True
        for task in [self._keeper, *(held.task for held in self._held.values())]:
            if task is not None:
                task.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)  # what was raised in here is no concern of theirs
        finally:
            del self._leases.listeners[self]
            await self._leave()

    async def next(self) -> Batch | None:
        """The next batch; ``None`` when none has come for ``wait`` seconds and nothing is left behind what
        others hold.

        Raises:
            Retryable: the service or the log has been away for ``hold`` seconds.
            ConfigError: the stream cannot be read.
        """
        loop = asyncio.get_running_loop()
        self._asking, self._asked = True, self._asked + 1
        end = loop.time() + self._wait
        try:
            while True:
                seen = self._news.count
                if self._failure is not None:
                    raise self._failure
                batch = await self._hand_out()
                if batch is not None:
                    self._starving = None
                    return batch
                if self._starving is None:
                    self._starving = self._clock.monotonic()
                    self._bell()
                left = end - loop.time()
                if left <= 0 and await self._is_over():
                    return None
                await self._news.wait(seen, min(left, self._tick) if left > 0 else self._tick)
        finally:
            self._asking = False
            self._asked_last = self._clock.monotonic()

    async def _hand_out(self) -> Batch | None:
        """A batch of a shard that has one; another shard comes first each time, so that none starves."""
        ids = list(self._held)
        for n in range(len(ids)):
            held = self._held.get(ids[(self._turn + n) % len(ids)])
            if held is None or not held.ready:
                continue
            if self._leases.known(held.shard.id).lease.wanted:
                self._bell()  # it goes to who asked for it
            elif await self._insist(partial(self.renew, held), "a shard is held") and held.ready:
                self._turn += n + 1
                return held.hand_out(self, self._limit)
        return None

    async def _is_over(self) -> bool:
        """Whether all that there is has been seen: each shard of ours was looked at since somebody asked, and
        behind what others hold there is nothing. What is handed out already is nothing to wait for."""
        try:
            await self._survey()
            for held in self._held.values():
                if held.out is None and not (held.idle.is_set() and held.looked == self._asked):
                    return False
            for view in self._outlook.views():
                if view.shard in self._held:
                    continue
                # Should its owner die, its records come here.
                if not view.lease.owner or await self._outlook.look(view.shard):
                    return False
        except Retryable as error:
            logger.info("whether the channel is read to its end is asked for once more: %s", error)
            return False
        return not any(held.ready for held in self._held.values())

    # ----------------------------------------------------------------- settling

    async def settle(self, held: Held, count: int) -> None:
        """The batch that is out is over; its first `count` records are settled, unless it has been lost.
        Who has asked for the shard has it with the same event, so that nothing is done twice."""
        if not count:
            held.out = None
            self._wake(held)
            return
        batch = held.out
        place, ended = held.past(count)
        settled, behind = held.settled + count, held.page.behind

        def moved(lease: Lease) -> tuple[str, Lease] | None:
            if lease.owner != self.me or held.lost:
                return None
            if ended:
                return events.SHARD_ENDED, Lease("", place, settled, behind, True)
            return events.SHARD_SETTLED, Lease(lease.wanted or self.me, place, settled, behind)

        if await self._change(held, moved) and held.out is batch:
            held.move(count)
            held.out = None
            self._wake(held)

    async def renew(self, held: Held) -> bool:
        """It is held for two thirds of ``hold`` at least; False if it was lost."""
        if self._clock.monotonic() - held.touched < self._tick:
            return not held.lost

        def alive(lease: Lease) -> tuple[str, Lease] | None:
            return (events.SHARD_HELD, lease) if lease.owner == self.me and not held.lost else None

        return await self._change(held, alive) and not held.lost

    async def _change(self, held: Held, change: Change) -> bool:
        """See ``Leases.change``, of a shard that is held; what that shows to be another's is lost."""
        began = self._clock.monotonic()
        stands = await self._leases.change(held.shard.id, change)
        if stands:
            held.touched = began
        if not stands or self._leases.known(held.shard.id).lease.owner != self.me:
            self._drop(held)
        return stands

    def _drop(self, held: Held) -> None:
        held.lose()
        if self._held.get(held.shard.id) is held:
            del self._held[held.shard.id]
        self._news()
        self._bell()

    def _wake(self, held: Held) -> None:
        self._news()
        if self._leases.known(held.shard.id).lease.wanted:
            self._bell()

    def _notice(self, shard: str, kind: str, lease: Lease) -> None:
        """An event of a lease is known to this process since now."""
        held = self._held.get(shard)
        if held is not None and lease.owner != self.me:
            self._drop(held)
        if kind in _TELLING or (lease.owner == self.me and held is None):
            self._bell()
        if self._asking:
            self._news()

    # ----------------------------------------------------------------- the keeper

    def _start(
        self, tasks: asyncio.TaskGroup, name: str, work: Callable[..., Awaitable[None]], *arguments: Any
    ) -> asyncio.Task[None]:
        return tasks.create_task(self._guarded(work, *arguments), name=f"flowlane-shards {name}")

    async def _guarded(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        try:
            await work(*arguments)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # raised by `next`
            self._failure = ordinary(error)
            self._news()

    async def _keep(self) -> None:
        while True:
            seen = self._bell.count
            await self._insist(self._survey, "the leases of a channel are looked at")
            await self._bell.wait(seen, self._tick * (0.75 + self._clock.random() / 4))

    async def _insist(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        """What `call` gives as soon as it gives anything; it is called again while the service or the log is
        away, for ``hold`` seconds."""
        failing: float | None = None
        while True:
            try:
                return await call()
            except Retryable as error:
                now = self._clock.monotonic()
                failing = now if failing is None else failing
                if now - failing > self._hold:
                    raise
                logger.info("%s once more: %s", what, error)
                pause = min(self._tick, _PAUSE) * self._clock.random()
                await self._clock.sleep(max(error.delay or 0.0, pause))

    async def _survey(self) -> None:
        """See how things stand, and do what follows."""
        async with self._survey_turn:
            began = self._clock.monotonic()
            await self._outlook.refresh()
            await beside(self._give_up, [held for held in self._held.values() if self._is_due(held)])
            self._adopt()
            self._surveyed = began
            if not self._asking and began - self._asked_last >= self._tick:
                return  # nobody would handle what is taken now
            await self._outlook.look_around(self.me)
            now = self._clock.monotonic()
            starving = self._starving is not None and now - self._starving >= self._tick
            wish = plan(self.me, self._outlook.views(), self._hold, starving=starving)
            await beside(self._take, wish.take)
            await beside(self._ask, wish.ask)

    def _is_due(self, held: Held) -> bool:
        """Whether it is to be given up: somebody asked for it, or it is gone; not while a batch is out."""
        gone = held.shard.id not in self._outlook.listed
        return held.out is None and (gone or bool(self._leases.known(held.shard.id).lease.wanted))

    async def _give_up(self, held: Held) -> None:
        self._drop(held)  # before anything is awaited: nothing more of it is handed out
        await self._leases.change(held.shard.id, self._released)

    def _released(self, lease: Lease) -> tuple[str, Lease] | None:
        if lease.owner == self.me:
            return events.SHARD_RELEASED, replace(lease, owner=lease.wanted, wanted="")
        if lease.wanted == self.me:
            return events.SHARD_RELEASED, replace(lease, wanted="")
        return None

    def _adopt(self) -> None:
        """Begin with what was handed over to us."""
        for shard in self._outlook.listed:
            known = self._leases.known(shard)
            if known.lease.owner == self.me and shard not in self._held:
                # Not seen by the last survey: it was appended after that had begun.
                self._begin(shard, self._surveyed if known.since > self._surveyed else -inf)

    async def _take(self, shard: str) -> None:
        began = self._clock.monotonic()
        self._wanted.add(shard)

        def taken(lease: Lease) -> tuple[str, Lease]:
            return events.SHARD_TAKEN, replace(lease, owner=self.me, wanted="")

        if await self._leases.change(shard, taken, strict=True):
            self._begin(shard, began)
        else:
            self._wanted.discard(shard)

    async def _ask(self, shard: str) -> None:
        def asked(lease: Lease) -> tuple[str, Lease]:
            return events.SHARD_WANTED, replace(lease, wanted=self.me)

        self._wanted.add(shard)
        await self._leases.change(shard, asked, strict=True)

    def _begin(self, shard: str, touched: float) -> None:
        """Read a shard that is ours."""
        lease = self._leases.known(shard).lease
        if self._over or lease.owner != self.me or shard not in self._outlook.listed:
            return
        held = self._held[shard] = Held(self._outlook.listed[shard], lease, touched)
        self._wanted.discard(shard)
        held.task = self._start(self._tasks, shard, self._read, held)

    async def _leave(self) -> None:
        """Give back what is held, and withdraw what was asked for."""
        ids = [*self._held, *(self._wanted - set(self._held))]
        for held in self._held.values():
            held.lose()
        try:
            async with asyncio.timeout(_LEAVING):
                if self._wanted:
                    await self._leases.refresh(ids)
                await beside(self._let_go, ids)
        except (TimeoutError, FlowlaneError) as error:
            why = str(error) or "no answer"
            logger.warning("shards are not given back (%s): others take them after %g s", why, self._hold)

    async def _let_go(self, shard: str) -> None:
        await self._leases.change(shard, self._released)

    # ----------------------------------------------------------------- reading

    async def _read(self, held: Held) -> None:
        """Read the shard to its end. The next page waits until all of the one before is settled."""
        reader = self._shards.read(held.shard, held.place)
        while True:
            # By count, not by the clock: of a look and a question at one moment, either may be the earlier.
            asked, before = self._asked, held.looked
            page = await self._insist(reader.page, "a shard is read")
            if page.records:
                await held.idle.wait()
                held.turn(page)
            elif page.ended:
                await held.idle.wait()
                await self._end(held)
            elif not page.behind:
                held.looked = asked
            if page.records or page.ended or (self._asking and before < asked == self._asked):
                self._news()  # at the end of a shard once for each time somebody asks, not at each look
            if page.ended:
                return

    async def _end(self, held: Held) -> None:
        """All is settled, and nothing will come: the shards that it was split or merged into may be read."""

        def ended(lease: Lease) -> tuple[str, Lease] | None:
            if lease.owner != self.me or held.lost:
                return None
            return events.SHARD_ENDED, replace(lease, owner="", wanted="", ended=True, behind=0.0)

        await self._insist(partial(self._change, held, ended), "a shard is ended")
