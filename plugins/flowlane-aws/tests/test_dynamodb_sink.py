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
    """A second opinion on every kind of transaction. At which batch an attempt died is nothing that a server
    could see: one place of each kind is enough here."""

    @pytest.fixture
    def server(self, moto: str) -> str:
        return moto

    @pytest.mark.parametrize(("written", "unlogged"), [(3, 0), (3, 2)])
    async def test_the_next_attempt_goes_on_where_the_log_says(
        self, sink: Sink, written: int, unlogged: int
    ) -> None:
        await super().test_the_next_attempt_goes_on_where_the_log_says(sink, written, unlogged)

    @pytest.mark.parametrize("logged", [0, 3])
    async def test_dead_between_the_end_and_its_log_entry(self, sink: Sink, logged: int) -> None:
        await super().test_dead_between_the_end_and_its_log_entry(sink, logged)


class TestPutsOnMinistack(Suite):
    form: ClassVar[str] = "puts"

    @pytest.fixture
    def server(self, ministack: str) -> str:
        return ministack
