"""Archives over real stores: how many requests, for which bytes, of which version."""

from __future__ import annotations

import asyncio
import io
import re
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from flowlane import ZipLimits
from flowlane import archive as archive_module
from flowlane.archive import FIRST_READ, open_archive
from flowlane.cli.verbs import cli
from flowlane.clock import SystemClock
from flowlane.connectors import http
from flowlane.connectors.file import FileStore
from flowlane.errors import Damaged, FlowlaneError, Incomplete, Permanent, Refused, Superseded
from flowlane.ports import Archive, Environment, ObjectInfo
from flowlane.streams.zip import run as run_module
from flowlane.streams.zip.entry import DEFLATE, STORED, Entry
from flowlane.streams.zip.run import GAP, SPAN
from flowlane.testing.lying_server import LyingServer
from tests.streams.zip.making import Made, archive, directory, encrypted, end, local, record

T = TypeVar("T")

MANIFEST = b'{"table": "orders", "partition_key": "id"}'
MEMBERS = [Made(b"orders.csv", b"id,name\n" * 500, DEFLATE), Made(b"orders.json", MANIFEST)]
#: Its directory is longer than what is read first.
LARGE = archive([*(Made(b"%05d.csv" % n, comment=b"x" * 40) for n in range(3000)), *MEMBERS])


class CountingClock(SystemClock):
    """The machine's clock, which counts how often threads were asked to compute."""

    def __init__(self) -> None:
        self.computed = 0

    async def offload(self, work: Callable[[], T], *, waits: bool = False) -> T:
        self.computed += not waits
        return await super().offload(work, waits=waits)


@pytest.fixture
async def server() -> AsyncIterator[LyingServer]:
    async with LyingServer() as server:
        yield server


@pytest.fixture
async def store() -> AsyncIterator[http.HttpStore]:
    async with http.open_store("http://", environment()) as store:
        yield store


def environment() -> Environment:
    class Nothing:
        """Nothing is opened through it here."""

    return Environment(SystemClock(), Nothing(), allow_private_hosts=True)  # type: ignore[arg-type]


def spans(server: LyingServer) -> list[tuple[int, int]]:
    """The bytes asked for, as [start, end)."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", r.range) for r in server.requests if r.method == "GET"]
    return [(int(match[1]), int(match[2]) + 1) for match in found if match is not None]


async def test_a_small_archive_takes_one_read_its_members_none(
    server: LyingServer, store: http.HttpStore
) -> None:
    data = archive(MEMBERS)
    url = server.serve("/a.zip", data)
    async with open_archive(store, SystemClock(), url) as opened:
        assert spans(server) == [(0, len(data))]
        assert (opened.info.url, opened.info.size) == (url, len(data))
        rows, manifest = opened.entries
        assert await opened.read(manifest) == MANIFEST
        assert await opened.read(rows) == MEMBERS[0].data
    assert len(spans(server)) == 1


async def test_a_directory_of_any_length_takes_two(server: LyingServer, store: http.HttpStore) -> None:
    url = server.serve("/a.zip", LARGE)
    clock = CountingClock()
    async with open_archive(store, clock, url) as opened:
        assert len(opened.entries) == 3002
        assert spans(server)[0] == (len(LARGE) - FIRST_READ, len(LARGE))
        assert len(spans(server)) == 2
        start = opened.entries[-1].limit
        assert spans(server)[1][0] == start
        assert spans(server)[1][1] <= len(LARGE)
        first, last = opened.entries[0], opened.entries[-1]
        assert await opened.read(last) == MANIFEST
        assert await opened.read(first) == b""
    assert spans(server)[2:] == [(last.offset, last.limit), (first.offset, first.limit)]
    pins = [r.headers.get("if-match") for r in server.requests if r.method == "GET"]
    assert pins == [opened.info.etag] * 4
    assert clock.computed >= 3 + (len(LARGE) - start) // (128 << 10)


async def test_slices_of_a_directory_are_bounded(tmp_path: Path) -> None:
    """A store's blocks may have a MiB, and entries may be longer than a slice."""
    members = [
        Made(b"%03d" % n + b"n" * 60_000, comment=b"c" * 60_000, extra=b"\0" * 60_000) for n in range(7)
    ]
    (tmp_path / "a.zip").write_bytes(archive(members))
    clock = CountingClock()
    async with open_archive(FileStore(clock), clock, (tmp_path / "a.zip").as_uri()) as opened:
        assert [entry.stored_name for entry in opened.entries] == [each.name for each in members]
    assert clock.computed >= 7 * 180_000 // (128 << 10)


