"""flowlane: an event-sourced async ingestion worker.

Write a lane (a small Python file); every stage of it is an event in an append-only log; the same lane runs as
a local worker and behind AWS Lambda.
"""

from flowlane.errors import (
    BadRecord,
    ConfigError,
    FlowlaneError,
    Incomplete,
    Permanent,
    Refused,
    Retryable,
    Superseded,
)
from flowlane.events import Event
from flowlane.lane import Fact, Lane, Policy, Unit
from flowlane.ports import Context
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.zip.entry import ZipLimits

__version__ = "0.1.0"

__all__ = [
    "BadRecord",
    "ConfigError",
    "Context",
    "CsvFormat",
    "Event",
    "Fact",
    "FlowlaneError",
    "Incomplete",
    "Lane",
    "Permanent",
    "Policy",
    "Refused",
    "Retryable",
    "Superseded",
    "Unit",
    "ZipLimits",
]
