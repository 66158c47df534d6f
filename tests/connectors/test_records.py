"""Records in the objects of a store: the contracts of source and sink, and what is read and written."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import time
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import zstandard

from flowlane.clock import SystemClock
from flowlane.connectors.file import FileStore
from flowlane.connectors.records import open_sink, open_source
from flowlane.connectors.writing import ObjectWriter, StoreSink
from flowlane.errors import ConfigError, Damaged, Fenced, Incomplete, Permanent, Superseded
from flowlane.ports import (
    Batch,
    Body,
    Connections,
    Cut,
    Environment,
    ObjectInfo,
    Record,
    Source,
    Split,
    Store,
)
from flowlane.state import Position
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.inflate import decoder
from flowlane.testing.sink_suite import Log, SinkSuite, cut_up, split, write
from flowlane.testing.source_suite import SourceSuite, plain, read, splits_of


class OneStore:
    """Connections with a single store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def store(self, url: str) -> Store:
        return self._store


@pytest.fixture
def environment() -> Environment:
    clock = SystemClock()
    return Environment(clock, cast(Connections, OneStore(FileStore(clock))))


def csv_rows(count: int) -> bytes:
    lines = [f'{n},"text, {n}\nand ""more""",{"" if n % 3 else "x"}' for n in range(count)]
    lines[5:5] = ["ragged", "", '"unquoted"x,1,2']
    return ("id,text,maybe\r\n" + "\r\n".join(lines) + "\n\n").encode()


def json_rows(count: int) -> bytes:
    lines = [json.dumps({"id": n, "text": f"number {n}"}) for n in range(count)]
    lines[5:5] = ["not json", "", "[1]"]
    return "\n".join(lines).encode()


def packed(data: bytes, suffix: str) -> bytes:
    """`data` in two members or frames."""
    half = len(data) // 2
    if suffix.endswith("gz"):
        return gzip.compress(data[:half], mtime=0) + gzip.compress(data[half:], mtime=0)
    if suffix.endswith("zst"):
        return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))
    return data


SUFFIXES = ["csv", "csv.gz", "csv.zst", "jsonl", "json.gz", "ndjson.zst"]


class TestStoreSource(SourceSuite):
    @pytest.fixture(params=SUFFIXES)
    async def source(
        self, request: pytest.FixtureRequest, tmp_path: Path, environment: Environment
    ) -> AsyncIterator[Source]:
        make = csv_rows if "csv" in request.param else json_rows
        for name, count in (("a", 40), ("b", 10)):
            path = tmp_path / f"{name}.{request.param}"
            path.write_bytes(packed(make(count), request.param))
        async with open_source(f"file://{tmp_path}/*.{request.param}", environment) as source:
            yield source


async def all_of(url: str, environment: Environment, **options: Any) -> list[Record]:
    async with open_source(url, environment, **options) as source:
        return [
            record
            for found in await splits_of(source)
            for batch in await read(source, found, Cut())
            for record in batch.records
        ]


async def test_what_is_read(tmp_path: Path, environment: Environment) -> None:
    (tmp_path / "a.csv.gz").write_bytes(packed(csv_rows(7), "gz"))
    async with open_source(f"file://{tmp_path}/a.csv.gz", environment) as source:
        (found,) = await splits_of(source)
        assert found.replayable
        assert found.size == (tmp_path / "a.csv.gz").stat().st_size
        (batch,) = await read(source, found, Cut())
    assert batch.records[0] == {"id": "0", "text": 'text, 0\nand "more"', "maybe": "x"}
    assert batch.records[1]["maybe"] is None
    assert [bad.row for bad in batch.bad] == [5, 6]
    assert batch.end.row == 9
    assert batch.size == found.size


