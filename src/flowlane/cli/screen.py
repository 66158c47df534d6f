"""Where the words of a verb go: rich tables and trees on a terminal, plain aligned lines in a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TextIO

from flowlane.cli.text import safe

if TYPE_CHECKING:
    from rich.console import Console

Cell = str | int
#: Columns of text are folded in a terminal, but not to less than that.
_FOLDED = 12


class Screen:
    """One output stream. Every text is made harmless here; numbers are aligned right."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.tty = self.stream.isatty()
        if isinstance(self.stream, io.TextIOWrapper):
            # A name from data must not end a report because the terminal's encoding lacks a character.
            self.stream.reconfigure(errors="backslashreplace")

    @property
    def blocks(self) -> bool:
        """Whether the stream can show block characters."""
        try:
            "█░▒·".encode(self.stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    @cached_property
    def console(self) -> Console:
        """The terminal, as rich sees it; imported only here."""
        from rich.console import Console

        return Console(file=self.stream, highlight=False, markup=False, emoji=False)

    def line(self, text: str = "", style: str = "") -> None:
        """One line; `style` is for terminals."""
        if self.tty and style:
            self.console.print(safe(text), style=style, soft_wrap=True)
        else:
            self.stream.write(safe(text) + "\n")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """`rows` under `head`; in a pipe, columns two spaces apart, one row a line."""
        cells = [[f"{c:,}" if isinstance(c, int) else safe(c) for c in row] for row in rows]
        right = [bool(rows) and all(isinstance(row[n], int) for row in rows) for n in range(len(head))]
        widths = [max(len(row[n]) for row in [head, *cells]) for n in range(len(head))]
        # In less than that, rich shortens numbers to nothing; the terminal folds plain lines and loses none.
        needed = sum(w if to_right else min(w, _FOLDED) for w, to_right in zip(widths, right, strict=True))
        if self.tty and needed + 3 * len(head) <= self.console.width:
            self._rich_table(head, cells, right)
            return
        for row in [head, *cells]:
            padded = [
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            ]
            self.stream.write("  ".join(padded).rstrip() + "\n")

    def _rich_table(self, head: Sequence[str], cells: list[list[str]], right: list[bool]) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for title, to_right in zip(head, right, strict=True):
            table.add_column(title, justify="right" if to_right else "left", overflow="fold")
        for row in cells:
            table.add_row(*row)
        self.console.print(table)

    def tree(self, nodes: Sequence[tuple[int, str]]) -> None:
        """`nodes` with their depths, parents before children."""
        if not self.tty:
            for depth, text in nodes:
                self.stream.write("  " * depth + safe(text) + "\n")
            return
        from rich.tree import Tree

        root = Tree("", hide_root=True)
        path = [root]
        for depth, text in nodes:
            del path[depth + 1 :]
            path.append(path[-1].add(safe(text)))
        self.console.print(root)
