"""Records that the Kinesis Producer Library put together into one: no I/O, no protobuf library.

An aggregate is four magic bytes, a protobuf message and that message's MD5 (awslabs/amazon-kinesis-producer,
aggregation-format.md)::

    message AggregatedRecord { repeated string partition_key_table = 1;
                               repeated string explicit_hash_key_table = 2;
                               repeated Record records = 3; }
    message Record { required uint64 partition_key_index = 1; optional uint64 explicit_hash_key_index = 2;
                     required bytes data = 3; repeated Tag tags = 4; }

What does not hold to all of that is a plain record that happens to begin like one, and is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import md5
from typing import Final

import msgspec

MAGIC: Final = b"\xf3\x89\x9a\xc2"
_DIGEST: Final = 16  # bytes of MD5
#: Protobuf wire types (protobuf.dev, "Encoding"), with the bytes that the fixed ones take.
_VARINT, _LENGTH = 0, 2
_FIXED: Final = {1: 8, 5: 4}


class UserRecord(msgspec.Struct, frozen=True):
    """What the producer was given: `data` under the partition key `key`."""

    key: str
    data: bytes


class _NoAggregate(Exception):
    """The bytes are no message of that shape."""


def unpack(data: bytes) -> list[UserRecord] | None:
    """The records in the aggregate `data`, in the order in which they were put; ``None`` if it is none.

    All of them bear the sequence number of the one record that held them. After a change of shards some may
    have keys of another shard: they were put into this one, and are nowhere else.
    """
    if not data.startswith(MAGIC) or len(data) < len(MAGIC) + _DIGEST:
        return None
    message = memoryview(data)[len(MAGIC) : -_DIGEST]
    if md5(message, usedforsecurity=False).digest() != data[-_DIGEST:]:
        return None
    try:
        return _records(message)
    except _NoAggregate:
        return None


def _records(message: memoryview) -> list[UserRecord]:
    keys: list[str] = []
    records: list[memoryview] = []
    for number, value in _fields(message):
        if number == 1 and isinstance(value, memoryview):
            keys.append(_text(value))
        elif number == 3 and isinstance(value, memoryview):
            records.append(value)
    return [_record(record, keys) for record in records]


def _record(message: memoryview, keys: list[str]) -> UserRecord:
    index, data = -1, None
    for number, value in _fields(message):
        if number == 1 and isinstance(value, int):
            index = value
        elif number == 3 and isinstance(value, memoryview):
            data = bytes(value)
    if data is None or not 0 <= index < len(keys):
        raise _NoAggregate
    return UserRecord(keys[index], data)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field in turn; of fixed width ones nothing but that they are there."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == _LENGTH:
            size, position = _varint(message, position)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise _NoAggregate
        if size > len(message) - position:
            raise _NoAggregate
        if kind == _LENGTH:
            yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, least significant seven bits first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):  # ten bytes hold 64 bits
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _NoAggregate


def _text(value: memoryview) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        raise _NoAggregate from None
