"""SQS receive, handle and delete: flowlane with its log in memory, beside bare loops of aioboto3 and boto3.

All are measured against the same responder, which runs in a process of its own. The messages are in their
queue before the clock runs: the bare loops receive ten at a time, decode each, and delete them in one call,
as many at once as flowlane has receivers; flowlane receives, decodes, handles, appends, tallies and deletes.
CPU is that of the candidate's process. "bare client" is the loop with the settings of flowlane's own client
(no validation of parameters), "brisk client" is it with flowlane's short way for these calls as well, so that
what the engine adds stands by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import sqs_server
from benchmarks.engine import Meter
from benchmarks.harness import Bar, Candidate, Case, peak_mb, python
from flowlane.errors import VersionConflict

COUNT = 20_000
CONCURRENCY = 64
CALLS = 8


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """The three, against one responder."""
    count = size or COUNT
    with sqs_server.serving() as endpoint:
        yield [
            Candidate(kind, python("sqs", kind, count, endpoint))
            for kind in ("flowlane", "brisk client", "bare client", "aioboto3", "boto3")
        ]


CASE = Case(
    "sqs",
    "SQS messages received, handled and deleted, the log in memory, one process",
    opened,
    {"us": "CPU us a message", "rate": "messages/s", "calls": "calls a message", "peak": "peak MB"},
    [
        Bar("flowlane", "us", "at most", 1.25, "aioboto3"),
        Bar("flowlane", "us", "at most", 1.25, "bare client"),
    ],
    peer="aioboto3",
)


def events(count: int) -> list[str]:
    """As many messages as flowlane's own would be."""
    from flowlane.events import Event, encode

    return [
        encode(
            Event(f"0123456789abcdef{n:x}", "bench", "item", f"bench/item/{n}", "2026-01-01T00:00:00.000Z")
        ).decode()
        for n in range(count)
    ]


def batches(count: int) -> Iterator[list[dict[str, str]]]:
    """Entries of ``SendMessageBatch``."""
    bodies = events(count)
    for at in range(0, count, 10):
        yield [{"Id": str(n), "MessageBody": body} for n, body in enumerate(bodies[at : at + 10])]


class Beside:
    """A backend with its log in `log`, and its queues on SQS: what ``aws://`` does, less DynamoDB."""

    exact_queue = False

    def __init__(self, log: Any, queues: Any) -> None:
        self._log, self._queues = log, queues

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def commit(self, work: Sequence[Any]) -> Any:
        """Appends and tallies go to the log; what was applied is published and acked."""
        bare = [msgspec.structs.replace(commit, publish=(), ack=None) for commit in work]
        answers = await self._log.commit(bare)
        applied = [c for c, a in zip(work, answers, strict=True) if not isinstance(a, VersionConflict)]
        publish = [one for commit in applied for one in commit.publish]
        acked = [commit.ack.received for commit in applied if commit.ack is not None]
        if publish:
            assert all(await self._queues.send(publish))
        if acked:
            await self._queues.delete(acked)
        return answers

    async def receive(self, stages: Sequence[str], limit: int, *, lease: float, wait: float = 0) -> Any:
        """What SQS has, with the heads of its streams."""
        from flowlane_aws.backend import AwsDelivery

        got = await self._queues.receive(stages, limit, lease=lease, wait=wait)
        heads = await self._log.last([one.event.subject for one in got])
        return [
            AwsDelivery(one.event, one.stage, one.attempt, heads.get(one.event.subject), one, self._queues)
            for one in got
        ]

    async def given_up(self, stages: Sequence[str], limit: int) -> Any:
        """Nothing is."""
        return []


async def unknown(reference: Any) -> None:
    """No event here is so long that it would be referred to."""


