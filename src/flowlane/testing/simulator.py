"""The simulator: real lanes on one to four simulated processes over one shared backend, under seeded faults.

A seed decides everything: what there is to ingest, which faults are possible (each kind with probability
1/4), where they strike, and in which order tasks run. After a while all faults cease, what is left is
drained, dead units are redriven, and the oracle looks at lake and log::

    python -m flowlane.testing.simulator --seeds 0:1000

A violation is printed with its seed and with the command that runs it again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from flowlane.backends.memory import MemoryBackend
from flowlane.compose import Application, open_application
from flowlane.conveyor import CONSUMER
from flowlane.deadline import Deadline
from flowlane.plugins import Registry
from flowlane.ports import Via
from flowlane.redrive import redrive
from flowlane.settings import Settings
from flowlane.testing import faults, stores
from flowlane.testing.channels import ShardedBackend
from flowlane.testing.clock import Deadlock, VirtualClock, VirtualLoop, run
from flowlane.testing.faults import Counters, Faults, Process
from flowlane.testing.jobs import EPOCH, Archives, Job, Tables
from flowlane.testing.ledger import Ledger
from flowlane.testing.oracle import Log, check, describe
from flowlane.testing.stores import World
from flowlane.worker import run_once, serve

#: Faults of a port call, with the probability that one strikes there once its kind is possible.
CALLS = {
    faults.DIE_BEFORE: 0.01,
    faults.DIE_AFTER: 0.01,
    faults.UNKNOWN: 0.05,
    faults.REFUSE: 0.05,
    faults.CANCEL: 0.003,
    faults.HANG: 0.02,
}
#: Faults that strike a process, or all of them, from outside.
WORLDLY = (
    "crash anywhere",
    "pause",
    "purge",
    "sigterm",
    "clock jump",
    "redrive",
    "second trigger",
    "reshard",
    "replay",
)
#: Every kind of fault there is.
KINDS = (*CALLS, *faults.MESSAGES, *WORLDLY, "clock offset")

_POSSIBLE = 0.25
_STRIKES = 0.05
#: Virtual seconds that draining may take once the faults have ceased.
_PATIENCE = 900.0


class Chaos(Faults):
    """Each kind possible by the seed, striking by chance; nothing at all once it has ``ceased``."""

    def __init__(self, rng: random.Random, possible: Iterable[str] | None = None) -> None:
        self._rng = rng
        drawn = {kind for kind in KINDS if rng.random() < _POSSIBLE}
        self.possible = drawn if possible is None else set(possible)
        self._calls = [(kind, p) for kind, p in CALLS.items() if kind in self.possible]
        self.ceased = False

    def at(self, process: Process, port: str) -> str:
        """See ``Faults.at``."""
        if not self.ceased:
            for kind, p in self._calls:
                if self._rng.random() < p:
                    return kind
        return ""

    def chance(self, kind: str) -> bool:
        """See ``Faults.chance``."""
        return not self.ceased and kind in self.possible and self._rng.random() < _STRIKES


class Outcome(msgspec.Struct):
    """What one seed came to."""

    seed: int
    violations: list[str]
    hash: str = ""
    deliveries: int = 0
    steps: int = 0
    seconds: float = 0.0  #: virtual ones
    fired: Counter[str] = msgspec.field(default_factory=Counter)
    reached: Counter[str] = msgspec.field(default_factory=Counter)
    report: str = ""  #: the streams that the violations name


class Simulation:
    """One seed's worth of trouble."""

    def __init__(self, loop: VirtualLoop, seed: int, possible: Iterable[str] | None = None) -> None:
        self.loop = loop
        self.rng = random.Random(seed * 7919 + 1)
        self.clock = VirtualClock(loop, epoch=EPOCH)
        self.world = World(self.clock)
        # The changes of the ledger are carried by its queue, by a channel, or by a stream of shards.
        carrier = random.Random(seed * 7919 + 3).choice(("queue", "channel", "stream"))
        backend = ShardedBackend if carrier == "stream" else MemoryBackend
        self.backend: MemoryBackend = backend(self.clock)
        self.counters = Counters()
        self.chaos = Chaos(random.Random(self.rng.getrandbits(64)), possible)
        self.registry = Registry({"testing": stores.plugin})
        self.tables = Tables(self.rng)
        via: Via = "queue" if carrier == "queue" else "channel"
        ledger = Ledger(random.Random(seed * 7919 + 2), self.counters.lost, via)
        self.channels = [] if via == "queue" else [f"{ledger.name}/apply"]
        self.jobs: list[Job] = [Archives(self.rng), self.tables, ledger]
        self.processes: dict[str, Process] = {}
        self.apps: dict[str, tuple[Application, asyncio.Event, Deadline]] = {}
        self.violations: list[str] = []
        self.pauses: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------------ processes

    def process(self, name: str, chaos: Faults, latency: float) -> Process:
        """A new process, not started; its wall clock may be off."""
        clock = VirtualClock(self.loop, random.Random(self.rng.getrandbits(64)), epoch=EPOCH)
        clock.offset = self.clock.offset
        if chaos is self.chaos and self.possible("clock offset"):
            clock.offset += self.rng.uniform(-600.0, 600.0)
            self.counters.fired["clock offset"] += 1
        return Process(
            name,
            self.loop,
            self.backend,
            self.world,
            faults=chaos,
            counters=self.counters,
            clock=clock,
            latency=latency,
        )

    def possible(self, kind: str) -> bool:
        """Whether faults of that kind are possible now."""
        return not self.chaos.ceased and kind in self.chaos.possible

    def opened(self, process: Process) -> Any:
        """The application that runs all jobs as `process`."""

        async def post(text: str) -> None:
            await process.call("notify.post", lambda: self._post(text))

        lanes = [job.lane(process.rng, post) for job in self.jobs]
        settings = Settings(backend="memory://")
        return open_application(
            lanes, settings, clock=process.clock, registry=self.registry, backend=process.backend
        )

    async def _post(self, text: str) -> None:
        self.tables.posted[text] += 1

    async def _serve(self, process: Process) -> None:
        async with self.opened(process) as app:
            stop, deadline = asyncio.Event(), Deadline()
            self.apps[process.name] = (app, stop, deadline)
            await serve(app, stop, deadline)

    async def _supervise(self, name: str) -> None:
        """Keep a process running, as an operator would, until the faults have ceased."""
        while not self.chaos.ceased:
            latency = self.rng.choice((0.0, 0.01, 0.1))
            process = self.processes[name] = self.process(name, self.chaos, latency)
            error = await process.start(self._serve).ended
            if isinstance(error, Exception):
                self.violations.append(f"a worker ended with {_flat(error)}")
            self.apps.pop(name, None)
            await asyncio.sleep(self.rng.uniform(0.0, 10.0))

    # ------------------------------------------------------------------ trouble

    async def trouble(self) -> None:
        """What strikes from outside, for as long as it lasts."""
        end = self.loop.time() + self.rng.uniform(20.0, 100.0)
        while self.loop.time() < end:
            await asyncio.sleep(self.rng.uniform(0.2, 6.0))
            kind = self.rng.choice(WORLDLY)
            alive = [p for p in self.processes.values() if not p.fate.dead and p.name in self.apps]
            if self.possible(kind) and alive and (self.channels or kind not in ("reshard", "replay")):
                self.counters.fired[kind] += 1
                self.loop.trace(kind)
                await self._strike(kind, self.rng.choice(alive))

    async def _strike(self, kind: str, process: Process) -> None:
        app, stop, deadline = self.apps[process.name]
        if kind == "crash anywhere":
            process.fate.fuse = self.rng.randrange(1, 300)
        elif kind == "pause" and not process.fate.frozen:
            self.pauses.append(self.loop.create_task(process.freeze(self.rng.uniform(7.0, 40.0))))
        elif kind == "purge":
            for lane in app.lanes:
                self.counters.lost |= {head.subject async for head in self.backend.units(lane.name, "open")}
            await self.backend.purge()
        elif kind == "sigterm":
            deadline.margin = self.rng.uniform(1.0, 20.0)
            deadline.at = process.clock.monotonic() + deadline.margin
            stop.set()
        elif kind == "clock jump":
            process.clock.offset += self.rng.uniform(-300.0, 300.0)
        elif kind == "second trigger":
            lane, slot = self.rng.choice(app.lanes), f"extra-{self.rng.randrange(3)}"
            process.spawn(_quietly(lambda: app.engine.trigger(lane.name, slot, by="simulator")))
        elif kind == "reshard" and isinstance(self.backend, ShardedBackend):
            self.backend.reshard(self.rng)
        elif kind == "replay":
            for name in self.channels:
                await self.backend.channel(name).rewind(CONSUMER)
        elif kind == "redrive":
            name = self.rng.choice(app.lanes).name
            process.spawn(_quietly(lambda: redrive(app.engine, name)))

    # ------------------------------------------------------------------ rest

    async def rest(self) -> None:
        """Faults off: drain, let hours pass for what comes late, redrive what died, drain again."""
        self.chaos.ceased = True
        self.world.web.calm = True
        for process in self.processes.values():
            if not process.fate.dead:
                process.kill()
        for step, later in enumerate((0.0, 45 * 60.0, 5 * 3600.0, 0.0)):
            self.clock.offset += later
            process = self.process(f"rest-{step}", Faults(), 0.0)
            error = await process.start(self._drain(step)).ended
            if error is not None:
                self.violations.append(f"at rest, a worker ended with {_flat(error)}")
                return

    def _drain(self, step: int) -> Callable[[Process], Any]:
        async def drain(process: Process) -> None:
            async with self.opened(process) as app, asyncio.timeout(_PATIENCE):
                for lane in app.lanes:
                    if step == 3:
                        await redrive(app.engine, lane.name)
                    await run_once(app, lane, slot=f"rest-{step}")

        return drain

    async def judge(self) -> list[Log]:
        """Ask the oracle."""
        logs = []
        for job in self.jobs:
            lane = job.lane(random.Random(0), self._post)
            log = await Log.read(self.backend, lane)
            logs.append(log)
            self.violations += await check(self.backend, lane)
            self.violations += job.judge(self.world, log)
        return logs

    async def main(self) -> list[Log]:
        """All of it."""
        for job in self.jobs:
            job.publish(self.world)
        workers = [f"worker-{n}" for n in range(self.rng.randrange(1, 5))]
        supervisors = [self.loop.create_task(self._supervise(name)) for name in workers]
        await self.trouble()
        for supervisor in supervisors:
            supervisor.cancel()
        await asyncio.gather(*supervisors, return_exceptions=True)
        await self.rest()
        return await self.judge()


