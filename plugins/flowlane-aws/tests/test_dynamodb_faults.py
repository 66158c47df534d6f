"""Throttled, cut off, half done, refused: an item ends in the table or in quarantine, or it is told."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from random import Random
from typing import Any, cast

import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from flowlane.clock import SystemClock
from flowlane.errors import ConfigError, Retryable
from flowlane.ports import Bad, Batch, Connections, Environment, UnitRef
from flowlane.state import Position
from flowlane.testing.sink_suite import cut_up, split
from flowlane_aws.dynamodb.factory import open_sink
from flowlane_aws.dynamodb.forms import Answer as Told
from flowlane_aws.dynamodb.forms import Item, Puts, Transactions, _cancelled, chunks
from flowlane_aws.dynamodb.pace import MOST, START, Pace
from flowlane_aws.dynamodb.sink import _SLICE, DynamoSink
from tests.aws_wire import Answer
from tests.dynamodb_tables import MARK, call, contents, items
from tests.fault_proxy import Exchange, FaultProxy, lost_reply, lost_request, refused, throttled

FORMS = {
    "transactions": ({"form": "transactions"}, "dynamodb.TransactWriteItems"),
    "puts": ({"form": "puts"}, "dynamodb.PutItem"),
    "batches": ({"exactly": "false"}, "dynamodb.BatchWriteItem"),
}


class Hurried(SystemClock):
    """Does not sleep, but remembers for how long it should have."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


class Skipping(Hurried):
    """Does not sleep, but says that so much time has passed, and no other."""

    def monotonic(self) -> float:
        return sum(self.slept)


