"""The log on DynamoDB: one table for the events of all streams, counters and what is owed to queues."""

from flowlane_aws.log.log import Log
from flowlane_aws.log.table import Table

__all__ = ["Log", "Table"]
