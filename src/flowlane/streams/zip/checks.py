"""Which entries are not read, and why: what an entry says of itself, and what entries say of each other."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Final

from msgspec.structs import force_setattr

from flowlane.errors import Refused
from flowlane.streams.zip.entry import (
    AES,
    BZIP2,
    DEFLATE,
    DEFLATE64,
    MASKED,
    PATCH,
    STORED,
    STRONG,
    Entry,
    ZipLimits,
)
from flowlane.streams.zip.names import objection

#: The fixed part of a local header (APPNOTE 6.3.10, section 4.3.7).
LOCAL: Final = 30

#: Methods of compression that are read.
READ: Final = frozenset({STORED, DEFLATE, DEFLATE64, BZIP2})
#: What others are called (section 4.4.5), for messages.
_NAMES: Final = {
    1: "shrink",
    2: "reduce",
    3: "reduce",
    4: "reduce",
    5: "reduce",
    6: "implode",
    10: "PKWARE implode",
    14: "LZMA",
    16: "IBM z/OS CMPSC",
    18: "IBM TERSE",
    19: "IBM LZ77 z",
    20: "zstd (deprecated)",
    93: "zstd",
    94: "MP3",
    95: "xz",
    96: "JPEG",
    97: "WavPack",
    98: "PPMd",
}

_SHARED: Final = "it shares its local header with another entry (overlapping entries)"


def refusal(entry: Entry, limits: ZipLimits, *, password: str | bytes | None = None) -> str:
    """Why `entry` is not read, as a phrase; empty if it may be. Depends on nothing but what is given: with
    other limits, or a password, the same entry may be read later."""
    return (
        entry.fault
        or objection(entry.name)
        or _kind(entry)
        or _encryption(entry, password)
        or _method(entry)
        or _sizes(entry, limits)
    )


def refuse(entry: Entry, limits: ZipLimits, *, password: str | bytes | None = None) -> None:
    """Raises:
    Refused: `entry` is not read, for the reason given.
    """
    reason = refusal(entry, limits, password=password)
    if reason:
        raise Refused(f"{entry} is not read: {reason}")


def _kind(entry: Entry) -> str:
    if entry.kind == "symlink":
        return "it is a symbolic link"
    if entry.kind == "directory" and (entry.size or entry.packed):
        return "it is a directory, and has content"
    return ""


def _encryption(entry: Entry, password: str | bytes | None) -> str:
    if entry.flags & PATCH:
        return "it is patched data (flag bit 5)"
    if entry.flags & (STRONG | MASKED):
        return "it has PKWARE's strong encryption: pack it with AES (AE-2) instead"
    if entry.encrypted and not password:
        return "it is encrypted: give its password"
    if entry.method == AES and not (entry.strength in (1, 2, 3) and entry.aes_version in (1, 2)):
        return f"its AES is of an unknown kind (strength {entry.strength}, version {entry.aes_version})"
    return ""


def _method(entry: Entry) -> str:
    method = entry.compression
    if method in READ:
        return ""
    called = f" ({_NAMES[method]})" if method in _NAMES else ""
    return f"its method of compression {method}{called} is not supported: pack it with deflate"


def _sizes(entry: Entry, limits: ZipLimits) -> str:
    if entry.size > limits.size:
        return f"it claims {entry.size:,} bytes, the limit is {limits.size:,} (ZipLimits.size)"
    if entry.size > entry.packed * limits.ratio:
        return (
            f"it claims {entry.size:,} bytes out of {entry.packed:,}, the limit is {limits.ratio:,} "
            "times as many (ZipLimits.ratio)"
        )
    if entry.method == STORED and not entry.encrypted and entry.size != entry.packed:
        return f"it is stored, with {entry.packed:,} bytes for {entry.size:,}"
    return ""


def place(entries: Sequence[Entry], directory: int) -> None:
    """Set the ``limit`` of each of `entries`, and the ``fault`` of those that overlap another one (as those
    of bombs do, CVE-2024-0450) or the directory, which begins at byte `directory`.

    An entry whose data, by the directory, reach over the next local header is at fault, and so are all
    entries that share one; the one that is reached into is not.
    """
    above: Entry | None = None
    following = directory
    for entry in sorted(entries, key=attrgetter("offset"), reverse=True):
        offset = entry.offset
        if offset >= directory or offset < 0:
            _blame(entry, "its local header would lie in the directory, or behind it")
            continue
        if above is not None and above.offset == offset:
            _blame(above, _SHARED)
            _blame(entry, _SHARED)
        elif above is not None:
            following = above.offset
        force_setattr(entry, "limit", following)
        if offset + LOCAL + len(entry.stored_name) + entry.packed > following:
            _blame(entry, "its data would reach into what follows them (overlapping entries)")
        above = entry


def _blame(entry: Entry, fault: str) -> None:
    if not entry.fault:
        force_setattr(entry, "fault", fault)


def refuse_total(entries: Sequence[Entry], limits: ZipLimits) -> None:
    """Raises:
    Refused: the members claim more bytes together than ``ZipLimits.total`` allows.
    """
    total = sum(entry.size for entry in entries if not entry.fault)
    if total > limits.total:
        raise Refused(
            f"its members claim {total:,} bytes together, the limit is {limits.total:,} (ZipLimits.total)"
        )