async def test_sizes_add_up_to_what_was_read(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"id,text\n" + b"".join(b"%d,%s\n" % (n, os.urandom(200).hex().encode()) for n in range(9000))
    )
    async with open_source(f"file://{path}", environment) as source:
        (found,) = await splits_of(source)
        batches = await read(source, found, Cut(1000))
        assert sum(batch.size for batch in batches) == found.size
        rest = await read(source, found, Cut(1000), batches[4].end)
    assert plain(rest) == plain(batches[5:])
    assert [batch.size for batch in rest] == [batch.size for batch in batches[5:]]


@pytest.mark.parametrize("suffix", ["csv.gz", "csv.zst"])
@pytest.mark.parametrize("kept", [0.3, 0.99])
async def test_a_cut_body_is_never_taken_for_a_whole_one(
    tmp_path: Path, environment: Environment, suffix: str, kept: float
) -> None:
    whole = packed(csv_rows(3000), suffix)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(Damaged, match=f"{path}: cut"):
        await all_of(f"file://{path}", environment)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "csv.gz", "jsonl.zst"])
async def test_an_error_page_is_no_data(tmp_path: Path, environment: Environment, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(Damaged, match=r"not (gzip|zstd)|web page, not (csv|jsonl)"):
        await all_of(f"file://{path}", environment)


async def test_a_page_is_one_at_the_beginning_only(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"page\n") + gzip.compress(b"<html>404</html>\n"))
    assert await all_of(f"file://{path}", environment) == [{"page": "<html>404</html>"}]


