"""What a handler finds: units to register and facts to append, held until a commit takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from flowlane import events
from flowlane.errors import Permanent, VersionConflict
from flowlane.events import Event, Raw
from flowlane.lane import Fact, Unit, fact_stream, group_of, stream_of
from flowlane.ports import Append, Publish, Tally

if TYPE_CHECKING:
    from flowlane.attempt import Attempt
    from flowlane.handling import Handling

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


_NO_FACTS: Mapping[str, tuple[int, Event]] = MappingProxyType({})


class Findings(msgspec.Struct, eq=False, gc=False):
    """What one attempt has found and no commit holds yet: at most `chunk` units and facts, in order.

    Of several facts of one stream the last one counts, since each is cumulative.
    """

    _chunk: int
    children: dict[str, Publish] = msgspec.field(default_factory=dict)  #: by stream: none is found twice
    _facts: Mapping[str, tuple[int, Event]] = _NO_FACTS
    _versions: dict[str, int] | None = None  # heads of the streams of facts, as this attempt knows them
    _since: float = 0.0

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
            Permanent: it is no unit, no stage handles such units, JSON cannot hold it, its event is too long,
                or its order key cannot be one.
        """
        engine, origin, lane = attempt.engine, attempt.origin, attempt.stage.lane
        handling = attempt.handling.yields.get(type(item)) or _handling(attempt, item)
        stream = stream_of(lane, item)
        if stream in self.children or stream == origin.subject:  # a page that links to itself
            return
        group = group_of(item, handling.order) if handling.order else ""
        child = Event(
            engine.next_id(),
            lane,
            item.unit_type,
            stream,
            engine.stamp(now),
            _payload(attempt, item),
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
        self.children[stream] = Publish(child, handling.queue, 0.0, False, group, handling.via)

    async def conclude(self, attempt: Attempt, fact: Fact) -> None:
        """Take the fact that the handler of `attempt` yielded."""
        engine, origin, lane = attempt.engine, attempt.origin, attempt.lane
        stream = stream_of(lane, fact) if fact.unit_key else fact_stream(lane, type(fact), {})
        expected = None if self._versions is None else self._versions.get(stream)
        if expected is None:
            head = (await engine.backend.last([stream])).get(stream)
            expected = head.version if head else 0
            self.recalled(stream, expected)
        event = Event(
            engine.next_id(),
            lane,
            fact.unit_type,
            stream,
            engine.stamp(),
            _payload(attempt, fact),
            expected + 1,
            origin.run,
            origin.round,
            attempt.event.id,
            "",
            "",
            fact.unit_schema,
        )
        self._facts = {**self._facts, stream: (expected, event)}

    def recalled(self, stream: str, version: int) -> None:
        """The handler knows the fact in `stream` as of `version`: what it concludes is to follow that one."""
        if self._versions is None:
            self._versions = {}
        self._versions[stream] = version

    # ------------------------------------------------------------------ committing

    def actions(
        self, attempt: Attempt, own: Event
    ) -> tuple[Sequence[Append], Sequence[Publish], tuple[Tally, ...]]:
        """What a commit whose own event is `own` does to register them."""
        queues = attempt.engine.queues
        published = tuple(self.children.values())
        first = Append(own.subject, attempt.version, (own,))
        if len(published) == 1 and not self._facts:
            (only,) = published
            child, handling = only.event, queues[only.stage]
            tally = (handling.found(own.run, own.round, 1),) if handling.counted else ()
            return (first, Append(child.subject, 0, (child,))), published, tally
        appends = [first]
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
        return appends, published, tuple(tallies)

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
            self.recalled(stream, expected + 1)
        self.discard()

    def discard(self) -> None:
        """They are not to be committed."""
        self.children = {}
        self._facts = _NO_FACTS
        self._since = 0.0


def _handling(attempt: Attempt, item: Any) -> Handling:
    """The stage that the unit `item` goes to: one of another class than that stage's own, but of its type.

    Raises:
        Permanent: it goes to none.
    """
    stage, what = attempt.stage, type(item).__name__
    if not isinstance(item, Unit):
        raise Permanent(f"stage {stage.name} yielded {item!r:.80}: yield units (or facts), nothing else")
    handling = attempt.engine.handling(stage.lane, item.unit_type)
    if handling is None:
        raise Permanent(f"stage {stage.name} yielded {what}, which no stage of lane {stage.lane} handles")
    if not (stage.counted or stage.on == events.LANE_TRIGGERED):
        raise Permanent(
            f"stage {stage.name} yielded {what}, but its run may be complete already: "
            "yield units from lane.triggered or from a unit's stage, or trigger another lane"
        )
    return handling


def _payload(attempt: Attempt, item: Unit) -> Raw:
    try:
        return Raw(events.encode_data(item))
    except (TypeError, ValueError, RecursionError, msgspec.EncodeError) as error:
        raise Permanent(
            f"stage {attempt.stage.name} yielded {item!r:.80}, which JSON cannot hold ({error}): "
            "give it numbers, text that is Unicode, lists and objects of these"
        ) from None
