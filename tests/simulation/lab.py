"""A laboratory for one scenario: a world, a memory backend, and processes to start, kill and restart."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from flowlane.backends.memory import MemoryBackend
from flowlane.compose import Application, open_application
from flowlane.deadline import Deadline
from flowlane.events import Event
from flowlane.lane import Lane
from flowlane.plugins import Registry
from flowlane.ports import Backend, Commit, Publish
from flowlane.pump import Pump
from flowlane.settings import Settings
from flowlane.testing import stores
from flowlane.testing.clock import VirtualClock, VirtualLoop
from flowlane.testing.faults import Counters, Faults, Process
from flowlane.testing.jobs import EPOCH
from flowlane.testing.oracle import Log, check
from flowlane.testing.stores import World
from flowlane.worker import run_once

Lanes = Callable[[Process], Sequence[Lane]]

#: Virtual seconds within which anything must have come to rest.
PATIENCE = 600.0


class Lab:
    """See the module. `lanes` makes the lanes for each process, as its release has them."""

    def __init__(self, loop: VirtualLoop, lanes: Lanes, backend: Backend | None = None) -> None:
        self.loop = loop
        self.lanes = lanes
        self.clock = VirtualClock(loop, random.Random(1), epoch=EPOCH)
        self.world = World(self.clock)
        self.memory = MemoryBackend(self.clock)
        self.backend: Backend = backend or self.memory
        self.registry = Registry({"testing": stores.plugin})
        self.counters = Counters()
        self._made = 0

    def process(self, faults: Faults | None = None, *, latency: float = 0.0, offset: float = 0.0) -> Process:
        """A process that is not started yet."""
        self._made += 1
        clock = VirtualClock(self.loop, random.Random(self.loop.rng.getrandbits(64)), epoch=EPOCH)
        clock.offset = self.clock.offset + offset
        return Process(
            f"process-{self._made}",
            self.loop,
            self.backend,
            self.world,
            faults=faults,
            counters=self.counters,
            clock=clock,
            latency=latency,
        )

    @asynccontextmanager
    async def application(self, process: Process) -> AsyncIterator[Application]:
        """All lanes, opened as `process` sees the world."""
        async with open_application(
            self.lanes(process),
            Settings(backend="memory://"),
            clock=process.clock,
            registry=self.registry,
            backend=process.backend,
        ) as app:
            yield app

    # ------------------------------------------------------------------ what processes do

    def run(
        self, slot: str = "s", deadline: Deadline | None = None
    ) -> Callable[[Process], Coroutine[Any, Any, None]]:
        """``flowlane run``: trigger `slot` of each lane and drain, sweeping."""

        async def main(process: Process) -> None:
            async with self.application(process) as app:
                for lane in app.lanes:
                    await run_once(app, lane, slot=slot, deadline=deadline)

        return main

    def handle(self, slot: str = "s") -> Callable[[Process], Coroutine[Any, Any, None]]:
        """Trigger `slot` of each lane and handle what the queue hands out until killed; no sweep."""

        async def main(process: Process) -> None:
            async with self.application(process) as app:
                for lane in app.lanes:
                    await app.engine.trigger(lane.name, slot)
                async with Pump(app.engine, Deadline()) as pump:
                    await pump.until(asyncio.sleep(1e6))

        return main

    # ------------------------------------------------------------------ what happens to them

    async def until_done(
        self,
        process: Process,
        main: Callable[[Process], Coroutine[Any, Any, None]],
        *,
        again: Callable[[Process], Coroutine[Any, Any, None]] | None = None,
        faults: Faults | None = None,
    ) -> str:
        """Run `process`, and another one after it, until one ends well; what went wrong, or nothing."""
        error: BaseException | None = None
        for _ in range(10):
            try:
                async with asyncio.timeout(PATIENCE):
                    error = await asyncio.shield(process.start(main).ended)
            except TimeoutError:
                process.kill()
                return f"{process.name} was not done after {PATIENCE:g} s"
            if error is None:
                return ""
            main = again or main
            process = self.process(faults)
        return f"no process of ten ended well, the last one with {error!r}"

    async def until_empty(self, part: str = "") -> str:
        """Wait until no unit with `part` in its name is open; what was open after a long time, or nothing."""
        end = self.loop.time() + PATIENCE
        while True:
            left = []
            for lane in self.lanes(self.process()):
                heads = self.memory.units(lane.name, "open")
                left += [head.subject async for head in heads if part in head.subject]
            if not left:
                return ""
            if self.loop.time() > end:
                return f"open for ever: {left}"
            await asyncio.sleep(1.0)

    async def redeliver(self, streams: Callable[[Event], bool]) -> None:
        """Hand out the first events of streams once more, as a queue may."""
        for lane in self.lanes(self.process()):
            log = await Log.read(self.memory, lane)
            queues = {stage.name: stage.queue for stage in lane.stages}
            again = [
                Publish(stream[0], queues[stream[0].stage], group=stream[0].partitionkey)
                for stream in log.units().values()
                if streams(stream[0])
            ]
            await self.memory.commit([Commit(publish=again)])

    # ------------------------------------------------------------------ what has come of it

    async def log(self) -> Log:
        """The log of the (first) lane."""
        return await Log.read(self.memory, self.lanes(self.process())[0])

    async def violations(self) -> list[str]:
        """What the oracle says of every lane's log."""
        found = []
        for lane in self.lanes(self.process()):
            found += await check(self.memory, lane)
        return found
