"""Whatever a network and AWS do to single calls of a run, the run ends right: fault by call by position.

In every cell a lane lists a bucket and copies what it finds into another one, with its log on DynamoDB and
its queues on SQS, through a proxy that does one thing wrong. However that goes, the copies are the same byte
for byte and made once, the log is consistent, and no connection, task or unfinished upload is left behind.

FLOWLANE_ALL_CELLS=1 adds the cells that differ from others by little.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache
from typing import Any, Literal

import aiohttp
import msgspec
import pytest
from aiobotocore.config import AioConfig
from botocore.retries.standard import ExponentialBackoff
from botocore.session import get_session

from flowlane import Context, Lane, Policy, Unit, pump
from flowlane.compose import Application, open_application
from flowlane.errors import Retryable
from flowlane.ports import QueueSpec
from flowlane.settings import Settings
from flowlane.testing import oracle
from flowlane.worker import run_once
from flowlane_aws import clients
from flowlane_aws.log import commits, items, table, tallies
from flowlane_aws.s3 import upload as s3_upload
from flowlane_aws.trust import Connections
from tests.aws_wire import Answer
from tests.fault_proxy import (
    Exchange,
    Fault,
    FaultProxy,
    Rule,
    another_etag,
    changed,
    cut,
    hanging,
    ignored_range,
    lost_reply,
    lost_request,
    passed,
    refused,
    slow,
    stalled,
    throttled,
    truncated,
)

#: Bytes of a part of the copies here.
PART = 5 << 20
SMALL = {
    "a.bin": hashlib.shake_256(b"a").digest(300_000),
    "b c+d.bin": hashlib.shake_256(b"b").digest(2_000),
}
LARGE = {"large.bin": hashlib.shake_256(b"c").digest(2 * PART + 700_000)}
LEASE = 2.0
#: Seconds without an answer after which the SDK gives a call up; longer than a long poll takes.
IMPATIENCE = 1.5
#: How often a call must fail for the SDK to give it up, and for whoever repeats it to meet the fault, too.
PAST_SDK = 4
#: ... and for whoever repeats it to give it up as well: 4 or 5 times what the SDK does, or 12 transactions.
PAST_ALL = 16
#: Of what is asked for again in the same place, one call each is throttled; of the others it is alike.
THROTTLED = (
    "s3.GetObject",
    "s3.UploadPart",
    "sqs.SendMessageBatch",
    "sqs.DeleteMessageBatch",
    "dynamodb.PutItem",
    "dynamodb.TransactWriteItems",
    "dynamodb.Query",
)


class Found(Unit, key=("url",)):
    url: str
    etag: str


def copying(pinned: bool) -> Lane:
    """The lane; it pins what it copies to the ETag that was listed, or not."""
    policy = Policy(lease=LEASE, timeout=20.0, retries=8, backoff=0.02, backoff_cap=0.1, concurrency=3)
    lane = Lane("copies", policy=policy)

    @lane.stage(on=lane.triggered)
    async def find(event: Any, ctx: Context) -> AsyncIterator[Found]:
        async for found in ctx.list("s3://drops/in/*"):
            yield Found(url=found.url, etag=found.etag)

    @lane.stage(on=Found)
    async def copy(event: Any, ctx: Context) -> None:
        name = event.data.url.rpartition("/")[2]
        etag = event.data.etag if pinned else ""
        await ctx.copy(event.data.url, to=f"s3://lake/out/{name}", etag=etag)

    return lane


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A fault, the call that meets it, and where: ``where`` is looked for in the request, ``nth`` and
    ``times`` count calls; ``after`` are faults that other calls meet before."""

    name: str
    call: str
    fault: Fault
    where: str = ""
    nth: int = 1
    times: int = 1
    large: bool = False  #: one object in three parts is copied, instead of two in one piece
    pinned: bool = True
    after: tuple[tuple[str, Fault], ...] = ()
    ends: Literal["settled", "superseded"] = "settled"
    orphans: int = 0  #: uploads that nobody can know of, left to the bucket's lifecycle rule
    alike: bool = False  #: to another cell

    @property
    def objects(self) -> dict[str, bytes]:
        """What is to be copied."""
        return LARGE if self.large else SMALL

    def inject(self, proxy: FaultProxy) -> list[Rule]:
        """The proxy does it from now on."""
        rules = [proxy.inject(call, fault) for call, fault in self.after]
        return [*rules, proxy.inject(self.call, self.fault, where=self.where, nth=self.nth, times=self.times)]


