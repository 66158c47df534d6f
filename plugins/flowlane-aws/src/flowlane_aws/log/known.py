"""What a process knows of streams, so that it does not have to ask."""

from __future__ import annotations

from flowlane.events import Event
from flowlane_aws.log import items


class Known:
    """For many streams, the highest version that is known to exist, and the index of a head of that version.

    Versions never vanish, so what was true once is true still; a stream that is forgotten is asked for.
    """

    def __init__(self, streams: int = 65_536) -> None:
        self._limit = streams
        self._streams: dict[str, tuple[int, str]] = {}

    def note(self, event: Event) -> None:
        """`event` stands in the log."""
        version, _ = self._streams.get(event.subject, (0, ""))
        if event.version >= version:
            self._streams.pop(event.subject, None)  # to the end: the oldest are forgotten first
            self._streams[event.subject] = (event.version, items.waiting(event))
            if len(self._streams) > self._limit:
                del self._streams[next(iter(self._streams))]

    def has(self, stream: str, version: int) -> bool:
        """Whether `version` of `stream` is known to exist."""
        return version == 0 or self._streams.get(stream, (0, ""))[0] >= version

    def where(self, stream: str, version: int) -> str | None:
        """Which index `stream` was in with `version` as its last (``items.waiting``), if that is known."""
        known, index = self._streams.get(stream, (0, ""))
        return index if known == version else None
