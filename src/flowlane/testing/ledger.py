"""A job with an order key: the changes of each customer, applied to one table in the order they came in."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Set
from datetime import timedelta
from typing import Any

from flowlane import events
from flowlane.errors import Permanent, Retryable
from flowlane.events import Event
from flowlane.lane import Lane, Unit
from flowlane.ports import Context, Via
from flowlane.state import status
from flowlane.testing.jobs import EPOCH, Post, policy
from flowlane.testing.oracle import Log
from flowlane.testing.stores import World

TABLE = "table://ledger"


class Changed(Unit, key=("customer", "n"), type="changed"):
    """A change of one customer."""

    customer: str
    n: int


class Ledger:
    """Some changes cannot be applied at the first attempt, and one never can.

    `lost`: the units of which a message was lost, as it grows; what order remains is for the others. `via`:
    what carries the changes.
    """

    name = "ledger"
    customers = "abc"
    each = 6

    def __init__(self, rng: random.Random, lost: Set[str], via: Via = "queue") -> None:
        self._lost, self.via = lost, via
        self.names = [(customer, n) for n in range(self.each) for customer in self.customers]
        rng.shuffle(self.names)
        self.names.sort(key=lambda name: name[1] // 2)  # of two neighbours, either may come first
        self.busy = set(rng.sample(self.names, 5))
        self.bad = rng.choice(self.names)
        self.rows = {name: rng.randrange(1, 8) for name in self.names}

    def uri(self, customer: str, n: int) -> str:
        """Where the records of a change are."""
        return f"rows://ledger/{customer}/{n}"

    def publish(self, world: World) -> None:
        """See ``Job``."""
        for (customer, n), rows in self.rows.items():
            records = [{"customer": customer, "n": n, "row": row} for row in range(rows)]
            world.tables.publish(self.uri(customer, n), [records])

    def lane(self, rng: random.Random, post: Post) -> Lane:
        """See ``Job``."""
        lane = Lane(self.name, every="10s", policy=policy(rng, batch=rng.choice((2, 3))))

        @lane.stage(on=lane.triggered)
        async def find(event: Event, ctx: Context) -> Any:
            for number, (customer, n) in enumerate(self.names):
                if ctx.now() >= EPOCH + timedelta(seconds=3 * number):  # they come one after another
                    yield Changed(customer=customer, n=n)

        @lane.stage(on=Changed, order="customer", via=self.via)
        async def apply(event: Event, ctx: Context) -> None:
            name = (event.data.customer, event.data.n)
            if name == self.bad:
                raise Permanent("this change never fits")
            if name in self.busy and ctx.attempts_left == lane.policy.retries:
                raise Retryable("the ledger is busy")
            await ctx.load(ctx.rows(self.uri(*name)), to=TABLE)

        return lane

    def judge(self, world: World, log: Log) -> list[str]:
        """See ``Job``."""
        table = world.tables.tables.get(TABLE)
        rows = [(row["customer"], row["n"]) for row in table.rows] if table else []
        found = []
        if Counter(rows) != Counter({name: n for name, n in self.rows.items() if name != self.bad}):
            found.append(f"the ledger has these rows: {dict(Counter(rows))}, and not {self.rows}")
        units = log.units("changed/")
        ends = Counter(status(stream[-1]) for stream in units.values())
        if ends != {"settled": len(self.names) - 1, "dead": 1}:
            found.append(f"the changes ended {dict(ends)}")
        return found + self._judge_order(rows, log)

    def _judge_order(self, rows: list[tuple[str, int]], log: Log) -> list[str]:
        """Of each customer: all of a change was applied before anything of those registered after it; unless
        it came again behind them, because its message was lost or it was redriven."""
        found = []
        for customer in self.customers:
            first: dict[int, int] = {}
            last: dict[int, int] = {}
            for place, (whose, n) in enumerate(rows):
                if whose == customer:
                    first.setdefault(n, place)
                    last[n] = place
            registered = self._registered(customer, log)
            for at, n in enumerate(registered):
                stream = f"{self.name}/changed/{customer}@{n}"
                if stream in self._lost or _has_died(log.streams[stream]):
                    continue
                found += [
                    f"{stream} was applied behind {customer}@{later}, which was registered after it"
                    for later in registered[at + 1 :]
                    if n in last and first.get(later, last[n]) < last[n]
                ]
        return found

    def _registered(self, customer: str, log: Log) -> list[int]:
        start = f"{self.name}/changed/{customer}@"
        return [
            int(event.subject.removeprefix(start))
            for event in log.events
            if event.version == 1 and event.subject.startswith(start)
        ]


def _has_died(stream: list[Event]) -> bool:
    return any(event.type == events.UNIT_DEAD for event in stream)
