"""``flowlane init --template``: a stack of it is what ``init`` makes, and its function works on the lane."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner, Result

from flowlane.cli.verbs import cli
from flowlane_aws.deploy import OF_THE_QUEUES, OF_THE_STREAMS, OF_THE_TABLE, TIMEOUTS
from tests import servers

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "deploy" / "README.md").read_text()
EXAMPLE = ["init", "examples/gharchive.py", "--backend", "aws://gharchive", "--variable", "GHARCHIVE_LAKE"]

#: Stages with an order key, one of them on a channel, one without, one that the policy makes; a name that is
#: not one in a template.
LANE = """
import os

from flowlane import Lane, Policy, Unit

notify = os.environ.get("TOPIC", "sns://arn:aws:sns:us-east-1:000000000000:runs")
lane = Lane("parts", every="5m", policy=Policy(notify=notify, timeout="20s", retries=7))


class Part(Unit, key="n"):
    n: int
    kind: str


class Whole(Unit, key="n"):
    n: int


class Change(Unit, key="n"):
    n: int
    of: str


@lane.stage(on=lane.triggered)
async def find_all(event, ctx):
    for n in range(3):
        yield Part(n=n, kind="even" if n % 2 == 0 else "odd")


@lane.stage(on=Part, order="kind", concurrency=64)
async def join(event, ctx):
    yield Whole(n=event.data.n)


@lane.stage(on=Whole)
async def end(event, ctx):
    yield Change(n=event.data.n, of="all")


@lane.stage(on=Change, order="of", via="channel", concurrency=4)
async def apply(event, ctx):
    pass
"""

Flowlane = Callable[..., Result]


@pytest.fixture
def flowlane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flowlane:
    """The command line in a folder that holds ``parts.py``, on ``aws://prod``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWLANE_BACKEND", "aws://prod")
    (tmp_path / "parts.py").write_text(LANE)

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(cli, arguments, prog_name="flowlane")

    return call


def template(flowlane: Flowlane, *arguments: str) -> Any:
    """What ``init --template`` prints."""
    result = flowlane("init", "parts.py", "--template", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def stack(template: Any, name: str = "parts", **parameters: str) -> Mapping[str, str]:
    """A stack of `template` is there; what it put out."""
    client: Any = boto3.client("cloudformation")
    given = [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]
    client.create_stack(
        StackName=name,
        TemplateBody=json.dumps(template),
        Parameters=given,
        Capabilities=["CAPABILITY_IAM"],
    )
    client.get_waiter("stack_create_complete").wait(StackName=name, WaiterConfig={"Delay": 0.1})
    (made,) = client.describe_stacks(StackName=name)["Stacks"]
    return {output["OutputKey"]: output["OutputValue"] for output in made["Outputs"]}


def described() -> dict[str, Any]:
    """All tables, queues and streams: what they are set to, but for what is always another."""
    dynamodb: Any = boto3.client("dynamodb")
    sqs: Any = boto3.client("sqs")
    found = {}
    for name in dynamodb.list_tables()["TableNames"]:
        table = dynamodb.describe_table(TableName=name)["Table"]
        found[name] = {
            "keys": table["KeySchema"],
            "attributes": table["AttributeDefinitions"],
            "billing": table["BillingModeSummary"]["BillingMode"],
            "indexes": {
                index["IndexName"]: (index["KeySchema"], index["Projection"])
                for index in table["GlobalSecondaryIndexes"]
            },
        }
    kinesis: Any = boto3.client("kinesis")
    for name in kinesis.list_streams()["StreamNames"]:
        told = kinesis.describe_stream_summary(StreamName=name)["StreamDescriptionSummary"]
        found[name] = {"mode": told["StreamModeDetails"], "kept": told["RetentionPeriodHours"]}
    for url in sqs.list_queues().get("QueueUrls", []):
        set_to = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
        policy = json.loads(set_to.pop("RedrivePolicy", "{}"))
        policy["maxReceiveCount"] = int(policy.get("maxReceiveCount", 0))
        found[url.rpartition("/")[2]] = {
            **{name: value for name, value in set_to.items() if not name.endswith("Timestamp")},
            "RedrivePolicy": policy,
            # Defaults, which the stand-in tells of now and then.
            "ContentBasedDeduplication": set_to.get("ContentBasedDeduplication", "false"),
            "SqsManagedSseEnabled": "true",
        }
    return found


def test_the_example_is_what_init_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(cli, [*EXAMPLE, "--template"], prog_name="flowlane")
    assert result.exit_code == 0, result.output
    assert result.stdout == (ROOT / "deploy" / "gharchive.json").read_text(), " ".join(EXAMPLE)


def test_cfn_lint_has_nothing_to_say(flowlane: Flowlane, tmp_path: Path) -> None:
    (tmp_path / "parts.json").write_text(json.dumps(template(flowlane, "--variable", "TOPIC")))
    # W1030: a zip package has no bucket and no key by default; there is no function then.
    command = [str(servers.PROGRAMS / "cfn-lint"), "--ignore-checks", "W1030", "--include-checks", "I"]
    files = [str(tmp_path / "parts.json"), str(ROOT / "deploy" / "gharchive.json")]
    ended = subprocess.run([*command, "-t", *files], capture_output=True, text=True, timeout=250, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_the_page_lists_every_parameter_and_resource(flowlane: Flowlane) -> None:
    listed = {
        name
        for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
        for name in re.findall(r"`(.+?)`", row)
    }
    found = template(flowlane)
    suffixes = {name for name in listed if name.startswith("...")}
    of_stages = {name for name in found["Resources"] if name.endswith(tuple(name[3:] for name in suffixes))}
    assert sorted(re.sub(r"^.*(?=[A-Z])", "...", name) for name in of_stages) == sorted(
        [*("...Queue",) * 4, *("...Dead", "...Mapping") * 5, "...Stream"]
    )
    assert suffixes == {"...Queue", "...Dead", "...Mapping", "...Stream"}
    assert listed - suffixes == {*found["Parameters"], *found["Resources"]} - of_stages


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE))
def test_every_link_of_the_page_leads_somewhere(target: str) -> None:
    assert (ROOT / "deploy" / target).exists()