@pytest.fixture
def connectors(monkeypatch: pytest.MonkeyPatch) -> list[aiohttp.BaseConnector]:
    """The pools of all clients that are opened, which give calls up sooner than they otherwise would."""
    made: list[aiohttp.BaseConnector] = []

    def kept(*_: Any) -> aiohttp.BaseConnector:
        made.append(aiohttp.TCPConnector())
        return made[-1]

    def hasty(**settings: Any) -> AioConfig:
        return AioConfig(**settings | {"read_timeout": IMPATIENCE, "connect_timeout": IMPATIENCE})

    monkeypatch.setattr(Connections, "_create_connector", kept)
    monkeypatch.setattr(clients, "AioConfig", hasty)
    monkeypatch.setattr(
        ExponentialBackoff, "delay_amount", lambda self, context: 0.01
    )  # of the SDK: 1 s, 2 s
    monkeypatch.setattr(s3_upload, "PART", PART)
    monkeypatch.setattr(commits, "GRACE", 0.3)
    monkeypatch.setattr(table, "_PAUSE", 0.1)
    monkeypatch.setattr(pump, "_POLL", 1.0)
    for module in (
        items,
        tallies,
        commits,
    ):  # each poll and each sweep asks every shard: most calls of a cell
        monkeypatch.setattr(module, "SHARDS", 2)
    return made


@pytest.fixture
def buckets(ministack: str, ministack_process: str) -> Any:
    """S3 as the test itself sees it, past the proxy."""
    s3 = _s3(ministack_process)
    for name in ("drops", "lake"):
        s3.create_bucket(Bucket=name)
    s3.put_bucket_versioning(Bucket="lake", VersioningConfiguration={"Status": "Enabled"})
    return s3


@cache
def _s3(endpoint: str) -> Any:
    return get_session().create_client("s3", endpoint_url=endpoint)


@asynccontextmanager
async def opened(lane: Lane) -> AsyncIterator[Application]:
    """The lane on AWS, its queues and table made."""
    async with open_application([lane], Settings(backend="aws://cell")) as app:
        await app.backend.create([QueueSpec(stage.queue, LEASE, 20.0) for stage in lane.stages])
        yield app


def written(s3: Any) -> dict[str, list[str]]:
    """Digests of all versions of all copies."""
    found: dict[str, list[str]] = {}
    for entry in s3.list_object_versions(Bucket="lake").get("Versions", ()):
        answer = s3.get_object(Bucket="lake", Key=entry["Key"], VersionId=entry["VersionId"])
        found.setdefault(entry["Key"], []).append(digest(answer["Body"].read()))
    return found


def digest(data: bytes) -> str:
    """Size and content, as short as a failure is read."""
    return f"{len(data)} bytes, {hashlib.sha256(data).hexdigest()[:16]}"


async def at_rest(app: Application, lane: Lane, proxy: FaultProxy, connectors: Sequence[Any]) -> oracle.Log:
    """The log once the run has ended; no connection is in use, and the log is consistent."""
    polls = [task for task in asyncio.all_tasks() if task.get_name() == "flowlane-aws poll"]
    await asyncio.gather(*polls)  # what was waited for is given back when the wait has ended
    assert [connector._acquired for connector in connectors if connector._acquired] == []
    proxy.clear()
    assert await oracle.check(app.backend, lane) == []
    return await oracle.Log.read(app.backend, lane)


def unfinished(s3: Any, log: oracle.Log) -> int:
    """How many uploads are left unfinished; none that the log knows of."""
    left = [upload["UploadId"] for upload in s3.list_multipart_uploads(Bucket="lake").get("Uploads", ())]
    named = b"".join(bytes(event.data) for event in log.events)
    assert [upload for upload in left if upload.encode() in named] == []
    return len(left)


def tasks() -> set[asyncio.Task[Any]]:
    """What runs beside the test, the proxy aside."""
    own = {"FaultProxy._connected", asyncio.current_task().get_coro().__qualname__}  # type: ignore[union-attr]
    return {task for task in asyncio.all_tasks() if task.get_coro().__qualname__ not in own}  # type: ignore[union-attr]


# ------------------------------------------------------------------------------- faults of one call


async def error_in_200(exchange: Exchange) -> bool:
    """CompleteMultipartUpload has begun its answer when it fails (API reference): nothing was completed."""
    text = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>injected</Message></Error>"
    return await exchange.answer(Answer(200, {"content-type": "application/xml"}, text))


async def first_entry_failed(exchange: Exchange) -> bool:
    """Of a batch, the first entry fails; the others are done."""
    asked = json.loads(exchange.request.body)
    failed, *others = asked["Entries"]
    said: dict[str, Any] = {"Successful": []}
    if others:
        exchange.request.body = json.dumps(asked | {"Entries": others}).encode()
        said = json.loads((await exchange.forward()).body)
    said["Failed"] = [{"Id": failed["Id"], "Code": "InternalError", "SenderFault": False}]
    body = json.dumps(said).encode()
    return await exchange.answer(Answer(200, {"content-type": "application/x-amz-json-1.0"}, body))


