"""A backend's log and queue against a model of dicts and lists, as a Hypothesis state machine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flowlane import events, state
from flowlane.errors import VersionConflict
from flowlane.events import Event
from flowlane.ports import Append, Backend, Commit, Delivery, Index, Publish, Tally
from flowlane.testing.manual import ManualClock
from flowlane.testing.units import LANE, RUN, following, found, listed

#: Opens one storage; a persistent one finds what was there.
Opener = Callable[[], AbstractAsyncContextManager[Backend]]
#: Names a new, empty storage.
Storage = Callable[[], Opener]

_KEYS = ("a", "b", "c")
_TYPES = (
    events.ATTEMPT_STARTED,
    events.BATCH_WRITTEN,
    events.UNIT_SETTLED,
    events.UNIT_DEAD,
    events.UNIT_REDRIVEN,
)
_LEASE = 10.0

_drafts = st.tuples(
    st.sampled_from(_KEYS),
    st.sampled_from((0, 0, 0, 0, -1, 1)),  # how far the version expected is off the head
    st.sampled_from(_TYPES),
    st.sampled_from((None, None, 0.0, 5.0)),  # published, with which delay
    st.booleans(),  # as a reminder
    st.booleans(),  # acking some delivery
    st.sampled_from(("", "", "g", "h")),  # in which group
)


class _Entry(msgspec.Struct, eq=False):
    """A queue entry of the model; ``delivery`` while it is leased."""

    event: Event
    due: float
    group: str
    attempt: int = 0
    delivery: Delivery | None = None


class Machine(RuleBasedStateMachine):
    """Every rule does to the backend what it does to the model; the answers must agree."""

    def __init__(self, storage: Storage, clock: ManualClock) -> None:
        super().__init__()
        self.clock = clock
        self.streams: dict[str, list[Event]] = {}
        self.entries: list[_Entry] = []  # in the order in which they were published
        self.found = 0
        self.deliveries: list[Delivery] = []
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.backend: Backend = self.runner.run(self.stack.enter_async_context(storage()()))
        # What a queue holds that lies outside, and goes by another clock, is not the model's to say.
        self.queue = self.backend.exact_queue

    def teardown(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()

    @initialize()
    def begin(self) -> None:
        assert self.runner.run(self.backend.last([f"{LANE}/{key}" for key in _KEYS])) == {}

    # ----------------------------------------------------------------- rules

    @rule(drafts=st.lists(_drafts, min_size=1, max_size=5), pick=st.integers(0, 50))
    def commit(self, drafts: list[tuple[Any, ...]], pick: int) -> None:
        self.expire()
        group: list[Commit] = []
        wanted: list[dict[str, int] | None] = []
        for key, off, type, delay, repeat, acking, line in drafts:
            name = f"{LANE}/{key}"
            stream = self.streams.get(name, [])
            expected = max(0, len(stream) + off)
            event = following(stream[-1], type) if stream else found(key)
            event = msgspec.structs.replace(event, version=expected + 1)
            queued = delay is not None and self.queue
            publish = (Publish(event, "load", delay, repeat, line),) if queued else ()
            ack = self.deliveries[pick % len(self.deliveries)] if acking and self.deliveries else None
            group.append(
                Commit((Append(name, expected, (event,)),), publish, (Tally(RUN, 0, "load", found=1),), ack)
            )
            if expected != len(stream):
                wanted.append({name: len(stream)})
                continue
            wanted.append(None)
            self.found += 1
            self.streams.setdefault(name, []).append(event)
            if ack is not None:
                self.entries = [entry for entry in self.entries if entry.delivery is not ack]
            if queued and not (repeat and name in {e.event.subject for e in self.entries}):
                self.entries.append(_Entry(event, self.clock.monotonic() + delay, line))
        answers = self.runner.run(self.backend.commit(group))
        assert [a.heads if isinstance(a, VersionConflict) else None for a in answers] == wanted

    @precondition(lambda self: self.queue)
    @rule(limit=st.integers(0, 4))
    def receive(self, limit: int) -> None:
        self.expire()
        now = self.clock.monotonic()
        firsts = {entry.group: entry for entry in reversed(self.entries)}
        due = [
            entry
            for entry in self.entries
            if entry.delivery is None
            and entry.due <= now
            and (not entry.group or firsts[entry.group] is entry)
        ]
        got = self.runner.run(self.backend.receive(["load", "none"], limit, lease=_LEASE))
        assert len(got) == min(limit, len(due))
        for delivery in got:
            assert delivery.head == self.streams[delivery.event.subject][-1]
            same = [e for e in due if e.event == delivery.event and e.attempt + 1 == delivery.attempt]
            assert same, "a delivery that the model does not know"
            due.remove(same[0])
            same[0].attempt += 1
            same[0].delivery = delivery
            same[0].due = now + _LEASE
        self.deliveries += got

    @precondition(lambda self: self.deliveries)
    @rule(
        pick=st.integers(0, 50),
        delay=st.sampled_from((0.0, 5.0)),
        what=st.sampled_from(("ack", "nack", "extend")),
    )
    def settle(self, pick: int, delay: float, what: str) -> None:
        self.expire()
        delivery = self.deliveries[pick % len(self.deliveries)]
        held = [entry for entry in self.entries if entry.delivery is delivery]
        if what == "ack":
            self.runner.run(_awaited(delivery.ack()))
            self.entries = [entry for entry in self.entries if entry not in held]
        elif what == "nack":
            self.runner.run(_awaited(delivery.nack(delay=delay)))
            for entry in held:
                entry.delivery, entry.due = None, self.clock.monotonic() + delay
        else:
            assert self.runner.run(_awaited(delivery.extend(_LEASE))) is bool(held)
            for entry in held:
                entry.due = self.clock.monotonic() + _LEASE

    @precondition(lambda self: self.queue)
    @rule(seconds=st.sampled_from((1.0, 5.0, 10.0)))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: self.queue)
    @rule()
    def purge(self) -> None:
        self.runner.run(self.backend.purge())
        self.entries.clear()

    # ----------------------------------------------------------------- what always holds

    def expire(self) -> None:
        for entry in self.entries:
            if entry.delivery is not None and entry.due <= self.clock.monotonic():
                entry.delivery = None

    @invariant()
    def the_log_is_the_model(self) -> None:
        self.runner.run(self._compare())

    async def _compare(self) -> None:
        heads = {name: stream[-1] for name, stream in self.streams.items()}
        assert await self.backend.last([f"{LANE}/{key}" for key in _KEYS]) == heads
        for name, stream in self.streams.items():
            assert await listed(self.backend.read(name, after=1)) == stream[1:]
        scanned = Counter(event.id for event in await listed(self.backend.scan(LANE)))
        assert scanned == Counter(event.id for stream in self.streams.values() for event in stream)
        indexes: tuple[Index, ...] = ("open", "dead")
        for index in indexes:
            inside = {event.subject: event for event in await listed(self.backend.units(LANE, index))}
            assert inside == {name: head for name, head in heads.items() if state.index(head) == index}
        stages = (await self.backend.tally(RUN, 0)).stages
        assert (stages["load"].found if stages else 0) == self.found


async def _awaited(what: Any) -> Any:
    return await what


def check_against_model(storage: Storage, clock: ManualClock, examples: int) -> None:
    """Run `examples` random histories, of 40 steps at most, on new storages."""
    run_state_machine_as_test(
        lambda: Machine(storage, clock),  # type: ignore[arg-type] # a factory is enough for it
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
