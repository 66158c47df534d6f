"""The answer makes AWS deliver again what failed, and nothing else; checked against models of AWS."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlane.aws_lambda.answer import Answer
from flowlane.aws_lambda.payload import Batch, Message, batch
from tests.aws_lambda.aggregate import aggregate
from tests.aws_lambda.model import Queue, Shard

FAILING = st.lists(st.booleans(), min_size=0, max_size=12)


def work(
    event: dict[str, Any], fails: Any, seen: list[str], by: Callable[[Message], str] = lambda m: m.id
) -> dict[str, Any]:
    """Handle the batch as the invocation does, sequences in an arbitrary order; `seen` gets the successes."""
    messages = batch(event)
    assert messages is not None
    answer = Answer(messages)
    sequences = messages.sequences()
    random.Random(len(seen)).shuffle(sequences)
    for sequence in sequences:
        for index in sequence:
            if answer.again(index):
                break
            if fails(messages.messages[index].id):
                answer.fail(index)
                break
            seen.append(by(messages.messages[index]))
    return answer.document()


@settings(deadline=None)
@given(FAILING)
def test_a_standard_queue_delivers_exactly_the_failed_ones_again(failing: list[bool]) -> None:
    queue = Queue(size=99)
    for n, _ in enumerate(failing):
        queue.send(f"m{n}", "", group=f"tenant{n % 3}")
    again = queue.settle(work(queue.receive(), lambda name: failing[int(name[1:])], []))
    assert sorted(again) == sorted(f"m{n}" for n, fails in enumerate(failing) if fails)


@settings(deadline=None)
@given(FAILING, st.integers(1, 4))
def test_a_fifo_queue_delivers_each_group_again_from_its_first_failure(
    failing: list[bool], groups: int
) -> None:
    queue = Queue(fifo=True, size=99)
    for n, _ in enumerate(failing):
        queue.send(f"m{n}", "", group=f"g{n % groups}")
    again = queue.settle(work(queue.receive(), lambda name: failing[int(name[1:])], []))
    expected = [n for n, _ in enumerate(failing) if any(failing[k] for k in range(n % groups, n + 1, groups))]
    assert again == [f"m{n}" for n in expected]


@settings(deadline=None)
@given(FAILING, st.integers(1, 4), st.integers(0, 10**56), st.booleans())
def test_a_stream_delivers_again_from_the_lowest_failure(
    failing: list[bool], keys: int, first: int, items: bool
) -> None:
    # Decimal strings of different lengths: as text, "10" comes before "9".
    records = [(str(first + n), f"k{n % keys}", b"") for n, _ in enumerate(failing)]
    shard = Shard(items, records, size=99)
    again = shard.settle(work(shard.receive(), lambda name: failing[int(name) - first], []))
    lowest = failing.index(True) if True in failing else len(failing)
    assert again == [name for name, _, _ in records[lowest:]]


@settings(deadline=None)
@given(st.integers(), st.integers(1, 25), st.integers(1, 4), st.integers(1, 10))
def test_a_fifo_queue_is_drained_in_order_whatever_fails_for_a_while(
    seed: int, length: int, groups: int, size: int
) -> None:
    rng = random.Random(seed)
    queue = Queue(fifo=True, size=size)
    for n in range(length):
        queue.send(f"m{n}", "", group=f"g{rng.randrange(groups)}")
    group = {message.id: message.group for message in queue.waiting}
    seen: list[str] = []
    for _ in range(500):
        queue.settle(work(queue.receive(), lambda name: rng.random() < 0.4, seen))
        if not queue.waiting:
            break
    assert sorted(queue.deleted) == sorted(group)
    assert set(seen) == set(group)
    for name in set(group.values()):
        ordered = [m for m in seen if group[m] == name]
        assert ordered == [m for m in group if group[m] == name], "order kept, and nothing handled twice"


@settings(deadline=None)
@given(st.integers(), st.integers(1, 25), st.integers(1, 4), st.integers(1, 10), st.booleans())
def test_a_shard_is_read_to_its_end_in_order_per_key_whatever_fails_for_a_while(
    seed: int, length: int, keys: int, size: int, items: bool
) -> None:
    rng = random.Random(seed)
    records = [(str(95 + n), f"k{rng.randrange(keys)}", b"") for n in range(length)]
    shard = Shard(items, records, size=size)
    seen: list[str] = []
    for _ in range(500):
        shard.settle(work(shard.receive(), lambda name: rng.random() < 0.3, seen))
        if shard.position == length:
            break
    assert shard.position == length
    assert set(seen) == {name for name, _, _ in records}
    for key in {key for _, key, _ in records}:
        of_key = [name for name, other, _ in records if other == key]
        firsts = list(dict.fromkeys(name for name in seen if name in of_key))
        assert firsts == of_key


@settings(deadline=None)
@given(st.integers(), st.lists(st.integers(0, 4), min_size=1, max_size=10), st.integers(1, 5))
def test_what_kinesis_records_hold_together_comes_again_together_until_all_of_it_is_done(
    seed: int, packed: list[int], size: int
) -> None:
    rng = random.Random(seed)
    numbers = count()
    inner = [[(f"k{rng.randrange(3)}", str(next(numbers)).encode()) for _ in range(n)] for n in packed]
    records = [
        (str(97 + n), "parent", aggregate(*each) if len(each) != 1 else each[0][1])
        for n, each in enumerate(inner)
    ]
    shard = Shard(records=records, size=size)
    seen: list[str] = []
    for _ in range(500):
        begun = len(seen)
        event = shard.receive()
        again = set(shard.settle(work(event, lambda name: rng.random() < 0.3, seen, by=_text)))
        done = set(seen[begun:])
        for record in event["Records"]:
            held = {data.decode() for _, data in inner[int(record["kinesis"]["sequenceNumber"]) - 97]}
            assert record["kinesis"]["sequenceNumber"] in again or held <= done, "nothing is passed over"
        if shard.position == len(records):
            break
    assert shard.position == len(records)
    flat = [(key if len(each) != 1 else "parent", data.decode()) for each in inner for key, data in each]
    assert set(seen) == {data for _, data in flat}
    for key in {key for key, _ in flat}:
        of_key = [data for other, data in flat if other == key]
        assert list(dict.fromkeys(data for data in seen if data in of_key)) == of_key


def _text(message: Message) -> str:
    assert isinstance(message.body, bytes)
    return message.body.decode()


def test_what_came_with_a_failed_record_need_not_be_begun() -> None:
    together = Batch("kinesis", [Message("7", "", "a"), Message("7", "", "b"), Message("6", "", "c")])
    answer = Answer(together)
    answer.fail(0)
    assert [answer.again(n) for n in range(3)] == [True, True, False]
    assert answer.document() == {"batchItemFailures": [{"itemIdentifier": "7"}]}


@pytest.mark.parametrize("state", [{}, {"count": 3}])
def test_the_state_of_a_window_goes_back_as_it_came(state: dict[str, Any]) -> None:
    answer = Answer(Batch("kinesis", [Message("7", "")], state=state))
    assert answer.document() == {"batchItemFailures": [], "state": state}
    answer.fail(0)
    assert answer.document() == {"batchItemFailures": [{"itemIdentifier": "7"}], "state": state}


def test_identifiers_are_given_back_verbatim_and_once() -> None:
    twins = Batch("standard", [Message(" id\n", ""), Message(" id\n", "")])
    answer = Answer(twins)
    answer.fail(1)
    assert answer.document() == {"batchItemFailures": [{"itemIdentifier": " id\n"}]}
    leading = Batch("kinesis", [Message("0017", ""), Message("009", "")])
    answer = Answer(leading)
    answer.fail(0)
    assert answer.document() == {"batchItemFailures": [{"itemIdentifier": "0017"}]}
    answer.fail(1)
    assert answer.document() == {"batchItemFailures": [{"itemIdentifier": "009"}]}


@pytest.mark.parametrize("kind", ["standard", "fifo", "kinesis", "dynamodb"])
def test_nothing_failed_is_an_empty_list(kind: Any) -> None:
    messages = [Message("1", "", "g"), Message("2", "", "g")]
    assert Answer(Batch(kind, messages)).document() == {"batchItemFailures": []}
