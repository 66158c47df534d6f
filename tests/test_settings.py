"""Everything that can be set is documented, does what it says, and is refused if it makes no sense."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowlane import ConfigError, Policy
from flowlane.plugins import Registry
from flowlane.settings import VARIABLES, Settings

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "configuration.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables under the heading that begins so, without the tables' own headings."""
    section = re.split(r"^#{2,3} ", DOC, flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(heading))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= set("- ") and row[0] not in TITLES]


TITLES = {"variable", "scheme", "field"}


def plain(cell: str) -> str:
    return cell.strip("`")


# --------------------------------------------------------------------------- variables

#: What each variable does: a value for it, and the field that has it then.
EFFECTS: dict[str, list[tuple[str, str, Any]]] = {
    "FLOWLANE_BACKEND": [("memory://", "backend", "memory://")],
    "FLOWLANE_LANE": [("lanes/a.py:b", "lane", "lanes/a.py:b")],
    "FLOWLANE_STAGE": [("load", "stage", "load")],
    "FLOWLANE_LOG_LEVEL": [
        ("debug", "log_level", "debug"),
        ("INFO", "log_level", "info"),
        ("Warning", "log_level", "warning"),
        ("error", "log_level", "error"),
    ],
    "FLOWLANE_ALLOW_PRIVATE_HOSTS": [
        ("1", "allow_private_hosts", True),
        ("0", "allow_private_hosts", False),
    ],
}


def test_every_variable_has_a_test_and_a_row() -> None:
    assert set(EFFECTS) == set(VARIABLES)
    documented = {plain(row[0]): row for row in rows("Environment variables")}
    assert set(documented) == set(VARIABLES)
    default = Settings()
    for name, effects in EFFECTS.items():
        value = getattr(default, effects[0][1])
        text = {True: "1", False: "0"}.get(value, value) if isinstance(value, bool) else value
        assert plain(documented[name][1]) == text, name
    assert {effects[0][1] for effects in EFFECTS.values()} == {
        field.name for field in msgspec.structs.fields(Settings)
    }


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [(name, *effect) for name, effects in EFFECTS.items() for effect in effects],
)
def test_a_variable_sets_what_it_says(name: str, text: str, field: str, value: Any) -> None:
    settings = Settings.read({name: text})
    assert getattr(settings, field) == value
    others = msgspec.structs.asdict(settings)
    del others[field]
    assert others.items() <= msgspec.structs.asdict(Settings()).items()


@pytest.mark.parametrize("name", sorted(VARIABLES))
def test_an_empty_variable_counts_as_not_set(name: str) -> None:
    assert Settings.read({name: ""}) == Settings() == Settings.read({})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("FLOWLANE_LOG_LEVEL", "loud"),
        ("FLOWLANE_LOG_LEVEL", "10"),
        ("FLOWLANE_ALLOW_PRIVATE_HOSTS", "yes"),
        ("FLOWLANE_ALLOW_PRIVATE_HOSTS", "true"),
        ("FLOWLANE_ALLOW_PRIVATE_HOSTS", " 1"),
    ],
)
def test_a_variable_that_makes_no_sense_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        Settings.read({name: text})
    message = str(caught.value)
    assert "must be" in message
    assert "\n" not in message


def test_no_other_variable_is_read() -> None:
    """Of flowlane's own; ``env://`` reads what it is told to."""
    sources = "".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    assert set(re.findall(r"\bFLOWLANE_[A-Z_]+\b", sources)) <= {*VARIABLES, "FLOWLANE_CORPUS"}
    readers = [
        file.relative_to(ROOT / "src" / "flowlane").as_posix()
        for file in (ROOT / "src" / "flowlane").rglob("*.py")
        if re.search(r"\bos\.(environ|getenv)\b", file.read_text()) and "testing" not in file.parts
    ]
    assert sorted(readers) == ["aws_lambda/function.py", "cli/session.py", "connectors/env.py"]


# --------------------------------------------------------------------------- URIs

HEADINGS = {"backend": "As a backend", "store": "As a store", "source": "As a source", "sink": "As a sink"}
HEADINGS["secrets"] = "As secrets"


def provided() -> list[tuple[str, str, dict[str, Any]]]:
    """Kind, scheme, and the options with their defaults, of all that is built in."""
    found = []
    for row in Registry.load().provided():
        if row["plugin"] == "builtin":
            module, _, name = row["path"].partition(":")
            parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
            options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
            found.append((row["kind"], row["scheme"], options))
    return found


@pytest.mark.parametrize("kind", sorted(HEADINGS))
def test_every_scheme_and_option_has_a_row(kind: str) -> None:
    documented: dict[str, dict[str, str]] = {}
    for schemes, option, default, _ in rows(HEADINGS[kind]):
        for scheme in schemes.split(","):
            known = documented.setdefault(plain(scheme.strip()), {})
            if option:
                known[plain(option)] = default
    real = {scheme: options for k, scheme, options in provided() if k == kind}
    assert {scheme: set(options) for scheme, options in documented.items()} == {
        scheme: set(options) for scheme, options in real.items()
    }
    for scheme, options in real.items():
        for name, preset in options.items():
            said = documented[scheme][name]
            required = preset is inspect.Parameter.empty
            assert (said == "required") == required, f"{scheme}: {name}"
            if preset and isinstance(preset, str):
                assert plain(said) == preset, f"{scheme}: {name}"


def test_every_kind_is_documented() -> None:
    assert {kind for kind, _, _ in provided()} <= set(HEADINGS)


# --------------------------------------------------------------------------- policy


def test_every_field_of_a_policy_has_a_row_with_its_default() -> None:
    documented = {plain(row[0]): plain(row[1]) for row in rows("Policy")}
    assert documented == {field.name: repr(field.default) for field in fields(Policy)}


def test_every_row_says_something() -> None:
    for heading in ["Environment variables", "Policy", *HEADINGS.values()]:
        assert all(len(row[-1]) > 5 for row in rows(heading)), heading
