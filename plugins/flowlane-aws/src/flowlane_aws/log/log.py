"""The log on DynamoDB: streams, indexes, counters, and what is owed to queues.

What commits have to leave atomic is in ``commits``; what may follow later is here: an index mark is changed
after the event that calls for it, so whoever lists an index looks at each stream's head, and mends what a
crash has left behind.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Final

from flowlane import events, state
from flowlane.backends.common import checked
from flowlane.clock import Clock
from flowlane.errors import FlowlaneError
from flowlane.events import Event
from flowlane.ports import Commit, Committed, Index, Patience, Publish
from flowlane.state import RunTally
from flowlane_aws.bounded import all_of, each
from flowlane_aws.log import items
from flowlane_aws.log.commits import Committing, Draft, draft, due, waves
from flowlane_aws.log.items import Item, text
from flowlane_aws.log.known import Known
from flowlane_aws.log.scan import Order
from flowlane_aws.log.table import GETS, Table, in_portions
from flowlane_aws.log.tallies import Tallies

logger = logging.getLogger("flowlane")

#: Streams whose heads are looked at together while an index is listed: two keys each of one request.
_TOGETHER: Final = GETS // 2
#: Seconds after which the sweep looks at a stream again, at the latest.
_LONGEST_LOOK: Final = 3600.0
_LONGEST_LOOK_AT_RUNS: Final = 300.0
#: Two clocks differ by less than this: of a run's events none is stamped so long before its first one.
_SKEW: Final = timedelta(hours=1)


class Log:
    """See the log's half of ``ports.Backend``; for many tasks and processes at once."""

    def __init__(self, table: Table, clock: Clock) -> None:
        self._table = table
        self._clock = clock
        self._known = Known()
        self._stamps = items.Stamps(clock)
        self._committing = Committing(table, clock, self._known)
        self._tallies = Tallies(table)

    # ----------------------------------------------------------------- committing

    async def append(self, work: Sequence[Commit]) -> Sequence[Draft]:
        """Apply each commit, or find out why not: a draft for each, with its answer. Nothing that may follow
        later has been done.

        Raises:
            Permanent: one of them cannot be applied as it is; none was.
        """
        now = self._clock.now().timestamp()
        drafts = [draft(commit, self._stamps, now) for commit in checked(work)]
        await self._mark_ahead(drafts)
        for wave in waves(drafts):
            await self._committing.apply(wave)
            for one in wave:
                if isinstance(one.answer, Committed):
                    one.moved = [
                        a.events[-1] for a in one.commit.appends if self._moves(a.expected, a.events[-1])
                    ]
                    for append in one.commit.appends:
                        self._known.note(append.events[-1])
        return drafts

    def _moves(self, expected: int, head: Event) -> bool:
        """Whether the stream may be in another index with `head` as its last event; a first event has been
        put where it belongs."""
        if expected == 0 or head.type == events.RUN_REDRIVEN:
            return False
        return self._known.where(head.subject, expected) != items.waiting(head)

    async def _mark_ahead(self, drafts: Sequence[Draft]) -> None:
        """A run that has ended is in no index. One that is redriven is put into its own before: a mark that a
        crash keeps from being made is found by nobody, while one too many is looked at in vain."""
        heads = [append.events[-1] for one in drafts for append in one.commit.appends]
        await all_of([partial(self._mark, head) for head in heads if head.type == events.RUN_REDRIVEN])

    async def mark(self, drafts: Sequence[Draft]) -> None:
        """The streams that the commits moved from one index to another are marked so.

        Raises:
            FlowlaneError: some may not be; ``units`` will mend that.
        """
        moved = {head.subject: head for one in drafts for head in one.moved}  # of each stream the last one
        ended = [items.key(name, 1) for name, head in moved.items() if items.gone_for_good(head)]
        changes = [partial(self._mark, head) for head in moved.values() if not items.gone_for_good(head)]
        if ended:
            changes.append(partial(self._table.remove, "waiting", ended))
        await all_of(changes)

    async def _mark(self, head: Event) -> None:
        """Mark the stream of `head`, unless it has been for a later head."""
        names = {"#w": "waiting", "#a": "waiting_as"}
        values = {":a": {"N": str(head.version)}}
        change = "SET #a = :a REMOVE #w"
        if where := items.waiting(head):
            change = "SET #a = :a, #w = :w, #l = :l"
            names["#l"] = "look"
            values |= {":w": text(where), ":l": text(items.first_look(head, self._clock.now().timestamp()))}
        condition = "attribute_exists(pk) AND (attribute_not_exists(#a) OR #a < :a)"
        await self._table.update(items.key(head.subject, 1), change, condition, names, values)

    async def completed(self, drafts: Sequence[Draft]) -> Mapping[tuple[str, int], RunTally | None]:
        """Of each (run, round) that an applied commit may have been the last of: its counters if it is
        complete, ``None`` if not. One look for all that `drafts` counted in it.

        Raises:
            FlowlaneError: it is not known.
        """
        rounds = {
            (tally.run, tally.round): None
            for one in drafts
            for tally in one.commit.tally
            if tally.settled or tally.closed
        }
        looks = await all_of([partial(self._tallies.complete, *key) for key in rounds])
        return dict(zip(rounds, looks, strict=True))

    async def tally(self, run: str, round: int) -> RunTally:
        """See ``Backend.tally``."""
        return await self._tallies.read(run, round)

    # ----------------------------------------------------------------- what is owed to queues

    async def clear(self, sent: Sequence[Publish]) -> None:
        """The queues have `sent`: the events no longer say that they are owed.

        Raises:
            FlowlaneError: some may still say so; then they are sent again.
        """
        keys = {(each_.event.subject, each_.event.version): None for each_ in sent}
        if keys:
            await self._table.remove("unsent", [items.key(*key) for key in keys])

    async def owe(self, unsent: Sequence[Publish]) -> None:
        """Events that stand in the log say that they are owed to the queues of `unsent`, and from when on.

        Raises:
            FlowlaneError: some do not.
        """
        now = self._clock.now().timestamp()
        by_event: dict[tuple[str, int], list[Publish]] = {}
        for publish in unsent:
            by_event.setdefault((publish.event.subject, publish.event.version), []).append(publish)
        await all_of([partial(self._owe, some, now) for some in by_event.values()])

    async def _owe(self, owed: Sequence[Publish], now: float) -> None:
        event = owed[0].event
        marks = items.owing(event, min(due(publish, now) for publish in owed), self._stamps(), owed)
        await self._table.update(
            items.key(event.subject, event.version),
            "SET " + ", ".join(f"#{name} = :{name}" for name in marks),
            "attribute_exists(pk)",
            {f"#{name}": name for name in marks},
            {f":{name}": value for name, value in marks.items()},
        )

    async def owed(self, lane: str) -> AsyncIterator[Sequence[Publish]]:
        """What the queues are owed of `lane` and may be sent by now, in portions, in the order in which it
        came to be owed: of a group that is the order of its commits."""
        now = items.milliseconds(self._clock.now().timestamp())
        keys: list[Item] = []
        async for item in self._table.merged("unsent", items.shards(lane), ("<=", f"{now}~")):
            keys.append(_key(item))
            if len(keys) == GETS:
                yield await self._owed_at(keys)
                keys = []
        if keys:
            yield await self._owed_at(keys)

    async def _owed_at(self, keys: Sequence[Item]) -> Sequence[Publish]:
        # The index may lag: the item says whether it is owed still.
        there = await self._table.get(keys)
        return [publish for key in keys for publish in items.owed_by(there.get(_texts(key), {}))]

    # ----------------------------------------------------------------- reading

    async def last(self, streams: Sequence[str]) -> Mapping[str, Event]:
        """See ``Backend.last``: one consistent query for each stream."""
        found = await all_of([partial(self._table.newest, stream) for stream in dict.fromkeys(streams)])
        heads: dict[str, Event] = {}
        for item in found:
            if item is not None:
                event = items.event_of(item)
                self._known.note(event)
                heads[event.subject] = event
        return heads

    async def heads(self, received: Sequence[Event]) -> Mapping[str, Event]:
        """The last events of the streams of `received`, for those that stand in the log.

        Nearly always they are their streams' last ones, which one request for many of them shows: each is
        there, and the version after it is not.
        """
        latest: dict[str, Event] = {}
        for event in received:
            if event.subject not in latest or latest[event.subject].version < event.version:
                latest[event.subject] = event
        keys = [items.key(e.subject, e.version + n) for e in latest.values() for n in (0, 1)]
        there = await self._table.get(keys)
        heads: dict[str, Event] = {}
        moved: list[str] = []
        for stream, event in latest.items():
            own, following = (items.key(stream, event.version + n) for n in (0, 1))
            item = there.get(_texts(own))
            if item is None or _texts(following) in there:
                moved.append(stream)  # on; or its delivery is of another log
            else:
                heads[stream] = items.event_of(item)
                self._known.note(heads[stream])
        return {**heads, **await self.last(moved)} if moved else heads

    async def event(self, stream: str, version: int) -> Event | None:
        """The event in that place of the log, if there is one."""
        there = await self._table.get([items.key(stream, version)])
        return next((items.event_of(item) for item in there.values()), None)

    async def read(self, stream: str, *, after: int = 0) -> AsyncIterator[Event]:
        """See ``Backend.read``."""
        async for page in self._table.query(stream, (">", items.key(stream, after)["sk"]["S"])):
            for item in page:
                yield items.event_of(item)

    async def scan(self, lane: str, *, run: str | None = None) -> AsyncIterator[Event]:
        """See ``Backend.scan``: shard by shard, each in about the order of its commits."""
        since = await self._beginning(run) if run else "0"
        order = Order()
        async for page in self._table.listing("lane", items.shards(lane), (">=", since)):
            keys = [_key(item) for item in page if run is None or item.get("run") == text(run)]
            for some in in_portions(keys, GETS):
                there = await self._table.get(some)
                for key in some:
                    for event in order.next(items.event_of(there[_texts(key)])):
                        yield event
        for event in order.rest():
            yield event

    async def _beginning(self, run: str) -> str:
        """Before which stamp no event of `run` is, as far as that is known."""
        item = (await self._table.get([items.key(run, 1)])).get((run, f"{1:012d}"))
        if item is None:
            return "0"
        began = datetime.fromisoformat(item["stamp"]["S"].partition("Z")[0])
        return (began - _SKEW).isoformat(timespec="microseconds")

    async def units(self, lane: str, index: Index, patience: Patience | None = None) -> AsyncIterator[Event]:
        """See ``Backend.units``. Marks that do not fit their stream's head any more are mended on the way."""
        partitions = items.waiting_in(lane, index)
        now = self._clock.now().timestamp()
        sort = ("<=", items.milliseconds(now)) if patience else ("", "")
        async for page in self._table.listing("waiting", partitions, sort):
            for some in in_portions([_key(item) for item in page], _TOGETHER):
                marks, heads = await self._marked(some, partitions)
                await self._mend([head for head in heads.values() if state.index(head) != index])
                heads = {stream: head for stream, head in heads.items() if state.index(head) == index}
                if patience is not None:
                    heads = await self._claimed(marks, heads, patience, now)
                for head in heads.values():
                    yield head

    async def _marked(
        self, keys: Sequence[Item], partitions: Sequence[str]
    ) -> tuple[Mapping[str, Item], Mapping[str, Event]]:
        """Of the streams that the index lists in `partitions`, and that are marked so still (the index may
        lag): the first items, which have the marks, and the heads."""
        streams = [key["pk"]["S"] for key in keys]
        there = await self._table.get([items.key(stream, n) for stream in streams for n in (1, 2)])
        firsts = {stream: there.get(_texts(items.key(stream, 1)), {}) for stream in streams}
        marks = {
            s: dict(item) for s, item in firsts.items() if item.get("waiting", text(""))["S"] in partitions
        }
        moved = [stream for stream in marks if _texts(items.key(stream, 2)) in there]
        later = await self.last(moved)
        heads = {stream: later.get(stream) or items.event_of(mark) for stream, mark in marks.items()}
        return marks, heads

    async def _claimed(
        self, marks: Mapping[str, Item], heads: Mapping[str, Event], patience: Patience, now: float
    ) -> Mapping[str, Event]:
        """Those of `heads` that have been silent for longer than `patience`, and that nobody else has just
        looked at. Each stream says from when on it is to be looked at again: when it may have been silent for
        too long, or for as long again as it has been."""
        claims: dict[str, tuple[Item, Mapping[str, str], Mapping[str, str]]] = {}
        due: dict[str, Event] = {}
        for stream, head in heads.items():
            was = marks[stream]["look"]
            if was["S"] > items.milliseconds(now):
                continue
            age = now - datetime.fromisoformat(head.time).timestamp()
            left = patience(head) - age
            run = items.open_run(head)
            if left < 0 or run:
                due[stream] = head
            if run and (left >= 0 or state.status(head) == "closed"):
                continue  # the next sweep is to look again, too
            longest = _LONGEST_LOOK_AT_RUNS if run else _LONGEST_LOOK
            wait = min(left if left >= 0 else max(age, items.FIRST_LOOK), longest)
            claims[stream] = (items.key(stream, 1), was, text(items.milliseconds(now + max(wait, 1.0))))
        won = dict(zip(claims, await self._table.swap("look", list(claims.values())), strict=True))
        return {stream: head for stream, head in due.items() if won.get(stream, True)}

    async def _mend(self, stale: Sequence[Event]) -> None:
        for error in await each([partial(self._mark, head) for head in stale]):
            if isinstance(error, FlowlaneError):
                logger.info("an index mark is left for the next one who meets it: %s", error)
            elif error is not None:
                raise error

    async def runs(self, lane: str, limit: int) -> Sequence[Event]:
        """See ``Backend.runs``."""
        if limit <= 0:
            return []
        streams: list[str] = []
        async for page in self._table.query(lane, index="runs", newest=limit):
            streams += [item["pk"]["S"] for item in page]
        heads = await self.last(streams)
        return [heads[stream] for stream in reversed(streams) if stream in heads]


def _key(item: Mapping[str, Mapping[str, str]]) -> Item:
    return {"pk": dict(item["pk"]), "sk": dict(item["sk"])}


def _texts(key: Item) -> tuple[str, str]:
    return key["pk"]["S"], key["sk"]["S"]
