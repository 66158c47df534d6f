"""What the command line says of a stage whose units a channel brings."""

import asyncio
import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from flowlane.cli.screen import Screen
from flowlane.cli.status import show_channels
from flowlane.compose import load_lane, open_application
from flowlane.ports import ChannelRecord
from flowlane.settings import Settings

Cli = Callable[..., Result]
LANE = """
from flowlane import Lane, Unit

lane = Lane("ledger")


class Change(Unit, key="n"):
    n: int
    customer: str


@lane.stage(on=lane.triggered)
async def find(event, ctx):
    for n in range(6):
        yield Change(n=n, customer="ab"[n % 2])


@lane.stage(on=Change, order="customer", via="channel")
async def apply(event, ctx):
    pass
"""


@pytest.fixture
def ran(cli_in: Cli) -> Cli:
    """The command line after a run, and a record that is junk, which a second run came across."""
    Path("ledger.py").write_text(LANE)
    assert cli_in("run", "ledger.py").exit_code == 0

    async def put() -> None:
        settings = Settings(backend="sqlite:///.flowlane/flowlane.db")
        async with open_application([load_lane("ledger.py")], settings) as app:
            await app.backend.channel("ledger/apply").put([ChannelRecord("a", b"\xffjunk")])

    asyncio.run(put())
    return cli_in


def come_across(cli: Cli) -> str:
    """Run until the junk was passed over; the name of the record."""
    for _ in range(20):
        assert cli("run", "ledger.py").exit_code == 0
        if "passed over" in (text := cli("dead", "ledger.py").stdout):
            return next(word for word in text.split() if "parked" in word)
    raise AssertionError("it was never passed over")


def test_status_says_how_far_the_channel_is(ran: Cli, document: Callable[..., Any]) -> None:
    status = document("status", "ledger.py")
    behind = [(each["position"], each["records"]) for each in status["channels"]]
    assert sorted(behind) == [("3", 0), ("3", 1)]
    assert {each["stage"] for each in status["channels"]} == {"apply"}
    assert {each["owner"] for each in status["channels"]} == {""}
    lines = ran("status", "ledger.py").stdout.splitlines()
    assert any(line.split()[:1] == ["apply"] and line.split()[-2] == "1" for line in lines), lines
    assert "1 partition of channels with nothing left when last read" in lines


def test_what_was_passed_over_is_listed_and_cannot_be_redriven(
    ran: Cli, document: Callable[..., Any]
) -> None:
    name = come_across(ran)
    dead = document("dead", "ledger.py")
    assert (dead["count"], dead["dead"], dead["passed_over"]) == (0, [], 1)
    (record,) = dead["records"]
    assert record["record"] == name
    assert record["record"].startswith("ledger/parked:apply/")
    assert "not a CloudEvents" in record["reason"]
    assert base64.b64decode(record["data"]) == b"\xffjunk"
    assert document("status", "ledger.py")["passed_over"] == 1
    assert document("status", "ledger.py")["dead"] == 0
    assert "1 record of channels passed over" in ran("status", "ledger.py").stdout
    assert document("init", "ledger.py")["dead"] == 0
    assert "nothing to redrive" in ran("redrive", "ledger.py").stdout
    refused = ran("redrive", "ledger.py", name)
    assert (refused.exit_code, "was passed over, and no unit" in refused.stderr) == (2, True)


def test_the_graph_shows_the_channel(ran: Cli, document: Callable[..., Any]) -> None:
    assert "unit_change -->|channel| stage_apply" in ran("graph", "ledger.py").stdout
    assert [stage["via"] for stage in document("graph", "ledger.py")["stages"]] == ["queue", "channel"]


def test_status_shows_seconds_and_what_is_not_known() -> None:
    def partition(number: int, **known: Any) -> dict[str, Any]:
        nothing = {"stage": "apply", "owner": "", "records": None, "seconds": None, "ended": False}
        return {**nothing, "partition": number, **known}

    shown = io.StringIO()
    show_channels(
        Screen(shown),
        [
            partition(0, owner="w1", seconds=0.0),
            partition(1, seconds=61.25),
            partition(2),  # nobody has read it yet
            partition(3, seconds=0.0),
            partition(4, ended=True),
        ],
    )
    _, _, *rows, last = shown.getvalue().splitlines()
    assert [row.split() for row in rows] == [
        ["apply", "0", "w1", "?", "0"],
        ["apply", "1", "?", "61"],
        ["apply", "2", "?", "?"],
    ]
    assert last == "2 partitions of channels with nothing left when last read"


def test_init_tells_queues_from_channels(ran: Cli, document: Callable[..., Any]) -> None:
    made = document("init", "ledger.py")
    assert (made["queues"], made["channels"]) == (["ledger/find"], ["ledger/apply"])
    assert "queues: ledger/find\nchannels: ledger/apply\n" in ran("init", "ledger.py").stdout
