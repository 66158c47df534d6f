"""Writing to S3: parts, ownership, and doubted commits, on a stand-in behind a proxy that does harm."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest

from flowlane.errors import ConfigError, Fenced, Incomplete, Permanent, Retryable
from flowlane.ports import Upload
from flowlane.testing.store_suite import fetch, noise
from flowlane_aws.clients import open_client
from flowlane_aws.s3 import bytes as s3_bytes
from flowlane_aws.s3 import upload as s3_upload
from flowlane_aws.s3.bytes import Blocks, Comparison, Part, composite, crc_of
from flowlane_aws.s3.names import place_of
from flowlane_aws.s3.parts import sent_unhashed
from flowlane_aws.s3.store import S3Store
from flowlane_aws.s3.upload import UploadId, part_size
from tests.aws_wire import Answer
from tests.fault_proxy import Exchange, FaultProxy, Rule, lost_reply, refused
from tests.s3_stores import BASE, BUCKET, HastyClock, acquired, opened

URL = BASE + "a.bin"
KEY = "deep/a.bin"
#: Sizes of parts in these tests: MiniStack takes any.
PART, SMALLEST = 80_000, 50_000


@pytest.fixture
async def proxy(ministack: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FaultProxy]:
    """What the SDK is pointed at."""
    for module in (s3_bytes, s3_upload):
        monkeypatch.setattr(module, "SMALLEST", SMALLEST)
    monkeypatch.setattr(s3_upload, "PART", PART)
    async with FaultProxy(ministack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def clock() -> HastyClock:
    return HastyClock()


@pytest.fixture
async def store(proxy: FaultProxy, clock: HastyClock) -> AsyncIterator[S3Store]:
    async with opened(clock=clock) as store:
        yield store
        assert acquired(store) == 0, "a connection was lost"


async def _write(store: S3Store, data: bytes, owner: str = "one", **how: Any) -> None:
    async with store.upload(URL, owner=owner, **how) as upload:
        await _fill(upload, data)
        await upload.commit()


async def _fill(upload: Upload, data: bytes, step: int = 10_000) -> None:
    for at in range(0, len(data), step):
        await upload.write(data[at : at + step])


def _s3_id(name: str) -> str:
    """S3's own id of the upload called `name`."""
    return UploadId.parse(place_of(URL), name).upload


async def _unfinished(store: S3Store) -> list[str]:
    answer = await store._client.list_multipart_uploads(Bucket=BUCKET)
    return [upload["UploadId"] for upload in answer.get("Uploads", ())]


# ---------------------------------------------------------------------- requests


async def test_a_small_object_is_one_put(store: S3Store, proxy: FaultProxy) -> None:
    await _write(store, b"small")
    assert (proxy.calls["s3.PutObject"], proxy.calls["s3.UploadPart"]) == (1, 0)
    assert await _unfinished(store) == []


async def test_parts_are_as_s3_wants_them(store: S3Store, proxy: FaultProxy) -> None:
    """Numbered from 1 without a gap (where they carry checksums), and only the last one short."""
    completed: list[str] = []
    store._client.meta.events.register(
        "before-call.s3.CompleteMultipartUpload",
        lambda params, **_: completed.append(params["body"].decode()),
    )
    data = noise(1_000_001)
    async with store.upload(URL, owner="one") as upload:
        await _fill(upload, data[:300_000], 7_000)
        name, position = upload.id, await upload.flush()
        listed = await store._client.list_parts(Bucket=BUCKET, Key=KEY, UploadId=_s3_id(name))
    assert position == 252_000, "the end of a write; what is left is too short for a part"
    assert position == sum(part["Size"] for part in listed["Parts"])
    assert all(part["Size"] >= SMALLEST for part in listed["Parts"])
    async with store.upload(URL, owner="two", resume=name, position=position) as upload:
        assert upload.position == position
        await _fill(upload, data[position:], 9_000)
        await upload.commit()
    numbers = [int(number) for number in re.findall(r"<PartNumber>(\d+)<", completed[0])]
    assert numbers == list(range(1, len(numbers) + 1))
    assert completed[0].count("<ChecksumCRC32>") == len(numbers)
    assert await fetch(store, URL) == data


