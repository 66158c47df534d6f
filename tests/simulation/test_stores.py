"""The simulated stores keep every promise of their port: the simulation is only as true as they are."""

from __future__ import annotations

import pytest

from flowlane.ports import Record, Sink, TableSpec
from flowlane.testing import stores
from flowlane.testing.manual import ManualClock
from flowlane.testing.sink_suite import KeyedSuite, SinkSuite
from flowlane.testing.source_suite import SourceSuite
from flowlane.testing.store_suite import ReadableSuite, StoreSuite
from flowlane.testing.stores import Lake, Page, Web
from flowlane.testing.tables import RecordSource, Table, Tables, TableSink


@pytest.fixture(autouse=True)
def _large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BLOCK", 1 << 16)


class TestLake(StoreSuite):
    """``lake://``."""

    @pytest.fixture
    def store(self) -> Lake:
        return Lake()

    @pytest.fixture
    def base(self) -> str:
        return "lake://bucket/"


class TestWeb(ReadableSuite):
    """``web://``, behaving itself."""

    @pytest.fixture
    def store(self) -> Web:
        return Web(ManualClock())

    @pytest.fixture
    def base(self) -> str:
        return "web://host/"

    async def put(self, store: Web, url: str, data: bytes) -> None:  # type: ignore[override]  # the suite's store is ours
        store.publish(url, Page(data=data))


class TestRecords(SourceSuite):
    """``rows://``."""

    @pytest.fixture
    def source(self) -> RecordSource:
        tables = Tables()
        tables.publish("rows://a", [[{"n": n} for n in range(25)], [{"n": n} for n in range(40)]])
        return RecordSource(tables, "rows://a")


class TestTable(SinkSuite):
    """``table://``."""

    @pytest.fixture
    def sink(self) -> TableSink:
        self.table = Table()
        return TableSink(self.table)

    async def contents(self) -> list[Record]:
        return self.table.rows


class TestKeyedTable(KeyedSuite):
    """``table://`` with a ``TableSpec``."""

    @pytest.fixture
    def sink(self) -> Sink:
        self.tables = Tables()
        return self.tables.sink("table://all/", TableSpec("orders", ("id",), "upsert"))

    async def contents(self) -> list[Record]:
        return self.tables.tables["table://all/orders"].rows
