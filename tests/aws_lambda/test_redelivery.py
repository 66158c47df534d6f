"""The function before models of AWS: what fails comes again, exactly that, and nothing is lost."""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlane import Permanent
from flowlane.clock import SystemClock
from flowlane.errors import VersionConflict
from flowlane.ports import Commit, Committed
from tests.aws_lambda.aggregate import aggregate
from tests.aws_lambda.model import Queue, Shard
from tests.aws_lambda.outside import OutsideBackend
from tests.aws_lambda.toys import Remaining, function, order, toy

LONG = Remaining(900)
GROUPS = "abc"


class FlakyBackend(OutsideBackend):
    """Its log refuses runs at random, each for as long as a turn; ``opened`` are those that it took, in their
    order, ``refused`` those of this turn that it did not."""

    def __init__(self, rng: random.Random, share: float) -> None:
        super().__init__(SystemClock(), Queue())
        self._rng, self._share = rng, share
        self._asked: dict[str, bool] = {}
        self.opened: list[str] = []

    def turn(self) -> None:
        """Chance decides anew."""
        self._asked.clear()

    @property
    def refused(self) -> list[str]:
        return [name for name, taken in self._asked.items() if not taken]

    async def commit(self, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        names = [append.stream for commit in work for append in commit.appends]
        for name in names:
            self._asked.setdefault(name, self._rng.random() >= self._share)
        if not all(self._asked[name] for name in names):
            raise Permanent("the log refuses, this time")  # the committer tries them one by one
        answers = await super().commit(work)
        for name, answer in zip(names, answers, strict=True):
            if not isinstance(answer, VersionConflict):
                self.opened.append(name)
        return answers


def run_of(number: int) -> str:
    """The run that message `number` opens."""
    return f"toy/run/shop,{number:03}"


def body(number: int) -> bytes:
    """The message of that number."""
    return msgspec.json.encode(order(f"{number:03}"))


def queue_of(groups: Sequence[str], rng: random.Random, *, fifo: bool, size: int) -> Queue:
    """A queue with a message of each group."""
    queue = Queue(fifo=fifo, size=size, rng=rng)
    for number, group in enumerate(groups):
        queue.send(f"m{number:03}", body(number).decode(), group)
    return queue


def shard_of(groups: Sequence[str], rng: random.Random, *, size: int) -> Shard:
    """A shard of Kinesis with a record of each group, some of them put together into one."""
    shard = Shard(size=size)
    number = 0
    while number < len(groups):
        together = rng.randint(1, 3)
        some = list(enumerate(groups))[number : number + together]
        data = aggregate(*((group, body(n)) for n, group in some)) if together > 1 else body(number)
        shard.records.append((str(95 + number), groups[number], data))
        number += together
    return shard


SOURCES = st.tuples(
    st.sampled_from(["standard", "fifo", "kinesis"]),
    st.lists(st.sampled_from(GROUPS), min_size=1, max_size=12),
    st.integers(1, 10),
    st.integers(),
)


@settings(max_examples=60, deadline=None)
@given(SOURCES)
def test_exactly_what_failed_comes_again_until_all_is_done(
    source: tuple[str, list[str], int, int],
) -> None:
    kind, groups, size, seed = source
    rng = random.Random(seed)
    backend = FlakyBackend(rng, 0.3)
    mapping: Queue | Shard
    if kind == "kinesis":
        mapping = shard_of(groups, rng, size=size)
    else:
        mapping = queue_of(groups, rng, fifo=kind == "fifo", size=size)
    with function(toy(), backend=backend) as call:
        for _ in range(500):
            event = mapping.receive()
            if not event["Records"]:
                break
            backend.turn()
            again = mapping.settle(call(event, LONG))
            assert again == expected(kind, event, groups, backend.refused), "these, and no others"
    assert not mapping.receive()["Records"], "all of it is done"
    assert sorted(backend.opened) == sorted(map(run_of, range(len(groups)))), "each once"
    if kind != "standard":
        for group in GROUPS:
            of_group = [run_of(n) for n, other in enumerate(groups) if other == group]
            assert [run for run in backend.opened if run in of_group] == of_group, "in order"


def expected(kind: str, event: dict[str, Any], groups: list[str], refused: list[str]) -> list[str]:
    """What AWS is to deliver again if the runs `refused` could not be opened, in the batch's order."""
    if kind == "kinesis":
        names = [record["kinesis"]["sequenceNumber"] for record in event["Records"]]
        held = [base64.b64decode(record["kinesis"]["data"]) for record in event["Records"]]
        failed = [any(run.rpartition(",")[2].encode() in data for run in refused) for data in held]
        return names[failed.index(True) :] if True in failed else []
    names = [record["messageId"] for record in event["Records"]]
    numbers = [int(name[1:]) for name in names]
    first: dict[str, int] = {}
    for number in numbers:
        if run_of(number) in refused:
            first.setdefault(groups[number], number)
    if kind == "fifo":
        return [
            n for n, number in zip(names, numbers, strict=True) if number >= first.get(groups[number], 10**9)
        ]
    return [n for n, number in zip(names, numbers, strict=True) if run_of(number) in refused]


@pytest.mark.parametrize("seed", range(10))
def test_changes_of_items_come_again_from_the_lowest_that_failed(seed: int) -> None:
    rng = random.Random(seed)
    backend = FlakyBackend(rng, 0.25)
    keys = [rng.choice(GROUPS) for _ in range(20)]
    shard = Shard(True, [(str(95 + n), key, b"") for n, key in enumerate(keys)], size=rng.randint(1, 10))
    with function(toy(), backend=backend) as call:
        for _ in range(500):
            event = shard.receive()
            if not event["Records"]:
                break
            backend.turn()
            again = shard.settle(call(event, LONG))
            numbers = [int(run.rpartition(",e")[2]) for run in backend.refused]
            names = [record["dynamodb"]["SequenceNumber"] for record in event["Records"]]
            assert again == (names[names.index(str(min(numbers))) :] if numbers else [])
    assert shard.position == len(keys)
    for key in GROUPS:
        of_key = [f"toy/run/dynamodb,arn:stream,e{95 + n}" for n, other in enumerate(keys) if other == key]
        assert [run for run in backend.opened if run in of_key] == of_key
    assert len(backend.opened) == len(keys)
