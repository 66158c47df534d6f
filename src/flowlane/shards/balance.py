"""Which shards a worker should take, and which ask for: pure, from what it knows of all leases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil

import msgspec

from flowlane.shards.leases import Lease


class View(msgspec.Struct, frozen=True):
    """A shard that may be read now, as one worker sees it: for how many seconds its lease has stood still as
    its owner left it, for how many it has been known that something is to be done behind its place, and for
    how many somebody has been asking for it (``None``: it is not known, nobody has)."""

    shard: str
    lease: Lease
    still: float = 0.0
    pending: float | None = None
    asked: float | None = None


class Plan(msgspec.Struct, frozen=True):
    """The shards to ``take`` now (free, or their owners vanished), and those to ``ask`` the owners for."""

    take: Sequence[str] = ()
    ask: Sequence[str] = ()


def plan(me: str, views: Sequence[View], hold: float, *, starving: bool = False) -> Plan:
    """What `me` does about `views`, all shards that may be read, given that an owner is to be heard of within
    `hold` seconds while there is something to do. `starving`: it has had nothing to do for a while.

    What an owner that has vanished held is free. Of what is free everybody takes its share, and what nobody
    has taken after a third of `hold` is anybody's. Who has at least two more than `me` is asked for half of
    the difference; a starving worker asks for whatever waits and does not move.
    """
    gone = {view.lease.owner for view in views if _vanished(view, hold)} - {me, ""}
    free = [view for view in views if not view.lease.owner or (view.lease.owner in gone and _old(view, hold))]
    free_ids = {view.shard for view in free}
    rest = [view for view in views if view.shard not in free_ids]
    counts = Counter({me: 0})
    counts.update(view.lease.wanted or view.lease.owner for view in rest)
    share = max(0, ceil(len(views) / len(counts)) - counts[me])
    take = free[:share]
    take += [view for view in free[share:] if view.lease.owner or view.still >= hold / 3]
    if take:
        return Plan(take=[view.shard for view in take])
    if starving:
        stuck = [view for view in _others(me, rest) if view.pending is not None and view.still >= hold / 3]
        if stuck:
            return Plan(ask=[stuck[0].shard])
    return Plan(ask=_excess(me, rest, counts))


def _old(view: View, hold: float) -> bool:
    return view.still >= hold


def _vanished(view: View, hold: float) -> bool:
    """Whether the owner should have been heard of. One that is idle has nothing to say, until it is asked for
    the shard, or something comes."""
    if not _old(view, hold):
        return False
    asked, pending = view.asked, view.pending
    return (asked is not None and asked >= hold) or (pending is not None and pending >= hold / 3)


def _others(me: str, views: Sequence[View]) -> list[View]:
    """What others hold that nobody has asked for."""
    return [view for view in views if view.lease.owner != me and not view.lease.wanted]


def _excess(me: str, views: Sequence[View], counts: Counter[str]) -> list[str]:
    """What to ask for, so that nobody has two more than `me`; what waits longest first."""
    asked: list[str] = []
    left = sorted(_others(me, views), key=lambda view: -(view.pending if view.pending is not None else -1.0))
    while left:
        view = max(left, key=lambda view: counts[view.lease.owner])
        if counts[view.lease.owner] - counts[me] < 2:
            break
        left.remove(view)
        counts[view.lease.owner] -= 1
        counts[me] += 1
        asked.append(view.shard)
    return asked
