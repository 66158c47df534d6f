"""The command line: ``flowlane VERB ...``. What each verb prints and returns stands in ``docs/cli.md``."""

from __future__ import annotations


def main() -> None:
    """The console entry: runs the verb that the arguments name, and exits with its code."""
    from flowlane.cli.loop import Left
    from flowlane.cli.verbs import cli

    try:
        cli.main(prog_name="flowlane")
    except Left as left:
        left.end()


__all__ = ["main"]
