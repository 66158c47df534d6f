"""What a handler finds: units to register and facts to append, held until a commit takes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from flowlane import events
from flowlane.errors import Permanent, VersionConflict
from flowlane.events import Event
from flowlane.lane import Fact, Unit, fact_stream, group_of, stream_of
from flowlane.ports import Append, Publish, Tally

if TYPE_CHECKING:
    from flowlane.attempt import Attempt

#: Children and facts in one commit, at most.
CHUNK = 64
#: What a commit may hold besides: its own event and tally, a notice. A tally for each stage that the children
#: are of comes on top: see ``chunk``.
_BESIDES = 4
#: Seconds after which units found are registered at the next yield, however few they are.
PATIENCE = 1.0


def chunk(stages: int) -> int:
    """Children and facts in one commit of a lane with so many stages: with a tally for each stage that they
    are of, and each may be of another, it stays within ``MAX_ACTIONS``."""
    return max((events.MAX_ACTIONS - _BESIDES) // 2, min(CHUNK, events.MAX_ACTIONS - _BESIDES - stages))


class Findings:
    """What one attempt has found and no commit holds yet: at most `chunk` units and facts, in order.

    Of several facts of one stream the last one counts, since each is cumulative.
    """

    __slots__ = ("_chunk", "_facts", "_since", "_versions", "children")

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self.children: dict[str, Publish] = {}  #: by stream: none is found twice
        self._facts: dict[str, tuple[int, Event]] = {}
        self._versions: dict[str, int] = {}  # heads of the streams of facts, as this attempt knows them
        self._since = 0.0

    def __bool__(self) -> bool:
        return bool(self.children or self._facts)

    @property
    def has_facts(self) -> bool:
        """Whether a fact is among them."""
        return bool(self._facts)

    def due(self, now: float) -> bool:
        """Whether they should be committed by `now`: they are many, or have waited for long."""
        if not self._since:
            self._since = now
        return len(self.children) + len(self._facts) >= self._chunk or now - self._since > PATIENCE

    # ------------------------------------------------------------------ finding

    def add(self, attempt: Attempt, item: Any, now: float) -> None:
        """Take the unit `item` that the handler of `attempt` yielded.

        Raises:
            Permanent: it is no unit, no stage handles such units, its event is too long, or its order key
                cannot be one.
        """
        stage = attempt.stage
        if not isinstance(item, Unit):
            raise Permanent(f"stage {stage.name} yielded {item!r:.80}: yield units (or facts), nothing else")
        engine, origin, lane = attempt.engine, attempt.origin, stage.lane
        kind = item.unit_type
        handling = engine.handling(lane, kind)
        if handling is None:
            raise Permanent(
                f"stage {stage.name} yielded {type(item).__name__}, which no stage of lane {lane} handles"
            )
        if not (attempt.handling.counted or stage.on == events.LANE_TRIGGERED):
            raise Permanent(
                f"stage {stage.name} yielded {type(item).__name__}, but its run may be complete already: "
                "yield units from lane.triggered or from a unit's stage, or trigger another lane"
            )
        stream = stream_of(lane, item)
        if stream in self.children or stream == origin.subject:  # a page that links to itself
            return
        group = group_of(item, handling.order) if handling.order else ""
        child = Event(
            engine.next_id(),
            lane,
            kind,
            stream,
            engine.stamp(now),
            msgspec.Raw(events.encode_data(item)),
            1,
            origin.run,
            origin.round,
            attempt.event.id,
            handling.name,
            handling.cut,
            item.unit_schema,
            origin.traceparent,
            group,
        )
        if len(child.data) > events.SURELY_FITS:
            events.encode(child)  # refused now, by name, rather than with all that is committed along with it
        self.children[stream] = handling.publish(child)

    async def conclude(self, attempt: Attempt, fact: Fact) -> None:
        """Take the fact that the handler of `attempt` yielded."""
        engine, origin, lane = attempt.engine, attempt.origin, attempt.lane
        stream = stream_of(lane, fact) if fact.unit_key else fact_stream(lane, type(fact), {})
        expected = self._versions.get(stream)
        if expected is None:
            head = (await engine.backend.last([stream])).get(stream)
            expected = self._versions[stream] = head.version if head else 0
        event = Event(
            engine.next_id(),
            lane,
            fact.unit_type,
            stream,
            engine.stamp(),
            msgspec.Raw(events.encode_data(fact)),
            expected + 1,
            origin.run,
            origin.round,
            attempt.event.id,
            "",
            "",
            fact.unit_schema,
        )
        self._facts[stream] = (expected, event)

    def recalled(self, stream: str, version: int) -> None:
        """The handler knows the fact in `stream` as of `version`: what it concludes is to follow that one."""
        self._versions[stream] = version

    # ------------------------------------------------------------------ committing

    def actions(self, attempt: Attempt, own: Event) -> tuple[list[Append], list[Publish], Iterable[Tally]]:
        """What a commit whose own event is `own` does to register them."""
        appends = [Append(own.subject, attempt.version, (own,))]
        published = [*self.children.values()]
        queues = attempt.engine.queues
        if len(published) == 1 and not self._facts:
            (only,) = published
            appends.append(Append(only.event.subject, 0, (only.event,)))
            handling = queues[only.stage]
            return appends, published, (handling.found(own.run, own.round, 1),) if handling.counted else ()
        found: dict[str, int] = {}
        for stream, publish in self.children.items():
            appends.append(Append(stream, 0, (publish.event,)))
            found[publish.stage] = found.get(publish.stage, 0) + 1
        for stream, (expected, event) in self._facts.items():
            appends.append(Append(stream, expected, (event,)))
        tallies = [
            handling.found(own.run, own.round, count)
            for queue, count in found.items()
            if (handling := queues[queue]).counted
        ]
        return appends, published, tallies

    def leave_out(self, conflict: VersionConflict) -> None:
        """Drop the children that exist already, so that the rest can be committed.

        Raises:
            VersionConflict: it is not (only) children that conflict.
        """
        if not conflict.heads.keys() <= self.children.keys():
            raise conflict
        for stream in conflict.heads:
            del self.children[stream]

    def committed(self) -> None:
        """A commit holds them all."""
        for stream, (expected, _) in self._facts.items():
            self._versions[stream] = expected + 1
        self.discard()

    def discard(self) -> None:
        """They are not to be committed."""
        self.children = {}
        self._facts = {}
        self._since = 0.0
