"""Many calls at once, and not too many; tasks that nobody cuts short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Generic, Self, TypeVar

T = TypeVar("T")

#: Calls under way at once for one request; a client's pool has twice as many connections.
AT_ONCE: Final = 32


async def each(
    calls: Sequence[Callable[[], Coroutine[Any, Any, T]]], at_once: int = AT_ONCE
) -> list[T | Exception]:
    """What each of `calls` gave or raised, in their order; `at_once` of them run at a time.

    Cancellation ends them all.
    """
    if len(calls) == 1:
        return [await _caught(calls[0])]
    gate = asyncio.Semaphore(at_once)

    async def run(call: Callable[[], Coroutine[Any, Any, T]]) -> T | Exception:
        async with gate:
            return await _caught(call)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(call)) for call in calls]
    return [task.result() for task in tasks]


async def all_of(calls: Sequence[Callable[[], Coroutine[Any, Any, T]]], at_once: int = AT_ONCE) -> list[T]:
    """What each of `calls` gave, in their order; raises what the first of those raised that failed."""
    results: list[T] = []
    for result in await each(calls, at_once):
        if isinstance(result, Exception):
            raise result
        results.append(result)
    return results


class Flights(Generic[T]):
    """Calls under way, each a task of `group`, whose answers are wanted as they come. Those that are still
    under way when the context is left are cancelled."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[T | Exception]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()

    def start(self, call: Callable[[], Coroutine[Any, Any, T]]) -> None:
        """`call` is under way."""
        self._tasks.add(self._group.create_task(_caught(call)))

    async def landed(self) -> list[T]:
        """What those gave that have ended, once one has; raises what the first of them raised that failed."""
        done, self._tasks = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        results: list[T] = []
        for task in done:
            result = task.result()
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results


async def _caught(call: Callable[[], Coroutine[Any, Any, T]]) -> T | Exception:
    try:
        return await call()
    except Exception as error:  # noqa: BLE001  # the caller's to look at
        return error


@asynccontextmanager
async def owned_tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """A group whose tasks end by themselves before the context is left, whatever it is left with: commits
    under way have a time-out of their own."""
    failure: BaseException | None = None
    async with asyncio.TaskGroup() as group:
        try:
            yield group
        except BaseException as error:  # noqa: BLE001  # raised below, and not as a group
            failure = error
    if failure is not None:
        raise failure
