"""Makes aggregates as the Kinesis Producer Library does; written from its format's description, and not from
the code under test."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import md5


def varint(number: int) -> bytes:
    """`number` as protobuf writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def member(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(records: Iterable[tuple[str, bytes]], hash_keys: Iterable[str] = ()) -> bytes:
    """``AggregatedRecord`` with those keys and data, as its producer writes it: each key once, in a table."""
    records, hashes = list(records), list(hash_keys)
    table = list(dict.fromkeys(key for key, _ in records))
    parts = [member(1, key.encode()) for key in table] + [member(2, key.encode()) for key in hashes]
    for number, (key, data) in enumerate(records):
        inner = member(1, table.index(key))
        if hashes:
            inner += member(2, number % len(hashes))
        parts.append(member(3, inner + member(3, data)))
    return b"".join(parts)


def sealed(inner: bytes) -> bytes:
    """`inner` between the magic number and its MD5."""
    return b"\xf3\x89\x9a\xc2" + inner + md5(inner, usedforsecurity=False).digest()


def aggregate(*records: tuple[str, bytes]) -> bytes:
    """The data of one Kinesis record that holds all `records` (partition key and data)."""
    return sealed(message(records))
