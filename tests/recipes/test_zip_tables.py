"""``zip_tables`` as a user runs it: real zips in a folder, tables in a SQLite file, embedded backends."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import os
import sqlite3
import struct
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlane import ConfigError, CsvFormat, Event, Lane, Permanent, Policy, Retryable, ZipLimits, archive
from flowlane.attempt import Attempt
from flowlane.backends.memory import MemoryBackend
from flowlane.cli.graph import yields
from flowlane.cli.verbs import cli
from flowlane.clock import SystemClock
from flowlane.compose import Application, open_application
from flowlane.plan import plan
from flowlane.ports import Backend, Commit, Publish
from flowlane.recipes import drops, zip_tables
from flowlane.recipes.zip_tables import Allowed
from flowlane.redrive import redrive
from flowlane.report import Report
from flowlane.settings import Settings
from flowlane.state import progress
from flowlane.status import LogView
from flowlane.testing.lying_server import LyingServer
from flowlane.testing.oracle import check
from flowlane.worker import run_once
from tests.streams.zip.making import Made, encrypted
from tests.streams.zip.making import archive as made

QUICK = Policy(retries=1, backoff="1ms", backoff_cap="5ms")
BY_ID = {"partition_key": "id"}


def zipped(files: Mapping[str, str | bytes | dict[str, Any]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive of `files`, in that order; dicts are manifests."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, json.dumps(content) if isinstance(content, dict) else content)
    return target.getvalue()


def csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """`rows`, which have the same fields."""
    listed = list(rows)
    head = ",".join(listed[0])
    return head + "\n" + "".join(",".join(map(str, row.values())) + "\n" for row in listed)


class Site:
    """A folder of zips, a file for tables, and one backend for all runs: what the tests below stand on."""

    def __init__(self, folder: Path, backend: str = "memory") -> None:
        self.folder = folder
        self.drops = folder / "drops"
        self.drops.mkdir()
        self.tables = folder / "tables.db"
        self.clock = SystemClock()
        self.settings = Settings(
            backend="memory://" if backend == "memory" else f"sqlite:///{folder}/flow.db",
            allow_private_hosts=True,
        )
        self.kept: Backend | None = MemoryBackend(self.clock) if backend == "memory" else None
        self._moment = 1_700_000_000

    def put(self, name: str, data: bytes | Mapping[str, Any]) -> Path:
        """A zip, put there a minute after the one before it."""
        path = self.drops / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else zipped(data))
        self._moment += 60
        os.utime(path, (self._moment, self._moment))
        return path

    def lane(self, **options: Any) -> Lane:
        """The lane over the folder, with any table allowed, or as `options` say."""
        given: dict[str, Any] = {
            "source": self.drops.as_uri() + "/",
            "to": f"sqlite:///{self.tables}",
            "tables": "*",
            "policy": QUICK,
        }
        return zip_tables("zips", **{**given, **options})

    @asynccontextmanager
    async def app(self, lane: Lane) -> AsyncIterator[Application]:
        """The lane, opened as by one process."""
        async with open_application([lane], self.settings, clock=self.clock, backend=self.kept) as app:
            yield app

    async def run(self, lane: Lane | None = None) -> Report:
        """One run in a process of its own; what the log must fulfil is checked after it."""
        lane = lane or self.lane()
        async with self.app(lane) as app:
            report = await run_once(app, lane)
            assert await check(app.backend, lane) == []
        return report

    async def redrive(self, lane: Lane, units: Sequence[str] = ()) -> list[str]:
        """Redrive `units`, or all that is dead, and see them through."""
        async with self.app(lane) as app:
            done = await redrive(app.engine, lane.name, units)
        await self.run(lane)
        return done

    async def dead(self, lane: Lane | None = None) -> dict[str, str]:
        """The reason of each dead unit, by what its stream ends with."""
        async with self.app(lane or self.lane()) as app:
            heads = [head async for head in app.backend.units("zips", "dead")]
        return {
            head.subject.rpartition("/")[2].split(".zip@")[0] + ".zip" + _index(head): progress(head).reason
            for head in heads
        }

    async def log(self) -> list[Event]:
        """Every event of the lane."""
        async with self.app(self.lane()) as app:
            return [event async for event in app.backend.scan("zips")]

    def rows(self, table: str, order: str = "id") -> list[dict[str, Any]]:
        """The rows of a table, without flowlane's own column."""
        connection = sqlite3.connect(self.tables)
        try:
            connection.row_factory = sqlite3.Row
            found = connection.execute(f'SELECT * FROM "{table}" ORDER BY "{order}"')
            return [{k: v for k, v in dict(row).items() if k != "_flowlane_generation"} for row in found]
        finally:
            connection.close()

    def names(self) -> set[str]:
        """The tables that there are."""
        connection = sqlite3.connect(self.tables)
        try:
            found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            return {name for (name,) in found if not name.startswith("_flowlane")}
        finally:
            connection.close()

    def quarantined(self) -> list[dict[str, Any]]:
        """All bad records."""
        files = sorted(self.folder.rglob("quarantine/**/*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _index(head: Event) -> str:
    return "#" + head.subject.rpartition("@")[2] if head.stage == "load" else ""


@pytest.fixture(params=["memory", "sqlite"])
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.chdir(tmp_path)
    return Site(tmp_path, request.param)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """For what no backend has a part in."""
    monkeypatch.chdir(tmp_path)
    return Site(tmp_path)


def data(event: Event) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(event.data)
    return found


# --------------------------------------------------------------------------- what is loaded


async def test_each_file_is_loaded_into_its_table_and_once(site: Site) -> None:
    orders = [{"id": n, "amount": n * 2} for n in range(100)]
    site.put(
        "a.zip",
        {
            "orders.csv": csv(orders),
            "orders.json": {"partition_key": "id", "partition_key_type": "N"},
            "in/people.jsonl": '{"mail": "a@b", "age": 7, "tags": ["x"]}\n{"mail": "c@d", "age": 8}\n',
            "in/people.json": {"table": "persons", "partition_key": "mail"},
        },
    )
    site.put(
        "b.ZIP",
        {
            "more.csv.gz": gzip.compress(b"id,amount\n100,x\n"),
            "more.json": {"table": "orders", "partition_key": {"name": "id", "type": "N"}},
        },
    )
    first = await site.run()
    assert (first.outcome, first.units["found"], first.records["out"]) == ("settled", 5, 103)
    assert site.rows("orders") == [{"id": n, "amount": str(n * 2)} for n in range(100)] + [
        {"id": 100, "amount": "x"}
    ]
    assert site.rows("persons", "mail") == [
        {"mail": "a@b", "age": 7, "tags": '["x"]'},
        {"mail": "c@d", "age": 8, "tags": None},
    ]
    again = await site.run()
    assert (again.outcome, again.units["found"], again.records["in"]) == ("settled", 0, 0)


async def test_looking_again_costs_one_question_to_the_log_for_many_zips(
    quick: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = zipped({"x.csv": "id\n1\n", "x.json": BY_ID})
    for n in range(300):
        quick.put(f"{n:03}.zip", content)
    await quick.run()
    assert isinstance(quick.kept, MemoryBackend)
    calls: Counter[str] = Counter()
    original = quick.kept.last

    async def last(streams: Sequence[str]) -> Mapping[str, Event]:
        calls["asked"] += 1
        calls["streams"] += len(streams)
        return await original(streams)

    monkeypatch.setattr(quick.kept, "last", last)
    lane = quick.lane()
    async with quick.app(lane) as app:
        found = [item async for item in plan(app.engine, lane)]
    assert found == []
    assert calls["asked"] <= 1 + 300 // drops.ASKED + 1  # and one for the fact
    assert calls["streams"] <= 302


async def test_more_new_zips_than_are_held_at_once_are_all_found_in_order(
    quick: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("drops", "zip_tables"):
        monkeypatch.setattr(sys.modules[f"flowlane.recipes.{module}"], "HELD", 100)
    content = zipped({"x.csv": "id\n1\n", "x.json": BY_ID})
    names = [f"{(n * 37) % 450:03}.zip" for n in range(450)]
    for name in names:
        quick.put(name, content)
    lane = quick.lane()
    async with quick.app(lane) as app, asyncio.timeout(60):
        assert [item.url.rpartition("/")[2] async for item in plan(app.engine, lane)] == names
    report = await quick.run()
    assert report.units == {"found": 900, "settled": 900, "dead": 0, "skipped": 0, "superseded": 0}
    found = {
        data(e)["url"].rpartition("/")[2]: data(e)["generation"]
        for e in await quick.log()
        if e.type == "drop"
    }
    assert sorted(found, key=lambda name: found[name]) == names, "in the order of their dates"
    assert len(set(found.values())) == 450


async def test_a_pattern_one_zip_and_a_folder_without_a_slash(quick: Site) -> None:
    content = zipped({"x.csv": "id\n1\n", "x.json": BY_ID})
    for name in ("a.zip", "b.zip", "sub/c.zip", "d.txt", "zip"):
        quick.put(name, content)
    base = quick.drops.as_uri()

    async def found(source: str) -> set[str]:
        lane = quick.lane(source=source)
        async with quick.app(lane) as app:
            return {item.url.removeprefix(base + "/") async for item in plan(app.engine, lane)}

    assert await found(base + "/") == {"a.zip", "b.zip", "sub/c.zip"}
    assert await found(base) == {"a.zip", "b.zip", "sub/c.zip"}
    assert await found(base + "/a*") == {"a.zip"}
    assert await found(base + "/b.zip") == {"b.zip"}
    assert await found(base + "/none.zip") == set()


async def test_suffixes_are_told_in_any_case(quick: Site) -> None:
    whole = {"X.CSV": {"table": "x", **BY_ID}, "PART": {"table": "p", **BY_ID}}
    quick.put("a.ZIP", {"A/X.CSV": "id\n1\n", "A/PART": "id\n1\n", "A/MANIFEST.JSON": whole})
    quick.put("b.zip", {"Y.JSONL": '{"id": "1"}', "Y.JSON": {"table": "y", **BY_ID}})
    named = {"z.csv": BY_ID}
    quick.put("c.zip", {"z.csv": "id\n1\n", "manifest.json": named, "Manifest.json": named})
    sidecar = json.dumps({"table": "v", "files": {}, **BY_ID})
    quick.put("d.zip", {"V.CSV": "id\n1\n", "V.JSON": sidecar + " " * 2000})
    folder = json.dumps({"W.CSV": {"table": "w", **BY_ID}})
    quick.put("e.zip", {"W.CSV": "id\n1\n", "MANIFEST.JSON": folder + " " * 2000})
    lane = quick.lane(limits=ZipLimits(manifest=1000))
    await quick.run(lane)
    assert quick.names() == {"x", "p", "y"}
    dead = await quick.dead(lane)
    assert "there are 2 manifests 'Manifest.json': leave one of them" in dead.pop("c.zip#0")
    assert set(dead) == {"d.zip#0", "e.zip#0"}
    await quick.redrive(quick.lane())
    assert quick.names() == {"x", "p", "y", "v", "w"}


async def test_a_key_that_is_written_in_other_cases_is_said(quick: Site) -> None:
    quick.put("a.zip", {"x.jsonl": '{"ID": "1"}\n', "x.json": BY_ID})
    await quick.run()
    (bad,) = quick.quarantined()
    assert bad["reason"] == "no value for its key id: it has ID, which is another name"


async def test_a_file_whose_header_has_no_key_is_dead_until_the_lane_can_read_it(quick: Site) -> None:
    """Each of its rows alone would be bad: few enough not to count beside those of the other files."""
    many = "id,n\n" + "".join(f"{number},a\n" for number in range(1000))
    quick.put("a.zip", {"x.csv": many, "x.json": BY_ID, "y.csv": "id;n\n1;a\n", "y.json": BY_ID})
    report = await quick.run()
    assert (report.outcome, report.records["quarantined"]) == ("failed", 0)
    (dead,) = report.dead
    assert "'y.csv'): it has no column id, which is its key by its manifest, but 'id;n'" in dead["reason"]
    await quick.redrive(quick.lane(csv=CsvFormat(delimiter=";")))
    assert quick.rows("y") == [{"id": "1", "n": "a"}]


async def test_a_header_without_the_key_is_no_matter_where_the_lane_makes_it(quick: Site) -> None:
    quick.put("a.zip", {"x.csv": "ID\n1\n\n", "x.json": BY_ID})
    lane = quick.lane(map=lambda record: {"id": record["ID"]})
    assert (await quick.run(lane)).outcome == "settled"
    assert quick.rows("x") == [{"id": "1"}]


async def test_a_zip_on_the_web_is_loaded_again_when_it_changes(quick: Site) -> None:
    async with LyingServer() as server:
        server.serve("/day.zip", zipped({"x.csv": "id,n\n1,a\n", "x.json": BY_ID}))
        lane = quick.lane(source=server.url("/day.zip"))
        assert (await quick.run(lane)).units["settled"] == 2
        assert (await quick.run(lane)).units["found"] == 0
        server.serve("/day.zip", zipped({"x.csv": "id,n\n1,b\n", "x.json": BY_ID}))
        assert (await quick.run(lane)).units["settled"] == 2
        assert quick.rows("x") == [{"id": "1", "n": "b"}]
        server.remove("/day.zip")
        gone = await quick.run(lane)
        assert (gone.outcome, "there is no" in gone.reason) == ("failed", True)


async def test_the_same_name_with_new_content_is_loaded_over_the_old(site: Site) -> None:
    site.put("a.zip", {"x.csv": "id,n\n1,old\n2,old\n", "x.json": BY_ID})
    await site.run()
    site.put("a.zip", {"x.csv": "id,n\n1,new\n", "x.json": BY_ID})
    report = await site.run()
    assert report.units["settled"] == 2
    assert site.rows("x") == [{"id": "1", "n": "new"}, {"id": "2", "n": "old"}]


async def test_files_of_one_zip_apply_in_the_order_of_its_directory(quick: Site) -> None:
    parts = {f"part-{n}.csv": f"id,n\n1,{n}\n{n},x\n" for n in range(2, 6)}
    quick.put("a.zip", {"manifest.json": {"table": "x", **BY_ID}, **parts})
    await quick.run(quick.lane(tables=["nothing"]))
    async with quick.app(quick.lane()) as app:
        dead = sorted([head.subject async for head in app.backend.units("zips", "dead")])
    for unit in reversed(dead):
        await quick.redrive(quick.lane(), [unit])
    assert quick.rows("x") == [{"id": "1", "n": "5"}, *({"id": str(n), "n": "x"} for n in range(2, 6))]


async def test_one_manifest_for_the_whole_zip(quick: Site) -> None:
    quick.put(
        "a.zip",
        {
            "orders.csv": "id\n1\n",
            "old/orders.csv": "id\n2\n",
            "events.json": '{"id": 3}\n',
            "table.dat": "id\n4\n",
            "own.csv": "id\n5\n",
            "own.json": {"table": "owned", **BY_ID},
            "left.csv": "id\n6\n",
            "manifest.json": {
                "orders.csv": {"table": "orders", **BY_ID},
                "old/orders.csv": {"table": "orders", **BY_ID},
                "events.json": BY_ID,
                "table.dat": BY_ID,
                "own.csv": {"table": "other", **BY_ID},
            },
        },
    )
    report = await quick.run()
    assert (report.units["settled"], report.units["dead"]) == (7, 1)
    assert quick.names() == {"orders", "events", "table", "owned"}
    assert [r["id"] for r in quick.rows("orders")] == ["1", "2"]
    assert list(await quick.dead()) == ["a.zip#6"]
    assert "has no manifest" in (await quick.dead())["a.zip#6"]


async def test_what_is_passed_over_is_counted_in_the_log(quick: Site) -> None:
    quick.put(
        "a.zip",
        {
            "x.csv": "id\n1\n",
            "x.json": BY_ID,
            "README.txt": "hello",
            "meta.json": "{}",
            "__MACOSX/._x.csv": "",
            ".DS_Store": "",
            "d/": "",
        },
    )
    quick.put("b.zip", {"x.csv": "id\n2\n", "x.json": BY_ID})
    assert (await quick.run()).units == {"found": 4, "settled": 4, "dead": 0, "skipped": 0, "superseded": 0}
    told = [progress(e).steps for e in await quick.log() if e.type == "step.done"]
    assert told == [
        {"passed-over": {"directories": 1, "litter": 2, "others": 2, "names": ["README.txt", "meta.json"]}}
    ]


async def test_what_a_manifest_names_and_is_not_there_is_told_in_the_log(quick: Site) -> None:
    files = {"y.csv": {"partition_key": "id"}, "w.csv": {"partition_key": "id"}}
    quick.put("a.zip", {"d/y.csv": "id\n1\n", "d/manifest.json": files})
    quick.put("b.zip", {"y.csv": "id\n2\n", "w.csv": "id\n1\n", "manifest.json": files})
    assert (await quick.run()).outcome == "settled"
    told = [progress(e).steps for e in await quick.log() if e.type == "step.done"]
    nothing = {"directories": 0, "litter": 0, "others": 0, "names": []}
    assert told == [{"passed-over": {**nothing, "absent": 1, "absent_names": ["d/w.csv"]}}]


async def test_dialects_maps_and_inferred_types(quick: Site) -> None:
    quick.put(
        "a.zip",
        {
            "x.csv": "id|n|p|flag|z\n007|7|1.5|true|null\n8|007|1.50|no|\n",
            "x.json": {**BY_ID, "sort_key": "n", "sort_key_type": "N"},
        },
    )
    seen: list[dict[str, Any]] = []

    def map(record: dict[str, Any]) -> dict[str, Any] | None:
        seen.append(dict(record))
        return record

    async def enrich(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**record, "more": 1} for record in records]

    await quick.run(quick.lane(types="infer", csv=CsvFormat(delimiter="|"), map=map, enrich=enrich))
    assert seen == [
        {"id": "007", "n": 7, "p": Decimal("1.5"), "flag": True, "z": None},
        {"id": 8, "n": "007", "p": "1.50", "flag": "no", "z": None},
    ]
    assert quick.rows("x") == [
        {"id": "007", "n": 7, "p": "1.5", "flag": 1, "z": None, "more": 1},
        {"id": "8", "n": 7, "p": "1.50", "flag": "no", "z": None, "more": 1},
    ]


async def test_keys_of_every_type(quick: Site) -> None:
    quick.put(
        "n.zip",
        {"n.csv": "id,v\n1,a\n01,b\n1.0,c\n2.50,d\n2.5,e\n", "n.json": {**BY_ID, "partition_key_type": "N"}},
    )
    b = base64.b64encode(b"\x00\x01").decode()
    quick.put("b.zip", {"b.csv": f"id,v\n{b},a\n", "b.json": {**BY_ID, "partition_key_type": "B"}})
    await quick.run()
    assert quick.rows("n", "v") == [{"id": 1, "v": "c"}, {"id": "2.5", "v": "e"}]
    assert quick.rows("b") == [{"id": b"\x00\x01", "v": "a"}]


async def test_appending_needs_no_key(quick: Site) -> None:
    quick.put("a.zip", {"x.csv": "id\n1\n1\n", "x.json": {}})
    assert "names no partition_key" in "".join((await quick.run()).dead[0]["reason"])
    assert await quick.redrive(quick.lane(mode="append"))
    assert quick.rows("x") == [{"id": "1"}, {"id": "1"}]


# --------------------------------------------------------------------------- what is bad


def broken_crc(content: bytes, of: str) -> bytes:
    """`content` with another CRC for the file `of`, in both of its headers."""
    for at in (content.index(of.encode()) - 16, content.rindex(of.encode()) - 30):
        content = content[:at] + struct.pack("<I", 1) + content[at + 4 :]
    return content


async def test_what_is_bad_is_dead_with_its_reason_and_the_rest_goes_on(site: Site) -> None:
    good: dict[str, Any] = {"x.csv": "id\n1\n", "x.json": BY_ID}
    whole = zipped(good)
    site.put("0-html.zip", b"<html>not found</html>")
    site.put("1-empty.zip", b"")
    site.put("2-cut.zip", whole[:-30])
    site.put("3-half.zip", whole[: len(whole) // 2])
    site.put("4-crc.zip", broken_crc(whole, "x.csv"))
    site.put("5-lzma.zip", zipped(good, zipfile.ZIP_LZMA))
    bad = {
        "none.csv": "id\n1\n",
        "noise.csv": "id\n1\n", "noise.json": "{nope",
        "sql.csv": "id\n1\n", "sql.json": {"table": "x; DROP TABLE x", **BY_ID},
        "path.csv": "id\n1\n", "path.json": {"table": "../../x", **BY_ID},
        "long.csv": "id\n1\n", "long.json": {"table": "x" * 64, **BY_ID},
        "camel.csv": "id\n1\n", "camel.json": {"partitionKey": "id"},
        "secret.csv": "id\n1\n", "secret.json": {"table": "salaries", **BY_ID},
        "../up.csv": "id\n1\n", "../up.json": {"table": "x", **BY_ID},
        "html.csv": "id\n1\n", "html.json": "<html>",
        "big.csv": "id\n1\n", "big.json": b" " * (1 << 20) + b"{} ",
        "y.csv": "id\n1\n", "y.json": BY_ID,
    }  # fmt: skip
    site.put("6-bad.zip", bad)
    site.put("7-good.zip", good)
    lane = site.lane(tables=["x", "y"])
    report = await site.run(lane)
    dead = await site.dead(lane)
    wanted = {
        "0-html.zip": "not a zip", "1-empty.zip": "", "2-cut.zip": "", "3-half.zip": "",
        "4-crc.zip#0": "CRC", "5-lzma.zip#0": "LZMA",
        "6-bad.zip#0": "has no manifest: there is no 'none.json'",
        "6-bad.zip#1": "its manifest 'noise.json': it is no JSON",
        "6-bad.zip#3": "no plain name", "6-bad.zip#5": "no plain name", "6-bad.zip#7": "63 at most",
        "6-bad.zip#9": "field 'partitionKey' is not known: write partition_key",
        "6-bad.zip#11": "table 'salaries' is not allowed",
        "6-bad.zip#13": "",
        "6-bad.zip#15": "is no JSON",
        "6-bad.zip#17": "not read whole",
    }  # fmt: skip
    assert set(dead) == set(wanted)
    for unit, said in wanted.items():
        assert said in dead[unit], (unit, dead[unit])
        assert "\n" not in dead[unit]
    assert report.outcome == "failed"
    assert site.names() == {"x", "y"}
    assert site.rows("x") == [{"id": "1"}]
    heads = {e.subject: progress(e) for e in await site.log() if e.type == "unit.dead"}
    tried = {now.attempt for now in heads.values()}
    assert tried <= {0, 1}, "what is pinned and damaged stays so: nobody tries again"
    assert (await site.run(lane)).units["found"] == 0


@pytest.mark.parametrize("web", [False, True], ids=["by its ETag", "without an ETag"])
async def test_what_is_damaged_within_a_member_says_which_one_it_is(quick: Site, web: bool) -> None:
    cut = zipped({"old/x.csv.gz": gzip.compress(b"id\n1\n")[:-5], "old/x.json": BY_ID})
    async with LyingServer() as server:
        server.serve("/a.zip", cut, etags=[""])
        quick.put("a.zip", cut)
        lane = quick.lane(**({"source": server.url("/a.zip")} if web else {}))
        await quick.run(lane)
        (reason,) = (await quick.dead(lane)).values()
    assert reason.startswith("entry 0 ('old/x.csv.gz'): ")
    assert "cut: the body ends inside" in reason


def test_the_graph_says_what_each_stage_finds(quick: Site) -> None:
    lane = quick.lane()
    assert {stage.name: yields(lane, stage) for stage in lane.stages} == {
        "find": ["drop"],
        "look": ["member"],
        "load": [],
    }


async def test_sixty_thousand_empty_members_are_refused_and_the_rest_goes_on(quick: Site) -> None:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for n in range(60_000):
            archive.writestr(zipfile.ZipInfo(f"{n}.csv"), b"")
    quick.put("a.zip", target.getvalue())
    quick.put("b.zip", {"x.csv": "id\n1\n", "x.json": BY_ID})
    await quick.run()
    assert "60,000" in (await quick.dead())["a.zip"]
    assert quick.rows("x") == [{"id": "1"}]


async def test_bad_rows_are_quarantined_with_file_member_row_and_reason(quick: Site) -> None:
    rows = ["id,n", *(f"{n},a" for n in range(10)), ",empty", "x,word", "11,a,b,c", "12,a"]
    quick.put(
        "a.zip", {"in/x.csv": "\n".join(rows) + "\n", "in/x.json": {**BY_ID, "partition_key_type": "N"}}
    )
    report = await quick.run(quick.lane(policy=Policy(error_budget=0.5, retries=0)))
    assert report.records == {"in": 14, "expanded": 0, "out": 11, "skipped": 0, "quarantined": 3}
    bad = quick.quarantined()
    assert [(b["url"].rpartition("/")[2], b["member"]) for b in bad] == [("a.zip", "in/x.csv")] * 3
    assert sorted(b["row"] for b in bad) == [10, 11, 12]
    told = {b["row"]: b["reason"] for b in bad}
    assert told[10] == "no value for its key id"
    assert "'word'" not in told[11]
    assert "no number" in told[11]
    assert len(quick.rows("x")) == 11


async def test_a_redrive_follows_the_changed_lane(site: Site) -> None:
    site.put("a.zip", {"x.csv": "id\n1\n", "x.json": BY_ID, "y.csv": "id\n1\n", "y.json": BY_ID})
    assert (await site.run(site.lane(tables=["x"]))).units["dead"] == 1
    assert site.names() == {"x"}
    lane = site.lane(tables={"x": "x", "y": "why"})
    assert len(await site.redrive(lane)) == 1
    assert site.names() == {"x", "why"}
    assert await site.dead(lane) == {}
    ends = [progress(e).report["outcome"] for e in await site.log() if e.type == "run.completed"]
    assert ends[:2] == ["failed", "settled"]


async def test_what_limits_refuse_is_judged_again_under_other_limits(quick: Site) -> None:
    spaces = " " * 5000
    quick.put(
        "a.zip",
        {
            "x.csv": "id\n1\n",
            "x.json": json.dumps(BY_ID) + spaces,
            "y.csv": "id\n2\n",
            "z.dat": "id\n3\n",
            "README": "",
            "manifest.json": json.dumps({"y.csv": {"table": "y", **BY_ID}, "z.dat": {"table": "z", **BY_ID}})
            + spaces,
        },
    )
    tight = quick.lane(limits=ZipLimits(manifest=1000))
    await quick.run(tight)
    dead = await quick.dead()
    assert set(dead) == {"a.zip#0", "a.zip#2", "a.zip#3", "a.zip#4"}
    assert all("not read whole" in reason for reason in dead.values())
    await quick.redrive(quick.lane())
    assert quick.names() == {"x", "y", "z"}, "what only the manifest makes data is not forgotten"
    assert await quick.dead() == {}
    ended = [e for e in await quick.log() if e.type == "unit.skipped"]
    assert len(ended) == 1
    assert "no manifest names it" in progress(ended[0]).reason


async def test_what_is_encrypted_waits_for_its_password(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.dumps(BY_ID).encode()
    members = [
        Made(b"open.csv", b"id\n1\n"),
        Made(b"open.json", manifest),
        encrypted(b"secret.csv", b"id\n2\n", b"hunter2"),
        encrypted(b"secret.json", manifest, b"hunter2"),
    ]
    site.put("a.zip", made(members))
    await site.run()
    assert site.names() == {"open"}
    assert "give its password" in (await site.dead())["a.zip#2"]
    monkeypatch.setenv("ZIP_PASSWORD", "hunter3")
    lane = site.lane(password="env://ZIP_PASSWORD")
    await site.redrive(lane)
    assert "password is wrong" in (await site.dead())["a.zip#2"]
    monkeypatch.setenv("ZIP_PASSWORD", "hunter2")
    await site.redrive(lane)
    assert await site.dead() == {}
    assert site.rows("secret") == [{"id": "2"}]
    assert not [e for e in await site.log() if b"hunter" in bytes(e.data)]


async def test_by_the_stream_a_lie_is_found_when_its_rows_are_out(quick: Site) -> None:
    good: dict[str, Any] = {"x.csv": csv({"id": n} for n in range(3000)), "x.json": BY_ID}
    quick.put("a.zip", broken_crc(zipped(good), "x.csv"))
    policy = Policy(retries=3, backoff="1ms", batch=1000)
    await quick.run(quick.lane(verify="stream", policy=policy))
    assert "rows of it had gone out" in (await quick.dead())["a.zip#0"]
    assert quick.rows("x")
    other = Site(quick.folder / "drops")
    other.put("a.zip", broken_crc(zipped(good), "x.csv"))
    await other.run(other.lane(policy=policy))
    assert "CRC" in (await other.dead())["a.zip#0"]
    assert other.names() == set(), "with verify=content no row goes out"


def test_the_command_line_tells_of_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path)
    site.put("a.zip", {"x.csv": "id,n\n1,a\n", "x.json": BY_ID, "y.csv": "id\n1\n", "y.json": BY_ID})
    site.put("b.zip", b"nothing")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FLOWLANE_")]:
        monkeypatch.delenv(name)

    def lane(tables: list[str]) -> None:
        given = f"source={site.drops.as_uri() + '/'!r}, to='sqlite:///{site.tables}', tables={tables}"
        Path("lane.py").write_text(
            "from flowlane.recipes import zip_tables\n" + f"lane = zip_tables('zips', {given})\n"
        )

    def call(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(cli, [*arguments, "--json"])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    lane(["x"])
    assert call("plan", "lane.py")["units"] == 2
    first = call("run", "lane.py", code=1)
    assert first["units"] == {"found": 4, "settled": 4, "dead": 2, "skipped": 0, "superseded": 0}
    assert [each["change"] for each in first["changes"]] == ["table x was made: id, n"]
    assert call("status", "lane.py")["dead"] == 2
    told = {
        each["unit"].rpartition("/")[2].partition("@")[0]: each["reason"]
        for each in call("dead", "lane.py")["dead"]
    }
    assert "'y' is not allowed" in told["a.zip"]
    assert "not a zip" in told["b.zip"]
    traced = call("trace", "lane.py")["events"]
    changes = [
        t["changes"] for e in traced for t in e["data"].get("transfers", {}).values() if "changes" in t
    ]
    assert changes
    assert {tuple(each) for each in changes} == {("table x was made: id, n",)}
    lane(["x", "y"])
    (dead,) = [each["unit"] for each in call("dead", "lane.py")["dead"] if "/member/" in each["unit"]]
    assert call("redrive", "lane.py", dead)["count"] == 1
    call("run", "lane.py", code=1)  # the drop that is no zip is dead still
    assert site.names() == {"x", "y"}
    assert call("dead", "lane.py")["count"] == 1
    human = CliRunner().invoke(cli, ["trace", "lane.py", first["run"]])
    assert "table x was made: id, n" in human.output


async def test_two_manifests_of_one_name_are_not_chosen_from(quick: Site) -> None:
    names = ["x.csv", "x.csv", "x.json", "x.json", "in/y.csv", "in/manifest.json", "in/manifest.json"]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            content = json.dumps(BY_ID) if name.endswith("json") else "id\n1\n"
            archive.writestr(zipfile.ZipInfo(f"{len(archive.filelist)}"), content)
            archive.filelist[-1].filename = archive.filelist[-1].orig_filename = name
    quick.put("a.zip", target.getvalue())
    await quick.run()
    dead = await quick.dead()
    assert set(dead) == {"a.zip#0", "a.zip#1", "a.zip#4"}
    assert all("there are 2 manifests" in reason for reason in dead.values())


async def test_a_name_that_is_too_long_for_an_event_holds_no_other_up(quick: Site) -> None:
    long = "é" * 30_000 + ".csv"
    quick.put("a.zip", {long: "id\n1\n", "x.csv": "id\n1\n", "x.json": BY_ID})
    await quick.run()
    assert list(await quick.dead()) == ["a.zip#0"]
    assert "characters" in (await quick.dead())["a.zip#0"]
    assert quick.rows("x") == [{"id": "1"}]


# --------------------------------------------------------------------------- columns that come later


async def test_a_new_column_is_added_and_said(site: Site) -> None:
    lane = site.lane()
    site.put("a.zip", {"x.csv": "id,n\n1,a\n", "x.json": BY_ID})
    async with site.app(lane) as app:
        first = await run_once(app, lane)
        site.put("b.zip", {"x.csv": "id,n,m\n2,b,c\n", "x.json": BY_ID})
        second = await run_once(app, lane)
    assert [told["change"] for told in first.changes] == ["table x was made: id, n"]
    assert [told["change"] for told in second.changes] == ["table x: column m was added"]
    assert second.changes[0]["unit"].startswith("zips/member/")
    assert site.rows("x") == [{"id": "1", "n": "a", "m": None}, {"id": "2", "n": "b", "m": "c"}]
    logged = [
        progress(e).transfers["load-1"].changes
        for e in await site.log()
        if e.type == "unit.settled" and progress(e).transfers
    ]
    assert sorted(logged) == [("table x was made: id, n",), ("table x: column m was added",)]
    assert (await site.run()).changes == []


async def test_a_frozen_schema_takes_no_new_column(quick: Site) -> None:
    quick.put("a.zip", {"x.csv": "id\n1\n", "x.json": BY_ID})
    frozen = Policy(retries=0, schema="freeze")
    await quick.run()
    quick.put("b.zip", {"x.csv": "id,m\n2,c\n", "x.json": BY_ID})
    await quick.run(quick.lane(policy=frozen))
    assert "has no column 'm'" in (await quick.dead())["b.zip#0"]
    assert quick.rows("x") == [{"id": "1"}]


# --------------------------------------------------------------------------- order


#: The values of some keys, in a column of the drop's choice: later drops may have others than earlier ones.
_drop = st.tuples(
    st.sampled_from("vw"), st.dictionaries(st.integers(0, 5), st.integers(0, 99), min_size=1, max_size=5)
)


@st.composite
def _histories(draw: st.DrawFn) -> tuple[list[tuple[str, dict[int, int]]], list[list[int]], list[int]]:
    """Two or three drops; their members in any order, some loaded at the same time; some delivered twice."""
    made = draw(st.lists(_drop, min_size=2, max_size=3))
    order = draw(st.permutations(range(len(made))))
    cuts = sorted(draw(st.sets(st.integers(1, len(made) - 1))))
    groups = [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, len(made)], strict=True)]
    return made, groups, draw(st.lists(st.sampled_from(range(len(made))), max_size=3))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_histories())
def test_drops_in_any_order_leave_what_they_leave_in_order(
    history: tuple[list[tuple[str, dict[int, int]]], list[list[int]], list[int]],
) -> None:
    made, groups, doubled = history
    wanted: dict[str, dict[str, str]] = {}
    for column, drop in made:
        wanted |= {str(key): {column: f"{value}"} for key, value in drop.items()}

    async def load() -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            site = Site(Path(folder))
            for n, (column, drop) in enumerate(made):
                rows = csv({"id": key, column: value} for key, value in drop.items())
                site.put(f"{n}.zip", {"x.csv": rows, "x.json": BY_ID})
            closed = site.lane(tables=["nothing"], policy=Policy(retries=0, batch=2))
            await site.run(closed)  # registered in order, loaded by redrives in any
            async with site.app(closed) as app:
                units = {
                    head.subject.split(".zip@")[0][-1]: head.subject
                    async for head in app.backend.units("zips", "dead")
                }
            lane = site.lane(policy=Policy(retries=0, batch=2))
            for group in groups:
                await site.redrive(lane, [units[str(n)] for n in group])
            await _deliver_again(site, lane, [units[str(n)] for n in doubled])
            return site.rows("x")

    loaded = {row.pop("id"): row for row in asyncio.run(load())}
    assert {key: {c: v for c, v in row.items() if v is not None} for key, row in loaded.items()} == wanted


async def _deliver_again(site: Site, lane: Lane, units: Sequence[str]) -> None:
    async with site.app(lane) as app:
        for unit in units:
            first = await anext(aiter(app.backend.read(unit)))
            await app.backend.commit([Commit(publish=(Publish(first, "zips/load"),))])
    await site.run(lane)


async def test_two_workers_that_look_at_once_give_each_zip_one_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    site = Site(tmp_path, "sqlite")
    content = zipped({"x.csv": "id\n1\n", "x.json": BY_ID})
    for n in range(150):
        site.put(f"{n:03}.zip", content)
    lanes = [site.lane(), site.lane()]
    async with site.app(lanes[0]) as one, site.app(lanes[1]) as other:
        reports = await asyncio.gather(run_once(one, lanes[0], slot="a"), run_once(other, lanes[1], slot="b"))
    assert sum(report.units["found"] for report in reports) == 300
    log = await site.log()
    numbers = [data(e)["generation"] for e in log if e.type == "drop"]
    assert len(numbers) == len(set(numbers)) == 150
    last = [data(e)["last"] for e in log if e.type == "generations"]
    assert last == sorted(set(last))
    assert last[-1] >= max(numbers)


async def test_an_attempt_cut_short_between_number_and_zip_gives_no_number_twice(
    quick: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = zipped({"x.csv": "id\n1\n", "x.json": BY_ID})
    for n in range(200):
        quick.put(f"{n:03}.zip", content)
    original, flushed = Attempt.flush, 0

    async def flush(self: Attempt) -> None:
        nonlocal flushed
        await original(self)
        flushed += self.stage.name == "find"
        if flushed == 1:
            raise Retryable("cut short, with as many as a commit takes")

    monkeypatch.setattr(Attempt, "flush", flush)
    await quick.run(quick.lane(policy=Policy(retries=3, backoff="1ms")))
    assert flushed > 1
    numbers = [data(e)["generation"] for e in await quick.log() if e.type == "drop"]
    assert len(numbers) == len(set(numbers)) == 200


# --------------------------------------------------------------------------- many at once


async def test_members_of_one_table_take_turns_and_hold_no_other_up(quick: Site) -> None:
    files: dict[str, Any] = {
        "manifest.json": {
            "files": {f"a{n}.csv": {"table": "a", **BY_ID} for n in range(6)}
            | {"b.csv": {"table": "b", **BY_ID}}
        }
    }
    quick.put("z.zip", files | {f"a{n}.csv": f"id,t\n{n},a\n" for n in range(6)} | {"b.csv": "id,t\n1,b\n"})
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    two, other = asyncio.Event(), asyncio.Event()

    async def enrich(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        table = records[0]["t"]
        running[table] += 1
        most[table] = max(most[table], running[table])
        if running["a"] == 2:
            two.set()
        if table == "b":
            await asyncio.wait_for(two.wait(), 60)
            other.set()
        await asyncio.wait_for(other.wait(), 60)  # those of table a hold their turns until b has one
        running[table] -= 1
        return records

    lane = quick.lane(per_table=2, enrich=enrich, policy=Policy(concurrency=3, retries=0))
    report = await quick.run(lane)
    assert report.outcome == "settled", report.dead
    assert most == {"a": 2, "b": 1}


async def test_no_more_members_are_loaded_at_once_than_the_policy_says(quick: Site) -> None:
    quick.put(
        "z.zip",
        {
            f"{name}{end}": BY_ID if end == ".json" else "id\n1\n"
            for name in "abcdefgh"
            for end in (".csv", ".json")
        },
    )
    running = most = 0
    two = asyncio.Event()

    async def enrich(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 2:
            two.set()
        await asyncio.wait_for(two.wait(), 60)
        await asyncio.sleep(0.02)  # in which a third one could begin
        running -= 1
        return records

    await quick.run(quick.lane(per_table=1, enrich=enrich, policy=Policy(concurrency=2)))
    assert most == 2


async def test_an_attempt_that_was_cut_short_reads_no_manifest_twice(
    quick: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        f"{n:03}{end}": BY_ID | {"table": "x"} if end == ".json" else f"id\n{n}\n"
        for n in range(200)
        for end in (".csv", ".json")
    }
    quick.put("z.zip", files)
    read: list[str] = []
    original = archive.StoredArchive.read_all

    async def once(self: Any, entries: Any, *, limit: int = 1 << 20) -> AsyncIterator[Any]:
        async for entry, data in original(self, entries, limit=limit):
            read.append(entry.name)
            if len(read) == 150:
                raise Retryable("the store is away")
            yield entry, data

    monkeypatch.setattr(drops, "READS", 20)
    monkeypatch.setattr(archive.StoredArchive, "read_all", once)
    report = await quick.run()
    assert (report.outcome, report.units["settled"]) == ("settled", 201)
    assert len(quick.rows("x")) == 200
    assert 200 <= len(read) < 200 + 100, "what the first attempt has registered is not read again"


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tables": "orders"}, "write a list"),
        ({"tables": []}, "name the tables"),
        ({"tables": None}, "name the tables"),
        ({"tables": [""]}, "name the tables"),
        ({"tables": [7]}, "name the tables"),
        ({"tables": {"a": ""}}, "name the tables"),
        ({"source": "/data/drops"}, "source='/data/drops' is no URL"),
        ({"source": "https://user:secret@host/a.zip"}, "has a user in it"),
        ({"to": "tables.db"}, "is no URL"),
        ({"mode": "replace"}, "must be upsert or append"),
        ({"verify": "length"}, "must be content or stream"),
        ({"types": "guess"}, "must be text or infer"),
        ({"csv": ";"}, "must be a CsvFormat"),
        ({"limits": 7}, "must be ZipLimits"),
        ({"password": "hunter2"}, "no secret reference"),
        ({"per_table": 0}, "at least 1"),
        ({"per_table": True}, "at least 1"),
        ({"every": "often"}, "not a duration"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(options: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"source": "file:///in/", "to": "sqlite:////t.db", "tables": ["a"], **options}
    with pytest.raises(ConfigError, match=said) as caught:
        zip_tables("zips", **given)
    assert "\n" not in str(caught.value)
    assert "secret@" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("tables", "name", "target"),
    [
        (["orders"], "orders", "orders"),
        (["or*", "x"], "orders", "orders"),
        ("*", "orders", "orders"),
        ({"orders": "staging.orders"}, "orders", "staging.orders"),
        (["orders"], "Orders", None),
        (["or*"], "xorders", None),
        ({"or*": "x"}, "orders", None),
        (("a", "b"), "c", None),
    ],
)
def test_the_allow_list(tables: Any, name: str, target: str | None) -> None:
    allowed = Allowed(tables)
    if target is None:
        with pytest.raises(Permanent, match="is not allowed: add it to tables="):
            allowed.target(name)
    else:
        assert allowed.target(name) == target


@pytest.mark.parametrize(
    "to", ["sqlite:///{tables}?table=x", "sqlite:///{tables}?mode=append", "file://{folder}/lake/"]
)
async def test_a_sink_that_cannot_be_told_the_table_is_dead_with_the_reason(quick: Site, to: str) -> None:
    quick.put("a.zip", {"x.csv": "id\n1\n", "x.json": BY_ID})
    await quick.run(quick.lane(to=to.format(tables=quick.tables, folder=quick.folder)))
    reason = (await quick.dead())["a.zip#0"]
    assert "leave them out" in reason or "into" in reason
    assert reason.startswith("entry 0 ('x.csv'): ")


async def test_the_status_shows_what_was_refused_and_why(
    quick: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["flowlane.recipes.zip_tables"], "SHOWN", 2)
    lane = quick.lane(tables=["x"])
    quick.put("a.zip", {"x.csv": "id\n1\n", "x.json": BY_ID, "y.csv": "id\n1\n", "y.json": BY_ID})
    await quick.run(lane)
    async with quick.app(lane) as app:
        view = await lane.views["refused"](LogView(app.engine, lane.name))
    said = "table 'y' is not allowed: add it to tables= of the lane, then redrive"
    assert list(view.values()) == [f"entry 2 ('y.csv'): {said}"]
    three = [(f"{name}.csv", f"{name}.json") for name in "pqr"]
    quick.put(
        "b.zip", {name: text for each in three for name, text in zip(each, ("id\n1\n", BY_ID), strict=True)}
    )
    await quick.run(lane)
    async with quick.app(lane) as app:
        view = await lane.views["refused"](LogView(app.engine, lane.name))
    assert len(view) == 3
    assert view["more"] == "2 more: see `flowlane dead`"
