"""The central directory of a ZIP archive, out of bytes: its entries.

The archive's end record says where the directory lies; the directory says all that is needed to read any one
member by itself. Structures are those of PKWARE's APPNOTE 6.3.10 (sections in parentheses).
"""

from __future__ import annotations

import struct
from typing import Any, Final

from flowlane.errors import Damaged, Refused
from flowlane.streams.zip import checks
from flowlane.streams.zip.end import End
from flowlane.streams.zip.entry import AES, Entry, Kind, ZipLimits
from flowlane.streams.zip.names import decode

#: 4.3.12, without the version made by, the time, the date and the internal attributes.
_RECORD: Final = struct.Struct("<4s2xBx2H4x3L4H2x2L")
_FIELD: Final = struct.Struct("<2H")  # 4.5.1

_FULL32: Final = 0xFFFFFFFF

#: The newest version of the format, 6.3 (4.4.3); CPython's zipfile has the same limit.
_NEWEST: Final = 63

_ZIP64: Final = 0x0001
_UNICODE_PATH: Final = 0x7075
_AES: Final = 0x9901

_SIGNATURE: Final = b"PK\5\5"  # of the directory (4.3.13): old, never checked by anybody


class Directory:
    """The entries of one directory, fed as blocks of its bytes in order.

    Takes no more memory than its entries do, of which there may be ``ZipLimits.entries``.

    Raises:
        Refused: there are more, or its size is beyond ``ZipLimits.directory``.
    """

    def __init__(self, end: End, limits: ZipLimits) -> None:
        if end.size > limits.directory:
            raise Refused(
                f"its directory has {end.size:,} bytes, the limit is {limits.directory:,} "
                "(ZipLimits.directory)"
            )
        self._end = end
        self._limits = limits
        self._held = b""
        self._used = 0
        self._entries: list[Entry] = []
        self._limit(end.count)

    def feed(self, block: bytes) -> None:
        """Read the entries that `block` completes: some 2 microseconds each.

        Raises:
            Damaged: what must be an entry is none.
            Refused: there are more than ``ZipLimits.entries``.
        """
        held = self._held + block if self._held else block
        entries, end = self._entries, self._end
        at, last = 0, len(held) - _RECORD.size
        while at <= last:
            fields = _RECORD.unpack_from(held, at)
            sign, needed, flags, method, crc, packed, size, named, more, said, _, attributes, offset = fields
            if sign != b"PK\1\2":
                if sign == _SIGNATURE:
                    break
                where = end.start + self._used + at
                raise Damaged(f"damaged: at byte {where:,} must be entry {len(entries)} of its directory")
            behind = at + _RECORD.size
            extra = behind + named
            following = extra + more + said
            if following > len(held):
                break
            raw = held[behind:extra]
            if not more and method != AES and needed <= _NEWEST and not end.disk and raw.isascii():
                # As most are, and nothing that is looked at elsewhere would be found: at half the price.
                name = raw.decode("ascii")
                kind = _kind(name, attributes, size)
                entry = Entry(len(entries), name, offset + end.prefix, packed, size, crc, method, flags, kind)
            else:
                entry = _entry(len(entries), fields, raw, held[extra : extra + more], end)
            entries.append(entry)
            at = following
        self._held = held[at:]
        self._used += at
        self._limit(len(entries))

    def close(self) -> list[Entry]:
        """All entries, in the directory's order, each with its ``limit`` and, if it overlaps, its ``fault``.

        Raises:
            Damaged: the directory's end is not where the last entry's is, or they are not as many as it says.
            Refused: the members together are beyond ``ZipLimits.total``.
        """
        left, entries, end = self._held, self._entries, self._end
        signed = left.startswith(_SIGNATURE) and 6 + int.from_bytes(left[4:6], "little") == len(left)
        if self._used + len(left) != end.size or (left and not signed):
            raise Damaged(
                f"damaged: its directory of {end.size:,} bytes does not end with an entry, but "
                f"{len(left):,} bytes behind entry {len(entries) - 1}"
            )
        if len(entries) != end.count and not (end.wraps and len(entries) % 0x10000 == end.count):
            raise Damaged(f"damaged: its directory has {len(entries):,} entries and claims {end.count:,}")
        checks.place(entries, end.start)
        checks.refuse_total(entries, self._limits)
        return entries

    def _limit(self, count: int) -> None:
        if count > self._limits.entries:
            raise Refused(
                f"it has {count:,} entries or more, the limit is {self._limits.entries:,} (ZipLimits.entries)"
            )


def _entry(index: int, fields: tuple[Any, ...], raw: bytes, extra: bytes, end: End) -> Entry:
    """One entry of the directory, with what is wrong with it by itself."""
    _, needed, flags, method, crc, packed, size, _, _, _, disk, attributes, offset = fields
    known: dict[int, bytes] = {}
    fault = _extra(extra, known) if extra else ""
    name, unreadable = decode(raw, flags, known.get(_UNICODE_PATH, b""))
    if _FULL32 in (size, packed, offset) and _ZIP64 in known:
        try:
            size, packed, offset = _large(known[_ZIP64], size, packed, offset)
        except ValueError:
            fault = fault or "its ZIP64 extra field is too short"
    aes = known.get(_AES, b"") if method == AES else b""
    if method == AES and len(aes) < 7:
        fault = fault or "its AES extra field is missing or too short"
        aes = bytes(7)
    if needed > _NEWEST:
        fault = fault or f"it needs version {needed / 10} of the format, the newest known is {_NEWEST / 10}"
    if end.disk and disk != end.disk:  # where there is one volume only, whatever they write means that one
        fault = fault or f"it begins on volume {disk + 1} of a split archive: join its volumes first"
    return Entry(
        index,
        name,
        offset + end.prefix,
        packed,
        size,
        crc,
        method,
        flags,
        _kind(name, attributes, size),
        b"" if name.encode() == raw else raw,
        aes[4] if aes else 0,
        int.from_bytes(aes[5:7], "little"),
        int.from_bytes(aes[:2], "little"),
        fault=fault or unreadable,
    )


def _kind(name: str, attributes: int, size: int) -> Kind:
    """By the attributes of Unix (upper half, ``st_mode``) and MS-DOS (bit 4), and by the name."""
    mode = attributes >> 28
    if mode == 0xA:
        return "symlink"
    # An attribute alone hides no content: whoever lists files would pass over it.
    if name.endswith("/") or (not size and (mode == 0x4 or attributes & 0x10)):
        return "directory"
    return "file"


def _extra(extra: bytes, known: dict[int, bytes]) -> str:
    """The extra fields in `extra` into `known`, the first of each kind; what is wrong with them."""
    at = 0
    while at + 4 <= len(extra):  # fewer bytes than a field has are padding
        kind, length = _FIELD.unpack_from(extra, at)
        at += 4
        if at + length > len(extra):
            return f"its extra field {kind:#06x} is longer than all of them together"
        known.setdefault(kind, extra[at : at + length])
        at += length
    return ""


def _large(field: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """The values of which the ZIP64 extra field holds those that do not fit, in this order (4.5.3).

    Raises:
        ValueError: it does not.
    """
    values = [size, packed, offset]
    at = 0
    for number, value in enumerate(values):
        if value == _FULL32:
            if at + 8 > len(field):
                raise ValueError(field)
            values[number] = int.from_bytes(field[at : at + 8], "little")
            at += 8
    return values[0], values[1], values[2]
