"""ZIP archives by hand: every field may lie. The oracle for what is right is CPython's zipfile."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from flowlane import FlowlaneError, ZipLimits
from flowlane.streams.zip.directory import Directory
from flowlane.streams.zip.end import TAIL, check_head, find_end
from flowlane.streams.zip.entry import DEFLATE, STORED, Entry

FULL32 = 0xFFFFFFFF
FULL16 = 0xFFFF


class Made(msgspec.Struct):
    """One member, and what its directory entry says where that is not the truth."""

    name: bytes
    data: bytes = b""
    method: int = STORED
    flags: int = 0
    extra: bytes = b""
    comment: bytes = b""
    needed: int = 20
    disk: int = 0
    attributes: int = 0
    offset: int | None = None
    packed: int | None = None
    size: int | None = None
    cipher: bytes = b""  #: what is stored instead of the data
    large: Sequence[str] = ()  #: of size, packed, offset: those that are in a ZIP64 extra field

    @property
    def body(self) -> bytes:
        if self.method != DEFLATE:
            return self.cipher or self.data
        return deflated(self.data)


@lru_cache(maxsize=4)  # it is asked for by the header and by the directory, and members may be alike
def deflated(data: bytes) -> bytes:
    """`data` as a raw deflate stream."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    return deflate.compress(data) + deflate.flush()


def local(made: Made) -> bytes:
    """The local header and the data."""
    crc, body = zlib.crc32(made.data), made.body
    head = struct.pack(
        "<4s5H3L2H",
        b"PK\3\4",
        made.needed,
        made.flags,
        made.method,
        0,
        33,
        crc,
        len(body),
        len(made.data),
        len(made.name),
        0,
    )
    return head + made.name + body


def record(made: Made, offset: int) -> bytes:
    """Its entry in the directory."""
    values = {
        "size": len(made.data) if made.size is None else made.size,
        "packed": len(made.body) if made.packed is None else made.packed,
        "offset": offset if made.offset is None else made.offset,
    }
    field = b"".join(struct.pack("<Q", values[name]) for name in values if name in made.large)
    shown = {name: FULL32 if name in made.large else value for name, value in values.items()}
    extra = (struct.pack("<2H", 1, len(field)) + field if made.large else b"") + made.extra
    return (
        struct.pack(
            "<4s6H3L5H2L",
            b"PK\1\2",
            20,
            made.needed,
            made.flags,
            made.method,
            0,
            33,
            zlib.crc32(made.data),
            shown["packed"],
            shown["size"],
            len(made.name),
            len(extra),
            len(made.comment),
            made.disk,
            0,
            made.attributes,
            shown["offset"],
        )
        + made.name
        + extra
        + made.comment
    )


def end(
    count: int,
    size: int,
    offset: int,
    *,
    comment: bytes = b"",
    disk: int = 0,
    first_disk: int = 0,
    here: int | None = None,
) -> bytes:
    """The end record."""
    here = count if here is None else here
    return (
        struct.pack("<4s4H2LH", b"PK\5\6", disk, first_disk, here, count, size, offset, len(comment))
        + comment
    )


def end64(count: int, size: int, offset: int, at: int, *, disks: int = 1, more: bytes = b"") -> bytes:
    """ZIP64's end record, which is at byte `at`, with extensible data, and its locator."""
    length = 44 + len(more)
    head = struct.pack("<4sQ2H2L4Q", b"PK\6\6", length, 45, 45, 0, 0, count, count, size, offset)
    return head + more + struct.pack("<4sLQL", b"PK\6\7", 0, at, disks)


def directory(members: Sequence[Made]) -> tuple[bytes, bytes]:
    """The members, and the directory behind them."""
    data, entries = b"", b""
    for made in members:
        entries += record(made, len(data))
        data += local(made)
    return data, entries


def archive(
    members: Sequence[Made], *, comment: bytes = b"", prefix: bytes = b"", suffix: bytes = b""
) -> bytes:
    """A whole archive."""
    data, entries = directory(members)
    return prefix + data + entries + end(len(members), len(entries), len(data), comment=comment) + suffix


def archive64(
    members: Sequence[Made], saturated: Sequence[str], *, prefix: bytes = b"", more: bytes = b""
) -> bytes:
    """A whole archive with ZIP64's end record, where alone stand those of ``count``, ``size`` and ``offset``
    that are in `saturated`."""
    data, entries = directory(members)
    values = {"count": len(members), "size": len(entries), "offset": len(data)}
    shown = {
        name: (FULL16 if name == "count" else FULL32) if name in saturated else value
        for name, value in values.items()
    }
    large = end64(values["count"], values["size"], values["offset"], len(data) + len(entries), more=more)
    return prefix + data + entries + large + end(shown["count"], shown["size"], shown["offset"])


def encrypted(name: bytes, data: bytes, password: bytes) -> Made:
    """A stored member under ZipCrypto (APPNOTE 6.3.10, section 6.1), whose directory tells the truth."""
    keys = [0x12345678, 0x23456789, 0x34567890]

    def step(byte: int) -> None:
        keys[0] = ~zlib.crc32(bytes([byte]), ~keys[0] & 0xFFFFFFFF) & 0xFFFFFFFF
        keys[1] = ((keys[1] + (keys[0] & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = ~zlib.crc32(bytes([keys[1] >> 24]), ~keys[2] & 0xFFFFFFFF) & 0xFFFFFFFF

    def pack(byte: int) -> int:
        half = (keys[2] | 2) & 0xFFFF
        packed = byte ^ ((half * (half ^ 1)) >> 8 & 0xFF)
        step(byte)
        return packed

    for byte in password:
        step(byte)
    head = bytes(11) + bytes([zlib.crc32(data) >> 24])
    return Made(name, data, flags=1, cipher=bytes(pack(byte) for byte in head + data))


def read(data: bytes, limits: ZipLimits | None = None, *, block: int = 1 << 30) -> list[Entry]:
    """The entries of the archive `data`, its directory fed in blocks of so many bytes."""
    found = find_end(data[-TAIL:], len(data))
    if found.prefix:
        check_head(data[:4])
    reading = Directory(found, limits or ZipLimits())
    for at in range(found.start, found.start + found.size, block):
        reading.feed(data[at : min(at + block, found.start + found.size)])
    return reading.close()


def outcome(data: bytes, limits: ZipLimits | None = None) -> list[Entry] | str:
    """What ``read`` gives, or says; anything but a typed error in one line passes through."""
    try:
        return read(data, limits)
    except FlowlaneError as error:
        if "\n" in str(error):
            raise AssertionError(str(error)) from error
        return str(error)


def told(entries: Sequence[Entry]) -> list[tuple[str, int, int, int, int, int]]:
    """What there is to say of each entry that zipfile says, too."""
    return [(e.name, e.offset, e.packed, e.size, e.crc, e.method) for e in entries]


def oracle(data: bytes) -> list[tuple[str, int, int, int, int, int]]:
    """As ``told``, by CPython's zipfile."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return [
            (i.orig_filename, i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type)
            for i in opened.infolist()
        ]
