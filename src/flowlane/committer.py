"""Group commit: what attempts decide is handed in one at a time and goes to the backend in groups.

A last commit is handed in and forgotten: its attempt's slot takes the next delivery at once, and whatever
the commit's answer demands (a conflict, the end of a run) is seen to by a resolver.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from flowlane.errors import VersionConflict
from flowlane.ports import Commit, Committed

if TYPE_CHECKING:
    from flowlane.attempt import Attempt
    from flowlane.engine import Engine

Answer = Committed | VersionConflict | BaseException

#: Commits in one group, at most: enough to amortise a transaction, little enough to keep it short.
GROUP = 512
_RESOLVERS = 4


class Committer:
    """Commits in groups while its context is open, one by one otherwise.

    Leaving the context waits until all that was handed in is through; ``on_settled`` is told of every
    attempt whose last commit is.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._work: deque[tuple[Commit, Attempt | asyncio.Future[Committed | VersionConflict]]] = deque()
        self._open_ends: asyncio.Queue[tuple[Commit, Attempt, Answer] | None] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._closing = False
        self._tasks: asyncio.TaskGroup | None = None
        self.on_settled: Callable[[Attempt], None] = lambda attempt: None

    async def __aenter__(self) -> Committer:
        self._closing = False
        self._open_ends = asyncio.Queue()
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._tasks.create_task(self._run(), name="flowlane-committer")
        for _ in range(_RESOLVERS):
            self._tasks.create_task(self._resolve(self._open_ends), name="flowlane-resolver")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks, ends = self._tasks, self._open_ends
        assert tasks is not None and ends is not None
        try:
            if kind is None:
                await self.drain()
                for _ in range(_RESOLVERS):
                    ends.put_nowait(None)
            self._closing = True
            self._kick()
        finally:
            self._tasks = None
            await tasks.__aexit__(kind, error, trace)

    async def drain(self) -> None:
        """Return once everything handed in is committed and resolved."""
        assert self._open_ends is not None
        while self._work or self._open_ends._unfinished_tasks:  # type: ignore[attr-defined]  # no public count
            await self.commit_nothing()
            await self._open_ends.join()

    async def commit_nothing(self) -> None:
        """Return once all that was handed in so far has been answered."""
        await self.commit(Commit())

    def submit(self, commit: Commit, attempt: Attempt) -> None:
        """Hand in an attempt's last commit."""
        self._work.append((commit, attempt))
        if self._wake is not None:
            self._kick()

    async def commit(self, commit: Commit) -> Committed | VersionConflict:
        """Commit and wait for the answer; raises what the backend raised: then it is unknown."""
        if self._tasks is None:
            return (await self._engine.backend.commit([commit]))[0] if commit.appends or commit.publish else Committed()
        answer: asyncio.Future[Committed | VersionConflict] = asyncio.get_running_loop().create_future()
        self._work.append((commit, answer))
        self._kick()
        return await answer

    def _kick(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._work:
                if self._closing:
                    return
                self._wake = loop.create_future()
                try:
                    await self._wake
                finally:
                    self._wake = None
                continue
            group = [self._work.popleft() for _ in range(min(len(self._work), GROUP))]
            answers: list[Answer] | tuple[Answer, ...]
            try:
                answers = list(await self._engine.backend.commit([commit for commit, _ in group]))
            except Exception as error:  # noqa: BLE001  # each one's own to find out what became of it
                answers = [error] * len(group)
            self._hand_out(group, answers)

    def _hand_out(
        self, group: list[tuple[Commit, Attempt | asyncio.Future[Committed | VersionConflict]]], answers: list[Answer]
    ) -> None:
        assert self._open_ends is not None
        for (commit, who), answer in zip(group, answers, strict=True):
            if isinstance(who, asyncio.Future):
                if who.done():
                    continue
                if isinstance(answer, BaseException) and not isinstance(answer, VersionConflict):
                    who.set_exception(answer)
                else:
                    who.set_result(answer)
            elif type(answer) is Committed and answer.tally is not None and not answer.tally:
                self.on_settled(who)
            else:
                self._open_ends.put_nowait((commit, who, answer))

    async def _resolve(self, ends: asyncio.Queue[tuple[Commit, Attempt, Answer] | None]) -> None:
        while (work := await ends.get()) is not None:
            try:
                commit, attempt, answer = work
                await self._engine.resolve(commit, attempt, answer)
                self.on_settled(attempt)
            finally:
                ends.task_done()
