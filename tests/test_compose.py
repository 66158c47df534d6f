"""The composition root: lanes by reference, and everything that is opened is closed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flowlane import ConfigError, Lane
from flowlane.clock import SystemClock
from flowlane.compose import load_lane, open_application
from flowlane.errors import PluginError
from flowlane.hookspecs import Provides, hookimpl
from flowlane.plugins import Registry
from flowlane.ports import Environment
from flowlane.settings import Settings
from flowlane.worker import run_once

GOOD = """
from flowlane import Lane
lane = Lane("good")
@lane.stage(on=lane.triggered)
async def find(event, ctx): ...
other = Lane("other")
other.stage(on=other.triggered)(find)
"""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    before, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path, "a reference leaves sys.path as it was"
    for name in set(sys.modules) - before:
        if name.startswith(("flowlane_lane_", "lanes_of_", "helper_of_")):
            del sys.modules[name]


def write(folder: Path, code: str, name: str = "a_lane.py") -> Path:
    file = folder / name
    file.write_text(textwrap.dedent(code))
    return file


# --------------------------------------------------------------------------- references


@pytest.mark.parametrize(
    ("suffix", "name"), [("", "good"), (":lane", "good"), (":other", "other"), (":", "good")]
)
def test_a_lane_is_found_by_its_file(tmp_path: Path, suffix: str, name: str) -> None:
    assert load_lane(f"{write(tmp_path, GOOD)}{suffix}").name == name


@pytest.mark.parametrize(("suffix", "name"), [("", "good"), (":other", "other")])
def test_a_lane_is_found_by_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, name: str
) -> None:
    write(tmp_path, GOOD, "lanes_of_mine.py")
    monkeypatch.chdir(tmp_path)
    assert load_lane(f"lanes_of_mine{suffix}").name == name


def test_a_relative_path_is_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lanes").mkdir()
    write(tmp_path / "lanes", GOOD)
    monkeypatch.chdir(tmp_path)
    assert load_lane("lanes/a_lane.py").name == "good"
    monkeypatch.chdir(tmp_path / "lanes")
    assert load_lane("a_lane.py").name == "good"


def test_a_lane_file_may_import_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "NAME = 'neighbour'", "helper_of_mine.py")
    code = GOOD.replace('Lane("good")', "Lane(helper_of_mine.NAME)")
    assert load_lane(str(write(tmp_path, "import helper_of_mine\n" + code))).name == "neighbour"


def test_two_files_of_one_name_are_two_lanes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, GOOD.replace('"good"', f'"{name}"'))
    assert [load_lane(f"{tmp_path}/{name}/a_lane.py").name for name in ("one", "two")] == ["one", "two"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "a_lane.py has no lane called 'lane': define lane = Lane(...) there"),
        ("lane = 'text'", "has no lane called 'lane'"),
        (GOOD.replace("lane = ", "mine = lane = ").replace("lane =", "x =", 0) + "del lane", "it has mine"),
        ("from flowlane import Lane\nlane = Lane('x')", "lane x has no stage on lane.triggered"),
        ("x = 1\n1 / 0", "a_lane.py, line 2 raised ZeroDivisionError: division by zero"),
        ("def f():\n    raise KeyError('k')\nx = 1\nf()", "a_lane.py, line 2 raised KeyError: 'k'"),
        ("x = (", "a_lane.py, line 1 raised SyntaxError"),
        ("  x = 1\n y = 2", "raised IndentationError"),
        ("import not_a_module_at_all", "a_lane.py, line 1 raised ModuleNotFoundError: No module named"),
        ("raise ValueError('one\\ntwo')", "line 1 raised ValueError: one two"),
        ("raise Exception", "a_lane.py, line 1 raised Exception"),
        ("x = 1\nraise BaseException('odd')", "a_lane.py, line 2 raised BaseException: odd"),
        ("x = 1\nraise SystemExit('bye')", "a_lane.py, line 2 ended the process while it was loaded: take"),
        ("from flowlane import Lane\n\nlane = Lane('No Name')", "a_lane.py, line 3: lane name 'No Name'"),
        ("from flowlane.recipes import http_archive\nlane = http_archive('x')", "line 2 raised TypeError"),
        ("x = '\0'", "raised"),
    ],
)
def test_a_bad_lane_file_is_refused_in_one_line(tmp_path: Path, code: str, said: str) -> None:
    file = tmp_path / "a_lane.py"
    file.write_text(code)
    with pytest.raises(ConfigError) as caught:
        load_lane(str(file))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "a_lane" in str(caught.value) or "lane x" in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a_lane.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"a_lane\.py.* raised SyntaxError"):
        load_lane(str(tmp_path / "a_lane.py"))


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("nowhere.py", "there is no lane file nowhere.py: give path/to/file.py[:name]"),
        ("no/such/file.py:lane", "there is no lane file no/such/file.py"),
        ("no/such/thing", "there is no lane file no/such/thing"),
        ("tests", "has no lane called 'lane'"),
        ("not_a_module_at_all", "importing not_a_module_at_all raised ModuleNotFoundError"),
        ("json:lane", "json has no lane called 'lane'"),
        ("", "names no lane"),
        (":", "names no lane"),
        (":lane", "names no lane"),
        ("a..b", "importing a..b raised"),
        (".", "'.' names no lane: give path/to/file.py[:name]"),
        ("..:lane", "names no lane"),
        ("tests/conftest", "there is no lane file tests/conftest"),
        ("Makefile", "Makefile is no lane file: its name must end in .py"),
        ("./Makefile:lane", "Makefile is no lane file: its name must end in .py"),
    ],
)
def test_a_bad_reference_is_refused_in_one_line(reference: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_lane(reference)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_exits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "raise SystemExit", "lanes_that_exit.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="lanes_that_exit ended the process while it was loaded"):
        load_lane("lanes_that_exit")


def test_what_the_user_interrupts_is_no_bad_lane_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_lane(str(write(tmp_path, "raise KeyboardInterrupt")))


def test_a_module_that_fails_to_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "1 / 0", "lanes_of_bad.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match="importing lanes_of_bad raised ZeroDivisionError: division by zero"
    ):
        load_lane("lanes_of_bad")


def test_the_examples_are_lanes() -> None:
    examples = Path(__file__).parents[1] / "examples"
    assert load_lane(str(examples / "gharchive.py")).name == "gharchive"


# --------------------------------------------------------------------------- opening and closing

LOG: list[str] = []


@asynccontextmanager
async def _opening(uri: str, environment: Environment) -> AsyncIterator[Any]:
    LOG.append(f"open {uri}")
    try:
        yield object()
    finally:
        LOG.append(f"close {uri}")


@asynccontextmanager
async def open_mine(uri: str, environment: Environment) -> AsyncIterator[Any]:
    async with _opening(uri, environment) as opened:
        yield opened


def registry() -> Registry:
    made = ModuleType("a_plugin")

    @hookimpl
    def flowlane_provides() -> Sequence[Provides]:
        kinds: tuple[Any, ...] = ("backend", "store", "source", "sink", "secrets")
        return [Provides(kind, f"my{kind}", f"{__name__}:open_mine") for kind in kinds]

    vars(made)["flowlane_provides"] = flowlane_provides
    return Registry({"mine": made})


def lane(name: str = "toy") -> Lane:
    made = Lane(name)

    @made.stage(on=made.triggered)
    async def find(event: Any, ctx: Any) -> None: ...

    return made


SETTINGS = Settings(backend="mybackend://x")


async def test_everything_opened_is_closed_the_backend_last() -> None:
    LOG.clear()
    async with open_application([lane()], SETTINGS, registry=registry()) as app:
        await app.connections.store("mystore://x")
        async with app.connections.source("mysource://x", {}):
            assert LOG[-1] == "open mysource://x"
        async with app.connections.sink("mysink://x", {}):
            pass
        assert LOG[-1] == "open mysink://x", "shared by all that write to it, and closed in the end"
    assert LOG == [
        "open mybackend://x",
        "open mystore://x",
        "open mysource://x",
        "close mysource://x",
        "open mysink://x",
        "close mysink://x",
        "close mystore://x",
        "close mybackend://x",
    ]


async def test_everything_is_closed_when_something_goes_wrong() -> None:
    LOG.clear()

    async def fail() -> None:
        async with open_application([lane()], SETTINGS, registry=registry()) as app:
            await app.connections.store("mystore://x")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        await fail()
    assert LOG[-2:] == ["close mystore://x", "close mybackend://x"]
    LOG.clear()
    bad = Lane("bad")
    with pytest.raises(ConfigError, match="bad has no stage"):
        async with open_application([bad], SETTINGS, registry=registry()):
            pass
    assert LOG in ([], ["open mybackend://x", "close mybackend://x"])


async def test_two_lanes_of_one_name_are_refused_before_anything_is_opened() -> None:
    LOG.clear()
    with pytest.raises(ConfigError, match="two lanes are called 'toy': their streams would mix; rename one"):
        async with open_application([lane(), lane("other"), lane()], SETTINGS, registry=registry()):
            pass
    assert LOG == []


async def test_an_application_is_of_one_piece() -> None:
    clock = SystemClock()
    lanes = [lane("one"), lane("two")]
    async with open_application(lanes, Settings(backend="memory://"), clock=clock) as app:
        assert app.clock is app.engine.clock is clock
        assert app.connections is app.engine.connections
        assert app.engine.backend is app.backend
        assert set(app.engine.lanes) == {"one", "two"}
        assert [(await run_once(app, each)).outcome for each in lanes] == ["settled", "settled"]


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("nothing://x", "has scheme 'nothing': as backend, flowlane opens "),
        ("flow.db", "has no scheme: as backend, flowlane opens "),
        (
            "sqlite:///x.db?syncronous=full",
            "unknown option 'syncronous'; known: busy_timeout, hold, synchronous",
        ),
        ("sqlite:///x.db?synchronous=maybe", "synchronous=maybe is neither normal nor full"),
        ("sqlite:///", "write sqlite:///relative/path"),
        ("memory://?x=1", "unknown option 'x'; known: hold"),
    ],
)
async def test_a_bad_backend_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        async with open_application([lane()], Settings(backend=backend)):
            pass
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, PluginError)
    assert list(tmp_path.iterdir()) == [], "nothing was started or made"


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.db"
    file.write_bytes(b"this is no database, and it is longer than any header" * 100)
    before = file.read_bytes()
    with pytest.raises(ConfigError) as caught:
        async with open_application([lane()], Settings(backend=f"sqlite:///{file}")):
            pass
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before
