"""The answer makes AWS deliver again what failed, and nothing else; checked against models of AWS."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlane.aws_lambda.answer import Answer
from flowlane.aws_lambda.payload import Batch, Message, batch
from tests.aws_lambda.model import Queue, Shard

FAILING = st.lists(st.booleans(), min_size=0, max_size=12)


def work(event: dict[str, Any], fails: Any, seen: list[str]) -> dict[str, Any]:
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
            seen.append(messages.messages[index].id)
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
@given(FAILING, st.integers(1, 4), st.integers(0, 10**56))
def test_kinesis_delivers_again_from_the_lowest_failure(failing: list[bool], keys: int, first: int) -> None:
    # Decimal strings of different lengths: as text, "10" comes before "9".
    records = [(str(first + n), f"k{n % keys}", b"") for n, _ in enumerate(failing)]
    shard = Shard(records, size=99)
    again = shard.settle(work(shard.receive(), lambda name: failing[int(name) - first], []))
    lowest = failing.index(True) if True in failing else len(failing)
    assert again == [name for name, _, _ in records[lowest:]]


@settings(deadline=None)
@given(st.integers(), st.integers(1, 25), st.integers(1, 4), st.integers(1, 10))
def test_a_fifo_queue_is_drained_in_order_whatever_fails_for_a_while(
    seed: int, count: int, groups: int, size: int
) -> None:
    rng = random.Random(seed)
    queue = Queue(fifo=True, size=size)
    for n in range(count):
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
@given(st.integers(), st.integers(1, 25), st.integers(1, 4), st.integers(1, 10))
def test_a_shard_is_read_to_its_end_in_order_per_key_whatever_fails_for_a_while(
    seed: int, count: int, keys: int, size: int
) -> None:
    rng = random.Random(seed)
    records = [(str(95 + n), f"k{rng.randrange(keys)}", b"") for n in range(count)]
    shard = Shard(records, size=size)
    seen: list[str] = []
    for _ in range(500):
        shard.settle(work(shard.receive(), lambda name: rng.random() < 0.3, seen))
        if shard.position == count:
            break
    assert shard.position == count
    assert set(seen) == {name for name, _, _ in records}
    for key in {key for _, key, _ in records}:
        of_key = [name for name, other, _ in records if other == key]
        firsts = list(dict.fromkeys(name for name in seen if name in of_key))
        assert firsts == of_key


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


@pytest.mark.parametrize("kind", ["standard", "fifo", "kinesis"])
def test_nothing_failed_is_an_empty_list(kind: Any) -> None:
    messages = [Message("1", "", "g"), Message("2", "", "g")]
    assert Answer(Batch(kind, messages)).document() == {"batchItemFailures": []}
