"""Reading a lane's log for people: status, coverage, dead units, the causal tree of a run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from flowlane import events
from flowlane.engine import Engine
from flowlane.events import Event
from flowlane.handling import payload
from flowlane.lane import F, fact_stream
from flowlane.state import progress


class LogView:
    """What a lane's views may read: facts, and the units that are open or dead."""

    def __init__(self, engine: Engine, lane: str) -> None:
        self._engine = engine
        self._lane = lane

    async def recall(self, fact: type[F], **key: Any) -> F | None:
        """The last fact of its stream, as ``Context.recall``."""
        stream = fact_stream(self._lane, fact, key)
        head = (await self._engine.backend.last([stream])).get(stream)
        if head is None:
            return None
        known: F = payload(head, fact)
        return known

    async def dead(self) -> AsyncIterator[tuple[str, str]]:
        """Each dead unit's stream, and its reason."""
        async for head in self._engine.backend.units(self._lane, "dead"):
            if head.type != events.RECORD_PARKED:
                yield head.subject, progress(head).reason

    async def open(self) -> AsyncIterator[str]:
        """Each open unit's stream."""
        async for head in self._engine.backend.units(self._lane, "open"):
            yield head.subject


def causal_order(history: list[Event]) -> list[tuple[int, Event]]:
    """The events of a run as a tree, flattened: depth and event, children after what caused them."""
    children: dict[str, list[Event]] = {}
    known = {event.id for event in history}
    for event in history:
        children.setdefault(event.cause if event.cause in known else "", []).append(event)
    ordered: list[tuple[int, Event]] = []
    pending = [(0, event) for event in reversed(children.get("", []))]
    while pending:
        depth, event = pending.pop()
        ordered.append((depth, event))
        pending.extend((depth + 1, child) for child in reversed(children.get(event.id, [])))
    return ordered
