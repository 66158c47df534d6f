"""Canaries in every setting and secret, every failure path that can be reached, and not one of them in logs,
events, queues, quarantine, tracebacks, answers or reprs."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import json
import logging
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from flowlane import ConfigError, veil
from flowlane.aws_lambda.function import Function
from flowlane.cli.verbs import cli
from flowlane.compose import load_lane
from flowlane.settings import Settings
from flowlane_aws.clients import open_client

pytestmark = pytest.mark.long

MARK = "CANARY"
#: Longer than any place where errors are cut, so that no half of one is left over.
LONG = "-bird" * 70


class Canaries:
    """One for each place; all begin with the mark."""

    def __init__(self) -> None:
        self._count = itertools.count()

    def __call__(self, place: str) -> str:
        return f'{MARK}{next(self._count)}-{place}/+ "q"{LONG}'


#: The lane, and how it is told where it is: see there.
LANE = str(Path(__file__).with_name("canary_lane.py"))


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(veil, "_known", {})


@pytest.fixture
def planted(ministack: str, closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, and canaries in all that the lanes, the SDK and the settings are given."""
    canary = Canaries()
    for name in [name for name in os.environ if name.startswith("FLOWLANE_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "TOKEN": canary("token"),
        "AWS_SECRET_ACCESS_KEY": canary("key").replace(" ", ""),
        "AWS_SESSION_TOKEN": canary("session").replace(" ", ""),
        "FLOWLANE_LOG_LEVEL": "debug",
        "FLOWLANE_ALLOW_PRIVATE_HOSTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    secrets = {
        "db": json.dumps({"username": "loader", "password": canary("password")}),
        "plain": canary("plain"),
        "away": f"{closed}/{quote(canary('endpoint'), safe='')}",
    }

    async def store() -> str:
        async with open_client("secretsmanager") as client:
            for name, value in secrets.items():
                await client.create_secret(Name=name, SecretString=value)
        async with open_client("sns") as client:
            return str((await client.create_topic(Name="news"))["TopicArn"])

    arn = asyncio.run(store())
    for name, value in {
        "NOTIFY": f"sns://{arn}?endpoint=secretsmanager%3A%2F%2Faway",
        "CLOSED": closed,
        "HERE": str(tmp_path),
        "LITERAL": quote(canary("literal"), safe=""),
    }.items():
        monkeypatch.setenv(f"LANE_{name}", value)
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"id": 2}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def left_in(folder: Path) -> list[str]:
    """Whatever file holds a mark: the log and its queues, quarantine, targets."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [str(file) for file in files if MARK.encode() in file.read_bytes()]


def around(text: str) -> Sequence[str]:
    """Where the mark stands in `text`, for the message of a failure."""
    places = [at for at in range(len(text)) if text.startswith(MARK, at)]
    return [text[max(0, at - 200) : at + 40] for at in places[:5]]


#: The units that end otherwise than dead: superseded, skipped, logged, never_awaited, bad_records.
ALIVE = {f"toy/thing/{n}" for n in (2, 8, 10, 11, 21)}


def invoke(*call: str) -> str:
    """All that a verb shows, on stdout and stderr; what nobody awaited is told of in it too."""
    result = CliRunner().invoke(cli, call, prog_name="flowlane")
    gc.collect()
    assert not around(result.output), (call, around(result.output))
    return result.output


def reasons(planted: Path) -> dict[str, str]:
    """Why which unit is dead, by ``flowlane dead``, once it has been seen to hold no canary."""
    shown = CliRunner().invoke(cli, ["dead", LANE, "--json"], prog_name="flowlane").stdout
    assert not around(shown)
    return {unit["unit"]: unit["reason"] for unit in json.loads(shown)["dead"]}


def test_no_verb_shows_a_canary(planted: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both lanes run, and every verb with all that there is to be shown, for people and for programs, with
    tracebacks and at debug level."""
    said = invoke("run", LANE, "--json", "--debug")
    assert "it broke: OSError: [Errno 5] ***" in said, "a driver's own line"
    assert "Task exception was never retrieved" in said
    dead = reasons(planted)
    # Each way came to where it would leak, or it would have shown nothing.
    assert {f"toy/thing/{n}" for n in range(23)} - set(dead) == ALIVE
    assert dead["toy/thing/0"] == "login as x with *** failed"
    notice = next(reason for unit, reason in dead.items() if unit.startswith("toy/notify/"))
    assert "Could not connect to the endpoint URL" in notice
    for lane in (LANE, f"{LANE}:archive"):
        invoke("run", lane)
        invoke("status", lane)
        invoke("trace", lane, "--json")
        invoke("plan", lane, "--json")
        invoke("graph", lane)
    assert "put back to work" in invoke("redrive", LANE)
    invoke("sweep", LANE, "--debug")
    invoke("init", LANE, "--debug")
    invoke("trace", LANE, "toy/thing/0")
    assert left_in(planted) == []
    own = [record for record in caplog.records if record.name.startswith("flowlane")]
    assert own
    assert not around("".join(f"{record.getMessage()} {record.exc_info} {record.args}" for record in own))


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("sqlite:///x.db?synchronous=secretsmanager%3A%2F%2Fplain", "synchronous=*** is neither"),
        ("sqlite:///x.db?synchronous=env%3A%2F%2FTOKEN", "synchronous=*** is neither"),
        (f"sqlite:///x.db?password={MARK}", "unknown option 'password'"),
        (f"sqlite://user:{MARK}@host/x.db?busy_timeout=1&busy_timeout={MARK}", "is given twice"),
        (f"postgres9://user:{MARK}@host/db?password={MARK}", "'postgres9://host/db' has scheme"),
        (f"user:{MARK}@nowhere", "'nowhere' has no scheme"),
        (f"memory://user:{MARK}@/?password={MARK}", "unknown option 'password'"),
    ],
)
def test_no_bad_backend_shows_a_canary(
    planted: Path, monkeypatch: pytest.MonkeyPatch, backend: str, said: str
) -> None:
    assert said in invoke("run", LANE, "--debug", "--backend", backend)
    environment = {"FLOWLANE_BACKEND": backend}
    with (
        Function(lambda settings: load_lane(LANE), environment=environment) as function,
        pytest.raises(ConfigError) as caught,
    ):
        function(SCHEDULED, None)
    assert not around("".join(traceback.format_exception(caught.value)))
    assert not around(repr(Settings(backend=backend)))