class Scene:
    """A proxy before the stand-in, and sinks that write through it to the table ``scene``."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.clock = Hurried()

    def sink(self, **options: Any) -> AbstractAsyncContextManager[DynamoSink]:
        environment = Environment(self.clock, cast(Connections, None))
        wanted = {"key": "id", "key_type": "N", "create": "true", "endpoint": self.proxy.url, **options}
        return open_sink("dynamodb://scene", environment, **wanted)

    async def load(self, texts: Sequence[str], **options: Any) -> Sequence[Bad]:
        """One batch of records with the keys 0, 1, 2, ...; what is refused."""
        batch = cut_up([{"id": n, "text": text} for n, text in enumerate(texts)], 10_000)[0]
        async with self.sink(**options) as sink, sink.open(split(), UnitRef("lane/unit/a", 1)) as writer:
            self.clock.slept.clear()  # while the table was being made
            refused_rows = await writer.write(batch)
            await writer.finish()
        return refused_rows


@pytest.fixture
async def scene(ministack: str) -> AsyncIterator[Scene]:
    async with FaultProxy(ministack) as proxy:
        yield Scene(proxy)


def texts_of_table() -> list[str]:
    return [record["text"] for record in sorted(contents("scene"), key=lambda record: int(record["id"]))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "fault", [throttled(), refused(500, "InternalServerError"), lost_request(), lost_reply()]
)
async def test_what_may_pass_is_tried_again(scene: Scene, form: str, fault: Any) -> None:
    options, operation = FORMS[form]
    rule = scene.proxy.inject(operation, fault, times=3)
    assert await scene.load(["x"] * 3, **options) == []
    assert texts_of_table() == ["x"] * 3
    assert rule.fired == 3
    assert 3 <= len(scene.clock.slept) <= 4  # a connection that breaks may break another one's call, too


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", [throttled(), refused(503, "ServiceUnavailable")])
async def test_what_does_not_pass_is_the_engine_s(scene: Scene, form: str, fault: Any) -> None:
    options, operation = FORMS[form]
    rule = scene.proxy.inject(operation, fault, times=-1)
    with pytest.raises(Retryable, match="DynamoDB"):
        await scene.load(["x"], **options)
    assert rule.fired == 12  # by nobody else: the SDK does not try again by itself
    assert len(scene.clock.slept) == 11
    assert max(scene.clock.slept) <= 5


async def test_pauses_are_jittered_below_a_bound_that_doubles(scene: Scene) -> None:
    scene.proxy.inject("dynamodb.PutItem", throttled(), times=-1)
    tops, lows = [0.0] * 11, [5.0] * 11
    for _ in range(12):
        scene.clock.slept.clear()
        with pytest.raises(Retryable):
            await scene.load(["x"], form="puts")
        assert all(pause <= min(5.0, 0.05 * 2**n) for n, pause in enumerate(scene.clock.slept))
        tops = list(map(max, tops, scene.clock.slept))
        lows = list(map(min, lows, scene.clock.slept))
    bounds = [min(5.0, 0.05 * 2**n) for n in range(11)]
    # Of a dozen each: one in 4,000 that all are on one side of a half.
    assert sum(top > bound / 2 for top, bound in zip(tops, bounds, strict=True)) >= 10
    assert sum(low < bound / 2 for low, bound in zip(lows, bounds, strict=True)) >= 10


@pytest.mark.parametrize("form", FORMS)
async def test_an_item_that_the_table_refuses_is_told_and_the_others_are_written(
    scene: Scene, form: str
) -> None:
    options, operation = FORMS[form]
    rule = scene.proxy.inject(operation, refused(400, "ValidationException"), where="poison", times=-1)
    texts = ["x"] * 7 + ["poison"] + ["x"] * 130 + ["poison"]
    bad = await scene.load(texts, **options)
    assert [(each.row, each.reason) for each in bad] == [
        (7, "the table refuses it: injected"),
        (138, "the table refuses it: injected"),
    ]
    assert "poison" in bad[0].raw
    assert texts_of_table() == ["x"] * 137
    assert rule.fired >= 2


async def test_attempts_meet_at_an_item_that_is_there(scene: Scene) -> None:
    """Not at one that the table refuses: there would be no fence."""
    scene.proxy.inject(
        "dynamodb.TransactWriteItems", refused(400, "ValidationException"), where="poison", times=-1
    )
    batch = cut_up([{"id": 0, "text": "poison"}, {"id": 1, "text": "x"}], 2)[0]
    async with scene.sink() as sink, sink.open(split(), UnitRef("lane/unit/a", 1)) as writer:
        assert len(await writer.write(batch)) == 1
        assert json.loads(writer.resume) == {"id": {"N": "1"}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("AccessDeniedException", "writing to DynamoDB table scene: not allowed .*check the credentials"),
        ("ResourceNotFoundException", "writing to DynamoDB table scene: it does not exist"),
    ],
)
async def test_no_table_and_no_permission_are_said_in_one_line(
    scene: Scene, form: str, code: str, said: str
) -> None:
    options, operation = FORMS[form]
    rule = scene.proxy.inject(operation, refused(400, code), times=-1)
    with pytest.raises(ConfigError, match=said) as told:
        await scene.load(["x"], **options)
    assert "\n" not in str(told.value)
    assert rule.fired == 1


# ---------------------------------------------------------------------- transactions


def cancelled(*codes: str) -> Callable[[Exchange], Awaitable[bool]]:
    """The transaction is cancelled for these reasons, one for each of its first items; nothing is applied."""

    async def fault(exchange: Exchange) -> bool:
        asked = json.loads(exchange.request.body)["TransactItems"]
        named = [*codes, *["None"] * (len(asked) - len(codes))]
        body = {
            "__type": "com.amazonaws.dynamodb.v20120810#TransactionCanceledException",
            "Message": "Transaction cancelled",
            "CancellationReasons": [{"Code": code, "Message": f"for {code}"} for code in named],
        }
        headers = {"content-type": "application/x-amz-json-1.0"}
        return await exchange.answer(Answer(400, headers, json.dumps(body).encode()))

    return fault


@pytest.mark.parametrize("code", ["TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"])
async def test_a_transaction_in_the_way_of_another_is_tried_again(scene: Scene, code: str) -> None:
    rule = scene.proxy.inject("dynamodb.TransactWriteItems", cancelled("None", code), times=2)
    assert await scene.load(["x"] * 3) == []
    assert texts_of_table() == ["x"] * 3
    assert rule.fired == 2
    assert len(scene.clock.slept) == 2


CONTENDED = {
    "transactions": cancelled("TransactionConflict"),
    "puts": refused(400, "TransactionConflictException"),
}


@pytest.mark.parametrize("form", CONTENDED)
async def test_contention_alone_ends_no_attempt(scene: Scene, form: str) -> None:
    """As long as anything gets anywhere, however often an item is in somebody else's transaction."""
    options, operation = FORMS[form]
    rule = scene.proxy.inject(operation, CONTENDED[form], times=40)
    assert await scene.load(["x"], **options) == []
    assert rule.fired == 40
    assert len(scene.clock.slept) == 40
    assert max(scene.clock.slept) <= 1


