"""The shipped contract of stores, against S3's stand-ins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import ClassVar, cast

import pytest

from flowlane.clock import SystemClock
from flowlane.ports import Connections, Environment, Store
from flowlane.testing.store_suite import StoreSuite
from flowlane_aws.s3.store import S3Store, open_store
from flowlane_aws.s3.upload import PART

BUCKET = "flowlane-test"


@pytest.fixture
async def store(server: str) -> AsyncIterator[S3Store]:
    async with open_store("s3://", Environment(SystemClock(), cast(Connections, None))) as store:
        await store._client.create_bucket(Bucket=BUCKET)
        yield store


@pytest.fixture
def base() -> str:
    return f"s3://{BUCKET}/deep/"


class TestOnMiniStack(StoreSuite):
    """Uses the fixtures above."""

    part: ClassVar[int] = PART

    @pytest.fixture
    def server(self, ministack: str) -> str:
        return ministack


class TestOnMoto(StoreSuite):
    """A second opinion: of ranges and names, on what the server decides, which is where a range ends and how
    names are listed with and without a delimiter. The rest of those cells is the store's own arithmetic."""

    part: ClassVar[int] = PART

    @pytest.fixture
    def server(self, moto: str) -> str:
        return moto

    @pytest.mark.parametrize(("start", "end"), [(0, 1), (99_999, None), (100_000, None), (50, 10**9)])
    async def test_ranges_are_half_open(self, store: Store, base: str, start: int, end: int | None) -> None:
        await super().test_ranges_are_half_open(store, base, start, end)

    @pytest.mark.parametrize(
        ("pattern", "names"), [("*/*.csv", "d/c.csv"), ("**/*.csv", "a.csv b.csv d/c.csv d/e/f.csv")]
    )
    async def test_lists_what_matches_in_order(
        self, store: Store, base: str, pattern: str, names: str
    ) -> None:
        await super().test_lists_what_matches_in_order(store, base, pattern, names)
