"""Fan-in of one run on ``aws://``, MiniStack behind it: exact, and in how many requests a child.

50 workers in ten backends (each with clients of its own, as processes have) receive, settle and ack the
units that one discovery registers meanwhile, 64 in a commit. What is counted are the requests of everybody,
from the first commit to the one that completes the run; the SDK's retries are in them once. Afterwards the
whole log is read: every unit settled once, counters exact, the run completed by exactly one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import msgspec

from benchmarks.harness import Bar, Candidate, Case, peak_mb, python
from flowlane import events
from flowlane.errors import VersionConflict
from flowlane.ports import Backend, Commit, Committed, Delivery, Publish, QueueSpec, Tally
from flowlane.state import Counts, RunTally, StageTally
from flowlane.testing.units import LANE, RUN, append, applied, following, found

CHILDREN = 10_000
WORKERS = 50
BACKENDS = 10
CHUNK = 64


class FanIn(msgspec.Struct):
    """What came of one run: requests by operation, seconds, who saw it complete, who completed it."""

    requests: Counter[str]
    seconds: float
    told: list[RunTally]
    completed: int
    conflicts: int


async def fan_in(
    children: int, *, workers: int = WORKERS, backends: int = BACKENDS, limit: int = 10
) -> FanIn:
    """One run of `children` units on the stand-in that the environment points at, `workers` of which each
    receives up to `limit` at a time.

    Raises:
        AssertionError: it is not exact.
    """
    from tests.aws_backend import counting, opened

    name = f"fan-in-{children}-{limit}"
    with counting() as requests:
        async with AsyncExitStack() as stack:
            every = [await stack.enter_async_context(opened(name)) for _ in range(backends)]
            await every[0].create([QueueSpec("load", 30, 60)])
            run = found("run/1", run=RUN, stage="find")
            await applied(every[0], Commit((append(run),)))
            result = FanIn(requests, 0.0, [], 0, 0)
            done = asyncio.Event()
            requests.clear()
            began = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                for n in range(workers):
                    tasks.create_task(_work(every[n % backends], limit, done, result))
                tasks.create_task(_discover(every[0], children))
            result.seconds = time.monotonic() - began
            result.requests = Counter(requests)
            await _check(every[0], children, result)
    return result


async def _discover(backend: Backend, children: int) -> None:
    head = found("run/1", run=RUN, stage="find")
    for at in range(0, children, CHUNK):
        some = [found(f"u{n}") for n in range(at, min(at + CHUNK, children))]
        head = following(head, events.DISCOVERY_PROGRESS)
        last = at + CHUNK >= children
        await applied(
            backend,
            Commit(
                [append(head), *map(append, some)],
                [Publish(unit, "load") for unit in some],
                (
                    Tally(RUN, 0, "load", found=len(some)),
                    *([Tally(RUN, 0, "find", closed=True)] if last else []),
                ),
            ),
        )


async def _work(backend: Backend, limit: int, done: asyncio.Event, result: FanIn) -> None:
    while not done.is_set():
        deliveries = await backend.receive(["load"], limit, lease=60, wait=1)
        answers = await backend.commit([_settled(delivery) for delivery in deliveries])
        result.conflicts += sum(isinstance(answer, VersionConflict) for answer in answers)
        for answer in answers:
            if isinstance(answer, Committed) and (answer.tally is None or answer.tally):
                tally = await backend.tally(RUN, 0) if answer.tally is None else answer.tally[RUN, 0]
                if tally.complete:
                    result.told.append(tally)
                    won = await _complete(backend)
                    result.completed += won  # not before: others may have been at it meanwhile
                    done.set()


def _settled(delivery: Delivery) -> Commit:
    assert delivery.head is not None
    last = following(delivery.head)
    tally = Tally(RUN, 0, "load", settled=1, counts=Counts(records_in=3, records_out=2, skipped=1))
    return Commit((append(last),), (), (tally,), delivery)


async def _complete(backend: Backend) -> bool:
    head = (await backend.last([RUN]))[RUN]
    if head.type == events.RUN_COMPLETED:
        return False
    (answer,) = await backend.commit([Commit((append(following(head, events.RUN_COMPLETED)),))])
    return isinstance(answer, Committed)


async def _check(backend: Backend, children: int, result: FanIn) -> None:
    stage = StageTally(children, children, counts=Counts(3 * children, 0, 2 * children, children))
    assert result.told, "nobody saw it complete"
    assert all(tally.stages["load"] == stage for tally in result.told), "it was complete too early"
    assert result.completed == 1, f"completed {result.completed} times"
    assert (await backend.tally(RUN, 0)).stages["load"] == stage
    seen: Counter[str] = Counter()
    async for event in backend.scan(LANE):
        if event.type == events.UNIT_SETTLED:
            seen[event.subject] += 1
    assert len(seen) == children
    assert set(seen.values()) == {1}
    assert [head.subject async for head in backend.units(LANE, "open")] in ([], [RUN])


# --------------------------------------------------------------------------- the case


@contextmanager
def measured(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """MiniStack, and the workers."""
    from tests import servers

    with servers.server("ministack") as endpoint:
        yield [
            Candidate("receiving 10", python("fan_in", endpoint, size or CHILDREN, 10)),
            Candidate("receiving 1", python("fan_in", endpoint, (size or CHILDREN) // 5, 1)),
        ]


CASE = Case(
    "fan-in",
    f"{CHILDREN:,} units of one run (one by one: a fifth) settled by {WORKERS} workers on aws:// (MiniStack)",
    measured,
    {
        "requests": "requests a child",
        "dynamodb": "of DynamoDB",
        "sqs": "of SQS",
        "transactions": "transactions a child",
        "rate": "children/s",
        "peak": "peak MB",
    },
    [Bar("receiving 10", "requests", "at most", 1.5), Bar("receiving 1", "requests", "at most", 8)],
    peer="receiving 1",
    rounds=1,
)

SQS = frozenset(
    {"ReceiveMessage", "SendMessageBatch", "DeleteMessageBatch", "GetQueueUrl", "GetQueueAttributes"}
)


def main() -> None:
    """One run, and its figures."""
    from tests import servers

    endpoint, children, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.environ.update(servers.environment(endpoint))
    result = asyncio.run(fan_in(children, limit=limit))
    print(dict(result.requests), file=sys.stderr)
    sqs = sum(count for name, count in result.requests.items() if name in SQS)
    figures = {
        "requests": result.requests.total() / children,
        "sqs": sqs / children,
        "dynamodb": (result.requests.total() - sqs) / children,
        "transactions": result.requests["TransactWriteItems"] / children,
        "rate": children / result.seconds,
        "told": len(result.told),
        "conflicts": result.conflicts,
        "peak": peak_mb(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
