"""The plan: what a run would find, before anything moves. Discovery runs for real; nothing is logged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, TypeVar

import msgspec

from flowlane import events
from flowlane.archive import connect_archive
from flowlane.engine import Engine
from flowlane.errors import ConfigError
from flowlane.events import Event
from flowlane.lane import F, Fact, Lane, Trigger, Unit, stream_of
from flowlane.ports import Archive, ObjectInfo
from flowlane.status import LogView

R = TypeVar("R")


class Planned(msgspec.Struct):
    """A unit that a run would register: its stream, stage, source and size in bytes (-1: unknown)."""

    unit: str
    stage: str
    url: str = ""
    size: int = -1


class _Rehearsal:
    """The context of a discovery that is only rehearsed: it may look at everything and change nothing."""

    attempts_left = 0

    def __init__(self, engine: Engine, lane: Lane, run: str) -> None:
        self._engine = engine
        self.lane = lane.name
        self.run = self.unit = run
        self.told: set[str] = set()  #: the streams that were planned, which a run would have registered

    def now(self) -> datetime:
        return self._engine.clock.now()

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        return await (await self._engine.connections.store(url)).head(url, headers=headers)

    async def list(self, url: str) -> AsyncIterator[ObjectInfo]:
        async for found in (await self._engine.connections.store(url)).list(url):
            yield found

    async def recall(self, fact: type[F], **key: Any) -> F | None:
        return await LogView(self._engine, self.lane).recall(fact, **key)

    def archive(self, url: str, **options: Any) -> AbstractAsyncContextManager[Archive]:
        return connect_archive(self._engine.connections, self._engine.clock, url, **options)

    async def known(self, units: Sequence[Unit]) -> Sequence[bool]:
        streams = [stream_of(self.lane, unit) for unit in units]
        heads = await self._engine.backend.last(streams)
        return [stream in heads or stream in self.told for stream in streams]

    async def secret(self, reference: str, *, fresh: bool = False) -> str:
        return await self._engine.connections.secret(reference, fresh=fresh)

    async def offload(self, function: Callable[..., R], *args: Any) -> R:
        return await self._engine.clock.offload(partial(function, *args))

    def turn(self, name: str, most: int) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def rows(self, url: str, **options: Any) -> NoReturn:
        self._refuse()

    async def load(self, rows: Any, **options: Any) -> NoReturn:
        self._refuse()

    async def copy(self, url: str, **options: Any) -> NoReturn:
        self._refuse()

    async def step(self, name: str, function: Any, *args: Any) -> NoReturn:
        self._refuse()

    def skip(self, reason: str) -> None:
        return None

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"the discovery of lane {self.lane} moves data itself, so it cannot be planned: run it"
        )


async def plan(engine: Engine, lane: Lane) -> AsyncIterator[Planned]:
    """The units that a run of `lane` would register now; those the log knows already are left out.

    Raises:
        ConfigError: the discovery does more than look.
        Retryable, Permanent: a source does not answer, or refuses.
    """
    stage = lane.stage_on(lane.triggered)
    assert stage is not None
    trigger = Trigger(slot="plan", by="plan")
    run = stream_of(lane.name, trigger)
    event = Event("plan", lane.name, events.LANE_TRIGGERED, run, engine.stamp(), trigger, 1, run)
    rehearsal = _Rehearsal(engine, lane, run)
    found = stage.handler(event, rehearsal)
    if not hasattr(found, "__aiter__"):
        found.close()
        raise ConfigError(f"stage {stage.name} of lane {lane.name} yields no units: there is nothing to plan")
    try:
        async for unit in found:
            if isinstance(unit, Unit) and not isinstance(unit, Fact):
                stream = stream_of(lane.name, unit)
                if stream not in rehearsal.told and not await engine.backend.last([stream]):
                    rehearsal.told.add(stream)
                    owed = engine.handling(lane.name, unit.unit_type)
                    yield Planned(
                        unit=stream,
                        stage=owed.stage.name if owed else "",
                        url=str(getattr(unit, "url", "")),
                        size=int(getattr(unit, "size", -1)),
                    )
    finally:
        await found.aclose()
