"""The virtual loop and clock: time jumps, seeds decide, the frozen stand still, the dead have no effects."""

from __future__ import annotations

import asyncio
import random
from contextvars import copy_context
from datetime import timedelta
from typing import Any

import pytest

from flowlane.testing.clock import FATE, Deadlock, Fate, SimulatedDeath, VirtualClock, VirtualLoop, run


def test_the_private_names_of_asyncio_that_the_loop_uses_mean_what_they_meant() -> None:
    loop = VirtualLoop(0)
    try:
        handle = loop.call_soon(lambda: None)
        assert list(loop._ready) == [handle]  # type: ignore[attr-defined]  # this is what is guarded
        assert handle._context is not None  # type: ignore[attr-defined]  # as above
        timer = loop.call_at(3.0, lambda: None)
        timer.cancel()
        assert timer.cancelled()
        parts: Any = timer
        assert (parts._callback, parts._args) == (None, None)
        assert loop.get_debug() is False
        assert loop._closed is False  # type: ignore[attr-defined]  # as above
        assert loop._stopping is False  # type: ignore[attr-defined]  # as above
        assert asyncio.BaseEventLoop._run_once is not VirtualLoop._run_once  # type: ignore[attr-defined]  # as above
    finally:
        loop.close()


def test_hours_pass_in_no_time() -> None:
    async def main(loop: VirtualLoop) -> float:
        async with asyncio.timeout(7200):
            await asyncio.sleep(3600)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await loop.create_future()
        return loop.time()

    assert run(main) == pytest.approx(3605, abs=0.001)


def test_the_seed_decides_the_order() -> None:
    async def main(loop: VirtualLoop) -> tuple[list[int], str]:
        order: list[int] = []

        async def note(n: int) -> None:
            await asyncio.sleep(1.0)
            order.append(n)
            loop.trace(str(n))

        async with asyncio.TaskGroup() as tasks:
            for n in range(6):
                tasks.create_task(note(n))
        return order, loop.hash

    results = [run(main, seed=seed) for seed in range(20)]
    assert results == [run(main, seed=seed) for seed in range(20)]
    assert len({tuple(order) for order, _ in results}) > 10


def test_a_batch_is_shuffled_as_random_does_it() -> None:
    loop, other = VirtualLoop(5), random.Random(5)
    try:
        for size in range(2, 40):
            handles = [loop.call_soon(lambda: None) for _ in range(size)]
            wanted = list(handles)
            loop._shuffle(handles)
            other.shuffle(wanted)
            assert handles == wanted
    finally:
        loop.close()


def test_what_a_callback_raises_is_told_and_the_rest_goes_on() -> None:
    def broken() -> None:
        raise ValueError("a callback's")

    async def main(loop: VirtualLoop) -> list[str]:
        loop.call_soon(broken)
        await asyncio.sleep(1.0)
        return loop.complaints

    (complaint,) = run(main)
    assert "Exception in callback" in complaint
    assert 'ValueError("a callback\'s")' in complaint


def test_what_can_never_end_is_a_deadlock_that_names_who_waits() -> None:
    async def waits_for_nobody(loop: VirtualLoop) -> None:
        await loop.create_future()

    with pytest.raises(Deadlock, match="waits_for_nobody"):
        run(waits_for_nobody)


def test_there_are_no_threads() -> None:
    async def main(loop: VirtualLoop) -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="no threads"):
        run(main)


def test_the_clock_is_the_loops() -> None:
    async def main(loop: VirtualLoop) -> None:
        clock, other = VirtualClock(loop, random.Random(1)), VirtualClock(loop, random.Random(2), offset=60)
        before, ticks = clock.now(), clock.monotonic()
        await clock.sleep(90)
        assert clock.now() - before == pytest.approx(timedelta(seconds=90), abs=timedelta(milliseconds=1))
        assert clock.monotonic() - ticks == pytest.approx(90, abs=0.001)
        assert other.now() - clock.now() == timedelta(seconds=60)
        assert await clock.offload(lambda: 7) == 7
        assert 0 <= clock.random() < 1
        assert len({clock.token() for _ in range(1000)} | {other.token()}) == 1001

    run(main)


def test_the_frozen_stand_still_and_go_on_where_they_stood() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        fate, ticks = Fate("p"), list[float]()

        async def tick() -> None:
            for _ in range(4):
                await asyncio.sleep(1.0)
                ticks.append(round(loop.time(), 3))

        context = copy_context()
        context.run(FATE.set, fate)
        task = loop.create_task(tick(), context=context)
        await asyncio.sleep(1.5)
        fate.frozen = True
        await asyncio.sleep(10.0)
        loop.thaw(fate)
        await task
        return ticks

    assert run(main) == [1.0, 11.5, 12.5, 13.5]


def test_the_dead_have_no_effects() -> None:
    async def main(loop: VirtualLoop) -> tuple[list[str], list[str]]:
        fate, world = Fate("p"), list[str]()

        async def effect(what: str) -> None:
            if fate.dead:
                raise SimulatedDeath
            world.append(what)

        async def live() -> None:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(asyncio.sleep(100))
                    await effect("began")
                    await asyncio.sleep(10)
                    await effect("went on")
            finally:
                await effect("cleaned up")

        context = copy_context()
        context.run(FATE.set, fate)
        task = loop.create_task(live(), context=context)
        await asyncio.sleep(1.0)
        fate.dead = True
        await asyncio.sleep(50.0)
        fate.bury()
        await asyncio.sleep(100.0)
        assert not task.done()
        return world, loop.complaints

    assert run(main) == (["began"], [])


def test_a_fuse_kills_before_the_callback() -> None:
    async def main(loop: VirtualLoop) -> list[int]:
        fate, ticks, blown = Fate("p"), list[int](), list[bool]()

        async def tick() -> None:
            for n in range(10):
                ticks.append(n)
                await asyncio.sleep(1.0)

        context = copy_context()
        context.run(FATE.set, fate)
        fate.fuse = 4
        fate.blown = lambda: blown.append(True)
        task = loop.create_task(tick(), context=context)
        await asyncio.sleep(60.0)
        assert blown == [True]
        assert not task.done()
        fate.bury()
        return ticks

    assert run(main) == [0, 1]  # a timer and the task's step are a callback each
