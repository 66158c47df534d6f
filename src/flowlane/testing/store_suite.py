"""The contract of ``ports.Store`` as tests; a store's test file subclasses one of the two suites.

::

    class TestFileStore(StoreSuite):
        @pytest.fixture
        async def store(self):
            async with open_store("file:///", environment) as store:
                yield store

        @pytest.fixture
        def base(self, tmp_path):
            return f"file://{tmp_path}/"

A store that cannot be written to takes ``ReadableSuite`` and says in ``put`` how objects get there.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import ClassVar

import pytest

from flowlane.errors import Fenced, Incomplete, Superseded
from flowlane.ports import ObjectInfo, Store, Upload

#: "About 1 MiB": the longest block that a body may hand out.
LONGEST_BLOCK = (1 << 20) + (1 << 18)


def noise(size: int, seed: int = 0) -> bytes:
    """`size` bytes that look random and are the same every time."""
    return hashlib.shake_128(f"{size} {seed}".encode()).digest(size)


async def fetch(store: Store, url: str, *, start: int = 0, end: int | None = None, etag: str = "") -> bytes:
    """All that a read hands out."""
    async with store.read(url, start=start, end=end, etag=etag) as body:
        blocks = [block async for block in body]
    assert all(0 < len(block) <= LONGEST_BLOCK for block in blocks), (
        "blocks are non-empty, at most about 1 MiB"
    )
    return b"".join(blocks)


class ReadableSuite:
    """What every store promises to who reads. Needs the fixtures ``store`` and ``base`` (a URL that ends in a
    slash, with nothing below it), and ``put``."""

    #: Whether the store knows the size of what it gives away.
    says_sizes: ClassVar[bool] = True

    async def put(self, store: Store, url: str, data: bytes) -> None:
        """Make `data` the object at `url`, over whatever is there."""
        raise NotImplementedError

    async def test_head_of_nothing_is_none(self, store: Store, base: str) -> None:
        assert await store.head(base + "nothing.bin") is None

    async def test_head_describes_what_is_there(self, store: Store, base: str) -> None:
        await self.put(store, base + "a.bin", b"abc")
        info = await store.head(base + "a.bin")
        assert info is not None
        assert info.size == 3
        assert info.etag == "" or (info.etag[0] == info.etag[-1] == '"'), "an ETag is a strong one or none"

    async def test_a_read_gives_the_bytes_and_their_description(self, store: Store, base: str) -> None:
        data = noise(3_000_001)
        await self.put(store, base + "a.bin", data)
        head = await store.head(base + "a.bin")
        async with store.read(base + "a.bin") as body:
            assert body.proven_length
            assert head is not None
            assert (body.info.size, body.info.etag) == (len(data) if self.says_sizes else -1, head.etag)
            assert b"".join([block async for block in body]) == data

    async def test_an_empty_object(self, store: Store, base: str) -> None:
        await self.put(store, base + "empty.bin", b"")
        assert await fetch(store, base + "empty.bin") == b""

    @pytest.mark.parametrize(
        ("start", "end"),
        [(0, 1), (0, 100), (1, None), (99_999, None), (100_000, None), (5, 5), (40_000, 70_000), (50, 10**9)],
    )
    async def test_ranges_are_half_open(self, store: Store, base: str, start: int, end: int | None) -> None:
        data = noise(100_000)
        await self.put(store, base + "a.bin", data)
        info = await store.head(base + "a.bin")
        assert info is not None
        assert await fetch(store, base + "a.bin", start=start, end=end, etag=info.etag) == data[start:end]
        assert await fetch(store, base + "a.bin", start=start, end=end) == data[start:end]

    async def test_a_range_is_of_the_whole_object(self, store: Store, base: str) -> None:
        await self.put(store, base + "a.bin", noise(1000))
        async with store.read(base + "a.bin", start=10, end=20) as body:
            assert body.info.size == 1000
            assert len(b"".join([block async for block in body])) == 10

    async def test_reading_nothing_is_incomplete(self, store: Store, base: str) -> None:
        with pytest.raises(Incomplete):
            await fetch(store, base + "nothing.bin")

    async def test_a_replaced_object_is_superseded(self, store: Store, base: str) -> None:
        await self.put(store, base + "a.bin", b"first")
        before = await store.head(base + "a.bin")
        await self.put(store, base + "a.bin", b"second!")
        after = await store.head(base + "a.bin")
        assert before is not None
        assert after is not None
        if not before.etag:
            pytest.skip("this store has no ETags")
        assert before.etag != after.etag
        for start, end in [(0, None), (2, None), (1, 3)]:
            with pytest.raises(Superseded):
                await fetch(store, base + "a.bin", start=start, end=end, etag=before.etag)
        assert await fetch(store, base + "a.bin", etag=after.etag) == b"second!"

    async def test_a_body_may_be_left_early(self, store: Store, base: str) -> None:
        await self.put(store, base + "a.bin", noise(5_000_000))
        for _ in range(5):
            async with store.read(base + "a.bin") as body:
                async for _block in body:
                    break
        assert await store.head(base + "a.bin") is not None


class StoreSuite(ReadableSuite):
    """What a store promises to who also lists and writes."""

    #: What is written in one piece in these tests; ``flush`` must be able to make it safe (S3: 5 MiB).
    part: ClassVar[int] = 100_000
    #: How a pattern spells "any character": ``?`` must be encoded where a URL's query is read apart.
    any_character: ClassVar[str] = "?"

    async def put(self, store: Store, url: str, data: bytes) -> None:
        async with store.upload(url, owner="put", overwrite=True) as upload:
            if data:
                await upload.write(data)
            await upload.commit()

    # ------------------------------------------------------------------ listing

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("*.csv", "a.csv b.csv"),
            ("?.csv", "a.csv b.csv"),
            ("[b-z].csv", "b.csv"),
            ("*", "a.csv b.csv z.txt"),
            ("d/*.csv", "d/c.csv"),
            ("*/*.csv", "d/c.csv"),
            ("**/*.csv", "a.csv b.csv d/c.csv d/e/f.csv"),
            ("d/**", "d/c.csv d/e/f.csv"),
            ("d/", "d/c.csv d/e/f.csv"),
            ("**/e/*", "d/e/f.csv"),
            ("a.csv", "a.csv"),
            ("x*", ""),
            ("nothing/*", ""),
        ],
    )
    async def test_lists_what_matches_in_order(
        self, store: Store, base: str, pattern: str, names: str
    ) -> None:
        for name in ("z.txt", "b.csv", "a.csv", "d/e/f.csv", "d/c.csv"):
            await self.put(store, base + name, name.encode())
        found = [info async for info in store.list(base + pattern.replace("?", self.any_character))]
        assert [info.url for info in found] == [base + name for name in names.split()]
        for info in found:
            assert info == await store.head(info.url)

    async def test_directories_sort_among_the_names(self, store: Store, base: str) -> None:
        names = ["a-b", "a.b", "a/b", "a0", "a b", "ab/c", "a/b.c/d", "ä"]
        urls = {base + name.replace(" ", "%20").replace("ä", "%C3%A4") for name in names}
        for url in urls:
            await self.put(store, url, b"x")
        assert [info.url async for info in store.list(base + "**")] == sorted(urls)

    async def test_unfinished_uploads_are_not_listed(self, store: Store, base: str) -> None:
        async with store.upload(base + "a.bin", owner="one") as upload:
            await upload.write(noise(self.part))
            await upload.flush()
            assert [info async for info in store.list(base + "**")] == []
            assert await store.head(base + "a.bin") is None
        assert [info async for info in store.list(base + "**")] == []

    # ------------------------------------------------------------------ uploads

    async def test_an_object_appears_whole_on_commit(self, store: Store, base: str) -> None:
        data = noise(3 * self.part + 7)
        async with store.upload(base + "deep/er/a.bin", owner="one") as upload:
            for at in range(0, len(data), self.part):
                assert await store.head(base + "deep/er/a.bin") is None
                await upload.write(data[at : at + self.part])
            info = await upload.commit()
            assert await upload.commit() == info, "a commit may be repeated"
        assert info.size == len(data)
        assert await store.head(base + "deep/er/a.bin") == info
        assert await fetch(store, base + "deep/er/a.bin", etag=info.etag) == data

    async def test_many_small_writes(self, store: Store, base: str) -> None:
        data = noise(50_000)
        async with store.upload(base + "a.bin", owner="one") as upload:
            for at in range(0, len(data), 97):
                await upload.write(data[at : at + 97])
            await upload.commit()
        assert await fetch(store, base + "a.bin") == data

    async def test_leaving_without_a_commit_shows_nothing(self, store: Store, base: str) -> None:
        with contextlib.suppress(KeyError):
            async with store.upload(base + "a.bin", owner="one") as upload:
                await upload.write(b"half")
                raise KeyError
        assert await store.head(base + "a.bin") is None

    async def test_the_same_bytes_again_are_success(self, store: Store, base: str) -> None:
        data = noise(self.part + 1)
        first = await self._write(store, base + "a.bin", "one", data)
        second = await self._write(store, base + "a.bin", "two", data)
        assert (first.size, first.etag) == (second.size, second.etag)

    @pytest.mark.parametrize("other", [b"b", b"", b"aaaaaaaaaa"])
    async def test_other_bytes_are_fenced(self, store: Store, base: str, other: bytes) -> None:
        info = await self._write(store, base + "a.bin", "one", b"aaaaaaaaa")
        with pytest.raises(Fenced):
            await self._write(store, base + "a.bin", "two", other)
        assert await store.head(base + "a.bin") == info
        assert await fetch(store, base + "a.bin") == b"aaaaaaaaa"

    async def test_overwrite_replaces(self, store: Store, base: str) -> None:
        await self._write(store, base + "a.bin", "one", b"first")
        info = await self._write(store, base + "a.bin", "two", b"2", overwrite=True)
        assert await store.head(base + "a.bin") == info
        assert await fetch(store, base + "a.bin") == b"2"

    async def test_two_uploads_at_once_one_object(self, store: Store, base: str) -> None:
        async with (
            store.upload(base + "a.bin", owner="one") as one,
            store.upload(base + "a.bin", owner="two") as two,
        ):
            assert one.id != two.id
            for upload, letter in ((one, b"1"), (two, b"2"), (one, b"1")):
                await upload.write(letter * self.part)
            await two.commit()
            with pytest.raises(Fenced):
                await one.commit()
        assert await fetch(store, base + "a.bin") == b"2" * self.part

    async def test_abort_discards(self, store: Store, base: str) -> None:
        async with store.upload(base + "a.bin", owner="one") as upload:
            await upload.write(noise(self.part))
            name, position = upload.id, await upload.flush()
            await upload.abort()
            await upload.abort()
        async with store.upload(base + "a.bin", owner="two", resume=name, position=position) as upload:
            assert upload.position == 0
        assert await store.head(base + "a.bin") is None

    async def test_abort_keeps_what_was_committed(self, store: Store, base: str) -> None:
        async with store.upload(base + "a.bin", owner="one") as upload:
            await upload.write(b"whole")
            await upload.commit()
            await upload.abort()
        assert await fetch(store, base + "a.bin") == b"whole"

    # ------------------------------------------------------------------ taking over

    async def test_an_upload_is_resumed_by_another_owner(self, store: Store, base: str) -> None:
        data = noise(4 * self.part)
        name, position = await self._begin(store, base + "a.bin", "one", data[: 2 * self.part])
        async with store.upload(base + "a.bin", owner="two", resume=name, position=position) as upload:
            assert upload.position == position
            await upload.write(data[position:])
            await upload.commit()
        assert await fetch(store, base + "a.bin") == data

    async def test_an_upload_is_resumed_by_the_same_owner(self, store: Store, base: str) -> None:
        data = noise(3 * self.part)
        name, position = await self._begin(store, base + "a.bin", "one", data[: self.part])
        async with store.upload(base + "a.bin", owner="one", resume=name, position=position) as upload:
            await upload.write(data[position:])
            await upload.commit()
        assert await fetch(store, base + "a.bin") == data

    async def test_an_upload_is_resumed_again_and_again(self, store: Store, base: str) -> None:
        data = noise(5 * self.part)
        name, position = "", 0
        for turn in range(5):
            async with store.upload(
                base + "a.bin", owner=f"owner {turn}", resume=name, position=position
            ) as upload:
                assert upload.position == position
                await upload.write(data[position : position + self.part])
                name, position = upload.id, await upload.flush()
                assert position == (turn + 1) * self.part
        async with store.upload(base + "a.bin", owner="last", resume=name, position=position) as upload:
            await upload.commit()
        assert await fetch(store, base + "a.bin") == data

    async def test_what_lies_beyond_the_position_is_dropped(self, store: Store, base: str) -> None:
        name, _ = await self._begin(store, base + "a.bin", "one", b"1" * self.part, b"1" * self.part)
        async with store.upload(base + "a.bin", owner="two", resume=name, position=self.part) as upload:
            assert upload.position == self.part
            await upload.write(b"2")
            await upload.commit()
        assert await fetch(store, base + "a.bin") == b"1" * self.part + b"2"

    async def test_an_upload_that_holds_less_is_begun_afresh(self, store: Store, base: str) -> None:
        name, position = await self._begin(store, base + "a.bin", "one", b"1" * self.part)
        async with store.upload(base + "a.bin", owner="two", resume=name, position=position + 1) as upload:
            assert upload.position == 0
            await upload.write(b"2")
            await upload.commit()
        assert await fetch(store, base + "a.bin") == b"2"

    async def test_the_former_owner_is_fenced(self, store: Store, base: str) -> None:
        url = base + "a.bin"
        async with store.upload(url, owner="zombie") as zombie:
            await zombie.write(b"1" * self.part)
            position = await zombie.flush()
            async with store.upload(url, owner="next", resume=zombie.id, position=position) as upload:
                assert upload.position == position
                await self._fenced(zombie, b"Z" * self.part)
                await upload.write(b"2" * self.part)
                await self._fenced(zombie, b"Z" * self.part)
                await upload.commit()
            await self._fenced(zombie, b"Z" * self.part)
            await zombie.abort()
        assert await fetch(store, url) == b"1" * self.part + b"2" * self.part

    async def test_the_former_owner_is_fenced_before_there_is_an_object(
        self, store: Store, base: str
    ) -> None:
        url = base + "a.bin"
        async with store.upload(url, owner="zombie") as zombie:
            await zombie.write(b"1" * self.part)
            position = await zombie.flush()
            async with store.upload(url, owner="next", resume=zombie.id, position=position) as upload:
                name, position = upload.id, await upload.flush()
            await self._fenced(zombie, b"Z" * self.part)
            await zombie.abort()
        assert await store.head(url) is None
        async with store.upload(url, owner="last", resume=name, position=position) as upload:
            assert upload.position == self.part
            await upload.commit()
        assert await fetch(store, url) == b"1" * self.part

    async def test_a_discarded_upload_is_gone(self, store: Store, base: str) -> None:
        url = base + "a.bin"
        async with store.upload(url, owner="dead") as upload:
            await upload.write(b"1" * self.part)
            name, position = upload.id, await upload.flush()
        await store.discard(url, name)
        await store.discard(url, name)
        async with store.upload(url, owner="next", resume=name, position=position) as upload:
            assert upload.position == 0
            await upload.write(b"2" * self.part)
            await upload.commit()
        assert await fetch(store, url) == b"2" * self.part

    async def test_discarding_all_takes_those_that_nobody_knows_of(self, store: Store, base: str) -> None:
        url, other = base + "a.bin", base + "a.bin.b"
        names = {}
        for where, owner in ((url, "one"), (url, "two"), (other, "three")):
            async with store.upload(where, owner=owner) as upload:
                await upload.write(noise(self.part))
                names[owner] = upload.id, await upload.flush()
        async with store.upload(url, owner="four") as upload:
            await upload.write(b"2" * self.part)
            await upload.commit()
        await store.discard(url, "")
        await store.discard(url, "")
        for where, owner, gone in ((url, "one", True), (url, "two", True), (other, "three", False)):
            name, position = names[owner]
            async with store.upload(where, owner="next", resume=name, position=position) as upload:
                assert (upload.position == 0) is gone, owner
                await upload.abort()
        assert await fetch(store, url) == b"2" * self.part

    async def test_a_commit_that_nobody_heard_of(self, store: Store, base: str) -> None:
        """The owner died between its commit and its log entry; the next attempt does all of it again."""
        async with store.upload(base + "a.bin", owner="one") as upload:
            await upload.write(b"1" * self.part)
            name, position = upload.id, await upload.flush()
            await upload.commit()
        async with store.upload(base + "a.bin", owner="two", resume=name, position=position) as upload:
            rest = b"1" * (self.part - upload.position)
            if rest:
                await upload.write(rest)
            info = await upload.commit()
        assert info.size == self.part
        assert await fetch(store, base + "a.bin") == b"1" * self.part

    # ------------------------------------------------------------------ steps

    async def _write(
        self, store: Store, url: str, owner: str, data: bytes, *, overwrite: bool = False
    ) -> ObjectInfo:
        async with store.upload(url, owner=owner, overwrite=overwrite) as upload:
            if data:
                await upload.write(data)
            return await upload.commit()

    async def _begin(self, store: Store, url: str, owner: str, *blocks: bytes) -> tuple[str, int]:
        """An upload left behind, as by a process that died; its id and position."""
        async with store.upload(url, owner=owner) as upload:
            for block in blocks:
                await upload.write(block)
            position = await upload.flush()
            assert position == upload.position == sum(map(len, blocks))
            return upload.id, position

    async def _fenced(self, upload: Upload, block: bytes) -> None:
        with pytest.raises(Fenced):
            await self._write_and_commit(upload, block)

    async def _write_and_commit(self, upload: Upload, block: bytes) -> None:
        await upload.write(block)
        await upload.flush()
        await upload.commit()
