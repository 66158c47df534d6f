"""The ports: what the engine needs from the world, as protocols.

A backend, store, source, sink, database, notifier or secrets provider is whatever keeps the promises
written here; ``flowlane.testing`` ships the suites that check them. Lifetime is ``async with`` everywhere,
times are seconds, sizes bytes, positions and ranges half open.
"""

from flowlane.ports.context import Context, Enricher, Mapper, Rows
from flowlane.ports.log import (
    Append,
    Backend,
    Channel,
    ChannelBatch,
    ChannelRecord,
    Commit,
    Committed,
    Delivery,
    Deployable,
    Deployment,
    Index,
    Patience,
    Publish,
    QueueSpec,
    Tally,
)
from flowlane.ports.records import (
    Bad,
    Batch,
    Cut,
    Database,
    Record,
    Sink,
    Source,
    Split,
    TableSpec,
    UnitRef,
    Writer,
)
from flowlane.ports.services import Connections, Environment, Notifier, Secrets
from flowlane.ports.storage import Archive, Body, ObjectInfo, Store, Upload

__all__ = [
    "Append",
    "Archive",
    "Backend",
    "Bad",
    "Batch",
    "Body",
    "Channel",
    "ChannelBatch",
    "ChannelRecord",
    "Commit",
    "Committed",
    "Connections",
    "Context",
    "Cut",
    "Database",
    "Delivery",
    "Deployable",
    "Deployment",
    "Enricher",
    "Environment",
    "Index",
    "Mapper",
    "Notifier",
    "ObjectInfo",
    "Patience",
    "Publish",
    "QueueSpec",
    "Record",
    "Rows",
    "Secrets",
    "Sink",
    "Source",
    "Split",
    "Store",
    "TableSpec",
    "Tally",
    "UnitRef",
    "Upload",
    "Writer",
]