async def _quietly(call: Callable[[], Awaitable[Any]]) -> None:
    """What an operator does may fail while there is trouble."""
    with suppress(Exception):
        await call()


def _flat(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return repr(error)


def simulate(seed: int, possible: Iterable[str] | None = None) -> Outcome:
    """What `seed` comes to; `possible` kinds of faults instead of those that it would draw."""
    outcome = Outcome(seed, [])

    async def main(loop: VirtualLoop) -> None:
        simulation = Simulation(loop, seed, possible)
        logs: list[Log] = []
        try:
            logs = await simulation.main()
        finally:
            outcome.hash = loop.hash
            outcome.steps = loop.steps
            outcome.seconds = loop.time()
            outcome.violations = simulation.violations
            outcome.violations += [f"asyncio complains: {text}" for text in loop.complaints]
            outcome.fired = simulation.counters.fired
            outcome.reached = simulation.counters.reached
            outcome.deliveries = simulation.counters.delivered
        if outcome.violations:
            outcome.report = _report(outcome.violations, logs)

    try:
        run(main, seed=seed)
    except Deadlock as error:
        outcome.violations.append(f"deadlock: {error}")
    return outcome


def _report(violations: Sequence[str], logs: Sequence[Log]) -> str:
    named = sorted(
        {name for log in logs for name in log.streams for text in violations if name in text}, key=len
    )
    return "\n".join(
        f"{name}\n{describe(log, name)}" for log in logs for name in named if name in log.streams
    )


def again(seed: int) -> str:
    """The command that runs `seed` again."""
    return f"python -m flowlane.testing.simulator --seeds {seed} --verbose"


class Tally(msgspec.Struct):
    """What many seeds came to; what ``--json`` prints."""

    seeds: int = 0
    bad: dict[int, list[str]] = msgspec.field(default_factory=dict)  #: violations by seed
    deliveries: int = 0
    hours: float = 0.0  #: virtual ones
    seconds: float = 0.0  #: real ones
    fired: dict[str, int] = msgspec.field(default_factory=dict)
    reached: dict[str, int] = msgspec.field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one seed in."""
        self.seeds += 1
        if outcome.violations:
            self.bad[outcome.seed] = outcome.violations
        self.deliveries += outcome.deliveries
        self.hours += outcome.seconds / 3600
        self.fired = dict(Counter(self.fired) + outcome.fired)
        self.reached = dict(Counter(self.reached) + outcome.reached)

    @property
    def never(self) -> list[str]:
        """The kinds of faults that never fired."""
        return [kind for kind in KINDS if kind not in self.fired]

    def __str__(self) -> str:
        fired = ", ".join(f"{kind} {self.fired.get(kind, 0):,}" for kind in KINDS)
        pace = max(self.seconds, 1e-9)
        return (
            f"{self.seeds} seeds, {len(self.bad)} with violations; {self.deliveries:,} deliveries, "
            f"{self.hours:,.1f} virtual hours in {self.seconds:.1f} s "
            f"({self.seeds / pace:.1f} seeds/s, {self.deliveries / pace:,.0f} deliveries/s)\nfired: {fired}"
        )


def campaign(
    seeds: Iterable[int], *, seconds: float = float("inf"), tell: Callable[[Outcome], None] = lambda _: None
) -> Tally:
    """What `seeds` come to, as many as `seconds` allow; each one with violations is told."""
    logging.getLogger("flowlane").setLevel(logging.ERROR)  # that a backend is away is no news here
    tally, began = Tally(), time.monotonic()
    for seed in seeds:
        outcome = simulate(seed)
        tally.add(outcome)
        if outcome.violations:
            tell(outcome)
        tally.seconds = time.monotonic() - began
        if tally.seconds > seconds:
            break
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds asked for; 1 if any shows a violation."""
    parser = argparse.ArgumentParser(prog="python -m flowlane.testing.simulator", description=__doc__)
    parser.add_argument("--seeds", default="0:100", help="one seed, or first:last (last excluded)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--verbose", action="store_true", help="the streams that violations name")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    given = parser.parse_args(arguments)
    first, _, last = given.seeds.partition(":")

    def tell(outcome: Outcome) -> None:
        if not given.json:
            _print(f"seed {outcome.seed}: {len(outcome.violations)} violations; again: {again(outcome.seed)}")
            _print("\n".join(f"  {text}" for text in outcome.violations[:10]))
            if given.verbose:
                _print(outcome.report)

    seeds = range(int(first), int(last) if last else int(first) + 1)
    tally = campaign(seeds, seconds=given.seconds, tell=tell)
    _print(msgspec.json.encode(tally).decode() if given.json else str(tally))
    return 1 if tally.bad else 0


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


__all__ = ["KINDS", "Chaos", "Outcome", "Simulation", "Tally", "again", "campaign", "main", "simulate"]

if __name__ == "__main__":
    sys.exit(main())
