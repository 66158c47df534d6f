"""Stages as the engine looks them up, and payloads as their handlers get them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from flowlane import events
from flowlane.errors import ConfigError, Permanent
from flowlane.events import Event
from flowlane.lane import Stage, shortened
from flowlane.ports import Publish, Tally


class Handling:
    """A stage with what the engine looks up for each of its deliveries."""

    __slots__ = (
        "_found",
        "_settled",
        "chunk",
        "counted",
        "cut",
        "decoder",
        "generator",
        "handler",
        "name",
        "order",
        "queue",
        "stage",
        "via",
        "yields",
    )

    def __init__(self, stage: Stage, chunk: int) -> None:
        self.stage = stage
        self.chunk = chunk  #: see ``discovery.chunk``
        self.name = stage.name
        self.queue = stage.queue
        self.yields: Mapping[type[Any], Handling] = {}  #: by class of unit, who handles what it may yield
        self.order = stage.order
        self.via = stage.via
        self.counted = stage.counted
        self.handler = stage.handler
        self._settled = (Tally("", 0, stage.name, 0, 1),)
        self._found = Tally("", 0, stage.name, 1)
        self.cut = str(stage.policy.cut)
        self.decoder = msgspec.json.Decoder(stage.unit)
        self.generator = inspect.isasyncgenfunction(stage.handler)
        if not self.generator and not inspect.iscoroutinefunction(stage.handler):
            raise ConfigError(
                f"stage {stage.name} of lane {stage.lane} is not async: "
                f"write `async def {stage.handler.__name__}`"
            )

    def group(self, head: Event) -> str:
        """The group under which the unit whose last event is `head` is published; none without an order key.
        A unit that was found before its stage had one is a group by itself."""
        if not self.order:
            return ""
        return head.partitionkey or shortened(head.subject)

    def publish(self, event: Event, delay: float = 0.0, *, repeat: bool = False) -> Publish:
        """What `event`, the last one of a unit that its stage is owed, is published by."""
        group = self.group(event) if self.order else ""
        return Publish(event, self.queue, delay, repeat, group, self.via)

    def settled(self, run: str, round: int) -> tuple[Tally, ...]:
        """What a unit that settles without records adds to its run's counters: the same for all of them."""
        known = self._settled[0]
        if known.run != run or known.round != round:
            self._settled = (Tally(run, round, self.name, 0, 1),)
        return self._settled

    def found(self, run: str, round: int, count: int) -> Tally:
        """What registering `count` units adds to their run's counters."""
        if count > 1:
            return Tally(run, round, self.name, count)
        known = self._found
        if known.run != run or known.round != round:
            known = self._found = Tally(run, round, self.name, 1)
        return known

    def typed(self, first: Event) -> Event:
        """A unit's first event as its handler is given it: with the typed payload.

        Raises:
            Permanent: see ``payload``.
        """
        unit = self.stage.unit
        if first.schema == unit.unit_schema:
            try:
                data = self.decoder.decode(first.data)
            except (ValueError, RecursionError):
                data = payload(first, unit)
        else:
            data = payload(first, unit)
        return replace(first, data=data)


def payload(event: Event, unit: type[Any]) -> Any:
    """The typed payload of a unit's first event (or of a fact), lifted to this release's schema.

    Raises:
        Permanent: it cannot be read as `unit`.
    """
    what = f"{event.type} {event.subject}"
    raw = events.upcast(event.data, event.schema, unit.unit_schema, unit.unit_upcasters, what)
    try:
        return msgspec.json.decode(raw, type=unit)
    except (ValueError, RecursionError) as error:  # msgspec's DecodeError is a ValueError
        raise Permanent(
            f"the payload of {what} does not fit {unit.__name__} ({error}): "
            "add schema= and upcasters to the class"
        ) from None
