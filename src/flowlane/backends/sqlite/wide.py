"""Statements over many rows at once.

Every step of a statement gives up the interpreter lock and has to win it back, from a loop that may be busy:
up to 5 ms for each row of an ``executemany``. So whole groups are written and read by few, wide statements.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple


class Wide(NamedTuple):
    """A statement over many rows of values, in a few sizes, so that it stays prepared."""

    start: str
    row: str
    end: str = ""

    def parts(self, values: list[Any]) -> Iterator[tuple[str, list[Any]]]:
        """The statements that take all of `values`, and what each takes."""
        width, at, left = _width(self), 0, len(values)
        while left:
            rows = left // width
            size = min(rows - rows % 64, 512) or 1 << rows.bit_length() - 1
            step = size * width
            yield _sql(self, size), values if step == left and not at else values[at : at + step]
            at += step
            left -= step

    def run(self, connection: sqlite3.Connection, values: list[Any]) -> None:
        """Execute it, for its effect, on `values`."""
        for sql, part in self.parts(values):
            connection.execute(sql, part)


@lru_cache(64)
def _width(wide: Wide) -> int:
    return wide.row.count("?")


@lru_cache(256)
def _sql(wide: Wide, size: int) -> str:
    return wide.start + ",".join([wide.row] * size) + wide.end
