"""A lane as a CloudFormation template: what ``flowlane init`` makes, and a Lambda function that works on it.

Table and queues have the names by which processes find them; CloudFormation names everything else. The
function is made where a package is named, an image or a zip: a lane with workers alone has the same template.

Property names are those of the CloudFormation template reference, limits those of the services' API
references. Pure functions; nothing here asks AWS.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from flowlane.errors import ConfigError
from flowlane.ports import Deployment, QueueSpec
from flowlane_aws.cloudformation import (
    Json,
    allow,
    arn,
    choice,
    named,
    number,
    one_of,
    policy,
    ref,
    text,
    trust,
)
from flowlane_aws.kinesis.creation import KEPT, MODE
from flowlane_aws.log.making import definition
from flowlane_aws.names import Names
from flowlane_aws.queue.creation import is_fifo, receives, settings, settings_of_dead

#: What stages ask of the log's table, the lane's queues and its streams; ``docs/aws.md`` lists the same.
OF_THE_TABLE: Final = ("BatchGetItem", "PartiQLUpdate", "PutItem", "Query", "UpdateItem")
OF_THE_QUEUES: Final = (
    "ChangeMessageVisibility",
    "DeleteMessage",
    "GetQueueAttributes",
    "GetQueueUrl",
    "ReceiveMessage",
    "SendMessage",
)
OF_THE_STREAMS: Final = (
    "DescribeStreamSummary",
    "GetRecords",
    "GetShardIterator",
    "ListShards",
    "PutRecords",
)
#: What a mapping asks of them besides, as the function (Lambda developer guide, "Using Lambda with Kinesis").
_OF_A_MAPPING: Final = ("DescribeStream",)

#: Timeouts of the function to choose from, in seconds (the last is Lambda's longest). They are a choice since
#: its queues hide messages for six of them, and a template cannot multiply.
TIMEOUTS: Final = (60, 120, 300, 600, 900)
_HIDDEN: Final = 6
#: Seconds of a function's time beyond that of its longest step (``docs/lambda.md``).
_SPARE: Final = 30
#: Some of the days that CloudWatch Logs offers.
_RETENTIONS: Final = (1, 7, 14, 30, 90, 365)
#: Messages in a batch without a batching window, which FIFO queues do not have.
_BATCH: Final = 10
#: Records in a batch of a stream (Lambda's own default), and batches of one shard at once, at most.
_RECORDS: Final = 100
_PARALLEL: Final = 10

_VARIABLE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]+")
#: What Lambda sets (its developer guide, "Reserved environment variables"), and what the template sets.
_RESERVED: Final = re.compile(
    r"FLOWLANE_(LANE|BACKEND)|LAMBDA_.*|AWS_LAMBDA_.*|AWS_(DEFAULT_)?REGION|AWS_EXECUTION_ENV"
    r"|AWS_ACCESS_KEY(_ID)?|AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN"
)


def template(names: Names, deployment: Deployment) -> Json:
    """The template of `deployment` on the backend that `names` names.

    Raises:
        ConfigError: CloudFormation, EventBridge Scheduler or SQS cannot do what the lane wants; says what.
    """
    stages = _logical(deployment.queues)
    queues: dict[str, Json] = {}
    channels: dict[str, Json] = {}
    for logical, spec in stages.items():
        if spec.via == "channel":
            channels |= _stream(names, logical, spec)
            queues |= _dead(names, logical, spec)
        else:
            queues |= _queues(names, logical, spec)
    resources = {
        "Log": _table(names),
        **queues,
        **channels,
        "FunctionLog": {
            **_of_function("Logs::LogGroup", {"RetentionInDays": ref("LogRetention")}),
            **_GONE,
        },
        "FunctionRole": _of_function("IAM::Role", _role(names, deployment.queues, queues, channels)),
        **{f"{logical}Mapping": _mapping(logical, spec) for logical, spec in stages.items()},
        **_schedules(deployment),
    }
    parameters = _parameters(deployment)
    variables = _variables(deployment.variables, {*parameters, *resources, "Function"})
    resources["Function"] = _of_function("Lambda::Function", _function(names, deployment.lane, variables))
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"flowlane: lane {deployment.lane} on {names.uri_there}",
        "Parameters": {**parameters, **{name: {"Type": "String"} for name in variables}},
        "Mappings": {"Timeouts": {str(each): {"Hidden": _HIDDEN * each} for each in TIMEOUTS}},
        "Conditions": _CONDITIONS,
        "Resources": resources,
        "Outputs": {
            "Backend": {"Description": "FLOWLANE_BACKEND of workers and commands", "Value": names.uri_there},
            "Function": {
                "Description": "The function's name",
                "Condition": "HasFunction",
                "Value": ref("Function"),
            },
        },
    }


# --------------------------------------------------------------------------- parts


def _parameters(deployment: Deployment) -> Json:
    longest = max(spec.timeout for spec in deployment.queues) + _SPARE
    timeout = next((each for each in TIMEOUTS if each >= longest), TIMEOUTS[-1])
    return {
        "Table": choice(
            "make the log's table, or use the one that another stack or `flowlane init` has made",
            ("make", "use"),
        ),
        "Image": text("URI of the function's container image in ECR; or CodeBucket and CodeKey"),
        "CodeBucket": text("bucket of the function's zip package"),
        "CodeKey": text("its key; a package that has changed needs another one"),
        "Lane": text("FLOWLANE_LANE: where in the package the lane is", deployment.reference),
        "Runtime": text("Python of the zip package", "python3.13"),
        "Architecture": choice("of the package", ("x86_64", "arm64")),
        "Memory": number("MiB; 1769 are one CPU", 1024, 128, 10240),
        "Timeout": one_of(
            f"seconds; the queues hide a message for {_HIDDEN} times as long", timeout, TIMEOUTS
        ),
        "Concurrency": number("invocations of each stage at once", 10, 2, 1000),
        "Schedules": choice("DISABLED where a worker fires the lane and sweeps", ("ENABLED", "DISABLED")),
        "Policies": {
            "Type": "CommaDelimitedList",
            "Description": "ARNs of managed policies that allow what the lane reads and writes",
            "Default": "",
        },
        "LogRetention": one_of("days that the function's log lines are kept", 30, _RETENTIONS),
    }


_CONDITIONS: Final[Json] = {
    "MakesTable": {"Fn::Equals": [{"Ref": "Table"}, "make"]},
    "HasImage": {"Fn::Not": [{"Fn::Equals": [{"Ref": "Image"}, ""]}]},
    "HasFunction": {
        "Fn::Or": [{"Condition": "HasImage"}, {"Fn::Not": [{"Fn::Equals": [{"Ref": "CodeBucket"}, ""]}]}]
    },
    "HasPolicies": {"Fn::Not": [{"Fn::Equals": [{"Fn::Join": ["", {"Ref": "Policies"}]}, ""]}]},
}

#: Of what goes with its stack. It is the default, said so that nobody has to wonder.
_GONE: Final[Json] = {"DeletionPolicy": "Delete", "UpdateReplacePolicy": "Delete"}


def _table(names: Names) -> Json:
    """The log outlives its stack: it is what keeps anything from being ingested twice."""
    kept = {"DeletionPolicy": "RetainExceptOnCreate", "UpdateReplacePolicy": "Retain"}
    properties = {"TableName": names.log, **definition()}
    return {"Type": "AWS::DynamoDB::Table", "Condition": "MakesTable", **kept, "Properties": properties}


def _queues(names: Names, logical: str, spec: QueueSpec) -> dict[str, Json]:
    """A stage's queue and its dead letters', which go with the stack: what they hold is in the log."""
    policy = {"deadLetterTargetArn": arn(f"{logical}Dead"), "maxReceiveCount": receives(spec)}
    queue = {
        "QueueName": names.queue(spec.name, ordered=spec.ordered),
        **settings(spec),
        "VisibilityTimeout": {"Fn::FindInMap": ["Timeouts", ref("Timeout"), "Hidden"]},
        "RedrivePolicy": policy,
    }
    return {
        f"{logical}Queue": {"Type": "AWS::SQS::Queue", **_GONE, "Properties": queue},
        **_dead(names, logical, spec),
    }


def _dead(names: Names, logical: str, spec: QueueSpec) -> dict[str, Json]:
    dead = {"QueueName": names.dead(spec.name, ordered=is_fifo(spec)), **settings_of_dead(spec)}
    return {f"{logical}Dead": {"Type": "AWS::SQS::Queue", **_GONE, "Properties": dead}}


def _stream(names: Names, logical: str, spec: QueueSpec) -> dict[str, Json]:
    """A stage's channel, which goes with the stack as a queue does."""
    properties = {"Name": names.stream(spec.name), "RetentionPeriodHours": KEPT, **MODE}
    return {f"{logical}Stream": {"Type": "AWS::Kinesis::Stream", **_GONE, "Properties": properties}}


