from __future__ import annotations

import asyncio
import threading

import pytest

from flowlane.clock import SystemClock
from flowlane.connectors.hop import hop


async def test_a_hop_returns_or_raises_what_the_work_does() -> None:
    assert await hop(SystemClock(), max, 1, 2) == 2
    with pytest.raises(ZeroDivisionError):
        await hop(SystemClock(), divmod, 1, 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_waits_for_the_work(*, fails: bool) -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(60)
        ended.set()
        if fails:
            raise OSError("nobody will see this")

    task = asyncio.ensure_future(hop(SystemClock(), work))
    assert await asyncio.to_thread(begun.wait, 60)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
