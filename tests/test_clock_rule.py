"""Time, chance and tasks are asked for in one place: whoever goes round it cannot be simulated.

Over the syntax trees of everything that ships, ``flowlane.testing`` (which makes clocks and loops) aside.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "flowlane"
FILES = sorted(file for file in SRC.rglob("*.py") if "testing" not in file.relative_to(SRC).parts)

#: Calls that belong into clock.py, by their full dotted name; ``.*``: everything below.
FORBIDDEN = {
    "time.*": "ask the clock",
    "random.*": "ask the clock",
    "secrets.*": "ask the clock for a token",
    "uuid.uuid1": "ask the clock for a token",
    "uuid.uuid4": "ask the clock for a token",
    "uuid.uuid6": "ask the clock for a token",
    "uuid.uuid7": "ask the clock for a token",
    "os.urandom": "ask the clock for a token",
    "datetime.datetime.now": "ask the clock",
    "datetime.datetime.utcnow": "ask the clock",
    "datetime.datetime.today": "ask the clock",
    "datetime.date.today": "ask the clock",
    "asyncio.sleep": "sleep by the clock",
    "asyncio.to_thread": "offload by the clock",
    "asyncio.run": "a loop is the command line's or the Lambda function's",
    "asyncio.Runner": "a loop is the command line's or the Lambda function's",
    "asyncio.create_task": "tasks belong to a TaskGroup",
    "asyncio.ensure_future": "tasks belong to a TaskGroup",
    "print": "only the command line talks",
    "input": "only the command line talks",
    "breakpoint": "not in what ships",
    "eval": "data is no code",
    "exec": "data is no code",
    "compile": "data is no code",
    "pickle.*": "data is no code",
    "marshal.*": "data is no code",
    "shelve.*": "data is no code",
    "yaml.*": "msgspec reads what is read",
    "os.system": "no shell",
    "subprocess.*": "no shell",
}
HEADS = {pattern.partition(".")[0] for pattern in FORBIDDEN}

#: Who may all the same, and why: (module, call) -> reason.
ALLOWED = {
    ("backends/common.py", "asyncio.sleep"): "a long put gives way: no time passes",
    ("backends/memory.py", "asyncio.sleep"): "an iteration gives way: no time passes",
    ("pump.py", "asyncio.ensure_future"): "Pump.until owns what it is given, and cancels and awaits it",
    ("conveyor.py", "asyncio.create_task"): "close cancels and awaits what waits for the next batch",
    ("pump.py", "asyncio.create_task"): "the keeper of the slots cancels and awaits them, up to the deadline",
    ("connectors/hop.py", "asyncio.ensure_future"): "a hop is shielded from cancellation and awaited",
    ("aws_lambda/function.py", "asyncio.Runner"): "one loop for the process, kept between invocations",
    (
        "aws_lambda/function.py",
        "asyncio.create_task",
    ): "the keeper of the open application: awaited on leaving",
    ("cli/progress.py", "asyncio.create_task"): "the screen's refresher: cancelled and awaited on leaving",
    ("cli/loop.py", "asyncio.Runner"): "the command line's loop",
    ("cli/loop.py", "asyncio.create_task"): "the loop's end: waited for, and left behind with the process",
    ("cli/session.py", "print"): "the command line talks",
}
#: Whole modules that may: the clock itself, and the loop's own methods in it.
EXEMPT = {"clock.py": ("time.", "random.", "os.urandom", "datetime.datetime.now", "asyncio.")}


Nodes = Sequence[ast.AST]


def parsed(source: str) -> Nodes:
    """All nodes of its syntax tree: walking one takes longer than anything that is done with them."""
    return list(ast.walk(ast.parse(source)))


def aliases(nodes: Nodes) -> dict[str, str]:
    """What each imported name stands for: ``{"datetime": "datetime.datetime"}``."""
    names = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name that `node` refers to; empty if it is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (base := dotted(node.value, names)):
        return f"{base}.{node.attr}"
    return ""


def matches(name: str) -> str:
    """The entry of ``FORBIDDEN`` that `name` falls under."""
    if name.partition(".")[0] not in HEADS:
        return ""
    for pattern in FORBIDDEN:
        if name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1])):
            return pattern
    return ""


def used(nodes: Nodes) -> Iterator[tuple[int, str]]:
    """Line and full name of every forbidden thing among `nodes`, called or handed on."""
    names = aliases(nodes)
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = dotted(node, names)
            # A name of one's own (a method called ``compile``, a variable) is none of the builtins.
            if matches(name) and not (isinstance(node, ast.Name) and name in _bound(nodes)):
                yield node.lineno, name


def _bound(nodes: Nodes) -> set[str]:
    found = {
        node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    found |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return found | {arg.arg for node in nodes if isinstance(node, ast.arguments) for arg in node.args}


@cache
def seen() -> tuple[list[tuple[str, int, str]], list[str]]:
    """In what ships: module, line and full name of every forbidden thing, and every orphan."""
    uses: list[tuple[str, int, str]] = []
    lost: list[str] = []
    for file in FILES:
        module, nodes = file.relative_to(SRC).as_posix(), parsed(file.read_text())
        uses += [(module, line, name) for line, name in used(nodes)]
        lost += [f"{module}:{orphan}" for orphan in orphans(module, nodes)]
    return uses, lost


def test_there_are_modules_to_look_at() -> None:
    assert len(FILES) > 100


def test_nobody_goes_round_the_clock() -> None:
    wrong = [
        f"{module}:{line}: {name}: {FORBIDDEN[matches(name)]}"
        for module, line, name in seen()[0]
        if not name.startswith(EXEMPT.get(module, ("\0",))) and (module, name) not in ALLOWED
    ]
    assert wrong == []


def test_every_exception_is_needed() -> None:
    """A reason whose cause is gone would let the next one in unseen."""
    assert set(ALLOWED) - {(module, name) for module, _, name in seen()[0]} == set()
    assert all(len(reason) > 10 for reason in ALLOWED.values())


def test_tasks_are_made_by_their_owner() -> None:
    """``create_task`` only on a TaskGroup of the same module: the error of an orphan is lost."""
    assert seen()[1] == []


def orphans(module: str, nodes: Nodes) -> list[str]:
    """Line and maker of every task that is made otherwise, and may not be."""
    made = [
        (node.lineno, node.func)
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "create_task"
    ]
    groups = _task_groups(nodes) if made else set()
    return [
        f"{line}: {ast.unparse(maker)}"
        for line, maker in made
        if not (isinstance(maker.value, ast.Name) and maker.value.id in groups)
        and (module, ast.unparse(maker)) not in ALLOWED
    ]


def _task_groups(nodes: Nodes) -> set[str]:
    groups = set()
    for node in nodes:
        if isinstance(node, ast.AsyncWith):
            for item in node.items:
                call = item.context_expr
                if (
                    isinstance(call, ast.Call)
                    and ast.unparse(call.func) == "asyncio.TaskGroup"
                    and isinstance(item.optional_vars, ast.Name)
                ):
                    groups.add(item.optional_vars.id)
        elif isinstance(node, ast.arg) and node.annotation and "TaskGroup" in ast.unparse(node.annotation):
            groups.add(node.arg)
    return groups


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time\ntime.time()", "time.time"),
        ("import time as t\nt.monotonic()", "time.monotonic"),
        ("from time import sleep\nsleep(1)", "time.sleep"),
        ("from datetime import datetime as dt\ndt.now()", "datetime.datetime.now"),
        ("import datetime\ndatetime.datetime.utcnow()", "datetime.datetime.utcnow"),
        ("import random\nx = random.choice", "random.choice"),
        ("import asyncio\nasyncio.sleep(0)", "asyncio.sleep"),
        ("from os import urandom\nurandom(8)", "os.urandom"),
        ("eval('1')", "eval"),
        ("print(1)", "print"),
        ("import pickle\npickle.loads(b'')", "pickle.loads"),
        ("def print(x): ...\nprint(1)", ""),
        ("import re\nre.compile('')", ""),
        ("clock.sleep(1)\nself.time()", ""),
    ],
)
def test_the_rule_itself_sees(source: str, found: str) -> None:
    assert [name for _, name in used(parsed(source))] == ([found] if found else [])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import asyncio\nasyncio.create_task(x())", ["2: asyncio.create_task"]),
        ("self.loop.create_task(x())", ["1: self.loop.create_task"]),
        ("async with asyncio.TaskGroup() as tasks:\n    tasks.create_task(x())", []),
        (
            "def f(tasks: asyncio.TaskGroup):\n    tasks.create_task(x())\n    others.create_task(x())",
            ["3: others.create_task"],
        ),
    ],
)
def test_the_rule_of_tasks_itself_sees(source: str, found: list[str]) -> None:
    assert orphans("some.py", parsed(source)) == found