def _role(
    names: Names, specs: Sequence[QueueSpec], queues: Collection[str], channels: Collection[str]
) -> Json:
    """What runs the stages may do so, and nothing else. Whether a queue is an ordered one it finds out by
    asking for the standard one of that stage first."""
    table = f"table/{names.log}"
    of_table = [named("dynamodb", table), named("dynamodb", f"{table}/index/*")]
    ordered = [spec.name for spec in specs if is_fifo(spec)]
    of_streams = [f"kinesis:{action}" for action in sorted({*OF_THE_STREAMS, *_OF_A_MAPPING})]
    others = [named("sqs", name(stage)) for stage in ordered for name in (names.queue, names.dead)]
    of_log = ["logs:CreateLogStream", "logs:PutLogEvents"]
    statements = [
        allow([f"dynamodb:{action}" for action in OF_THE_TABLE], of_table),
        allow([f"sqs:{action}" for action in OF_THE_QUEUES], [arn(queue) for queue in queues]),
        *([allow(["sqs:GetQueueUrl"], others)] if others else []),
        *([allow(of_streams, [arn(stream) for stream in channels])] if channels else []),
        allow(of_log, [arn("FunctionLog")]),
    ]
    return {
        "AssumeRolePolicyDocument": trust("lambda"),
        "ManagedPolicyArns": {"Fn::If": ["HasPolicies", ref("Policies"), ref("AWS::NoValue")]},
        "Policies": [policy(*statements)],
    }


