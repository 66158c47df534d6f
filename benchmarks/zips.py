"""Zips to measure with: CSV members of any size out of one deflated piece, without ever writing them whole.

A deflate stream may be cut at a full flush (RFC 1951, section 3.2.4: an empty stored block, and no distance
reaches over it), so that a piece that ends with one can stand any number of times in one stream.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import pack

from isal import isal_zlib

PIECE = 16 << 20
_END = b"\x03\x00"  # an empty last block
_CITIES = ("Berlin", "Wien", "Zürich", "Lyon", "Porto", "Gdansk", "Malmö", "Utrecht", "Bologna", "Tartu")
_STATES = ("open", "paid", "shipped", "returned", "cancelled")
_WORDS = [
    "late",
    "again",
    "careful",
    "parcel",
    "window",
    "garden",
    "letter",
    "yellow",
    "silent",
    "paper",
    "river",
]

#: A layout: what an archive is made of, each part as often as it says.
Layout = Sequence[tuple[Path, int]]
#: Makes lines by seed, of about so many bytes together.
Rows = Callable[[int, int], Iterator[bytes]]


@dataclass(frozen=True)
class Made:
    """An archive as a layout; its one member's or all its members' bytes, CRC of the last, and rows."""

    layout: Layout
    size: int
    crc: int
    rows: int
    packed: int
    total: int = 0  #: the sum of the first column


def csv_rows(seed: int, size: int) -> Iterator[bytes]:
    """Lines of orders, of about `size` bytes together."""
    chance = random.Random(seed)
    made = 0
    while made < size:
        lines = []
        for _ in range(1000):
            day = chance.randrange(365)
            lines.append(
                f"{chance.randrange(10**9)},2026-{day // 31 + 1:02}-{day % 31 + 1:02},"
                f"{chance.choice(_CITIES)},{chance.choice(_STATES)},customer-{chance.randrange(5000):06},"
                f"{chance.randrange(1, 100)}.00,EUR,"
                f'"{" ".join(chance.choices(_WORDS, k=6))}, {chance.choice(_CITIES)}",https://shop.example.com/orders\n'
            )
        block = "".join(lines).encode()
        made += len(block)
        yield block


HEADER = b"number,day,city,state,customer,amount,currency,note,link\n"


def local_header(name: bytes, method: int, packed: int, size: int, crc: int) -> bytes:
    """A local header, with ZIP64 sizes where they need it."""
    extra = pack("<HHQQ", 1, 16, size, packed) if max(size, packed) >= 0xFFFFFFFF else b""
    sizes = (0xFFFFFFFF, 0xFFFFFFFF) if extra else (packed, size)
    head = pack("<4sHHHHHIIIHH", b"PK\3\4", 45, 0, method, 0, 0x5A21, crc, *sizes, len(name), len(extra))
    return head + name + extra


def directory_of(members: Sequence[tuple[bytes, int, int, int, int, int]], start: int) -> bytes:
    """The directory and the end records of `members` (name, method, packed, size, crc, offset)."""
    entries = []
    for name, method, packed, size, crc, offset in members:
        extra = (
            pack("<HHQQQ", 1, 24, size, packed, offset) if max(size, packed, offset) >= 0xFFFFFFFF else b""
        )
        three = (0xFFFFFFFF,) * 3 if extra else (packed, size, offset)
        entries.append(
            pack(
                "<4sHHHHHHIIIHHHHHII",
                *(
                    b"PK\1\2",
                    45,
                    45,
                    0,
                    method,
                    0,
                    0x5A21,
                    crc,
                    *three[:2],
                    len(name),
                    len(extra),
                    0,
                    0,
                    0,
                    0,
                ),
                three[2],
            )
            + name
            + extra
        )
    body = b"".join(entries)
    count = len(members)
    end64 = pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(body), start)
    locator = pack("<4sIQI", b"PK\6\7", 0, start + len(body), 1)
    end = pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), 0xFFFFFFFF, 0xFFFFFFFF, 0
    )
    return body + end64 + locator + end


def wide_rows(seed: int, size: int) -> Iterator[bytes]:
    """Lines of a number, a day and a long note, about 4 KB each, of about `size` bytes together."""
    chance = random.Random(seed)
    made = 0
    while made < size:
        note = " ".join(f"{chance.choice(_WORDS)}-{chance.randrange(300)}" for _ in range(400))
        line = f'{chance.randrange(10**9)},2026-01-01,a,b,c,1,EUR,"{note}",-\n'.encode()
        made += len(line)
        yield line


def one_member(scratch: Path, size: int, name: bytes = b"orders.csv", rows: Rows = csv_rows) -> Made:
    """An archive with one deflated CSV of about `size` bytes."""
    piece = b"".join(rows(1, min(PIECE, size)))
    count = max(1, round(size / len(piece)))
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    first = deflate.compress(HEADER) + deflate.flush(zlib.Z_FULL_FLUSH)
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    packed_piece = deflate.compress(piece) + deflate.flush(zlib.Z_FULL_FLUSH)
    crc = isal_zlib.crc32(HEADER)
    for _ in range(count):
        crc = isal_zlib.crc32(piece, crc)
    whole, packed = len(HEADER) + count * len(piece), len(first) + count * len(packed_piece) + len(_END)
    head = local_header(name, 8, packed, whole, crc) + first
    start = len(head) - len(first) + packed
    tail = _END + directory_of([(name, 8, packed, whole, crc, 0)], start)
    parts = [("head", head, 1), ("piece", packed_piece, count), ("tail", tail, 1)]
    for part, data, _ in parts:
        (scratch / part).write_bytes(data)
    layout = [(scratch / part, times) for part, _, times in parts]
    total = sum(int(line.partition(b",")[0]) for line in piece.splitlines()) * count
    return Made(layout, whole, crc, piece.count(b"\n") * count, packed, total)


def many_members(scratch: Path, count: int, size: int) -> Made:
    """An archive with `count` deflated CSVs of about `size` bytes each, of 20 kinds."""
    kinds = []
    for kind in range(20):
        data = HEADER + b"".join(csv_rows(kind, size))[:size]
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        kinds.append((data, deflate.compress(data) + deflate.flush(), zlib.crc32(data)))
    members, at, total = [], 0, 0
    path = scratch / "many.zip"
    with path.open("wb") as file:
        for number in range(count):
            data, packed, crc = kinds[number % len(kinds)]
            name = b"part-%05d.csv" % number
            file.write(local_header(name, 8, len(packed), len(data), crc) + packed)
            members.append((name, 8, len(packed), len(data), crc, at))
            at, total = file.tell(), total + len(data)
        file.write(directory_of(members, at))
    return Made([(path, 1)], total, members[-1][4], count, at)


def written(made: Made, path: Path) -> Path:
    """The archive as a file."""
    with path.open("wb") as file:
        for part, count in made.layout:
            data = part.read_bytes()
            for _ in range(count):
                file.write(data)
    return path