@pytest.mark.parametrize("more", [b"", bytes(FIRST_READ)], ids=len)
async def test_what_begins_as_another_archive_is_seen_by_its_first_bytes(
    server: LyingServer, store: http.HttpStore, more: bytes
) -> None:
    whole = archive([Made(b"dead", more), *MEMBERS])
    async with open_archive(store, SystemClock(), server.serve("/sfx.zip", b"MZ\0\0" * 20 + whole)) as opened:
        assert await opened.read(opened.entries[2]) == MANIFEST
    assert ((0, 4) in spans(server)) == bool(more)  # where the first read does not reach back to them
    with pytest.raises(Damaged, match="two archives in one file"):
        async with open_archive(store, SystemClock(), server.serve("/two.zip", whole + whole)):
            pass


async def test_it_is_pinned(server: LyingServer, store: http.HttpStore) -> None:
    url = server.serve("/a.zip", LARGE)
    info = await store.head(url)
    assert info is not None
    async with open_archive(store, SystemClock(), url, etag=info.etag) as opened:
        assert opened.info.etag == info.etag
        server.serve("/a.zip", archive(MEMBERS))
        with pytest.raises(Superseded):
            await opened.read(opened.entries[0])
    with pytest.raises(Superseded, match=r"/a\.zip: its ETag is .*, no longer"):
        async with open_archive(store, SystemClock(), url, etag=info.etag):
            pass


async def test_one_that_is_not_there_or_has_no_size(server: LyingServer, store: http.HttpStore) -> None:
    with pytest.raises(Incomplete, match="there is no http"):
        async with open_archive(store, SystemClock(), server.url("/none.zip")):
            pass
    url = server.serve("/a.zip", archive(MEMBERS), head=405, ranges="ignored", chunked=True)
    with pytest.raises(Permanent, match=r"a\.zip: its size is not told"):
        async with open_archive(store, SystemClock(), url):
            pass


@pytest.mark.parametrize("lost", [1, FIRST_READ])
async def test_a_directory_that_comes_short_is_incomplete(tmp_path: Path, lost: int) -> None:
    """A file that shrinks after it was asked for its size, in a store that does not pin."""

    class Unpinned(FileStore):
        """Files as they were when they were asked for, and as they are when they are read."""

        async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
            info = await super().head(url)
            assert info is not None
            (tmp_path / "a.zip").write_bytes(LARGE[:-lost])
            return replace(info, etag="")

    (tmp_path / "a.zip").write_bytes(LARGE)
    clock = SystemClock()
    with pytest.raises(Incomplete, match=r"a\.zip: .* bytes came of the .* asked for|ends before byte"):
        async with open_archive(Unpinned(clock), clock, (tmp_path / "a.zip").as_uri()):
            pass


async def test_errors_name_the_archive_and_not_its_query(server: LyingServer, store: http.HttpStore) -> None:
    url = server.serve("/a.zip", b"<html>not found</html>") + "?token=secret"
    with pytest.raises(Damaged, match=r"/a\.zip: not a zip, or cut") as raised:
        async with open_archive(store, SystemClock(), url):
            pass
    assert "secret" not in str(raised.value)
    url = server.serve("/a.zip", archive(MEMBERS))
    with pytest.raises(Refused, match=r"/a\.zip: it has 2 entries or more, the limit is 1"):
        async with open_archive(store, SystemClock(), url, limits=ZipLimits(entries=1)):
            pass


async def opened_file(tmp_path: Path, data: bytes, limits: ZipLimits | None = None) -> Archive:
    """The archive `data`, in a file that is closed between reads anyway."""
    (tmp_path / "a.zip").write_bytes(data)
    clock = SystemClock()
    async with open_archive(FileStore(clock), clock, (tmp_path / "a.zip").as_uri(), limits=limits) as opened:
        return opened


async def test_what_is_refused_is_not_read(tmp_path: Path) -> None:
    members = [Made(b"../a", b"x"), Made(b"big.json", bytes(2000), DEFLATE), Made(b"b", b"x", method=93)]
    opened = await opened_file(tmp_path, archive(members), ZipLimits(ratio=1000))
    for entry, why in zip(opened.entries, ("leads upwards", "", "93"), strict=True):
        if why:
            with pytest.raises(Refused, match=rf"a\.zip: entry {entry.index} .*{why}"):
                opened.refuse(entry)
            with pytest.raises(Refused, match=why):
                await opened.read(entry)
        else:
            opened.refuse(entry)
    big = opened.entries[1]
    assert len(await opened.read(big, limit=2000)) == 2000
    with pytest.raises(Refused, match="is not read whole: it has 2,000 bytes, of at most 1,999"):
        await opened.read(big, limit=1999)


async def test_a_member_that_disproves_the_directory_is_damaged(tmp_path: Path) -> None:
    made = Made(b"a.json", MANIFEST)
    data = local(made).replace(b"orders", b"refund")
    entries = record(made, 0)
    opened = await opened_file(tmp_path, data + entries + end(1, len(entries), len(data)))
    with pytest.raises(Damaged, match=r"a\.zip: entry 0 .*CRC"):
        await opened.read(opened.entries[0])