def _function(names: Names, lane: str, variables: Mapping[str, str]) -> Json:
    """``RecursiveLoop``: a lane is a loop over SQS, and bounds it itself (``docs/lambda.md``)."""
    code = {"S3Bucket": ref("CodeBucket"), "S3Key": ref("CodeKey")}
    handler = "flowlane.aws_lambda.handler"
    environment = {
        "FLOWLANE_LANE": ref("Lane"),
        "FLOWLANE_BACKEND": names.uri_there,
        **{name: ref(parameter) for parameter, name in variables.items()},
    }
    return {
        "Description": f"flowlane: lane {lane} on {names.uri_there}",
        "PackageType": _image_or("Image", "Zip"),
        "Code": _image_or({"ImageUri": ref("Image")}, code),
        "ImageConfig": _image_or({"Command": [handler]}, ref("AWS::NoValue")),
        "Handler": _image_or(ref("AWS::NoValue"), handler),
        "Runtime": _image_or(ref("AWS::NoValue"), ref("Runtime")),
        "Architectures": [ref("Architecture")],
        "MemorySize": ref("Memory"),
        "Timeout": ref("Timeout"),
        "Role": arn("FunctionRole"),
        "RecursiveLoop": "Allow",
        "LoggingConfig": {"LogGroup": ref("FunctionLog")},
        "Environment": {"Variables": environment},
    }


def _mapping(logical: str, spec: QueueSpec) -> Json:
    if spec.via == "channel":
        return _of_function("Lambda::EventSourceMapping", _mapping_of_stream(logical, spec))
    properties = {
        "EventSourceArn": arn(f"{logical}Queue"),
        "FunctionName": ref("Function"),
        "FunctionResponseTypes": ["ReportBatchItemFailures"],
        "BatchSize": min(spec.concurrency, _BATCH),
        "ScalingConfig": {"MaximumConcurrency": ref("Concurrency")},
    }
    return _of_function("Lambda::EventSourceMapping", properties)


