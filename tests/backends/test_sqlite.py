"""The SQLite backend keeps the promises of the ports, across processes and whenever it is killed."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest

from flowlane.backends.sqlite import open_backend
from flowlane.errors import ConfigError, Permanent, Retryable
from flowlane.events import Event
from flowlane.ports import ChannelRecord, Commit, Environment, Tally
from flowlane.state import StageTally
from flowlane.testing.backend_model import Opener, Storage
from flowlane.testing.backend_suite import BackendSuite
from flowlane.testing.channel_suite import ChannelSuite
from flowlane.testing.manual import ManualClock
from flowlane.testing.units import LANE, RUN, append, applied, discover, found, within


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


class TestChannel(SqliteStorage, ChannelSuite):
    pass


# --------------------------------------------------------------------------- processes


def start(path: Path, name: str, total: int) -> subprocess.Popen[str]:
    worker = Path(__file__).with_name("sqlite_worker.py")
    command = [sys.executable, str(worker), f"sqlite:///{path}", name, str(total)]
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
        workers = [start(path, f"p{n}{side}", 100_000) for side in "ab"]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "open\n"
        await asyncio.sleep(chance.uniform(0, 0.3))
        for worker in workers:
            worker.kill()
            worker.communicate()
        await check_whole(path)
    assert (await check_whole(path)).found > 0
    last = start(path, "last", 10)
    last.communicate(timeout=60)
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


# --------------------------------------------------------------------------- one process


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


async def test_waiting_costs_next_to_nothing(tmp_path: Path) -> None:
    async with open_backend(f"sqlite:///{tmp_path}/f.db", environment()) as backend:
        before = time.process_time()
        assert await backend.receive(["load"], 1, lease=9, wait=1) == []
        assert time.process_time() - before < 0.2


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
    assert "busy_timeout=soon" in await refused(uri, busy_timeout="soon")


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


async def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.db").mkdir()
    assert "directory" in await refused(f"sqlite:///{tmp_path}/file/f.db")
    assert "is a directory" in await refused(f"sqlite:///{tmp_path}/directory.db")
    assert "permissions" in await refused("sqlite:////proc/flowlane.db")
