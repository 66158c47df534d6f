"""A process of its own for ``test_sqlite``: finds units and settles them, until it is killed or done.

Says ``open``, and ``some`` when the first units are there. Its clock is so many hours late: leases outlast
whatever pause the machine makes, and those of the dead are over for whoever is started an hour later.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime, timedelta
from typing import Any, cast

from flowlane.backends.sqlite import open_backend
from flowlane.clock import SystemClock
from flowlane.ports import Environment
from flowlane.testing.units import RUN, applied, discover, found, settle

#: Seconds that a delivery is held for.
LEASE = 1800.0


class LateClock(SystemClock):
    """The machine's clock, so many hours later."""

    def __init__(self, hours: int) -> None:
        self._late = timedelta(hours=hours)

    def now(self) -> datetime:
        """See ``Clock.now``."""
        return super().now() + self._late


async def main(uri: str, name: str, total: int, hours: int) -> None:
    async with open_backend(uri, Environment(LateClock(hours), cast("Any", None))) as backend:
        print("open", flush=True)
        for at in range(0, total, 10):
            # Half of them under names that the other processes use as well.
            keys = [f"{name if n % 2 else 'any'}/{n}" for n in range(at, min(at + 10, total))]
            await backend.commit([discover(found(key)) for key in keys])
            if not at:
                print("some", flush=True)
            some = await backend.receive(["load"], 12, lease=LEASE)
            await asyncio.gather(*(applied(backend, settle(delivery)) for delivery in some))
        while not _done(await backend.tally(RUN, 0)):
            some = await backend.receive(["load"], 50, lease=LEASE, wait=0.1)
            await applied(backend, *(settle(delivery) for delivery in some))


def _done(tally: Any) -> bool:
    return all(stage.found == stage.settled for stage in tally.stages.values())


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
