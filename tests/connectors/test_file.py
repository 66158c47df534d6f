from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from flowlane.clock import SystemClock
from flowlane.connectors import parts, paths
from flowlane.connectors.file import BLOCK, FileStore, open_store
from flowlane.errors import ConfigError, Fenced, Incomplete, Permanent, Retryable, Superseded
from flowlane.ports import Connections, Environment
from flowlane.testing.store_suite import StoreSuite, fetch, noise


@pytest.fixture
async def store() -> AsyncIterator[FileStore]:
    environment = Environment(SystemClock(), cast(Connections, None))
    async with open_store("file:///", environment) as store:
        yield store


@pytest.fixture
def base(tmp_path: Path) -> str:
    return f"file://{tmp_path}/"


class TestFileStore(StoreSuite):
    """Uses the fixtures above."""


@pytest.mark.parametrize(
    "url",
    [
        "file://elsewhere/tmp/a",
        "file:/tmp/a",
        "file:tmp",
        "/tmp/a",
        "file:///tmp/../etc/passwd",
        "file:///tmp/%2e%2e/etc/passwd",
        "file:///tmp/a%2fb",
        "file:///tmp/a%00b",
        "http:///tmp/a",
    ],
)
async def test_urls_that_name_no_plain_path_are_refused(store: FileStore, url: str) -> None:
    for act in (store.head(url), fetch(store, url), _write(store, url, b"x"), _all(store, url)):
        with pytest.raises(ConfigError):
            await act


async def _all(store: FileStore, url: str) -> list[str]:
    return [info.url async for info in store.list(url)]


async def _write(store: FileStore, url: str, data: bytes, **how: Any) -> None:
    async with store.upload(url, **{"owner": "test", **how}) as upload:
        await upload.write(data)
        await upload.commit()


@pytest.mark.parametrize(
    "name", ["a%20b", "%25", "%2A", "%3F", "%5Bx%5D", "a%23b", "%C3%BC", "%F0%9F%8E%88", "x" * 255]
)
async def test_odd_names_round_trip(store: FileStore, base: str, tmp_path: Path, name: str) -> None:
    await _write(store, base + name, b"odd")
    await _write(store, base + "decoy", b"")
    assert await _all(store, base + name) == [base + name]
    assert await fetch(store, base + name) == b"odd"
    assert len(list(tmp_path.iterdir())) == 2


async def test_a_whole_name_of_magic_is_literal_when_encoded(store: FileStore, base: str) -> None:
    await _write(store, base + "x%2Ay", b"")
    await _write(store, base + "xzy", b"")
    assert await _all(store, base + "x%2Ay*") == [base + "x%2Ay"]
    assert len(await _all(store, base + "x*y")) == 2


