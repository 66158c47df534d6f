"""Many calls at once, as many as the table takes: more while it takes them, half when it says it is too many.

Additive increase, multiplicative decrease, as in TCP: the number of calls in flight grows by one for each
round of calls that went well and is halved by a throttled one, once for all calls that were in flight then.
A throttled call waits for a random time below a bound that doubles ("full jitter", AWS Builders' Library,
"Timeouts, retries, and backoff with jitter").

Where several write the same items, transactions get in each other's way. Items that are in another one are
parted from those that are not: so the more who contend, the smaller the transactions, down to single items,
which nothing keeps from being written for long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from typing import Final, TypeVar

import msgspec

from flowlane.clock import Clock
from flowlane.errors import Retryable
from flowlane.reasons import leaf
from flowlane_aws.dynamodb.forms import Answer, Form, Item, chunks

T = TypeVar("T")

#: Calls in flight: at the beginning, and at most.
START: Final = 8
MOST: Final = 32

_TRIES: Final = 12  # of one call without any progress,
_PATIENCE: Final = 60.0  # and seconds: then the engine's policy takes over
_QUICK_TRIES: Final = 6  # of a call that is not one of many
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds, before chance shortens them
_LONGEST_WAIT: Final = 1.0  # and for another transaction's end


async def patient(clock: Clock, call: Callable[[], Awaitable[T]]) -> T:
    """What `call` returns, which is made again a few times if it fails in a way that may pass.

    Raises:
        Retryable: it failed too often.
    """
    for tries in range(_QUICK_TRIES - 1):
        try:
            return await call()
        except Retryable:
            await _pause(clock, tries)
    return await call()


async def _pause(clock: Clock, tries: int, longest: float = _LONGEST_PAUSE) -> None:
    await clock.sleep(clock.random() * min(longest, _FIRST_PAUSE * 2 ** min(tries, 30)))


class Pace:
    """How many calls may be in flight; shared by all that write to one table."""

    def __init__(self, most: int = MOST) -> None:
        self.limit = float(min(START, most))
        self._most = most
        self._cuts = 0

    @property
    def cuts(self) -> int:
        """How often it was halved: a call tells by it whether its answer is news."""
        return self._cuts

    def well(self) -> None:
        """A call went through."""
        self.limit = min(float(self._most), self.limit + 1 / self.limit)

    def throttled(self, cuts: int) -> None:
        """A call was throttled that began when it had been halved `cuts` times."""
        if cuts == self._cuts:
            self.limit = max(1.0, self.limit / 2)
            self._cuts += 1


class Call(msgspec.Struct, gc=False):
    """Items for one call, and how often in a row it has been made in vain."""

    items: Sequence[Item]
    tries: int = 0


class Delivery:
    """Items on their way to a table: by one form, at one pace."""

    def __init__(self, clock: Clock, form: Form, pace: Pace) -> None:
        self._clock = clock
        self._form = form
        self._pace = pace

    async def put(self, items: AsyncIterable[Sequence[Item]]) -> list[tuple[Item, str]]:
        """All `items` are in the table, or a later row is, but those returned, which it refuses. They have
        different keys, and are sent as they come, in any order. More of them are asked for when fewer calls
        wait than may be in flight.

        Raises:
            Retryable: throttled, or away, for too long; any of the items may be in the table.
            ConfigError, Permanent: as ``Form.put``.
        """
        calls: deque[Call] = deque()
        work = _Work(self._clock, self._form, self._pace, calls)
        try:
            async with asyncio.TaskGroup() as tasks:
                async for some in items:
                    calls.extend(Call(chunk) for chunk in chunks(some, self._form))
                    work.more(tasks)
                    await work.room()
        except BaseExceptionGroup as group:
            raise leaf(group) from None
        return work.refused


class _Work:
    """The calls of one ``Delivery.put``: workers, as many as the pace allows at any moment."""

    def __init__(self, clock: Clock, form: Form, pace: Pace, calls: deque[Call]) -> None:
        self.refused: list[tuple[Item, str]] = []
        self._clock = clock
        self._form = form
        self._pace = pace
        self._calls = calls
        self._running = 0
        self._taken = asyncio.Event()  # a call, by a worker
        self._moved = clock.monotonic()  # when an item last got anywhere

    def more(self, tasks: asyncio.TaskGroup) -> None:
        """As many workers as there may be, and are of use."""
        for _ in range(min(len(self._calls), int(self._pace.limit) - self._running)):
            self._running += 1
            tasks.create_task(self._work(tasks))

    async def room(self) -> None:
        """Return when fewer calls wait than may be in flight: items that nobody can send yet would only fill
        memory, and their making hold up those who send."""
        while len(self._calls) >= self._pace.limit:
            self._taken.clear()
            await self._taken.wait()

    async def _work(self, tasks: asyncio.TaskGroup) -> None:
        # A worker too many ends; the last one never is. Whatever is to be tried again is back among the
        # calls by then, so that the pace holds for it too.
        while self._calls and self._running <= self._pace.limit:
            call = self._calls.popleft()
            self._taken.set()
            await self._make(call, tasks)
            self.more(tasks)
        self._running -= 1

    async def _make(self, call: Call, tasks: asyncio.TaskGroup) -> None:
        answer, error = await self._ask(call.items)
        self.refused += answer.refused
        again, halve = answer.again, answer.halve
        if len(again) < len(call.items):
            self._moved, call.tries = self._clock.monotonic(), 0
        elif answer.throttled:  # a transaction that is larger than what the table takes at once never passes
            halve = len(again) > 1
        if answer.contended:
            again = await self._part(answer, call, tasks)
        elif again and answer.busy:
            call.tries += 1
            if call.tries >= _TRIES or self._late():
                raise error or Retryable(
                    f"{self._form.what}: throttled, {call.tries} times in a row", delay=_LONGEST_PAUSE
                )
            await _pause(self._clock, call.tries - 1)
        half = len(again) // 2 if halve else 0
        self._calls += [Call(part, call.tries) for part in (again[:half], again[half:]) if part]

    async def _part(self, answer: Answer, call: Call, tasks: asyncio.TaskGroup) -> Sequence[Item]:
        """Wait for whoever is in the way of some items, which are returned; the others go ahead."""
        waiting = {item.number for item in answer.contended}
        if others := [item for item in answer.again if item.number not in waiting]:
            self._calls.appendleft(Call(others, call.tries))
            self.more(tasks)
        # However often it is: what somebody holds is soon let go.
        call.tries += 1
        if self._late():
            raise Retryable(
                f"{self._form.what}: in the way of others for {_PATIENCE:g} s", delay=_LONGEST_PAUSE
            )
        await _pause(self._clock, call.tries - 1, _LONGEST_WAIT)
        return answer.contended

    def _late(self) -> bool:
        """Whether no item has got anywhere for too long."""
        return self._clock.monotonic() - self._moved > _PATIENCE

    async def _ask(self, items: Sequence[Item]) -> tuple[Answer, Retryable | None]:
        cuts = self._pace.cuts
        try:
            answer = await self._form.put(items)
        except Retryable as error:  # away, or cut off: they may be in the table, which does no harm
            return Answer(items, busy=True), error
        if answer.throttled:
            self._pace.throttled(cuts)
        elif not answer.busy:
            self._pace.well()
        return answer, None
