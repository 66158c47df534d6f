"""A stage with ``via="channel"`` in real processes on one SQLite file."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from flowlane.worker import GRACE
from tests.kills.stage import HOLD, Ledger, under_fire

pytestmark = pytest.mark.long


def find(ledger: Ledger) -> None:
    """Open the run, as a schedule would, and end before much is done."""
    process = ledger.start("run")
    try:
        deadline = time.monotonic() + 60
        while len(ledger.applied()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


def test_the_order_of_each_customer_survives_kills_and_stops(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    try:
        find(ledger)
        under_fire(ledger, kills=4, pause=0.7, seed=1)
    finally:
        ledger.end()
    done = ledger.run()
    assert ledger.judge() == []
    assert done.returncode in (0, 1), done.stderr
    dead = ledger.run("dead")
    assert dead.returncode == 0, dead.stderr
    report = json.loads(dead.stdout)
    assert [unit["unit"] for unit in report["dead"]] == ["ledger/change/1@3"]
    assert report["records"] == []


def test_a_worker_that_is_told_to_end_leaves_its_partitions_at_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, each=200, pause=0.05)  # half a minute of work
    try:
        find(ledger)
        time.sleep(HOLD)  # what that one held is nobody's any more
        worker = ledger.start()
        begun = len(ledger.applied())
        deadline = time.monotonic() + 60
        while len(ledger.applied()) == begun:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        worker.terminate()
        began = time.monotonic()
        assert worker.wait(timeout=60) == 0
        assert time.monotonic() - began < GRACE, "what it has begun is waited for, and nothing else"
    finally:
        ledger.end()
    status = ledger.run("status")
    assert status.returncode == 0, status.stderr
    partitions = json.loads(status.stdout)["channels"]
    assert all(each["owner"] == "" for each in partitions), "held by nobody"
    assert sum(int(each["position"]) for each in partitions) > 0
    assert sum(each["records"] for each in partitions) > 0, "there was something left to do"
