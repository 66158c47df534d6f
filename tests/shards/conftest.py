"""The tests of this directory run in virtual time: hours of holds pass in milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from itertools import count

from flowlane.testing.clock import VirtualLoop

_seeds = count(1)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A new loop for each test; what is ready at once runs in another order each time."""
    return {"virtual": lambda: VirtualLoop(next(_seeds))}
