"""A channel on Kinesis: ``producer`` puts, ``shards`` reads, and ``flowlane.shards`` does all the rest."""

from __future__ import annotations

from typing import Any

from flowlane.clock import Clock
from flowlane.ports import Backend
from flowlane.shards import HOLD, ShardedChannel
from flowlane_aws.kinesis.producer import Producer
from flowlane_aws.kinesis.shards import KinesisShards


class KinesisChannel(ShardedChannel):
    """See ``ShardedChannel``: the channel called `name` is the Kinesis stream `stream`, which must be there
    when it is put to or consumed, and leases and positions of its consumers are streams of `log`. With
    `aggregate`, small records are put as aggregates (see ``Producer``); reading takes them apart anyway."""

    def __init__(
        self,
        name: str,
        stream: str,
        client: Any,
        log: Backend,
        clock: Clock,
        *,
        aggregate: bool = False,
        hold: float = HOLD,
    ) -> None:
        producer = Producer(stream, client, clock, aggregate=aggregate)
        super().__init__(name, KinesisShards(stream, client, clock), log, clock, put=producer.put, hold=hold)
