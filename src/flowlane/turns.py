"""Turns: how many may do something at once in this process, by name; and the time that is lost by waiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from contextvars import ContextVar

#: What ``waiting`` enters: set by whoever opens a source for a unit, in the task that does.
WAITS: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar(
    "flowlane_waits", default=nullcontext
)


def waiting() -> AbstractContextManager[None]:
    """In here one does nothing but wait until others in this process are through with what they do: its time
    is not held against the unit that is being handled, nor is an end of the process that comes meanwhile."""
    return WAITS.get()()


class _Line:
    """Those who have a turn of one name, and those who wait for one, in order."""

    __slots__ = ("taken", "waiting")

    def __init__(self) -> None:
        self.taken = 0
        self.waiting: deque[asyncio.Future[None]] = deque()


class Turns:
    """See ``ports.Context.turn``. Holds nothing for a name of which nobody has a turn."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def of(self, name: str, most: int) -> AsyncIterator[None]:
        """Wait for a turn of `name`, of which there are `most` at once; it ends with the context."""
        line = self._lines.setdefault(name, _Line())
        if line.taken < most and not line.waiting:
            line.taken += 1
        else:
            await self._wait(name, line)
        try:
            yield
        finally:
            self._pass_on(name, line)

    async def _wait(self, name: str, line: _Line) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.waiting.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._pass_on(name, line)  # given the turn, and cancelled at the same time
            raise

    def _pass_on(self, name: str, line: _Line) -> None:
        """A turn has ended: it is the next one's, if somebody waits."""
        while line.waiting:
            following = line.waiting.popleft()
            if not following.done():  # cancelled otherwise
                following.set_result(None)
                return
        line.taken -= 1
        if not line.taken:
            self._lines.pop(name, None)