async def test_a_local_header_that_is_longer_than_the_directory_s_entry(tmp_path: Path) -> None:
    made = Made(b"a.json", MANIFEST)
    plain = local(made)
    data = plain[:28] + b"\x40\0" + plain[30:36] + b"\1\xca\x3c\0" + bytes(60) + plain[36:]
    assert len(data) == len(plain) + 64
    entries = record(made, 0)
    opened = await opened_file(tmp_path, data + entries + end(1, len(entries), len(data)))
    assert await opened.read(opened.entries[0]) == MANIFEST


async def test_no_more_is_asked_for_than_a_member_can_have(
    server: LyingServer, store: http.HttpStore
) -> None:
    data, entries = directory([Made(b"a.json", MANIFEST)])
    gap = bytes(3_000_000)
    url = server.serve("/a.zip", data + gap + entries + end(1, len(entries), len(data) + len(gap)))
    async with open_archive(store, SystemClock(), url) as opened:
        assert opened.entries[0].limit == len(data) + len(gap)
        assert await opened.read(opened.entries[0]) == MANIFEST
    start, stop = spans(server)[-1]
    assert stop - start <= 30 + 2 * 65535 + len(MANIFEST)


# --------------------------------------------------------------------------- many small members


async def all_of(opened: Archive, entries: Iterable[Entry], limit: int = 1 << 20) -> dict[int, Any]:
    """What ``read_all`` gives, by index; each once, in the order of their places."""
    found = [(entry, read) async for entry, read in opened.read_all(entries, limit=limit)]
    assert len({entry.index for entry, _ in found}) == len(found)
    return {entry.index: read for entry, read in found}


async def test_neighbours_come_by_one_request(server: LyingServer, store: http.HttpStore) -> None:
    """2,000 sidecars, each behind its file of data."""
    members = []
    for n in range(2000):
        members += [Made(b"%04d.csv" % n, b"id\n%d\n" % n), Made(b"%04d.json" % n, MANIFEST + b" " * n)]
    url = server.serve("/a.zip", archive(members))
    clock = CountingClock()
    async with open_archive(store, clock, url) as opened:
        before, computed = len(spans(server)), clock.computed
        found = await all_of(opened, opened.entries[1::2])
        assert found == {2 * n + 1: MANIFEST + b" " * n for n in range(2000)}
    asked = spans(server)[before:]
    assert len(asked) <= 8
    assert all(stop - start <= SPAN for start, stop in asked)
    assert 2000 // 128 < clock.computed - computed < 80
    pins = {r.headers.get("if-match") for r in server.requests if r.method == "GET"}
    assert pins == {opened.info.etag}


async def test_members_far_apart_are_asked_for_at_once(server: LyingServer, store: http.HttpStore) -> None:
    gap = bytes(GAP)  # with the header before it, more than is read over
    members = [Made(b"%d" % n, b"small %d" % n if n % 2 else gap) for n in range(80)]
    members.append(Made(b"end", bytes(FIRST_READ)))
    url = server.serve("/a.zip", archive(members))
    async with open_archive(store, SystemClock(), url) as opened:
        before = len(spans(server))
        wanted = opened.entries[1:80:2]
        assert await all_of(opened, wanted) == {n: b"small %d" % n for n in range(1, 80, 2)}
        asked = spans(server)[before:]
    assert sorted(asked) == [(entry.offset, entry.limit) for entry in wanted]


async def test_what_is_wrong_with_one_of_many_spoils_no_other(tmp_path: Path) -> None:
    members = [
        Made(b"first", b"1"),
        Made(b"../up", b"2"),
        Made(b"lies", b"content"),
        Made(b"big", bytes(2001)),
        Made(b"other", b"x", method=93),
        encrypted(b"hidden", b"3", b"password"),
        Made(b"last", b"4" * 2000, DEFLATE),
    ]
    opened = await opened_file(tmp_path, archive(members).replace(b"content", b"contend"))
    found = await all_of(opened, reversed([*opened.entries, *opened.entries]), limit=2000)
    assert sorted(found) == list(range(7))
    assert (found[0], found[6]) == (b"1", b"4" * 2000)
    for entry in opened.entries[1:6]:
        with pytest.raises(FlowlaneError) as raised:
            await opened.read(entry, limit=2000)
        error = found[entry.index]
        assert (type(error), str(error)) == (type(raised.value), str(raised.value))
    assert isinstance(found[2], Damaged)
    assert "CRC" in str(found[2])


