"""Workers on AWS with a stage that a channel carries: order, drains, zombies, and what is said."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

from flowlane import events
from flowlane.cli.setup import _queues
from flowlane.cli.verbs import cli
from flowlane.compose import Application, load_lane, open_application
from flowlane.settings import Settings
from flowlane.shards.leases import stream_of
from flowlane.state import progress, status
from flowlane.testing.units import listed
from flowlane_aws.clients import open_client

pytestmark = pytest.mark.long

#: Shards are held for 6 s: nobody waits for 30, and a machine that stands still for some costs no hold.
BACKEND = "aws://wc?hold=6s"
#: What its stages do outside is a line each in ``effects``.
LANE = """
import asyncio, os, signal
from pathlib import Path
from flowlane import Lane, Policy, Unit

policy = Policy(lease="6s", timeout="60s", backoff="10ms", backoff_cap="20ms", retries=2, batch=5)
lane = Lane("rows", policy=policy)

class Row(Unit, key=("customer", "n")):
    customer: str
    n: int

def note(text):
    with Path("effects").open("a") as file:
        file.write(f"{text} {os.environ.get('WHO', '')}\\n")

def told(row):
    if row == os.environ.get("STOPS"):
        note("stops")
        os.kill(os.getpid(), signal.SIGSTOP)
    return {"id": row, "who": os.environ["WHO"]}

@lane.stage(on=lane.triggered)
async def find(event, ctx):
    for n in range(int(os.environ.get("ROWS", "3"))):
        for customer in os.environ.get("CUSTOMERS", "a"):
            yield Row(customer=customer, n=n)

@lane.stage(on=Row, order="customer", via="channel")
async def apply(event, ctx):
    row = f"{event.data.customer}{event.data.n}"
    async def begin():
        note(f"begun {row}")
    await ctx.step("begin", begin)
    note(f"at {row}")
    if Path("rows.csv").exists():
        here = Path.cwd()
        mapped = ctx.rows(f"file://{here}/rows.csv").map(lambda each: told(f"{row}-{each['id']}"))
        await ctx.load(mapped, to=f"sqlite:///{here}/out.db?table=loaded&key=id")
    if row == os.environ.get("FAILS"):
        raise OSError("never")
    await asyncio.sleep(float(os.environ.get("TAKES", "0")))
    async def end():
        note(f"ended {row}")
    await ctx.step("end", end)
"""


class Worker:
    """``flowlane worker`` as a process in `folder`."""

    def __init__(self, folder: Path, **environment: str) -> None:
        with (folder / "said").open("a") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flowlane", "worker", "rows.py", "--backend", BACKEND, "--json"],
                cwd=folder,
                env={**os.environ, **environment, "FLOWLANE_LOG_LEVEL": "info"},
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self, seconds: float) -> int:
        """Its exit code, within `seconds`."""
        return await asyncio.to_thread(self.process.wait, seconds)


Start = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path, ministack: str) -> Iterator[Start]:
    """Starts workers in a folder that holds ``rows.py``, and kills them in the end."""
    (tmp_path / "rows.py").write_text(LANE)
    started: list[Worker] = []

    def begin(**environment: str) -> Worker:
        started.append(Worker(tmp_path, **environment))
        return started[-1]

    yield begin
    for worker in started:
        worker.process.kill()
        worker.process.wait()


@pytest.fixture
async def app(tmp_path: Path, start: Start) -> AsyncIterator[Application]:
    """The lane of the workers, as this process sees it."""
    lane = load_lane(str(tmp_path / "rows.py"))
    async with open_application([lane], Settings(backend=BACKEND)) as app:
        await app.backend.create(_queues(lane))
        yield app


def effects(folder: Path) -> list[str]:
    path = folder / "effects"
    return path.read_text().splitlines() if path.exists() else []


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 120) -> None:
    """Return when `condition` holds: what another process does is seen by looking."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110  # no event of another process can be awaited
            await asyncio.sleep(0.1)


async def has_effect(folder: Path, text: str) -> bool:
    return any(line.startswith(text) for line in effects(folder))


async def over(app: Application, run: str) -> bool:
    return (await app.backend.last([run]))[run].type == events.RUN_COMPLETED


async def test_two_workers_of_which_one_is_killed_keep_the_order_and_a_dead_unit_holds_nothing_up(
    app: Application, start: Start, tmp_path: Path
) -> None:
    killed, other = (start(WHO=who, TAKES="0.2", ROWS="4", CUSTOMERS="abcdef", FAILS="c1") for who in "ko")
    run, _ = await app.engine.trigger("rows", "s")
    await until(lambda: has_effect(tmp_path, "ended a1"))
    killed.process.kill()
    await until(lambda: over(app, run))
    other.signal(signal.SIGTERM)
    assert await other.ended(60) == 0
    report = progress((await app.backend.last([run]))[run]).report
    assert (report["units"]["settled"], report["units"]["dead"]) == (24, 1)
    ended = [line.split()[1] for line in effects(tmp_path) if line.startswith("ended")]
    for customer in "abcdef":
        rows = [int(row[1]) for row in ended if row[0] == customer]
        # The one that was killed may have done what it did not come to log.
        assert [row for row, _ in groupby(rows)] == ([0, 2, 3] if customer == "c" else [0, 1, 2, 3])
    assert status((await app.backend.last(["rows/row/c@1"]))["rows/row/c@1"]) == "dead"
    lag = await app.backend.channel("rows/apply").lag("stage")
    assert sum(each.position > 0 for each in lag) > 0
    assert {each.owner for each in lag} == {""}, "they let go of what they held"


