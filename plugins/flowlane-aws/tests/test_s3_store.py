"""The shipped contract of stores, against S3's stand-ins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import ClassVar, cast

import pytest

from flowlane.clock import SystemClock
from flowlane.ports import Connections, Environment
from flowlane.testing.store_suite import StoreSuite
from flowlane_aws.s3.store import S3Store, open_store
from flowlane_aws.s3.upload import PART

BUCKET = "flowlane-test"


@pytest.fixture(params=["ministack", "moto"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[S3Store]:
    request.getfixturevalue(request.param)
    async with open_store("s3://", Environment(SystemClock(), cast(Connections, None))) as store:
        await store._client.create_bucket(Bucket=BUCKET)
        yield store


@pytest.fixture
def base() -> str:
    return f"s3://{BUCKET}/deep/"


class TestS3Store(StoreSuite):
    """Uses the fixtures above."""

    part: ClassVar[int] = PART
