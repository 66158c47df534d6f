"""A cold start on AWS: from the start of the process to the answer to its first SQS event.

The runtime client that AWS itself runs (awslambdaric) behind a loopback Runtime API, MiniStack for DynamoDB
and SQS. CPU time is that of the function's process as the kernel counts it, interpreter and runtime client
included; "bare runtime" is the same with a handler that does nothing, "aioboto3" one that puts an item and
sends a message as one would write it. Both events, the first and the second, open a run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, Candidate, Case, python
from tests import servers
from tests.aws_lambda.runtime_api import RuntimeApi

BACKEND = "aws://cold"

LANE = """
from flowlane import Context, Lane, Unit

lane = Lane("cold")


@lane.stage(on=lane.triggered)
async def find(event, ctx: Context):
    return
    yield
"""

PROBE = """
import json, sys, {module}


def handler(event, context):
    answer = {module}.{function}(event, context)
    with open("modules.json", "w") as file:
        json.dump(sorted(sys.modules), file)
    return answer
"""

BARE = """
def nothing(event, context):
    return {"batchItemFailures": []}


runner = None


def work(event, context):
    global runner
    import asyncio

    runner = runner or asyncio.Runner()
    return runner.run(both(event))


async def both(event):
    import aioboto3

    session = aioboto3.Session()
    async with session.client("dynamodb") as dynamodb, session.client("sqs") as sqs:
        url = (await sqs.get_queue_url(QueueName="cold-bare"))["QueueUrl"]
        key = {"pk": {"S": event["Records"][0]["messageId"]}, "sk": {"S": "1"}}
        absent = "attribute_not_exists(pk)"
        await dynamodb.put_item(TableName="cold-log", Item=key, ConditionExpression=absent)
        await sqs.send_message(QueueUrl=url, MessageBody=event["Records"][0]["body"])
    return {"batchItemFailures": []}
"""

HANDLERS = {
    "flowlane on aws://": ("flowlane.aws_lambda", "handler", BACKEND),
    "flowlane on memory://": ("flowlane.aws_lambda", "handler", "memory://"),
    "aioboto3": ("bare", "work", ""),
    "bare runtime": ("bare", "nothing", ""),
}


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """The four handlers, and the table and queues that they use."""
    (scratch / "cold_lane.py").write_text(LANE)
    (scratch / "bare.py").write_text(BARE)
    with servers.server("ministack") as endpoint:
        init = [sys.executable, "-m", "flowlane", "init", "cold_lane.py", "--backend", BACKEND]
        variables = {**os.environ, **servers.environment(endpoint)}
        subprocess.run(init, cwd=scratch, env=variables, check=True, stdout=subprocess.DEVNULL)
        make = "import boto3; boto3.client('sqs').create_queue(QueueName='cold-bare')"
        subprocess.run([sys.executable, "-c", make], env=variables, check=True)
        yield [Candidate(name, python("cold", name, scratch, endpoint)) for name in HANDLERS]


CASE = Case(
    "cold",
    "CPU milliseconds from a function's start to the answer to its first SQS event",
    opened,
    {
        "ms": "CPU ms, first event",
        "second_ms": "CPU ms more, second",
        "modules": "modules",
        "sdk": "of the SDK",
    },
    [Bar("flowlane on aws://", "ms", "at most", 1.25, "aioboto3")],
    peer="aioboto3",
    rounds=5,
)


def message(name: str) -> dict[str, Any]:
    """An SQS batch of one foreign CloudEvent, which opens a run."""
    event = {"specversion": "1.0", "id": name, "source": "shop", "type": "order", "data": {}}
    record = {
        "messageId": name,
        "receiptHandle": "r",
        "body": json.dumps(event),
        "attributes": {"ApproximateReceiveCount": "1"},
        "messageAttributes": {},
        "eventSource": "aws:sqs",
        "eventSourceARN": "arn:aws:sqs:us-east-1:000000000000:outside",
    }
    return {"Records": [record]}


def main(name: str, scratch: Path, endpoint: str) -> dict[str, float]:
    """One cold start, and a second event."""
    module, function, backend = HANDLERS[name]
    (scratch / "probe.py").write_text(PROBE.format(module=module, function=function))
    environment = {
        **servers.environment(endpoint),
        "FLOWLANE_LANE": "cold_lane.py",
        "FLOWLANE_BACKEND": backend or "memory://",
    }
    with RuntimeApi("probe.handler", scratch, environment) as api:
        assert api.invoke(message(f"m{os.getpid()}a")) == {"batchItemFailures": []}, api.log
        first = api.cpu()
        modules = json.loads((scratch / "modules.json").read_text())
        assert api.invoke(message(f"m{os.getpid()}b")) == {"batchItemFailures": []}, api.log
        second = api.cpu()
    sdk = [m for m in modules if m.partition(".")[0] in ("aioboto3", "aiobotocore", "boto3", "botocore")]
    assert backend == BACKEND or name == "aioboto3" or not sdk, sdk[:5]
    return {
        "ms": first * 1000,
        "second_ms": (second - first) * 1000,
        "modules": len(modules),
        "sdk": len(sdk),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
