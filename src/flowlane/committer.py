"""Group commit: what attempts decide is handed in one at a time and goes to the backend in groups.

A last commit is handed in and forgotten: its attempt's slot takes the next delivery at once, and whatever
the commit's answer demands (a conflict, the end of a run) is seen to by a resolver.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from flowlane.errors import Permanent, VersionConflict
from flowlane.ports import Commit, Committed, Delivery

if TYPE_CHECKING:
    from flowlane.attempt import Attempt, Outcome
    from flowlane.engine import Engine

Answer = Committed | VersionConflict | BaseException

#: Commits in one group, at most: enough to amortise a transaction, little enough to keep it short.
GROUP = 512
_RESOLVERS = 4


class Committer:
    """Commits in groups while its context is open, one by one otherwise.

    Leaving the context waits until all that was handed in is through; ``on_ended`` is told of every
    delivery whose last commit is, and what became of it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._work: deque[tuple[Commit, Attempt | asyncio.Future[Committed | VersionConflict]]] = deque()
        self._open_ends: asyncio.Queue[tuple[Commit, Attempt, Answer] | None] = asyncio.Queue()
        self._unresolved = 0
        self._wake: asyncio.Future[None] | None = None
        self._closing = False
        self._open = False
        self._stack = AsyncExitStack()
        self.on_ended: Callable[[Delivery, Outcome], None] = lambda delivery, outcome: None

    async def __aenter__(self) -> Committer:
        await self._stack.enter_async_context(self._opened())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        self._closing = False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._run(), name="flowlane-committer")
                for _ in range(_RESOLVERS):
                    tasks.create_task(self._resolve(), name="flowlane-resolver")
                self._open = True
                yield
                await self.drain()
                self._closing = True
                self._kick()
                for _ in range(_RESOLVERS):
                    self._open_ends.put_nowait(None)
        finally:
            self._open = False

    async def drain(self) -> None:
        """Return once everything handed in is committed and resolved."""
        while self._work or self._unresolved:
            with suppress(Exception):  # the log is away: each attempt's resolver sees to its own
                await self.commit(Commit())
            await self._open_ends.join()

    def submit(self, commit: Commit, attempt: Attempt) -> None:
        """Hand in an attempt's last commit."""
        self._work.append((commit, attempt))
        if self._wake is not None:
            self._kick()

    async def commit(self, commit: Commit) -> Committed | VersionConflict:
        """Commit and wait for the answer; raises what the backend raised: then it is unknown."""
        if not self._open:
            return (
                (await self._engine.backend.commit([commit]))[0]
                if commit.appends or commit.publish
                else Committed()
            )
        return await self.post(commit)

    def post(self, commit: Commit) -> asyncio.Future[Committed | VersionConflict]:
        """Hand in `commit`, behind all that was handed in before; the answer comes later."""
        answer: asyncio.Future[Committed | VersionConflict] = asyncio.get_running_loop().create_future()
        self._work.append((commit, answer))
        self._kick()
        return answer

    def _kick(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._work:
                if self._closing:
                    return
                self._wake = wake = loop.create_future()
                try:
                    await wake
                finally:
                    self._wake = None
                continue
            if len(self._work) <= GROUP:
                group = list(self._work)
                self._work.clear()
            else:
                group = [self._work.popleft() for _ in range(GROUP)]
            answers: list[Answer] | tuple[Answer, ...]
            try:
                answers = list(await self._engine.backend.commit([commit for commit, _ in group]))
            except Permanent:
                answers = [await self._alone(commit) for commit, _ in group]
            except Exception as error:  # noqa: BLE001  # each one's own to find out what became of it
                answers = [error] * len(group)
            self._hand_out(group, answers)

    async def _alone(self, commit: Commit) -> Answer:
        """The answer to one commit of a group that was refused for good and not applied: for what is wrong
        with one of them the others are not to blame."""
        try:
            return (await self._engine.backend.commit([commit]))[0]
        except Exception as error:  # noqa: BLE001  # as above
            return error

    def _hand_out(
        self,
        group: list[tuple[Commit, Attempt | asyncio.Future[Committed | VersionConflict]]],
        answers: list[Answer],
    ) -> None:
        for (commit, who), answer in zip(group, answers, strict=True):
            if isinstance(who, asyncio.Future):
                if who.done():
                    continue
                if isinstance(answer, BaseException) and not isinstance(answer, VersionConflict):
                    who.set_exception(answer)
                else:
                    who.set_result(answer)
            elif type(answer) is Committed and answer.tally is not None and not answer.tally:
                self.on_ended(who.delivery, who.outcome)
            else:
                self._unresolved += 1
                self._open_ends.put_nowait((commit, who, answer))

    async def _resolve(self) -> None:
        while (work := await self._open_ends.get()) is not None:
            commit, attempt, answer = work
            try:
                await self._engine.resolve(commit, attempt, answer)
                self.on_ended(attempt.delivery, attempt.outcome)
            finally:
                self._unresolved -= 1
                self._open_ends.task_done()
        self._open_ends.task_done()
