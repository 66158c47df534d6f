"""``awslambdaric``, which is what AWS runs, really running the handler in a process of its own."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowlane.testing.lying_server import LyingServer
from tests.aws_lambda.runtime_api import FunctionError, RuntimeApi
from tests.aws_lambda.test_corpus import BATCHES
from tests.aws_lambda.toys import failed, kinesis, order, sqs

pytest.importorskip("awslambdaric", reason="awslambdaric is not installed (it has wheels for Linux only)")

HANDLER = "flowlane.aws_lambda.handler"

# Each handled unit is a line in units.jsonl: who handled it, where, and with which client. While there is a
# file `held`, its first step does not end.
LANE = """
import asyncio, json, os
from flowlane import Context, Lane, Policy, Unit

lane = Lane("toy", policy=Policy(lease="{lease}"))
client = None


class Client:
    def __init__(self):
        self.lock = asyncio.Lock()  # waiting on it binds it to a loop, as a client's sockets would be

    async def get(self):
        async with self.lock:
            await asyncio.sleep(0)


class Thing(Unit, key=("order", "n")):
    order: str
    n: int
    steps: int = 1
    seconds: float = 0.0


@lane.stage(on=lane.triggered)
async def find(event, ctx: Context):
    data = event.data.event["data"]
    for n in range(data["things"]):
        steps, seconds = data.get("steps", 1), data.get("seconds", 0.0)
        yield Thing(order=event.data.event["id"], n=n, steps=steps, seconds=seconds)


@lane.stage(on=Thing)
async def load(event, ctx: Context):
    global client
    client = client or Client()
    await client.get()
    for n in range(event.data.steps):
        await ctx.step(f"s{n}", work, event.data.order, event.data.n, n, event.data.seconds)


async def work(order, n, step, seconds):
    await asyncio.sleep(seconds)
    who = [os.getpid(), id(asyncio.get_running_loop()), id(client)]
    with open("units.jsonl", "a") as file:
        print(json.dumps([order, n, step, *who]), file=file)
    while step == 0 and os.path.exists("held"):
        await asyncio.sleep(0.01)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "orders.py").write_text(LANE.replace("{lease}", "30s"))
    return tmp_path


def environment(folder: Path, backend: str = "sqlite:///flowlane.db") -> dict[str, str]:
    return {"FLOWLANE_LANE": "orders.py", "FLOWLANE_BACKEND": backend}


def units(folder: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / "units.jsonl").read_text().splitlines()]


def test_the_events_of_the_corpus(corpus: Callable[[str], Any], folder: Path) -> None:
    with RuntimeApi(HANDLER, folder, environment(folder)) as function:
        for name, expected in BATCHES.items():
            assert failed(function.invoke(corpus(name))) == expected, name
        with pytest.raises(FunctionError, match="transformation is not served") as caught:
            function.invoke(corpus("powertools/kinesisFirehosePutEvent.json"))
        assert caught.value.type == "Permanent"
        reasons = [
            json.loads(line[line.index("{") :]) for line in function.log.splitlines() if "reason" in line
        ]
    assert {line["message"] for line in reasons} >= {name for names in BATCHES.values() for name in names}


@pytest.mark.parametrize("backend", ["memory://", "sqlite:///flowlane.db"])
def test_a_hundred_invocations_share_one_loop_and_one_client(folder: Path, backend: str) -> None:
    with RuntimeApi(HANDLER, folder, environment(folder, backend)) as function:
        for n in range(100):
            batch = (sqs, kinesis)[n % 2](order(f"{n}a", 2), order(f"{n}b", 2))
            assert function.invoke(batch) == {"batchItemFailures": []}
    lines = units(folder)
    assert len(lines) == 400
    assert len({tuple(line[3:]) for line in lines}) == 1, "one process, one loop, one client"


def test_an_error_is_told_in_one_line_and_its_way_only_if_that_is_asked_for(folder: Path) -> None:
    for level, lines in (("warning", False), ("debug", True)):
        with RuntimeApi(HANDLER, folder, {**environment(folder), "FLOWLANE_LOG_LEVEL": level}) as function:
            with pytest.raises(FunctionError, match="no CloudEvent"):
                function.invoke({"hello": 1})
            assert ("wanted.py" in function.log) is lines
            assert "Permanent: an object that is no CloudEvent" in function.log


def test_good_and_bad_messages(folder: Path) -> None:
    mixed = [order("a", 2), "Test message.", order("b"), {"message": "foo1"}, order("c")]
    with RuntimeApi(HANDLER, folder, environment(folder)) as function:
        assert failed(function.invoke(sqs(*mixed))) == ["m1", "m3"]
        assert failed(function.invoke(sqs(*mixed, groups="ghhgg"))) == ["m1", "m2", "m3", "m4"]
        assert failed(function.invoke(kinesis(*mixed))) == ["100"]
        assert function.invoke(sqs()) == {"batchItemFailures": []}
        assert [function.invoke(order(name))["dead"] for name in "abc"] == [[], [], []]
    assert sorted(line[:2] for line in units(folder)) == [["a", 0], ["a", 1], ["b", 0], ["c", 0]]


