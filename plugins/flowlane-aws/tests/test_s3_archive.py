"""ZIP archives on S3: their directory by ranged reads of one version of the object."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from flowlane.archive import FIRST_READ, open_archive
from flowlane.clock import SystemClock
from flowlane.errors import Superseded
from flowlane.testing.store_suite import noise
from flowlane_aws.s3.store import S3Store
from tests.fault_proxy import Exchange, FaultProxy
from tests.s3_stores import BASE, opened
from tests.streams.zip.making import Made, archive

MEMBERS = [Made(b"%05d.csv" % n, b"id\n%d\n" % n, comment=b"x" * 30) for n in range(3500)]
DATA = archive([Made(b"large.bin", noise(300_000)), *MEMBERS])


@pytest.fixture(params=["ministack", "moto"])
async def endpoint(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def store(endpoint: str) -> AsyncIterator[S3Store]:
    async with opened() as store:
        await put(store, DATA)
        yield store


async def put(store: S3Store, data: bytes) -> None:
    async with store.upload(BASE + "a.zip", owner="put", overwrite=True) as upload:
        await upload.write(data)
        await upload.commit()


async def test_two_reads_and_one_for_each_member(
    store: S3Store, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    async def seen(exchange: Exchange) -> bool:
        headers = exchange.request.headers
        asked.append((headers["range"], headers["if-match"].strip('"')))
        return await exchange.answer(await exchange.forward())

    async with FaultProxy(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.inject("s3.GetObject", seen, times=-1)
        async with opened() as watched, open_archive(watched, SystemClock(), BASE + "a.zip") as found:
            last = found.entries[-1]
            assert (len(found.entries), last.name) == (3501, "03499.csv")
            assert await found.read(last) == b"id\n3499\n"
            etag = found.info.etag
    spans = [(len(DATA) - FIRST_READ, len(DATA)), (last.limit, len(DATA) - 22), (last.offset, last.limit)]
    assert asked == [(f"bytes={start}-{end - 1}", etag.strip('"')) for start, end in spans]


async def test_one_that_is_replaced_meanwhile_is_superseded(store: S3Store) -> None:
    async with open_archive(store, SystemClock(), BASE + "a.zip") as found:
        await put(store, archive(MEMBERS))
        with pytest.raises(Superseded):
            await found.read(found.entries[0])
        old = found.info.etag
    with pytest.raises(Superseded, match=r"a\.zip: its ETag is .*, no longer"):
        async with open_archive(store, SystemClock(), BASE + "a.zip", etag=old):
            pass