@pytest.mark.parametrize("form", CONTENDED)
async def test_who_gets_nowhere_for_a_minute_is_the_engine_s(scene: Scene, form: str) -> None:
    options, operation = FORMS[form]
    scene.clock = Skipping()
    rule = scene.proxy.inject(operation, CONTENDED[form], times=-1)
    with pytest.raises(Retryable, match="in the way of others for 60 s"):
        await scene.load(["x"], **options)
    assert rule.fired > 50
    assert 59 < sum(scene.clock.slept) < 61


async def test_items_that_are_in_nobody_s_way_go_ahead(scene: Scene) -> None:
    """At once, while the others wait: here for as long as it takes those."""
    sent: list[list[str]] = []
    ahead = asyncio.Event()

    class Waiting(Hurried):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            async with asyncio.timeout(60):
                await ahead.wait()

    async def keep(exchange: Exchange) -> bool:
        asked = json.loads(exchange.request.body)["TransactItems"]
        sent.append([put["Put"]["Item"]["text"]["S"] for put in asked])
        if len(sent) == 1:
            return await cancelled("None", "TransactionConflict", "None")(exchange)
        answer = await exchange.forward()
        ahead.set()
        return await exchange.answer(answer)

    async with scene.sink():
        pass
    scene.clock = Waiting()
    scene.proxy.inject("dynamodb.TransactWriteItems", keep, times=-1)
    assert await scene.load(["a", "b", "c"]) == []
    assert sent == [["a", "b", "c"], ["a", "c"], ["b"]]
    assert len(scene.clock.slept) == 1
    assert texts_of_table() == ["a", "b", "c"]


def test_what_is_throttled_does_not_go_ahead() -> None:
    items = [Item(n, b"", b"", 1) for n in range(2)]
    reasons = [{"Code": "TransactionConflict"}, {"Code": "ThrottlingError"}]
    said: Any = {"Error": {"Code": "TransactionCanceledException"}, "CancellationReasons": reasons}
    answer = _cancelled(ClientError(said, "TransactWriteItems"), items)
    assert answer == Told(again=items, refused=[], busy=True, throttled=True)


async def test_many_writers_of_the_same_items_all_get_through(scene: Scene) -> None:
    """As DynamoDB has it: a transaction that names an item that is in another one is cancelled."""
    held: set[str] = set()

    async def contend(exchange: Exchange) -> bool:
        asked = json.loads(exchange.request.body)["TransactItems"]
        mine = [put["Put"]["Item"]["id"]["N"] for put in asked]
        codes = ["TransactionConflict" if key in held else "None" for key in mine]
        if "TransactionConflict" in codes:
            return await cancelled(*codes)(exchange)
        held.update(mine)
        try:
            answer = await exchange.forward()
        finally:
            held.difference_update(mine)
        return await exchange.answer(answer)

    scene.proxy.inject("dynamodb.TransactWriteItems", contend, times=-1)

    async def load(generation: int) -> None:
        chance = Random(generation)
        ids = chance.sample(range(200), 200)
        batch = cut_up([{"id": n, "text": str(generation)} for n in ids], 1000)[0]
        async with scene.sink() as sink:
            unit = UnitRef(f"lane/unit/{generation}", 1, generation)
            async with sink.open(split(), unit) as writer:
                assert await writer.write(batch) == []

    async with scene.sink():
        pass
    async with asyncio.TaskGroup() as tasks:
        for generation in range(4):
            tasks.create_task(load(generation))
    assert texts_of_table() == ["3"] * 200


