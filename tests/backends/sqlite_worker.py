"""A process of its own for ``test_sqlite``: finds units and settles them, until it is killed or done."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

from flowlane.backends.sqlite import open_backend
from flowlane.clock import SystemClock
from flowlane.ports import Environment
from flowlane.testing.units import RUN, discover, found, settle


async def main(uri: str, name: str, total: int) -> None:
    async with open_backend(uri, Environment(SystemClock(), cast("Any", None))) as backend:
        print("open", flush=True)
        for at in range(0, total, 10):
            # Half of them under names that the other processes use as well.
            keys = [f"{name if n % 2 else 'any'}/{n}" for n in range(at, min(at + 10, total))]
            await backend.commit([discover(found(key)) for key in keys])
            some = await backend.receive(["load"], 12, lease=1)
            await asyncio.gather(*(backend.commit([settle(delivery)]) for delivery in some))
        while not _done(await backend.tally(RUN, 0)):
            some = await backend.receive(["load"], 50, lease=1, wait=0.1)
            await backend.commit([settle(delivery) for delivery in some if delivery.head == delivery.event])


def _done(tally: Any) -> bool:
    return all(stage.found == stage.settled for stage in tally.stages.values())


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