async def test_only_so_many_parts_are_on_their_way(store: S3Store, proxy: FaultProxy) -> None:
    """The first parts are held back: what is held, and on its way, is bounded; the writer waits."""
    arrived, full, release = 0, asyncio.Event(), asyncio.Event()

    async def held(exchange: Exchange) -> bool:
        nonlocal arrived
        arrived += 1
        if arrived >= s3_upload.AT_ONCE:
            full.set()
        await release.wait()
        return await exchange.answer(await exchange.forward())

    proxy.inject("s3.UploadPart", held, times=-1)
    data = noise(12 * PART)
    async with store.upload(URL, owner="one") as upload:
        assert isinstance(upload, s3_upload.S3Upload)
        filling = asyncio.create_task(_fill(upload, data))
        await full.wait()
        # The writer has had its turns: it waits, and more would have arrived.
        await store.head(URL)
        assert arrived == s3_upload.AT_ONCE
        assert not filling.done()
        assert sum(upload._sending.values()) + upload._held <= (s3_upload.AT_ONCE + 1) * PART
        release.set()
        await filling
        await upload.commit()
    assert await fetch(store, URL) == data


def test_part_numbers_last_for_what_s3_can_hold() -> None:
    sizes = [part_size(number) for number in range(1, 10_000)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 8 << 20
    assert sum(sizes) > 4.7 * 2**40
    assert max(sizes) < 5 << 30


async def test_over_tls_bodies_are_neither_hashed_nor_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They carry a checksum; hashing 8 MiB would block the loop."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    seen: list[Any] = []

    def stop(request: Any, **_: Any) -> None:
        seen.append(request)
        raise KeyError  # nothing is sent

    async with open_client("s3", region="eu-west-1", endpoint="https://127.0.0.1:1") as client:
        client.meta.events.register("before-call.s3", sent_unhashed)
        client.meta.events.register("before-send.s3", stop)
        with pytest.raises(KeyError):
            await client.put_object(Bucket="b", Key="k", Body=b"x", ChecksumCRC32=crc_of([b"x"]))
    assert seen[0].headers["X-Amz-Content-SHA256"] == b"UNSIGNED-PAYLOAD"
    assert seen[0].headers["x-amz-checksum-crc32"] == crc_of([b"x"]).encode()


# ---------------------------------------------------------------------- doubted commits


def _twice(proxy: FaultProxy, call: str, second: str) -> tuple[Rule, Rule]:
    """The first answer to `call` is lost; the SDK asks again, and is told `second`."""
    return proxy.inject(call, lost_reply()), proxy.inject(call, refused(404, second))


async def test_a_lost_answer_to_a_completion_is_looked_up(store: S3Store, proxy: FaultProxy) -> None:
    rules = _twice(proxy, "s3.CompleteMultipartUpload", "NoSuchUpload")
    data = noise(3 * PART)
    await _write(store, data)
    assert [rule.fired for rule in rules] == [1, 1]
    assert await fetch(store, URL) == data


async def test_a_lost_answer_to_a_put_is_looked_up(store: S3Store, proxy: FaultProxy) -> None:
    lost = proxy.inject("s3.PutObject", lost_reply())
    await _write(store, b"small")
    assert lost.fired == 1
    assert await fetch(store, URL) == b"small"


async def test_an_upload_that_is_gone_is_fenced_where_no_such_object_stands(
    store: S3Store, proxy: FaultProxy
) -> None:
    proxy.inject("s3.CompleteMultipartUpload", refused(404, "NoSuchUpload"), times=-1)
    with pytest.raises(Fenced, match="taken over or discarded"):
        await _write(store, noise(2 * PART))
    assert await store.head(URL) is None


async def test_an_error_in_an_answer_of_200_is_no_success(store: S3Store, proxy: FaultProxy) -> None:
    error = proxy.inject("s3.CompleteMultipartUpload", refused(200, "InternalError"), times=-1)
    with pytest.raises(Retryable, match="completing the upload"):
        await _write(store, noise(2 * PART))
    assert error.fired > 1, "it is worth another try"
    assert await store.head(URL) is None
    proxy.clear()
    proxy.inject("s3.CompleteMultipartUpload", refused(200, "InternalError"))
    await _write(store, noise(2 * PART))
    assert await fetch(store, URL) == noise(2 * PART)


async def test_a_completion_in_conflict_begins_afresh(store: S3Store, proxy: FaultProxy) -> None:
    """User guide, "Conditional writes": on 409 every part has to be sent again, under another upload."""
    proxy.inject("s3.CompleteMultipartUpload", refused(409, "ConditionalRequestConflict"))
    data = noise(2 * PART)
    async with store.upload(URL, owner="one") as upload:
        await _fill(upload, data)
        name, position = upload.id, await upload.flush()
        with pytest.raises(Incomplete, match="afresh"):
            await upload.commit()
    async with store.upload(URL, owner="two", resume=name, position=position) as upload:
        assert upload.position == 0
        await _fill(upload, data)
        await upload.commit()
    assert await fetch(store, URL) == data
    assert await _unfinished(store) == []


async def test_a_put_in_conflict_is_repeated(store: S3Store, proxy: FaultProxy) -> None:
    conflict = proxy.inject("s3.PutObject", refused(409, "ConditionalRequestConflict"), times=2)
    await _write(store, b"small")
    assert conflict.fired == 2
    conflict = proxy.inject("s3.PutObject", refused(409, "ConditionalRequestConflict"), times=-1)
    with pytest.raises(Retryable, match="again and again"):
        await _write(store, b"other", overwrite=True)


@pytest.mark.parametrize("size", [9, 3 * PART])
async def test_the_same_bytes_in_other_parts_are_the_same_object(store: S3Store, size: int) -> None:
    """The ETag of what stands there says nothing; its bytes do."""
    data = noise(size)
    for step in (7_000, 10_000):
        async with store.upload(URL, owner=str(step)) as upload:
            await _fill(upload, data, step)
            await upload.commit()
    assert await _unfinished(store) == []
    with pytest.raises(Fenced, match="another content"):
        await _write(store, data[:-1] + b"x")
    assert await fetch(store, URL) == data


async def test_a_part_that_cannot_be_sent_is_told(store: S3Store, proxy: FaultProxy) -> None:
    proxy.inject("s3.UploadPart", refused(503, "SlowDown"), where="partNumber=2", times=-1)
    async with store.upload(URL, owner="one") as upload:
        with pytest.raises(Retryable, match=r"uploading part 2 .*throttled"):
            await _write_on(upload)
        with pytest.raises(Retryable):
            await upload.commit()
    assert await store.head(URL) is None


async def _write_on(upload: Upload) -> None:
    for _ in range(20):
        await upload.write(noise(10_000))
    await upload.flush()


# ---------------------------------------------------------------------- whose it is


async def test_what_a_former_owner_sends_is_in_no_object(store: S3Store) -> None:
    """A part that was under way when the upload was taken over arrives, over one of the new owner's."""
    async with store.upload(URL, owner="zombie") as zombie:
        await _fill(zombie, noise(PART))
        name, position = zombie.id, await zombie.flush()
    async with store.upload(URL, owner="next", resume=name, position=position) as upload:
        await _fill(upload, noise(2 * PART, 2))
        await upload.flush()
        await store._client.upload_part(
            Bucket=BUCKET, Key=KEY, UploadId=_s3_id(upload.id), PartNumber=2, Body=noise(PART, 3)
        )
        with pytest.raises(Incomplete, match="afresh"):
            await upload.commit()
    assert await store.head(URL) is None
    assert await _unfinished(store) == []


async def test_parts_that_were_replaced_are_not_built_upon(store: S3Store) -> None:
    """As long as they were, and other bytes: the upload's name tells them apart."""
    async with store.upload(URL, owner="one") as upload:
        await _fill(upload, noise(2 * PART))
        position = await upload.flush()
        name = upload.id
    await store._client.upload_part(
        Bucket=BUCKET, Key=KEY, UploadId=_s3_id(name), PartNumber=2, Body=noise(PART, 3)
    )
    async with store.upload(URL, owner="two", resume=name, position=position) as upload:
        assert upload.position == 0


async def test_who_has_slept_asks_before_it_sends(
    store: S3Store, proxy: FaultProxy, clock: HastyClock
) -> None:
    async with store.upload(URL, owner="zombie") as zombie:
        await _fill(zombie, noise(2 * PART))
        name, position = zombie.id, await zombie.flush()
        async with store.upload(URL, owner="next", resume=name, position=position):
            clock.pushed += 60
            sent = proxy.calls["s3.UploadPart"]
            with pytest.raises(Fenced, match="taken over"):
                await zombie.write(noise(2 * PART))
            assert proxy.calls["s3.UploadPart"] == sent


async def test_a_flush_asks_before_it_sends(store: S3Store, proxy: FaultProxy) -> None:
    async with store.upload(URL, owner="zombie") as zombie:
        await zombie.write(noise(SMALLEST))
        async with store.upload(URL, owner="next", resume=zombie.id):
            sent = proxy.calls["s3.UploadPart"]
            with pytest.raises(Fenced, match="taken over"):
                await zombie.flush()
            assert proxy.calls["s3.UploadPart"] == sent


async def test_a_small_object_of_a_former_owner_is_refused(store: S3Store) -> None:
    async with store.upload(URL, owner="zombie") as zombie:
        await zombie.write(b"zombie")
        async with store.upload(URL, owner="next", resume=zombie.id) as upload:
            with pytest.raises(Fenced, match="taken over"):
                await zombie.commit()
            await upload.write(b"next")
            await upload.commit()
    assert await fetch(store, URL) == b"next"


@pytest.mark.parametrize("resume", ["x", "x.0.y.z", "%s.0", "%s.0.y.", "%s.-1.y.z"])
async def test_a_name_of_no_upload_is_refused(store: S3Store, resume: str) -> None:
    async with store.upload(URL, owner="one") as upload:
        mine = upload.id.partition(".")[0]
    with pytest.raises(Permanent, match="no unfinished upload"):
        await store.discard(URL, resume.replace("%s", mine))
    with pytest.raises(Permanent, match="no unfinished upload"):
        await store.discard(BASE + "b.bin", upload.id)


async def test_an_abort_is_repeated_until_nothing_is_left(store: S3Store, proxy: FaultProxy) -> None:
    """Parts that were under way while it was aborted may stay behind."""

    async def unheard(exchange: Exchange) -> bool:
        return await exchange.answer(Answer(204, {}, b""))

    proxy.inject("s3.AbortMultipartUpload", unheard, times=2)
    async with store.upload(URL, owner="one") as upload:
        await _fill(upload, noise(2 * PART))
        await upload.flush()
        await upload.abort()
    assert proxy.calls["s3.AbortMultipartUpload"] == 3
    assert await _unfinished(store) == []


async def test_a_cancelled_upload_sends_nothing_more(store: S3Store, proxy: FaultProxy) -> None:
    hanging = asyncio.Event()

    async def hang(exchange: Exchange) -> bool:
        hanging.set()
        return await exchange.hang()

    proxy.inject("s3.UploadPart", hang, times=-1)
    task = asyncio.create_task(_write(store, noise(5 * PART)))
    await hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {task.get_name() for task in asyncio.all_tasks() if "flowlane-s3" in task.get_name()} == set()


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/", "s3:///a", "s3://-b/a", f"s3://bucket/{'x' * 1025}"]
)
async def test_what_names_no_object_is_refused(store: S3Store, url: str) -> None:
    with pytest.raises(ConfigError, match="bad URL"):
        async with store.upload(url, owner="one"):
            pass
    with pytest.raises(ConfigError, match="folder"):
        async with store.upload(BASE + "folder/", owner="one"):
            pass


