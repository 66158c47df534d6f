"""The DynamoDB sink keeps the contract of sinks, on both stand-ins and in both conditional forms."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import ClassVar

import pytest

from flowlane.ports import Record, Sink
from flowlane.testing.sink_suite import KeyedSuite
from flowlane_aws.dynamodb.factory import open_sink
from tests.dynamodb_tables import ENVIRONMENT, contents


class Suite(KeyedSuite):
    """The contract; the subclasses say on which server and how it is written."""

    form: ClassVar[str] = "transactions"
    refused: ClassVar[Record] = {"id": 99, "text": "x" * 500_000, "part": 0}

    @pytest.fixture
    async def sink(self, server: str) -> AsyncIterator[Sink]:
        async with open_sink(
            "dynamodb://suite", ENVIRONMENT, key="id", key_type="N", create=True, form=self.form
        ) as sink:
            yield sink

    async def contents(self) -> list[Record]:
        return contents("suite")


class TestTransactionsOnMinistack(Suite):
    @pytest.fixture
    def server(self, ministack: str) -> str:
        return ministack


class TestTransactionsOnMoto(Suite):
    @pytest.fixture
    def server(self, moto: str) -> str:
        return moto


class TestPutsOnMinistack(Suite):
    form: ClassVar[str] = "puts"

    @pytest.fixture
    def server(self, ministack: str) -> str:
        return ministack
