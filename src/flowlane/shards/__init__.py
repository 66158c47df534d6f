"""Consuming sharded streams: leases and positions in the log, for any service that is a ``Shards``."""

from flowlane.shards.channel import HOLD, ShardedChannel
from flowlane.shards.port import SUBS, Page, Place, Reader, Shard, Shards, place, position

__all__ = [
    "HOLD",
    "SUBS",
    "Page",
    "Place",
    "Reader",
    "Shard",
    "ShardedChannel",
    "Shards",
    "place",
    "position",
]
