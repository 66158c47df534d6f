"""The end record of a ZIP archive, out of its last bytes: where the directory lies, and how long it is.

Structures are those of PKWARE's APPNOTE 6.3.10 (sections in parentheses).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from flowlane.errors import Damaged
from flowlane.streams.preview import preview

_END: Final = struct.Struct("<4s4H2LH")  # 4.3.16
_LOCATOR: Final = struct.Struct("<4sLQL")  # 4.3.15
_END64: Final = struct.Struct("<4sQ2H2L4Q")  # 4.3.14

#: The end record, with the longest comment, and the two records that ZIP64 puts before it.
TAIL: Final = _END.size + 0xFFFF + _LOCATOR.size + _END64.size

#: Bytes of the fixed part of an entry of the directory (4.3.12).
RECORD: Final = 46

#: How far before its locator a ZIP64 end record with additional data may begin.
_EXTENSIBLE: Final = 1024


@dataclass(frozen=True, slots=True)
class End:
    """What the end record says, checked against itself and the object's size: the directory's entries are
    the bytes [start, start + size) of the object."""

    start: int
    size: int
    count: int
    wraps: bool  #: whether `count` is modulo 2^16, as some write it who know no ZIP64
    prefix: int  #: bytes before the archive, by which its offsets are too small
    disk: int  #: the number of the volume


def find_end(tail: bytes, size: int) -> End:
    """The end record in `tail`, which is the last ``TAIL`` bytes (or all) of an object of `size` bytes.

    Its signature may also occur in a comment, a name or what is stored: the record is the one that fits. One
    whose comment ends where the object does goes before one with something behind it.

    Raises:
        Damaged: no record fits: not a zip, cut, or one volume of several; or more than one does.
    """
    reason = ""
    whole: list[End] = []
    followed: list[End] = []
    for at, behind in _records(tail):
        found = _end(tail, size - len(tail), at)
        if isinstance(found, str):
            reason = reason or found
        else:
            (followed if behind else whole).append(found)
    if len(whole) > 1:
        raise Damaged(
            "two end records fit, one of them in the comment of the other, and which one is meant cannot be "
            "told: pack it again, without a comment"
        )
    if whole or followed:
        return (whole or followed)[0]
    raise Damaged(reason or _none(tail, size))


def _none(tail: bytes, size: int) -> str:
    """What is said of an object without an end record: an error page in place of a zip is told by how it
    begins, where that is known."""
    if not size:
        return "not a zip, or cut: it is empty"
    begins = f": it begins with {preview(tail)}" if len(tail) == size else ""
    return f"not a zip, or cut: there is no whole end record in its last {len(tail):,} bytes{begins}"


def _records(tail: bytes) -> Iterator[tuple[int, int]]:
    """Where an end record may begin in `tail`, from the end, and how many bytes would be behind it."""
    for at in _found(tail, b"PK\5\6"):
        comment = int.from_bytes(tail[at + 20 : at + 22], "little")
        behind = len(tail) - at - _END.size - comment
        if behind >= 0:
            yield at, behind


def check_head(head: bytes) -> None:
    """`head` is how an object begins that has bytes before the archive (``End.prefix``).

    Raises:
        Damaged: it begins as an archive does: what was found at its end is an archive within that one, the
            rest of which is missing; or one that was appended to it.
    """
    if head.startswith(b"PK\3\4"):
        raise Damaged(
            "the directory at its end does not reach back to its beginning, where another archive begins: "
            "it is cut, or two archives in one file"
        )


def _found(tail: bytes, signature: bytes) -> Iterator[int]:
    """Where `signature` occurs, from the end."""
    at = tail.rfind(signature)
    while at >= 0:
        yield at
        at = tail.rfind(signature, 0, at + len(signature) - 1)


def _end(tail: bytes, base: int, at: int) -> End | str:
    """What the end record at `tail[at]` (byte ``base + at`` of the object) says, or why it is none."""
    _, disk, first_disk, here, count, size, offset, _ = _END.unpack_from(tail, at)
    large = _end64(tail, base, at)
    if isinstance(large, End):
        return large
    start = base + at - size
    small = _fitting(tail, base, End(start, size, count, True, start - offset, disk), first_disk, here)
    return small if isinstance(small, End) else large or small


def _end64(tail: bytes, base: int, at: int) -> End | str:
    """What the ZIP64 end record that belongs to the end record at `tail[at]` says; why there is none, or
    nothing where there is no locator."""
    found = at - _LOCATOR.size
    if found < 0 or not tail.startswith(b"PK\6\7", found):
        return ""
    _, locator_disk, _, disks = _LOCATOR.unpack_from(tail, found)
    for place in _found(tail[max(0, found - _EXTENSIBLE) : found], b"PK\6\6"):
        record = place + max(0, found - _EXTENSIBLE)
        if record + _END64.size > found:
            continue
        _, length, _, _, disk, first_disk, here, count, size, offset = _END64.unpack_from(tail, record)
        if record + 12 + length != found:
            continue
        if disks > 1 or locator_disk != disk:
            return _split(disks - 1)
        start = base + record - size
        return _fitting(tail, base, End(start, size, count, False, start - offset, disk), first_disk, here)
    return "damaged: its ZIP64 end record is not where it must be, before the locator"


def _fitting(tail: bytes, base: int, end: End, first_disk: int, here: int) -> End | str:
    """`end`, or what in it cannot be; all but its first bytes is judged by the entries themselves."""
    if end.disk != first_disk or (end.disk and end.count != here):
        return _split(end.disk)
    if end.count != here:
        return f"damaged: it claims {end.count:,} entries, and that {here:,} of them are in it"
    early = -min(end.start, end.prefix)
    if early > 0:
        return f"damaged or cut: its directory of {end.size:,} bytes would lie {early:,} bytes too far ahead"
    if end.count * RECORD > end.size:
        return f"damaged: its directory claims {end.count:,} entries in {end.size:,} bytes"
    at = end.start - base
    if end.size and at >= 0 and tail[at : at + 4] != b"PK\1\2":
        return (
            f"damaged: at byte {end.start:,}, where its directory must begin, is none (or an encrypted one)"
        )
    return end


def _split(disk: int) -> str:
    return f"volume {disk + 1} of a split archive: join its volumes first (zip -s 0)"