# ---------------------------------------------------------------------- bytes


def test_blocks_are_one_file() -> None:
    blocks = [noise(n, n) for n in (5, 0, 1, 100, 7)]
    whole = b"".join(blocks)
    file = Blocks(blocks)
    assert file.size == len(whole)
    for first in range(len(whole) + 2):
        for size in (1, 3, 100):
            file.seek(first)
            got = file.read(size)
            assert got == whole[first : first + len(got)]
            assert bool(got) == (first < len(whole))
    file.seek(3)
    assert (file.read(), file.tell(), file.seek(0, 2)) == (whole[3:], len(whole), len(whole))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda b: b, True),
        (lambda b: b + b"x", False),
        (lambda b: b[:-1], False),
        (lambda b: b"x" + b[1:], False),
    ],
)
def test_objects_are_compared_part_by_part(known: bool, change: Any, same: bool) -> None:
    pieces = [noise(n, n) for n in (50, 60, 7)]
    parts = [
        Part(n, len(p), hashlib.md5(p).hexdigest(), crc_of([p]) if known else "")
        for n, p in enumerate(pieces, 1)
    ]
    comparison = Comparison(parts)
    data = change(b"".join(pieces))
    for at in range(0, len(data), 40):
        comparison.feed(data[at : at + 40])
    assert comparison.close() == same
    assert composite(parts).endswith('-3"')
    assert composite([Part(1, 5, "kms-etag")]) == ""


