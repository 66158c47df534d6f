"""SQLite tables: the contracts of source and sink, and what becomes of names, types and columns."""

from __future__ import annotations

import asyncio
import datetime as dt
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from flowlane.clock import SystemClock
from flowlane.connectors import database
from flowlane.connectors.extract import SqliteSource
from flowlane.connectors.insert import SqliteSink
from flowlane.connectors.sqlite import open_sink, open_source
from flowlane.errors import ConfigError, Fenced, Permanent, Retryable, Superseded
from flowlane.ports import Bad, Batch, Connections, Cut, Environment, Record, Split
from flowlane.state import Position
from flowlane.testing.sink_suite import KeyedSuite, SinkSuite, cut_up, split, write
from flowlane.testing.source_suite import SourceSuite, plain, read, splits_of


@pytest.fixture
def environment() -> Environment:
    return Environment(SystemClock(), cast(Connections, None))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some where" / "a.db"


def uri(file: Path) -> str:
    return f"sqlite:///{file}".replace(" ", "%20")


def execute(file: Path, *statements: str) -> list[Any]:
    file.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        found = [connection.execute(statement).fetchall() for statement in statements]
    return found[-1]


def rows_of(file: Path, table: str = "t") -> list[Record]:
    """The table's rows, without flowlane's own column."""
    with closing(sqlite3.connect(file)) as connection:
        connection.row_factory = sqlite3.Row
        try:
            found = connection.execute(f'SELECT * FROM "{table}"').fetchall()
        except sqlite3.OperationalError:
            return []
    return [{k: row[k] for k in row.keys() if k != "_flowlane_generation"} for row in found]  # noqa: SIM118


# --------------------------------------------------------------------------- source


class TestSqliteSource(SourceSuite):
    @pytest.fixture(params=["id", "part,id", ""])
    async def source(
        self, request: pytest.FixtureRequest, file: Path, environment: Environment
    ) -> AsyncIterator[SqliteSource]:
        fill(file)
        async with open_source(uri(file), environment, table="t", key=request.param) as source:
            yield source


def fill(file: Path, declared: str = "id INTEGER PRIMARY KEY, part, text TEXT, number REAL, data") -> None:
    execute(file, f"CREATE TABLE t ({declared})")
    with closing(sqlite3.connect(file)) as connection, connection:
        rows = [(n, n % 3, f"text {n}", n / 2, b"\xff\0" if n % 2 else None) for n in range(40)]
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?)", rows)


async def test_rows_come_as_they_are_and_in_order(file: Path, environment: Environment) -> None:
    fill(file)
    async with open_source(uri(file), environment, table="t", key="part,id") as source:
        (found,) = await splits_of(source)
        (batch,) = await read(source, found, Cut())
    assert found.replayable
    assert batch.records[1] == {"id": 3, "part": 0, "text": "text 3", "number": 1.5, "data": b"\xff\0"}
    assert [r["part"] for r in batch.records] == sorted(r["part"] for r in batch.records)


@pytest.mark.parametrize(
    ("declared", "key", "replayable"),
    [
        ("id INTEGER PRIMARY KEY, part, text, number, data", "id", True),
        ("id INTEGER PRIMARY KEY, part, text, number, data", "ID,part", True),
        ("id INTEGER PRIMARY KEY, part, text, number, data", "", True),
        ("id, part, text, number, data, PRIMARY KEY (part, id)", "", True),
        ("id, part, text, number, data", "", False),
        ("id INTEGER PRIMARY KEY, part, text, number, data", "part", False),
        ("id, part, text, number, data, UNIQUE (part, id)", "id,part", True),
        ("id, part, text, number, data, UNIQUE (part, id)", "id", False),
    ],
)
async def test_only_a_unique_key_can_be_replayed(
    file: Path, environment: Environment, declared: str, key: str, replayable: bool
) -> None:
    fill(file, declared)
    async with open_source(uri(file), environment, table="t", key=key) as source:
        (found,) = await splits_of(source)
    assert found.replayable is replayable


async def test_the_primary_key_is_the_default(file: Path, environment: Environment) -> None:
    """However its maker called it, and in its own order of columns."""
    execute(file, 'CREATE TABLE t (a, "b c", PRIMARY KEY ("b c", a))', "INSERT INTO t VALUES (1, 2), (2, 1)")
    async with open_source(uri(file), environment, table="t") as source:
        (found,) = await splits_of(source)
        whole = await read(source, found, Cut(1))
        assert [r for b in whole for r in b.records] == [{"a": 2, "b c": 1}, {"a": 1, "b c": 2}]
        assert plain(await read(source, found, Cut(1), whole[0].end)) == plain(whole[1:])


