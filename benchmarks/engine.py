"""The whole engine through its public API, against taskiq's in-memory broker.

flowlane: units are registered first, by the lane's own discovery, while a gate keeps the handlers waiting;
then the gate is opened and the clock runs until the log has counted every unit as settled. Registration is
timed by itself. Where each unit has a child, the rate is that of the units that register one, which is the
strict reading; the next column counts in the children's own deliveries, and the time they take. Each delivery
is received, decoded, handled (with one real trip through the loop), appended, tallied and acked. The log is
checked afterwards.

taskiq: the same no-op, 64 at once, in the fastest of the ways its API offers (awaited in place; a task for
each message is slower); once with making the messages, as its users pay for it, and once without.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, Candidate, Case, peak_mb, python

COUNT = 100_000
CONCURRENCY = 64


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """Flowlane on both embedded backends, without and with a child each; taskiq."""
    count = size or COUNT
    yield [
        Candidate("memory", python("engine", "memory", count, 0, scratch)),
        Candidate("memory, child", python("engine", "memory", count, 1, scratch)),
        Candidate("taskiq", python("engine", "taskiq", count, 0, scratch)),
        Candidate("sqlite", python("engine", "sqlite", count, 0, scratch)),
        Candidate("sqlite, child", python("engine", "sqlite", count, 1, scratch)),
        Candidate("taskiq, messages ready", python("engine", "taskiq-ready", count, 0, scratch)),
    ]


CASE = Case(
    "engine",
    f"deliveries per second through the whole engine, {CONCURRENCY} handlers, one process",
    opened,
    {
        "rate": "deliveries/s",
        "us": "CPU us each",
        "all": "with the children's",
        "all_us": "CPU us each",
        "register_us": "CPU us to register one",
        "peak": "peak MB",
    },
    [
        Bar("memory", "rate", "at least", 4.0, "taskiq"),
        Bar("memory, child", "rate", "at least", 2.4, "taskiq"),
        Bar("sqlite", "rate", "at least", 1.4, "taskiq"),
        Bar("sqlite, child", "rate", "at least", 0.8, "taskiq"),
        Bar("memory", "us", "at most", 0.4, "taskiq"),
        Bar("memory, child", "us", "at most", 0.4, "taskiq"),
        Bar("sqlite", "us", "at most", 1.0, "taskiq"),
        Bar("sqlite, child", "us", "at most", 1.0, "taskiq"),
    ],
    peer="taskiq",
    rounds=5,
)


class Meter:
    """Wall and CPU time (of all threads) since the last look."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """Seconds by the clock and of the CPU since the last call."""
        wall, cpu = self.wall, self.cpu
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self.wall - wall, self.cpu - cpu


async def flowlane(uri: str, count: int, children: int) -> dict[str, float]:
    """One run of `count` units, each with as many children."""
    from flowlane import Context, Lane, Policy, Unit
    from flowlane.compose import Application, open_application
    from flowlane.events import Event
    from flowlane.settings import Settings
    from flowlane.worker import run_once

    class Item(Unit, key="n"):
        n: int

    class Child(Unit, key="n"):
        n: int

    lane = Lane("bench", policy=Policy(concurrency=CONCURRENCY))
    items, grandchildren = asyncio.Event(), asyncio.Event()

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in range(count):
            yield Item(n=n)

    async def work(event: Event, ctx: Context) -> None:
        if not items.is_set():
            await items.wait()
        await asyncio.sleep(0)

    async def bear(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        if not items.is_set():
            await items.wait()
        await asyncio.sleep(0)
        yield Child(n=event.data.n)

    lane.stage(on=Item, name="work")(bear if children else work)

    @lane.stage(on=Child)
    async def rest(event: Event, ctx: Context) -> None:
        if not grandchildren.is_set():
            await grandchildren.wait()
        await asyncio.sleep(0)

    async def counted(app: Application, run: str, stage: str, field: str) -> None:
        while True:
            tally = (await app.backend.tally(run, 0)).stages.get(stage)
            if tally is not None and getattr(tally, field) == count:
                return
            await asyncio.sleep(0.02)

    async with open_application([lane], Settings(backend=uri)) as app:
        run = "bench/run/slot"
        meter = Meter()
        running = asyncio.create_task(run_once(app, lane, slot="slot"))
        await counted(app, run, "work", "found")
        _, register = meter.lap()
        items.set()
        await counted(app, run, "work", "settled")
        wall, cpu = meter.lap()
        grandchildren.set()
        report = await running
        tail, tail_cpu = meter.lap()
        peak = peak_mb()
        await check(app, run, report.brief(), count, children)
    return {
        "rate": count / wall,
        "us": cpu / count * 1e6,
        "register_us": register / count * 1e6,
        "peak": peak,
    } | (
        {"all": 2 * count / (wall + tail), "all_us": (cpu + tail_cpu) / (2 * count) * 1e6} if children else {}
    )


async def check(app: Any, run: str, report: dict[str, Any], count: int, children: int) -> None:
    """Every unit has one first and one terminal event, the tallies say so, and the run was completed once."""
    from flowlane.state import status

    total = count * (1 + children)
    types: Counter[str] = Counter()
    settled: set[str] = set()
    async for event in app.backend.scan("bench", run=run):
        types[event.type] += 1
        if event.type == "unit.settled" and event.subject != run:
            assert event.version == 2, event
            settled.add(event.subject)
    assert len(settled) == total, f"{len(settled):,} units settled of {total:,}"
    assert types["unit.settled"] == total + 1, types
    assert (types["item"], types["child"]) == (count, count * children), types
    assert types["run.completed"] == 1, types
    assert not [name for name in types if name.startswith("attempt")], types
    assert (report["units"]["found"], report["units"]["settled"]) == (total, total), report["units"]
    assert report["outcome"] == "settled", report
    assert status((await app.backend.last([run]))[run]) == "settled"
    assert not [head async for head in app.backend.units("bench", "open")], "something is still open"


async def taskiq(count: int, *, ready: bool) -> dict[str, float]:
    """As many no-op tasks, awaited in place by 64 callers, every result looked at."""
    from taskiq import InMemoryBroker

    broker = InMemoryBroker(max_stored_results=-1, await_inplace=True)

    @broker.task
    async def work(n: int) -> None:
        await asyncio.sleep(0)

    await broker.startup()
    made = [broker.formatter.dumps(work.kicker()._prepare_message(n)) for n in range(count if ready else 0)]
    results: list[Any] = []
    numbers = iter(range(count))

    async def call() -> None:
        for n in numbers:
            if ready:
                await broker.kick(made[n])
                results.append(await broker.result_backend.get_result(made[n].task_id))
            else:
                task = await work.kiq(n)
                results.append(await task.get_result())

    meter = Meter()
    await asyncio.gather(*(call() for _ in range(CONCURRENCY)))
    wall, cpu = meter.lap()
    peak = peak_mb()
    assert len(results) == count, len(results)
    assert not any(result.is_err for result in results)
    await broker.shutdown()
    return {"rate": count / wall, "us": cpu / count * 1e6, "peak": peak}


def main(kind: str, count: int, children: int, scratch: Path) -> dict[str, float]:
    """One candidate, in this process."""
    if kind.startswith("taskiq"):
        return asyncio.run(taskiq(count, ready=kind == "taskiq-ready"))
    path = scratch / f"engine-{time.monotonic_ns()}.db"
    return asyncio.run(flowlane("memory://" if kind == "memory" else f"sqlite:///{path}", count, children))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
