"""The command line: ``flowlane VERB ...``. What each verb prints and returns stands in ``docs/cli.md``."""

from __future__ import annotations


def main() -> None:
    """The console entry: runs the verb that the arguments name, and exits with its code."""
    from flowlane.cli.verbs import cli

    cli.main(prog_name="flowlane")


__all__ = ["main"]
