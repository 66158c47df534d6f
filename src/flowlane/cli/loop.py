"""The loop that a verb runs in. It ends, whatever the lane's code has left running in it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

logger = logging.getLogger("flowlane")

#: Seconds that tasks which are left when the work is done get to end, once they are cancelled; those that the
#: work itself gets if it was torn off in the middle; and those that threads get after that.
_MOMENT = 2.0
_UNWIND = 20.0
_THREADS = 5.0

T = TypeVar("T")


class Left(SystemExit):
    """The verb is done, but something of the lane's code goes on that would keep the process from ending."""

    def end(self) -> NoReturn:
        """End the process at once, with the exit code; what was said to the standard streams is out."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.code if isinstance(self.code, int) else 1)


class Loop:
    """An event loop for one piece of work. ``left`` is what went on after it all the same: tasks that swallow
    their cancellation, or threads, which nobody can end. ``asyncio.run`` would wait for them for ever."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._over = False
        self.left: list[str] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns, or raises; then nothing runs any more except what is ``left``."""

        async def whole() -> T:
            try:
                return await work
            finally:
                self._over = True

        try:
            return self._runner.run(whole())
        finally:
            self._end()

    def _end(self) -> None:
        try:
            # On the same loop, and not by the runner: that would come between Ctrl-C and whoever waits.
            self._runner.get_loop().run_until_complete(self._let_go())
        except (KeyboardInterrupt, SystemExit) as error:  # Ctrl-C again, or raised by what is ending
            self.left.append(f"what ended with {type(error).__name__}")
        if self.left:
            logger.warning(
                "left behind, since it does not end though it was told to: %s", ", ".join(self.left[:10])
            )
        else:
            self._runner.close()

    async def _let_go(self) -> None:
        loop = asyncio.get_running_loop()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        self.left += [_name(task) for task in await _pending(tasks, _MOMENT if self._over else _UNWIND)]
        if await _pending([asyncio.create_task(loop.shutdown_asyncgens())], _MOMENT):
            self.left.append("a generator's clean-up")
        # Not cancelled when its time is up: it would wait for the threads then, and the loop with it.
        if await _pending([asyncio.create_task(loop.shutdown_default_executor())], _THREADS):
            self.left.append("a call in a thread (asyncio.to_thread)")


async def _pending(tasks: Iterable[asyncio.Task[Any]], seconds: float) -> set[asyncio.Task[Any]]:
    """Those of `tasks` that have not ended after `seconds`."""
    waited = set(tasks)
    if not waited:
        return waited
    _, pending = await asyncio.wait(waited, timeout=seconds)
    return pending


def _name(task: asyncio.Task[Any]) -> str:
    coroutine = task.get_coro()
    return f"task {getattr(coroutine, '__qualname__', None) or task.get_name()}"