def test_a_short_invocation_stops_at_a_safe_point_and_the_next_one_goes_on(folder: Path) -> None:
    """Two seconds into an invocation of a minute, that is; the rest is for reaching the safe point."""
    event = sqs(order("a", 1, steps=30, seconds=0.1))
    (folder / "brief.py").write_text(
        "from flowlane.aws_lambda import handler_for\nfrom orders import lane\n"
        "handler = handler_for(lane, margin='58s')\n"
    )
    with RuntimeApi("brief.handler", folder, environment(folder)) as function:
        function.invoke(order("warm", 0), seconds=120)  # a cold start may take any time on a busy machine
        while not (folder / "units.jsonl").exists():  # and so may what comes before the first step
            assert failed(function.invoke(event, seconds=60)) == ["m0"]
        before = len(units(folder))
        assert 0 < before < 30
        assert failed(function.invoke(event, seconds=120)) == []
    assert [line[2] for line in units(folder)] == list(range(30)), "no step is repeated, none is left out"


def test_a_sandbox_that_dies_is_taken_over_from(folder: Path) -> None:
    event = sqs(order("a", 1, steps=10, seconds=0.1))
    (folder / "orders.py").write_text(LANE.replace("{lease}", "2s"))
    (folder / "held").touch()
    with RuntimeApi(HANDLER, folder, environment(folder)) as function:
        answer: list[Any] = []

        async def killed() -> None:
            invoking = asyncio.to_thread(function.invoke, event)
            task = asyncio.create_task(invoking)
            async with asyncio.timeout(60):
                while not (folder / "units.jsonl").exists():  # noqa: ASYNC110  # another process makes it
                    await asyncio.sleep(0.01)
            function.kill()
            with pytest.raises(FunctionError):
                answer.append(await task)

        asyncio.run(killed())
    (folder / "held").unlink()
    with RuntimeApi(HANDLER, folder, environment(folder)) as function:
        assert failed(function.invoke(event)) == []
    steps = [line[2] for line in units(folder)]
    assert sorted(set(steps)) == list(range(10))
    assert len(steps) <= 11, "at most the step in flight is done again"


def test_a_wrong_configuration_is_one_line_and_tried_again(folder: Path) -> None:
    with RuntimeApi(HANDLER, folder, {**environment(folder), "FLOWLANE_LANE": "later.py"}) as function:
        with pytest.raises(FunctionError, match=r"there is no lane file later\.py") as caught:
            function.invoke(sqs(order("a")))
        assert caught.value.type == "ConfigError"
        (folder / "later.py").write_text((folder / "orders.py").read_text())
        assert failed(function.invoke(sqs(order("a")))) == []


def test_handler_for_in_the_file_of_a_lane(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from flowlane.aws_lambda import handler_for\nfrom orders import lane\nhandler = handler_for(lane)\n"
    )
    with RuntimeApi("mine.handler", folder, {"FLOWLANE_BACKEND": "memory://"}) as function:
        report = function.invoke(order("a", 3))
    assert (report["outcome"], report["units"]["settled"]) == ("settled", 3)


async def test_http_archive_lands_files(tmp_path: Path) -> None:
    async with LyingServer() as server:
        bodies = {hour: gzip.compress(f"archive of hour {hour}\n".encode() * 1000) for hour in range(4)}
        for hour, body in bodies.items():
            if hour != 2:
                server.serve(f"/2024-01-01-{hour}.json.gz", body)
        (tmp_path / "archive.py").write_text(
            "from flowlane.recipes import http_archive\n"
            f"lane = http_archive('archive', url={server.url('/{t:%Y-%m-%d}-{t.hour}.json.gz')!r},\n"
            f"    start='2024-01-01T00', until='2024-01-01T04', to={(tmp_path / 'lake').as_uri()!r})\n"
        )
        variables = {
            "FLOWLANE_LANE": "archive.py",
            "FLOWLANE_BACKEND": "sqlite:///flowlane.db",
            "FLOWLANE_ALLOW_PRIVATE_HOSTS": "1",
        }
        tick = {"detail-type": "Scheduled Event", "source": "aws.scheduler", "detail": "{}"}
        with RuntimeApi(HANDLER, tmp_path, variables) as function:
            first = await asyncio.to_thread(function.invoke, {**tick, "time": "2024-01-01T05:00:00Z"})
            fetched = sum(request.method == "GET" for request in server.requests)
            second = await asyncio.to_thread(function.invoke, sqs({**tick, "time": "2024-01-01T06:00:00Z"}))
        assert sum(request.method == "GET" for request in server.requests) == fetched == 3
    assert (first["outcome"], first["units"]["settled"]) == ("settled", 3)
    assert failed(second) == []
    landed = {path.name: path.read_bytes() for path in (tmp_path / "lake").iterdir() if path.is_file()}
    assert landed == {f"2024-01-01-{hour}.json.gz": body for hour, body in bodies.items() if hour != 2}