async def test_of_a_cancelled_transaction_only_the_rest_is_sent_again(scene: Scene) -> None:
    """What stands already is not sent again, and what is refused is told."""
    reasons = ("ConditionalCheckFailed", "ValidationError", "ItemCollectionSizeLimitExceeded", "None")
    scene.proxy.inject("dynamodb.TransactWriteItems", cancelled(*reasons))
    bad = await scene.load(["a", "b", "c", "d", "e"])
    assert [(each.row, each.reason) for each in bad] == [
        (1, "the table refuses it: for ValidationError"),
        (2, "the table refuses it: for ItemCollectionSizeLimitExceeded"),
    ]
    assert texts_of_table() == ["d", "e"]
    assert scene.clock.slept == []
    assert scene.proxy.calls["dynamodb.TransactWriteItems"] == 2


async def test_a_key_comes_once_in_a_batch(scene: Scene) -> None:
    """A transaction that names an item twice is refused whole."""
    records = [{"id": n % 10, "text": f"number {n}"} for n in range(100)]
    async with scene.sink() as sink, sink.open(split(), UnitRef("lane/unit/a", 1)) as writer:
        assert await writer.write(cut_up(records, 100)[0]) == []
    assert texts_of_table() == [f"number {n}" for n in range(90, 100)]
    assert scene.proxy.calls["dynamodb.TransactWriteItems"] == 1


async def test_a_transaction_written_already_is_one_call(scene: Scene) -> None:
    await scene.load(["x"] * 100)
    before = items("scene")
    scene.proxy.clear()
    await scene.load(["x"] * 100)
    assert scene.proxy.calls["dynamodb.TransactWriteItems"] == 1
    assert items("scene") == before


# ---------------------------------------------------------------------- batches


def unprocessed(share: int) -> Callable[[Exchange], Awaitable[bool]]:
    """Of the puts of a BatchWriteItem only the first of each `share` are done; the others come back."""

    async def fault(exchange: Exchange) -> bool:
        asked = json.loads(exchange.request.body)["RequestItems"]
        ((table, puts),) = asked.items()
        done, left = puts[::share], [put for n, put in enumerate(puts) if n % share]
        exchange.request.body = json.dumps({"RequestItems": {table: done}}).encode()
        answer = await exchange.forward()
        answer.body = json.dumps({"UnprocessedItems": {table: left} if left else {}}).encode()
        answer.headers.pop("x-amz-crc32", None)
        return await exchange.answer(answer)

    return fault


async def test_unprocessed_items_are_sent_again_alone(scene: Scene) -> None:
    rule = scene.proxy.inject("dynamodb.BatchWriteItem", unprocessed(3), times=-1)
    assert await scene.load([f"number {n}" for n in range(60)], exactly="false") == []
    assert texts_of_table() == [f"number {n}" for n in range(60)]
    # 25, 16, 10, 6, 4, 2, 1, twice; and 10, 6, 4, 2, 1.
    assert rule.fired == 19
    assert len(scene.clock.slept) == 16


async def test_progress_however_slow_is_progress(scene: Scene) -> None:
    rule = scene.proxy.inject("dynamodb.BatchWriteItem", unprocessed(25), times=-1)
    assert await scene.load(["x"] * 20, exactly="false") == []
    assert rule.fired == 20  # one by one, more often than what gets nowhere is tried


