"""``docs/aws.md`` keeps its word: its lane runs by its commands, its rules are taken, and it lists every
permission that is needed."""

from __future__ import annotations

import gzip
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

from flowlane.aws_lambda.function import Function
from flowlane.cli.verbs import cli
from flowlane.compose import load_lane
from flowlane_aws.backend import open_backend
from tests.aws_backend import counting
from tests.aws_lambda.test_wanted import s3
from tests.aws_lambda.toys import Remaining

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "aws.md").read_text()
LANE = PAGE.split("```python\n")[1].split("```")[0]
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^\$ flowlane (.*)", PAGE, re.MULTILINE)]
SWEEP, RULE = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))

#: The permission that an operation takes, where it is not called like it (Service Authorization Reference).
PERMISSIONS = {
    "TransactWriteItems": {"PutItem", "UpdateItem"},
    "BatchExecuteStatement": {"PartiQLUpdate"},
    "SendMessageBatch": {"SendMessage"},
    "DeleteMessageBatch": {"DeleteMessage"},
    "ChangeMessageVisibilityBatch": {"ChangeMessageVisibility"},
}
#: Of the connectors that the lane uses; the plugin's README lists them.
CONNECTORS = {
    *("ListObjectsV2", "GetObject", "HeadObject", "PutObject", "Publish", "GetItem"),
    *("CreateMultipartUpload", "UploadPart", "ListParts", "CompleteMultipartUpload", "AbortMultipartUpload"),
}


@pytest.fixture
def world(tmp_path: Path, ministack: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with the page's lane, and what the page says is one's own to make: buckets and a topic."""
    monkeypatch.chdir(tmp_path)
    exports = shlex.split(re.findall(r"^\$ export (.*)", PAGE, re.MULTILINE)[0])
    for name, value in (each.split("=", 1) for each in exports):
        monkeypatch.setenv(name, value)
    topic = boto3.client("sns", region_name="eu-west-1").create_topic(Name="runs")["TopicArn"]
    (tmp_path / "orders.py").write_text(LANE.replace("arn:aws:sns:eu-west-1:123456789012:runs", topic))
    world = boto3.client("s3", region_name="eu-west-1")
    for bucket in ("my-lake", "my-drops"):
        world.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    rows = "".join(f"{'' if n == 150 else n},{n}\n" for n in range(300))
    world.put_object(
        Bucket="my-drops", Key="incoming/a.csv.gz", Body=gzip.compress(f"id,amount\n{rows}".encode())
    )
    return world


def call(*arguments: str) -> str:
    """What ``flowlane`` printed, and its exit code was 0."""
    result = CliRunner().invoke(cli, arguments, prog_name="flowlane")
    assert result.exit_code == 0, (arguments, result.output)
    return result.output


def items() -> int:
    """How many orders there are."""
    table = boto3.client("dynamodb", region_name="eu-west-1")
    return int(table.scan(TableName="orders", Select="COUNT")["Count"])


def allowed(who: str) -> set[str]:
    """The actions of the page's rows that begin so, without their services."""
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| {who}")]
    return {action for row in rows for action in re.findall(r"`\w+:(\w+)`", row)}


def test_the_commands_in_their_order(world: Any) -> None:
    verbs = [arguments[0] for arguments in COMMANDS]
    assert verbs == ["init", "run", "status", "trace", "dead", "redrive", "sweep", "worker"]
    said = {arguments[0]: call(*arguments) for arguments in COMMANDS if arguments[0] != "worker"}
    for made in ("prod-log", "prod-orders-load", "prod-orders-load-dead", "prod-orders-notify"):
        assert re.search(rf"\b{made}\b", said["init"])
    assert re.search(r"^load +300 +0 +299 +0 +1 +yes$", said["run"], re.MULTILINE)
    assert items() == 299
    (bad,) = world.list_objects_v2(Bucket="my-lake", Prefix="quarantine/")["Contents"]
    body = world.get_object(Bucket="my-lake", Key=bad["Key"])["Body"].read()
    assert json.loads(body)["reason"] == "an order without an id"
    assert CliRunner().invoke(cli, ["worker", "--help"]).exit_code == 0


def test_the_function_beside_the_commands(world: Any) -> None:
    call("init", "orders.py")
    lane = load_lane("orders.py")
    with Function(lambda settings: lane) as function:
        opened = function({"Records": [s3("incoming/a.csv.gz")]}, Remaining(30))
        assert opened["outcome"] == "open"
        assert set(function(SWEEP, Remaining(30))) == {"lane", "swept"}
    call("run", "orders.py")
    assert items() == 299


def test_nothing_is_asked_for_that_takes_another_permission(world: Any) -> None:
    with counting() as requests:
        call("init", "orders.py")
    init = needed(requests)
    with counting() as requests:
        for verb in ("run", "status", "trace", "dead", "redrive", "sweep"):
            call(verb, "orders.py")
    stages = needed(requests) - CONNECTORS - {"DescribeTable", "CreateTable"}  # the sink's own
    assert stages
    assert stages <= allowed("whoever runs stages")
    assert init <= allowed("whoever runs stages") | allowed("`flowlane init`")


def needed(requests: dict[str, int]) -> set[str]:
    """The permissions that those requests take."""
    return {action for name in requests for action in PERMISSIONS.get(name, {name})}


def test_the_rule_is_taken(world: Any) -> None:
    world.put_bucket_lifecycle_configuration(Bucket="my-lake", LifecycleConfiguration=RULE)
    (rule,) = world.get_bucket_lifecycle_configuration(Bucket="my-lake")["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}


def test_every_option_has_a_row() -> None:
    table = PAGE.split("| option of the URI |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    parameters = inspect.signature(open_backend).parameters.values()
    assert listed == {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE))
def test_every_link_leads_somewhere(target: str) -> None:
    assert (ROOT / "docs" / target).exists()