async def test_tables_of_one_name_in_two_files(tmp_path: Path, environment: Environment) -> None:
    """A unit that loads both into one target has the rows of both: the second is not the first, done."""
    target, unit = tmp_path / "all.db", SinkSuite().by(1)
    for number in (1, 2):
        one = tmp_path / f"{number}.db"
        execute(one, "CREATE TABLE t (id INTEGER PRIMARY KEY)", f"INSERT INTO t VALUES ({number})")
        async with (
            open_source(uri(one), environment, table="t", key="id") as source,
            open_sink(uri(target), environment, table="t", key="id") as sink,
        ):
            (found,) = await splits_of(source)
            async with sink.open(found, unit) as writer:
                for batch in await read(source, found, Cut()):
                    await writer.write(batch)
                await writer.finish()
    assert rows_of(target) == [{"id": 1}, {"id": 2}]


async def test_a_generation_is_no_part_of_a_record(file: Path, environment: Environment) -> None:
    """A table that flowlane upserted into is read like any other, and so goes into another table."""
    await load(file, environment, [{"id": 1, "x": 2}], key="id", generation=7)
    async with open_source(uri(file), environment, table="t", key="id") as source:
        (found,) = await splits_of(source)
        (batch,) = await read(source, found, Cut())
    assert batch.records == [{"id": 1, "x": 2}]


@pytest.mark.parametrize("key", ["id", ""])
async def test_no_record_says_its_own_generation(file: Path, environment: Environment, key: str) -> None:
    await load(file, environment, [{"id": 1}], key="id")
    forged = [{"id": 2, "_flowlane_generation": 99}]
    with pytest.raises(Permanent, match="'_flowlane_generation' is no plain name"):
        await load(file, environment, forged, stream="v", key=key)
    (bad,) = await load(file, environment, forged, stream="w", key=key, schema="quarantine")
    assert bad.reason == "the table has no column '_flowlane_generation'"
    assert rows_of(file) == [{"id": 1}]


async def test_a_number_that_is_none_is_no_key(file: Path, environment: Environment) -> None:
    """SQLite makes NULL of NaN, and a row of that key would be added once more with every load."""
    records: list[Record] = [{"id": float("nan")}, {"id": 1.5}]
    (bad,) = await load(file, environment, records, key="id")
    assert bad.reason == "no value for its key (id)"
    assert rows_of(file) == [{"id": 1.5}]


async def test_a_field_whose_name_is_no_text(file: Path, environment: Environment) -> None:
    """A map may return anything; it costs its record, and not the unit."""
    odd: Any = {1: "a"}
    (bad,) = await load(file, environment, [odd, {"id": 1}])
    assert (bad.row, bad.reason) == (0, "a field's name is no text")
    assert rows_of(file) == [{"id": 1}]
    assert len(await load(file, environment, [odd], stream="v")) == 1


async def test_columns_that_differ_beyond_ascii(file: Path, environment: Environment) -> None:
    """To SQLite only the letters of ASCII are the same in both cases."""
    execute(file, 'CREATE TABLE t ("É", "é")')
    assert await load(file, environment, [{"É": 1, "é": 2}]) == []
    assert rows_of(file) == [{"É": 1, "é": 2}]


async def test_a_file_with_a_number_sign(tmp_path: Path, environment: Environment) -> None:
    file = tmp_path / "a#b.db"
    assert await load(file, environment, [{"id": 1}]) == []
    assert rows_of(file) == [{"id": 1}]
    assert not (tmp_path / "a").exists()


async def test_a_changed_past_is_told_and_a_changed_future_read(file: Path, environment: Environment) -> None:
    fill(file)
    async with open_source(uri(file), environment, table="t", key="id") as source:
        (found,) = await splits_of(source)
        first, *_ = await read(source, found, Cut(10))
        execute(file, "INSERT INTO t (id) VALUES (100)")
        rest = await read(source, found, Cut(10), first.end)
        assert [r["id"] for b in rest for r in b.records] == [*range(10, 40), 100]
        execute(file, "UPDATE t SET text = 'other' WHERE id = 4")
        with pytest.raises(Superseded, match="not those that were read before"):
            await read(source, found, Cut(10), first.end)
        execute(file, "ALTER TABLE t ADD COLUMN more")
        with pytest.raises(Superseded, match="columns were changed"):
            await read(source, found, Cut(10))


