"""The command in a process of its own: signals, pipes, terminals, and the recipe against a server."""

import asyncio
import gzip
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from flowlane.testing.lying_server import LyingServer

pytestmark = pytest.mark.long

Cli = Callable[..., Result]
Process = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = [sys.executable, "-m", "flowlane"]
SLOW = """
import asyncio
from flowlane import Lane, Unit
lane = Lane("slow", every="1h")
class Found(Unit, key="n"):
    n: int
@lane.stage(on=lane.triggered)
async def find(event, ctx):
    for n in range(40):
        yield Found(n=n)
@lane.stage(on=Found, concurrency=1)
async def load(event, ctx):
    with open("begun", "a") as file:
        file.write("x")
    await asyncio.sleep(0.1)
"""


Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def started(cli_in: Cli) -> AsyncIterator[Start]:
    """Starts the command line in a process of its own, which does not outlive the test."""
    processes: list[asyncio.subprocess.Process] = []

    async def start(*arguments: str, **more: Any) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*COMMAND, *arguments, stdout=pipe, stderr=pipe, **more)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def begun(count: int, process: asyncio.subprocess.Process) -> None:
    """Return once `process` has begun that many units of the slow lane."""
    async with asyncio.timeout(60):
        while not Path("begun").exists() or Path("begun").stat().st_size < count:
            assert process.returncode is None, await process.communicate()
            await asyncio.sleep(0.02)


