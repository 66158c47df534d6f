"""A stage with ``via="channel"`` behind a Kinesis mapping: its units are found by a stage behind a queue."""

from __future__ import annotations

import asyncio
import base64
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from flowlane import Context, Event, Lane, Permanent, Policy, Unit, events
from flowlane.aws_lambda.function import Function
from flowlane.compose import open_application
from flowlane.parking import Parked, parked
from flowlane.settings import Settings
from flowlane.state import progress, status
from flowlane.testing.units import listed
from tests.aws_lambda.aggregate import aggregate
from tests.aws_lambda.deliver import BACKEND, Mapping, StreamMapping
from tests.aws_lambda.toys import PushedClock, Remaining

pytestmark = pytest.mark.usefixtures("ministack")

STREAM = "fn-rows.apply"
TRIGGER = {"specversion": "1.0", "id": "1", "source": "s", "type": "t"}


class Row(Unit, key=("customer", "n")):
    customer: str
    n: int


def lane_of(
    apply: Callable[[Row, Context], Awaitable[None]], *, rows: int = 4, customers: str = "ab", **policy: Any
) -> Lane:
    """Finds `rows` rows of each customer, and applies them in order."""
    policy = {"backoff": "1ms", "backoff_cap": "2ms", **policy}
    lane = Lane("rows", policy=Policy(**policy))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Row]:
        for n in range(rows):
            for customer in customers:
                yield Row(customer=customer, n=n)

    @lane.stage(on=Row, name="apply", order="customer", via="channel")
    async def handle(event: Event, ctx: Context) -> None:
        await apply(event.data, ctx)

    return lane


class World:
    """The function with both of its mappings, and a run of which all rows are found and put."""

    def __init__(self, call: Function, lane: Lane, size: int) -> None:
        self.call = call
        queues = Mapping(call)
        urls = queues.create(lane)
        self.run: str = call(TRIGGER, Remaining(20))["run"]
        queues.drain(urls)
        self.stream = StreamMapping(call, STREAM, size=size)

    def put(self, key: str, data: bytes) -> None:
        """Somebody else puts a record."""
        self.stream.kinesis.put_record(StreamName=STREAM, PartitionKey=key, Data=data)

    def of_log(self, *streams: str) -> dict[str, list[Event]]:
        """The events of those streams, and of all that are dead."""

        async def read() -> dict[str, list[Event]]:
            lane = Lane("rows")
            lane.stage(on=lane.triggered)(nothing)
            async with open_application([lane], Settings(backend=BACKEND)) as app:
                dead = [head.subject async for head in app.backend.units("rows", "dead")]
                return {name: await listed(app.backend.read(name)) for name in (*streams, *dead)}

        return asyncio.run(read())

    def head(self, stream: str) -> Event:
        """The last event of that stream."""
        return self.of_log(stream)[stream][-1]

    def settled(self) -> Counter[str]:
        """How the run's units ended; it is over."""
        head = self.head(self.run)
        assert status(head) == "settled"
        units = progress(head).report["units"]
        return Counter({name: units[name] for name in ("settled", "dead") if units[name]})

    def parked(self) -> list[Parked]:
        """What was parked."""
        heads = [stream[-1] for stream in self.of_log().values()]
        return [found for head in heads if (found := parked(head)) is not None]


async def nothing(event: Event, ctx: Context) -> None: ...


@contextmanager
def world(lane: Lane, *, size: int = 100, **options: Any) -> Iterator[World]:
    """The function of `lane`, whose stream's mapping has batches of `size`."""
    with Function(lambda settings: lane, environment={"FLOWLANE_BACKEND": BACKEND}, **options) as call:
        yield World(call, lane, size)


def in_order(done: list[tuple[str, int]], rows: int = 4, customers: str = "ab") -> bool:
    return all([n for name, n in done if name == each] == list(range(rows)) for each in customers)


def test_units_are_handled_in_order_whatever_fails_for_a_while() -> None:
    done: list[tuple[str, int]] = []
    tries: Counter[tuple[str, int]] = Counter()

    async def apply(row: Row, ctx: Context) -> None:
        tries[row.customer, row.n] += 1
        if tries[row.customer, row.n] < 3 and row.n % 2:
            raise OSError("not yet")
        done.append((row.customer, row.n))

    with world(lane_of(apply), size=3) as each:
        each.stream.drain()
        assert each.settled() == {"settled": 8}
        assert not any(each.stream.answers), "what is retried within its backoff is no failed record"
    assert in_order(done)
    assert len(done) == 8


class Patient(PushedClock):
    """Draws long backoffs."""

    def random(self) -> float:
        """See ``Clock.random``."""
        return 0.9


