"""The worker on AWS: leases kept and lost, drains, dead letters, and what it says when something is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flowlane import Context, Event, Lane, Policy, Unit, events
from flowlane.cli.verbs import cli
from flowlane.clock import SystemClock
from flowlane.compose import Application, open_application
from flowlane.deadline import Deadline
from flowlane.ports import QueueSpec
from flowlane.settings import Settings
from flowlane.state import progress, status
from flowlane.testing.units import listed, within
from flowlane.worker import report_of, run_once, serve
from flowlane_aws.clients import open_client
from tests.fault_proxy import FaultProxy, refused

pytestmark = pytest.mark.long

#: The lane of the processes; what its stages do outside is a line each in ``effects``.
SLOW = """
import asyncio, os, signal
from pathlib import Path
from flowlane import Lane, Policy, Unit

lane = Lane("slow", policy=Policy(lease=6, timeout=120))

class Thing(Unit, key="n"):
    n: int

def note(text):
    with Path("effects").open("a") as file:
        file.write(f"{text} {os.environ.get('WHO', '')}\\n")

@lane.stage(on=lane.triggered)
async def find(event, ctx):
    yield Thing(n=1)

@lane.stage(on=Thing)
async def load(event, ctx):
    async def begin():
        note("begun")
    await ctx.step("begin", begin)
    note("at work")
    if os.environ.get("STOPS"):
        os.kill(os.getpid(), signal.SIGSTOP)
    await asyncio.sleep(float(os.environ.get("TAKES", "0")))
    async def end():
        note("ended")
    await ctx.step("end", end)
"""
BACKEND = "aws://w"
THING = "slow/thing/1"


class Thing(Unit, key="n"):
    n: int


@asynccontextmanager
async def application(lane: Lane, *, create: bool = True) -> AsyncIterator[Application]:
    """The lane on the stand-in that the environment points at."""
    async with open_application([lane], Settings(backend=BACKEND)) as app:
        if create:
            policies = [(stage, stage.policy) for stage in lane.stages]
            await app.backend.create(
                [QueueSpec(s.queue, float(p.lease), float(p.timeout), bool(s.order)) for s, p in policies]
            )
        yield app


async def count_calls(app: Application) -> Counter[str]:
    """What is asked of SQS from now on, by operation."""
    calls: Counter[str] = Counter()
    client = await app.backend.queues._client.opened()  # type: ignore[attr-defined] # of AwsBackend
    client.meta.events.register("provide-client-params.sqs", lambda model, **_: calls.update([model.name]))
    return calls


async def test_a_handler_of_18_s_on_a_queue_of_8_s_has_one_effect(ministack: str) -> None:
    # A machine that stands still for 3 s costs no lease.
    lane = Lane("slow", policy=Policy(lease=8.0, timeout=120.0))
    effects: list[int] = []

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Thing]:
        yield Thing(n=1)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        await asyncio.sleep(18)
        effects.append(event.data.n)

    # The other worker waits for the message all the time.
    async with (
        application(lane) as app,
        application(lane, create=False) as other,
        asyncio.TaskGroup() as tasks,
    ):
        calls = await count_calls(app)
        others = await count_calls(other)
        stop, deadline = asyncio.Event(), Deadline()
        task = tasks.create_task(run_once(app, lane))
        watching = tasks.create_task(serve(other, stop, deadline))
        report = await within(120, task)
        stop.set()
        deadline.at = SystemClock().monotonic() + 5
        await watching
        stream = await listed(app.backend.read(THING))
    assert effects == [1]
    assert (report.outcome, report.units["settled"]) == ("settled", 1)
    assert [event.type for event in stream if event.type == events.UNIT_SETTLED] == [events.UNIT_SETTLED]
    heartbeats = calls["ChangeMessageVisibility"] + others["ChangeMessageVisibility"]
    assert heartbeats >= 18 / (8 / 3) / 2  # each third of the lease, at a tick of a quarter of it


# --------------------------------------------------------------------------- processes


class Worker:
    """``flowlane worker`` as a process in `folder`."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        with (folder / "said").open("a") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flowlane", "worker", "slow.py", "--backend", BACKEND, "--json"],
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


@pytest.fixture
def start(tmp_path: Path, ministack: str) -> Iterator[Callable[..., Worker]]:
    """Starts workers in a folder that holds ``slow.py``, and kills them in the end."""
    (tmp_path / "slow.py").write_text(SLOW)
    started: list[Worker] = []

    def begin(**environment: str) -> Worker:
        started.append(Worker(tmp_path, **environment))
        return started[-1]

    yield begin
    for worker in started:
        worker.process.kill()
        worker.process.wait()


@pytest.fixture
async def app(tmp_path: Path, start: Callable[..., Worker]) -> AsyncIterator[Application]:
    """The lane of the workers, as this process sees it."""
    from flowlane.compose import load_lane

    async with application(load_lane(str(tmp_path / "slow.py"))) as app:
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