async def conflict(exchange: Exchange) -> bool:
    """A transaction is cancelled because another one is at work on one of its items."""
    count = len(json.loads(exchange.request.body)["TransactItems"])
    reasons = [{"Code": "None"}] * (count - 1) + [{"Code": "TransactionConflict", "Message": "injected"}]
    said = {"__type": "x#TransactionCanceledException", "message": "injected", "CancellationReasons": reasons}
    body = json.dumps(said).encode()
    return await exchange.answer(Answer(400, {"content-type": "application/x-amz-json-1.0"}, body))


def any_of(chance: random.Random, share: float = 0.1) -> Fault:
    """Any of the faults that may happen to any call, to a `share` of them."""

    async def fault(exchange: Exchange) -> bool:
        if chance.random() >= share:
            return await passed(exchange)
        cut_off = cut(-1, reset=chance.random() < 0.5)
        faults = (
            lost_request(),
            lost_reply(),
            throttled(),
            refused(500, "InternalError"),
            slow(0.1),
            cut_off,
        )
        return await chance.choice(faults)(exchange)

    return fault


# -------------------------------------------------------------------------------------- the matrix


def reading() -> Iterator[Cell]:
    """GetObject: at the first, the middle and the last bytes; the answer as a whole; the object replaced."""
    size = len(LARGE["large.bin"])
    get = "s3.GetObject"
    for name, fault in {
        "cut at once": cut(0),
        "cut after the first bytes": cut(1000),
        "cut in the middle": cut(size // 2),
        "cut before the last byte": cut(-1),
        "reset in the middle": cut(size // 2, reset=True),
        "stalled in the middle": stalled(size // 2),
        "stalled before the last bytes": stalled(size - 10),
    }.items():
        yield Cell(name=f"GetObject {name}", call=get, fault=fault, large=True)
    yield Cell(name="GetObject cut twice", call=get, fault=cut(3_000_000), times=2, large=True)
    yield Cell(
        name="GetObject cut, and 200 for 206",
        call=get,
        fault=ignored_range(),
        where="bytes=",
        after=((get, cut(size // 2)),),
        large=True,
    )
    for pinned in (True, False):
        yield Cell(
            name=f"GetObject cut, and another ETag, {'pinned' if pinned else 'not pinned'}",
            call=get,
            fault=changed(another_etag),
            where="bytes=",
            after=((get, cut(size // 2)),),
            large=True,
            pinned=pinned,
            ends="superseded" if pinned else "settled",
        )
    yield Cell(
        name="GetObject another ETag",
        call=get,
        fault=changed(another_etag),
        times=-1,
        ends="superseded",
    )


def failing(call: str, **where: Any) -> Iterator[Cell]:
    """What may happen to any call, once (the SDK repeats it) and for longer (flowlane does)."""
    operation = call.partition(".")[2]
    status, code = (500, "InternalServerError") if call.startswith("dynamodb") else (500, "InternalError")
    for name, fault, times, alike in (
        ("is slow", slow(0.2), 1, True),
        ("never arrives", lost_request(), 1, True),
        ("never arrives, for longer", lost_request(), PAST_SDK, False),
        ("is throttled, for longer", throttled(), PAST_SDK, call not in THROTTLED),
        ("fails on the server, for longer", refused(status, code), PAST_SDK, True),
        ("hangs", hanging(), 1, False),
    ):
        yield Cell(name=f"{operation} {name}", call=call, fault=fault, times=times, alike=alike, **where)


def writing(call: str, **where: Any) -> Iterator[Cell]:
    """What may happen to a call that changes something, besides: it is applied, and nobody is told."""
    operation = call.partition(".")[2]
    for cell in failing(call, **where):
        yield msgspec.structs.replace(cell, alike=cell.alike or cell.name.endswith(" hangs"))
    yield Cell(name=f"{operation} lost reply", call=call, fault=lost_reply(), **where)
    yield Cell(name=f"{operation} lost replies", call=call, fault=lost_reply(), times=PAST_SDK, **where)
    yield Cell(name=f"{operation} applied, hangs", call=call, fault=hanging(applied=True), **where)


def cells() -> Iterator[Cell]:
    """All of them."""
    yield from reading()
    yield from failing("s3.GetObject")
    yield from failing("s3.HeadObject")
    yield from failing("s3.ListObjectsV2")
    yield Cell(name="ListObjectsV2 cut", call="s3.ListObjectsV2", fault=cut(200))
    yield from failing("s3.CreateMultipartUpload")
    yield Cell(
        name="CreateMultipartUpload lost reply",
        call="s3.CreateMultipartUpload",
        fault=lost_reply(),
        orphans=1,
    )
    yield from writing("s3.PutObject")
    yield Cell(name="PutObject truncated", call="s3.PutObject", fault=truncated(1000))
    yield from writing("s3.UploadPart", large=True)
    yield Cell(
        name="last UploadPart lost",
        call="s3.UploadPart",
        fault=lost_request(),
        nth=3,
        times=PAST_SDK,
        large=True,
    )
    yield Cell(name="UploadPart truncated", call="s3.UploadPart", fault=truncated(PART // 2), large=True)
    yield from writing("s3.CompleteMultipartUpload", large=True)
    yield Cell(
        name="CompleteMultipartUpload error in 200",
        call="s3.CompleteMultipartUpload",
        fault=error_in_200,
        times=PAST_SDK,
        large=True,
    )
    yield from writing("sqs.SendMessageBatch")
    for name, fault in (("never arrives", lost_request()), ("lost replies", lost_reply())):
        yield Cell(
            name=f"SendMessageBatch {name}, up to the sweep",
            call="sqs.SendMessageBatch",
            fault=fault,
            times=PAST_ALL,
        )
    yield Cell(
        name="SendMessageBatch one fails", call="sqs.SendMessageBatch", fault=first_entry_failed, times=3
    )
    yield from writing("sqs.ReceiveMessage")
    yield Cell(name="ReceiveMessage cut", call="sqs.ReceiveMessage", fault=cut(-20), times=PAST_SDK)
    yield from writing("sqs.DeleteMessageBatch")
    yield Cell(
        name="DeleteMessageBatch one fails", call="sqs.DeleteMessageBatch", fault=first_entry_failed, times=3
    )
    yield from failing("sqs.ChangeMessageVisibility", after=(("s3.GetObject", slow(1.5)),))
    yield from writing("dynamodb.PutItem", where="attempt.started")
    yield from writing("dynamodb.TransactWriteItems")
    for times in (PAST_SDK, PAST_ALL):
        yield Cell(
            name=f"TransactWriteItems {times} conflicts",
            call="dynamodb.TransactWriteItems",
            fault=conflict,
            times=times,
        )
    yield Cell(
        name="PutItem is throttled, for very long",
        call="dynamodb.PutItem",
        fault=throttled(),
        where="attempt.started",
        times=PAST_ALL,
    )
    yield from failing("dynamodb.Query", where="copies/")
    yield Cell(name="Query cut", call="dynamodb.Query", fault=cut(-20), where="copies/", times=PAST_SDK)
    yield from failing("dynamodb.BatchGetItem")
    yield from failing("dynamodb.BatchExecuteStatement")
    yield from failing("dynamodb.UpdateItem")


CELLS = [cell for cell in cells() if not cell.alike or os.environ.get("FLOWLANE_ALL_CELLS")]


@pytest.mark.parametrize("cell", CELLS, ids=[cell.name.replace(" ", "-") for cell in CELLS])
async def test_a_run_ends_right_whatever_happens_to_one_call(
    cell: Cell,
    buckets: Any,
    ministack: str,
    connectors: Sequence[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, data in cell.objects.items():
        buckets.put_object(Bucket="drops", Key=f"in/{name}", Body=data)
    lane = copying(cell.pinned)
    async with asyncio.timeout(240), FaultProxy(ministack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        async with opened(lane) as app:
            rules = cell.inject(proxy)
            report = await run_once(app, lane)
            log = await at_rest(app, lane, proxy, connectors)
        assert tasks() == set()
    assert [rule.fired for rule in rules if not rule.fired] == []
    assert (report.outcome, report.dead) == ("settled", [])
    copies = {f"out/{name}": [digest(data)] for name, data in cell.objects.items()}
    assert written(buckets) == ({} if cell.ends == "superseded" else copies)
    # An attempt that loses its lease while it begins an upload leaves one that no event names.
    lost = sum("its lease was lost" in record.message for record in caplog.records)
    assert unfinished(buckets, log) <= cell.orphans + lost


@pytest.mark.parametrize("seed", range(60 if os.environ.get("FLOWLANE_ALL_CELLS") else 3))
async def test_a_run_ends_right_whatever_happens_to_many_calls(
    seed: int, buckets: Any, ministack: str, connectors: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call in ten goes wrong, in one way or another; a command that gives up is given again."""
    for name, data in (SMALL | LARGE).items():
        buckets.put_object(Bucket="drops", Key=f"in/{name}", Body=data)
    lane = copying(pinned=True)
    async with asyncio.timeout(240), FaultProxy(ministack) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        async with opened(lane) as app:
            proxy.inject("", any_of(random.Random(seed)), times=-1)
            report = None
            while report is None:
                with suppress(Retryable):
                    report = await run_once(app, lane, slot="now")
            log = await at_rest(app, lane, proxy, connectors)
        assert tasks() == set()
    assert (report.outcome, report.dead) == ("settled", [])
    assert written(buckets) == {f"out/{n}": [digest(data)] for n, data in (SMALL | LARGE).items()}
    unfinished(buckets, log)
