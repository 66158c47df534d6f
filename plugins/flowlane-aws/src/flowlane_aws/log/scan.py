"""The order of streams, restored: an index by time has each stream's events in about their order."""

from __future__ import annotations

from collections.abc import Iterator

from flowlane.events import Event


class Order:
    """Hands events on in their streams' order: one that comes before its predecessor, since the clocks of
    those who wrote them differ, is held back until that one has come."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self._held: dict[str, dict[int, Event]] = {}

    def next(self, event: Event) -> Iterator[Event]:
        """What can be handed on now that `event` has come."""
        held = self._held.setdefault(event.subject, {})
        held[event.version] = event
        wanted = self._next.get(event.subject, 1)
        while wanted in held:
            yield held.pop(wanted)
            wanted += 1
        self._next[event.subject] = wanted
        if not held:
            del self._held[event.subject]

    def rest(self) -> Iterator[Event]:
        """What is left in the end: of streams of which not every event was wanted, or has come."""
        for held in self._held.values():
            for version in sorted(held):
                yield held[version]
        self._held = {}
