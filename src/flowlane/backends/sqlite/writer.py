"""The one thread that writes: whatever waits when it is free goes into one transaction (group commit)."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

from flowlane.backends.sqlite.group import Work, apply
from flowlane.backends.sqlite.schema import UNFIT, Identity, Settings, connect, failure
from flowlane.backends.sqlite.wall import Wall
from flowlane.clock import Clock
from flowlane.errors import Retryable

# A transaction takes up at most this many requests, and no more once they write so many bytes, so that its
# pages stay in the cache.
_GROUP: Final = 1000
_BYTES: Final = 8 << 20


#: What ``Request.peek`` says when it must be run.
WRITE: Final = object()


class Request(Protocol):
    """Something that wants to be done in the writer's thread; ``Work``, the commits, are done before it."""

    @property
    def size(self) -> int:
        """About how many bytes it writes."""
        ...

    @property
    def wakes(self) -> Collection[str] | None:
        """Of which stages and channels receivers and consumers that wait should look again; ``None``: of
        all."""
        ...

    def peek(self, connection: sqlite3.Connection, now: int) -> Any:
        """The answer if it takes no writing, else ``WRITE``. Asked first where all that wait may be told so:
        who waits in vain does not take the lock from other processes."""
        ...

    def run(self, connection: sqlite3.Connection, now: int) -> Any:
        """The answer, given when the transaction has been committed."""
        ...

    def abandoned(self, answer: Any) -> None:
        """Called on the loop when the answer came after the caller had been cancelled."""
        ...


class _Pending:
    __slots__ = ("answer", "error", "future", "request")

    def __init__(self, request: Request | Work, future: asyncio.Future[Any]) -> None:
        self.request, self.future = request, future
        self.answer: Any = None
        self.error: Exception | None = None


class Writer:
    """Requests in, answers out. `news` is called on the loop after each transaction that wakes somebody.

    A caller that is cancelled leaves its request behind, which is done all the same. What was submitted
    before the context is left is done before it is.
    """

    def __init__(self, settings: Settings, clock: Clock, news: Callable[[Collection[str]], None]) -> None:
        self._settings, self._clock, self._news = settings, clock, news
        self._wall = Wall(clock)
        self._connection: sqlite3.Connection | None = None
        self._requests: SimpleQueue[_Pending | None] = SimpleQueue()
        self._closed = False

    async def __aenter__(self) -> Writer:
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # A daemon: a loop that was abandoned must not keep the process from ending; the file survives it.
        threading.Thread(target=self._work, name="flowlane-sqlite", daemon=True).start()
        try:
            await asyncio.shield(self._opened)
        except BaseException:
            self._requests.put(None)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        self._requests.put(None)
        await asyncio.shield(self._ended)

    async def submit(self, request: Request | Work) -> Any:
        """The answer to `request`.

        Raises:
            Retryable: the file could not be written, or the backend is closed.
            ConfigError: the file is damaged, or was removed or replaced.
        """
        future = self.post(request)
        try:
            return await future
        except asyncio.CancelledError:
            # The answer may have come already, in the moment before the task would have been resumed with it.
            if future.done() and not future.cancelled() and future.exception() is None:
                request.abandoned(future.result())
            raise

    def post(self, request: Request | Work) -> asyncio.Future[Any]:
        """As ``submit``; requests other than commits are run in the order in which they were posted."""
        future = self._loop.create_future()
        if self._closed:
            future.set_exception(Retryable(f"{self._settings.path}: the backend is closed"))
        else:
            self._requests.put(_Pending(request, future))
        return future

    def leave(self, request: Request) -> None:
        """As ``post``, if nobody wants to know what becomes of it."""
        self.post(request).add_done_callback(lambda future: future.cancelled() or future.exception())

    # ----------------------------------------------------------------- in the thread

    def _work(self) -> None:
        try:
            self._connection = connect(self._settings)
            self.identity = Identity(self._settings.path, self._clock)
        except Exception as error:  # noqa: BLE001 - whatever it is, who opens the backend is told
            self._call(self._fail_opening, error)
            return
        self._call(self._opened.set_result, None)
        last = False
        while not last:
            group, last = self._drain()
            if group:
                self._attend(group)
                self._call(self._answer, group)
        self._disconnect()
        self._call(self._ended.set_result, None)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it everybody gone who could be told
            self._loop.call_soon_threadsafe(function, *arguments)

    def _drain(self) -> tuple[list[_Pending], bool]:
        group: list[_Pending] = []
        size = 0
        pending = self._requests.get()
        try:
            while pending is not None:
                group.append(pending)
                size += pending.request.size
                if len(group) == _GROUP or size >= _BYTES:
                    return group, False
                pending = self._requests.get_nowait()
        except Empty:
            return group, False
        return group, True

    def _attend(self, group: Sequence[_Pending]) -> None:
        """Answer or error in each of `group`; what it wanted is committed, or nothing of it is."""
        try:
            self.identity.check()
            self._transact(self._connected(), group)
            self.identity.check()  # the lock may have been long in coming
        except Exception as error:  # noqa: BLE001 - the thread must live, and the caller be told
            self._roll_back()
            if len(group) > 1 and isinstance(error, UNFIT):
                # The fault of one request shall be the failure of one.
                for pending in group:
                    self._attend([pending])
                return
            for pending in group:
                pending.error = failure(error, self._settings.path)

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self.identity.check(now=True)  # for it would be created anew
            self._connection = connect(self._settings)
        return self._connection

    def _roll_back(self) -> None:
        connection = self._connection
        if connection is not None and connection.in_transaction:
            try:
                connection.execute("ROLLBACK")
            except sqlite3.Error:
                # Whatever it is in the middle of ends with it; the next request is for a new one.
                self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _transact(self, connection: sqlite3.Connection, group: Sequence[_Pending]) -> None:
        works: list[tuple[_Pending, Work]] = []
        others: list[tuple[_Pending, Request]] = []
        for pending in group:
            if isinstance(pending.request, Work):
                works.append((pending, pending.request))
            else:
                others.append((pending, pending.request))
        if not works:
            now = self._wall.now()
            if not self._wall.behind(connection, now):
                peeked = [request.peek(connection, now) for _, request in others]
                if WRITE not in peeked:
                    for (pending, _), answer in zip(others, peeked, strict=True):
                        pending.answer = answer
                    return
        self._wall.begin(connection)
        if works:
            answers = apply(connection, [work for _, work in works], self._wall)
            for (pending, _), answer in zip(works, answers, strict=True):
                pending.answer = answer
        for pending, request in others:
            pending.answer = request.run(connection, self._wall.moment)
        self._wall.commit(connection)

    # ----------------------------------------------------------------- on the loop

    def _fail_opening(self, error: Exception) -> None:
        self._opened.set_exception(error)
        self._ended.set_result(None)

    def _answer(self, group: list[_Pending]) -> None:
        names: set[str] = set()
        everybody = False
        for pending in group:
            if pending.future.done():  # cancelled
                if pending.error is None:
                    pending.request.abandoned(pending.answer)
            elif pending.error is not None:
                pending.future.set_exception(pending.error)
            else:
                pending.future.set_result(pending.answer)
            wakes = pending.request.wakes
            everybody = everybody or wakes is None
            names.update(wakes or ())
        # What the loop has made it frees: the thread would do so late, and from the other core.
        group.clear()
        if everybody or names:
            self._news(() if everybody else names)
