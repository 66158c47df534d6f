"""What a handler may yield: units, by their type rather than by their class; in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator

from flowlane import Context, Event, Lane, Policy, Unit
from tests.engine.test_engine import Bench, Thing, virtual


class _Twin(Unit, key="n", type="thing"):
    """Of the type that ``Thing`` has: written by another module, or before ``Thing`` was renamed."""

    n: int


@virtual
async def test_a_unit_of_another_class_goes_to_the_stage_of_its_type(bench: Bench) -> None:
    handled: list[object] = []
    lane = Lane("toy", policy=Policy(retries=0))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        yield Thing(n=1)
        yield _Twin(n=2)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        handled.append(event.data)

    report = await bench.run(lane)
    assert (report.outcome, report.units["found"]) == ("settled", 2)
    assert sorted(map(repr, handled)) == [repr(Thing(n=1)), repr(Thing(n=2))]