async def test_one_moment_is_read(file: Path, environment: Environment) -> None:
    fill(file)
    execute(file, "PRAGMA journal_mode = WAL")
    async with open_source(uri(file), environment, table="t", key="id") as source:
        (found,) = await splits_of(source)
        seen: list[Any] = []
        async for batch in source.read(found, Position(), Cut(5)):
            execute(file, "DELETE FROM t WHERE id > 20", "INSERT INTO t (id) VALUES (NULL)")
            seen += [record["id"] for record in batch.records]
    assert seen == [*range(40)]


async def test_text_that_is_none(file: Path, environment: Environment) -> None:
    fill(file)
    execute(file, "UPDATE t SET text = CAST(x'ff' AS TEXT) WHERE id = 7")
    async with open_source(uri(file), environment, table="t", key="id") as source:
        (found,) = await splits_of(source)
        with pytest.raises(Permanent, match="UTF-8"):
            await read(source, found, Cut())


async def test_sources_that_are_not_there(file: Path, environment: Environment) -> None:
    async with open_source(uri(file), environment, table="t") as source:
        with pytest.raises(ConfigError, match="no such file"):
            await splits_of(source)
    fill(file)
    async with open_source(uri(file), environment, table="u") as source:
        with pytest.raises(ConfigError, match="no table u"):
            await splits_of(source)
    async with open_source(uri(file), environment, table="t", key="none") as source:
        with pytest.raises(ConfigError, match="no column none"):
            await splits_of(source)
    file.write_bytes(b"this is not a database at all" * 100)
    async with open_source(uri(file), environment, table="t") as source:
        with pytest.raises(ConfigError, match="not a database"):
            await splits_of(source)


@pytest.mark.parametrize("name", ["", "a b", 'a"; DROP TABLE t; --', "1a", "x" * 64, "sqlite_master", "ä"])
async def test_names_that_are_none(file: Path, environment: Environment, name: str) -> None:
    with pytest.raises(ConfigError, match="no plain name"):
        async with open_source(uri(file), environment, table=name):
            pass
    with pytest.raises(ConfigError, match="no plain name"):
        async with open_sink(uri(file), environment, table="t", key=name or ","):
            pass


@pytest.mark.parametrize("bad", ["sqlite://host/a.db", "sqlite:///", "sqlite:///:memory:", "sqlite:///a%00b"])
async def test_uris_that_name_no_file(environment: Environment, bad: str) -> None:
    with pytest.raises(ConfigError, match="write sqlite:///"):
        async with open_sink(bad, environment, table="t"):
            pass


# --------------------------------------------------------------------------- sink


class TestAppend(SinkSuite):
    refused: ClassVar = {"id": 2**70, "text": "too large"}

    @pytest.fixture
    async def sink(self, file: Path, environment: Environment) -> AsyncIterator[SqliteSink]:
        self.file = file
        async with open_sink(uri(file), environment, table="t") as sink:
            yield sink

    async def contents(self) -> list[Record]:
        return rows_of(self.file)


class TestUpsert(KeyedSuite):
    refused: ClassVar = {"id": None, "text": "no key"}

    @pytest.fixture
    async def sink(self, file: Path, environment: Environment) -> AsyncIterator[SqliteSink]:
        self.file = file
        async with open_sink(uri(file), environment, table="t", key="id") as sink:
            yield sink

    async def contents(self) -> list[Record]:
        return rows_of(self.file)


async def load(
    file: Path,
    environment: Environment,
    records: Sequence[Record],
    rows: int = 100,
    stream: str = "u",
    generation: int = 0,
    **options: Any,
) -> list[Bad]:
    """Load `records`; what was refused."""
    refused: list[Bad] = []
    async with (
        open_sink(uri(file), environment, table="t", **options) as sink,
        sink.open(split(), SinkSuite().by(1, stream, generation)) as writer,
    ):
        for batch in cut_up(records, rows):
            refused += await write(writer, batch, None)
        await writer.finish()
    return refused


