"""The SQLite backend keeps the promises of the ports, across processes and whenever it is killed."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest

from flowlane.backends.sqlite import group, open_backend, reader, writer
from flowlane.backends.sqlite.wide import Wide
from flowlane.errors import ConfigError, Permanent, Retryable, VersionConflict
from flowlane.events import UNIT_DEAD, UNIT_REDRIVEN, UNIT_SETTLED, Event
from flowlane.ports import Backend, ChannelRecord, Commit, Environment, Publish, Tally
from flowlane.state import StageTally
from flowlane.testing.backend_model import Opener, Storage
from flowlane.testing.backend_suite import BackendSuite
from flowlane.testing.carried_suite import CarriedSuite
from flowlane.testing.channel_suite import ChannelSuite
from flowlane.testing.manual import ManualClock
from flowlane.testing.units import (
    LANE,
    RUN,
    append,
    applied,
    discover,
    following,
    found,
    listed,
    settle,
    within,
)


def environment(clock: ManualClock | None = None) -> Environment:
    return Environment(clock or ManualClock(), cast("Any", None))


class SqliteStorage:
    persistent = True

    @pytest.fixture
    def storage(self, clock: ManualClock, tmp_path: Path) -> Storage:
        numbers = count()

        def new() -> Opener:
            uri = f"sqlite:///{tmp_path}/new/{next(numbers)}.db"
            return lambda: open_backend(uri, environment(clock))

        return new


class TestBackend(SqliteStorage, BackendSuite):
    pass


class TestCarried(SqliteStorage, CarriedSuite):
    pass


class TestChannel(SqliteStorage, ChannelSuite):
    pass


# --------------------------------------------------------------------------- processes


def start(path: Path, name: str, total: int, hours: int = 0) -> subprocess.Popen[str]:
    """A process that finds `total` units and settles what there is, its clock being so many hours late."""
    worker = Path(__file__).with_name("sqlite_worker.py")
    command = [sys.executable, str(worker), f"sqlite:///{path}", name, str(total), str(hours)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def check_whole(path: Path) -> StageTally:
    """Whatever was killed: log, queue, index and tallies tell the same story."""
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        heads: dict[str, Event] = {}
        async for event in backend.scan(LANE):
            assert event.version == (heads[event.subject].version if event.subject in heads else 0) + 1
            heads[event.subject] = event
        tally = (await backend.tally(RUN, 0)).stages.get("load", StageTally())
        still_open = {head.subject async for head in backend.units(LANE, "open")}
    assert still_open == {name for name, head in heads.items() if head.version == 1}
    assert tally.found == len(heads)
    assert tally.settled == len(heads) - len(still_open)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        queued = [stream for (stream,) in connection.execute("SELECT stream FROM queue")]
    assert sorted(queued) == sorted(still_open)
    return tally


async def test_nothing_is_half_applied_whenever_a_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "killed.db"
    chance = random.Random(7)
    for n in range(8):
        workers = [start(path, f"p{n}{side}", 100_000, n) for side in "ab"]
        for worker in workers:
            assert worker.stdout is not None
            for said in ("open\n", "some\n")[: 1 + n % 2]:
                assert worker.stdout.readline() == said
        await asyncio.sleep(chance.uniform(0, 0.3))
        for worker in workers:
            worker.kill()
            worker.communicate()
        await check_whole(path)
    assert (await check_whole(path)).found > 0
    last = start(path, "last", 10, 8)
    last.communicate(timeout=120)
    assert last.returncode == 0
    tally = await check_whole(path)
    assert tally.found == tally.settled


async def test_processes_share_a_file_and_may_create_it_together(tmp_path: Path) -> None:
    for n in range(3):
        path = tmp_path / f"shared{n}.db"
        workers = [start(path, f"p{name}", 200) for name in range(4)]
        for worker in workers:
            worker.communicate(timeout=120)
            assert worker.returncode == 0
        assert await check_whole(path) == StageTally(found=500, settled=500)


async def test_what_another_process_publishes_wakes_a_receiver(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/f.db"
    async with open_backend(uri, environment()) as one, open_backend(uri, environment()) as two:
        waiting = asyncio.create_task(one.receive(["load"], 1, lease=9, wait=60))
        reading = asyncio.ensure_future(anext(one.channel("c").consume("me", wait=60)))
        await applied(two, discover(found("a")))
        await two.channel("c").put([ChannelRecord("k", b"1")])
        (delivery,) = await within(30, waiting)
        assert delivery.event.subject == "suite/a"
        assert (await within(30, reading)).records[0].data == b"1"


async def test_a_writer_waits_for_another_process_but_not_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment(), busy_timeout="0.1") as backend:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Retryable, match="locked"):
                await backend.commit([discover(found("a"))])
            assert await backend.last(["suite/a"]) == {}  # readers wait for nobody
            other.execute("ROLLBACK")
        await applied(backend, discover(found("a")))


# --------------------------------------------------------------------------- time


async def subjects(backend: Backend, lease: float = 30) -> list[str]:
    return [d.event.subject for d in await backend.receive(["load"], 10, lease=lease)]


async def test_leases_that_a_clock_was_set_back_under_end_late_and_once_for_all_processes(
    tmp_path: Path,
) -> None:
    uri, clock = f"sqlite:///{tmp_path}/f.db", ManualClock()
    async with (
        open_backend(uri, environment(clock)) as one,
        open_backend(uri, environment(clock)) as two,
    ):
        await applied(one, discover(found("a")), discover(found("b")))
        (held,) = await one.receive(["load"], 1, lease=30)
        (other,) = await two.receive(["load"], 1, lease=30)
        for backend in (one, two):  # each has seen the time before
            clock.advance(5)
            assert await subjects(backend) == []
            await applied(backend, discover(found("later"), delay=3600)) if backend is two else None
        clock.set(-7200)
        for _ in range(4):
            clock.advance(4)
            for backend in (one, two):
                assert await subjects(backend) == []
        assert await held.extend(30) is True
        clock.advance(16)
        assert await subjects(one) == [other.event.subject]
        await held.ack()
        clock.advance(3600)
        assert await subjects(two) == [other.event.subject, "suite/later"]


async def test_a_clock_that_was_set_back_while_nobody_ran(tmp_path: Path) -> None:
    uri, clock = f"sqlite:///{tmp_path}/f.db", ManualClock()
    async with open_backend(uri, environment(clock)) as backend:
        await applied(backend, discover(found("a")), discover(found("b"), delay=30))
    clock.set(-1e7)
    async with open_backend(uri, environment(clock)) as backend:
        assert await subjects(backend) == ["suite/a"]
        assert await subjects(backend) == []
        clock.advance(30)
        assert await subjects(backend) == ["suite/a", "suite/b"]


async def test_who_is_behind_has_a_turn_though_the_clock_was_wrong_by_decades(tmp_path: Path) -> None:
    uri, clock = f"sqlite:///{tmp_path}/f.db", ManualClock()
    async with open_backend(uri, environment(clock)) as backend:
        await applied(backend, *(discover(found(key), group="g") for key in "abc"))
        for step in (2e9, -2e9):
            clock.set(step)
            await applied(backend, discover(found(f"at {step}")))
        for key in "abc":
            got = await backend.receive(["load"], 9, lease=9)
            assert f"suite/{key}" in [delivery.event.subject for delivery in got]
            for delivery in got:
                await delivery.ack()


async def test_processes_need_not_agree_on_how_long_partitions_are_held(tmp_path: Path) -> None:
    """A hold that is longer than one's own is none from before the clock was set back."""
    uri, clock = f"sqlite:///{tmp_path}/f.db", ManualClock()
    async with (
        open_backend(uri, environment(clock), hold="1m") as long,
        open_backend(uri, environment(clock), hold="2s") as short,
    ):
        await long.channel("c").put([ChannelRecord("k", b"1")])
        one, other = long.channel("c").consume("x"), short.channel("c").consume("x")
        held = await anext(one)
        clock.advance(10)
        waiting = asyncio.ensure_future(anext(other))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        clock.advance(51)
        batch = await within(60, waiting)
        assert not await held.extend()
        clock.advance(1.9)
        assert await batch.extend()
        clock.advance(2.1)
        assert not await batch.extend()


