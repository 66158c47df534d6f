"""A file imports only from its own layer or below (DESIGN.md, "Layers"), and what only some may import."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "flowlane"

#: Every module and package of flowlane; a package stands for all in it.
LAYERS: dict[int, tuple[str, ...]] = {
    0: ("errors", "events", "clock", "veil"),
    1: ("ports", "state", "lane", "streams"),
    2: (
        "archive",
        "attempt",
        "committer",
        "completion",
        "conveyor",
        "discovery",
        "deadline",
        "engine",
        "handling",
        "blocks",
        "landing",
        "letters",
        "marks",
        "notices",
        "parking",
        "plan",
        "pump",
        "reasons",
        "redrive",
        "report",
        "status",
        "sweep",
        "transfer",
        "turns",
    ),
    3: ("backends", "connectors", "hookspecs", "plugins", "settings", "shards"),
    4: ("compose", "connections", "recipes", "slips"),
    5: ("aws_lambda", "worker"),
    6: ("__main__", "cli"),
}
LAYER = {module: layer for layer, modules in LAYERS.items() for module in modules}
#: May import anything, and is imported by nothing else.
ASIDE = "testing"
#: What ``import flowlane`` gives: no deeper than lanes.
TOP = 1

#: Who alone may import these; a prefix of the module's path.
RESERVED = {
    "pluggy": ("hookspecs", "plugins"),
    "aiohttp": ("connectors",),
    "yarl": ("connectors",),
    "rich": ("cli",),
    "click": ("cli",),
    "pytest": ("testing",),
    "hypothesis": ("testing",),
    "sqlite3": ("backends", "connectors"),
}
#: What nobody may import: SDKs belong into plugins.
BANNED = ("boto3", "botocore", "aioboto3", "aiobotocore", "asyncpg", "sqlalchemy", "duckdb", "awslambdaric")

FILES = sorted(SRC.rglob("*.py"))


def name_of(file: Path) -> str:
    """The module in `file`, by its path below the package: ``backends.sqlite.writer``."""
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(name: str) -> str:
    """The entry of ``LAYER`` that the module belongs to."""
    return name.partition(".")[0]


@cache
def imports(file: Path) -> list[tuple[int, str]]:
    """Line and full name of everything that `file` imports, anywhere in it, under TYPE_CHECKING too."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def inner(file: Path) -> list[tuple[int, str]]:
    """Line and top-level part of each import of flowlane's own modules."""
    found = []
    for line, name in imports(file):
        package, _, rest = name.partition(".")
        if package == "flowlane":
            part = part_of(rest)
            # ``from flowlane import Unit``: a name of the package itself, not a module.
            found.append((line, part if (SRC / part).exists() or (SRC / f"{part}.py").exists() else ""))
    return found


def test_there_are_modules_to_look_at() -> None:
    assert len(FILES) > 50
    assert inner(SRC / "engine.py")


def test_a_module_imports_its_own_layer_or_below() -> None:
    wrong = []
    for file in FILES:
        part = part_of(name_of(file))
        if part == ASIDE:
            continue
        assert part == "" or part in LAYER, (
            f"{part} is in no layer: add it to LAYERS and to docs/architecture.md"
        )
        own = LAYER.get(part, TOP)
        for line, target in inner(file):
            where = f"{file.relative_to(SRC)}:{line}"
            if target == ASIDE:
                wrong.append(f"{where} imports flowlane.testing: only tests may")
            elif (layer := LAYER[target] if target else TOP) > own:
                wrong.append(f"{where} (layer {own}) imports {target or 'flowlane'} (layer {layer})")
    assert wrong == []


def test_every_entry_is_a_module() -> None:
    gone = [part for part in LAYER if not (SRC / part).is_dir() and not (SRC / f"{part}.py").is_file()]
    assert gone == []


def test_libraries_are_imported_only_where_they_belong() -> None:
    wrong = []
    for file in FILES:
        part = part_of(name_of(file))
        for line, name in imports(file):
            library = name.partition(".")[0]
            where = f"{file.relative_to(SRC)}:{line}"
            if library in BANNED:
                wrong.append(f"{where} imports {library}: an SDK belongs into a plugin")
            elif library in RESERVED and part not in (*RESERVED[library], ASIDE):
                wrong.append(f"{where} imports {library}, which is for {RESERVED[library]}")
    assert wrong == []


def test_recipes_know_only_the_public_face() -> None:
    """A recipe is what a user could have written: no engine, backend or connector. What is in ``streams`` are
    pure functions, over names and bytes."""
    allowed = {"", "errors", "events", "lane", "ports", "recipes", "status", "streams"}
    for file in sorted((SRC / "recipes").glob("*.py")):
        assert {part for _, part in inner(file)} <= allowed, file


def test_streams_do_no_io() -> None:
    """Decoders are tested byte by byte: they open nothing, wait for nothing, and ask no clock."""
    for file in sorted((SRC / "streams").glob("*.py")):
        libraries = {name.partition(".")[0] for _, name in imports(file)}
        assert not libraries & {"asyncio", "os", "pathlib", "socket", "threading", "time", "random"}, file
        assert {part for _, part in inner(file)} <= {"errors", "streams", "ports", "state"}, file
        assert "open" not in {
            node.func.id
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }, file


def test_the_documentation_draws_the_same_layers() -> None:
    table = (SRC.parents[1] / "docs" / "architecture.md").read_text()
    for layer, parts in LAYERS.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| L{layer} |"))
        missing = [part for part in parts if part not in row and part != "__main__"]
        assert missing == [], f"docs/architecture.md, L{layer}"
