"""Fan-in on ``aws://`` is exact, and costs few requests; 10,000 units: ``python -m benchmarks fan-in``."""

from __future__ import annotations

import pytest

from benchmarks.fan_in import fan_in
from flowlane.ports import QueueSpec
from flowlane.testing.units import applied, discover, found, settle
from tests.aws_backend import counting, new_name, opened


@pytest.mark.parametrize(("children", "limit", "most"), [(400, 10, 2.4), (100, 1, 8.6)])
async def test_a_run_is_completed_once_and_when_all_have_settled(
    children: int, limit: int, most: float, ministack: str
) -> None:
    result = await fan_in(children, workers=20, backends=4, limit=limit)
    in_vain = 20 * result.seconds  # who waits asks once a second, however long the machine takes
    assert (result.requests.total() - in_vain) / children <= most


async def test_what_an_ordinary_delivery_asks_of_aws(ministack: str) -> None:
    """One unit, received, handled and settled by itself, in a run whose discovery has not ended."""
    with counting() as requests:
        async with opened(new_name()) as backend:
            await backend.create([QueueSpec("load", 30, 60)])
            await applied(backend, discover(found("first")))
            requests.clear()
            await applied(backend, discover(found("a")))
            found_in = dict(requests)
            (await backend.receive(["load"], 10, lease=30, wait=1))
            requests.clear()
            await applied(backend, discover(found("b")))
            requests.clear()
            (delivery,) = await backend.receive(["load"], 1, lease=30, wait=1)
            await applied(backend, settle(delivery))
    assert found_in == {"TransactWriteItems": 1, "SendMessageBatch": 1, "BatchExecuteStatement": 1}
    assert dict(requests) == {
        "ReceiveMessage": 1,
        "BatchGetItem": 1,  # its head
        "TransactWriteItems": 1,
        "DeleteMessageBatch": 1,
        "Query": 1,  # is the run complete?
        "BatchExecuteStatement": 1,  # it is not open any more
    }
