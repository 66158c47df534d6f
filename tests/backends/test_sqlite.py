"""The SQLite backend keeps the promises of the ports, across processes and whenever it is killed."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest

from flowlane.backends.sqlite import open_backend
from flowlane.ports import Environment
from flowlane.testing.backend_model import Opener, Storage
from flowlane.testing.backend_suite import BackendSuite
from flowlane.testing.channel_suite import ChannelSuite
from flowlane.testing.manual import ManualClock


def environment(clock: ManualClock | None = None) -> Environment:
    return Environment(clock or ManualClock(), cast("Any", None))


class SqliteStorage:
    persistent = True

    @pytest.fixture
    def storage(self, clock: ManualClock, tmp_path: Path) -> Storage:
        numbers = count()

        def new() -> Opener:
            uri = f"sqlite:///{tmp_path}/new/{next(numbers)}.db"
            return lambda: open_backend(uri, environment(clock))

        return new


class TestBackend(SqliteStorage, BackendSuite):
    pass


class TestChannel(SqliteStorage, ChannelSuite):
    pass
