"""Channels under trouble: what is applied is right whatever strikes, and each guard that is taken away is
missed by a scene that looks only at what was applied, and at the leases.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from flowlane.backends.memory import MemoryBackend, MemoryChannel
from flowlane.errors import Retryable
from flowlane.ports import Channel, ChannelRecord
from flowlane.shards import balance
from flowlane.shards.outlook import Outlook
from flowlane.testing.channels import ShardedBackend
from flowlane.testing.clock import VirtualClock
from flowlane.testing.faults import DIE_AFTER, REFUSE, Process
from tests.simulation.channel_scene import KINDS, Consumer, Producer, Target, scene
from tests.simulation.test_mutants import no_fence_in_the_log

Patch = pytest.MonkeyPatch
Backend = Callable[[VirtualClock], MemoryBackend]
BACKENDS = (MemoryBackend, ShardedBackend)
SEEDS = 25


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_change_is_applied_once_and_in_order_whatever_strikes(backend: Backend) -> None:
    fired: Counter[str] = Counter()
    for seed in range(SEEDS):
        wrong, counters = scene(seed, backend)
        assert wrong == [], f"seed {seed}"
        fired += counters.fired
    assert set(KINDS) <= set(fired)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_strikes_nothing_is_handed_out_twice(backend: Backend) -> None:
    wrong, counters = scene(0, backend, ())
    assert wrong == []
    assert counters.delivered == 480
    assert not counters.fired


# --------------------------------------------------------------------------- the mutants


def no_compare(patch: Patch) -> None:
    """Whatever comes is applied, though something newer was."""
    patch.setattr(Target, "is_newer", lambda self, key, change: True)


def anybody_settles(patch: Patch) -> None:
    """A batch whose hold was lost moves the position all the same."""

    def settle(self: MemoryChannel, batch: Any, count: int | None) -> None:
        where = batch.records[0].partition
        batch.group.positions[where] += len(batch.records[:count])
        batch.group.held.pop(where, None)
        self.news()

    patch.setattr(MemoryChannel, "settle", settle)


def held_for_ever(patch: Patch) -> None:
    """A partition whose consumer died is never another's; of memory's channels, and of shards."""
    patch.setattr(MemoryBackend.__init__, "__kwdefaults__", {"hold": 1e9})
    patch.setattr(balance, "_vanished", lambda view, hold: False)


def children_at_once(patch: Patch) -> None:
    """Shards are read beside those that they were split or merged from."""
    patch.setattr(Outlook, "_is_open", lambda self, shard: not self._leases.known(shard.id).lease.ended)


def settled_past_what_failed(patch: Patch) -> None:
    """A batch is settled as a whole, though one of its records could not be applied."""
    work = Consumer.work

    async def all_of_it(self: Consumer, process: Process, records: Sequence[ChannelRecord]) -> int:
        await work(self, process, records)
        return len(records)

    patch.setattr(Consumer, "work", all_of_it)


def failed_puts_behind(patch: Patch) -> None:
    """A put that failed is made up for behind those that follow it."""
    behind: list[ChannelRecord] = []

    async def put(self: Producer, channel: Channel, records: Sequence[ChannelRecord]) -> None:
        try:
            await channel.put(records)
        except Retryable:
            behind.extend(records)
            return
        while behind:
            try:
                await channel.put(behind)
            except Retryable:
                await asyncio.sleep(0.1)
            else:
                behind.clear()

    patch.setattr(Producer, "put", put)


MUTANTS: Sequence[tuple[Callable[[Patch], None], Backend, Sequence[str]]] = (
    (no_compare, MemoryBackend, ("replay",)),
    (no_compare, ShardedBackend, ("batch again",)),
    (no_compare, MemoryBackend, ("doubled records",)),
    (no_compare, ShardedBackend, ("pause",)),
    (anybody_settles, MemoryBackend, ("lost hold",)),
    (no_fence_in_the_log, ShardedBackend, ("pause",)),
    (held_for_ever, MemoryBackend, (DIE_AFTER,)),
    (held_for_ever, ShardedBackend, (DIE_AFTER,)),
    (children_at_once, ShardedBackend, ("reshard",)),
    (settled_past_what_failed, MemoryBackend, (REFUSE,)),
    (settled_past_what_failed, ShardedBackend, (REFUSE,)),
    (failed_puts_behind, MemoryBackend, (REFUSE,)),
    (failed_puts_behind, ShardedBackend, ("partial put",)),
)


@pytest.mark.parametrize(("mutant", "backend", "kinds"), MUTANTS)
def test_a_guard_that_is_missing_is_missed(
    mutant: Callable[[Patch], None], backend: Backend, kinds: Sequence[str], monkeypatch: Patch
) -> None:
    assert scene(1, backend, kinds)[0] == []
    mutant(monkeypatch)
    assert any(scene(seed, backend, kinds)[0] for seed in range(SEEDS))