async def test_values_stay_what_they_are(file: Path, environment: Environment) -> None:
    record = {
        "text": "007",
        "whole": 7,
        "part": 1.5,
        "data": b"\0\xff",
        "flag": True,
        "none": None,
        "nested": {"a": [1, "ä"]},
        "day": dt.date(2024, 2, 29),
        "moment": dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC),
        "money": Decimal("1.10"),
    }
    assert await load(file, environment, [record, {"text": 8, "whole": "008"}]) == []
    first, second = rows_of(file)
    assert first == {
        **record,
        "flag": 1,
        "nested": '{"a":[1,"ä"]}',
        "day": "2024-02-29",
        "moment": "2024-02-29T12:00:00+00:00",
        "money": "1.10",
    }
    assert (second["text"], second["whole"]) == (8, "008"), "no affinity: a mixed column keeps its types"


async def test_what_does_not_fit_is_refused_row_by_row(file: Path, environment: Environment) -> None:
    execute(file, "CREATE TABLE t (id INTEGER NOT NULL UNIQUE, n CHECK (n < 10))")
    records: list[Record] = [
        {"id": 1, "n": 1},
        {"id": 1, "n": 2},
        {"id": None, "n": 3},
        {"id": 4, "n": 11},
        {"id": 5, "n": 5},
    ]
    records += [{"id": 6, "n": 2**64}, {"id": 7, "n": "\ud800"}, {"id": 8, "n": {1}}, {"id": 9, "n": 9}]
    refused = await load(file, environment, records)
    assert [bad.row for bad in refused] == [1, 2, 3, 5, 6, 7]
    assert "UNIQUE" in refused[0].reason
    assert [row["id"] for row in rows_of(file)] == [1, 5, 9]


async def test_columns_that_come_later_are_added(file: Path, environment: Environment) -> None:
    records = [{"a": 1}, {"b": 2, "a": 2}, {"A": 3, "B": 4}, {}]
    assert await load(file, environment, records, rows=1) == []
    assert rows_of(file) == [{"a": 1, "b": None}, {"a": 2, "b": 2}, {"a": 3, "b": 4}, {"a": None, "b": None}]


async def test_frozen_columns(file: Path, environment: Environment) -> None:
    with pytest.raises(Permanent, match="no column 'b', and schema=freeze"):
        await load(file, environment, [{"a": 1}, {"a": 1, "b": 2}], rows=1, schema="freeze")
    assert rows_of(file) == [{"a": 1}]


async def test_rows_with_strange_columns_are_quarantined(file: Path, environment: Environment) -> None:
    records = [{"a": 1}, {"a": 1, "b c": 2}, {"a": 3}]
    refused = await load(file, environment, records, rows=1, schema="quarantine")
    assert [(bad.row, bad.reason) for bad in refused] == [(1, "the table has no column 'b c'")]
    assert rows_of(file) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("name", ["a b", 'x"); DROP TABLE t; --', "", "x" * 64, "_flowlane_generation", "é"])
@pytest.mark.parametrize("created", [True, False])
async def test_names_from_data_never_become_sql(
    file: Path, environment: Environment, name: str, created: bool
) -> None:
    if created:
        execute(file, "CREATE TABLE t (id)")
    with pytest.raises(Permanent, match="no plain name"):
        await load(file, environment, [{"id": 1, name: 2}])


async def test_two_fields_of_one_column(file: Path, environment: Environment) -> None:
    refused = await load(file, environment, [{"a": 1, "A": 2}, {"a": 3}])
    assert [(bad.row, bad.reason) for bad in refused] == [(0, "two of its fields name one column")]
    assert rows_of(file) == [{"a": 3}]


async def test_columns_of_somebody_elses_table(file: Path, environment: Environment) -> None:
    execute(file, 'CREATE TABLE t (id INTEGER PRIMARY KEY, "odd ""name" TEXT, kept DEFAULT 7)')
    await load(file, environment, [{"id": "1", 'odd "name': "x"}], key="id")
    await load(file, environment, [{"id": 1, 'odd "name': "y"}, {"id": 2}], key="id", stream="v")
    assert rows_of(file) == [
        {"id": 1, 'odd "name': "y", "kept": 7},
        {"id": 2, 'odd "name': None, "kept": 7},
    ]


async def test_an_upsert_leaves_what_a_record_does_not_say(file: Path, environment: Environment) -> None:
    await load(file, environment, [{"id": 1, "a": 1, "b": 1}], key="id")
    await load(file, environment, [{"id": 1, "a": 2}, {"id": 1, "b": None}], key="id", stream="v")
    assert rows_of(file) == [{"id": 1, "a": 2, "b": None}]


