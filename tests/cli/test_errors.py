"""Bad input: one line that says what, where and what to do; exit 2; nothing lost, no traceback."""

import json
import sqlite3
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Cli = Callable[..., Result]
ARCHIVE = "from flowlane.recipes import http_archive\nlane = http_archive('a', start='2024-01-01T00', {})\n"
HTTP = "to='file:///tmp/lake/', url='http://h/{}'"
FILES = {
    "raises.py": "import os\nraise RuntimeError('boom\\nand \\x1b[31mred')\n",
    "nolane.py": "x = 1\n",
    "renamed.py": "from flowlane import Lane\nmine = Lane('mine')\n",
    "syntax.py": "def (\n",
    "exits.py": "import sys\nsys.exit(0)\n",
    "nostage.py": "from flowlane import Lane\nlane = Lane('nostage')\n",
    "badname.py": "from flowlane import Lane\nlane = Lane('Bad Name')\n",
    "template.py": ARCHIVE.format(HTTP.format("{t:%Y}{nope}")),
    "fixed.py": ARCHIVE.format(HTTP.format("same.gz")),
    "broken.json": "{nope",
    "list.json": "[1]",
    "anonymous.json": '{"specversion": "1.0", "source": "s", "type": "t"}',
    "long.json": json.dumps({"x": "y" * (256 * 1024)}),
    "nearly.json": json.dumps({"x": "y" * (256 * 1024 - 100)}),
    "deep.json": "[" * 100_000,
    "corrupt.db": "this is no database, and never was one" * 100,
}
BAD = {
    "unknown verb": (["rnu", "toy.py"], "there is no verb 'rnu': did you mean run?"),
    "unknown verb, far off": (["frobnicate"], "there is no verb 'frobnicate': there are dead, graph"),
    "unknown option": (["run", "toy.py", "--nope"], "No such option '--nope'"),
    "no lane given": (["run"], "Missing argument 'LANE'; see `flowlane run --help`"),
    "option out of range": (["status", "toy.py", "--days", "0"], "'--days': 0 is not in the range"),
    "option far out of range": (["status", "toy.py", "--runs", "9" * 30], "is not in the range 1<=x<="),
    "lane file of another kind": (["run", "broken.json"], "broken.json is no lane file: its name must end"),
    "lane file missing": (["run", "missing.py"], "there is no lane file missing.py"),
    "module missing": (["run", "no_such_module"], "No module named 'no_such_module'"),
    "lane file raises": (
        ["run", "raises.py"],
        r"raises.py, line 2 raised RuntimeError: boom and \x1b[31mred",
    ),
    "no lane in it": (["run", "nolane.py"], "nolane.py has no lane called 'lane': define"),
    "lane of another name": (["run", "renamed.py"], "it has mine: write renamed.py:mine"),
    "syntax error": (["run", "syntax.py"], "syntax.py, line 1 raised SyntaxError"),
    "lane file exits": (["run", "exits.py"], "exits.py, line 2 ended the process"),
    "lane without a stage": (["run", "nostage.py"], "has no stage on lane.triggered"),
    "lane name": (["run", "badname.py"], "badname.py, line 2: lane name 'Bad Name'"),
    "unparsable template": (
        ["run", "template.py"],
        "template.py, line 2: url='http://h/{t:%Y}{nope}' cannot",
    ),
    "template without time": (["run", "fixed.py"], "is the same for every period"),
    "unknown scheme": (["run", "toy.py", "--backend", "foo://x"], "'foo://x' has scheme 'foo': as backend"),
    "no scheme": (["run", "toy.py", "--backend", "x.db"], "'x.db' has no scheme"),
    "unknown URI option": (
        ["run", "toy.py", "--backend", "sqlite:///x.db?nope=1"],
        "unknown option 'nope'; known: busy_timeout, hold, synchronous",
    ),
    "unwritable backend": (["run", "toy.py", "--backend", "sqlite:////proc/x/y.db"], "/proc/x/y.db"),
    "corrupt database": (
        ["run", "toy.py", "--backend", "sqlite:///corrupt.db"],
        "corrupt.db: is not a database",
    ),
    "newer database": (["run", "toy.py", "--backend", "sqlite:///newer.db"], "newer.db: has schema 99"),
    "event missing": (["run", "toy.py", "--event", "no.json"], "--event no.json: cannot be read"),
    "event is a folder": (["run", "toy.py", "--event", "."], "--event .: cannot be read"),
    "event no JSON": (["run", "toy.py", "--event", "broken.json"], "--event broken.json: is no JSON"),
    "event no object": (["run", "toy.py", "--event", "list.json"], "is JSON, but no object"),
    "event nested": (["run", "toy.py", "--event", "deep.json"], "is no JSON"),
    "event without id": (["run", "toy.py", "--event", "anonymous.json"], "CloudEvent without 'id'"),
    "event too long": (["run", "toy.py", "--event", "long.json"], "more than 262,144 bytes"),
    "event too long with envelope": (["run", "toy.py", "--event", "nearly.json"], "more than 262,144 bytes"),
    "no such run": (["trace", "toy.py", "nope"], "lane toy has no run nope"),
    "not dead": (["redrive", "toy.py", "nope"], "toy/nope is not a dead unit of lane toy"),
    "two lanes of one name": (["worker", "toy.py", "toy.py"], "two lanes are called 'toy'"),
}


