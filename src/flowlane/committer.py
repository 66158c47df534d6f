"""Group commit: what attempts decide is handed in one at a time and goes to the backend in groups.

A last commit is handed in and forgotten: its attempt's slot takes the next delivery at once, and whatever
the commit's answer demands (a conflict, the end of a run) is seen to by a resolver.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flowlane.deadline import Deadline
from flowlane.errors import ConfigError, Permanent, Retryable, VersionConflict
from flowlane.ports import Commit, Committed, Delivery

if TYPE_CHECKING:
    from flowlane.attempt import Attempt, Outcome
    from flowlane.engine import Engine

logger = logging.getLogger("flowlane")

Answer = Committed | VersionConflict | BaseException

#: Commits in one group, at most: enough to amortise a transaction, little enough to keep it short.
GROUP = 512
#: Appends in one group, at most (and one commit more): units with many children make long transactions.
_APPENDS = 1024
#: Seconds for which a group waits for more, at most, as long as each turn of the loop brings some.
_LINGER = 0.03
_RESOLVERS = 4


def ordinary(error: BaseException) -> Exception:
    """`error`, caught by a long-lived task, as one to go on from. A ``CancelledError`` that nobody sent to
    this task is such an error: a library cancelled something that was awaited in here.

    Raises:
        CancelledError: this task is to end.
    """
    if isinstance(error, Exception):
        return error
    task = asyncio.current_task()
    if not isinstance(error, asyncio.CancelledError) or task is None or task.cancelling():
        raise error
    return Retryable("it was cancelled from within: something that it awaited was, by a library or a driver")


async def lasting(work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """A group's long-lived task: where it ends as cancelled though nobody cancelled it, it fails the group,
    which would go on without it."""
    try:
        await work(*arguments)
    except asyncio.CancelledError as error:
        raise ordinary(error) from None


class Committer:
    """Commits in groups while its context is open, one by one otherwise.

    Leaving the context waits until all that was handed in is through, as long as ``deadline`` leaves time;
    ``on_ended`` is told of every delivery whose last commit is, and what became of it. What is not through is
    "released": its lease runs out.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._work: deque[tuple[Commit, Attempt | asyncio.Future[Committed | VersionConflict]]] = deque()
        self._appends = 0  # of all that is in `_work`
        self._lingers = False  # the log gives way before it answers: see ``_linger``
        self._open_ends: asyncio.Queue[tuple[Commit, Attempt, Answer]] = asyncio.Queue()
        self._unresolved = 0  # taken from `_work`, and not through
        self._wake: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None  # once closing: done when all is through
        self._open = False
        #: Why the log took no commit: it will take none, and attempts at it would come again for ever.
        self.refused: ConfigError | None = None
        self._stack = AsyncExitStack()
        self.deadline = Deadline()
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
        self._unresolved, self._idle, self.refused, self._lingers = 0, None, None, False
        try:
            async with asyncio.TaskGroup() as tasks:
                work = [self._run, *[self._resolve] * _RESOLVERS]
                own = [tasks.create_task(lasting(each), name="flowlane-committer") for each in work]
                self._open = True
                yield
                self._idle = asyncio.get_running_loop().create_future()
                self._through(0)
                await self.deadline.wait(self._engine.clock, [self._idle])
                for task in own:
                    task.cancel()
        finally:
            self._open = False
            self._let_go()

    def _through(self, count: int) -> None:
        self._unresolved -= count
        if self._idle is not None and not (self._unresolved or self._work or self._idle.done()):
            self._idle.set_result(None)

    def _let_go(self) -> None:
        """Nobody waits any longer for what is not through."""
        away = Retryable("the process ended before the log answered")
        while self._work:
            commit, who = self._work.popleft()
            if not isinstance(who, asyncio.Future):
                self._open_ends.put_nowait((commit, who, away))
            elif not who.done():
                who.set_exception(away)
                who.exception()  # that nobody asks for it any more is no complaint
        self._appends = 0
        self._release_waiting()

    def _release_waiting(self) -> None:
        left = self._open_ends.qsize()
        for _ in range(left):
            _, attempt, _ = self._open_ends.get_nowait()
            attempt.outcome = "released"
            self._ended(attempt)
        if left:
            logger.warning(
                "the ends of %d units are not logged, the log does not answer: they come again when their "
                "leases run out",
                left,
            )

    def _ended(self, attempt: Attempt) -> None:
        self.on_ended(attempt.delivery, attempt.outcome)
        self._through(1)

    def submit(self, commit: Commit, attempt: Attempt) -> None:
        """Hand in an attempt's last commit."""
        self._work.append((commit, attempt))
        self._appends += len(commit.appends)
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
        self._appends += len(commit.appends)
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
                self._wake = wake = loop.create_future()
                try:
                    await wake
                finally:
                    self._wake = None
                continue
            if self._lingers:
                await self._linger()
            group = self._take()
            left = len(self._work)
            self._unresolved += len(group)
            answers: list[Answer] | tuple[Answer, ...]
            try:
                try:
                    answers = list(await self._engine.backend.commit([commit for commit, _ in group]))
                except Permanent:
                    answers = [await self._alone(commit) for commit, _ in group]
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # each one's own to find out what became of it
                    answers = [self._told(error)] * len(group)
            except asyncio.CancelledError:
                self._work.extendleft(reversed(group))  # for `_let_go`
                raise
            self._lingers = self._lingers or len(self._work) > left
            self._hand_out(group, answers)
            del group, answers  # all that was decided: it would live on until there is more
            if self._work:
                await self._engine.clock.sleep(0)  # a backend in memory answers without giving way

    async def _linger(self) -> None:
        """Wait while each turn of the loop brings more, until there is a whole group.

        A log that gives way before it answers has a price for each group, and as long as the loop is busy
        nobody gains by an answer to the first few. One in memory, which is done before anything more can
        come, is better asked while all that it needs is at hand.
        """
        clock, work = self._engine.clock, self._work
        known, until = 0, clock.monotonic() + _LINGER
        while known < len(work) < GROUP and self._appends < _APPENDS and clock.monotonic() < until:
            known = len(work)
            await clock.sleep(0)

    def _take(self) -> list[tuple[Commit, Attempt | asyncio.Future[Committed | VersionConflict]]]:
        work = self._work
        if len(work) <= GROUP and self._appends <= _APPENDS:
            group = list(work)
            work.clear()
            self._appends = 0
            return group
        group, appends = [], 0
        while work and len(group) < GROUP and appends < _APPENDS:
            group.append(work.popleft())
            appends += len(group[-1][0].appends)
        self._appends -= appends
        return group

    async def _alone(self, commit: Commit) -> Answer:
        """The answer to one commit of a group that was refused for good and not applied: for what is wrong
        with one of them the others are not to blame."""
        try:
            return (await self._engine.backend.commit([commit]))[0]
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # as above
            return self._told(error)

    def _told(self, error: BaseException) -> Exception:
        """See ``ordinary``."""
        if isinstance(error, ConfigError):
            self.refused = error
        return ordinary(error)

    def _hand_out(
        self,
        group: list[tuple[Commit, Attempt | asyncio.Future[Committed | VersionConflict]]],
        answers: list[Answer],
    ) -> None:
        resolving = 0
        for (commit, who), answer in zip(group, answers, strict=True):
            if isinstance(who, asyncio.Future):
                if who.done():
                    continue
                if isinstance(answer, BaseException) and not isinstance(answer, VersionConflict):
                    who.set_exception(answer)
                else:
                    who.set_result(answer)
            elif (
                type(answer) is Committed and who.again < 0 and answer.tally is not None and not answer.tally
            ):
                self.on_ended(who.delivery, who.outcome)
            else:
                resolving += 1
                self._open_ends.put_nowait((commit, who, answer))
        self._through(len(group) - resolving)

    async def _resolve(self) -> None:
        while True:
            commit, attempt, answer = await self._open_ends.get()
            try:
                await self._engine.resolve(commit, attempt, answer)
            except asyncio.CancelledError as error:
                attempt.outcome = "released"
                self._ended(attempt)
                ordinary(error)
            else:
                self._ended(attempt)
            if self._idle is not None and attempt.outcome == "released":
                # The log is away and this process about to end: the others would hear the same, only later.
                self._release_waiting()