async def test_an_object_that_was_replaced(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(csv_rows(30))
    async with open_source(f"file://{path}", environment) as source:
        (found,) = await splits_of(source)
        path.write_bytes(csv_rows(31))
        with pytest.raises(Superseded):
            await read(source, found, Cut())


async def test_names_with_a_number_sign(tmp_path: Path, environment: Environment) -> None:
    """In a file's name it is a character like any other."""
    for number in (1, 2):
        (tmp_path / f"a#{number}.csv").write_text(f"id\n{number}\n")
    ids = []
    for number in (1, 2):
        async with open_source(f"file://{tmp_path}/a#{number}.csv", environment) as source:
            (found,) = await splits_of(source)
            ids.append(found.id)
            assert [b.records for b in await read(source, found, Cut())] == [[{"id": str(number)}]]
    assert len(set(ids)) == 2
    async with open_sink(f"file://{tmp_path}/b#1.jsonl", environment) as sink:
        await load(sink, cut_up([{"id": 1}], 1))
    assert (tmp_path / "b#1.jsonl").read_bytes() == b'{"id":1}\n'


async def test_options_as_keywords(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1,2\n")
    url = f"file://{path}"
    assert await all_of(url, environment, header=False, columns=["a", "b"]) == [{"a": "1", "b": "2"}]
    wrong: list[dict[str, Any]] = [
        {"columns": 5},
        {"delimiter": 5},
        {"encoding": 5},
        {"encoding": "undefined"},
        {"encoding": "a\0b"},
        {"format": 5},
        {"null": 5},
        {"null": "€", "encoding": "latin-1"},
        {"csv": {"delimiter": ","}},
    ]
    for options in wrong:
        with pytest.raises(ConfigError, match=next(iter(options))):
            await all_of(url, environment, **options)


async def test_nothing_there(tmp_path: Path, environment: Environment) -> None:
    with pytest.raises(Incomplete, match="there is no"):
        await all_of(f"file://{tmp_path}/a.csv", environment)
    assert await all_of(f"file://{tmp_path}/*.csv", environment) == []


async def test_names_that_say_nothing(tmp_path: Path, environment: Environment) -> None:
    (tmp_path / "a.txt").write_bytes(b"id\n1\n")
    with pytest.raises(ConfigError, match="does not say what rows"):
        await all_of(f"file://{tmp_path}/a.txt", environment)
    with pytest.raises(ConfigError, match="does not say what rows"):
        await all_of(f"file://{tmp_path}/", environment)
    with pytest.raises(ConfigError, match="format='tsv'"):
        await all_of(f"file://{tmp_path}/a.txt", environment, format="tsv")
    assert await all_of(f"file://{tmp_path}/a.txt", environment, format="csv") == [{"id": "1"}]


async def test_the_dialect_by_options(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("1\tä\tNA\n".encode("latin-1"))
    options = {"delimiter": "tab", "header": "no", "columns": "a, b,c", "encoding": "latin-1", "null": "NA"}
    assert await all_of(f"file://{path}", environment, **options) == [{"a": "1", "b": "ä", "c": None}]
    base = CsvFormat(header=False, columns=["x", "y"], delimiter=";", encoding="latin-1")
    assert await all_of(f"file://{path}", environment, csv=base, delimiter="\t", columns="x,y,z") == [
        {"x": "1", "y": "ä", "z": "NA"}
    ]
    with pytest.raises(ConfigError, match="header='perhaps'"):
        await all_of(f"file://{path}", environment, header="perhaps")


class Unproven:
    """A body without a length, in a store without ETags."""

    info = ObjectInfo("https://x/a")
    proven_length = False

    def __init__(self, blocks: list[bytes]) -> None:
        self._blocks = blocks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for block in self._blocks:
            yield block


class UnprovenStore(FileStore):
    def __init__(self, blocks: list[bytes]) -> None:
        super().__init__(SystemClock())
        self._blocks = blocks

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        return ObjectInfo(url)

    def read(self, url: str, **_: Any) -> AbstractAsyncContextManager[Body]:
        @asynccontextmanager
        async def body() -> AsyncIterator[Body]:
            yield Unproven(self._blocks)

        return body()


async def test_a_body_that_proves_nothing() -> None:
    clock = SystemClock()
    environment = Environment(clock, cast(Connections, OneStore(UnprovenStore([b"id\n1\n"]))))
    with pytest.raises(Permanent, match="neither a length nor a checksum"):
        await all_of("https://x/a.csv?key=secret", environment)
    blocks = [gzip.compress(b"id\n1\n")]
    environment = Environment(clock, cast(Connections, OneStore(UnprovenStore(blocks))))
    assert await all_of("https://x/a.csv.gz", environment) == [{"id": "1"}]
    async with open_source("https://x/a.csv.gz?key=secret", environment) as source:
        (found,) = await splits_of(source)
    assert not found.replayable
    assert "secret" not in found.id


async def test_the_loop_goes_on_while_a_bomb_is_read(tmp_path: Path, environment: Environment) -> None:
    """400 MB of blank lines in 400 kB."""
    path = tmp_path / "a.csv.gz"
    path.write_bytes(
        gzip.compress(b"id\n1\n") + gzip.compress(b"\n" * (4 << 20)) * 100 + gzip.compress(b"2\n")
    )
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        last = time.thread_time()  # of CPU, as the machine may stall; a turn of the loop takes 2 ms
        while True:
            await environment.clock.sleep(0.001)
            now = time.thread_time()
            longest, last = max(longest, now - last), now

    watching = asyncio.create_task(watch())
    assert [r["id"] for r in await all_of(f"file://{path}", environment)] == ["1", "2"]
    watching.cancel()
    assert longest < 0.25


# --------------------------------------------------------------------------- sink


def contents_of(folder: Path) -> list[Record]:
    """The records in all objects there."""
    found: list[Record] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            data = path.read_bytes()
            if path.suffix == ".gz":
                data = gzip.decompress(data)
            elif path.suffix == ".zst":
                data = b"".join(decoder(path.name).feed(data))
            found += [json.loads(line) for line in data.decode().splitlines()]
    return found


class TestStoreSink(SinkSuite):
    refused: ClassVar = {"id": 99, "text": "\ud800"}

    @pytest.fixture(params=["jsonl", "jsonl.gz", "jsonl.zst"])
    async def sink(
        self, request: pytest.FixtureRequest, tmp_path: Path, environment: Environment
    ) -> AsyncIterator[StoreSink]:
        self.folder = tmp_path
        async with open_sink(f"file://{tmp_path}/", environment, format=request.param) as sink:
            yield sink

    async def contents(self) -> list[Record]:
        return contents_of(self.folder)


class TestStoreSinkAsCsv(SinkSuite):
    refused: ClassVar = {"id": 99, "text": "a", "part": 1, "new": 2}

    @pytest.fixture(params=["csv.gz", "csv"])
    async def sink(
        self, request: pytest.FixtureRequest, tmp_path: Path, environment: Environment
    ) -> AsyncIterator[StoreSink]:
        self.folder, self.environment, self.form = tmp_path, environment, request.param
        async with open_sink(f"file://{tmp_path}/", environment, format=request.param) as sink:
            yield sink

    async def contents(self) -> list[Record]:
        return await all_of(f"file://{self.folder}/", self.environment)

    def same(self, found: Record, wanted: Record) -> bool:
        return found == {name: str(value) for name, value in wanted.items()}


async def load(sink: StoreSink, batches: list[Batch], name: str = "a") -> list[list[str]]:
    """Load it all; the reasons of what was refused."""
    async with sink.open(split(name), unit()) as writer:
        reasons = [[bad.reason for bad in await write(writer, batch, None)] for batch in batches]
        await writer.finish()
    return reasons


def unit(token: int = 1) -> Any:
    return SinkSuite().by(token)


async def test_text_and_nothing_survive_csv(tmp_path: Path, environment: Environment) -> None:
    rows: list[Record] = [
        {"a": "", "b": None, "c": 'x "y",\r\nz'},
        {"a": "1", "b": 1, "c": 1.5},
        {"c": [1], "a": True},
    ]
    async with open_sink(f"file://{tmp_path}/", environment, format="csv") as sink:
        await load(sink, cut_up(rows, 10))
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == b'"a","b","c"\r\n"",,"x ""y"",\r\nz"\r\n"1",1,1.5\r\n"true",,"[1]"\r\n'
    assert await all_of(f"file://{path}", environment) == [
        {"a": "", "b": None, "c": 'x "y",\r\nz'},
        {"a": "1", "b": "1", "c": "1.5"},
        {"a": "true", "b": None, "c": "[1]"},
    ]


@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl.zst", "csv.gz"])
async def test_the_same_records_are_the_same_bytes(
    tmp_path: Path, environment: Environment, form: str
) -> None:
    found = []
    for name in ("x", "y"):
        async with open_sink(f"file://{tmp_path}/{name}/", environment, format=form) as sink:
            await load(sink, cut_up(SinkSuite.records, 6))
        (path,) = (tmp_path / name).iterdir()
        found.append((path.name, path.read_bytes()))
    assert found[0] == found[1]


async def test_each_batch_is_a_member_of_its_own(tmp_path: Path, environment: Environment) -> None:
    async with open_sink(f"file://{tmp_path}/", environment) as sink:
        await load(sink, cut_up(SinkSuite.records, 6))
    (path,) = tmp_path.iterdir()
    rest, members = path.read_bytes(), 0
    while rest:
        assert rest[4:8] == bytes(4), "MTIME of 0: no time stamp is available (RFC 1952, section 2.3.1)"
        member = zlib.decompressobj(31)
        member.decompress(rest)
        assert member.eof
        rest, members = member.unused_data, members + 1
    assert members == 4


async def test_names_tell_splits_and_units_apart(environment: Environment) -> None:
    async with open_sink("file:///out/", environment, format="csv.gz") as sink:
        urls = {sink.url(split(name), SinkSuite().by(1, stream)) for name in "ab" for stream in ("u", "v")}
        assert len(urls) == 4
        assert all(url.startswith(("file:///out/a-", "file:///out/b-")) for url in urls)
        assert all(url.endswith(".csv.gz") for url in urls)
        evil = Split("x", "https://x/..%2f..%2fetc/passwd?a=/b")
        assert "/" not in sink.url(evil, unit()).removeprefix("file:///out/")
    async with open_sink("file:///out/one.jsonl", environment) as sink:
        assert sink.url(split(), unit()) == "file:///out/one.jsonl"


async def test_another_object_is_not_written_over(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "one.jsonl"
    path.write_bytes(b"precious\n")
    async with open_sink(f"file://{path}", environment) as sink:
        with pytest.raises(Permanent, match="exists already, with another content"):
            await load(sink, cut_up(SinkSuite.records, 6))
    assert path.read_bytes() == b"precious\n"


async def test_the_same_rows_packed_otherwise_are_the_same(tmp_path: Path, environment: Environment) -> None:
    async with open_sink(f"file://{tmp_path}/", environment) as sink:
        await load(sink, cut_up(SinkSuite.records, 6))
        (path,) = tmp_path.iterdir()
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9))
        before = path.read_bytes()
        await load(sink, cut_up(SinkSuite.records, 6))
    assert path.read_bytes() == before


async def test_an_unfinished_object_that_is_gone(tmp_path: Path, environment: Environment) -> None:
    batches, log = cut_up(SinkSuite.records, 6), Log()
    async with open_sink(f"file://{tmp_path}/", environment) as sink:
        async with sink.open(split(), unit()) as writer:
            for batch in batches[:2]:
                await write(writer, batch, log)
        for part in tmp_path.iterdir():
            part.unlink()
        async with sink.open(split(), unit(2), log.resume) as writer:
            assert writer.position == Position()
            with pytest.raises(Permanent, match="is gone"):
                await write(writer, batches[2], None)
            with pytest.raises(Permanent, match="is gone"):
                await writer.finish()
            for batch in batches:
                await write(writer, batch, None)
            await writer.finish()
    assert len(contents_of(tmp_path)) == len(SinkSuite.records)


async def test_a_write_that_failed_midway_is_not_repeated(tmp_path: Path, environment: Environment) -> None:
    batch = cut_up([{"id": n, "text": os.urandom(4000).hex()} for n in range(2000)], 5000)[0]
    async with open_sink(f"file://{tmp_path}/", environment) as sink:
        async with sink.open(split(), unit()) as writer:
            task = asyncio.create_task(write_to(writer, batch))
            while not list(tmp_path.iterdir()):  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(Incomplete, match="failed midway"):
                await write(writer, batch, None)
        async with sink.open(split(), unit(2)) as writer:
            await write(writer, batch, None)
            await writer.finish()
    assert len(contents_of(tmp_path)) == 2000


async def write_to(writer: ObjectWriter, batch: Batch) -> None:
    await writer.write(batch)


@pytest.mark.parametrize(("schema", "form"), [("freeze", "csv"), ("freeze", "jsonl")])
async def test_a_frozen_schema(tmp_path: Path, environment: Environment, schema: Any, form: str) -> None:
    async with open_sink(f"file://{tmp_path}/", environment, format=form, schema=schema) as sink:
        with pytest.raises(Permanent, match="column 'b'"):
            await load(sink, cut_up([{"a": 1}, {"a": 1, "b": 2}], 1))


@pytest.mark.parametrize("form", ["jsonl", "csv"])
async def test_a_frozen_schema_is_about_columns(tmp_path: Path, environment: Environment, form: str) -> None:
    """A record that cannot be written, for a reason of its own, costs itself and not the unit."""
    rows: list[Record] = [{"id": 1}, {"id": "\ud800"}]
    async with open_sink(f"file://{tmp_path}/", environment, format=form, schema="freeze") as sink:
        ((reason,),) = await load(sink, cut_up(rows, 10))
    assert "cannot be written: 'utf-8' codec" in reason or "surrogate" in reason


@pytest.mark.parametrize(
    ("column", "csv"),
    [("\ud800", CsvFormat()), ("€", CsvFormat(encoding="latin-1")), ("a,b", CsvFormat(quote=""))],
)
async def test_columns_that_make_no_header(
    tmp_path: Path, environment: Environment, column: str, csv: CsvFormat
) -> None:
    async with open_sink(f"file://{tmp_path}/", environment, format="csv", csv=csv) as sink:
        with pytest.raises(Permanent, match=r"make no CSV header .* rename them in map"):
            await load(sink, [*cut_up([{column: 1}], 10)])


async def test_records_that_make_no_csv(tmp_path: Path, environment: Environment) -> None:
    """They cost themselves, and do not decide the columns of those behind them."""
    odd: Any = {1: "a"}
    async with open_sink(f"file://{tmp_path}/", environment, format="csv") as sink:
        reasons = await load(sink, cut_up([{}, odd, {"id": 1}], 1))
    assert reasons == [["cannot be written: a record without fields"]] * 2 + [[]]
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == b'"id"\r\n1\r\n'


async def test_a_schema_whose_strangers_are_quarantined(tmp_path: Path, environment: Environment) -> None:
    async with open_sink(f"file://{tmp_path}/", environment, format="jsonl", schema="quarantine") as sink:
        reasons = await load(sink, cut_up([{"a": 1}, {"a": 1, "b": 2}, {"a": 3}], 1))
    assert [len(some) for some in reasons] == [0, 1, 0]
    assert contents_of(tmp_path) == [{"a": 1}, {"a": 3}]


async def test_a_record_that_cannot_be_written_is_refused(tmp_path: Path, environment: Environment) -> None:
    async with open_sink(f"file://{tmp_path}/", environment) as sink:
        reasons = await load(sink, cut_up([{"a": 1}, {"a": object()}, {"a": {1: object()}}, {"a": 2}], 10))
    assert len(reasons[0]) == 2
    assert contents_of(tmp_path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("options", [{"format": "parquet"}, {"schema": "perhaps"}])
async def test_options_that_are_wrong(environment: Environment, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"format=|schema="):
        async with open_sink("file:///out/", environment, **options):
            pass


async def test_a_resume_string_of_somebody_else(tmp_path: Path, environment: Environment) -> None:
    async with open_sink(f"file://{tmp_path}/", environment) as sink:
        for resume in ("x", "{}", '{"upload":"../x"}'):
            with pytest.raises((Permanent, Fenced)):
                async with sink.open(split(), unit(), resume):
                    pass


@pytest.mark.parametrize("logged", [1, 2, 4])
async def test_a_finished_object_is_known_again(
    tmp_path: Path, environment: Environment, logged: int
) -> None:
    """Dead between the commit and its log entry: the next attempt goes on from the log's position, as if the
    object were not finished, and ends without having written a byte."""
    batches, log = cut_up(SinkSuite.records, 5), Log()
    async with open_sink(f"file://{tmp_path}/", environment) as sink:
        async with sink.open(split(), unit()) as writer:
            for number, batch in enumerate(batches):
                await write(writer, batch, log if number < logged else None)
            await writer.finish()
        (path,) = tmp_path.iterdir()
        before = path.stat().st_mtime_ns, path.stat().st_ino
        async with sink.open(split(), unit(2), log.resume) as writer:
            assert writer.position == log.position
            for batch in batches[logged:]:
                await write(writer, batch, None)
            await writer.finish()
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
        assert list(tmp_path.iterdir()) == [path]
        async with sink.open(split(), unit(3), log.resume) as writer:
            changed = cut_up([{"id": -n} for n in range(20)], 5)
            for batch, other in zip(batches[logged:], changed[logged:], strict=True):
                batch.records = other.records
                await write(writer, batch, None)
            if logged < len(batches):
                with pytest.raises(Permanent, match="another content"):
                    await writer.finish()