@pytest.fixture
def files(cli_in: Cli) -> None:
    for name, text in FILES.items():
        Path(name).write_text(text)
    cli_in("init", "toy.py", "--backend", "sqlite:///newer.db")
    with sqlite3.connect("newer.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(cli_in: Cli, name: str) -> None:
    arguments, expected = BAD[name]
    result = cli_in(*arguments)
    assert expected in result.stderr
    assert result.exit_code == 2
    assert result.stderr.startswith("flowlane: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert "\x1b" not in result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_with_json_is_one_document_too(document: Callable[..., Any], name: str) -> None:
    arguments, expected = BAD[name]
    error = document(*arguments, code=2)["error"]
    assert expected in error["message"]
    assert error["kind"] in ("usage", "config")


@pytest.mark.parametrize("name", ["FLOWLANE_LOG_LEVEL", "FLOWLANE_ALLOW_PRIVATE_HOSTS"])
def test_a_variable_that_means_nothing(cli_in: Cli, name: str) -> None:
    result = cli_in("status", "toy.py", env={name: "loud"})
    assert result.exit_code == 2
    assert result.stderr.startswith(f"flowlane: {name}='loud': must be ")


def test_a_stage_that_no_lane_has(cli_in: Cli) -> None:
    result = cli_in("worker", "toy.py", env={"FLOWLANE_STAGE": "lod"})
    assert result.exit_code == 2
    assert "FLOWLANE_STAGE='lod'" in result.stderr


def test_a_plugin_that_fails_to_load(cli_in: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_plugin.module", "flowlane")
    monkeypatch.setattr("flowlane.plugins.entry_points", lambda group: [broken])
    for arguments in (["plugins"], ["run", "toy.py"]):
        result = cli_in(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("flowlane: plugin 'broken' (no_such_plugin.module) failed to load")
        assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("arguments", [["--debug", "run", "raises.py"], ["run", "raises.py", "--debug"]])
def test_debug_shows_the_traceback(cli_in: Cli, arguments: list[str]) -> None:
    result = cli_in(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("flowlane: raises.py, line 2")


RAISING = """
from flowlane import Lane, Policy

lane = Lane("raising", policy=Policy(retries=0))

def parse(text):
    return float(text)

@lane.stage(on=lane.triggered)
async def find(event, ctx):
    parse("x")
"""


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_what_stages_raise(cli_in: Cli, debug: bool) -> None:
    Path("raising.py").write_text(RAISING)
    result = cli_in("run", "raising.py", *(["--debug"] if debug else []))
    assert result.exit_code == 1
    assert (
        "ValueError: could not convert string to float: 'x' (raising.py, line 7, in parse)" in result.output
    )
    assert ("Traceback" in result.stderr) == debug
    assert ("return float(text)" in result.stderr) == debug


def test_a_defect_is_one_line_too(cli_in: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowlane.cli.setup.show_plugins", lambda: 1 / 0)
    result = cli_in("plugins")
    assert result.exit_code == 1
    assert result.stderr == "flowlane: ZeroDivisionError: division by zero (--debug shows the traceback)\n"


def test_a_renamed_stage_does_not_hang_the_next_run(cli_in: Cli) -> None:
    cli_in("run", "toy.py")
    cli_in("redrive", "toy.py")
    toy = Path("toy.py")
    toy.write_text(toy.read_text().replace("async def load", "async def load_all"))
    result = cli_in("run", "toy.py")
    assert result.exit_code == 1
    assert "toy/found/2 is owed to stage 'load', which lane toy no longer has" in result.stdout
    assert "interrupted" not in result.stdout
    swept = cli_in("sweep", "toy.py")
    assert "1 owed to load, which is no stage" in swept.stdout
    toy.write_text(toy.read_text().replace("async def load_all", "async def load"))
    Path("mended").touch()
    assert cli_in("run", "toy.py").exit_code == 0


def test_discovery_that_dies_is_exit_1_with_the_reason(cli_in: Cli) -> None:
    Path("lost.py").write_text(
        "from flowlane import Policy\n"
        + ARCHIVE.format(HTTP.format("{t:%Y%m%d%H}") + ", policy=Policy(retries=0)")
        .replace("http://h/", "http://no-such-host.invalid/")
        .replace("start=", "until='2024-01-01T02', start=")
    )
    result = cli_in("run", "lost.py")
    assert result.exit_code == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith("failed: discovery died: ")
    assert "no-such-host.invalid" in last
    planned = cli_in("plan", "lost.py")
    assert planned.exit_code == 1
    assert "no-such-host.invalid" in planned.stderr
    assert planned.stderr.count("\n") == 1


def test_an_unwritable_target_is_a_dead_unit_with_its_reason(cli_in: Cli) -> None:
    Path("in.txt").write_text("x")
    Path("blocked").write_text("a file where a folder should be")
    Path("copy.py").write_text(
        "from flowlane import Lane, Unit\n"
        "lane = Lane('copy')\n"
        "class Found(Unit, key='url'):\n    url: str\n"
        "@lane.stage(on=lane.triggered)\n"
        f"async def find(event, ctx):\n    yield Found(url={Path('in.txt').absolute().as_uri()!r})\n"
        "@lane.stage(on=Found)\n"
        "async def land(event, ctx):\n"
        f"    await ctx.copy(event.data.url, to={(Path('blocked').absolute() / 'out.txt').as_uri()!r})\n"
    )
    result = cli_in("run", "copy.py")
    assert result.exit_code == 1
    assert "blocked/out.txt" in result.stdout
    assert Path("blocked").read_text() == "a file where a folder should be"


@pytest.mark.parametrize("end", ["import sys; sys.exit(5)", "raise SystemExit(5)"])
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_code_that_ends_the_process_is_one_line_and_exit_1(
    cli_in: Cli, document: Callable[..., Any], end: str, verb: str
) -> None:
    toy = Path("toy.py")
    toy.write_text(toy.read_text().replace('print("the lane\'s own words")', end))
    result = cli_in(verb, "toy.py", "--backend", "memory://")
    assert result.exit_code == 1
    said = "called sys.exit(5) in the middle of its work: raise Permanent(...) there"
    found = document(verb, "toy.py", "--backend", "memory://", code=1)
    if verb == "run":  # the discovery's own end, as if it had raised that
        assert f"discovery died: the stage {said}" in result.stdout
        assert f"the stage {said}" in found["reason"]
    else:
        assert result.stderr.startswith(f"flowlane: the lane's code {said}")
        assert result.stderr.count("\n") == 1
        assert said in found["error"]["message"]


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("raise BrokenPipeError('the other side hung up')", 1, "BrokenPipeError: the other side hung up"),
        ("raise EOFError('too early')", 1, "RuntimeError: EOFError: too early (--debug shows the traceback)"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_an_error_that_click_takes_for_another(
    cli_in: Cli, monkeypatch: pytest.MonkeyPatch, end: str, code: int, said: str
) -> None:
    async def show_plugins() -> None:
        exec(end)

    monkeypatch.setattr("flowlane.cli.setup.show_plugins", show_plugins)
    result = cli_in("plugins")
    assert (result.exit_code, result.stderr) == (code, f"flowlane: {said}\n")
