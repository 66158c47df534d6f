"""A channel whose records are in a sharded stream, and whose consumers' positions are in the log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

from flowlane import events
from flowlane.clock import Clock
from flowlane.errors import ConfigError
from flowlane.ports import Backend, ChannelBatch, ChannelRecord, Lag
from flowlane.shards.leases import Lease, Leases
from flowlane.shards.outlook import beside
from flowlane.shards.port import Place, Shard, Shards, place
from flowlane.shards.worker import Worker

#: Seconds after which a shard whose owner has vanished is another's, where it is not said otherwise.
HOLD: Final = 30.0


class ShardedChannel:
    """See ``ports.Channel``; partitions are shards, whose numbers they bear.

    ``put`` stores records in the stream. ``hold``: for how many seconds of its observer's clock a lease must
    have stood still, with something to do behind it, until it is taken; a batch that was handed out or
    extended is held for two thirds of it at least. All that is called with one `name` on one `log`, in any
    process, consumes together.
    """

    def __init__(
        self,
        name: str,
        shards: Shards,
        log: Backend,
        clock: Clock,
        *,
        put: Callable[[Sequence[ChannelRecord]], Awaitable[None]],
        hold: float = HOLD,
    ) -> None:
        self._name, self._shards, self._log, self._clock = name, shards, log, clock
        self._put, self._hold = put, hold
        self._leases: dict[str, Leases] = {}

    async def put(self, records: Sequence[ChannelRecord]) -> None:
        """See ``Channel.put``."""
        await self._put(records)

    async def consume(
        self, consumer: str, *, limit: int = 500, wait: float = 0
    ) -> AsyncIterator[ChannelBatch]:
        """See ``Channel.consume``. At most two pages of each shard held are in memory. To be closed, or read
        to its end: then what it holds is given back at once.

        Raises:
            Retryable: the service or the log has been away for ``hold`` seconds.
            ConfigError: the stream cannot be read.
        """
        worker = Worker(
            self._shards, self._of(consumer), self._clock, hold=self._hold, limit=limit, wait=wait
        )
        async with worker:
            while (batch := await worker.next()) is not None:
                yield batch

    async def lag(self, consumer: str) -> Sequence[Lag]:
        """See ``Channel.lag``: from the leases, as of the last event of each; the stream is not read."""
        leases = self._of(consumer)
        shards = await self._shards.shards()
        await leases.refresh(shard.id for shard in shards)
        return [_lag(shard, leases.known(shard.id).lease) for shard in shards]

    async def rewind(self, consumer: str, positions: Mapping[int, int] | None = None) -> None:
        """See ``Channel.rewind``. Shards that come from those which are rewound go on where they are, unless
        they are rewound as well; one that nobody holds waits for its parents once more.

        Raises:
            ConfigError: the stream has no such partition any more.
            Retryable: the service or the log is away; some partitions may have been rewound.
        """
        leases = self._of(consumer)
        shards = await self._shards.shards()
        unknown = set(positions or ()) - {shard.number for shard in shards}
        if unknown:
            raise ConfigError(
                f"channel {self._name} has no partition {min(unknown)}: rewind those that `lag` tells of"
            )
        await leases.refresh(shard.id for shard in shards)
        for level in _by_age(shards):  # parents first: their children are not to begin before them
            if positions is None:
                to = {shard.id: Place() for shard in level if leases.known(shard.id).version}
            else:
                to = {
                    shard.id: place(positions[shard.number]) for shard in level if shard.number in positions
                }
            await beside(partial(_rewind, leases), to.items())

    def _of(self, consumer: str) -> Leases:
        found = self._leases.get(consumer)
        if found is None:
            found = self._leases[consumer] = Leases(self._name, consumer, self._log, self._clock)
        return found


async def _rewind(leases: Leases, what: tuple[str, Place]) -> None:
    shard, to = what
    await leases.change(shard, lambda lease: (events.SHARD_REWOUND, Lease(place=to, settled=lease.settled)))


def _lag(shard: Shard, lease: Lease) -> Lag:
    return Lag(shard.number, lease.owner, lease.place.position, seconds=lease.behind, ended=lease.ended)


def _by_age(shards: Sequence[Shard]) -> list[list[Shard]]:
    """`shards` in generations: none comes before a parent of its own."""
    levels: list[list[Shard]] = []
    left = {shard.id: shard for shard in shards}
    while left:
        level = [shard for shard in left.values() if not any(parent in left for parent in shard.parents)]
        levels.append(level or list(left.values()))
        for shard in levels[-1]:
            del left[shard.id]
    return levels