async def settled(app: Application, stream: str = THING) -> bool:
    head = (await app.backend.last([stream])).get(stream)
    return head is not None and status(head) == "settled"


async def test_the_writes_of_a_zombie_are_refused(
    app: Application, start: Callable[..., Worker], tmp_path: Path
) -> None:
    zombie = start(WHO="zombie", STOPS="yes")
    await app.engine.trigger("slow", "s")
    await until(lambda: has_effect(tmp_path, "at work zombie"))
    successor = start(WHO="successor", TAKES="3")
    await until(lambda: has_effect(tmp_path, "at work successor"))
    zombie.signal(signal.SIGCONT)  # while the other is at work
    await until(lambda: settled(app))
    for worker in (zombie, successor):
        worker.signal(signal.SIGTERM)
    assert [await worker.ended(60) for worker in (zombie, successor)] == [0, 0]
    stream = await listed(app.backend.read(THING))
    kinds = Counter(event.type for event in stream)
    assert [event.version for event in stream] == list(range(1, len(stream) + 1))
    assert (kinds[events.STEP_DONE], kinds[events.UNIT_SETTLED], kinds[events.UNIT_DEAD]) == (2, 1, 0)
    # Event ids begin with what is their writer's own: since the other took over, the zombie wrote nothing.
    began = [event for event in stream if event.type == events.ATTEMPT_STARTED]
    assert len({event.id[:16] for event in began}) == 2
    assert {event.id[:16] for event in stream[began[-1].version :]} == {began[-1].id[:16]}
    assert effects(tmp_path).count("begun zombie") == 1
    assert "begun successor" not in effects(tmp_path)


async def test_sigterm_ends_a_worker_that_waits_for_messages(
    app: Application, start: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = start()
    await app.engine.trigger("slow", "s")
    await until(lambda: settled(app))
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert await worker.ended(60) == 0
    # A long poll takes 5 s: what it still brings is given back. It does not take the 20 s that there are.
    assert time.monotonic() - began < 15


async def test_sigterm_drains_in_under_20_s(
    app: Application, start: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = start(TAKES="100")
    await app.engine.trigger("slow", "s")
    await until(lambda: has_effect(tmp_path, "at work"))
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert await worker.ended(60) == 0
    assert time.monotonic() - began < 20
    head = (await app.backend.last([THING]))[THING]
    assert head.type == events.ATTEMPT_CONTINUED
    start(TAKES="0")
    await until(lambda: settled(app))
    assert [line.split()[0] for line in effects(tmp_path)] == ["begun", "at", "at", "ended"]


# --------------------------------------------------------------------------- dead letters


async def test_what_kills_every_worker_that_touches_it_ends_dead_and_so_does_its_run(ministack: str) -> None:
    """Nobody gets as far as counting an attempt: the message comes again and again, until SQS gives it up."""
    lane = Lane("deadly", policy=Policy(lease=2.0))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Thing]:
        for n in range(2):
            yield Thing(n=n)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None: ...

    async with application(lane) as app, asyncio.TaskGroup() as tasks:
        await lower_receives(app, "deadly/load", 4)
        run, _ = await app.engine.trigger("deadly", "s")
        stop, deadline = asyncio.Event(), Deadline()
        async with open_application([lane], Settings(backend=BACKEND, stage="find")) as finder:
            finding = tasks.create_task(serve(finder, stop, deadline))
            received = 0
            while received < 8:
                for delivery in await app.backend.receive(["deadly/load"], 10, lease=30, wait=1):
                    received += 1
                    await delivery.nack()  # as if its lease had run out
            # It is SQS's to notice, with the next receive.
            assert await app.backend.receive(["deadly/load"], 10, lease=30) == []
            await until(lambda: has_ended(app, run))
            stop.set()
            deadline.at = SystemClock().monotonic() + 5
            await finding
        streams = [f"deadly/thing/{n}" for n in range(2)]
        heads = (await app.backend.last(streams)).values()
        assert [status(head) for head in heads] == ["dead", "dead"]
        assert {progress(head).reason for head in heads} == {"its queue gave its message up after 4 receives"}
        assert (await app.backend.last([run]))[run].type == events.RUN_COMPLETED
        assert await app.backend.given_up(["deadly/load"], 10) == []
        report = await report_of(app, lane, run)
    assert (report.outcome, report.units["dead"]) == ("failed", 2)


async def has_ended(app: Application, run: str) -> bool:
    return (await app.backend.last([run]))[run].type == events.RUN_COMPLETED


async def lower_receives(app: Application, stage: str, receives: int) -> None:
    """The queue of `stage` gives up after so many."""
    client = await app.backend.queues._client.opened()  # type: ignore[attr-defined] # of AwsBackend
    names = app.backend.queues._names  # type: ignore[attr-defined]
    url = (await client.get_queue_url(QueueName=names.queue(stage)))["QueueUrl"]
    answer = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["RedrivePolicy"])
    policy = {**json.loads(answer["Attributes"]["RedrivePolicy"]), "maxReceiveCount": receives}
    await client.set_queue_attributes(QueueUrl=url, Attributes={"RedrivePolicy": json.dumps(policy)})


