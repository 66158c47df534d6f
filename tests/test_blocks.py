"""Blocks are gathered into lists that are worth a hop, and none of them is lost, whatever ends the body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane.blocks import ENOUGH, FEW, gathered
from flowlane.clock import SystemClock
from flowlane.errors import Incomplete

BIG = bytes(ENOUGH)


class Slow(SystemClock):
    """A clock on which every look takes two seconds."""

    seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 2
        return self.seconds


class Pulled:
    """A body of `sizes`, which ends with `error`; knows whether it was closed."""

    closed = False

    async def body(self, sizes: list[int], error: Exception | None = None) -> AsyncGenerator[bytes]:
        try:
            for size in sizes:
                yield BIG[:size]
            if error is not None:
                raise error
        finally:
            self.closed = True


@given(st.lists(st.integers(1, ENOUGH)), st.booleans())
def test_every_block_comes_once_and_in_order(sizes: list[int], fails: bool) -> None:
    async def run() -> None:
        pulled = Pulled()
        got: list[list[int]] = []
        try:
            error = Incomplete("cut") if fails else None
            async for blocks in gathered(pulled.body(sizes, error), SystemClock()):
                got.append([len(block) for block in blocks])  # noqa: PERF401  # kept though an error follows
        except Incomplete:
            assert fails
        else:
            assert not fails
        assert list(chain.from_iterable(got)) == sizes
        assert all(sum(some) > ENOUGH * 3 // 4 for some in got[:-1])
        assert all(sum(some[:-1]) <= ENOUGH * 3 // 4 for some in got)
        assert pulled.closed

    asyncio.run(run())


async def test_what_comes_slowly_is_not_waited_for_but_at_the_beginning() -> None:
    sizes = [1, FEW - 2, 1, 5, 6]
    got = [list(map(len, blocks)) async for blocks in gathered(Pulled().body(sizes), Slow())]
    assert got == [[1, FEW - 2, 1], [5], [6]]


async def test_a_body_that_nobody_wants_any_more_is_closed() -> None:
    pulled = Pulled()
    async with aclosing(gathered(pulled.body([ENOUGH, ENOUGH]), SystemClock())) as lists:
        await anext(lists)
    assert pulled.closed
    with pytest.raises(StopAsyncIteration):
        await anext(lists)