async def test_unprocessed_items_that_cannot_be_told_are_all_sent_again(scene: Scene) -> None:
    async def fault(exchange: Exchange) -> bool:
        asked = json.loads(exchange.request.body)["RequestItems"]["scene"]
        asked[0]["PutRequest"]["Item"]["id"] = {"N": "0E0"}
        answer = await exchange.forward()
        answer.body = json.dumps({"UnprocessedItems": {"scene": asked[:1]}}).encode()
        answer.headers.pop("x-amz-crc32", None)
        return await exchange.answer(answer)

    scene.proxy.inject("dynamodb.BatchWriteItem", fault)
    assert await scene.load(["a", "b"], exactly="false") == []
    assert scene.proxy.calls["dynamodb.BatchWriteItem"] == 3  # of a call that got nowhere each half by itself
    assert texts_of_table() == ["a", "b"]


async def test_batches_are_plain(scene: Scene) -> None:
    """25 a call, the last of a key stays, and nothing of flowlane's is in the items."""
    records = [{"id": n % 60, "text": f"number {n}"} for n in range(90)]
    async with (
        scene.sink(exactly=False) as sink,
        sink.open(split(), UnitRef("lane/unit/a", 1)) as writer,
    ):
        assert await writer.write(cut_up(records, 100)[0]) == []
        await writer.finish()
        assert (writer.position, writer.resume) == (None, "")
    assert scene.proxy.calls["dynamodb.BatchWriteItem"] == 3
    assert scene.proxy.calls["dynamodb.GetItem"] == 0
    assert sorted(items("scene"), key=lambda item: int(item["id"]["N"])) == [
        {"id": {"N": str(n)}, "text": {"S": f"number {n + 60 if n < 30 else n}"}} for n in range(60)
    ]


async def test_of_a_key_in_two_slices_the_last_record_stays(scene: Scene) -> None:
    """A batch is made into items in slices, from its end on, each of which is sent while others are made:
    so nothing but the sink itself keeps an earlier record from arriving last."""
    records = [{"id": n % 1200, "text": f"number {n}"} for n in range(2600)]
    assert len(records) > 2 * _SLICE
    sent: Counter[str] = Counter()

    async def keep(exchange: Exchange) -> bool:
        puts = json.loads(exchange.request.body)["RequestItems"]["scene"]
        sent.update(put["PutRequest"]["Item"]["id"]["N"] for put in puts)
        return await exchange.answer(await exchange.forward())

    scene.proxy.inject("dynamodb.BatchWriteItem", keep, times=-1)
    async with (
        scene.sink(exactly=False) as sink,
        sink.open(split(), UnitRef("lane/unit/a", 1)) as writer,
    ):
        assert await writer.write(cut_up(records, 3000)[0]) == []
    assert texts_of_table() == [f"number {n + (2400 if n < 200 else 1200)}" for n in range(1200)]
    assert set(sent.values()) == {1}


class Counted(dict[str, Any]):
    """A record that tells, for all of them, how often one was made into an item."""

    made = 0

    def items(self) -> Any:
        """See ``dict.items``."""
        Counted.made += 1
        return super().items()


async def test_no_more_items_are_made_than_can_be_sent_soon(scene: Scene) -> None:
    """Of 2,000 records, which take 15 ms to make and half a second to send, those beyond the calls in flight
    and as many that wait stay records."""
    Counted.made = 0
    ahead = taken = 0

    async def keep(exchange: Exchange) -> bool:
        nonlocal ahead, taken
        ahead = max(ahead, Counted.made - taken)
        done = await exchange.answer(await exchange.forward())
        taken += 25
        return done

    scene.proxy.inject("dynamodb.BatchWriteItem", keep, times=-1)
    batch = Batch([Counted(id=n, text="x") for n in range(2000)], Position(0, 0), Position(0, 2000), [])
    async with (
        scene.sink(exactly=False) as sink,
        sink.open(split(), UnitRef("lane/unit/a", 1)) as writer,
    ):
        assert await writer.write(batch) == []
    assert taken == Counted.made == 2000
    # 80 calls: 8 in flight at the beginning, 15 at the end.
    assert ahead <= 2 * 15 * 25 + _SLICE


# ---------------------------------------------------------------------- pace


