"""Scenarios with a name, each told in one piece and judged by lake, table and log."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from flowlane import Context, Event, Lane, Permanent, Policy, Retryable, Unit, events
from flowlane.deadline import Deadline
from flowlane.recipes import http_archive
from flowlane.redrive import redrive
from flowlane.state import progress, status
from flowlane.testing.clock import VirtualLoop, run
from flowlane.testing.faults import DIE_AFTER, DIE_BEFORE, HANG, Faults, Process
from flowlane.testing.stores import Page
from flowlane.worker import serve
from tests.simulation.lab import Lab

POLICY = Policy(concurrency=4, retries=3, timeout=60.0, backoff=0.2, backoff_cap=1.0, lease=3.0)
HOURS = 6


class Thing(Unit, key=("name",)):
    """A unit of the lanes below."""

    name: str


def archive(process: Process) -> Sequence[Lane]:
    """``http_archive`` over six hours."""
    return [
        http_archive(
            "archive",
            url="web://archive/{t:%Y-%m-%d}-{t.hour}.json.gz",
            start="2024-01-01T00",
            until=f"2024-01-01T{HOURS:02}",
            to="lake://raw/",
            every="10s",
            policy=POLICY,
        )
    ]


def archives(lab: Lab, **page: Any) -> dict[str, bytes]:
    """Publishes six hours; what must be in the lake in the end."""
    wanted = {}
    for hour in range(HOURS):
        body = gzip.compress(b'{"hour": %d}\n' % hour * 40, mtime=0)
        lab.world.web.publish(f"web://archive/2024-01-01-{hour}.json.gz", Page(data=body, **page))
        wanted[f"lake://raw/2024-01-01-{hour}.json.gz"] = body
    return wanted


def things(find: Callable[[Event, Context], Any], work: Callable[[Event, Context], Awaitable[None]]) -> Lane:
    """A lane that finds things by `find` and does `work` on each."""
    lane = Lane("things", policy=POLICY)
    lane.stage(on=lane.triggered, name="find")(find)
    lane.stage(on=Thing, name="work")(work)
    return lane


async def nothing(event: Event, ctx: Context) -> None:
    """The least that a stage can do."""


def test_every_queue_is_purged_in_the_middle_of_a_run_and_it_still_completes() -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, archive)
        wanted = archives(lab, pause=0.4)
        process = lab.process(latency=0.05)
        done = loop.create_task(lab.until_done(process, lab.run()))
        purged = 0
        while not done.done():
            await asyncio.sleep(0.3)
            await lab.memory.purge()
            purged += 1
        assert done.result() == ""
        assert purged >= 3
        assert await lab.violations() == []
        assert lab.world.lake.objects == wanted

    run(main, seed=1)


def test_two_schedulers_fire_one_slot_and_one_run_exists() -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, archive)
        wanted = archives(lab)

        async def scheduled(process: Process) -> None:
            async with lab.application(process) as app:
                await serve(app, asyncio.Event(), Deadline())

        both = [lab.process(latency=0.02).start(scheduled) for _ in range(2)]
        await asyncio.sleep(34.0)  # the slots of 0, 10, 20 and 30 s
        for process in both:
            process.kill()
        assert await lab.until_done(lab.process(), lab.run("rest")) == ""
        runs = (await lab.log()).runs()
        assert (
            sorted(runs)
            == ["archive/run/rest"]
            + [f"archive/run/2024-01-01T16:00:{second:02}Z" for second in (0, 10, 20, 30)]
            or len(runs) == 5
        )
        assert await lab.violations() == []
        assert lab.world.lake.objects == wanted
        assert len(lab.world.lake.landings) == HOURS

    run(main, seed=2)


def test_a_unit_that_kills_its_process_each_time_ends_dead_and_its_run_completes() -> None:
    killed: list[str] = []

    def lanes(process: Process) -> Sequence[Lane]:
        async def find(event: Event, ctx: Context) -> Any:
            for name in ("harmless", "deadly", "quiet"):
                yield Thing(name=name)

        async def work(event: Event, ctx: Context) -> None:
            if event.data.name == "deadly":
                await asyncio.sleep(0.5)
                killed.append(process.name)
                process.kill()
                await asyncio.sleep(1)

        return [things(find, work)]

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        assert await lab.until_done(lab.process(), lab.run()) == ""
        log = await lab.log()
        ends = {name.rpartition("/")[2]: status(stream[-1]) for name, stream in log.units("thing/").items()}
        assert ends == {"harmless": "settled", "deadly": "dead", "quiet": "settled"}
        assert "died" in progress(log.streams["things/thing/deadly"][-1]).reason
        assert progress(log.streams["things/run/s"][-1]).completed == [0]
        assert await lab.violations() == []

    run(main, seed=3)
    assert len(killed) == len(set(killed)) == POLICY.retries + 2  # the first death left nothing in the log


def test_a_discovery_that_yields_fewer_units_on_its_retry() -> None:
    tries: list[int] = []

    def lanes(process: Process) -> Sequence[Lane]:
        async def find(event: Event, ctx: Context) -> Any:
            tries.append(len(tries))
            for n in range(5 if len(tries) == 1 else 2):
                yield Thing(name=str(n))
                await asyncio.sleep(0.6)
            if len(tries) == 1:
                raise Retryable("the listing broke off")

        return [things(find, nothing)]

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        assert await lab.until_done(lab.process(), lab.run()) == ""
        assert len(tries) == 2
        units = (await lab.log()).units("thing/")
        assert 2 < len(units) <= 5
        assert {status(stream[-1]) for stream in units.values()} == {"settled"}
        tally = await lab.memory.tally("things/run/s", 0)
        assert tally.stages["work"].found == tally.stages["work"].settled == len(units)
        assert await lab.violations() == []

    run(main, seed=4)


def test_two_releases_with_different_batch_sizes_on_one_unit() -> None:
    records = [{"n": n} for n in range(50)]

    def lanes(process: Process) -> Sequence[Lane]:
        batch = 7 if process.name == "process-1" else 5
        lane = Lane("things", policy=Policy(retries=3, lease=3.0, batch=batch))

        @lane.stage(on=lane.triggered)
        async def find(event: Event, ctx: Context) -> Any:
            yield Thing(name="rows://drop")

        @lane.stage(on=Thing)
        async def load(event: Event, ctx: Context) -> None:
            await ctx.load(ctx.rows(event.data.name), to="table://orders")

        return [lane]

    class ThirdWrite(Faults):
        writes = 0

        def at(self, process: Process, port: str) -> str:
            self.writes += port == "writer.write"
            return DIE_AFTER if port == "writer.write" and self.writes == 3 else ""

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        lab.world.tables.publish("rows://drop", [records])
        assert await lab.until_done(lab.process(ThirdWrite()), lab.run()) == ""
        table = lab.world.tables.tables["table://orders"]
        assert table.rows == records
        assert [write.end for write in table.writes] == [7, 14, 21, 28, 35, 42, 49, 50]
        assert len({write.token for write in table.writes}) == 2
        assert await lab.violations() == []

    run(main, seed=5)


def test_redrive_after_completion() -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, archive)
        wanted = archives(lab)
        broken = lab.world.web.pages["web://archive/2024-01-01-2.json.gz"]
        broken.cut, broken.cuts = len(broken.data) - 1, -1
        assert await lab.until_done(lab.process(), lab.run()) == ""
        log = await lab.log()
        assert progress(log.streams["archive/run/s"][-1]).report["units"]["dead"] == 1
        assert lab.world.lake.objects == {url: b for url, b in wanted.items() if "-2.json" not in url}

        broken.cuts = 0  # published whole at last

        async def again(process: Process) -> None:
            async with lab.application(process) as app:
                revived = await redrive(app.engine, "archive")
                assert revived == ["archive/hour/2024-01-01T02:00:00Z"]

        assert await lab.until_done(lab.process(), again) == ""
        assert await lab.until_done(lab.process(), lab.run("later")) == ""
        log = await lab.log()
        now = progress(log.streams["archive/run/s"][-1])
        assert now.completed == [0, 1]
        assert now.report["outcome"] == "settled"
        assert now.report["units"] == {"found": 6, "settled": 6, "dead": 0, "skipped": 0, "superseded": 0}
        assert now.report["bytes"]["out"] == sum(map(len, wanted.values()))
        assert lab.world.lake.objects == wanted
        assert await lab.violations() == []

    run(main, seed=6)


def test_a_conflict_while_the_winner_dies() -> None:
    """Two processes are handed one unit and begin at once; one wins, and dies of it. No sweep helps."""

    class WinnerDies(Faults):
        won = ""

        def at(self, process: Process, port: str) -> str:
            if port == "store.read" and not self.won:
                self.won = process.name
                return DIE_BEFORE
            return ""

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, archive)
        wanted = archives(lab)
        faults = WinnerDies()
        for _ in range(2):
            lab.process(faults, latency=0.5).start(lab.handle())
        await asyncio.sleep(0.2)
        for _ in range(8):
            await lab.redeliver(lambda event: event.type == "hour" and event.version == 1)
            await asyncio.sleep(0.2)
        assert await lab.until_empty() == ""
        assert faults.won
        assert lab.world.lake.objects == wanted
        assert len(lab.world.lake.landings) == HOURS
        log = await lab.log()
        assert {status(stream[-1]) for stream in log.units("hour/").values()} == {"settled"}

    run(main, seed=7)


def test_a_step_longer_than_the_lease_survives_a_doubled_delivery() -> None:
    """Whoever is handed the unit besides leaves it alone while somebody is at work on it."""
    begun: list[float] = []

    def lanes(process: Process) -> Sequence[Lane]:
        async def find(event: Event, ctx: Context) -> Any:
            yield Thing(name="slow")

        async def transform() -> None:
            begun.append(process.loop.time())
            await asyncio.sleep(20.0)

        async def work(event: Event, ctx: Context) -> None:
            await ctx.step("transform", transform)

        return [things(find, work)]

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        done = loop.create_task(lab.until_done(lab.process(), lab.run()))
        await asyncio.sleep(1.0)
        await lab.redeliver(lambda event: event.type == "thing")
        assert await done == ""
        log = await lab.log()
        assert status(log.streams["things/thing/slow"][-1]) == "settled"
        assert await lab.violations() == []

    run(main, seed=8)
    assert len(begun) == 1, f"the step was begun {len(begun)} times, at {begun}"


def test_an_event_that_is_too_long_ends_its_unit_with_the_reason_and_no_other() -> None:
    def lanes(process: Process) -> Sequence[Lane]:
        async def find(event: Event, ctx: Context) -> Any:
            for n in range(20):
                yield Thing(name=str(n))

        async def work(event: Event, ctx: Context) -> None:
            if event.data.name == "7":
                for n in range(6):
                    await ctx.step(f"long-{n}", long)
            else:
                await ctx.step("short", short)

        async def long() -> str:
            return "x" * 60_000

        async def short() -> str:
            return "y"

        return [things(find, work)]

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        assert await lab.until_done(lab.process(), lab.run()) == ""
        units = (await lab.log()).units("thing/")
        dead = [name for name, stream in units.items() if status(stream[-1]) == "dead"]
        assert dead == ["things/thing/7"]
        assert "bytes" in progress(units["things/thing/7"][-1]).reason
        assert await lab.violations() == []

    run(main, seed=9)


def test_a_source_without_an_etag_lands_however_long_it_takes() -> None:
    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, archive)
        wanted = archives(lab, tagless=True, pause=2.5)
        assert await lab.until_done(lab.process(), lab.run()) == ""
        assert lab.world.lake.objects == wanted
        assert await lab.violations() == []

    run(main, seed=10)


def test_a_permanent_error_kills_at_once() -> None:
    def lanes(process: Process) -> Sequence[Lane]:
        async def find(event: Event, ctx: Context) -> Any:
            yield Thing(name="hopeless")

        async def work(event: Event, ctx: Context) -> None:
            raise Permanent("never")

        return [things(find, work)]

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        assert await lab.until_done(lab.process(), lab.run()) == ""
        stream = (await lab.log()).streams["things/thing/hopeless"]
        assert [event.type for event in stream] == ["thing", events.UNIT_DEAD]

    run(main, seed=11)


def test_a_lease_that_is_lost_while_the_log_is_slow_costs_no_slot() -> None:
    """One slot only: were it lost, nothing would ever be handled again."""

    def lanes(process: Process) -> Sequence[Lane]:
        lane = Lane("things", policy=Policy(concurrency=1, retries=5, timeout=60.0, backoff=0.1, lease=3.0))

        @lane.stage(on=lane.triggered)
        async def find(event: Event, ctx: Context) -> Any:
            for name in ("one", "two", "three"):
                yield Thing(name=name)

        @lane.stage(on=Thing)
        async def work(event: Event, ctx: Context) -> None:
            await asyncio.sleep(4.0)

        return [lane]

    class SlowLog(Faults):
        def at(self, process: Process, port: str) -> str:
            return HANG if port == "backend.last" else ""

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, lanes)
        done = loop.create_task(lab.until_done(lab.process(SlowLog()), lab.run()))
        for _ in range(2):
            await asyncio.sleep(2.5)
            await lab.memory.purge()
        assert await done == ""
        assert await lab.violations() == []

    for seed in range(5):
        run(main, seed=seed)


def test_an_archive_published_anew_after_it_landed_and_before_that_was_logged() -> None:
    """What an earlier attempt made visible is whole and proven; the unit should end settled, not dead."""

    class DiesAfterLanding(Faults):
        died = False

        def at(self, process: Process, port: str) -> str:
            if port == "upload.commit" and not self.died:
                self.died = True
                return DIE_AFTER
            return ""

    async def main(loop: VirtualLoop) -> None:
        lab = Lab(loop, archive)
        archives(lab)
        await lab.process(DiesAfterLanding()).start(lab.run()).ended
        for page in lab.world.web.pages.values():
            page.data = gzip.compress(b"published anew" * 50, mtime=0)
        assert await lab.until_done(lab.process(), lab.run()) == ""
        units = (await lab.log()).units("hour/")
        assert {status(stream[-1]) for stream in units.values()} == {"settled"}

    run(main, seed=1)