@pytest.mark.usefixtures("ministack")
def test_a_stack_is_what_init_makes(flowlane: Flowlane, ministack: str) -> None:
    assert flowlane("init", "parts.py").exit_code == 0
    made = described()
    assert {
        *("prod-log", "prod-parts-notify-dead", "prod-parts-join.fifo", "prod-parts-join-dead.fifo"),
        *("prod-parts.apply", "prod-parts-apply-dead"),
    } <= set(made)
    servers.reset(ministack)
    assert stack(template(flowlane), Timeout="120") == {"Backend": "aws://prod"}
    there = described()
    for name, queue in made.items():
        if name not in ("prod-log", "prod-parts.apply"):
            hidden = there[name].pop("VisibilityTimeout", "30")
            assert hidden == ("30" if "-dead" in name else "720")
            queue.pop("VisibilityTimeout", None)
    assert there == made
    said = flowlane("init", "parts.py", "--json")
    assert json.loads(said.stdout)["made"] == []
    assert described().keys() == made.keys()
    functions: Any = boto3.client("lambda")
    assert functions.list_functions()["Functions"] == []


@pytest.mark.usefixtures("ministack")
def test_lanes_share_a_log_which_outlives_their_stacks(flowlane: Flowlane, tmp_path: Path) -> None:
    stack(template(flowlane))
    dynamodb: Any = boto3.client("dynamodb")
    dynamodb.put_item(TableName="prod-log", Item={"pk": {"S": "stream"}, "sk": {"S": "1"}})
    (tmp_path / "parts.py").write_text(LANE.replace('Lane("parts"', 'Lane("other"'))
    stack(template(flowlane), "other", Table="use")
    cloudformation: Any = boto3.client("cloudformation")
    for name in ("parts", "other"):
        cloudformation.delete_stack(StackName=name)
        cloudformation.get_waiter("stack_delete_complete").wait(StackName=name, WaiterConfig={"Delay": 0.1})
    assert set(described()) == {"prod-log"}
    assert dynamodb.scan(TableName="prod-log")["Count"] == 1


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A MiniStack which refuses what the caller's policies do not allow; the tests themselves may do all."""
    monkeypatch.setenv("AUTH", "true")
    with servers.server("ministack") as endpoint:
        for name, value in servers.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        yield