def test_pace_grows_slowly_and_halves_once_a_round() -> None:
    pace = Pace()
    assert pace.limit == START
    cuts = pace.cuts
    for _ in range(START):
        pace.well()
    assert START + 0.9 < pace.limit <= START + 1
    for _ in range(5):
        pace.throttled(cuts)
    assert pace.limit == pytest.approx((START + 1) / 2, abs=0.1)
    for _ in range(20):
        pace.throttled(pace.cuts)
    assert pace.limit == 1
    for _ in range(MOST**2):
        pace.well()
    assert pace.limit == MOST
    assert Pace(4).limit == 4


class Crowd:
    """A fault that only counts how many calls are in it at once, and lets them through together."""

    def __init__(self, throttle: int = 0) -> None:
        self.now = self.most = 0
        self.throttle = throttle
        self.after = 0  #: the most since the last throttled one

    async def __call__(self, exchange: Exchange) -> bool:
        """See ``fault_proxy.Fault``."""
        self.now += 1
        self.most, self.after = max(self.most, self.now), max(self.after, self.now)
        try:
            if self.throttle:
                self.throttle -= 1
                self.after = 0
                return await throttled()(exchange)
            return await exchange.answer(await exchange.forward())
        finally:
            self.now -= 1


async def test_calls_in_flight_are_bounded_and_fewer_after_throttling(scene: Scene) -> None:
    crowd = Crowd()
    scene.proxy.inject("dynamodb.PutItem", crowd, times=-1)
    await scene.load(["x"] * 100, form="puts")
    assert 2 <= crowd.most <= START + 11  # it grew, in 100 calls: 8 + 9 + ... + 15 = 92
    scene.proxy.clear()
    fewer = Crowd(throttle=40)
    scene.proxy.inject("dynamodb.PutItem", fewer, times=-1)
    await scene.load(["y"] * 10, form="puts")
    assert fewer.most <= START
    assert fewer.after <= 4  # from one on: 1 + 2 + 3 + 4 = 10


async def test_a_failure_ends_the_calls_in_flight(scene: Scene) -> None:
    """Nothing is left running when ``write`` has raised."""
    crowd = Crowd()
    scene.proxy.inject("dynamodb.PutItem", refused(400, "AccessDeniedException"), nth=20)
    scene.proxy.inject("dynamodb.PutItem", crowd, times=-1)
    before = asyncio.all_tasks()
    with pytest.raises(ConfigError):
        await scene.load(["x"] * 500, form="puts")
    assert scene.proxy.calls["dynamodb.PutItem"] < 60
    proxied = {task for task in asyncio.all_tasks() - before if "FaultProxy" not in repr(task)}
    assert proxied == set()


# ---------------------------------------------------------------------- what one call holds


@given(st.lists(st.tuples(st.integers(1, 400_000), st.integers(1, 2_000_000)), max_size=300))
def test_calls_hold_what_they_may(sizes: list[tuple[int, int]]) -> None:
    made = [Item(n, b"", bytes(length), size) for n, (size, length) in enumerate(sizes[:30])]
    made += [Item(30 + n, b"", b"x", size) for n, (size, _) in enumerate(sizes[30:])]
    form = Transactions(None, "table")
    calls = list(chunks(made, form))
    assert [item for call_ in calls for item in call_] == made
    for call_ in calls:
        assert 1 <= len(call_) <= 100
        assert len(call_) == 1 or sum(max(item.size, len(item.body)) for item in call_) <= 2_000_000
    assert all(len(call_) == 1 for call_ in chunks(made, Puts(None, "table")))


async def test_large_items_go_in_several_transactions(ministack: str, scene: Scene) -> None:
    assert await scene.load(["x" * 390_000] * 23) == []
    assert len(items("scene")) == 23
    assert scene.proxy.calls["dynamodb.TransactWriteItems"] == 5
    assert MARK in items("scene")[0]
    assert call("DescribeTable", {"TableName": "scene"}, ministack)["Table"]["TableStatus"] == "ACTIVE"
