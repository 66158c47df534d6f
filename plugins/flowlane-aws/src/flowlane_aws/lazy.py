"""Clients that are opened when first asked for anything: a process pays for the services that it uses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any


class LazyClient:
    """A client of the SDK by its operations. With the first one, what `opening` gives is entered on `stack`,
    and closed with it; by a task of `tasks`, which a caller that is cancelled does not cut short: a client
    that is half open would be closed by nobody. ``meta`` is there once an operation was awaited."""

    def __init__(
        self,
        opening: Callable[[], AbstractAsyncContextManager[Any]],
        stack: AsyncExitStack,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._opening = opening
        self._stack = stack
        self._tasks = tasks
        self._task: asyncio.Task[Any] | None = None
        self._client: Any = None

    async def opened(self) -> Any:
        """The client itself.

        Raises:
            ConfigError: it cannot be opened (there is no region, say); the next one who asks tries again.
        """
        if self._client is None:
            if self._task is None:
                self._task = self._tasks.create_task(self._open(), name="flowlane-aws client")
            opened = await asyncio.shield(self._task)
            if isinstance(opened, Exception):
                raise opened
        return self._client

    async def _open(self) -> Exception | None:
        try:
            self._client = await self._stack.enter_async_context(self._opening())
        except Exception as error:  # noqa: BLE001  # for whoever asked; the group is to go on
            return error
        finally:
            self._task = None
        return None

    def __getattr__(self, operation: str) -> Any:
        if self._client is not None:
            return getattr(self._client, operation)
        if operation == "meta":
            raise AttributeError("no operation was awaited yet")
        return self._first(operation)

    def _first(self, operation: str) -> Callable[..., Awaitable[Any]]:
        async def ask(**arguments: Any) -> Any:
            return await getattr(await self.opened(), operation)(**arguments)

        return ask