def notices() -> tuple[str, str]:
    """A topic, and the URL of a queue that is told of what is published to it."""
    sns: Any = boto3.client("sns")
    sqs: Any = boto3.client("sqs")
    topic = sns.create_topic(Name="runs")["TopicArn"]
    queue = sqs.create_queue(QueueName="told")["QueueUrl"]
    service = {"Service": "sns.amazonaws.com"}
    allowed = {"Effect": "Allow", "Principal": service, "Action": "sqs:SendMessage", "Resource": arn(queue)}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    sqs.set_queue_attributes(QueueUrl=queue, Attributes={"Policy": policy})
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn(queue))
    return topic, queue


def policy_of(topic: str) -> str:
    """The ARN of a managed policy that allows to tell `topic`, and what the stand-in asks for besides."""
    # AWS has no such actions: batches take what each in them takes (see PERMISSIONS in test_aws_page.py).
    batches = [f"sqs:{name}Batch" for name in ("SendMessage", "DeleteMessage", "ChangeMessageVisibility")]
    batches.append("dynamodb:BatchExecuteStatement")
    allowed = {"sns:Publish": topic, **dict.fromkeys(batches, "*")}
    statements = [{"Effect": "Allow", "Action": a, "Resource": on} for a, on in allowed.items()]
    document = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam: Any = boto3.client("iam")
    return str(iam.create_policy(PolicyName="tells", PolicyDocument=document)["Policy"]["Arn"])


@pytest.mark.usefixtures("guarded")
def test_the_function_of_a_stack_works_on_the_lane_with_its_role(flowlane: Flowlane) -> None:
    sqs, functions, world = (boto3.client(service) for service in ("sqs", "lambda", "s3"))
    topic, told = notices()
    world.create_bucket(Bucket="code")
    world.put_object(Bucket="code", Key="parts-1.zip", Body=package())
    function = stack(
        template(flowlane, "--variable", "TOPIC", "--variable", "PYTHONPATH"),
        CodeBucket="code",
        CodeKey="parts-1.zip",
        Timeout="60",
        Schedules="DISABLED",
        Topic=f"sns://{topic}",
        Policies=policy_of(topic),
        # The stand-in's Lambda has no packages, and the zip has none that this process has.
        Pythonpath=os.pathsep.join(filter(None, sys.path)),
    )["Function"]
    set_to = functions.get_function_configuration(FunctionName=function)
    assert (set_to["Timeout"], set_to["MemorySize"]) == (60, 1024)

    mappings = functions.list_event_source_mappings(FunctionName=function)["EventSourceMappings"]
    (stream,) = [each for each in mappings if ":kinesis:" in each["EventSourceArn"]]
    mappings.remove(stream)
    assert stream["EventSourceArn"].endswith(":stream/prod-parts.apply")
    for mapping in mappings:  # CloudFormation turns it into a number, the stand-in falls over the text
        assert mapping["ScalingConfig"] == {"MaximumConcurrency": 10}
        scaling = {"MaximumConcurrency": 10}
        functions.update_event_source_mapping(UUID=mapping["UUID"], ScalingConfig=scaling)

    event = {"detail-type": "Scheduled Event", "source": "aws.scheduler", "time": "2024-01-01T00:00:00Z"}
    opened = invoked(functions, function, {**event, "id": "1", "detail": "{}"})
    assert opened["outcome"] == "open"
    polls = (sqs.receive_message(QueueUrl=told, WaitTimeSeconds=20) for _ in range(3))
    message = next(message for poll in polls for message in poll.get("Messages", []))
    assert opened["run"] in message["Body"]
    document = json.loads(flowlane("status", "parts.py", "--json").stdout)
    assert [(run["state"], run["units"]["settled"]) for run in document["runs"]] == [("settled", 9)]

    schedules = scheduled()
    assert {name: each["ScheduleExpression"] for name, each in schedules.items()} == {
        "Every": "rate(5 minutes)",
        "Sweep": "rate(1 minute)",
    }
    for each in schedules.values():
        assert each["State"] == "DISABLED"
        assert each["Target"]["Arn"] == set_to["FunctionArn"]
    swept = invoked(functions, function, json.loads(schedules["Sweep"]["Target"]["Input"]))
    assert swept["lane"] == "parts"
    assert [line for line in logged() if "not allowed" in line] == []

    batches = {mapping["EventSourceArn"].rpartition(":")[2]: mapping["BatchSize"] for mapping in mappings}
    assert batches == {
        "prod-parts-notify": 8,
        # Dashes are between the parts of a queue's name, and a stage's own makes it end in a digest.
        next(name for name in batches if name.startswith("prod-parts-find-all-")): 8,
        "prod-parts-join.fifo": 10,
        "prod-parts-end": 8,
    }
    assert all(each["FunctionResponseTypes"] == ["ReportBatchItemFailures"] for each in (*mappings, stream))


