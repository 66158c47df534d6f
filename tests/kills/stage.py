"""Two workers on one SQLite file, with a stage whose units a channel brings: killed, stopped, terminated."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from tests.kills import zygote

#: Seconds for which a partition is held: what a worker held that was killed is nobody's until then.
HOLD = 2.0
#: What the workers run.
LANE = """
import asyncio
import os
import sqlite3

from flowlane import Lane, Permanent, Policy, Retryable, Unit

lane = Lane("ledger", policy=Policy(lease=2.0, timeout=30.0, retries=1000, backoff=0.05, backoff_cap=0.1))


class Change(Unit, key=("customer", "n")):
    customer: str
    n: int


@lane.stage(on=lane.triggered)
async def find(event, ctx):
    for n in range({each}):
        for customer in range({customers}):
            yield Change(customer=str(customer), n=n)


@lane.stage(on=Change, order="customer", via="channel", concurrency=4)
async def apply(event, ctx):
    change = event.data
    if (change.customer, change.n) == ("1", 3):
        raise Permanent("it never fits")
    if change.n == 5 and ctx.attempts_left == 1000:
        raise Retryable("busy")
    await ctx.step("write", write, change.customer, change.n)


async def write(customer, n):
    await asyncio.sleep({pause})
    ledger = sqlite3.connect("ledger.db", timeout=30, isolation_level=None)
    # A step is repeated where its answer was lost, and one that was begun before its process was stopped
    # ends when that goes on: what is not newer than what the customer has is no effect.
    ledger.execute(
        "INSERT INTO applied (customer, n, worker) SELECT ?1, ?2, ?3 "
        "WHERE NOT EXISTS (SELECT 1 FROM applied WHERE customer = ?1 AND n >= ?2)",
        (customer, n, os.getpid()),
    )
    ledger.close()
"""


class Ledger:
    """The workers, in `folder`, and what they have applied."""

    def __init__(self, folder: Path, *, customers: int = 12, each: int = 25, pause: float = 0.0) -> None:
        self.folder = folder
        self.names = [(str(customer), n) for n in range(each) for customer in range(customers)]
        self._workers: list[zygote.Command] = []
        (folder / "ledger_lane.py").write_text(LANE.format(each=each, customers=customers, pause=pause))
        with closing(sqlite3.connect(folder / "ledger.db")) as ledger:
            ledger.execute("PRAGMA journal_mode = WAL")
            ledger.execute("CREATE TABLE applied (place INTEGER PRIMARY KEY, customer, n, worker)")

    def _flowlane(self, verb: str, *options: str) -> list[str]:
        backend = f"sqlite:///{self.folder}/flowlane.db?hold={HOLD:g}s"
        return ["flowlane", verb, "ledger_lane.py", *options, "--backend", backend]

    def start(self, verb: str = "worker") -> zygote.Command:
        """One more worker; or another verb that goes on for a while."""
        command = self._flowlane(verb)
        worker = zygote.Command(command, self.folder, os.environ, self.folder / "workers.log")
        self._workers.append(worker)
        return worker

    def run(self, verb: str = "run") -> subprocess.CompletedProcess[str]:
        """``flowlane run --json``, or another verb, to its end."""
        return zygote.run(self._flowlane(verb, "--json"), self.folder, seconds=200)

    def end(self) -> None:
        """Kill what is left."""
        for worker in self._workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()

    def applied(self) -> list[tuple[str, int]]:
        """What was applied, in order."""
        with closing(sqlite3.connect(self.folder / "ledger.db")) as ledger:
            return ledger.execute("SELECT customer, n FROM applied ORDER BY place").fetchall()

    def judge(self) -> list[str]:
        """What is wrong: all but the one that never fits were applied, once; what came behind one of its
        customer that was found after it was refused, and is missing."""
        rows = Counter(self.applied())
        wrong = [f"{name} was not applied" for name in self.names if name not in rows and name != ("1", 3)]
        return wrong + [f"{name} was applied {n} times" for name, n in rows.items() if n > 1]


def under_fire(ledger: Ledger, kills: int, pause: float, seed: int) -> None:
    """Two workers, one of which is killed every `pause` seconds, or stopped for longer than its hold."""
    chance = random.Random(seed)
    workers = [ledger.start(), ledger.start()]
    for number in range(kills):
        time.sleep(pause)
        at = chance.randrange(2)
        if number == kills // 2:
            os.kill(workers[at].pid, signal.SIGSTOP)
            time.sleep(HOLD + 1.0)
            os.kill(workers[at].pid, signal.SIGCONT)
            continue
        workers[at].kill()
        workers[at].wait()
        workers[at] = ledger.start()
