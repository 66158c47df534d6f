"""The channels of ``aws://name``: Kinesis streams called ``name-...``, their leases in the backend's log."""

from __future__ import annotations

from collections.abc import Sequence

from flowlane.clock import Clock
from flowlane.ports import Backend, Channel, QueueSpec
from flowlane.shards import HOLD
from flowlane_aws.kinesis import HOT as RECORDS
from flowlane_aws.kinesis import KinesisChannel, creation
from flowlane_aws.lazy import LazyClient
from flowlane_aws.names import Names

__all__ = ["RECORDS", "Channels"]


class Channels:
    """The channels of a backend. `client` is opened when one is put to or consumed; `hold` is theirs, in
    seconds (see ``ShardedChannel``)."""

    def __init__(self, names: Names, client: LazyClient, clock: Clock, *, hold: float | None = None) -> None:
        self._names = names
        self._client = client
        self._clock = clock
        self._hold = HOLD if hold is None else hold
        self._channels: dict[str, KinesisChannel] = {}

    def channel(self, name: str, log: Backend) -> Channel:
        """The channel called `name`, the same one each time; its consumers' positions are in `log`."""
        if name not in self._channels:
            names = self._names
            self._channels[name] = KinesisChannel(
                name,
                names.stream(name),
                self._client,
                log,
                self._clock,
                aggregate=names.aggregate,
                hold=self._hold,
            )
        return self._channels[name]

    async def create(self, queues: Sequence[QueueSpec]) -> Sequence[str]:
        """The streams of those that are channels are there; see ``kinesis.creation``."""
        specs = [spec for spec in queues if spec.via == "channel"]
        return await creation.create(self._client, self._names, specs, self._clock)
