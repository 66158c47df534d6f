"""Rows out of members of archives: the contract, what is asked for, resumes, proofs, memory."""

from __future__ import annotations

import asyncio
import gzip
import io
import random
import zipfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from flowlane.archive import open_archive
from flowlane.clock import SystemClock
from flowlane.connectors.file import FileStore
from flowlane.connectors.members import Budget, MemberSource, budget_of
from flowlane.connectors.records import open_source
from flowlane.errors import ConfigError, Damaged, Permanent, Refused, Superseded
from flowlane.ports import Body, Connections, Cut, Environment, Source, Store
from flowlane.state import Position
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.zip.entry import Entry, ZipLimits
from flowlane.testing.source_suite import SourceSuite, plain, read, splits_of
from tests.streams.zip.making import Made, archive, encrypted


class Watched:
    """A file store that remembers the ranges that were asked for."""

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self.head, self.list, self.upload, self.discard = store.head, store.list, store.upload, store.discard
        self.asked: list[tuple[int, int | None, str]] = []

    def read(
        self,
        url: str,
        *,
        start: int = 0,
        end: int | None = None,
        etag: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Body]:
        self.asked.append((start, end, etag))
        return self._store.read(url, start=start, end=end, etag=etag)


class OneStore:
    """Connections with a single store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def store(self, url: str) -> Store:
        return self._store


def surroundings() -> tuple[Environment, Watched]:
    clock = SystemClock()
    store = Watched(FileStore(clock))
    return Environment(clock, cast(Connections, OneStore(store))), store


@pytest.fixture
def environment() -> Environment:
    return surroundings()[0]


def csv_rows(count: int, note: str = "") -> bytes:
    lines = [f'{n},"text, {n}\nand ""more""{note}",{"" if n % 3 else "x"}' for n in range(count)]
    lines[5:5] = ["ragged", "", '"unquoted"x,1,2']
    return ("id,text,maybe\r\n" + "\r\n".join(lines) + "\n\n").encode()


def packed(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", method) as opened:
            for name, data in members.items():
                opened.writestr(name, data)
        return file.getvalue()


METHODS = {"deflated": zipfile.ZIP_DEFLATED, "stored": zipfile.ZIP_STORED, "bzip2": zipfile.ZIP_BZIP2}
JSON = b"".join(b'{"id":%d,"text":"number %d"}\n' % (n, n) for n in range(40))


class TestMemberSource(SourceSuite):
    @pytest.fixture(params=[*METHODS, "csv.gz", "jsonl"])
    async def source(
        self, request: pytest.FixtureRequest, tmp_path: Path, environment: Environment
    ) -> AsyncIterator[Source]:
        rows, name = csv_rows(40), "b/orders.csv"
        if request.param == "csv.gz":
            rows, name = gzip.compress(rows[:500]) + gzip.compress(rows[500:]), "orders.csv.gz"
        if request.param == "jsonl":
            rows, name = JSON, "orders.jsonl"
        path = tmp_path / "a.zip"
        path.write_bytes(packed({"a.csv": b"id\n1\n", name: rows}, METHODS.get(request.param, 8)))
        async with open_source(f"file://{path}", environment, member=name) as source:
            yield source


async def all_of(url: str, environment: Environment, **options: Any) -> list[Any]:
    async with open_source(url, environment, **options) as source:
        (split,) = await splits_of(source)
        await prove(source, split)
        return [record for batch in await read(source, split, Cut()) for record in batch.records]


async def prove(source: Source, split: Any) -> list[int]:
    async with aclosing(source.prove(split, Position())) as proving:
        return [passed async for passed in proving]


async def entries_of(url: str) -> list[Entry]:
    clock = SystemClock()
    async with open_archive(FileStore(clock), clock, url) as opened:
        return list(opened.entries)


# --------------------------------------------------------------------------- what is named


async def test_ways_to_name_a_member(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv": b"id\n1\n", "b.csv": b"id\n2\n"}))
    url = path.as_uri()
    entry = (await entries_of(url))[1]
    for named in ({"member": "b.csv"}, {"entry": "b.csv"}, {"entry": 1}, {"entry": entry}):
        assert await all_of(url, environment, **named) == [{"id": "2"}]
        async with open_source(url, environment, **named) as source:
            (split,) = await splits_of(source)
        assert split.id == f"{url}#1"
        assert split.replayable
        assert split.size == entry.packed
    for named, what in (
        ({"member": "c.csv"}, "there is no entry 'c.csv'"),
        ({"entry": 2}, "there is no entry '2'"),
        ({"entry": -1}, "there is no entry '-1'"),
    ):
        with pytest.raises(Permanent, match=what):
            await all_of(url, environment, **named)


async def test_a_name_that_repeats_is_told_apart_by_index(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(archive([Made(b"a.csv", b"id\n1\n"), Made(b"a.csv", b"id\n2\n")]))
    with pytest.raises(Permanent, match=r"2 of its entries are called 'a.csv': give entry="):
        await all_of(path.as_uri(), environment, member="a.csv")
    assert await all_of(path.as_uri(), environment, entry=1) == [{"id": "2"}]


async def test_options_that_are_wrong(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv": b"id\n1\n", "a.txt": b"id\n1\n"}))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"member": "a.csv", "entry": 0}, "two ways to name one"),
        ({"member": "a.csv", "verify": "length"}, "verify='length': must be content or stream"),
        ({"member": "a.csv", "limits": 5}, "limits=5"),
        ({"member": "a.txt"}, "does not say what rows"),
        ({"verify": "content"}, "verify= is about one member"),
        ({"etag": "x"}, "etag= is about one member"),
        ({"password": "x"}, "password= is about one member"),
    ]
    for options, what in wrong:
        with pytest.raises(ConfigError, match=what):
            await all_of(path.as_uri(), environment, **options)
    assert await all_of(path.as_uri(), environment, member="a.txt", format="csv") == [{"id": "1"}]


async def test_an_entry_that_is_refused(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"../a.csv": b"id\n1\n", "zeros.csv": bytes(1_000_000)}))
    with pytest.raises(Refused, match=rf"^{path.as_uri()}: entry 0 .* is not read: its name leads upwards"):
        await all_of(path.as_uri(), environment, entry=0)
    with pytest.raises(Refused, match=r"ZipLimits\.ratio"):
        await all_of(path.as_uri(), environment, entry=1, limits=ZipLimits(ratio=100))


async def test_a_password(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(archive([encrypted(b"a.csv", b"id\n1\n", b"secret")]))
    assert await all_of(path.as_uri(), environment, entry=0, password="secret") == [{"id": "1"}]
    with pytest.raises(Refused, match="give its password"):
        await all_of(path.as_uri(), environment, entry=0)
    with pytest.raises(Refused, match=r"the password is wrong$"):
        await all_of(path.as_uri(), environment, entry=0, password="hunter2")


# --------------------------------------------------------------------------- what is asked for


async def test_a_small_member_is_one_request_proof_and_all(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv": b"id\n1\n", "b.csv": csv_rows(1000), "c.csv": b"id\n3\n"}))
    entries = await entries_of(path.as_uri())
    environment, store = surroundings()
    info = await store.head(path.as_uri())
    assert info is not None
    rows = await all_of(path.as_uri(), environment, entry=entries[1], etag=info.etag)
    assert len(rows) == 1000
    assert store.asked == [(entries[1].offset, entries[2].offset, info.etag)]


async def test_a_large_member_is_proven_and_then_read(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(2_500_000).hex().encode()
    rows = b"id\n" + b"".join(noise[at : at + 99] + b"\n" for at in range(0, len(noise), 99))
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv": rows}))
    for verify, times in (("content", 2), ("stream", 1)):
        environment, store = surroundings()
        entry = (await entries_of(path.as_uri()))[0]
        async with open_source(path.as_uri(), environment, entry=entry, verify=verify) as source:
            (split,) = await splits_of(source)
            passed = await prove(source, split)
            assert passed == sorted(passed)
            assert bool(passed) == (verify == "content")
            batches = await read(source, split, Cut(1000))
        assert sum(len(batch.records) for batch in batches) == rows.count(b"\n") - 1
        assert sum(batch.size for batch in batches) >= entry.packed
        assert store.asked == [(0, entry.limit, split.etag)] * times


async def test_a_stored_member_is_gone_on_with_where_it_was_left(tmp_path: Path) -> None:
    """Nothing of what lies before is fetched, but for the headers."""
    form = CsvFormat(max_row=1000)
    rows = csv_rows(60_000)
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv": rows}, zipfile.ZIP_STORED))
    environment, store = surroundings()
    async with open_source(path.as_uri(), environment, member="a.csv", csv=form) as source:
        (split,) = await splits_of(source)
        whole = await read(source, split, Cut(5000))
        for number in (3, 7, len(whole)):
            store.asked.clear()
            at = whole[number - 1].end
            assert plain(await read(source, split, Cut(5000), at)) == plain(whole[number:])
            (start, end, etag), *rest = store.asked
            assert (start, end, etag) == (0, 64 << 10, split.etag)
            begin = 30 + len("a.csv") + at.offset
            assert [asked[0] for asked in rest] == [begin]
        with pytest.raises(Superseded, match=r"ends before byte"):
            await read(source, split, Cut(5000), Position(len(rows) + 1, 5, 5))
        wrong = replace(whole[3].end, crc=whole[3].end.crc ^ 1)
        with pytest.raises(Damaged, match="its CRC is"):
            await read(source, split, Cut(5000), wrong)


async def test_a_stored_member_that_was_kept_from_its_proof_is_gone_on_with(tmp_path: Path) -> None:
    """What is at hand is read over, not jumped over: rows behind the position would be taken for headers."""
    rows = csv_rows(26_000)
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv": rows}, zipfile.ZIP_STORED))
    environment, store = surroundings()
    async with open_source(path.as_uri(), environment, member="a.csv", csv=CsvFormat(max_row=1000)) as source:
        (split,) = await splits_of(source)
        whole = await read(source, split, Cut(5000))
        at = whole[2].end
        assert at.offset > 300_000
        await prove(source, split)
        store.asked.clear()
        assert plain(await read(source, split, Cut(5000), at)) == plain(whole[3:])
        assert not store.asked


# --------------------------------------------------------------------------- resumes


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("method", METHODS.values())
@given(
    notes=st.lists(
        st.text(st.characters(exclude_characters='"\0', codec="utf-8"), max_size=20), min_size=1, max_size=30
    ),
    size=st.integers(1, 300),
    rows=st.integers(1, 7),
)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_from_every_batch_on_the_same_batches_come(
    tmp_path: Path, method: int, name: str, notes: list[str], size: int, rows: int
) -> None:
    data = b"id,note\n" + "".join(f'{n},"{note}"\n' for n, note in enumerate(notes)).encode()
    path = tmp_path / "a.zip"
    path.write_bytes(packed({name: gzip.compress(data) if name.endswith(".gz") else data}, method))

    async def check() -> None:
        environment, _ = surroundings()
        async with open_source(path.as_uri(), environment, member=name) as source:
            (split,) = await splits_of(source)
            whole = await read(source, split, Cut(rows, size))
            assert [r["id"] for b in whole for r in b.records] == [str(n) for n in range(len(notes))]
            for number, batch in enumerate(whole, 1):
                assert plain(await read(source, split, Cut(rows, size), batch.end)) == plain(whole[number:])

    asyncio.run(check())


# --------------------------------------------------------------------------- what is damaged


def touched(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


async def test_nothing_goes_out_of_what_the_proof_refutes(tmp_path: Path, environment: Environment) -> None:
    whole = packed({"a.csv": csv_rows(60_000)}, zipfile.ZIP_STORED)
    path = tmp_path / "a.zip"
    path.write_bytes(touched(whole, len(whole) - 1000))
    url = path.as_uri()
    async with open_source(url, environment, member="a.csv") as source:
        (split,) = await splits_of(source)
        with pytest.raises(
            Damaged, match=rf"^{url}: entry 0 \('a.csv'\): its CRC is [0-9a-f]+, the directory says"
        ):
            await prove(source, split)
    async with open_source(url, environment, member="a.csv", verify="stream") as source:
        (split,) = await splits_of(source)
        assert await prove(source, split) == []
        with pytest.raises(Damaged, match=r"directory says [0-9a-f]+; 60,000 rows of it had gone out before"):
            await read(source, split, Cut(10_000))


async def test_what_is_packed_inside_is_proven_too(tmp_path: Path, environment: Environment) -> None:
    inner = gzip.compress(csv_rows(3000))
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv.gz": inner[:-5]}))
    async with open_source(path.as_uri(), environment, member="a.csv.gz") as source:
        (split,) = await splits_of(source)
        with pytest.raises(Damaged, match="gzip member 1"):
            await prove(source, split)


@pytest.mark.parametrize("kept", [10, 40, 200])
async def test_an_archive_that_was_cut_since(tmp_path: Path, environment: Environment, kept: int) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv": csv_rows(100)}))
    entry = (await entries_of(path.as_uri()))[0]
    path.write_bytes(path.read_bytes()[:kept])
    async with open_source(path.as_uri(), environment, entry=entry) as source:
        (split,) = await splits_of(source)
        with pytest.raises(Damaged, match="the archive is cut"):
            await prove(source, split)
        with pytest.raises(Damaged, match="the archive is cut"):
            await read(source, split, Cut())


async def test_an_archive_that_was_replaced(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv": csv_rows(100)}))
    async with open_source(path.as_uri(), environment, member="a.csv") as source:
        (split,) = await splits_of(source)
        path.write_bytes(packed({"a.csv": csv_rows(101)}))
        with pytest.raises(Superseded):
            await prove(source, split)
        with pytest.raises(Superseded):
            await read(source, split, Cut())
    with pytest.raises(Superseded):
        await all_of(path.as_uri(), environment, member="a.csv", etag=split.etag)


# --------------------------------------------------------------------------- memory


async def test_the_budget_is_kept_and_served_in_order() -> None:
    budget = Budget()
    order: list[int] = []
    most = 0

    async def hold(number: int, size: int) -> None:
        nonlocal most
        async with budget.hold(size, 100):
            order.append(number)
            most = max(most, budget.used)
            for _ in range(5):
                await asyncio.sleep(0)

    sizes = [60, 60, 30, 500, 10, 90]
    async with asyncio.TaskGroup() as tasks:
        for number, size in enumerate(sizes):
            tasks.create_task(hold(number, size))
    assert order == list(range(len(sizes)))
    assert most == 500  # alone: more than all of it is still served
    assert budget.used == 0


async def test_whoever_gives_up_waiting_holds_nothing() -> None:
    budget = Budget()
    async with budget.hold(100, 100):
        waiting = asyncio.create_task(_held(budget))
        behind = asyncio.create_task(_held(budget))
        for _ in range(5):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert budget.used == 100
    await behind
    assert budget.used == 0


async def _held(budget: Budget) -> None:
    async with budget.hold(50, 100):
        pass


async def test_readers_of_one_process_share_one_budget(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed({f"{n}.csv": csv_rows(2000) for n in range(4)}))
    budget, seen = budget_of(environment), set()

    async def load(number: int) -> int:
        limits = ZipLimits(memory=1 << 20)
        async with open_source(path.as_uri(), environment, entry=number, limits=limits) as source:
            assert isinstance(source, MemberSource)
            (split,) = await splits_of(source)
            rows = 0
            async with aclosing(source.read(split, Position(), Cut(100))) as batches:
                async for batch in batches:
                    seen.add(budget.used)
                    rows += len(batch.records)
        return rows

    async with asyncio.TaskGroup() as tasks:
        loads = [tasks.create_task(load(number)) for number in range(4)]
    assert [task.result() for task in loads] == [2000] * 4
    assert budget.used == 0
    one = min(seen)
    assert max(seen) <= 1 << 20
    assert one > 100_000


async def test_a_read_that_is_left_gives_its_memory_back(tmp_path: Path, environment: Environment) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed({"a.csv": csv_rows(2000)}))
    async with open_source(path.as_uri(), environment, member="a.csv") as source:
        (split,) = await splits_of(source)
        async with aclosing(source.read(split, Position(), Cut(100))) as batches:
            async for _ in batches:
                assert budget_of(environment).used > 0
                break
        assert budget_of(environment).used == 0
