"""A table that the lane learns of from data: ``into``, for SQLite; and what the sink says that it changed."""

from __future__ import annotations

import sqlite3
from contextlib import closing, nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pytest

from flowlane.clock import SystemClock
from flowlane.connectors.sqlite import open_sink
from flowlane.errors import ConfigError, Permanent
from flowlane.ports import Batch, Connections, Environment, Record, TableSpec, UnitRef
from flowlane.state import Position
from flowlane.testing.sink_suite import cut_up, split

ENVIRONMENT = Environment(SystemClock(), cast(Connections, None))


def declared(file: Path, table: str = "t") -> dict[str, tuple[str, int]]:
    """Type and place in the key of each column."""
    with closing(sqlite3.connect(file)) as connection:
        found = connection.execute(f'PRAGMA table_info("{table}")').fetchall()
    return {name: (type_, key) for _, name, type_, _, _, key in found if name != "_flowlane_generation"}


async def load(
    file: Path, records: list[Record], into: TableSpec | None, generation: int = 0, **options: Any
) -> tuple[list[str], list[str]]:
    """`records` as one batch, written twice by two attempts; what the sink said it changed, each time."""
    (batch,) = cut_up(records, len(records))
    told = []
    async with open_sink(f"sqlite:///{file}", ENVIRONMENT, into=into, **options) as sink:
        for token in (1, 2):
            unit = UnitRef(f"lane/unit/{generation}", token, generation)
            async with sink.open(split(str(generation)), unit) as writer:
                await writer.write(Batch([*batch.records], batch.start, batch.end, []))
                told.append(list(writer.changes))
    first, second = told
    return first, second


async def test_table_key_and_types_are_those_of_the_spec(tmp_path: Path) -> None:
    spec = TableSpec("t", ("id", "day", "raw"), "upsert", types=(("id", "N"), ("day", "S"), ("raw", "B")))
    await load(tmp_path / "a.db", [{"id": 1, "day": None, "raw": b"", "n": 5}], spec)
    await load(tmp_path / "a.db", [{"id": 1, "day": "x", "raw": b"\0", "n": 5}], spec, 1)
    assert declared(tmp_path / "a.db") == {
        "id": ("", 1),
        "day": ("TEXT", 2),
        "raw": ("BLOB", 3),
        "n": ("", 0),
    }


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((("id", "N"), 1), (("id", "S"), "1")),
        ((("id", "N"), Decimal("1.5")), (("id", "B"), b"1")),
        ((("id", "S"), "1"), (("id", "B"), b"1")),
        ((("id", "B"), b"1"), (("id", "N"), 1)),
        ((("id", "B"), b"1"), (("id", "S"), "1")),
    ],
)
async def test_a_key_that_changes_its_type_would_make_two_rows_of_one(
    tmp_path: Path, first: Any, then: Any
) -> None:
    file = tmp_path / "a.db"
    for attempt, (typed, value) in enumerate((first, then, first)):
        refused = attempt == 1
        spec = TableSpec("t", ("id",), "upsert", types=(typed,))
        with pytest.raises(Permanent, match=r"table t has .* in its key id") if refused else nullcontext():
            await load(file, [{"id": value}], spec, attempt)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)


async def test_one_number_among_texts_of_numbers_tells_the_type_of_a_key(tmp_path: Path) -> None:
    """Fractions are held as texts, as any decimal is."""
    file = tmp_path / "a.db"
    numbers = TableSpec("t", ("id",), "upsert", types=(("id", "N"),))
    await load(file, [{"id": Decimal("1.5")}, {"id": 1}], numbers)
    await load(file, [{"id": Decimal("1.5")}], numbers, 1)
    with pytest.raises(Permanent, match=r"table t has values of type integer in its key id"):
        await load(file, [{"id": "1"}], TableSpec("t", ("id",), "upsert", types=(("id", "S"),)), 2)


async def test_a_table_made_by_others_says_nothing_of_its_keys_type(tmp_path: Path) -> None:
    file, spec = tmp_path / "a.db", TableSpec("t", ("id",), "upsert", types=(("id", "S"),))
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE t (id VARCHAR(9) PRIMARY KEY, n)")
    told = [(await load(file, [{"id": "1", "n": each}], spec, each))[0] for each in range(2)]
    assert told == [["table t: column _flowlane_generation was added"], []]
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT id, n FROM t").fetchall() == [("1", 1)]


async def test_columns_are_added_in_the_order_in_which_they_come(tmp_path: Path) -> None:
    file, spec = tmp_path / "a.db", TableSpec("t", ("id",), "upsert")
    await load(file, [{"id": 1}], spec)
    await load(file, [{"id": 1, "Z": 1, "b": 1, "A": 1}, {"id": 2, "z": 1, "c": 1}], spec, 1)
    assert list(declared(file)) == ["id", "Z", "b", "A", "c"]


async def test_rows_are_appended_where_the_spec_says_so(tmp_path: Path) -> None:
    spec = TableSpec("t", ("id",), "append")
    for generation in range(2):
        await load(tmp_path / "a.db", [{"id": 1}], spec, generation)
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (2,)


async def test_what_is_changed_is_said_again_when_the_batch_is_written_again(tmp_path: Path) -> None:
    file, spec = tmp_path / "a.db", TableSpec("t", ("id",), "upsert")
    made = ["table t was made: id"]
    assert await load(file, [{"id": 1}], spec) == (made, made)
    first, again = await load(file, [{"id": 1, "a": 1}, {"id": 2, "b": 1}], spec, 1)
    assert sorted(first) == ["table t: column a was added", "table t: column b was added"]
    assert first == again
    assert await load(file, [{"id": 1, "a": 2}], spec, 2) == ([], [])


async def test_what_is_undone_was_not_changed(tmp_path: Path) -> None:
    file, spec = tmp_path / "a.db", TableSpec("t", ("id",), "upsert")
    await load(file, [{"id": 1}], spec)
    async with (
        open_sink(f"sqlite:///{file}", ENVIRONMENT, into=spec) as sink,
        sink.open(split("b"), UnitRef("lane/unit/b", 1)) as writer,
    ):
        bad = Batch([{"id": 2, "new": 1, "no name": 1}], Position(), Position(10, 1), [])
        with pytest.raises(Permanent, match="plain name"):
            await writer.write(bad)
        assert list(writer.changes) == []
    assert set(declared(file)) == {"id"}


@pytest.mark.parametrize(
    "options", [{"table": "t"}, {"key": "id"}, {"mode": "upsert"}, {"table": "t", "key": "id"}]
)
async def test_a_uri_that_says_it_too_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave them out of the URI"):
        await load(tmp_path / "a.db", [{"id": 1}], TableSpec("t", ("id",), "upsert"), 0, **options)
    assert not (tmp_path / "a.db").exists()


@pytest.mark.parametrize("name", ["a b", "x; DROP TABLE t", "_flowlane_fence", "x" * 64, "sqlite_x", ""])
async def test_a_name_from_data_is_checked_here_too(tmp_path: Path, name: str) -> None:
    for spec in (TableSpec(name, ("id",), "upsert"), TableSpec("t", (name,), "upsert")):
        with pytest.raises(ConfigError):
            await load(tmp_path / "a.db", [{"id": 1}], spec)
    assert not (tmp_path / "a.db").exists()


async def test_no_table_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names no table: add \?table="):
        await load(tmp_path / "a.db", [{"id": 1}], None)