def test_run_as_a_process(process: Process) -> None:
    result = process("run", "toy.py", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["units"]["found"] == 4
    assert result.stderr == "the lane's own words\n"
    assert process("nope").returncode == 2


@pytest.mark.usefixtures("cli_in")
def test_the_console_script(process: Process) -> None:
    script = Path(sys.executable).with_name("flowlane")
    if not script.exists():
        pytest.skip("flowlane is not installed, only importable")
    done = subprocess.run([script, "plugins", "--json"], capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["plugins"]


def test_a_reader_that_goes_away_is_no_failure(process: Process) -> None:
    process("run", "toy.py")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [*COMMAND, "trace", "toy.py"]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_and_errors_import_nothing_heavy(process: Process) -> None:
    code = (
        "import sys\nfrom flowlane.cli.verbs import cli\n"
        "try:\n    cli.main(['plan', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "print([m for m in ('aiohttp', 'rich', 'flowlane.engine', 'sqlite3') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_pipe_does_not_import_rich(process: Process) -> None:
    code = (
        "import sys\nfrom flowlane.cli.verbs import cli\n"
        "try:\n    cli.main(['run', 'toy.py', '--backend', 'memory://'])\n"
        "except SystemExit:\n    pass\n"
        "print([m for m in sys.modules if m.partition('.')[0] == 'rich'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_interrupted_run_says_so_and_goes_on(started: Start, number: signal.Signals) -> None:
    held = """
    import os
    while os.path.getsize("begun") == 3 and not os.path.exists("told"):
        await asyncio.sleep(0.01)
"""
    Path("slow.py").write_text(SLOW.replace("    await asyncio.sleep(0.1)\n", held))
    run = await started("run", "slow.py", "--json")
    await begun(3, run)
    run.send_signal(number)
    Path("told").touch()
    out, _ = await asyncio.wait_for(run.communicate(), 60)
    assert run.returncode == 1
    report = json.loads(out)
    assert report["interrupted"] is True
    assert report["outcome"] == "failed"
    assert report["reason"] == "interrupted; run again to go on"
    assert 3 <= report["units"]["settled"] < report["units"]["found"] == 40
    again = await started("run", "slow.py", "--json")
    out, _ = await asyncio.wait_for(again.communicate(), 60)
    assert again.returncode == 0
    (drained,) = json.loads(out)["drained"]
    assert (drained["run"], drained["outcome"], drained["units"]["settled"]) == (report["run"], "settled", 40)
    assert Path("begun").stat().st_size == 40


@pytest.mark.parametrize("verb", ["run", "worker"])
async def test_a_third_signal_ends_what_a_handler_would_keep(started: Start, verb: str) -> None:
    stubborn = """
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            open("refused", "a").close()
"""
    Path("slow.py").write_text(SLOW.replace("    await asyncio.sleep(0.1)\n", stubborn))
    process = await started(verb, "slow.py")
    await begun(1, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        while not Path("refused").exists():
            assert process.returncode is None
            await asyncio.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == -signal.SIGTERM
    assert b"Traceback" not in out + err


LEFT = {
    "a task that swallows its cancellation": (
        "    async def stubborn():\n"
        "        while True:\n"
        "            try:\n"
        "                await asyncio.sleep(600)\n"
        "            except asyncio.CancelledError:\n"
        "                pass\n"
        "    LEFT.append(asyncio.create_task(stubborn()))\n"
    ),
    "a thread": "    LEFT.append(asyncio.ensure_future(asyncio.to_thread(time.sleep, 600)))\n",
}


@pytest.mark.parametrize("what", LEFT)
def test_what_a_handler_leaves_behind_does_not_keep_a_run_from_ending(process: Process, what: str) -> None:
    Path("left.py").write_text(
        "import asyncio, time\nfrom flowlane import Lane\nlane, LEFT = Lane('left'), []\n"
        "@lane.stage(on=lane.triggered)\nasync def find(event, ctx):\n" + LEFT[what]
    )
    result = process("run", "left.py", "--json")
    assert (result.returncode, json.loads(result.stdout)["outcome"]) == (0, "settled")
    assert process("status", "left.py", "--json").returncode == 0


async def test_a_handler_that_swallows_its_cancellation_is_left_behind_when_its_time_is_up(
    started: Start,
) -> None:
    stubborn = """
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass
"""
    Path("slow.py").write_text(SLOW.replace("    await asyncio.sleep(0.1)\n", stubborn))
    process = await started("run", "slow.py", "--json")
    await begun(1, process)
    process.send_signal(signal.SIGTERM)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert json.loads(out)["interrupted"]
    assert b"Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_worker_serves_until_it_is_told(started: Start, number: signal.Signals) -> None:
    Path("slow.py").write_text(SLOW)
    worker = await started("worker", "slow.py", "toy.py")
    assert worker.stdout is not None
    lines = [(await worker.stdout.readline()).decode() for _ in range(2)]
    backend = "sqlite:///.flowlane/flowlane.db"
    assert lines == [
        f"serving slow (every 1h; stages find, load) on {backend}\n",
        f"serving toy (every 5m; stages find, load, tell) on {backend}\n",
    ]
    await begun(3, worker)
    worker.send_signal(number)
    out, _ = await asyncio.wait_for(worker.communicate(), 60)
    assert worker.returncode == 0
    assert set(out.splitlines()) <= {b"the lane's own words"}  # twice, should the next five minutes begin


async def test_a_worker_of_one_stage_leaves_the_others_alone(started: Start) -> None:
    Path("slow.py").write_text(SLOW)
    first = await started("worker", "slow.py", "--json", env={**os.environ, "FLOWLANE_STAGE": "find"})
    assert first.stdout is not None
    served = json.loads(await first.stdout.readline())
    assert served["lanes"] == [{"lane": "slow", "every": "1h", "stages": ["find"]}]
    units = 0
    async with asyncio.timeout(120):
        while units < 40:
            look = await started("status", "slow.py", "--json")
            units = json.loads((await look.communicate())[0])["open"]
    first.terminate()
    out, err = await asyncio.wait_for(first.communicate(), 60)
    assert (first.returncode, out, err) == (0, b"", b"")
    assert not Path("begun").exists()


@pytest.mark.usefixtures("cli_in")
def test_a_terminal_gets_bars_and_tables() -> None:
    Path("slow.py").write_text(SLOW.replace("range(40)", "range(8)"))
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="120")
        os.execv(sys.executable, [*COMMAND, "run", "slow.py"])
    printed = b""
    while True:
        try:
            block = os.read(terminal, 65536)
        except OSError:
            break
        if not block:
            break
        printed += block
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    text = printed.decode()
    assert "/8 units" in text
    assert "━" in text
    assert "─" in text


ARCHIVE = """
from pathlib import Path
from flowlane import Policy
from flowlane.recipes import http_archive
lane = http_archive(
    "gh", url="{url}/{{t:%Y-%m-%d}}-{{t.hour}}.json.gz", start="2024-01-01T00", until="2024-01-01T06",
    to=(Path(__file__).parent / "lake").as_uri() + "/", policy=Policy(retries=1, backoff="10ms"),
)
"""


async def test_the_archive_recipe(started: Start) -> None:
    environment = {**os.environ, "FLOWLANE_ALLOW_PRIVATE_HOSTS": "1"}
    data = gzip.compress(b"".join(b'{"id": %d}\n' % n for n in range(500)))
    cut = data[: len(data) // 2]
    async with LyingServer() as server:
        for hour in (0, 1, 3, 5):
            server.serve(f"/2024-01-01-{hour}.json.gz", cut if hour == 3 else data)
        Path("gh.py").write_text(ARCHIVE.format(url=server.url("").rstrip("/")))

        async def flowlane(*arguments: str) -> tuple[int | None, str]:
            process = await started(*arguments, env=environment)
            out, err = await asyncio.wait_for(process.communicate(), 60)
            assert [line for line in err.splitlines() if not line.startswith(b"gh: land ")] == []
            return process.returncode, out.decode()

        code, out = await flowlane("plan", "gh.py", "--json")
        assert (code, json.loads(out)["units"], json.loads(out)["bytes"]) == (0, 4, 3 * len(data) + len(cut))
        code, out = await flowlane("run", "gh.py", "--json")
        report = json.loads(out)
        assert (code, report["outcome"]) == (1, "failed")
        assert report["units"]["found"] == 4
        assert [dead["unit"] for dead in report["dead"]] == ["gh/hour/2024-01-01T03:00:00Z"]
        code, out = await flowlane("status", "gh.py")
        assert code == 0
        assert "2024-01-01 ██·x·█" in out.splitlines()
        assert "missing 2024-01-01T02:00:00Z: a permanent gap" in out.splitlines()
        code, out = await flowlane("status", "gh.py", "--json")
        hours = json.loads(out)["views"]["hours"]
        assert hours["covered"] == 3
        assert list(hours["dead"]) == ["2024-01-01T03:00:00Z"]
        server.serve("/2024-01-01-3.json.gz", data)
        await flowlane("redrive", "gh.py")
        code, out = await flowlane("run", "gh.py")
        assert code == 0
        assert "2024-01-01 ██·█·█" in (await flowlane("status", "gh.py"))[1].splitlines()
    assert len(list(Path("lake").glob("*.gz"))) == 4