def test_a_retry_waits_for_its_backoff_also_in_the_next_invocation() -> None:
    clock = Patient()
    tries: list[float] = []

    async def apply(row: Row, ctx: Context) -> None:
        tries.append(clock.monotonic())
        if len(tries) < 3:
            raise OSError("not yet")

    # The backoff is longer than what is left of the first invocation.
    lane = lane_of(apply, rows=1, customers="a", backoff="1s", backoff_cap="1s", timeout="30s")
    with world(lane, clock=clock) as each:
        each.stream.deliver(0.4)
        assert each.stream.answers.pop() != []
        each.stream.drain()
        assert each.settled() == {"settled": 1}
    assert len(tries) == 3
    assert all(after - before > 0.5 for before, after in pairwise(tries)), tries


def test_a_backoff_longer_than_an_invocation_takes_its_time() -> None:
    """Told of at once the record would come at once: its mapping would have given it up before it is due."""
    tries: list[float] = []
    clock = Patient()

    async def apply(row: Row, ctx: Context) -> None:
        tries.append(clock.monotonic())
        if len(tries) < 2:
            raise OSError("not yet")

    lane = lane_of(apply, rows=1, customers="a", backoff="4s", backoff_cap="4s", timeout="30s")
    with world(lane, clock=clock) as each:
        each.stream.drain(1.0)
        assert each.settled() == {"settled": 1}
        assert each.stream.invocations < 20
    assert tries[1] - tries[0] > 2


def test_a_unit_is_dead_after_its_budget_and_the_shard_goes_on() -> None:
    done: list[tuple[str, int]] = []
    tries: Counter[tuple[str, int]] = Counter()

    async def apply(row: Row, ctx: Context) -> None:
        tries[row.customer, row.n] += 1
        if (row.customer, row.n) == ("a", 1):
            raise OSError("never")
        if (row.customer, row.n) == ("b", 0):
            raise Permanent("no such customer")
        done.append((row.customer, row.n))

    with world(lane_of(apply, retries=2), size=3) as each:
        each.stream.drain()
        assert each.settled() == {"settled": 8, "dead": 2}
        ends = [stream[-1] for stream in each.of_log().values()]
        reasons = {end.subject: progress(end).reason.partition(" (")[0] for end in ends}
    assert reasons == {"rows/row/a@1": "OSError: never", "rows/row/b@0": "no such customer"}
    assert (tries["a", 1], tries["b", 0]) == (3, 1)
    assert done.count(("a", 2)) == done.count(("b", 1)) == 1
    assert [n for name, n in done if name == "a"] == [0, 2, 3]


def test_a_stage_goes_on_in_its_place_at_the_deadline() -> None:
    clock = PushedClock()
    steps: list[tuple[str, int, int]] = []

    async def apply(row: Row, ctx: Context) -> None:
        for n in range(3):
            await ctx.step(f"s{n}", step, row, n)

    async def step(row: Row, n: int) -> None:
        steps.append((row.customer, row.n, n))
        if (row.customer, row.n, n) == ("a", 1, 1):
            clock.pushed += 18

    with world(lane_of(apply, customers="a"), clock=clock) as each:
        assert each.stream.deliver(20) == 4
        (named,) = each.stream.answers
        numbers = [
            record["SequenceNumber"] for shard in each.stream.places for record in each.stream.records(shard)
        ]
        assert named == [numbers[1]], "the lowest that goes on, and no other"
        assert steps == [("a", 0, 0), ("a", 0, 1), ("a", 0, 2), ("a", 1, 0), ("a", 1, 1)]
        assert each.head("rows/row/a@1").type == events.ATTEMPT_CONTINUED
        each.stream.drain()
        assert each.settled() == {"settled": 4}
    assert steps == [("a", row, n) for row in range(4) for n in range(3)], "no step was done twice"


def test_records_that_were_put_together_are_handled_as_those_that_were_not() -> None:
    done: list[tuple[str, int]] = []

    async def apply(row: Row, ctx: Context) -> None:
        done.append((row.customer, row.n))
        if (row.customer, row.n) == ("b", 1):
            raise OSError("never")

    lane = lane_of(apply, retries=1)
    with world(lane) as each:
        # The same deliveries once more, as another producer would have packed them, before the plain ones.
        kept = [record for shard in shards(each.stream) for record in each.stream.records(shard)]
        packed = aggregate(*((record["PartitionKey"], record["Data"]) for record in in_stream_order(kept)))
        each.put("a", packed)
        for shard in shards(each.stream):
            each.stream.places[shard] = len(each.stream.records(shard)) - any(
                record["Data"] == packed for record in each.stream.records(shard)
            )
        each.stream.drain()
        assert each.settled() == {"settled": 8, "dead": 1}
        for shard in shards(each.stream):
            each.stream.places[shard] = 0
        each.stream.drain()
        assert not any(each.stream.answers)
    assert [n for name, n in done if name == "a"] == [0, 1, 2, 3], "and what came plain besides was done"


