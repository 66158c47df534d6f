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
#: Bytes of an aggregate that are unpacked at once.
PIECE: Final = 64 << 10
_DIGEST: Final = 16  # bytes of MD5
#: Protobuf wire types (protobuf.dev, "Encoding"), with the bytes that the fixed ones take.
_VARINT, _LENGTH = 0, 2
_FIXED: Final = {1: 8, 5: 4}
#: Tags (number and wire type) of the fields of an aggregate, and of those of a record in it.
_KEY, _HASH, _RECORD = 0x0A, 0x12, 0x1A
_KEY_INDEX, _HASH_INDEX, _DATA = 0x08, 0x10, 0x1A


class UserRecord(msgspec.Struct, frozen=True, gc=False):
    """What the producer was given: `data` under the partition key `key`. ``hash_key`` says which shard it is
    for, as a decimal number; where it is empty, the MD5 of `key` does."""

    key: str
    data: bytes
    hash_key: str = ""


class _NoAggregate(Exception):
    """The bytes are no message of that shape."""


class Unusual(Exception):
    """The bytes are not laid out as producers do it; they may be an aggregate all the same."""


def unpack(data: bytes) -> list[UserRecord] | None:
    """The records in the aggregate `data`, in the order in which they were put; ``None`` if it is none.

    All of them bear the sequence number of the one record that held them. After a change of shards some may
    have keys of another shard: they were put into this one. A producer that is told so puts them again; the
    AWS libraries for consumers leave them out therefore, and a Lambda function is handed them all.
    """
    try:
        return [record for piece in pieces(data) for record in piece]
    except Unusual:
        pass
    message = _sealed(data)
    if message is None:
        return None
    try:
        return _records(memoryview(message))
    except _NoAggregate:
        return None


def pieces(data: bytes) -> Iterator[list[UserRecord]]:
    """The records in the aggregate `data` by the 64 KiB, so that the loop can be given way to: there may be
    some ten thousand of them in each. At a quarter of what others cost, for a message that is as every known
    producer writes it: the fields of a record in the order of their numbers, without tags, behind the tables.

    Raises:
        Unusual: it is another one, or none: then nothing that was given before counts.
    """
    message = _sealed(data)
    if message is None:
        raise Unusual
    keys: list[str] = []
    hashes: list[str] = [""]
    at, end = 0, len(message)
    try:
        while at < end:
            records, at = _piece(message, at, min(end, at + PIECE), keys, hashes)
            if at > end:
                raise Unusual  # the last field is cut off
            yield records
    except (IndexError, UnicodeDecodeError):
        raise Unusual from None


def _piece(  # noqa: PLR0912  # calls would cost more than all the rest: there are thousands of records
    message: bytes, at: int, until: int, keys: list[str], hashes: list[str]
) -> tuple[list[UserRecord], int]:
    """The records whose fields begin from `at` to `until`, and where the last one ends; the tables grow."""
    records: list[UserRecord] = []
    while at < until:
        tag, size = message[at], message[at + 1]
        at += 2
        if size > 0x7F:
            size, at = size & 0x7F | message[at] << 7, at + 1
            if size > 0x3FFF:
                size, at = _long(message, at - 2)
        stop = at + size
        if tag == _RECORD:
            if message[at] != _KEY_INDEX:
                raise Unusual
            index, at = message[at + 1], at + 2
            if index > 0x7F:
                index, at = _long(message, at - 1)
            hashed = 0
            if message[at] == _HASH_INDEX:
                hashed, at = message[at + 1], at + 2
                if hashed > 0x7F:
                    hashed, at = _long(message, at - 1)
                hashed += 1
            if message[at] != _DATA:
                raise Unusual
            size, at = message[at + 1], at + 2
            if size > 0x7F:
                size, at = size & 0x7F | message[at] << 7, at + 1
                if size > 0x3FFF:
                    size, at = _long(message, at - 2)
            if at + size != stop:
                raise Unusual
            records.append(UserRecord(keys[index], message[at:stop], hashes[hashed]))
        elif tag == _KEY:
            keys.append(message[at:stop].decode())
        elif tag == _HASH:
            hashes.append(message[at:stop].decode())
        else:
            raise Unusual
        at = stop
    return records, at


def _sealed(data: bytes) -> bytes | None:
    """The message within `data`, if there is one: magic number and digest must both be right."""
    if not data.startswith(MAGIC) or len(data) < len(MAGIC) + _DIGEST:
        return None
    message = data[len(MAGIC) : -_DIGEST]
    whole = md5(message, usedforsecurity=False).digest() == data[-_DIGEST:]
    return message if whole else None


def _long(message: bytes, at: int) -> tuple[int, int]:
    """The number of two or three bytes at `at`, and where it ends."""
    low, middle = message[at], message[at + 1]
    if middle < 0x80:
        return low & 0x7F | middle << 7, at + 2
    high = message[at + 2]
    if high > 0x7F:
        raise Unusual
    return low & 0x7F | (middle & 0x7F) << 7 | high << 14, at + 3


def _records(message: memoryview) -> list[UserRecord]:
    keys: list[str] = []
    hashes: list[str] = []
    records: list[memoryview] = []
    for number, value in _fields(message):
        if isinstance(value, int):
            continue
        if number == 1:
            keys.append(_text(value))
        elif number == 2:
            hashes.append(_text(value))
        elif number == 3:
            records.append(value)
    return [_record(record, keys, hashes) for record in records]


def _record(message: memoryview, keys: list[str], hashes: list[str]) -> UserRecord:
    index, hashed, data = -1, -1, None
    for number, value in _fields(message):
        if number == 1 and isinstance(value, int):
            index = value
        elif number == 2 and isinstance(value, int):
            hashed = value
        elif number == 3 and isinstance(value, memoryview):
            data = bytes(value)
    if data is None or not 0 <= index < len(keys):
        raise _NoAggregate
    return UserRecord(keys[index], data, hashes[hashed] if 0 <= hashed < len(hashes) else "")


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
