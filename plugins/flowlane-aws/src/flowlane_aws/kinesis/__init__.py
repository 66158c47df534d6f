"""Channels on Kinesis."""

from flowlane_aws.kinesis.channel import KinesisChannel
from flowlane_aws.kinesis.lines import CALL_RECORDS
from flowlane_aws.kinesis.parcels import CALL_BYTES
from flowlane_aws.kinesis.producer import HOT as PUTTING
from flowlane_aws.kinesis.producer import RECORD_BYTES, TRIES, Producer
from flowlane_aws.kinesis.ranges import partition_key
from flowlane_aws.kinesis.shards import HOT as READING
from flowlane_aws.kinesis.shards import KinesisShards

#: The operations that are worth the short way (see ``brisk``), with the types of their answers.
HOT = {**dict.fromkeys(PUTTING), **READING}

__all__ = [
    "CALL_BYTES",
    "CALL_RECORDS",
    "HOT",
    "RECORD_BYTES",
    "TRIES",
    "KinesisChannel",
    "KinesisShards",
    "Producer",
    "partition_key",
]
