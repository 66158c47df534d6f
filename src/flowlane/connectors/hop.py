"""One hop into a thread, which a cancellation waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def hop(work: Callable[..., T], *args: object) -> T:
    """What `work(*args)` returns, called in a thread of the loop's default executor.

    A thread cannot be interrupted. So a cancellation is held back until `work` has returned (keep it short:
    about 1 MiB at a time), and the caller may then close what it worked on.
    """
    future = asyncio.get_running_loop().run_in_executor(None, work, *args)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue  # the first one is about to be raised
        if not future.cancelled():
            future.exception()  # retrieved: the cancellation is what the caller sees
        raise
