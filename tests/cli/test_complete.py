"""Completeness: every verb and option stands in ``docs/cli.md``, has help, and takes what all take."""

import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from flowlane.cli.verbs import cli
from flowlane.settings import VARIABLES

Cli = Callable[..., Result]
DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
SECTIONS = dict(re.findall(r"^## `flowlane (\w+).*?\n(.*?)(?=^## |\Z)", DOCS, re.MULTILINE | re.DOTALL))
COMMON = {"--json", "--backend", "--debug"}
VERBS = {"run", "worker", "status", "trace", "plan", "graph", "dead", "redrive", "sweep", "plugins", "init"}


def options(command: click.Command) -> set[str]:
    return {name for p in command.params if isinstance(p, click.Option) for name in p.opts}


def test_the_verbs_are_those_that_are_pinned() -> None:
    assert set(cli.commands) >= VERBS


def test_help_lists_every_verb(cli_in: Cli) -> None:
    result = cli_in("--help")
    assert result.exit_code == 0
    for name in cli.commands:
        assert re.search(rf"^  {name} +\S", result.stdout, re.MULTILINE)
    assert "..." not in result.stdout.partition("Commands:")[2]


def test_every_verb_is_documented() -> None:
    assert set(SECTIONS) == set(cli.commands)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_verb_takes_the_common_options_and_documents_its_own(cli_in: Cli, name: str) -> None:
    found = options(cli.commands[name])
    assert found >= COMMON
    for option in found - COMMON:
        assert f"`{option}" in SECTIONS[name]
    if name != "run":
        assert "JSON" in SECTIONS[name] or "--json" in SECTIONS[name]
    result = cli_in(name, "--help")
    assert result.exit_code == 0
    assert all(option in result.stdout for option in found)


def test_the_environment_is_documented() -> None:
    for name in VARIABLES:
        assert name == "FLOWLANE_LANE" or f"`{name}`" in DOCS


def test_without_a_verb_there_is_help_and_exit_2(cli_in: Cli) -> None:
    result = cli_in()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Commands:" in result.stderr


def test_version(cli_in: Cli) -> None:
    assert re.fullmatch(r"flowlane \d+\.\d+\.\d+\n", cli_in("--version").stdout)
