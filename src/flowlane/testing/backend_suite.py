"""The contract of ``ports.Backend`` (log, queue, tallies, indexes) as tests; subclass and run with pytest.

::

    class TestMine(BackendSuite):
        @pytest.fixture
        def storage(self, clock):
            return lambda: lambda: open_backend("mine://", Environment(clock, connections))

``storage()`` names a new, empty storage and returns what opens it; a ``persistent`` backend finds there again
what was written before. A backend whose leases follow its server's clock sets ``elapse`` to really wait, a
short ``LEASE``, and ``WAIT`` for a queue that does not show at once what was published. One whose queues have
to be made makes ``QUEUES``, ``ORDERED`` as one that keeps the order within groups. pytest-asyncio runs in
auto mode. Needs ``flowlane[test]``.

A machine that stands still for seconds at any moment makes no test fail: what is to run out lasts ``LEASE``
seconds, and nothing is expected that holds only while it has not; all else lasts ``KEPT`` seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar, Final

import msgspec
import pytest

from flowlane import events
from flowlane.errors import Permanent, VersionConflict
from flowlane.events import MAX_ACTIONS, MAX_EVENT_BYTES, Event
from flowlane.ports import Append, Backend, Commit, Committed, Delivery, Index, Publish, Tally
from flowlane.state import Counts, RunTally, StageTally
from flowlane.testing.backend_model import Opener, Storage, check_against_model
from flowlane.testing.manual import ManualClock
from flowlane.testing.units import (
    LANE,
    RUN,
    append,
    applied,
    discover,
    following,
    found,
    listed,
    settle,
    within,
)

#: Seconds of leases and delays that no test lets run out, however slow the machine is.
KEPT: Final = 600.0
#: Seconds within which anything comes about, on any machine: less than what waits for it would wait.
PATIENCE: Final = 60.0
#: Seconds within which many have done much, on any machine.
LONG_PATIENCE: Final = 240.0
#: The queues that the suites publish to; all that is published to ``ORDERED`` is of some group.
ORDERED = "ordered"
QUEUES = ("load", "copy", "x", "y", "z", ORDERED)


class Suite:
    """What the suites share: a clock, a storage, an open backend."""

    persistent: ClassVar[bool] = False
    #: whether an ack, nack or extend after the end of the lease is refused even if nobody has received since
    exact_leases: ClassVar[bool] = True
    #: seconds of leases and delays that a test lets run out
    LEASE: ClassVar[float] = 30.0
    WAIT: ClassVar[float] = 0.0
    #: how often calls are cut short, each time somewhere else; less where each may cost a lease
    CUTS: ClassVar[int] = 20

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def storage(self, clock: ManualClock) -> Storage:
        raise NotImplementedError("override the fixture `storage`, see the module's docstring")

    @pytest.fixture
    def opener(self, storage: Storage) -> Opener:
        return storage()

    @pytest.fixture
    async def backend(self, opener: Opener) -> AsyncIterator[Backend]:
        async with opener() as backend:
            yield backend

    async def elapse(self, clock: ManualClock, seconds: float) -> None:
        """`seconds` go by, as far as leases and delays are concerned."""
        clock.advance(seconds)

    async def receive(
        self,
        backend: Backend,
        limit: int = 10,
        stages: Sequence[str] = ("load",),
        *,
        lease: float = KEPT,
    ) -> Sequence[Delivery]:
        """What is due now, under a lease of `lease` seconds."""
        return await backend.receive(stages, limit, lease=lease, wait=self.WAIT)

    async def receive_one(self, backend: Backend, stage: str = "load", *, lease: float = KEPT) -> Delivery:
        """The one delivery that is due now, under a lease of `lease` seconds."""
        (delivery,) = await self.receive(backend, stages=(stage,), lease=lease)
        return delivery


async def index(backend: Backend, which: Index, lane: str = LANE) -> set[str]:
    """The streams of `lane` in the index."""
    return {head.subject for head in await listed(backend.units(lane, which))}


class LogSuite(Suite):
    """Streams, conditional appends, groups of commits."""

    async def test_a_stream_is_read_as_it_was_appended(self, backend: Backend) -> None:
        first = found("a", data={"text": 'ünï "quoted" \\ \n', "n": [1, 2.5, None]})
        second = following(first, events.ATTEMPT_STARTED, attempt=1, token=2)
        third = following(second, events.UNIT_SETTLED)
        await applied(backend, Commit((append(first, second),)))
        await applied(backend, Commit((append(third),)))
        assert await listed(backend.read(first.subject)) == [first, second, third]
        assert await listed(backend.read(first.subject, after=1)) == [second, third]
        assert await listed(backend.read(first.subject, after=3)) == []
        assert await listed(backend.read("suite/none")) == []

    async def test_last_has_the_streams_that_exist(self, backend: Backend) -> None:
        a, b = found("a"), found("b")
        await applied(backend, Commit((append(a),)), Commit((append(b, following(b)),)))
        last = await backend.last([a.subject, "suite/none", b.subject])
        assert {name: event.version for name, event in last.items()} == {a.subject: 1, b.subject: 2}
        assert await backend.last([]) == {}

    async def test_a_unit_is_found_once(self, backend: Backend) -> None:
        await applied(backend, discover(found("a")))
        (again,) = await backend.commit([discover(found("a"))])
        assert isinstance(again, VersionConflict)
        assert again.heads == {"suite/a": 1}

    @pytest.mark.parametrize("expected", [0, 1, 3, 7])
    async def test_an_append_expects_the_head_exactly(self, backend: Backend, expected: int) -> None:
        first = found("a")
        await applied(backend, Commit((append(first, following(first)),)))
        late = msgspec.structs.replace(first, id="late", version=expected + 1)
        (answer,) = await backend.commit([Commit((Append(first.subject, expected, (late,)),))])
        assert isinstance(answer, VersionConflict)
        assert answer.heads == {first.subject: 2}
        assert len(await listed(backend.read(first.subject))) == 2

    async def test_nothing_of_a_commit_in_conflict_is_applied(self, backend: Backend) -> None:
        taken, other = found("taken"), found("other")
        await applied(backend, discover(taken))
        delivery = await self.receive_one(backend)
        commit = Commit(
            (append(other), append(found("taken"))),
            (Publish(other, "load"),),
            (Tally(RUN, 0, "load", found=1, closed=True),),
            delivery,
        )
        (answer,) = await backend.commit([commit])
        assert isinstance(answer, VersionConflict)
        assert answer.heads == {taken.subject: 1}
        assert await backend.last([other.subject]) == {}
        assert await backend.tally(RUN, 0) == RunTally(False, {"load": StageTally(found=1)})
        assert await index(backend, "open") == {taken.subject}
        assert await self.receive(backend) == []
        await delivery.nack()
        assert (await self.receive_one(backend)).event == taken  # the ack was not applied either

    async def test_a_conflict_leaves_the_others_of_its_group_alone(self, backend: Backend) -> None:
        await applied(backend, discover(found("b")))
        answers = await backend.commit([discover(found(key)) for key in "abc"])
        assert [type(answer) for answer in answers] == [Committed, VersionConflict, Committed]
        assert set(await backend.last(["suite/a", "suite/c"])) == {"suite/a", "suite/c"}
        assert (await backend.tally(RUN, 0)).stages["load"].found == 3

    async def test_a_group_is_applied_in_order(self, backend: Backend) -> None:
        first = found("a")
        second = following(first, events.ATTEMPT_STARTED)
        await applied(backend, Commit((append(first),)), Commit((append(second),)))
        assert await listed(backend.read(first.subject)) == [first, second]

    async def test_what_builds_upon_a_conflict_conflicts(self, backend: Backend) -> None:
        await applied(backend, Commit((append(found("a")),)))
        mine = found("a")
        one, two = following(mine), following(following(mine))
        answers = await backend.commit(
            [Commit((append(found("b")), append(mine))), Commit((append(two),)), Commit((append(one),))]
        )
        assert [type(answer) for answer in answers] == [VersionConflict, VersionConflict, Committed]
        assert await backend.last(["suite/b"]) == {}

    async def test_of_two_in_one_group_the_first_wins(self, backend: Backend) -> None:
        one, two = found("a"), found("a")
        answers = await backend.commit([Commit((append(one),)), Commit((append(two),))])
        assert [type(answer) for answer in answers] == [Committed, VersionConflict]
        assert await listed(backend.read("suite/a")) == [one]

    async def test_filter_and_resubmit(self, backend: Backend) -> None:
        await applied(backend, discover(found("b")), discover(found("d")))
        chunk = [found(key) for key in "abcde"]
        while True:
            (answer,) = await backend.commit([Commit([append(event) for event in chunk])])
            if isinstance(answer, Committed):
                break
            assert answer.heads
            chunk = [event for event in chunk if event.subject not in answer.heads]
        assert [event.subject for event in chunk] == ["suite/a", "suite/c", "suite/e"]

    async def test_one_winner_for_each_version(self, backend: Backend) -> None:
        first = found("a")
        await applied(backend, Commit((append(first),)))

        async def contend() -> int:
            won = 0
            while won < 5:
                head = (await backend.last([first.subject]))[first.subject]
                (answer,) = await backend.commit([Commit((append(following(head, events.BATCH_WRITTEN)),))])
                won += isinstance(answer, Committed)
            return won

        await within(LONG_PATIENCE, asyncio.gather(*(contend() for _ in range(8))))
        stream = await listed(backend.read(first.subject))
        assert [event.version for event in stream] == list(range(1, 42))

    async def test_a_commit_holds_so_many_actions(self, backend: Backend) -> None:
        half = MAX_ACTIONS // 2
        full = Commit(
            [append(found(f"a{n}")) for n in range(half)],
            (),
            [Tally(RUN, 0, f"s{n}", found=1) for n in range(half)],
        )
        await applied(backend, full)
        first = found("long")
        stream = [first]
        while len(stream) <= MAX_ACTIONS:
            stream.append(following(stream[-1], events.BATCH_WRITTEN))
        for wrong in (
            Commit([append(found(f"b{n}")) for n in range(MAX_ACTIONS)], (), (Tally(RUN, 0, "s0", found=1),)),
            Commit((append(*stream),)),
        ):
            with pytest.raises(Permanent):
                await backend.commit([Commit((append(found("innocent")),)), wrong])
        assert await backend.last(["suite/b0", "suite/innocent", first.subject]) == {}

    async def test_what_cannot_be_an_append_is_refused(self, backend: Backend) -> None:
        event = found("a")
        for wrong in (
            Commit((Append("suite/b", 0, (event,)),)),
            Commit((Append(event.subject, 1, (event,)),)),
            Commit((Append(event.subject, 0, (event, event)),)),
            Commit((Append(event.subject, 0, ()),)),
            Commit((append(event), append(event))),
            Commit((append(found("a", data="x" * MAX_EVENT_BYTES)),)),
        ):
            with pytest.raises(Permanent):
                await backend.commit([wrong])
        assert await backend.last([event.subject]) == {}

    async def test_an_event_may_be_long(self, backend: Backend) -> None:
        event = found("a", data="x" * (MAX_EVENT_BYTES - 2000))
        await applied(backend, discover(event))
        delivery = await self.receive_one(backend)
        assert delivery.event == event == delivery.head

    @pytest.mark.parametrize("key", ["it's", 'a "b"', "a\\b", "ü/☃", "a%b_c", "a\nb", "[]{},", "x" * 900])
    async def test_names_from_data_are_data(self, backend: Backend, key: str) -> None:
        event = found(key)
        await applied(backend, discover(event))
        assert await backend.last([event.subject]) == {event.subject: event}
        assert await listed(backend.read(event.subject)) == [event]
        assert await index(backend, "open") == {event.subject}
        await applied(backend, settle(await self.receive_one(backend)))
        assert await index(backend, "open") == set()

    async def test_reopening_finds_everything(self, opener: Opener, clock: ManualClock) -> None:
        if not self.persistent:
            pytest.skip("nothing is kept")
        async with opener() as backend:
            everything = {f"suite/{key}" for key in "abcd"}
            await applied(backend, *(discover(found(key)) for key in "abcd"))
            held, gone = await self.receive(backend, 2)
            await applied(backend, settle(gone))
            (short,) = await self.receive(backend, 1, lease=self.LEASE)
        async with opener() as backend:
            assert set(await backend.last([*everything])) == everything
            assert len(await index(backend, "open")) == 3
            assert (await backend.tally(RUN, 0)).stages["load"] == StageTally(found=4, settled=1)
            got = {d.event.subject: d.attempt for d in await self.receive(backend)}
            await self.elapse(clock, self.LEASE)
            got |= {d.event.subject: d.attempt for d in await self.receive(backend)}
            taken = {held.event.subject, gone.event.subject, short.event.subject}
            assert got == dict.fromkeys(everything - taken, 1) | {short.event.subject: 2}


class IndexSuite(Suite):
    """Scans, indexes, tallies."""

    async def test_units_follow_the_heads(self, backend: Backend) -> None:
        first = found("a")
        await applied(backend, Commit((append(first),)))
        assert await listed(backend.units(LANE, "open")) == [first]
        head = first
        for type, where in (
            (events.ATTEMPT_STARTED, "open"),
            (events.ATTEMPT_FAILED, "open"),
            (events.UNIT_DEAD, "dead"),
            (events.UNIT_REDRIVEN, "open"),
            (events.UNIT_DEAD, "dead"),
            (events.UNIT_REDRIVEN, "open"),
            (events.UNIT_SETTLED, None),
        ):
            head = following(head, type)
            await applied(backend, Commit((append(head),)))
            for which in ("open", "dead"):
                assert await listed(backend.units(LANE, which)) == ([head] if which == where else [])

    @pytest.mark.parametrize("end", [events.UNIT_SETTLED, events.UNIT_SKIPPED, events.UNIT_SUPERSEDED])
    async def test_a_unit_that_ends_where_it_begins_is_in_no_index(self, backend: Backend, end: str) -> None:
        first, second = found("a"), found("b")
        await applied(backend, Commit((append(first, following(first, end)),)))
        await applied(backend, Commit((append(second),)), Commit((append(following(second, end)),)))
        assert await index(backend, "open") == await index(backend, "dead") == set()

    async def test_units_that_die_and_live_on_in_one_group(self, backend: Backend) -> None:
        heads = {key: found(key) for key in "abc"}
        await applied(backend, *(Commit((append(head),)) for head in heads.values()))
        types = {
            "a": (events.UNIT_DEAD, events.UNIT_REDRIVEN),
            "b": (events.UNIT_DEAD, events.UNIT_REDRIVEN, events.UNIT_DEAD),
            "c": (events.UNIT_DEAD, events.UNIT_REDRIVEN, events.UNIT_SETTLED),
        }
        for together in (True, False):
            commits: list[Commit] = []
            for key, some in types.items():
                for type in (events.UNIT_REDRIVEN, *some):
                    heads[key] = following(heads[key], type)
                    commits.append(Commit((append(heads[key]),)))
            for group in [commits] if together else [[commit] for commit in commits]:
                await applied(backend, *group)
            assert await index(backend, "open") == {"suite/a"}
            assert await index(backend, "dead") == {"suite/b"}
            assert await listed(backend.units(LANE, "dead")) == [heads["b"]]

    async def test_facts_are_in_no_index(self, backend: Backend) -> None:
        fact = found("bookmark", stage="")
        await applied(backend, Commit((append(fact),)))
        await applied(backend, Commit((append(following(fact, "bookmark.moved")),)))
        assert await index(backend, "open") == await index(backend, "dead") == set()

    async def test_a_run_is_open_until_it_is_completed(self, backend: Backend) -> None:
        run = found("run/1", run=RUN)
        closed = following(run, events.UNIT_SETTLED)
        await applied(backend, Commit((append(run),)), Commit((append(closed),)))
        assert await index(backend, "open") == {RUN}
        await applied(backend, Commit((append(following(closed, events.RUN_COMPLETED, completed=[0])),)))
        assert await index(backend, "open") == await index(backend, "dead") == set()

    async def test_the_last_runs_are_found(self, backend: Backend) -> None:
        runs = [found(f"run/{n}", run=f"{LANE}/run/{n}") for n in range(20)]
        other = found("run/1", lane="suite2", run="suite2/run/1")
        for run in (*runs, other):
            await applied(backend, discover(run))
            await applied(backend, discover(found(f"of{run.subject}", lane=run.source, run=run.run)))
        runs[17] = following(runs[17], events.UNIT_SETTLED)
        await applied(backend, Commit((append(runs[17]),)))
        assert await backend.runs(LANE, 5) == runs[-5:]
        assert await backend.runs(LANE, 100) == runs
        assert await backend.runs(LANE, 0) == []
        assert await backend.runs("suite2", 5) == [other]
        assert await backend.runs("suite3", 5) == []

    async def test_lanes_do_not_see_each_other(self, backend: Backend) -> None:
        mine, other = found("a"), found("a", lane="suite2", run="suite2/run/1")
        await applied(backend, discover(mine), discover(other))
        assert await listed(backend.units(LANE, "open")) == [mine]
        assert await listed(backend.scan(LANE)) == [mine]
        assert await listed(backend.units("suite2", "open")) == [other]
        assert await listed(backend.scan("suite3")) == []

    async def test_scan_has_every_stream_in_order(self, backend: Backend) -> None:
        streams: dict[str, list[Event]] = {}
        for n in range(700):
            first = found(f"u{n:03}", run=f"suite/run/{n % 2}")
            streams[first.subject] = [first, following(first, events.ATTEMPT_STARTED)]
        everything = list(streams.values())
        for at in range(0, len(everything), 50):
            await applied(backend, *(Commit((append(s[0]),)) for s in everything[at : at + 50]))
        for at in range(0, len(everything), 50):
            await applied(backend, *(Commit((append(s[1]),)) for s in everything[at : at + 50]))
        for run in (None, "suite/run/1"):
            seen: dict[str, list[Event]] = {}
            async for event in backend.scan(LANE, run=run):
                seen.setdefault(event.subject, []).append(event)
            assert seen == {s: both for s, both in streams.items() if run is None or both[0].run == run}
        assert await index(backend, "open") == set(streams)

    async def test_tallies_add_up(self, backend: Backend) -> None:
        counts = Counts(1, 2, 3, 4, 5, 6, 7)

        async def add(n: int) -> None:
            await applied(
                backend,
                Commit((append(found(f"u{n}")),), (), (Tally(RUN, 0, "load", found=2, counts=counts),)),
                Commit((), (), (Tally(RUN, 0, "load", settled=1, dead=1), Tally(RUN, 1, "load", redriven=1))),
                Commit((), (), (Tally(RUN, 0, "copy", settled=1, skipped=1, superseded=1),)),
            )

        await within(LONG_PATIENCE, asyncio.gather(*(add(n) for n in range(40))))
        total = await backend.tally(RUN, 0)
        assert total.stages["load"] == StageTally(80, 40, 40, counts=Counts(40, 80, 120, 160, 200, 240, 280))
        assert total.stages["copy"] == StageTally(settled=40, skipped=40, superseded=40)
        assert not total.closed
        assert (await backend.tally(RUN, 1)).stages == {"load": StageTally(redriven=40)}
        assert await backend.tally("suite/run/none", 0) == RunTally()

    async def test_a_commit_tells_of_completeness_only_when_it_is_true(self, backend: Backend) -> None:
        key = (RUN, 0)

        async def count(*tallies: Tally) -> RunTally | None:
            (answer,) = await applied(backend, Commit((), (), tallies))
            now = await backend.tally(RUN, 0)
            if answer.tally is None:  # the backend does not say
                return now if now.complete else None
            told = answer.tally.get(key)
            assert (told is not None) == now.complete
            assert told is None or told == now
            return told

        assert await count(Tally(RUN, 0, "load", found=2)) is None
        assert await count(Tally(RUN, 0, "load", settled=2)) is None
        assert await count(Tally(RUN, 0, "load", found=1, closed=True)) is None
        complete = await count(Tally(RUN, 0, "load", settled=1, dead=1))
        assert complete == RunTally(True, {"load": StageTally(3, 3, 1)})
        (other,) = await applied(backend, Commit((), (), (Tally(RUN, 1, "load", found=1),)))
        assert not other.tally

    async def test_an_empty_run_is_complete_when_it_is_closed(self, backend: Backend) -> None:
        await applied(backend, Commit((), (), (Tally(RUN, 0, "find", closed=True),)))
        assert (await backend.tally(RUN, 0)).complete

    async def test_somebody_sees_that_the_last_one_settled(self, backend: Backend) -> None:
        await applied(backend, Commit((), (), (Tally(RUN, 0, "load", found=30, closed=True),)))
        seen: list[bool] = []

        async def settle_one() -> None:
            (answer,) = await applied(backend, Commit((), (), (Tally(RUN, 0, "load", settled=1),)))
            complete = (await backend.tally(RUN, 0)).complete if answer.tally is None else bool(answer.tally)
            seen.append(complete)

        await within(LONG_PATIENCE, asyncio.gather(*(settle_one() for _ in range(30))))
        assert any(seen)


class QueueSuite(Suite):
    """Deliveries, leases, delays."""

    async def test_a_delivery_carries_its_event_and_the_head(self, backend: Backend) -> None:
        event = found("a")
        await applied(backend, discover(event))
        delivery = await self.receive_one(backend)
        assert isinstance(delivery, Delivery)
        assert (delivery.event, delivery.stage, delivery.attempt, delivery.head) == (event, "load", 1, event)
        assert await self.receive(backend) == []

    async def test_the_head_is_that_of_the_receive(self, backend: Backend) -> None:
        event = found("a")
        later = following(event, events.BATCH_WRITTEN)
        await applied(backend, discover(event))
        await applied(backend, Commit((append(later),)))
        delivery = await self.receive_one(backend)
        assert (delivery.event, delivery.head) == (event, later)

    async def test_an_event_that_stands_in_the_log_may_be_published(self, backend: Backend) -> None:
        event = found("a")
        later = following(event, events.ATTEMPT_FAILED)
        await applied(backend, Commit((append(event),)))
        await applied(backend, Commit((append(later),), (Publish(event, "load"),)))
        delivery = await self.receive_one(backend)
        assert (delivery.event, delivery.head) == (event, later)

    async def test_stages_get_their_own(self, backend: Backend) -> None:
        await applied(
            backend, *(discover(found(f"{s}{n}", stage=s)) for s in ("x", "y", "z") for n in range(2))
        )
        got = await self.receive(backend, stages=("x", "z"))
        assert {(d.stage, d.event.subject) for d in got} == {
            (s, f"suite/{s}{n}") for s in "xz" for n in range(2)
        }
        assert {d.event.subject for d in await self.receive(backend, stages=("y",))} == {
            "suite/y0",
            "suite/y1",
        }

    async def test_no_stage_starves(self, backend: Backend) -> None:
        await applied(backend, *(discover(found(f"x{n}", stage="x")) for n in range(20)))
        await applied(backend, discover(found("y", stage="y")))
        got = [await self.receive(backend, 1, ("x", "y")) for _ in range(4)]
        assert "y" in {d.stage for some in got for d in some}

    async def test_at_most_limit(self, backend: Backend) -> None:
        await applied(backend, *(discover(found(f"u{n}")) for n in range(5)))
        sizes = [len(await self.receive(backend, limit)) for limit in (2, 0, 2, 9)]
        assert sizes[1] == 0
        assert max(sizes[0], sizes[2]) <= 2
        assert sum(sizes) == 5

    async def test_what_is_acked_is_gone(self, backend: Backend, clock: ManualClock) -> None:
        await applied(backend, discover(found("a")), discover(found("b")))
        one, two = await self.receive(backend, lease=self.LEASE)
        await one.ack()
        await one.ack()
        await applied(backend, settle(two))
        await self.elapse(clock, self.LEASE * 2)
        assert await self.receive(backend) == []

    async def test_a_lease_ends(self, backend: Backend, clock: ManualClock) -> None:
        event = found("a")
        await applied(backend, discover(event))
        await self.receive_one(backend, lease=self.LEASE)
        started = following(event, events.ATTEMPT_STARTED)
        await applied(backend, Commit((append(started),)))
        await self.elapse(clock, self.LEASE)
        again = await self.receive_one(backend)
        assert (again.event, again.attempt, again.head) == (event, 2, started)

    async def test_a_stale_delivery_changes_nothing(self, backend: Backend, clock: ManualClock) -> None:
        await applied(backend, discover(found("a")))
        stale = await self.receive_one(backend, lease=self.LEASE)
        await self.elapse(clock, self.LEASE)
        fresh = await self.receive_one(backend)
        await stale.ack()
        await stale.nack()
        assert await stale.extend(1) is False
        assert await self.receive(backend) == []
        assert await fresh.extend(self.LEASE) is True
        head = stale.head
        assert head is not None
        await applied(backend, Commit((append(following(head)),), ack=stale))  # the commit stands
        await self.elapse(clock, self.LEASE)
        assert (await self.receive_one(backend)).attempt == 3

    async def test_a_lease_that_has_ended_is_lost_at_once(self, backend: Backend, clock: ManualClock) -> None:
        if not self.exact_leases:
            pytest.skip("a late ack may still count")
        await applied(backend, *(discover(found(key)) for key in "abcd"))
        acked, nacked, extended, committed = await self.receive(backend, lease=self.LEASE)
        await self.elapse(clock, self.LEASE)
        await acked.ack()
        await nacked.nack(delay=self.LEASE)
        assert await extended.extend(self.LEASE) is False
        await applied(backend, Commit((), ack=committed))
        assert len(await self.receive(backend)) == 4

    async def test_a_stale_ack_hits_no_later_message(self, backend: Backend, clock: ManualClock) -> None:
        await applied(backend, discover(found("a")))
        stale = await self.receive_one(backend)
        await stale.ack()
        await applied(backend, discover(found("b")))  # may get the place of the other
        await self.receive_one(backend, lease=self.LEASE)
        await stale.ack()
        await stale.nack()
        await self.elapse(clock, self.LEASE)
        assert (await self.receive_one(backend)).event.subject == "suite/b"

    async def test_nack_delivers_again(self, backend: Backend, clock: ManualClock) -> None:
        await applied(backend, discover(found("a")), discover(found("b")))
        for delivery in await self.receive(backend):
            await delivery.nack()
        again = {delivery.event.subject: delivery for delivery in await self.receive(backend)}
        assert {name: delivery.attempt for name, delivery in again.items()} == {"suite/a": 2, "suite/b": 2}
        await again["suite/b"].nack(delay=KEPT)
        assert await self.receive(backend) == []
        await again["suite/a"].nack(delay=self.LEASE)
        await self.elapse(clock, self.LEASE)
        third = await self.receive_one(backend)
        assert (third.event.subject, third.attempt) == ("suite/a", 3)

    async def test_extend_moves_the_end_of_the_lease(self, backend: Backend, clock: ManualClock) -> None:
        await applied(backend, discover(found("a")))
        delivery = await self.receive_one(backend, lease=3 * self.LEASE)
        for _ in range(3):
            assert await delivery.extend(KEPT) is True
            await self.elapse(clock, self.LEASE)
            assert await self.receive(backend) == []
        assert await delivery.extend(self.LEASE) is True, (
            "it ends so long after each time, not after the last"
        )
        await self.elapse(clock, self.LEASE)
        assert (await self.receive_one(backend)).attempt == 2
        assert await delivery.extend(self.LEASE) is False

    async def test_a_delay_is_kept(self, backend: Backend, clock: ManualClock) -> None:
        await applied(backend, discover(found("late"), delay=KEPT), discover(found("now")))
        assert (await self.receive_one(backend)).event.subject == "suite/now"
        await applied(backend, discover(found("later"), delay=self.LEASE))
        await self.elapse(clock, self.LEASE)
        assert (await self.receive_one(backend)).event.subject == "suite/later"

    @pytest.mark.parametrize("steps", [(-3600,), (3600, -3600), (-3600, -3600), (1e8,), (-1.5,)])
    async def test_a_clock_that_is_set_holds_up_nothing(
        self, backend: Backend, clock: ManualClock, steps: Sequence[float]
    ) -> None:
        await applied(backend, discover(found("held")))
        await self.receive_one(backend, lease=self.LEASE)
        for step in steps:
            clock.set(step / 2)
            await applied(backend, Commit((append(found(f"between{step}{clock.now()}")),)))
            clock.set(step / 2)
        at = clock.now()
        await applied(backend, discover(found("now")), discover(found("later"), delay=self.LEASE))
        clock.set(-3600)
        await self.elapse(clock, 2)
        first = {d.event.subject: d for d in await self.receive(backend, lease=self.LEASE)}
        assert "suite/now" in first, f"it was due at once, at {at}"
        await self.elapse(clock, self.LEASE)
        rest = {d.event.subject for d in await self.receive(backend)}
        assert {"suite/held", "suite/later"} <= rest | set(first)

    async def test_many_bytes_are_received_in_portions(self, backend: Backend, clock: ManualClock) -> None:
        large = [found(f"u{n}", data="x" * 200_000) for n in range(30)]
        for event in large:
            await applied(backend, discover(event), discover(found(f"small{event.subject}", stage="copy")))
        wanted = {(event.subject, "load") for event in large}
        wanted |= {(f"suite/small{event.subject}", "copy") for event in large}
        got: list[tuple[str, str]] = []
        for _ in range(len(wanted)):
            some = await self.receive(backend, 100, ("load", "copy"))
            if not some:
                break
            assert all(delivery.head == delivery.event for delivery in some)
            got += ((delivery.event.subject, delivery.stage) for delivery in some)
        assert len(got) == len(wanted)
        assert set(got) == wanted

    async def test_a_commit_that_acks_what_is_not_of_this_backend_is_whole_or_not_there(
        self, backend: Backend
    ) -> None:
        class Foreign:
            event = head = found("foreign")
            stage, attempt = "load", 1

            async def ack(self) -> None: ...
            async def nack(self, *, delay: float = 0) -> None: ...
            async def extend(self, seconds: float) -> bool:
                return False

        first, second = found("a"), found("b")
        works = [discover(first), msgspec.structs.replace(discover(second), ack=Foreign())]
        try:
            await backend.commit(works)
        except Exception:  # noqa: BLE001 - which one is not promised
            refused = True
        else:
            refused = False
        there = set(await backend.last([first.subject, second.subject]))
        assert there == (set() if refused else {first.subject, second.subject})
        assert {d.event.subject for d in await self.receive(backend)} == there
        tally = (await backend.tally(RUN, 0)).stages
        assert (tally["load"].found if tally else 0) == len(there)

    async def test_a_reminder_of_a_queued_unit_is_dropped(self, backend: Backend, clock: ManualClock) -> None:
        if not backend.exact_queue:
            pytest.skip("a queue that cannot know sends it: deliveries may repeat anyway")
        event = found("a")
        reminder = Commit((), (Publish(event, "load", repeat=True),))
        await applied(backend, discover(event), reminder)
        delivery = await self.receive_one(backend)
        await applied(backend, reminder)
        assert await self.receive(backend) == []
        await delivery.nack(delay=self.LEASE)
        await applied(backend, reminder)
        assert await self.receive(backend) == []
        await self.elapse(clock, self.LEASE)
        assert (await self.receive_one(backend)).attempt == 2

    async def test_a_reminder_of_a_lost_message_is_sent(self, backend: Backend) -> None:
        event = found("a")
        reminder = Commit((), (Publish(event, "load", repeat=True),))
        await applied(backend, Commit((append(event),)))
        await applied(backend, reminder)
        delivery = await self.receive_one(backend)
        assert delivery.event == event
        # A commit that acks the unit's delivery may publish it anew.
        await applied(backend, Commit((), reminder.publish, ack=delivery))
        assert (await self.receive_one(backend)).attempt == 1

    async def test_purge_leaves_the_log(self, backend: Backend, clock: ManualClock) -> None:
        event = found("a")
        await applied(backend, discover(event), discover(found("b")), discover(found("c"), delay=1))
        (held,) = await self.receive(backend, 1, lease=self.LEASE)
        await backend.purge()
        await self.elapse(clock, self.LEASE * 2)
        assert await self.receive(backend) == []
        await held.ack()
        await held.nack()
        assert await held.extend(1) is False
        assert len(await backend.last(["suite/a", "suite/b", "suite/c"])) == 3
        assert await index(backend, "open") == {"suite/a", "suite/b", "suite/c"}
        assert (await backend.tally(RUN, 0)).stages["load"].found == 3
        await applied(backend, Commit((), (Publish(event, "load", repeat=True),)))
        assert (await self.receive_one(backend)).event == event

    async def test_waiting_ends_when_something_comes(self, backend: Backend) -> None:
        waiting = asyncio.create_task(
            within(PATIENCE, backend.receive(["load"], 9, lease=KEPT, wait=2 * PATIENCE))
        )
        other = asyncio.create_task(
            within(PATIENCE, backend.receive(["copy"], 9, lease=KEPT, wait=2 * PATIENCE))
        )
        await asyncio.sleep(0)
        await applied(backend, discover(found("a")))
        assert [d.event.subject for d in await waiting] == ["suite/a"]
        await applied(backend, discover(found("b", stage="copy")))
        (delivery,) = await other
        waiting = asyncio.create_task(
            within(PATIENCE, backend.receive(["copy"], 9, lease=KEPT, wait=2 * PATIENCE))
        )
        await asyncio.sleep(0)
        await delivery.nack()
        assert [d.attempt for d in await waiting] == [2]

    async def test_waiting_ends_empty(self, backend: Backend) -> None:
        assert await within(PATIENCE, backend.receive(["load"], 9, lease=KEPT, wait=0.01)) == []

    async def test_who_is_cancelled_takes_nothing_along(self, backend: Backend) -> None:
        for n in range(self.CUTS):
            task = asyncio.create_task(backend.receive(["load"], 9, lease=self.LEASE, wait=60))
            for _ in range(n % 5):
                await asyncio.sleep(0)
            publishing = asyncio.create_task(applied(backend, discover(found(f"u{n}"))))
            for _ in range(n % 7):
                await asyncio.sleep(0)
            task.cancel()
            await publishing
            (first,) = await asyncio.gather(task, return_exceptions=True)
            got = (
                first
                if isinstance(first, Sequence)
                else await backend.receive(["load"], 9, lease=KEPT, wait=PATIENCE)
            )
            assert [d.event.subject for d in got] == [f"suite/u{n}"]
            await got[0].ack()

    async def test_a_cancelled_commit_is_whole_or_not_there(self, backend: Backend) -> None:
        for n in range(self.CUTS):
            task = asyncio.create_task(applied(backend, discover(found(f"u{n}"))))
            for _ in range(n % 4):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await applied(backend, discover(found("end")))
        there = {event.subject for event in await listed(backend.scan(LANE))}
        assert (await backend.tally(RUN, 0)).stages["load"].found == len(there)
        assert {d.event.subject for d in await self.receive(backend, 100)} == there
        assert "suite/end" in there

    async def test_many_workers_settle_each_unit_once(self, backend: Backend) -> None:
        total = 400
        for at in range(0, total, 50):
            await applied(backend, *(discover(found(f"u{n}")) for n in range(at, at + 50)))
        await applied(backend, Commit((), (), (Tally(RUN, 0, "load", closed=True),)))

        async def work(size: int) -> int:
            settled = 0
            while not (await backend.tally(RUN, 0)).complete:
                some = await backend.receive(["load"], size, lease=600, wait=0.01)
                answers = await backend.commit([settle(delivery) for delivery in some])
                settled += sum(isinstance(answer, Committed) for answer in answers)
            return settled

        assert sum(await within(LONG_PATIENCE, asyncio.gather(*(work(n + 1) for n in range(8))))) == total
        assert (await backend.tally(RUN, 0)).stages["load"] == StageTally(total, total)
        assert await index(backend, "open") == set()
        assert await self.receive(backend) == []


class OrderSuite(Suite):
    """Groups: one after the other within each, beside each other otherwise."""

    async def put(self, backend: Backend, *names: str) -> None:
        """Register and publish units in this order; the letter that a name begins with is its group."""
        for name in names:
            await applied(backend, discover(found(name, stage=ORDERED), group=name[0]))

    async def due(self, backend: Backend, limit: int = 10, *, lease: float = KEPT) -> dict[str, Delivery]:
        """All that is handed out now, by the names of the units; `limit` at a time."""
        got: dict[str, Delivery] = {}
        while some := await self.receive(backend, limit, (ORDERED,), lease=lease):
            for delivery in some:
                name = delivery.event.subject.removeprefix(f"{LANE}/")
                assert name not in got, "it is leased"
                got[name] = delivery
        return got

    @pytest.mark.parametrize("limit", [1, 10])
    async def test_a_group_comes_one_by_one_and_in_order(self, backend: Backend, limit: int) -> None:
        names = [f"a{n}" for n in range(5)]
        await self.put(backend, *names)
        for n, name in enumerate(names):
            got = await self.due(backend, limit)
            assert list(got) == [name]
            if n % 2:
                await got[name].ack()
            else:
                await applied(backend, settle(got[name]))
        assert await self.due(backend) == {}

    async def test_the_order_within_a_commit_and_a_group_of_commits_is_kept(self, backend: Backend) -> None:
        first, *rest = [found(f"a{n}", stage=ORDERED) for n in range(6)]
        chunk = Commit(
            [append(event) for event in (first, *rest[:2])],
            [Publish(event, ORDERED, group="a") for event in (first, *rest[:2])],
        )
        await applied(backend, chunk, *(discover(event, group="a") for event in rest[2:]))
        for event in (first, *rest):
            ((name, delivery),) = (await self.due(backend)).items()
            assert f"{LANE}/{name}" == event.subject
            await delivery.ack()

    async def test_groups_do_not_wait_for_each_other(self, backend: Backend) -> None:
        await self.put(backend, "a1", "a2", "b1", "a3", "b2", "c1")
        first = await self.due(backend)
        assert set(first) == {"a1", "b1", "c1"}
        await first["b1"].ack()
        await first["c1"].ack()
        assert set(await self.due(backend)) == {"b2"}

    async def test_a_group_that_was_empty_begins_anew(self, backend: Backend) -> None:
        for name in ("a1", "a2"):
            await self.put(backend, name)
            got = await self.due(backend)
            assert set(got) == {name}
            await got[name].ack()
        assert await self.due(backend) == {}

    async def test_what_is_given_back_stays_the_first_of_its_group(
        self, backend: Backend, clock: ManualClock
    ) -> None:
        await self.put(backend, "a1", "a2", "b1", "c1", "c2")
        first = await self.due(backend)
        for name in ("a1", "c1"):
            await first[name].nack()
        again = await self.due(backend)
        assert {name: delivery.attempt for name, delivery in again.items()} == {"a1": 2, "c1": 2}
        await again["a1"].nack(delay=KEPT)
        await first["b1"].ack()
        assert await self.due(backend) == {}, "a2 has to wait for the delay of a1"
        await again["c1"].nack(delay=self.LEASE)
        await self.elapse(clock, self.LEASE)
        late = await self.due(backend)
        assert set(late) == {"c1"}
        await late["c1"].ack()
        assert set(await self.due(backend)) == {"c2"}

    async def test_a_lease_that_ends_leaves_the_first_of_its_group(
        self, backend: Backend, clock: ManualClock
    ) -> None:
        await self.put(backend, "a1", "a2")
        stale = await self.receive_one(backend, ORDERED, lease=self.LEASE)
        assert stale.event.subject == f"{LANE}/a1"
        await self.elapse(clock, self.LEASE)
        fresh = await self.due(backend)
        assert {name: delivery.attempt for name, delivery in fresh.items()} == {"a1": 2}
        if self.exact_leases:
            await stale.ack()
            assert await self.due(backend) == {}, "a stale ack is nobody's turn"
        assert await fresh["a1"].extend(self.LEASE) is True
        await fresh["a1"].ack()
        assert set(await self.due(backend)) == {"a2"}

    @pytest.mark.parametrize("step", [-3600, 3600])
    async def test_a_clock_that_is_set_holds_up_no_group(
        self, backend: Backend, clock: ManualClock, step: float
    ) -> None:
        if not backend.exact_queue:
            pytest.skip("a queue outside has a clock of its own")
        await self.put(backend, "a1", "a2", "a3")
        assert set(await self.due(backend, lease=self.LEASE)) == {"a1"}
        clock.set(step)
        assert not {"a2", "a3"} & set(await self.due(backend, lease=self.LEASE))
        for name in ("a1", "a2", "a3"):
            await self.elapse(clock, self.LEASE)
            held = await self.due(backend, lease=self.LEASE)
            assert set(held) == {name}
            await held[name].ack()

    async def test_an_ack_in_a_commit_in_conflict_is_nobody_s_turn(self, backend: Backend) -> None:
        await self.put(backend, "a1", "a2")
        delivery = (await self.due(backend))["a1"]
        head = delivery.head
        assert head is not None
        await applied(backend, Commit((append(following(head)),)))
        assert isinstance((await backend.commit([settle(delivery)]))[0], VersionConflict)
        assert await self.due(backend) == {}

    async def test_a_reminder_keeps_its_place(self, backend: Backend) -> None:
        if not backend.exact_queue:
            pytest.skip("a queue that cannot know sends it, behind its group")
        await self.put(backend, "a1", "a2")
        event = (await backend.last([f"{LANE}/a1"]))[f"{LANE}/a1"]
        await applied(backend, Commit((), (Publish(event, ORDERED, repeat=True, group="a"),)))
        for name in ("a1", "a2"):
            got = await self.due(backend)
            assert set(got) == {name}
            await got[name].ack()
        assert await self.due(backend) == {}

    async def test_a_group_whose_messages_were_lost_goes_on(self, backend: Backend) -> None:
        await self.put(backend, "a1", "a2", "a3")
        gone = (await self.due(backend))["a1"]
        await backend.purge()
        await self.put(backend, "a4")
        await gone.ack()
        await gone.nack()
        for name in ("a2", "a3"):
            event = (await backend.last([f"{LANE}/{name}"]))[f"{LANE}/{name}"]
            await applied(backend, Commit((), (Publish(event, ORDERED, repeat=True, group="a"),)))
        for name in ("a4", "a2", "a3"):
            got = await self.due(backend)
            assert set(got) == {name}
            await got[name].ack()

    async def test_an_ack_wakes_who_waits_for_the_next(self, backend: Backend) -> None:
        await self.put(backend, "a1", "a2", "a3")
        delivery = (await self.due(backend))["a1"]
        for n, name in enumerate(("a2", "a3")):
            waiting = asyncio.create_task(
                within(PATIENCE, backend.receive([ORDERED], 9, lease=KEPT, wait=2 * PATIENCE))
            )
            await asyncio.sleep(0)
            if n:
                await delivery.ack()
            else:
                await applied(backend, settle(delivery))
            (delivery,) = await waiting
            assert delivery.event.subject == f"{LANE}/{name}"

    async def work_off(self, backends: Sequence[Backend]) -> None:
        """Many workers on `backends` settle many units of a few groups: the order of each group is kept."""
        groups, each = "abcdefg", 12
        await self.put(backends[0], *(f"{group}{n}" for n in range(each) for group in groups))
        done: dict[str, list[int]] = {group: [] for group in groups}

        async def work(backend: Backend, size: int) -> None:
            while sum(map(len, done.values())) < each * len(groups):
                for delivery in await backend.receive([ORDERED], size, lease=600, wait=0.01):
                    name = delivery.event.subject.removeprefix(f"{LANE}/")
                    done[name[0]].append(int(name[1:]))
                    await asyncio.sleep(0)
                    await applied(backend, settle(delivery))

        workers = [work(backend, n + 1) for n in range(4) for backend in backends]
        await within(LONG_PATIENCE, asyncio.gather(*workers))
        assert done == {group: list(range(each)) for group in groups}

    async def test_many_workers_keep_the_order_of_each_group(self, backend: Backend) -> None:
        await self.work_off([backend])

    async def test_all_that_open_it_keep_the_order_of_each_group(self, opener: Opener) -> None:
        if not self.persistent:
            pytest.skip("each opens its own")
        async with opener() as one, opener() as two:
            await self.work_off([one, two])


class BackendSuite(LogSuite, IndexSuite, QueueSuite, OrderSuite):
    """All of it, and the comparison with a model; channels have a suite of their own, ``channel_suite``."""

    @pytest.mark.parametrize("examples", [50])
    def test_it_does_what_the_model_does(self, storage: Storage, clock: ManualClock, examples: int) -> None:
        check_against_model(storage, clock, examples)
