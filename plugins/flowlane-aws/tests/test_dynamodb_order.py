"""Whatever the order of arrival, crashes and stragglers included, the latest row of a key is what stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flowlane.clock import SystemClock
from flowlane.errors import Fenced, Permanent
from flowlane.ports import Batch, Record, UnitRef
from flowlane.state import Position
from flowlane.testing.sink_suite import cut_up, split, write
from flowlane_aws.clients import open_client
from flowlane_aws.dynamodb import table as dynamodb_table
from flowlane_aws.dynamodb.factory import open_sink
from flowlane_aws.dynamodb.forms import Form, Puts, Transactions, lean
from flowlane_aws.dynamodb.pace import Delivery, Pace
from flowlane_aws.dynamodb.sink import DynamoSink
from tests.dynamodb_tables import ENVIRONMENT, MARK, contents, items
from tests.fault_proxy import Exchange, FaultProxy

#: A table each: they come one after the other on one stand-in.
examples = count()

Shipment = tuple[int, int, int, int]  # generation, batch, token, crash before this call (0: none)


class Crash(Exception):
    """The process dies here."""


class World:
    """A client of a stand-in with a table, and a fuse."""

    def __init__(self, client: Any, form: Callable[[Any, str], Form]) -> None:
        self.client = client
        self.fuse = 0
        self._form = form
        client.meta.events.register("before-call.dynamodb", self._burn)

    def _burn(self, model: Any, **_: Any) -> None:
        if model.name in ("PutItem", "TransactWriteItems") and self.fuse:
            self.fuse -= 1
            if not self.fuse:
                raise Crash

    async def sink(self, name: str) -> DynamoSink:
        """A table, as one of several processes has it."""
        wanted = dynamodb_table.Wanted("id", "N")
        table = await dynamodb_table.found(self.client, SystemClock(), name, wanted, create=True)
        delivery = Delivery(SystemClock(), self._form(self.client, name), Pace())
        return DynamoSink(self.client, SystemClock(), table, delivery, MARK)


@pytest.fixture(params=[Puts, Transactions])
async def world(request: pytest.FixtureRequest, ministack: str) -> AsyncIterator[World]:
    async with open_client("dynamodb", attempts=1) as client:
        lean(client)
        yield World(client, request.param)


def batches_of(generation: int, keys: Sequence[int]) -> list[Batch]:
    """The records of one unit, cut small."""
    return cut_up([{"id": key, "text": f"{generation}/{row}"} for row, key in enumerate(keys)], 3)


async def ship(sink: DynamoSink, drops: Mapping[int, list[Batch]], shipment: Shipment, resume: str) -> str:
    """One delivery of one batch; what ``Writer.resume`` said then.

    Raises:
        Fenced: a later attempt was there before; nothing was written.
        Crash: somewhere in the middle.
    """
    generation, batch, token, _ = shipment
    async with sink.open(split(), UnitRef(f"lane/drop/{generation}", token, generation), resume) as writer:
        await write(writer, drops[generation][batch % len(drops[generation])], None)
        return writer.resume


DROPS = st.dictionaries(
    st.integers(0, 3), st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=3
)
SHIPMENTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 3), st.integers(0, 4)),
    min_size=1,
    max_size=10,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example(drops={0: [0], 1: [0]}, shipments=[(1, 0, 1, 0), (0, 0, 1, 0)], together=1)
@example(drops={0: [0, 1, 2, 0]}, shipments=[(0, 1, 1, 0), (0, 0, 2, 0)], together=1)
@example(drops={0: [0, 1, 2]}, shipments=[(0, 0, 1, 2), (0, 0, 2, 0)], together=2)
@given(drops=DROPS, shipments=SHIPMENTS, together=st.integers(1, 4))
async def test_the_table_is_a_function_of_what_arrived(
    world: World, drops: dict[int, list[int]], shipments: list[Shipment], together: int
) -> None:
    """Any order, any repetition, several writers at once, deaths between two calls: each crashed batch comes
    once more, as the engine sees to, and the table then has the greatest (generation, row) of every key."""
    units = {generation: batches_of(generation, keys) for generation, keys in drops.items()}
    shipments = [shipment for shipment in shipments if shipment[0] in units]
    name = f"order-{next(examples)}"
    sinks = [await world.sink(name) for _ in range(together)]
    resumes: dict[int, str] = {}
    arrived: set[tuple[int, int]] = set()
    crashed: list[Shipment] = []

    async def one(number: int, shipment: Shipment, token: int) -> None:
        generation, batch, _, _ = shipment
        shipment = (generation, batch, token, 0)
        try:
            resumes[generation] = await ship(
                sinks[number % together], units, shipment, resumes.get(generation, "")
            )
            arrived.add((generation, batch % len(units[generation])))
        except Fenced:
            pass
        except Crash:
            crashed.append(shipment)

    for first in range(0, len(shipments), together):
        some = shipments[first : first + together]
        world.fuse = some[0][3]
        await asyncio.gather(*(one(n, shipment, shipment[2]) for n, shipment in enumerate(some)))
    world.fuse = 0
    for shipment in crashed:
        await one(0, shipment, 9)
    rows: dict[int, tuple[tuple[int, int], str]] = {}
    for generation, batch in arrived:
        taken = units[generation][batch]
        for place, record in enumerate(taken.records):
            found = ((generation, taken.start.row + place), record["text"])
            rows[record["id"]] = max(found, rows.get(record["id"], found))
    assert {record["id"]: record["text"] for record in contents(name)} == {
        key: text for key, (_, text) in rows.items()
    }


# ---------------------------------------------------------------------- stragglers


class Held:
    """A fault: the call stays in the proxy until ``go`` is set, and only then reaches the table."""

    def __init__(self) -> None:
        self.came, self.go = asyncio.Event(), asyncio.Event()

    async def __call__(self, exchange: Exchange) -> bool:
        """See ``fault_proxy.Fault``."""
        self.came.set()
        await self.go.wait()
        return await exchange.answer(await exchange.forward())


Later = Callable[[DynamoSink], Awaitable[None]]


async def straggle(
    endpoint: str, first: Batch, later: Later, *, of: str, generation: int = 1
) -> list[Record]:
    """An attempt is stopped (as by SIGSTOP) in the middle of `first`; `later` happens; it goes on.

    What the table then has."""
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultProxy(endpoint))
        held = Held()
        proxy.inject("dynamodb.TransactWriteItems", held)
        opened = [
            await stack.enter_async_context(
                open_sink("dynamodb://late", ENVIRONMENT, key="id", key_type="N", create=True, endpoint=where)
            )
            for where in (endpoint, proxy.url)
        ]

        async def zombie() -> None:
            async with opened[1].open(split(of), UnitRef("lane/unit/a", 1, generation), "") as writer:
                await write(writer, first, None)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(zombie())
            await held.came.wait()
            await later(opened[0])
            held.go.set()
    return contents("late")


def one(text: str, *, row: int = 0) -> Batch:
    """A batch of one record of the key 1."""
    return Batch([{"id": 1, "text": text}], Position(10 * row, row), Position(10 * row + 10, row + 1), [])


def loads(batch: Batch, *, of: str, token: int, unit: str = "lane/unit/a", generation: int = 1) -> Later:
    """An attempt that gets through."""

    async def load(sink: DynamoSink) -> None:
        async with sink.open(split(of), UnitRef(unit, token, generation), "") as writer:
            await write(writer, batch, None)
            await writer.finish()

    return load


async def test_a_straggler_of_an_earlier_row(ministack: str) -> None:
    later = loads(one("new", row=5), of="a", token=1)
    assert await straggle(ministack, one("old", row=4), later, of="a") == [{"id": 1, "text": "new"}]


async def test_a_straggler_of_a_later_row_is_what_should_be_there(ministack: str) -> None:
    later = loads(one("old", row=4), of="a", token=2)
    assert await straggle(ministack, one("new", row=5), later, of="a") == [{"id": 1, "text": "new"}]


async def test_a_straggler_of_an_earlier_split(ministack: str) -> None:
    later = loads(one("new", row=0), of="b", token=2)
    assert await straggle(ministack, one("old", row=4), later, of="a") == [{"id": 1, "text": "new"}]


async def test_a_straggler_of_an_earlier_generation(ministack: str) -> None:
    later = loads(one("new", row=0), of="a", token=1, unit="lane/unit/b", generation=2)
    assert await straggle(ministack, one("old", row=4), later, of="a") == [{"id": 1, "text": "new"}]


async def test_units_of_one_generation_have_no_order(ministack: str) -> None:
    """The last to arrive stays, whatever its row: nobody said which of them is newer."""
    async with open_sink("dynamodb://any", ENVIRONMENT, key="id", key_type="N", create=True) as sink:
        await loads(one("monday", row=700), of="a", token=9, unit="lane/unit/monday")(sink)
        await loads(one("tuesday", row=3), of="a", token=1, unit="lane/unit/tuesday")(sink)
    assert contents("any") == [{"id": 1, "text": "tuesday"}]


async def test_the_next_split_of_a_unit_follows(ministack: str) -> None:
    async with open_sink("dynamodb://any", ENVIRONMENT, key="id", key_type="N", create=True) as sink:
        await loads(one("first", row=700), of="a", token=2)(sink)
        await loads(one("second", row=3), of="b", token=2)(sink)
    assert contents("any") == [{"id": 1, "text": "second"}]


async def test_records_that_a_row_became_stay_in_order(ministack: str) -> None:
    """``map`` made 30 of 10 rows: those of the next batch follow all of them."""
    many = Batch([{"id": 1, "text": str(n)} for n in range(30)], Position(), Position(100, 10), [])
    after = Batch([{"id": 1, "text": "after"}], Position(100, 10), Position(200, 20), [])
    async with open_sink("dynamodb://any", ENVIRONMENT, key="id", key_type="N", create=True) as sink:
        for batch in (many, after, many):
            await loads(batch, of="a", token=1)(sink)
    assert contents("any") == [{"id": 1, "text": "after"}]


async def test_a_batch_written_again_costs_nothing_but_calls(ministack: str) -> None:
    """Not even the mark changes: no stream of the table tells of it."""
    batch = cut_up([{"id": n, "text": "x"} for n in range(5)], 5)[0]
    async with open_sink("dynamodb://any", ENVIRONMENT, key="id", key_type="N", create=True) as sink:
        await loads(batch, of="a", token=1)(sink)
        before = items("any")
        await loads(batch, of="a", token=1)(sink)
    assert items("any") == before


# ---------------------------------------------------------------------- where attempts meet


async def test_attempts_meet_at_the_first_item_and_leave_it_as_it_is(ministack: str) -> None:
    batches = cut_up([{"id": n, "text": "x"} for n in range(6)], 2)
    async with open_sink("dynamodb://any", ENVIRONMENT, key="id", key_type="N", create=True) as sink:
        async with sink.open(split(), UnitRef("lane/unit/a", 1), "") as zombie:
            await write(zombie, batches[0], None)
            before = contents("any")
            async with sink.open(split(), UnitRef("lane/unit/a", 2), zombie.resume) as writer:
                assert contents("any") == before
                with pytest.raises(Fenced, match="attempt 2 writes to DynamoDB table any now, this one is 1"):
                    await write(zombie, batches[1], None)
                with pytest.raises(Fenced):
                    await zombie.finish()
                assert contents("any") == before
                await write(writer, batches[1], None)
        with pytest.raises(Fenced):
            async with sink.open(split(), UnitRef("lane/unit/a", 1), zombie.resume):
                pass


async def test_an_attempt_that_begins_anew_meets_the_zombie_too(ministack: str) -> None:
    """Nothing was logged: both begin at the first batch."""
    batches = cut_up([{"id": n, "text": "x"} for n in range(6)], 2)
    async with (
        open_sink("dynamodb://any", ENVIRONMENT, key="id", key_type="N", create=True) as sink,
        sink.open(split(), UnitRef("lane/unit/a", 1), "") as zombie,
        sink.open(split(), UnitRef("lane/unit/a", 2), "") as writer,
    ):
        await write(zombie, batches[0], None)
        await write(writer, batches[0], None)
        await write(writer, batches[1], None)
        with pytest.raises(Fenced):
            await write(zombie, batches[1], None)


async def test_where_another_unit_wrote_there_is_nothing_to_meet_at(ministack: str) -> None:
    async with (
        open_sink("dynamodb://any", ENVIRONMENT, key="id", key_type="N", create=True) as sink,
        sink.open(split(), UnitRef("lane/unit/a", 7, 1), "") as writer,
    ):
        await write(writer, one("old"), None)
        await loads(one("new"), of="a", token=1, unit="lane/unit/b", generation=2)(sink)
        await write(writer, one("old", row=2), None)
        await writer.finish()
    assert contents("any") == [{"id": 1, "text": "new"}]


@pytest.mark.parametrize("resume", ["x", "{}x", '{"id": 1}', "[]"])
async def test_a_resume_of_something_else_is_refused(ministack: str, resume: str) -> None:
    async with open_sink("dynamodb://any", ENVIRONMENT, key="id", key_type="N", create=True) as sink:
        with pytest.raises(Permanent, match="cannot be resumed by"):
            async with sink.open(split(), UnitRef("lane/unit/a", 1), resume):
                pass
