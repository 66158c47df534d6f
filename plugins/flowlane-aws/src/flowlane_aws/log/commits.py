"""Commits on their way into the table: one conditional put where one event is committed, else transactions.

Small commits share a transaction, of 100 actions at most: one request and one addition to a run's counters
for dozens of units. What is in conflict drops out, and the others go again without it; each is applied whole
or not at all, as it would be by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, Final

import msgspec

from flowlane.clock import Clock
from flowlane.errors import FlowlaneError, Permanent, Retryable, VersionConflict
from flowlane.events import MAX_ACTIONS, Event
from flowlane.ports import Commit, Committed, Publish
from flowlane_aws.bounded import all_of, each
from flowlane_aws.log import items
from flowlane_aws.log.items import SHARDS, Item
from flowlane_aws.log.known import Known
from flowlane_aws.log.table import Table
from flowlane_aws.log.tallies import Additions, additions, merge, place
from flowlane_aws.queue.sending import LONGEST_DELAY

#: Bytes in one transaction: 4 MB is DynamoDB's limit.
_MAX_BYTES: Final = 3_900_000
#: Seconds after which the sweep sends what the commit's own process has not (it may be about to).
GRACE: Final = 30.0
#: How often commits go again that met others on their way: on a counter, or with throttling.
_TRIES: Final = 12
#: What a transaction is cancelled for that another try may not meet.
_NOT_NOW: Final = frozenset(
    {"TransactionConflict", "ProvisionedThroughputExceeded", "ThrottlingError", "RequestLimitExceeded"}
)

Answer = Committed | VersionConflict | FlowlaneError


class Draft(msgspec.Struct, eq=False):
    """One commit as items and additions; ``answer`` once it is through.

    ``marked``: what it publishes of its own events, which say so themselves (``unsent``); ``bare``: of events
    that stand in the log. ``moved``: once it is applied, the heads whose streams may have to change their
    index.
    """

    commit: Commit
    puts: list[Item]
    added: Additions
    marked: list[Publish]
    bare: list[Publish]
    size: int
    answer: Answer | None = None
    moved: Sequence[Event] = ()

    @property
    def actions(self) -> int:
        """How many actions of a transaction it takes by itself."""
        return len(self.puts) + len(self.added)

    @property
    def alone(self) -> bool:
        """Whether it is a single put."""
        return len(self.puts) == 1 and not self.added


def is_timer(publish: Publish) -> bool:
    """Whether what carries it cannot keep it until it is due: a FIFO queue delays no single message (SQS API,
    ``SendMessage``, DelaySeconds), a channel none, and other queues only for so long."""
    in_order = bool(publish.group) or publish.via == "channel"
    return publish.delay > LONGEST_DELAY or (in_order and publish.delay > 0)


def due(publish: Publish, now: float) -> float:
    """From when on the sweep is to send `publish`, made at `now` (seconds of the epoch)."""
    return now + publish.delay + (0.0 if is_timer(publish) else GRACE)


def draft(commit: Commit, stamps: items.Stamps, now: float) -> Draft:
    """`commit`, which has been checked, as what is to be written.

    Raises:
        Permanent: it is more than one transaction holds.
    """
    own: dict[str, list[Publish]] = {event.id: [] for a in commit.appends for event in a.events}
    marked = [publish for publish in commit.publish if publish.event.id in own]
    for publish in marked:
        own[publish.event.id].append(publish)
    puts: list[Item] = []
    for append in commit.appends:
        for event in append.events:
            item = items.item_of(event, stamp := stamps())
            if owed := own[event.id]:
                item |= items.owing(event, min(due(publish, now) for publish in owed), stamp, owed)
            puts.append(item)
        if append.expected == 0:
            items.put_waiting(puts[-len(append.events)], append.events[-1], now)
    bare = [publish for publish in commit.publish if publish.event.id not in own]
    size = sum(items.length(item) for item in puts)
    made = Draft(commit, puts, additions(commit.tally), marked, bare, size)
    if made.actions > MAX_ACTIONS or size > _MAX_BYTES:
        what = commit.appends[0].stream if commit.appends else commit.tally[0].run
        raise Permanent(
            f"a commit of {made.actions} actions and {size:,} bytes on {what} was refused: DynamoDB takes "
            f"{MAX_ACTIONS} and {_MAX_BYTES:,}: let units say less, and where the rest is stored"
        )
    return made


def waves(drafts: Sequence[Draft]) -> list[list[Draft]]:
    """`drafts` in waves: those on one stream follow each other, those of one wave have none in common."""
    turn: dict[str, int] = {}
    found: list[list[Draft]] = []
    for each_ in drafts:
        streams = [append.stream for append in each_.commit.appends]
        number = max((turn.get(stream, -1) for stream in streams), default=-1) + 1
        for stream in streams:
            turn[stream] = number
        if number == len(found):
            found.append([])
        found[number].append(each_)
    return found


class Committing:
    """Takes drafts into the table."""

    def __init__(self, table: Table, clock: Clock, known: Known) -> None:
        self._table = table
        self._clock = clock
        self._known = known

    async def apply(self, wave: Sequence[Draft]) -> None:
        """Every draft has its answer; `wave`: drafts that have no stream in common."""
        await self._look_at_heads(wave)
        open_ = [each_ for each_ in wave if each_.answer is None]
        empty = [each_ for each_ in open_ if not each_.actions]
        for each_ in empty:
            each_.answer = Committed()
        single = [partial(self._put, each_) for each_ in open_ if each_.alone]
        packs = _packed(each_ for each_ in open_ if each_.actions and not each_.alone)
        results = await each([*single, *(partial(self._transact, pack) for pack in packs)])
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, FlowlaneError):
                raise result

    async def _look_at_heads(self, wave: Sequence[Draft]) -> None:
        """Refuse what builds upon a version that does not exist: its place is free, and yet it must wait."""
        unknown = {
            append.stream: each_
            for each_ in wave
            for append in each_.commit.appends
            if not self._known.has(append.stream, append.expected)
        }
        if not unknown:
            return
        heads = await each([partial(self._head, stream) for stream in unknown])
        found = dict(zip(unknown, heads, strict=True))
        for each_ in {id(each_): each_ for each_ in unknown.values()}.values():
            mine = {
                a.stream: (a.expected, found[a.stream]) for a in each_.commit.appends if a.stream in found
            }
            failed = next((head for _, head in mine.values() if isinstance(head, Exception)), None)
            if failed is not None:
                each_.answer = _as_answer(failed)
                continue
            behind = {s: head for s, (e, head) in mine.items() if isinstance(head, int) and head < e}
            if behind:
                each_.answer = VersionConflict(behind)

    async def _head(self, stream: str) -> int:
        item = await self._table.newest(stream)
        if item is None:
            return 0
        event = items.event_of(item)
        self._known.note(event)
        return event.version

    # ----------------------------------------------------------------- one put

    async def _put(self, draft: Draft) -> None:
        item = draft.puts[0]
        try:
            there = await self._table.put(item)
            if there is not None and there.get("id") != item["id"]:
                draft.answer = await self._conflict([draft.commit.appends[0].stream])
                return
        except FlowlaneError as error:
            draft.answer = error
            return
        draft.answer = Committed()

    async def _conflict(self, streams: Sequence[str]) -> VersionConflict:
        heads = await all_of([partial(self._head, stream) for stream in streams])
        return VersionConflict(dict(zip(streams, heads, strict=True)))

    # ----------------------------------------------------------------- transactions

    async def _transact(self, pack: Sequence[Draft]) -> None:
        left, tried = list(pack), 0
        try:
            while left:
                if tried:
                    await self._table.pause(tried)
                tried += 1
                before = len(left)
                left, busy = await self._try(left)
                if (len(left) == before and not busy) or tried == _TRIES:
                    raise Retryable(
                        f"committing to {self._table.name}: cancelled {tried} times, the last time because "
                        f"of {busy or 'nothing that it says'}"
                    )
                if not busy:
                    tried = 0  # they go again for those that dropped out, not for anybody in their way
        except FlowlaneError as error:
            if isinstance(error, Permanent) and len(left) > 1:
                # DynamoDB takes one of them for impossible; the others are not to blame.
                await all_of([partial(self._transact, [each_]) for each_ in left])
                return
            for each_ in left:
                each_.answer = each_.answer or error

    async def _try(self, pack: Sequence[Draft]) -> tuple[list[Draft], str]:
        """Those of `pack` that are to go again, and the reason that was nobody's fault, if there was one."""
        token = self._clock.token()
        actions, owners = self._composed(pack, int(self._clock.random() * SHARDS))
        reasons = await self._table.transact(actions, _token(token, pack))
        if not reasons:
            for each_ in pack:
                each_.answer = Committed()
            return [], ""
        busy = ""
        taken: dict[int, list[str]] = {}
        for reason, owner in zip(reasons, owners, strict=False):  # what comes after the puts are additions
            code = str(reason.get("Code") or "None")
            if code == "ConditionalCheckFailed":
                each_, item = owner
                if reason.get("Item", {}).get("id") == item["id"]:
                    each_.answer = Committed()  # by an earlier try, whose answer was lost
                else:
                    taken.setdefault(id(each_), []).append(item["pk"]["S"])
            elif code in _NOT_NOW:
                busy = code
            elif code != "None":
                raise Permanent(
                    f"committing to {self._table.name}: refused ({code}: {reason.get('Message', '')})"
                )
        for reason in reasons[len(owners) :]:
            if reason.get("Code") in _NOT_NOW:
                busy = str(reason["Code"])
        await all_of(
            [partial(self._refuse, d, taken[id(d)]) for d in pack if id(d) in taken and d.answer is None]
        )
        return [each_ for each_ in pack if each_.answer is None], busy

    async def _refuse(self, draft: Draft, streams: Sequence[str]) -> None:
        draft.answer = await self._conflict(list(dict.fromkeys(streams)))

    def _composed(
        self, pack: Sequence[Draft], shard: int
    ) -> tuple[list[Mapping[str, Any]], list[tuple[Draft, Item]]]:
        """The actions of a transaction, puts first, and which draft's each put is."""
        owners = [(each_, item) for each_ in pack for item in each_.puts]
        total: Additions = {}
        for each_ in pack:
            merge(total, each_.added)
        actions = [self._table.putting(item) for _, item in owners]
        for (run, round, item_), numbers in total.items():
            actions.append(self._table.adding(place(run, round, item_, shard), numbers))
        return actions, owners


def _packed(drafts: Iterable[Draft]) -> list[list[Draft]]:
    """`drafts` in packs that fit into one transaction each."""
    packs: list[list[Draft]] = []
    puts, size = 0, 0
    counters: set[tuple[str, int, str]] = set()
    for each_ in drafts:
        together = puts + len(each_.puts) + len(counters | each_.added.keys())
        if not packs or together > MAX_ACTIONS or size + each_.size > _MAX_BYTES:
            packs.append([])
            puts, size, counters = 0, 0, set()
        packs[-1].append(each_)
        puts += len(each_.puts)
        size += each_.size
        counters |= each_.added.keys()
    return packs


def _token(token: str, pack: Sequence[Draft]) -> str:
    """A token for the transaction of `pack`, of at most 36 characters, that no other one has."""
    digest = blake2b(token.encode(), digest_size=16)
    for each_ in pack:
        for item in each_.puts:
            digest.update(item["id"]["S"].encode() + b"\0")
    return digest.hexdigest()


def _as_answer(error: Exception) -> FlowlaneError:
    return error if isinstance(error, FlowlaneError) else Retryable(f"{type(error).__name__}: {error}")