def shards(stream: StreamMapping) -> list[str]:
    return [shard["ShardId"] for shard in stream.kinesis.list_shards(StreamName=STREAM)["Shards"]]


def in_stream_order(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: int(record["SequenceNumber"]))


# --------------------------------------------------------------------------- poison


def strange() -> list[tuple[bytes, str]]:
    """Records that are no deliveries of the stage, and what is said of each."""
    unknown = Event("e", "rows", "rows.row", "rows/row/z@9", "2024-01-01T00:00:00.000Z", version=1)
    foreign = {"specversion": "1.0", "id": "9", "source": "shop", "type": "order"}
    return [
        (b"\x00\xff junk", "JSON"),
        (aggregate(("k", b"")), "truncated"),
        (msgspec.json.encode(foreign), "missing required field"),
        (events.encode(msgspec.structs.replace(unknown, source="lines")), "it is an event of lane lines"),
        (events.encode(msgspec.structs.replace(unknown, subject="")), "is no stream of lane rows"),
        (events.encode(msgspec.structs.replace(unknown, subject="rows/" * 999)), "is no stream of lane rows"),
        (events.encode(unknown), "the log does not know the stream rows/row/z@9"),
    ]


def test_what_is_no_delivery_is_parked_and_the_shard_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    done: list[tuple[str, int]] = []

    async def apply(row: Row, ctx: Context) -> None:
        done.append((row.customer, row.n))

    with world(lane_of(apply, retries=1, rows=2)) as each:
        opened: str = each.call({**TRIGGER, "id": "2"}, Remaining(20))["run"]
        (first,) = each.of_log(opened)[opened]
        records = [*strange(), (events.encode(first), "is owed to stage find, and not to this one")]
        for data, _ in records:
            each.put("a", data)
        other = StreamMapping(each.call, "else")
        other.kinesis.create_stream(StreamName="else", ShardCount=1)
        other.kinesis.put_record(StreamName="else", PartitionKey="a", Data=b"junk")
        assert other.deliver() == 1
        assert len(other.answers[0]) == 1, "what makes no sense there is its mapping's to give up"
        each.stream.drain()
        assert not any(each.stream.answers)
        found = sorted(each.parked(), key=lambda parked: int(parked.position))
        each.stream.places.clear()
        each.stream.drain()
        assert len(each.parked()) == len(found), "it is said once"
        head = each.head(f"rows/parked:apply/{found[0].partition}@{found[0].position}")
    assert status(head) == "dead"
    assert in_order(done, rows=2)
    assert len(done) == 4
    for parked_, (data, said) in zip(found, records, strict=True):
        assert parked_.channel == "rows/apply"
        assert (parked_.key, base64.b64decode(parked_.data)) in (("a", data), ("k", b""))
        assert re.search(said, parked_.reason), parked_.reason
    assert caplog.text.count("is passed over") == len(found)


def test_a_stream_that_the_log_does_not_know_is_asked_for_within_one_invocation() -> None:
    """Nobody counts the tries of the invocations before: it would hold up its shard until it is given up."""

    async def apply(row: Row, ctx: Context) -> None: ...

    with world(lane_of(apply, rows=1, retries=4, backoff="20s", backoff_cap="20s"), clock=Patient()) as each:
        each.put("a", strange()[-1][0])
        while each.stream.deliver(2.0):
            assert each.stream.invocations < 10
        (parked_,) = each.parked()
    assert "does not know" in parked_.reason


# --------------------------------------------------------------------------- what ends the function


def test_an_attempt_at_a_record_that_comes_alone_is_counted_before_it_begins() -> None:
    """A mapping splits off what ends the function again and again; the log then sees to it that it dies."""
    kinds: list[list[str]] = []

    async def apply(row: Row, ctx: Context) -> None:
        stream = await listed(ctx.engine.backend.read(ctx.unit))  # type: ignore[attr-defined] # of Attempt
        kinds.append([event.type for event in stream][1:])

    with world(lane_of(apply, rows=3, customers="a"), size=2) as each:
        each.stream.drain()
        assert each.settled() == {"settled": 3}
    assert kinds == [[], [], [events.ATTEMPT_STARTED]]