@pytest.mark.parametrize("apart", [0, GAP])
async def test_what_is_wrong_with_the_store_is_raised_of_many(
    server: LyingServer, store: http.HttpStore, apart: int
) -> None:
    members = [Made(b"%04d" % n, bytes(apart)) for n in range(30)] + [Made(b"end", bytes(2 * FIRST_READ))]
    url = server.serve("/a.zip", archive(members))
    async with open_archive(store, SystemClock(), url) as opened:
        server.serve("/a.zip", archive(MEMBERS))
        with pytest.raises(Superseded):
            await all_of(opened, opened.entries[:30])
    shown = [task for task in asyncio.all_tasks() if "_stretch" in repr(task)]
    assert shown == []


async def test_of_many_no_more_are_held_than_have_some_mib(tmp_path: Path) -> None:
    """Each of 64 members has a MiB, and next to nothing packed."""
    blank = bytes(1 << 20)
    opened = await opened_file(tmp_path, archive([Made(b"%d" % n, blank, DEFLATE) for n in range(64)]))
    size = peak = 0
    tracemalloc.start()
    try:
        async for _, read in opened.read_all(opened.entries):
            assert isinstance(read, bytes)
            size += len(read)
            peak = max(peak, tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert size == 64 << 20
    assert peak < 24 << 20


@given(
    members=st.lists(st.tuples(st.binary(max_size=60), st.sampled_from([STORED, DEFLATE]))),
    wanted=st.lists(st.integers(0, 30)),
    sizes=st.tuples(*[st.sampled_from([1, 40, 200, 1 << 20])] * 2),
    count=st.sampled_from([1, 2, 100]),
)
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_many_members_are_those_of_zipfile(
    tmp_path: Path,
    members: list[tuple[bytes, int]],
    wanted: list[int],
    sizes: tuple[int, int],
    count: int,
) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as target:
        for number, (content, method) in enumerate(members):
            target.writestr(str(number), content, method)
        target.writestr("end", bytes(FIRST_READ))  # so that the others are not among what is in memory

    async def read() -> None:
        opened = await opened_file(tmp_path, data.getvalue())
        some = [opened.entries[number % len(members)] for number in wanted] if members else []
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("SPAN", sizes[0]), ("GAP", sizes[1]), ("AT_ONCE", count)):
                patch.setattr(run_module, name, value)
            patch.setattr(archive_module, "_COUNT", count)
            found = await all_of(opened, some)
        assert list(found) == sorted({entry.index for entry in some})
        with zipfile.ZipFile(data) as oracle:
            assert found == {index: oracle.read(str(index)) for index in found}

    asyncio.run(read())


LANE = """
from flowlane import Lane, Policy, Unit, ZipLimits

lane = Lane("drops", policy=Policy(retries=0))


class Member(Unit, key=("etag", "index")):
    etag: str
    index: int


@lane.stage(on=lane.triggered)
async def find(event, ctx):
    async with ctx.archive("{url}", limits=ZipLimits(entries=10)) as archive:
        for entry in archive.entries:
            yield Member(etag=archive.info.etag, index=entry.index)


@lane.stage(on=Member)
async def show(event, ctx):
    async with ctx.archive("{url}", etag=event.data.etag{password}) as archive:
        data = await archive.read(archive.entries[event.data.index])
        await ctx.step("tell", tell, data.decode())


async def tell(text):
    print("said", text[:20])
"""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, *, password: str = "") -> tuple[int, str]:
    monkeypatch.chdir(tmp_path)
    given = f', password="{password}"' if password else ""
    text = LANE.replace("{url}", (tmp_path / "a.zip").as_uri()).replace("{password}", given)
    (tmp_path / "lane.py").write_text(text)
    result = CliRunner().invoke(cli, [verb, "lane.py"])
    return result.exit_code, result.output


def test_in_a_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(archive([Made(b"a", b"first"), Made(b"../b", b"second")]))
    code, output = run(tmp_path, monkeypatch, "plan")
    assert code == 0, output
    assert output.count("drops/member/") == 2
    code, output = run(tmp_path, monkeypatch, "run")
    assert code == 1
    assert "said first" in output
    assert "its name leads upwards" in output
    assert "said second" not in output


def test_a_password_is_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A member encrypted by ZipCrypto, as Info-ZIP makes it, with the password "hidden-in-env".
    (tmp_path / "a.zip").write_bytes(archive([encrypted(b"a", b"quite a secret", b"hidden-in-env")]))
    monkeypatch.setenv("ZIP_PASSWORD", "hidden-in-env")
    code, output = run(tmp_path, monkeypatch, "run", password="env://ZIP_PASSWORD")
    assert code == 0, output
    assert "said quite a secret" in output
    (tmp_path / ".flowlane" / "flowlane.db").unlink()
    code, output = run(tmp_path, monkeypatch, "run")
    assert code == 1
    assert "is encrypted: give its password" in output