def _mapping_of_stream(logical: str, spec: QueueSpec) -> Json:
    """Units have a budget in the log, and what is no event is parked by the function. What ends it again and
    again is given up some time, alone, or it would keep its shard until its records are gone: as with a
    queue, later than any unit's budget is spent. Of one key there is one batch at a time in any case."""
    return {
        "EventSourceArn": arn(f"{logical}Stream"),
        "FunctionName": ref("Function"),
        "FunctionResponseTypes": ["ReportBatchItemFailures"],
        "StartingPosition": "TRIM_HORIZON",
        "BatchSize": _RECORDS,
        "ParallelizationFactor": min(spec.concurrency, _PARALLEL),
        "BisectBatchOnFunctionError": True,
        "MaximumRetryAttempts": receives(spec),
        "DestinationConfig": {"OnFailure": {"Destination": arn(f"{logical}Dead")}},
    }


def _schedules(deployment: Deployment) -> Json:
    """The sweep's, of which none is made up for, and the lane's own, whose event has no input."""
    ours = {"StringEquals": {"aws:SourceAccount": ref("AWS::AccountId")}}
    role = {
        "AssumeRolePolicyDocument": trust("scheduler", ours),
        "Policies": [policy(allow(["lambda:InvokeFunction"], [arn("Function")]))],
    }
    sweep = {
        "Input": '{"flowlane": "sweep"}',
        "RetryPolicy": {"MaximumRetryAttempts": 0, "MaximumEventAgeInSeconds": 60},
    }
    schedules = {
        "SchedulesRole": _of_function("IAM::Role", role),
        "Sweep": _schedule("rate(1 minute)", sweep),
    }
    if deployment.every:
        schedules["Every"] = _schedule(_rate(deployment), {})
    return schedules


def _schedule(rate: str, target: Json) -> Json:
    properties = {
        "ScheduleExpression": rate,
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "State": ref("Schedules"),
        "Target": {"Arn": arn("Function"), "RoleArn": arn("SchedulesRole"), **target},
    }
    return _of_function("Scheduler::Schedule", properties)


def _rate(deployment: Deployment) -> str:
    minutes, rest = divmod(deployment.every, 60)
    if rest or not minutes:
        raise ConfigError(
            f"lane {deployment.lane}: EventBridge Scheduler counts in whole minutes, and every= is "
            f"{deployment.every:g} s: choose minutes, or fire the lane by a worker"
        )
    lengths = {"day": 1440, "hour": 60, "minute": 1}
    unit = next(unit for unit, length in lengths.items() if minutes % length == 0)
    count = int(minutes) // lengths[unit]
    return f"rate({count} {unit}{'' if count == 1 else 's'})"


# --------------------------------------------------------------------------- names


def _logical(queues: Sequence[QueueSpec]) -> dict[str, QueueSpec]:
    """The stages by what their resources' names in the template begin with: letters and digits only."""
    found: dict[str, QueueSpec] = {}
    for spec in queues:
        logical = _camel(spec.name.rpartition("/")[2])
        if logical in found:
            raise ConfigError(
                f"stages {found[logical].name} and {spec.name} would both be {logical} in the template: give "
                "one of them another name="
            )
        found[logical] = spec
    return found


def _variables(names: Sequence[str], taken: Collection[str]) -> Mapping[str, str]:
    """The parameters that set the environment variables called `names`, and those."""
    found: dict[str, str] = {}
    for name in names:
        if not _VARIABLE.fullmatch(name) or _RESERVED.fullmatch(name):
            raise ConfigError(f"{name!r} is no environment variable that a Lambda function can be given")
        parameter = _camel(name.lower())
        if parameter in taken or found.setdefault(parameter, name) != name:
            raise ConfigError(
                f"the variable {name} would be {parameter} in the template, which has another one of that "
                "name: call it something else"
            )
    return found


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in re.split("[-_]", name))


def _of_function(kind: str, properties: Json) -> Json:
    return {"Type": f"AWS::{kind}", "Condition": "HasFunction", "Properties": properties}


def _image_or(image: Any, package: Any) -> Json:
    return {"Fn::If": ["HasImage", image, package]}