SCHEDULED = {
    "version": "0",
    "id": "53dc4d37-cffa-4f76-80c9-8b7d4a4d2eaa",
    "detail-type": "Scheduled Event",
    "source": "aws.events",
    "account": "123456789012",
    "time": "2024-01-01T00:00:00Z",
    "region": "us-east-1",
    "resources": ["arn:aws:events:us-east-1:123456789012:rule/every-hour"],
    "detail": {},
}


def test_no_invocation_shows_a_canary(planted: Path) -> None:
    """Lambda's own handler is on the root logger, at debug level, with a formatter that is not flowlane's;
    what a driver logs by itself is between it and its user."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.addFilter(lambda record: record.name != "a.driver")
    said_by: set[str] = set()

    def note(record: logging.LogRecord) -> bool:
        said_by.add(record.name.partition(".")[0])
        return True

    handler.addFilter(note)
    root, before = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    environment = {"FLOWLANE_BACKEND": "sqlite:///lambda.db", "FLOWLANE_ALLOW_PRIVATE_HOSTS": "1"}
    environment["FLOWLANE_LOG_LEVEL"] = "debug"
    lane = load_lane(LANE)
    try:
        with Function(lambda settings: lane, environment=environment) as function:
            answer = function(SCHEDULED, None)
            gc.collect()
            app = function._app
            assert app is not None
            held = [app, app.engine, app.connections, app.settings, *app.lanes, *lane.stages, lane.policy]
            held += [vars(app), vars(app.engine.connections)]
            assert not around(repr(held))
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    said = out.getvalue()
    assert "Task exception was never retrieved" in said
    # What the SDK says at debug level holds whole answers.
    assert not said_by & {"boto3", "botocore", "aiobotocore"}
    assert not around(said), around(said)
    assert not around(json.dumps(answer))
    assert set(reasons_of(answer)) | ALIVE >= {f"toy/thing/{n}" for n in range(23)}
    assert left_in(planted) == []


def reasons_of(answer: dict[str, Any]) -> dict[str, str]:
    """Why which unit is dead, by the report that an invocation answers with."""
    return {each["unit"]: each["reason"] for each in answer["dead"]}


async def held_by_aws() -> tuple[str, list[str]]:
    """All items of all tables as JSON, and the bodies of all messages that stand in queues."""
    items, bodies = "", []
    async with open_client("dynamodb") as dynamodb, open_client("sqs") as sqs:
        for table in (await dynamodb.list_tables())["TableNames"]:
            async for page in dynamodb.get_paginator("scan").paginate(TableName=table):
                items += json.dumps(page["Items"], default=repr)
        for queue in (await sqs.list_queues()).get("QueueUrls", ()):
            while True:
                answer = await sqs.receive_message(
                    QueueUrl=queue, MaxNumberOfMessages=10, MessageAttributeNames=["All"]
                )
                if not answer.get("Messages"):
                    break
                bodies += [json.dumps(message, default=repr) for message in answer["Messages"]]
    return items, bodies


def test_no_table_and_no_queue_holds_a_canary(planted: Path) -> None:
    """On ``aws://``: the log with all that failed, and what a redrive puts into the queues."""
    backend = ("--backend", "aws://canaries")
    invoke("init", LANE, *backend)
    report = json.loads(invoke("run", LANE, "--json", *backend).splitlines()[-1])
    assert {f"toy/thing/{n}" for n in range(23)} - set(reasons_of(report)) == ALIVE
    assert "put back to work" in invoke("redrive", LANE, *backend)
    items, bodies = asyncio.run(held_by_aws())
    assert "login as x with *** failed" in items
    assert len(bodies) >= 23 - len(ALIVE)
    assert not around(items)
    assert not around("".join(bodies))
