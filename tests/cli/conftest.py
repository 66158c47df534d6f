"""A toy lane, and the command line in this process and in one of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flowlane.cli.verbs import cli

TOY = """
from collections.abc import AsyncIterator
from flowlane import Context, Event, Lane, Permanent, Policy, Unit

lane = Lane("toy", every="5m", policy=Policy(retries=1, backoff="10ms"))
other = Lane("other")


class Found(Unit, key="n"):
    n: int
    url: str = ""
    size: int = -1


@lane.stage(on=lane.triggered)
async def find(event: Event, ctx: Context) -> AsyncIterator[Found]:
    print("the lane's own words")
    for n in range(3):
        yield Found(n=n, url=f"file:///in/{n}", size=1000 * n)
    yield Found(n=3)


@lane.stage(on=Found, concurrency=2)
async def load(event: Event, ctx: Context) -> None:
    from pathlib import Path
    if event.data.n == 2 and not Path("mended").exists():
        raise Permanent("two is \\x1b[31mbad[/red]\\nand ugly")
    if event.data.n == 3:
        ctx.skip("three is dull")


@lane.stage(on=lane.completed)
async def tell(event: Event, ctx: Context) -> None:
    pass
"""

Cli = Callable[..., Result]


@pytest.fixture
def cli_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line in this process, in a directory of its own that holds ``toy.py``."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FLOWLANE_")]:
        monkeypatch.delenv(name)
    (tmp_path / "toy.py").write_text(TOY)

    def call(*arguments: str, stdin: str | bytes | None = None, env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(cli, arguments, input=stdin, env=env, prog_name="flowlane")

    return call


@pytest.fixture
def document(cli_in: Cli) -> Callable[..., Any]:
    """The one JSON document that a verb prints with ``--json``."""

    def call(*arguments: str, code: int = 0, **more: Any) -> Any:
        result = cli_in(*arguments, "--json", **more)
        assert result.exit_code == code, result.output
        assert result.stdout.count("\n") == 1
        assert result.stdout.isascii()
        return json.loads(result.stdout)

    return call


@pytest.fixture
def process(cli_in: Cli) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in a process of its own."""

    def call(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flowlane", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)

    return call