async def flowlane(count: int, endpoint: str) -> dict[str, float]:
    """The engine, with the plugin's queues beside a log in memory."""
    from flowlane import Context, Lane, Policy, Unit
    from flowlane.backends.memory import MemoryBackend
    from flowlane.clock import SystemClock
    from flowlane.compose import open_application
    from flowlane.events import Event
    from flowlane.settings import Settings
    from flowlane.state import RunTally
    from flowlane.worker import run_once
    from flowlane_aws.clients import open_client
    from flowlane_aws.names import Names
    from flowlane_aws.queue.queue import HOT, Queues

    class Item(Unit, key="n"):
        n: int

    lane = Lane("bench", policy=Policy(concurrency=CONCURRENCY))
    gate = asyncio.Event()

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in range(count):
            yield Item(n=n)

    @lane.stage(on=Item)
    async def work(event: Event, ctx: Context) -> None:
        if not gate.is_set():
            await gate.wait()
        await asyncio.sleep(0)

    clock = SystemClock()
    log = MemoryBackend(clock)
    calls = 0

    def counted(**_: Any) -> None:
        nonlocal calls
        calls += 1

    async def until(reached: Callable[[RunTally], bool]) -> None:
        while not reached(await log.tally("bench/run/slot", 0)):  # noqa: ASYNC110  # the log tells nobody
            await asyncio.sleep(0.005)

    async with open_client("sqs", endpoint=endpoint, brisk=HOT) as sqs:
        queues = Queues(sqs, Names(f"bench{os.getpid()}"), clock, unknown)
        beside: Any = Beside(log, queues)
        async with open_application([lane], Settings(), backend=beside) as app:
            running = asyncio.create_task(run_once(app, lane, slot="slot"))
            await until(lambda tally: tally.closed)
            meter = Meter()
            sqs.meta.events.register("before-call.sqs", counted)
            gate.set()
            await until(lambda tally: tally.stages["work"].settled == count)
            wall, cpu = meter.lap()
            made = calls
            report = await running
    assert (report.units["settled"], report.outcome) == (count, "settled"), report
    return {"us": cpu / count * 1e6, "rate": count / wall, "calls": made / count, "peak": peak_mb()}


async def aioboto3(count: int, endpoint: str, *, bare: bool, brisk: bool = False) -> dict[str, float]:
    """A loop as one would write it with aioboto3, ``CALLS`` at once; `bare`: with our own client, which
    takes its short way for these calls if it is to be `brisk`."""
    import aioboto3 as sdk  # type: ignore[import-untyped]  # ships none

    from flowlane.events import decode
    from flowlane_aws.clients import open_client
    from flowlane_aws.queue.queue import HOT

    opening = (
        open_client("sqs", endpoint=endpoint, brisk=HOT if brisk else ())
        if bare
        else sdk.Session().client("sqs", endpoint_url=endpoint)
    )
    async with opening as sqs:
        url = (await sqs.get_queue_url(QueueName=f"bare-{os.getpid()}"))["QueueUrl"]
        for entries in batches(count):
            await sqs.send_message_batch(QueueUrl=url, Entries=entries)
        done = calls = 0

        async def work() -> None:
            nonlocal done, calls
            while done < count:
                got = await sqs.receive_message(
                    QueueUrl=url,
                    MaxNumberOfMessages=10,
                    WaitTimeSeconds=1,
                    MessageSystemAttributeNames=["ApproximateReceiveCount"],
                )
                calls += 1
                messages = got.get("Messages", [])
                if not messages:
                    continue
                for message in messages:
                    decode(message["Body"])
                    await asyncio.sleep(0)
                entries = [
                    {"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(messages)
                ]
                await sqs.delete_message_batch(QueueUrl=url, Entries=entries)
                calls += 1
                done += len(messages)

        meter = Meter()
        await asyncio.gather(*(work() for _ in range(CALLS)))
        wall, cpu = meter.lap()
    assert done == count, done
    return {"us": cpu / count * 1e6, "rate": count / wall, "calls": calls / count, "peak": peak_mb()}


def boto3(count: int, endpoint: str) -> dict[str, float]:
    """The same, one call at a time."""
    import boto3 as sdk  # type: ignore[import-untyped]  # ships none

    from flowlane.events import decode

    sqs = sdk.client("sqs", endpoint_url=endpoint)
    url = sqs.get_queue_url(QueueName=f"bare-{os.getpid()}")["QueueUrl"]
    for entries in batches(count):
        sqs.send_message_batch(QueueUrl=url, Entries=entries)
    done = calls = 0
    meter = Meter()
    while done < count:
        messages = sqs.receive_message(
            QueueUrl=url,
            MaxNumberOfMessages=10,
            WaitTimeSeconds=1,
            MessageSystemAttributeNames=["ApproximateReceiveCount"],
        ).get("Messages", [])
        for message in messages:
            decode(message["Body"])
        entries = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(messages)]
        sqs.delete_message_batch(QueueUrl=url, Entries=entries)
        calls += 2
        done += len(messages)
    wall, cpu = meter.lap()
    return {"us": cpu / count * 1e6, "rate": count / wall, "calls": calls / count, "peak": peak_mb()}


def main(kind: str, count: int, endpoint: str) -> dict[str, float]:
    """One candidate, in this process."""
    from tests.servers import environment

    os.environ.update(environment(endpoint))
    if kind == "boto3":
        return boto3(count, endpoint)
    if kind == "flowlane":
        return asyncio.run(flowlane(count, endpoint))
    return asyncio.run(aioboto3(count, endpoint, bare=kind.endswith("client"), brisk=kind == "brisk client"))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
