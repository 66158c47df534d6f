"""Records as they are put into a channel, by themselves or along with a commit."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from flowlane.backends.common import partition
from flowlane.backends.sqlite.wide import Wide
from flowlane.ports import ChannelRecord

_numbers: Final = msgspec.json.Decoder(list[int])

_INSERT: Final = Wide("INSERT INTO channel (channel, partition, position, key, data) VALUES ", "(?,?,?,?,?)")
_ENDS: Final = """
SELECT json_group_array(coalesce(
    (SELECT max(position) FROM channel WHERE channel = ? AND partition = value), 0)) FROM json_each(?)
"""


def store(connection: sqlite3.Connection, channel: str, records: Iterable[ChannelRecord]) -> None:
    """They are in `channel` when the transaction of `connection` is committed; none is too large
    (``common.record_size``)."""
    rows = [(partition(record.key), record.key, record.data) for record in records]
    touched = sorted({where for where, _, _ in rows})
    (text,) = connection.execute(_ENDS, (channel, str(touched))).fetchone()
    ends = dict(zip(touched, _numbers.decode(text), strict=True))
    values: list[Any] = []
    for where, key, data in rows:
        ends[where] += 1
        values += (channel, where, ends[where], key, data)
    _INSERT.run(connection, values)
