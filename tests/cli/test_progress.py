"""What is said while a run goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Cli = Callable[..., Result]
STEADY = """
import asyncio
from flowlane import Lane, Permanent, Unit
lane = Lane("steady")
class Found(Unit, key="n"):
    n: int
@lane.stage(on=lane.triggered)
async def find(event, ctx):
    for n in range(10):
        yield Found(n=n)
@lane.stage(on=Found, concurrency=1)
async def load(event, ctx):
    if event.data.n == 0:
        raise Permanent("zero")
    await asyncio.sleep(0.03)
"""


def test_a_pipe_gets_a_line_now_and_then_on_stderr(cli_in: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowlane.cli.progress._LINES_EVERY", 0.05)
    Path("steady.py").write_text(STEADY)
    result = cli_in("run", "steady.py")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines
    assert all(line.startswith("steady: load ") for line in lines)
    assert any("/10 units, 1 dead" in line for line in lines)


def test_a_program_gets_none(cli_in: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowlane.cli.progress._LINES_EVERY", 0.05)
    Path("steady.py").write_text(STEADY)
    assert cli_in("run", "steady.py", "--json").stderr == ""


def test_interrupted_elsewhere_is_130(cli_in: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flowlane.cli.setup.show_plugins", interrupt)
    result = cli_in("plugins")
    assert result.exit_code == 130
    assert result.stderr.strip() == "flowlane: interrupted"
