"""One hop off the loop, which a cancellation waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from flowlane.clock import Clock

T = TypeVar("T")


async def hop(clock: Clock, work: Callable[..., T], *args: object, waits: bool = True) -> T:
    """What `work(*args)` returns, run off the loop by `clock`; `waits`: see ``Clock.offload``.

    A thread cannot be interrupted. So a cancellation is held back until `work` has returned (keep it short:
    about 1 MiB at a time), and the caller may then close what it worked on.
    """
    task = asyncio.ensure_future(clock.offload(partial(work, *args), waits=waits))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue  # the first one is about to be raised
        if not task.cancelled():
            task.exception()  # retrieved: the cancellation is what the caller sees
        raise
