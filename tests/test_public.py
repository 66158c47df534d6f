"""What a user imports: exact, documented, and light."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flowlane
from flowlane import recipes

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "flowlane"
FILES = sorted(SRC.rglob("*.py"))
TEXT = "\n".join(file.read_text() for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

LANES = (ROOT / "docs" / "lanes.md").read_text()

#: What a lane is written with. A name that is added or taken away belongs into CHANGELOG.md.
PUBLIC = {
    "BadRecord",
    "ConfigError",
    "Context",
    "CsvFormat",
    "Event",
    "Fact",
    "FlowlaneError",
    "Incomplete",
    "Lane",
    "Permanent",
    "Policy",
    "Refused",
    "Retryable",
    "Superseded",
    "Unit",
    "ZipLimits",
}


def test_the_public_names_are_exactly_these() -> None:
    assert set(flowlane.__all__) == PUBLIC
    assert list(flowlane.__all__) == sorted(flowlane.__all__)
    shown = {
        name
        for name, value in vars(flowlane).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert shown == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_is_documented(name: str) -> None:
    value = getattr(flowlane, name)
    assert inspect.isclass(value)
    assert len(inspect.getdoc(value) or "") > 20
    assert re.search(rf"\b{name}\b", TEXT), f"{name} stands neither in README.md nor in docs/"


def test_the_page_on_lanes_names_all_of_them_and_no_other() -> None:
    table = LANES.split("\n\n")[2].splitlines()[2:]
    assert {line.split("`")[1] for line in table} == PUBLIC


def test_the_lane_of_the_documentation_is_one() -> None:
    code = LANES.split("```python")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/lanes.md", "exec"), namespace)
    namespace["lane"].check()
    assert [stage.name for stage in namespace["lane"].stages] == ["find", "land"]


def test_the_page_on_lanes_has_every_setting_of_a_recipe_with_its_default() -> None:
    for name in recipes.__all__:
        part = LANES.split(f"### `{name}`")[1].split("### ")[0]
        rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| `")]
        documented = {row[0].strip(" `"): row[1].strip(" `") for row in rows}
        signature = list(inspect.signature(getattr(recipes, name)).parameters.values())[1:]
        assert list(documented) == [p.name for p in signature]
        for p in signature:
            if p.default is p.empty:
                assert documented[p.name] == "required"
            elif p.default is not None:
                assert documented[p.name] == str(p.default)


@pytest.mark.parametrize("name", recipes.__all__)
def test_a_recipe_is_documented(name: str) -> None:
    recipe = getattr(recipes, name)
    parameters = list(inspect.signature(recipe).parameters.values())
    assert parameters[0].name == "name"
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[1:]), "the name first, the rest by keyword"
    assert "policy" in [p.name for p in parameters]
    doc = inspect.getdoc(recipe) or ""
    assert len(doc) > 100
    assert re.search(rf"\b{name}\b", TEXT)
    unsaid = [p.name for p in parameters if not re.search(rf"`*\b{p.name}\b", doc + TEXT)]
    assert unsaid == []


def test_recipes_are_exactly_those_there_are() -> None:
    files = (SRC / "recipes").glob("*.py")
    modules = {file.stem for file in files if f"\ndef {file.stem}(" in file.read_text()}
    assert set(recipes.__all__) == modules


def test_the_version_is_that_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{flowlane.__version__}"\n' in project
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{flowlane.__version__}]" in changes or "## [Unreleased]" in changes


def test_the_package_is_typed() -> None:
    assert (SRC / "py.typed").is_file()


def test_every_all_can_be_imported() -> None:
    listed, wrong = 0, []
    for file in FILES:
        if "__all__" not in file.read_text():
            continue
        parts = file.relative_to(SRC.parent).with_suffix("").parts
        made = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        wrong += [f"{made.__name__}.{name} is not there" for name in made.__all__ if not hasattr(made, name)]
        if len(set(made.__all__)) != len(made.__all__):
            wrong.append(f"{made.__name__}.__all__ names something twice")
        listed += 1
    assert wrong == []
    assert listed >= 10


# --------------------------------------------------------------------------- light


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh process has after `statement`."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


HEAVY = {
    "aiohttp",
    "rich",
    "click",
    "pluggy",
    "sqlite3",
    "zstandard",
    "isal",
    "yarl",
    "ssl",
    "hypothesis",
    "pytest",
}


@pytest.mark.parametrize(
    ("statement", "may"),
    [
        ("import flowlane", {"ssl"}),
        ("from flowlane.recipes import http_archive", {"ssl", "zstandard", "isal"}),
        ("import flowlane.aws_lambda", {"ssl"}),
        ("import flowlane.compose", {"ssl", "zstandard", "isal", "pluggy"}),
        ("import flowlane.testing", {"ssl"}),
    ],
)
def test_an_import_brings_in_little(statement: str, may: set[str]) -> None:
    loaded = modules_after(statement)
    assert "flowlane" in loaded
    assert (loaded & HEAVY) - may == set()
    assert not [name for name in loaded if name.startswith(("flowlane.backends.", "flowlane.connectors."))]


def test_importing_starts_nothing() -> None:
    modules = "flowlane.compose, flowlane.worker, flowlane.aws_lambda, threading"
    code = f"import {modules}; print(threading.active_count())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "1\n"


# --------------------------------------------------------------------------- docstrings

#: A function this short says what it does by itself, if its name does.
SHORT = 8


def undocumented(tree: ast.Module) -> list[tuple[int, str, int]]:
    """Public functions and classes of `tree`, and public methods of public classes, that say nothing: their
    line, name and length."""
    found = []
    public = [
        node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for node in public:
        if node.name.startswith("_"):
            continue
        inner = node.body if isinstance(node, ast.ClassDef) else []
        methods = [item for item in inner if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
        for each in [node, *(item for item in methods if not item.name.startswith("_"))]:
            lines = (each.end_lineno or each.lineno) - each.lineno + 1
            if each.name.startswith("test_"):
                continue  # of the shipped suites: the name says what is promised
            if lines > SHORT and ast.get_docstring(each) is None:
                found.append((each.lineno, each.name, lines))
    return found


#: Methods that implement a port and say nothing beyond what ``ports`` promises of them.
PORTS = {
    name
    for file in (SRC / "ports").glob("*.py")
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.ClassDef)
    for item in node.body
    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(item)
    for name in [item.name]
}


def test_what_is_public_says_what_it_does_and_every_module_what_it_is() -> None:
    wrong = []
    for file in FILES:
        tree, where = ast.parse(file.read_text()), file.relative_to(SRC)
        wrong += [
            f"{where}:{line}: {name} ({lines} lines) has no docstring"
            for line, name, lines in undocumented(tree)
            if name not in PORTS
        ]
        if tree.body and ast.get_docstring(tree) is None:
            wrong.append(f"{where} has no docstring, and is not empty")
    assert wrong == []


def test_the_rule_itself_sees() -> None:
    long = "\n".join(["    x = 1"] * SHORT)
    source = f"def short():\n    x = 1\n\ndef _own():\n{long}\n\ndef silent():\n{long}\n"
    assert undocumented(ast.parse(source)) == [(SHORT + 6, "silent", SHORT + 1)]
