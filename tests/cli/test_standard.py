"""Standard streams that are closed, full, or read by nobody: no work and no word is lost for it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Cli = Callable[..., Result]
COMMAND = [sys.executable, "-m", "flowlane"]
VERBS = {
    "graph": ["graph", "toy.py"],
    "run": ["run", "toy.py"],
    "status": ["status", "toy.py"],
    "trace": ["trace", "toy.py"],
    "plan": ["plan", "toy.py"],
    "plugins": ["plugins"],
    "usage": ["run"],
    "help": ["--help"],
}
NOISY = """
from flowlane import Lane, Policy, Unit
lane = Lane("noisy", policy=Policy(retries=0))
print("x" * 100_000)
class Found(Unit, key="n"):
    n: int
@lane.stage(on=lane.triggered)
async def find(event, ctx):
    print("y" * 100_000, flush=True)
    for n in range(3):
        yield Found(n=n)
@lane.stage(on=Found)
async def load(event, ctx):
    print("z" * 100_000)
    open("done", "a").write("x")
"""


def shell(redirected: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command line with its streams `redirected` by a shell."""
    script = f'exec "$@" {redirected}'
    command = ["sh", "-c", script, "sh", *COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.usefixtures("cli_in")
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["people", "json"])
@pytest.mark.parametrize("verb", ["graph", "run", "usage"])
def test_closed_stdout(verb: str, more: list[str]) -> None:
    done = shell(">&-", [*VERBS[verb], *more])
    assert done.returncode == {"graph": 0, "run": 1, "usage": 2}[verb]
    assert done.stderr.count("\n") == (verb == "usage") + (verb == "run" and bool(more))
    assert "Error" not in done.stderr


@pytest.mark.usefixtures("cli_in")
def test_closed_stderr_is_not_stdout() -> None:
    done = shell("2>&-", ["run", "--json"])
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["kind"] == "usage"
    assert shell("2>&-", ["run"]).stdout == ""


@pytest.mark.usefixtures("cli_in")
def test_closed_stdin() -> None:
    done = shell("<&-", ["run", "toy.py", "--event", "-"])
    assert done.returncode == 2
    assert done.stderr.startswith("flowlane: --event stdin: is no JSON")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.usefixtures("cli_in")
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["people", "json"])
@pytest.mark.parametrize("verb", ["graph", "run", "usage"])
def test_full_stdout(verb: str, more: list[str]) -> None:
    done = shell(">/dev/full", [*VERBS[verb], *more])
    last = done.stderr.splitlines()[-1]
    if verb == "usage":
        assert (done.returncode, last) == (2, "flowlane: Missing argument 'LANE'; see `flowlane run --help`")
    else:
        assert done.returncode == 1
        assert last.startswith("flowlane: stdout takes no answer (No space left on device)")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def unread(arguments: list[str], *, stderr_too: bool = False) -> subprocess.CompletedProcess[bytes]:
    """The command line with a stdout (and stderr) whose reader has gone away."""
    reading, writing = os.pipe()
    os.close(reading)
    errors = writing if stderr_too else subprocess.PIPE
    try:
        return subprocess.run([*COMMAND, *arguments], stdout=writing, stderr=errors, timeout=60, check=False)
    finally:
        os.close(writing)


@pytest.mark.usefixtures("cli_in")
@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["plugins", "--json"]])
def test_an_unread_answer_is_no_failure(arguments: list[str]) -> None:
    done = unread(arguments)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.usefixtures("cli_in")
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["people", "json"])
@pytest.mark.parametrize("verb", ["usage", "run"])
def test_an_unread_error_keeps_its_code(verb: str, more: list[str]) -> None:
    assert unread([*VERBS[verb], *more], stderr_too=True).returncode == {"usage": 2, "run": 1}[verb]


@pytest.mark.usefixtures("cli_in")
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["people", "json"])
def test_a_lane_whose_words_nobody_reads_does_its_work(more: list[str]) -> None:
    Path("noisy.py").write_text(NOISY)
    assert unread(["run", "noisy.py", *more], stderr_too=True).returncode == 0
    assert Path("done").read_text() == "xxx"