async def test_composite_keys(file: Path, environment: Environment) -> None:
    records = [{"x": 1, "y": 1, "v": 1}, {"x": 1, "y": 2, "v": 2}, {"X": 1, "y": 1, "v": 3}, {"x": 1, "v": 4}]
    refused = await load(file, environment, records, key="x, y")
    assert [bad.row for bad in refused] == [3]
    assert rows_of(file) == [{"x": 1, "y": 1, "v": 3}, {"x": 1, "y": 2, "v": 2}]


async def test_upserts_need_a_key_in_the_table(file: Path, environment: Environment) -> None:
    execute(file, "CREATE TABLE t (id, a)")
    with pytest.raises(Permanent, match=r"table t has no primary key or unique index over \(id\)"):
        await load(file, environment, [{"id": 1}], key="id")
    assert rows_of(file) == []


async def test_a_later_generation_leaves_a_number_that_the_table_gave(
    file: Path, environment: Environment
) -> None:
    """Others refer to it: what replaces a row whole has no say in it."""
    execute(file, "CREATE TABLE t (n INTEGER PRIMARY KEY, code TEXT UNIQUE, text TEXT, note DEFAULT 'none')")
    await load(file, environment, [{"code": "a", "text": "x", "note": "y"}], key="code", generation=1)
    await load(file, environment, [{"code": "b"}, {"code": "a"}], stream="v", key="code", generation=2)
    assert rows_of(file) == [
        {"n": 1, "code": "a", "text": None, "note": "none"},
        {"n": 2, "code": "b", "text": None, "note": "none"},
    ]


async def test_a_frozen_table_without_generations(file: Path, environment: Environment) -> None:
    execute(file, "CREATE TABLE t (id PRIMARY KEY, a)")
    with pytest.raises(Permanent, match="_flowlane_generation, which upserts need"):
        await load(file, environment, [{"id": 1}], key="id", schema="freeze")
    assert await load(file, environment, [{"id": 1}], key="id") == []


async def test_a_split_that_was_replaced_is_not_mixed(file: Path, environment: Environment) -> None:
    batches = cut_up(SinkSuite.records, 5)
    other = Split(split().id, split().url, etag='"2"')
    async with open_sink(uri(file), environment, table="t") as sink:
        async with sink.open(split(), SinkSuite().by(1)) as writer:
            await write(writer, batches[0], None)
        with pytest.raises(Superseded):
            async with sink.open(other, SinkSuite().by(2)):
                pass


async def test_a_split_that_cannot_be_replayed_is_read_once(file: Path, environment: Environment) -> None:
    batches = cut_up(SinkSuite.records, 5)
    once = Split("x", "sqlite:///x", replayable=False)
    async with open_sink(uri(file), environment, table="t") as sink:
        async with sink.open(once, SinkSuite().by(1)) as writer:
            await write(writer, batches[0], None)
            await write(writer, batches[1], None)
        with pytest.raises(Permanent, match="cannot be read in the same order twice"):
            async with sink.open(once, SinkSuite().by(2)):
                pass
        async with sink.open(Split("y", "sqlite:///y", replayable=False), SinkSuite().by(1)) as writer:
            await write(writer, batches[0], None)
            await writer.finish()
        async with sink.open(Split("y", "sqlite:///y", replayable=False), SinkSuite().by(2)) as writer:
            await write(writer, batches[0], None)
            await writer.finish()
    assert len(rows_of(file)) == 15


async def test_a_gap_is_told(file: Path, environment: Environment) -> None:
    batches = cut_up(SinkSuite.records, 5)
    async with (
        open_sink(uri(file), environment, table="t") as sink,
        sink.open(split(), SinkSuite().by(1)) as writer,
    ):
        with pytest.raises(Permanent, match="restored from a backup"):
            await write(writer, batches[1], None)
        await write(writer, batches[0], None)
        straddling = Batch([], Position(), batches[1].end, [])
        with pytest.raises(Permanent, match="restored from a backup"):
            await write(writer, straddling, None)
    assert len(rows_of(file)) == 5


async def test_a_lower_token_is_fenced_in_another_split_too(file: Path, environment: Environment) -> None:
    batches = cut_up(SinkSuite.records, 5)
    async with (
        open_sink(uri(file), environment, table="t") as sink,
        sink.open(split("b"), SinkSuite().by(1)) as zombie,
    ):
        async with sink.open(split("a"), SinkSuite().by(2)):
            with pytest.raises(Fenced):
                await write(zombie, batches[0], None)
            with pytest.raises(Fenced):
                await zombie.finish()
        with pytest.raises(Fenced):
            async with sink.open(split("b"), SinkSuite().by(1)):
                pass
    assert rows_of(file) == []