def test_the_mapping_of_a_stream_gives_up_later_than_the_log_and_alone(flowlane: Flowlane) -> None:
    mapping = template(flowlane)["Resources"]["ApplyMapping"]
    assert mapping["Condition"] == "HasFunction"
    assert mapping["Properties"] == {
        "EventSourceArn": {"Fn::GetAtt": ["ApplyStream", "Arn"]},
        "FunctionName": {"Ref": "Function"},
        "FunctionResponseTypes": ["ReportBatchItemFailures"],
        "StartingPosition": "TRIM_HORIZON",
        "BatchSize": 100,
        "ParallelizationFactor": 4,
        "BisectBatchOnFunctionError": True,
        "MaximumRetryAttempts": 100,  # the log's are 8
        "DestinationConfig": {"OnFailure": {"Destination": {"Fn::GetAtt": ["ApplyDead", "Arn"]}}},
    }


def arn(queue: str) -> str:
    """The queue's ARN."""
    sqs: Any = boto3.client("sqs")
    told = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])
    return str(told["Attributes"]["QueueArn"])


def package() -> bytes:
    """A zip package of the lane's file alone."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as package:
        package.writestr("parts.py", LANE)
    return target.getvalue()


def invoked(functions: Any, name: str, event: Any) -> Any:
    """What the function answers to `event`."""
    answer = functions.invoke(FunctionName=name, Payload=json.dumps(event))
    said = json.load(answer["Payload"])
    assert "FunctionError" not in answer, said
    return said


def logged() -> list[str]:
    """What the functions have logged."""
    logs: Any = boto3.client("logs")
    groups = [group["logGroupName"] for group in logs.describe_log_groups()["logGroups"]]
    lines = [
        event["message"] for each in groups for event in logs.filter_log_events(logGroupName=each)["events"]
    ]
    assert lines
    return lines


def scheduled() -> dict[str, Any]:
    """The schedules of the stack by their names in the template."""
    cloudformation: Any = boto3.client("cloudformation")
    scheduler: Any = boto3.client("scheduler")
    resources = cloudformation.describe_stack_resources(StackName="parts")["StackResources"]
    return {
        resource["LogicalResourceId"]: scheduler.get_schedule(Name=resource["PhysicalResourceId"])
        for resource in resources
        if resource["ResourceType"] == "AWS::Scheduler::Schedule"
    }


def test_the_role_allows_what_the_page_lists(flowlane: Flowlane) -> None:
    page = (ROOT / "docs" / "aws.md").read_text()
    listed = re.findall(r"^\| whoever runs stages \|.*", page, re.MULTILINE)
    assert {action for row in listed for action in re.findall(r"`\w+:(\w+)`", row)} == {
        *OF_THE_TABLE,
        *OF_THE_QUEUES,
        *OF_THE_STREAMS,
    }
    resources = template(flowlane)["Resources"]
    queues = {name for name, each in resources.items() if each["Type"] == "AWS::SQS::Queue"}
    (policy,) = resources["FunctionRole"]["Properties"]["Policies"]
    _, of_queues, of_names, of_streams, _ = policy["PolicyDocument"]["Statement"]
    assert len(of_names["Resource"]) == 2  # of the one stage with a FIFO queue
    assert of_streams["Resource"] == [{"Fn::GetAtt": ["ApplyStream", "Arn"]}]
    assert {f"kinesis:{action}" for action in OF_THE_STREAMS} <= set(of_streams["Action"])
    assert {each["Fn::GetAtt"][0] for each in of_queues["Resource"]} == queues
    assert "*" not in json.dumps(policy).replace("/index/*", "")


def test_the_function_has_time_for_the_longest_stage(flowlane: Flowlane, tmp_path: Path) -> None:
    assert template(flowlane)["Parameters"]["Timeout"]["Default"] == 60
    (tmp_path / "parts.py").write_text(LANE.replace('"20s"', '"100s"'))
    assert template(flowlane)["Parameters"]["Timeout"]["Default"] == 300
    (tmp_path / "parts.py").write_text(LANE.replace('"20s"', '"2h"'))
    found = template(flowlane)
    assert found["Parameters"]["Timeout"]["Default"] == 900
    hidden = {int(timeout): each["Hidden"] for timeout, each in found["Mappings"]["Timeouts"].items()}
    assert hidden == {timeout: 6 * timeout for timeout in TIMEOUTS}


@pytest.mark.parametrize(
    ("every", "rate"),
    [('"1m"', "1 minute"), ('"90m"', "90 minutes"), ('"1h"', "1 hour"), ('"2d"', "2 days"), ("None", None)],
)
def test_the_lane_is_scheduled_as_it_says(
    flowlane: Flowlane, tmp_path: Path, every: str, rate: str | None
) -> None:
    (tmp_path / "parts.py").write_text(LANE.replace('every="5m"', f"every={every}"))
    resources = template(flowlane)["Resources"]
    assert ("Every" in resources) == (rate is not None)
    if rate is not None:
        assert resources["Every"]["Properties"]["ScheduleExpression"] == f"rate({rate})"


def test_the_function_is_given_what_is_its_backends(flowlane: Flowlane) -> None:
    uri = (
        "aws://prod?region=eu-west-1&table=team-log&queue_prefix=team&aggregate=true&hold=10s"
        "&endpoint=http%3A%2F%2F127.0.0.1%3A1"
    )
    found = template(flowlane, "--backend", uri, "--variable", "LAKE_URL")
    function = found["Resources"]["Function"]["Properties"]
    assert function["RecursiveLoop"] == "Allow"
    assert function["Environment"]["Variables"] == {
        "FLOWLANE_LANE": {"Ref": "Lane"},
        "FLOWLANE_BACKEND": "aws://prod?table=team-log&queue_prefix=team&aggregate=true&hold=10s",
        "LAKE_URL": {"Ref": "LakeUrl"},
    }
    assert found["Parameters"]["LakeUrl"] == {"Type": "String"}
    assert found["Resources"]["Log"]["Properties"]["TableName"] == "team-log"
    assert found["Resources"]["EndQueue"]["Properties"]["QueueName"] == "team-parts-end"


def test_a_lane_from_elsewhere_lies_in_the_package_itself(flowlane: Flowlane, tmp_path: Path) -> None:
    result = flowlane("init", str(tmp_path / "parts.py:lane"), "--template", "--json")
    found = json.loads(result.stdout)
    assert found["Parameters"]["Lane"]["Default"] == "parts.py:lane"
    assert str(tmp_path) not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "was", "now", "said"),
    [
        (["--template"], '"5m"', '"90s"', "whole minutes, and every= is 90 s"),
        (["--template"], '"5m"', '"10s"', "whole minutes"),
        (["--template"], '"20s"', '"20s", lease="13h"', "longer than SQS hides"),
        (["--template"], "async def end(", "async def find_all_(", "would both be FindAll"),
        (["--template", "--variable", "AWS_REGION"], "", "", "no environment variable"),
        (["--template", "--variable", "FLOWLANE_LANE"], "", "", "no environment variable"),
        (["--template", "--variable", "no-name"], "", "", "no environment variable"),
        (["--template", "--variable", "LANE"], "", "", "LANE would be Lane"),
        (["--template", "--variable", "END_QUEUE"], "", "", "END_QUEUE would be EndQueue"),
        (["--template", "--variable", "A_B", "--variable", "A__B"], "", "", "A__B would be AB"),
        (["--template", "--backend", "memory://"], "", "", "memory:// is made by opening it"),
        (["--variable", "TOPIC"], "", "", "add --template"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    flowlane: Flowlane, tmp_path: Path, arguments: list[str], was: str, now: str, said: str
) -> None:
    (tmp_path / "parts.py").write_text(LANE.replace(was, now, 1) if was else LANE)
    result = flowlane("init", "parts.py", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