# --------------------------------------------------------------------------- the command line

QUICK = """
from flowlane import Lane, Policy, Unit

lane = Lane("quick", policy=Policy(backoff="10ms", lease="2s"))

class Thing(Unit, key="n"):
    n: int

@lane.stage(on=lane.triggered)
async def find(event, ctx):
    for n in range(3):
        yield Thing(n=n)

@lane.stage(on=Thing, order="n")
async def load(event, ctx):
    pass
"""
MADE = [
    "w-log",
    "w-quick-find-dead",
    "w-quick-find",
    "w-quick-load-dead.fifo",
    "w-quick-load.fifo",
]


class Said:
    """What a call of the command line ended with."""

    def __init__(self, result: Result) -> None:
        self.code, self.out, self.error = result.exit_code, result.stdout, result.stderr

    @property
    def line(self) -> str:
        """The one line on stderr."""
        assert self.error.count("\n") == 1, self.error
        return self.error.strip()


Call = Callable[..., Awaitable[Said]]


@pytest.fixture
def call(tmp_path: Path, ministack: str, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command line, on another thread: this one serves the proxy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.py").write_text(QUICK)
    monkeypatch.setenv("FLOWLANE_BACKEND", BACKEND)

    async def flowlane(verb: str, *arguments: str, **environment: str) -> Said:
        runner = CliRunner()
        given = [verb, "quick.py", *arguments]
        result = await asyncio.to_thread(
            runner.invoke, cli, given, env=environment or None, prog_name="flowlane"
        )
        return Said(result)

    return flowlane


async def test_init_says_what_it_made_and_makes_nothing_twice(call: Call) -> None:
    made = await call("init", "--json")
    assert (made.code, json.loads(made.out)["made"]) == (0, MADE)
    again = await call("init", "--json")
    assert (again.code, json.loads(again.out)["made"]) == (0, [])
    shown = await call("init")
    assert shown.out.startswith("aws://w is ready for lane quick\nqueues: quick/find, quick/load\n")
    assert (await call("run")).code == 0


async def test_what_is_missing_is_said_in_one_line(call: Call, ministack: str) -> None:
    said = await call("run")
    assert said.code == 2
    assert "flowlane init LANE --backend aws://w" in said.line
    await call("init")
    async with open_client("sqs") as sqs:
        url = (await sqs.get_queue_url(QueueName="w-quick-load.fifo"))["QueueUrl"]
        await sqs.delete_queue(QueueUrl=url)
    said = await call("run")
    assert said.code == 2
    assert said.line.startswith("flowlane: there is no queue w-quick-load in us-east-1: `flowlane init LANE")
    again = await call("init", "--json")
    assert json.loads(again.out)["made"] == ["w-quick-load.fifo"]
    other = await call("run", AWS_REGION="eu-central-1", AWS_DEFAULT_REGION="eu-central-1")
    assert other.code == 2
    assert "eu-central-1" in other.line
    there = await call("run", "--backend", f"{BACKEND}?region=eu-central-1&table=t-log")
    assert "no table t-log" in there.line
    assert f"--backend '{BACKEND}?region=eu-central-1&table=t-log'` makes it" in there.line


@pytest.mark.parametrize(
    "asked",
    [
        *("sqs.ReceiveMessage", "sqs.SendMessageBatch", "sqs.GetQueueUrl"),
        *("dynamodb.PutItem", "dynamodb.TransactWriteItems", "dynamodb.BatchGetItem"),
    ],
)
async def test_what_is_not_allowed_is_said_in_one_line(call: Call, ministack: str, asked: str) -> None:
    await call("init")
    async with FaultProxy(ministack) as proxy:
        proxy.inject(asked, refused(403, "AccessDeniedException", "canary is not authorized"), times=-1)
        said = await call("run", AWS_ENDPOINT_URL=proxy.url)
    assert said.code == 2
    assert "not allowed (AccessDeniedException" in said.line
    assert "check the credentials and the role's policy" in said.line


@pytest.mark.parametrize(
    "asked", ["sqs.ReceiveMessage", "sqs.SendMessageBatch", "sqs.DeleteMessageBatch", "dynamodb.PutItem"]
)
async def test_an_expired_token_is_waited_out(call: Call, ministack: str, asked: str) -> None:
    await call("init")
    async with FaultProxy(ministack) as proxy:
        rule = proxy.inject(asked, refused(403, "ExpiredTokenException", "it has expired"), times=2)
        said = await call("run", AWS_ENDPOINT_URL=proxy.url)
        assert rule.fired == 2
    assert said.code == 0
