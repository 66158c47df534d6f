"""One large object from store to store: ``ctx.copy`` from S3 to S3 behind Lambda's entry point.

Every invocation has an artificial deadline of 20 seconds (4 for the small object), so that the copy takes
several: the same event comes again until the run is over, as SQS would have it. The large object goes
through a responder that makes the source up, at 100 MB/s (about what one connection to S3 gives; unpaced, a
machine may be through in one invocation), and keeps digests of what arrives; the small one through
MiniStack. The peak is that of the process that the lane runs in. The digests are compared after the clock
has stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import s3_server
from benchmarks.harness import Bar, Candidate, Case, peak_mb, python

if TYPE_CHECKING:
    from flowlane import Lane

SIZE = 4 << 30
SMALL = 200_000_000
#: Bytes a second of the source.
RATE = 100e6
#: Seconds that one invocation has.
DEADLINE = 20.0
SMALL_DEADLINE = 4.0
FROM, TO = "s3://source/huge.bin", "s3://target/deep/huge.bin"
_MOST = 200  # invocations


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """The responder, MiniStack, and who copies over them."""
    from tests import servers

    size = size or SIZE
    with s3_server.serving(size, RATE) as responder, servers.server("ministack") as ministack:
        yield [
            Candidate("responder", python("stores", "responder", responder, size, DEADLINE, scratch)),
            Candidate(
                "MiniStack, 200 MB",
                python("stores", "ministack", ministack, min(size, SMALL), SMALL_DEADLINE, scratch),
            ),
        ]


CASE = Case(
    "stores",
    "an object of 4 GiB from S3 to S3 behind Lambda's entry point, 20 s an invocation",
    opened,
    {
        "speed": "MB/s",
        "invocations": "invocations",
        "peak": "peak MB",
        "work_cpu": "CPU s",
        "wall": "s",
    },
    [
        Bar("responder", "peak", "at most", 150),
        Bar("responder", "invocations", "at least", 3),
        Bar("responder", "share", "at most", 1),
        Bar("MiniStack, 200 MB", "peak", "at most", 150),
        Bar("MiniStack, 200 MB", "share", "at most", 1),
    ],
    rounds=1,
)


class Remaining:
    """Lambda's context, as far as it is looked at."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def get_remaining_time_in_millis(self) -> int:
        """As Lambda's: 0 when past."""
        return max(0, int((self._end - time.monotonic()) * 1000))


def lane_of() -> Lane:
    """A lane that copies one object."""
    from flowlane import Context, Event, Lane, Unit

    class Found(Unit, key=("url",)):
        url: str

    lane = Lane("stores")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield Found(url=FROM)

    @lane.stage(on=Found, name="copy")
    async def copy(event: Event, ctx: Context) -> None:
        await ctx.copy(event.data.url, to=TO, verify="length")

    return lane


def invoke(
    lane: Lane, folder: Path, deadline: float, **environment: str
) -> tuple[int, float, dict[str, Any]]:
    """The same event again and again, until its run is over: how often, the longest, and its report. The log
    lies in `folder`."""
    from flowlane.aws_lambda.function import Function
    from flowlane.errors import Retryable

    event = {"specversion": "1.0", "id": "1", "source": "bench", "type": "go", "data": {}}
    longest = 0.0
    environment = {"FLOWLANE_BACKEND": f"sqlite:///{folder / 'log.db'}", **environment}
    with Function(lambda settings: lane, environment=environment) as function:
        for number in range(1, _MOST):
            began = time.monotonic()
            try:
                report = function(event, Remaining(deadline))
            except Retryable as error:
                seconds = time.monotonic() - began
                print(f"    {number}: {seconds:.1f} s, {peak_mb():.0f} MB: {error}", file=sys.stderr)
                longest = max(longest, seconds)
                continue
            return number, max(longest, time.monotonic() - began), report
    raise AssertionError("it does not get on")


def main(kind: str, endpoint: str, size: int, deadline: float, scratch: Path) -> dict[str, float]:
    """One candidate, in this process."""
    from tests import servers

    os.environ.update(servers.environment(endpoint))
    folder = scratch / f"{kind}-{time.monotonic_ns()}"
    folder.mkdir()
    if kind == "ministack":
        asyncio.run(prepare(size))
    began, cpu = time.perf_counter(), time.process_time()
    invocations, longest, report = invoke(lane_of(), folder, deadline)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = peak_mb()
    assert (report["outcome"], report["units"]["settled"]) == ("settled", 1), report
    check(endpoint, size) if kind == "responder" else asyncio.run(compare())
    return {
        "speed": size / seconds / 1e6,
        "work_cpu": cpu,
        "wall": seconds,
        "peak": peak,
        "invocations": float(invocations),
        "longest": longest,
        "share": longest / deadline,
    }


def check(endpoint: str, size: int) -> None:
    """What arrived is the source, part by part, and nothing is left over."""
    with urllib.request.urlopen(f"{endpoint}/digest/target/deep/huge.bin", timeout=600) as answer:
        told = json.load(answer)
    assert told["size"] == size, told["size"]
    assert all(arrived == expected for arrived, expected in told["parts"]), "another digest"
    assert not told["left"], f"{told['left']} parts are left over"


async def prepare(size: int) -> None:
    """The source, in MiniStack; its bytes are those of the responder's."""
    from flowlane_aws.clients import open_client

    source = s3_server.Source(size)
    async with open_client("s3") as client, opened_store() as store:
        for bucket in ("source", "target"):
            await client.create_bucket(Bucket=bucket)
        async with store.upload(FROM, owner="benchmark") as upload:
            for block in source.blocks(0, size):
                await upload.write(bytes(block))
            await upload.commit()


async def compare() -> None:
    """Both objects have one digest."""
    digests = set()
    async with opened_store() as store:
        for url in (FROM, TO):
            hashed = hashlib.sha256()
            async with store.read(url) as body:
                async for block in body:
                    hashed.update(block)
            digests.add(hashed.hexdigest())
    assert len(digests) == 1, "another digest"


def opened_store() -> Any:
    """The store of S3, as the plugin opens it."""
    from typing import cast

    from flowlane.clock import SystemClock
    from flowlane.ports import Connections, Environment
    from flowlane_aws.s3.store import open_store

    return open_store("s3://", Environment(SystemClock(), cast("Connections", None)))


if __name__ == "__main__":
    _, kind, endpoint, size, deadline, scratch = sys.argv
    print(json.dumps(main(kind, endpoint, int(size), float(deadline), Path(scratch))))