# ---------------------------------------------------------------------- any order of events


async def test_however_it_went_the_object_is_what_the_source_has(store: S3Store) -> None:
    """Writes, flushes, deaths behind any of them, and former owners that go on: what is committed in the end
    is the source's bytes, each once."""
    undisturbed = 0
    for seed in range(12):
        url = f"{BASE}{seed}.bin"
        undisturbed += await _lived_through(store, url, noise(1_500_000, seed), random.Random(seed))
    assert 3 <= undisturbed < 12


async def _lived_through(store: S3Store, url: str, data: bytes, chance: random.Random) -> bool:
    """Whether the last of several owners could commit; if a zombie's part was in its way, another one did."""
    logged, zombies = [("", 0)], list[tuple[Upload, int]]()
    async with AsyncExitStack() as stack:
        for attempt in range(6):
            # Nobody may have heard of the last flush.
            name, position = logged[-1 if chance.random() < 0.7 else max(0, len(logged) - 2)]
            upload = await stack.enter_async_context(
                store.upload(url, owner=f"owner {attempt}", resume=name, position=position)
            )
            assert upload.position in (0, position)
            at = upload.position
            for _ in range(chance.randrange(40)):
                step = chance.choice([1, 3_000, 30_000, 90_000])
                await upload.write(data[at : at + step])
                at = min(len(data), at + step)
                if chance.random() < 0.2:
                    position = await upload.flush()
                    assert position <= at
                    logged.append((upload.id, position))
                if zombies and chance.random() < 0.1:
                    await _haunt(*chance.choice(zombies), data)
            zombies.append((upload, at))
        upload, at = zombies.pop()
        alone = True
        try:
            await _fill(upload, data[at:])
            await upload.commit()
        except Incomplete:
            alone = False
            async with store.upload(url, owner="last") as upload:
                await _fill(upload, data)
                await upload.commit()
        for zombie, at in zombies:
            with pytest.raises(Fenced):
                await _write_all(zombie, data[at:])
            await zombie.abort()
    assert await fetch(store, url) == data
    return alone


async def _haunt(zombie: Upload, at: int, data: bytes) -> None:
    """What a former owner may do before it learns that it is one."""
    with suppress(Fenced):
        await zombie.write(data[at : at + 3 * PART][::-1])


async def _write_all(zombie: Upload, rest: bytes) -> None:
    await zombie.write(rest + b"and more")
    await zombie.flush()
    await zombie.commit()
