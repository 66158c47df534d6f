"""What all tests share: reports that can be sent between the processes that the tests are spread over."""

import gc
import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Fewer examples than by default, where a test does not say how many: `make test` is to take minutes. How long
# one of them takes says more of the machine, which may stall for seconds, than of what is tested.
settings.register_profile(
    "suite", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

# Every process of `make test` collects all tests and keeps them: a third of that time went into looking for
# garbage among what stays, and some of each test's, too.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the tests that take long over the processes, each of which begins with an equal share of all:
    one after another over the first two thirds of it. Otherwise the last minute is spent waiting for them."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes == 1:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    items.clear()
    for process in range(processes):
        share = others[len(others) * process // processes : len(others) * (process + 1) // processes]
        mine = long[process::processes]
        for number, item in enumerate(mine):
            share.insert(number + len(share) * 2 // 3 * number // len(mine), item)
        items += share


def pytest_collection_finish() -> None:
    """What there is by now is no garbage; from here on there may be some."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hostile names are test data and end up in captured output: lone surrogates cannot be sent so."""
    report = yield
    report.sections = [(plain(name), plain(text)) for name, text in report.sections]
    if isinstance(report.longrepr, str):
        report.longrepr = plain(report.longrepr)
    return report


def plain(text: Any) -> str:
    """`text` with what UTF-8 cannot hold escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()