async def test_a_channel_goes_on_when_the_clock_is_set_back(tmp_path: Path) -> None:
    uri, clock = f"sqlite:///{tmp_path}/f.db", ManualClock()
    async with open_backend(uri, environment(clock)) as backend:
        channel = backend.channel("c")
        await channel.put([ChannelRecord("k", b"1")])
        paused = channel.consume("me")
        await anext(paused)
        clock.set(-3600)
        batch = await within(30, anext(channel.consume("me", wait=20)))
        assert [record.data for record in batch.records] == [b"1"]


class RestlessClock(ManualClock):
    """It is later by ``step`` seconds each time that it is looked at."""

    step = 0.0

    def now(self) -> datetime:
        self.advance(self.step)
        return super().now()


class Connection:
    """A connection that a test watches or hinders."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.begins = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *arguments: Any) -> Any:
        if sql == "BEGIN IMMEDIATE":
            self.begins.set()
        return self._connection.execute(sql, *arguments)


async def test_a_lease_counts_from_when_the_lock_was_got(tmp_path: Path) -> None:
    path, clock = tmp_path / "f.db", ManualClock()
    uri = f"sqlite:///{path}"
    async with (
        open_backend(uri, environment(clock)) as one,
        open_backend(uri, environment(clock)) as two,
    ):
        await applied(one, discover(found("a")))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            watched = Connection(one.writer._connected())
            one.writer._connection = cast("Any", watched)
            asked = asyncio.create_task(one.receive(["load"], 1, lease=2))
            assert await asyncio.to_thread(watched.begins.wait, 30)
            clock.advance(3)
            other.execute("COMMIT")
        (delivery,) = await asked
        assert await two.receive(["load"], 1, lease=2) == []
        assert await delivery.extend(2) is True


async def test_a_transaction_that_begins_again_has_a_new_moment(tmp_path: Path) -> None:
    path, clock = tmp_path / "f.db", RestlessClock()
    async with open_backend(f"sqlite:///{path}", environment(clock)) as backend:
        await applied(backend, Commit((append(found("a")),)))
        clock.step = 100
        await backend.commit([discover(found("a")), discover(found("b"), delay=10)])
        clock.step = 0
        with closing(sqlite3.connect(path)) as other:
            (due,) = other.execute("SELECT due FROM queue").fetchone()
            (latest,) = other.execute("SELECT latest FROM clock").fetchone()
        assert due == latest + 10_000 == int(clock.now().timestamp() * 1000) + 10_000


# --------------------------------------------------------------------------- one process


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_removed_or_replaced_is_not_gone_on_with(tmp_path: Path, replaced: bool) -> None:
    path, aside, clock = tmp_path / "f.db", tmp_path / "aside.db", ManualClock()
    async with open_backend(f"sqlite:///{path}", environment(clock)) as backend:
        await applied(backend, discover(found("a")))
        path.rename(aside)
        if replaced:
            shutil.copy(aside, path)
        clock.advance(1)
        for back in (False, True):
            if back:
                aside.rename(path)
            wants: list[Callable[[], Any]] = [
                lambda: backend.commit([discover(found("b"))]),
                lambda: backend.receive(["load"], 1, lease=9, wait=60),
                lambda: backend.last(["suite/a"]),
                lambda: backend.channel("c").put([ChannelRecord("k", b"1")]),
                lambda: listed(backend.scan(LANE)),
            ]
            for want in wants:
                with pytest.raises(ConfigError, match=r"f\.db: was removed or replaced.*start again$"):
                    await within(30, want())
            assert path.exists() is (replaced or back)


async def test_the_directory_may_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    clock = ManualClock()
    async with open_backend("sqlite:///f.db", environment(clock)) as backend:
        monkeypatch.chdir(tmp_path / "elsewhere")
        clock.advance(1)
        await applied(backend, discover(found("a")))
        assert set(await backend.last(["suite/a"])) == {"suite/a"}
    assert list((tmp_path / "elsewhere").iterdir()) == []


async def test_one_receive_hands_out_so_many_bytes(tmp_path: Path) -> None:
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        await applied(backend, *(discover(found(f"s{n}")) for n in range(600)))
        assert len(await backend.receive(["load"], 600, lease=9)) == 600
        await backend.purge()
        for n in range(100):
            await applied(backend, discover(found(f"u{n}", data="\u00fc" * 100_000)))
        sizes: list[int] = []
        while some := await backend.receive(["load"], 512, lease=9):
            sizes.append(sum(len(cast("Any", delivery.event.data)) for delivery in some))
        assert sum(sizes) > 100 * 200_000
        assert max(sizes) < 4 << 20
        assert min(sizes[:-1]) > 3 << 20
        await applied(backend, *(discover(found(f"t{n}")) for n in range(600)))
        assert len(await backend.receive(["load"], 600, lease=9)) == 600


async def test_an_entry_that_is_longer_than_a_portion_is_handed_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowlane.backends.sqlite.queue._BYTES", 1000)
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        await applied(backend, *(discover(found(f"u{n}", data="x" * 5000)) for n in range(3)))
        await applied(backend, *(discover(found(f"v{n}", stage="copy", data="x" * 5000)) for n in range(3)))
        sizes = [len(await backend.receive(["load", "copy"], 9, lease=9)) for _ in range(7)]
        assert sizes == [1, 1, 1, 1, 1, 1, 0]


async def test_one_transaction_takes_on_so_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    apply = group.apply

    def watched(connection: Any, group: Sequence[Any], wall: Any) -> Any:
        groups.append(len(group))
        return apply(connection, group, wall)

    monkeypatch.setattr(writer, "apply", watched)
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            works = [[discover(found(f"u{n}", data="x" * 200_000))] for n in range(200)]
            tasks = [asyncio.create_task(backend.commit(work)) for work in works]
            await asyncio.sleep(0)
            other.execute("COMMIT")
        await within(60, asyncio.gather(*tasks))
    assert sum(groups) == 200
    assert max(groups) <= 42


class Unwilling(Connection):
    """A connection to a disk that has gone: it can neither commit nor roll back."""

    def execute(self, sql: str, *arguments: Any) -> Any:
        if sql in ("COMMIT", "ROLLBACK"):
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *arguments)


async def test_a_transaction_that_cannot_be_rolled_back_is_the_end_of_its_connection_only(
    tmp_path: Path,
) -> None:
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        for n in range(2):
            backend.writer._connection = cast("Any", Unwilling(backend.writer._connected()))
            with pytest.raises(Retryable, match="disk I/O"):
                await within(30, backend.commit([discover(found(f"lost{n}"))]))
            await within(30, applied(backend, discover(found(f"kept{n}"))))
        backend.writer._connection = cast("Any", Unwilling(backend.writer._connected()))
        with pytest.raises(Retryable, match="disk I/O"):
            await within(30, backend.purge())
        assert {event.subject for event in await listed(backend.scan(LANE))} == {"suite/kept0", "suite/kept1"}


async def test_a_file_that_is_gone_is_not_made_anew_by_a_new_connection(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        backend.writer._connection = cast("Any", Unwilling(backend.writer._connected()))
        with pytest.raises(Retryable):
            await backend.commit([discover(found("a"))])
        path.unlink()
        with pytest.raises(ConfigError, match="removed"):
            await within(30, backend.commit([discover(found("a"))]))
    assert not path.exists()


async def test_the_open_units_are_found_without_walking_the_dead(tmp_path: Path) -> None:
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        for n in range(0, 2000, 50):
            some = [found(f"u{m:04}") for m in range(n, n + 50)]
            await applied(backend, *(Commit((append(u, following(u, UNIT_DEAD)),)) for u in some))
        await applied(backend, Commit((append(found("z")),)))
        assert [event.subject for event in await listed(backend.units(LANE, "open"))] == ["suite/z"]
        steps = 0

        def step() -> int:
            nonlocal steps
            steps += 1
            return 0

        connection = backend._reader._connection
        assert connection is not None
        connection.set_progress_handler(step, 1)
        assert len(await listed(backend.units(LANE, "open"))) == 1
        assert steps < 500
        assert len(await listed(backend.units(LANE, "dead"))) == 2000


async def test_a_unit_that_is_redriven_leaves_nothing_among_the_dead(tmp_path: Path) -> None:
    path, head = tmp_path / "f.db", found("a")
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        await applied(backend, Commit((append(head),)))
        for type in (UNIT_DEAD, UNIT_REDRIVEN, UNIT_DEAD, UNIT_REDRIVEN):
            head = following(head, type)
            await applied(backend, Commit((append(head),)))
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM dead").fetchone() == (0,)


@pytest.mark.parametrize("last", [UNIT_SETTLED, UNIT_DEAD, UNIT_REDRIVEN])
async def test_what_happens_to_a_unit_within_one_group_counts_as_a_whole(tmp_path: Path, last: str) -> None:
    stream = [found("a")]
    for type in (UNIT_DEAD, UNIT_REDRIVEN, UNIT_SETTLED, UNIT_REDRIVEN, last):
        stream.append(following(stream[-1], type))
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        await applied(backend, *(Commit((append(event),)) for event in stream))
        assert [event.version for event in await listed(backend.read("suite/a"))] == [1, 2, 3, 4, 5, 6]
        opened = await listed(backend.units(LANE, "open"))
        dead = await listed(backend.units(LANE, "dead"))
    assert [event.type for event in opened] == [UNIT_REDRIVEN] * (last == UNIT_REDRIVEN)
    assert [event.type for event in dead] == [UNIT_DEAD] * (last == UNIT_DEAD)


async def test_a_commit_that_skips_a_version_spoils_no_other_of_its_group(tmp_path: Path) -> None:
    first = found("a")
    second, other = following(first), found("b")
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        work = [Commit((append(event),)) for event in (first, following(second), second, other)]
        answers = await backend.commit(work)
        assert [isinstance(answer, VersionConflict) for answer in answers] == [False, True, False, False]
        assert set(await backend.last(["suite/a", "suite/b"])) == {"suite/a", "suite/b"}


async def test_a_delivery_of_another_file_is_acked_there(tmp_path: Path) -> None:
    async with (
        open_backend(f"sqlite:///{tmp_path}/a.db", environment()) as ours,
        open_backend(f"sqlite:///{tmp_path}/b.db", environment()) as theirs,
    ):
        for backend in (ours, theirs):
            await applied(backend, discover(found("a")))
        (foreign,) = await theirs.receive(["load"], 9, lease=60)
        assert foreign.head is not None
        await applied(ours, settle(foreign))
        assert len(await ours.receive(["load"], 9, lease=60)) == 1
        await theirs.purge()
        await applied(ours, Commit((append(found("b")),), (), (), foreign))  # gone already: nothing happens


@pytest.mark.parametrize("most", [7, 70, 700, 2000])
def test_a_wide_statement_takes_each_row_once(most: int) -> None:
    wide = Wide("SELECT * FROM (VALUES ", "(?,?)", ")")
    with closing(sqlite3.connect(":memory:")) as connection:
        for rows in range(most % 97, most, max(1, most // 50)):
            values: list[Any] = list(range(2 * rows))
            answered = [row for sql, part in wide.parts(values) for row in connection.execute(sql, part)]
            assert answered == list(zip(values[::2], values[1::2], strict=True))


async def test_a_file_of_an_earlier_build_gets_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    one, two, other = found("a"), found("b"), found("c")
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        await applied(
            backend, discover(one), discover(other), Commit((append(two, following(two, UNIT_DEAD)),))
        )
        await applied(backend, Commit((append(following(other)),)))
    with closing(sqlite3.connect(path)) as old:
        old.executescript(
            "DROP INDEX log_runs; DROP TABLE clock; "
            "CREATE TABLE units (stream TEXT PRIMARY KEY, lane TEXT NOT NULL, state TEXT NOT NULL) "
            "WITHOUT ROWID; "
            "CREATE INDEX units_dead ON units (lane, stream) WHERE state = 'dead'; "
            "INSERT INTO units SELECT stream, lane, 'open' FROM open; "
            "INSERT INTO units SELECT stream, lane, 'dead' FROM dead; DROP TABLE open; DROP TABLE dead"
        )
    for _ in range(2):
        async with open_backend(f"sqlite:///{path}", environment()) as backend:
            assert [head.subject for head in await listed(backend.units(LANE, "open"))] == ["suite/a"]
            assert [head.subject for head in await listed(backend.units(LANE, "dead"))] == ["suite/b"]
            assert await subjects(backend, 0.001) == ["suite/a", "suite/c"]
            await backend.purge()
            await applied(backend, Commit((), discover(one).publish), Commit((), discover(other).publish))
    with closing(sqlite3.connect(path)) as new:
        plan = new.execute("EXPLAIN QUERY PLAN " + reader._RUNS, (LANE, 5)).fetchall()
    assert any("log_runs" in row[3] for row in plan)


async def test_a_reminder_looks_the_stream_up_by_an_index_that_the_first_one_makes(tmp_path: Path) -> None:
    """What nobody is reminded of pays nothing for it."""
    path, event = tmp_path / "f.db", found("a")

    def plan() -> str:
        with closing(sqlite3.connect(path)) as other:
            rows = other.execute(f"EXPLAIN QUERY PLAN {group._REMIND}", ("", 0, "", 1, None, None))
            return " ".join(row[3] for row in rows)

    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        await applied(backend, discover(event))
        assert "queue_stream" not in plan()
        for _ in range(2):
            await applied(backend, Commit((), (Publish(event, "load", repeat=True),)))
            assert "queue_stream" in plan()
        assert [d.event.subject for d in await backend.receive(["load"], 9, lease=9)] == ["suite/a"]


async def test_the_queue_of_an_earlier_build_learns_of_groups(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        await applied(backend, discover(found("old")))
    with closing(sqlite3.connect(path)) as old:
        old.executescript("DROP INDEX queue_group; ALTER TABLE queue DROP COLUMN grp")
        assert not old.execute("SELECT 1 FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for n in range(2):
        async with open_backend(f"sqlite:///{path}", environment()) as backend:
            await applied(backend, *(discover(found(f"{n}{key}"), group="g") for key in "ab"))
            got = await backend.receive(["load"], 9, lease=9)
            assert [d.event.subject for d in got] == ["suite/old", f"suite/{n}a"][n:]
            for _ in range(2):
                await got[-1].ack()
                got = await backend.receive(["load"], 9, lease=9)
            assert got == []


async def test_an_earlier_build_at_work_on_the_file_keeps_the_order(tmp_path: Path) -> None:
    """It knows nothing of groups, and takes and deletes what is due."""
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        await applied(backend, *(discover(found(key), group="g") for key in "abc"))
        with closing(sqlite3.connect(path)) as old:
            for key in "abc":
                due = old.execute(
                    "SELECT id, stream FROM queue WHERE due <= unixepoch('2100-01-01') * 1000"
                ).fetchall()
                assert [stream for _, stream in due] == [f"suite/{key}"]
                old.execute("DELETE FROM queue WHERE id = ?", due[0][:1])
                old.commit()


async def test_the_next_of_a_group_is_found_without_walking_the_others(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        await applied(backend, discover(found("first"), group="g"))
        await backend.purge()
    with closing(sqlite3.connect(path)) as connection:
        for n in range(3000):
            values = ("s", 0, f"u{n}", 1, None if n % 3 else f"g{n % 2}")
            connection.execute(
                "INSERT INTO queue (stage, due, stream, version, grp) VALUES (?,?,?,?,?)", values
            )
        steps = 0

        def step() -> int:
            nonlocal steps
            steps += 1
            return 0

        connection.set_progress_handler(step, 1)
        connection.execute("DELETE FROM queue WHERE id = (SELECT min(id) FROM queue WHERE grp = 'g0')")
        connection.execute(
            "INSERT INTO queue (stage, due, stream, version, grp) VALUES ('s', 0, 'x', 1, 'g0')"
        )
        connection.set_progress_handler(None, 0)
        assert steps < 500
        due = "SELECT grp, count(*), min(id) FROM queue WHERE due = 0 AND grp IS NOT NULL GROUP BY grp"
        assert connection.execute(due).fetchall() == [("g0", 1, 7), ("g1", 1, 4)]


async def test_closing_finishes_what_was_accepted(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/f.db"
    async with open_backend(uri, environment()) as backend:
        tasks = [asyncio.create_task(backend.commit([discover(found(f"u{n}"))])) for n in range(50)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in done[1::2]] == [list] * 25
    async with open_backend(uri, environment()) as backend:
        assert len(await backend.last([f"suite/u{n}" for n in range(50)])) == 50
    with pytest.raises(Retryable, match="closed"):
        await backend.commit([discover(found("late"))])


async def test_a_value_that_does_not_fit_fails_alone(tmp_path: Path) -> None:
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        unfit = Commit((append(found("x")),), (), (Tally(RUN, 0, "load", found=1 << 70),))
        answers = await asyncio.gather(
            backend.commit([discover(found("a"))]),
            backend.commit([unfit]),
            backend.commit([discover(found("b"))]),
            return_exceptions=True,
        )
        assert isinstance(answers[1], Permanent)
        assert set(await backend.last(["suite/a", "suite/b", "suite/x"])) == {"suite/a", "suite/b"}
        assert (await backend.tally(RUN, 0)).stages["load"].found == 2


async def test_the_write_ahead_log_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        channel = backend.channel("c")
        for n in range(60):
            await channel.put([ChannelRecord(str(n), b"x" * 50_000)] * 20)
            async for _ in backend.scan(LANE):
                pass
        assert path.stat().st_size > 40 << 20
        assert path.with_name("f.db-wal").stat().st_size < 24 << 20
    assert not path.with_name("f.db-wal").exists()


async def test_what_this_process_publishes_wakes_a_receiver_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowlane.backends.sqlite.backend.POLL", 60)
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        for n in range(60):
            waiting = asyncio.create_task(backend.receive(["load"], 1, lease=9, wait=60))
            for _ in range(n % 10):
                await asyncio.sleep(0)
            for _ in range(5000 * (n % 3 == 0)):
                if backend._news._waiters:
                    break
                await asyncio.sleep(0.001)
            await applied(backend, discover(found(f"u{n}")))
            (delivery,) = await within(30, waiting)
            await delivery.ack()


@pytest.mark.parametrize("committed", [True, False])
async def test_an_ack_wakes_a_receiver_of_the_same_group_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    monkeypatch.setattr("flowlane.backends.sqlite.backend.POLL", 60)
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        await applied(backend, *(discover(found(f"u{n}"), group="g") for n in range(10)))
        (delivery,) = await backend.receive(["load"], 9, lease=9)
        for n in range(1, 10):
            waiting = asyncio.create_task(backend.receive(["load"], 9, lease=9, wait=60))
            for _ in range(5000):
                if backend._news._waiters:
                    break
                await asyncio.sleep(0.001)
            if committed:
                await applied(backend, Commit(ack=delivery))
            else:
                await delivery.ack()
            (delivery,) = await within(30, waiting)
            assert delivery.event.subject == f"suite/u{n}"


async def test_who_is_cancelled_with_the_answer_at_hand_takes_nothing_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        await applied(backend, discover(found("a")))
        task = asyncio.create_task(backend.receive(["load"], 1, lease=9))
        answer = backend.writer._answer

        def answer_and_cancel(group: Any) -> None:
            answer(group)
            task.cancel()

        with monkeypatch.context() as patch:
            patch.setattr(backend.writer, "_answer", answer_and_cancel)
            with pytest.raises(asyncio.CancelledError):
                await task
        (delivery,) = await backend.receive(["load"], 1, lease=9)
        assert delivery.attempt == 1


async def test_waiting_costs_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        looks, submit = count(), backend.writer.submit

        def counted(*request: Any) -> Any:
            next(looks)
            return submit(*request)

        monkeypatch.setattr(backend.writer, "submit", counted)
        before = time.process_time()
        assert await backend.receive(["load"], 1, lease=9, wait=1) == []
        # A look, with its pause, every 50 ms; one takes half a millisecond, and ten where all is slow.
        assert 1 < next(looks) <= 22
        assert time.process_time() - before < 0.5


@pytest.mark.parametrize("synchronous", ["normal", "FULL"])
async def test_synchronous_is_an_option(tmp_path: Path, synchronous: str) -> None:
    uri = f"sqlite:///{tmp_path}/f.db"
    async with open_backend(uri, environment(), synchronous=synchronous) as backend:
        await applied(backend, discover(found("a")))


# --------------------------------------------------------------------------- refusals


async def refused(uri: str, **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        async with open_backend(uri, environment(), **options):
            pass
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://f.db", "file:///f.db"]
)
async def test_a_uri_names_a_file(uri: str) -> None:
    assert "sqlite:///relative/path" in await refused(uri)


async def test_options_are_checked(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/f.db"
    assert "synchronous=off" in await refused(uri, synchronous="off")
    for seconds in ("soon", "-1", "nan", "inf", "1e9", ""):
        assert f"busy_timeout={seconds} is not a number of seconds from 0" in await refused(
            uri, busy_timeout=seconds
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [False, True])
async def test_a_file_that_stays_locked_is_refused_in_time(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "f.db"
    uri = f"sqlite:///{path}"
    if there:
        async with open_backend(uri, environment()):
            pass
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        text = await refused(uri, busy_timeout="0.3")
        assert 0.3 <= time.monotonic() - began < 25  # and not the 30 seconds of the default
        assert f"{path}: another process has held its lock for 0.3 s" in text
        assert "busy_timeout" in text
        assert "lock" in await refused(uri, busy_timeout="0")
        opening = asyncio.create_task(open_and_close(uri))
        other.execute("COMMIT")
        await within(30, opening)


async def open_and_close(uri: str) -> None:
    async with open_backend(uri, environment()):
        pass


async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    path.write_bytes(b"name,amount\n" * 1000)
    assert f"{path}: is not a database" in await refused(f"sqlite:///{path}")
    assert path.read_bytes() == b"name,amount\n" * 1000


async def test_the_database_of_another_application_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE log (line TEXT)")
    before = path.read_bytes()
    assert "another application" in await refused(f"sqlite:///{path}")
    assert path.read_bytes() == before


async def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment()):
        pass
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 99")
    assert "upgrade" in await refused(f"sqlite:///{path}")


async def test_a_damaged_file_is_refused_or_reported(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        await applied(backend, *(discover(found(f"u{n}")) for n in range(500)))
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\xff" * 4000 + whole[4100:])
    assert str(path) in await refused(f"sqlite:///{path}")
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with pytest.raises(ConfigError, match="backup"):
        async with open_backend(f"sqlite:///{path}", environment()) as backend:
            await backend.commit([discover(found("more"))])


@pytest.mark.parametrize("text", ["'{'", "'{}'", "CAST(x'22ff22' AS TEXT)"])
async def test_an_event_that_cannot_be_read_is_the_file_s_fault(tmp_path: Path, text: str) -> None:
    path = tmp_path / "f.db"
    async with open_backend(f"sqlite:///{path}", environment()) as backend:
        await applied(backend, discover(found("a")))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute(f"UPDATE log SET event = {text}")
        for want in (
            backend.last(["suite/a"]),
            listed(backend.read("suite/a")),
            listed(backend.scan(LANE)),
            listed(backend.units(LANE, "open")),
            backend.receive(["load"], 1, lease=9),
        ):
            with pytest.raises(ConfigError, match=r"f\.db: .* restore a backup") as caught:
                await want
            assert "\n" not in str(caught.value)


async def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.db").mkdir()
    assert "directory" in await refused(f"sqlite:///{tmp_path}/file/f.db")
    assert "is a directory" in await refused(f"sqlite:///{tmp_path}/directory.db")
    assert "permissions" in await refused("sqlite:////proc/flowlane.db")