async def test_a_cancelled_write_is_whole_or_nothing(file: Path, environment: Environment) -> None:
    records = [{"id": n, "text": "x" * 100} for n in range(2000)]
    batches = cut_up(records, 1000)
    async with open_sink(uri(file), environment, table="t") as sink:
        for token in range(1, 8):
            async with sink.open(split(), SinkSuite().by(token)) as writer:
                task = asyncio.ensure_future(writer.write(batches[0]))
                for _ in range(token):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            assert len(rows_of(file)) in (0, 1000)
        async with sink.open(split(), SinkSuite().by(100)) as writer:
            for batch in batches:
                await writer.write(batch)
            await writer.finish()
    assert len(rows_of(file)) == 2000


async def test_many_units_at_once_in_two_sinks(file: Path, environment: Environment) -> None:
    async def one(sink: SqliteSink, number: int) -> None:
        records = [{"id": number * 100 + n} for n in range(20)]
        async with sink.open(split(), SinkSuite().by(1, f"unit {number}")) as writer:
            for batch in cut_up(records, 5):
                await writer.write(batch)
            await writer.finish()

    async with (
        open_sink(uri(file), environment, table="t") as first,
        open_sink(uri(file), environment, table="t") as second,
    ):
        await asyncio.gather(*(one(first if n % 2 else second, n) for n in range(16)))
    assert len({row["id"] for row in rows_of(file)}) == 320


async def test_a_new_file_is_waited_for_while_others_make_it(file: Path, environment: Environment) -> None:
    """SQLite itself does not, whatever its timeout, where it becomes a file with a write-ahead log."""
    execute(file, "CREATE TABLE t (id)")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        loading = asyncio.create_task(load(file, environment, [{"id": 1}]))
        done, _ = await asyncio.wait([loading], timeout=0.2)
        other.execute("COMMIT")
    await loading
    assert not done
    assert rows_of(file) == [{"id": 1}]


@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "BEGIN; SELECT * FROM t"])
async def test_a_file_that_others_never_let_go_of_says_what_to_do(
    file: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    """Whether they write, or only read what is to become a file with a write-ahead log."""
    monkeypatch.setattr(database, "PATIENCE", 0.05)
    execute(file, "CREATE TABLE t (id)", "INSERT INTO t VALUES (1)")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        for each in statement.split(";"):
            other.execute(each).fetchall()
        with pytest.raises(Retryable, match=r"another connection has been in the way for 0\.05 s: end"):
            await load(file, environment, [{"id": 2}])


async def test_a_backends_file_holds_no_tables(file: Path, environment: Environment) -> None:
    execute(file, f"PRAGMA application_id = {0x666C6F77}")
    with pytest.raises(ConfigError, match="file of a flowlane backend"):
        await load(file, environment, [{"a": 1}])


@pytest.mark.parametrize(
    "options",
    [{"mode": "upsert"}, {"mode": "append", "key": "id"}, {"mode": "merge"}, {"schema": "x"}, {"key": "a,A"}],
)
async def test_options_that_are_wrong(file: Path, environment: Environment, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        async with open_sink(uri(file), environment, table="t", **options):
            pass
    assert not file.exists()


async def test_a_target_that_cannot_be_written(tmp_path: Path, environment: Environment) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="folder cannot be made"):
        await load(tmp_path / "file" / "a.db", environment, [{"a": 1}])
    with pytest.raises(ConfigError, match="unable to open"):
        await load(tmp_path, environment, [{"a": 1}])


async def test_from_table_to_table(file: Path, environment: Environment) -> None:
    """The two ends together, resumed at every batch."""
    fill(file)
    target = file.parent / "b.db"
    async with (
        open_source(uri(file), environment, table="t", key="id") as source,
        open_sink(uri(target), environment, table="t", key="id") as sink,
    ):
        (found,) = await splits_of(source)
        whole = await read(source, found, Cut(7))
        for token in range(1, len(whole) + 1):
            async with sink.open(found, SinkSuite().by(token)) as writer:
                (batch, *_) = await read(source, found, Cut(7), writer.position)
                assert plain([batch]) == plain([whole[token - 1]])
                await writer.write(batch)
    assert rows_of(target) == rows_of(file)