async def test_hidden_files_and_links_out_are_not_listed(store: FileStore, base: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret").write_bytes(b"s")
    (inside / "real").write_bytes(b"r")
    (inside / ".hidden").write_bytes(b"h")
    (inside / "in").symlink_to(inside / "real")
    (inside / "out").symlink_to(outside / "secret")
    (inside / "gone").symlink_to(outside / "nothing")
    (inside / "loop").symlink_to(inside)
    found = await _all(store, f"{base}inside/**")
    assert found == [f"{base}inside/in", f"{base}inside/real"]
    assert await _all(store, f"{base}inside/.h*") == [f"{base}inside/.hidden"]


async def test_a_large_directory_is_listed_in_order(
    store: FileStore, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several runs that are sorted by themselves, and listed in several hops."""
    monkeypatch.setattr(paths, "_RUN", 100)
    for n in range(700):
        (tmp_path / str(n)).touch()
    found = await _all(store, base + "*")
    assert found == sorted(found)
    assert len(found) == 700


async def test_a_file_that_is_written_to_is_superseded(store: FileStore, base: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(noise(3 << 20))
    async with store.read(base + "a") as body:
        blocks = aiter(body)
        await anext(blocks)
        with (tmp_path / "a").open("ab") as file:
            file.write(b"more")
        with pytest.raises(Superseded):
            await anext(blocks)


async def test_what_is_no_regular_file_is_no_object(store: FileStore, base: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        assert await store.head(base + name) is None
        with pytest.raises(Permanent):
            await fetch(store, base + name)
        with pytest.raises(Permanent):
            await _write(store, base + name, b"x")
    assert await _all(store, base + "**") == []


async def test_targets_that_cannot_be_written(
    store: FileStore, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    names: dict[str, type[Exception]]
    names = {"file/below": Permanent, "x" * 256: Permanent, "directory/": ConfigError}
    for name, kind in names.items():
        with pytest.raises(kind):
            await _write(store, base + name, b"x")
    numbers: dict[int, type[Exception]]
    numbers = {
        errno.EACCES: ConfigError,
        errno.EROFS: ConfigError,
        errno.ENOSPC: Retryable,
        errno.EIO: Retryable,
    }
    for number, kind in numbers.items():
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", _failing(number))
            with pytest.raises(kind) as caught:
                await _write(store, base + "a", b"x")
        assert str(caught.value).startswith(f"cannot write {base}a: {os.strerror(number).lower()}")
        assert ("make room" in str(caught.value)) == (number == errno.ENOSPC)


def _failing(number: int) -> Any:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


async def test_without_hard_links_objects_still_appear_once(
    store: FileStore, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _failing(errno.EOPNOTSUPP))
    await _write(store, base + "a", b"one")
    await _write(store, base + "a", b"one", owner="again")
    with pytest.raises(Fenced):
        await _write(store, base + "a", b"two", owner="other")
    assert await fetch(store, base + "a") == b"one"


@pytest.mark.parametrize(
    "resume", ["../../etc/passwd", "a", ".b.{}.part", ".a.xyz.part", "sub/.a.{}.part", ".a.{}.part\n"]
)
async def test_an_upload_is_resumed_by_a_name_of_its_own_only(
    store: FileStore, base: str, tmp_path: Path, resume: str
) -> None:
    name = resume.format("0" * 24)
    with pytest.raises(Permanent):
        await _write(store, base + "a", b"x", resume=name, position=1)
    assert list(tmp_path.iterdir()) == []


async def test_a_part_that_is_a_link_is_not_followed(store: FileStore, base: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"victim")
    name = parts.part_name(tmp_path / "a", "one")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(Permanent):
        await _write(store, base + "a", b"x", owner="two", resume=name, position=3)
    await _write(store, base + "a", b"x", owner="one")
    assert victim.read_bytes() == b"victim"


async def test_a_dead_owners_part_is_renamed_a_live_ones_copied(
    store: FileStore, base: str, tmp_path: Path
) -> None:
    async with store.upload(base + "a", owner="one") as one:
        await one.write(b"x" * 1000)
        position = await one.flush()
        alive = (tmp_path / one.id).stat().st_ino
        async with store.upload(base + "a", owner="two", resume=one.id, position=position) as two:
            copied = (tmp_path / two.id).stat().st_ino
            assert copied != alive
    async with store.upload(base + "a", owner="three", resume=two.id, position=position) as three:
        assert (tmp_path / three.id).stat().st_ino == copied
    assert [path.name for path in tmp_path.iterdir()] == [three.id]


async def test_a_former_owner_cannot_even_write(store: FileStore, base: str) -> None:
    async with store.upload(base + "a", owner="one") as one:
        await one.write(b"x" * 1000)
        position = await one.flush()
        async with store.upload(base + "a", owner="two", resume=one.id, position=position):
            with pytest.raises(Fenced):
                await one.flush()
            with pytest.raises(Fenced):
                await one.write(b"x" * BLOCK)  # as much as is written at once


async def test_a_double_of_the_same_owner_cannot_publish_the_others_bytes(
    store: FileStore, base: str
) -> None:
    """One attempt, opened twice: both parts have one name, but only one of them is the file of that name."""
    for overwrite in (False, True):
        async with store.upload(base + "a", owner="one", overwrite=overwrite) as first:
            await first.write(b"first")
            async with store.upload(base + "a", owner="one", overwrite=overwrite) as second:
                await second.write(b"half of sec")
                await second.flush()
                with pytest.raises(Fenced):
                    await first.commit()
                await first.abort()
                assert await store.head(base + "a") is None
                await second.write(b"ond")
                await second.commit()
        assert await fetch(store, base + "a") == b"half of second"
        (Path(base.removeprefix("file://")) / "a").unlink()


async def test_death_between_link_and_unlink(
    store: FileStore, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part is then a second name of the object: taking it over must not write into the object."""
    async with store.upload(base + "a", owner="one") as one:
        await one.write(b"whole")
        position = await one.flush()
        (tmp_path / "a").hardlink_to(tmp_path / one.id)
    with pytest.raises(Fenced):
        await _write(store, base + "a", b"!", owner="two", resume=one.id, position=position)
    assert await fetch(store, base + "a") == b"whole"
    async with store.upload(base + "a", owner="three", resume=one.id, position=2) as three:
        await three.write(b"x")
    assert await fetch(store, base + "a") == b"whole"


WRITER = """
import asyncio, sys
from flowlane.clock import SystemClock
from flowlane.connectors.file import open_store
from flowlane.ports import Environment

async def main(url):
    async with open_store(url, Environment(SystemClock(), None)) as store:
        async with store.upload(url, owner="victim") as upload:
            await upload.write(b"1" * 500_000)
            print(upload.id, await upload.flush(), flush=True)
            await upload.write(b"2" * 2_000_000)
            await asyncio.Event().wait()

asyncio.run(main(sys.argv[1]))
"""


async def test_an_upload_survives_the_death_of_its_process(store: FileStore, base: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, base + "a"], stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        name, position = victim.stdout.readline().split()
        victim.kill()
    async with store.upload(base + "a", owner="heir", resume=name, position=int(position)) as upload:
        assert upload.position == 500_000
        await upload.write(b"3")
        await upload.commit()
    assert await fetch(store, base + "a") == b"1" * 500_000 + b"3"


async def test_an_upload_is_discarded_unless_its_owner_is_alive(
    store: FileStore, base: str, tmp_path: Path
) -> None:
    async with store.upload(base + "sub/a", owner="dead") as dead:
        await dead.write(b"x")
        await dead.flush()
    (tmp_path / "sub/other.part").write_bytes(b"not ours")
    async with store.upload(base + "sub/b", owner="alive") as alive:
        await alive.write(b"still ")
        await store.discard(base + "sub/b", alive.id)
        await store.discard(base + "sub/a", dead.id)
        await alive.write(b"here")
        await alive.commit()
    with pytest.raises(Permanent, match="no unfinished upload"):
        await store.discard(base + "sub/b", "other.part")
    with pytest.raises(Permanent, match="no unfinished upload"):
        await store.discard(base + "sub/b", dead.id)
    assert await fetch(store, base + "sub/b") == b"still here"
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["b", "other.part"]


async def test_a_discarded_owner_is_fenced(store: FileStore, base: str, tmp_path: Path) -> None:
    async with store.upload(base + "a", owner="one") as one:
        await one.write(b"x")
        (tmp_path / one.id).unlink()
        with pytest.raises(Fenced):
            await one.commit()
    assert await store.head(base + "a") is None


async def test_cancelling_leaks_no_files(store: FileStore, base: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(noise(4 << 20))

    async def copy(n: int) -> None:
        async with store.read(base + "big") as body, store.upload(f"{base}{n}", owner="one") as upload:
            async for block in body:
                await upload.write(block)
            await upload.commit()

    before, cut = len(list(Path("/proc/self/fd").iterdir())), 0
    for n in range(100):
        task = asyncio.ensure_future(copy(n))
        for _ in range(n):
            await asyncio.sleep(0)
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError | None)
        cut += ended is not None
    assert cut >= 50  # each hop takes some turns; where this thread gets few, the others are done by then
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    for path in tmp_path.iterdir():  # one that was cancelled behind its commit is there, and whole
        assert parts.is_part(path.name) or path.read_bytes() == (tmp_path / "big").read_bytes()


async def test_a_missing_file_is_incomplete_and_says_so(store: FileStore, base: str) -> None:
    with pytest.raises(Incomplete, match="the file is gone"):
        await fetch(store, base + "nothing")