async def test_the_checkpoint_and_the_effects_of_a_zombie_are_refused(
    app: Application, start: Start, tmp_path: Path
) -> None:
    """It stops itself in the middle of a load, and is woken while another one is at the unit behind."""
    (tmp_path / "rows.csv").write_text("id\n" + "".join(f"{n}\n" for n in range(10)))
    zombie = start(WHO="zombie", STOPS="a0-7")
    run, _ = await app.engine.trigger("rows", "s")
    await until(lambda: has_effect(tmp_path, "stops"))
    successor = start(WHO="successor", TAKES="2")
    await until(lambda: has_effect(tmp_path, "at a1 successor"))
    zombie.signal(signal.SIGCONT)
    await until(lambda: over(app, run))
    for worker in (zombie, successor):
        worker.signal(signal.SIGTERM)
        assert await worker.ended(60) == 0
    for n in range(3):
        stream = await listed(app.backend.read(f"rows/row/a@{n}"))
        kinds = Counter(event.type for event in stream)
        assert [event.version for event in stream] == list(range(1, len(stream) + 1))
        assert (kinds[events.STEP_DONE], kinds[events.UNIT_SETTLED], kinds[events.UNIT_DEAD]) == (2, 1, 0)
        # Event ids begin with what is their writer's own: the zombie wrote nothing since the other took over.
        began = [event for event in stream if event.type == events.ATTEMPT_STARTED]
        assert {event.id[:16] for event in stream[began[-1].version :]} == {began[-1].id[:16]}
    leases = await listed(app.backend.read(stream_of("rows/apply", "shardId-000000000000", "stage")))
    owners = [json.loads(bytes(event.data)).get("owner", "") for event in leases]
    # The zombie, its successor; in the end nobody. In between the zombie may have asked for the shard, having
    # nothing to do, or have taken it from who ended before it: after a1.
    first, second, *_, last = (owner for owner, _ in groupby(owners))
    assert "" not in (first, second)
    assert last == ""
    assert "was lost to another consumer" in (tmp_path / "said").read_text()
    with closing(sqlite3.connect(tmp_path / "out.db")) as out:
        rows: dict[str, str] = dict(out.execute("SELECT id, who FROM loaded"))
    assert rows.keys() == {f"a{n}-{m}" for n in range(3) for m in range(10)}
    assert {who for row, who in rows.items() if "a0-5" <= row < "a2"} == {"successor"}
    assert "at a1 zombie" not in effects(tmp_path)


async def test_sigterm_drains_in_under_20_s_and_the_next_goes_on_in_place(
    app: Application, start: Start, tmp_path: Path
) -> None:
    worker = start(TAKES="50")
    run, _ = await app.engine.trigger("rows", "s")
    await until(lambda: has_effect(tmp_path, "at a0"))
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert await worker.ended(60) == 0
    assert time.monotonic() - began < 20
    head = (await app.backend.last(["rows/row/a@0"]))["rows/row/a@0"]
    assert head.type == events.ATTEMPT_CONTINUED
    start()
    await until(lambda: over(app, run))
    ended = [" ".join(line.split()[:2]) for line in effects(tmp_path)]
    assert ended[:3] == ["begun a0", "at a0", "at a0"], "no step was done twice"
    assert [line for line in ended if line.startswith("ended")] == ["ended a0", "ended a1", "ended a2"]


# --------------------------------------------------------------------------- the command line


def call(*arguments: str) -> tuple[int, str, str]:
    """What ``flowlane`` ended with: its code, what it printed and what it said of what is wrong."""
    result = CliRunner().invoke(cli, arguments, prog_name="flowlane")
    return result.exit_code, result.stdout, result.stderr


def test_init_run_status_and_what_is_said_where_the_stream_is_missing(
    tmp_path: Path, ministack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWLANE_BACKEND", BACKEND)
    (tmp_path / "rows.py").write_text(LANE)
    code, out, _ = call("init", "rows.py", "--json")
    assert (code, json.loads(out)["made"]) == (
        0,
        ["wc-log", "wc-rows-find-dead", "wc-rows-find", "wc-rows-apply-dead", "wc-rows.apply"],
    )
    assert json.loads(call("init", "rows.py", "--json")[1])["made"] == []
    boto3.client("kinesis").put_record(StreamName="wc-rows.apply", PartitionKey="a", Data=b"junk")
    code, out, error = call("run", "rows.py", "--json", "--backend", f"{BACKEND}&aggregate=true")
    assert (code, json.loads(out)["units"]["settled"]) == (0, 3), error
    document = json.loads(call("status", "rows.py", "--json")[1])
    (channel,) = document["channels"]
    assert (channel["stage"], channel["partition"], channel["owner"]) == ("apply", 0, "")
    assert int(channel["position"]) > 0
    assert "JSON is malformed" in call("dead", "rows.py", "--json")[1]

    async def delete() -> None:
        async with open_client("kinesis") as kinesis:
            await kinesis.delete_stream(StreamName="wc-rows.apply")

    asyncio.run(delete())
    code, _, error = call("run", "rows.py")
    assert code == 2
    assert "Kinesis stream wc-rows.apply: it does not exist" in error
    assert "`flowlane init` makes what stages need" in error
