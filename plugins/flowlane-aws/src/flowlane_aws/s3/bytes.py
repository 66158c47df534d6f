"""Bytes and parts, without S3: what is sent, what it is known by, and how it is known again."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import msgspec

from flowlane.streams.members import inflater

#: A part other than the last must have this many bytes (the S3 user guide, "Multipart upload limits").
SMALLEST: Final = 5 << 20
_MD5: Final = re.compile("[0-9a-f]{32}")


class Part(msgspec.Struct, frozen=True):
    """One part as S3 confirmed it. ``etag`` has no quotes; ``crc`` is its CRC-32 as S3 writes it (base64 of
    the big-endian number), empty where the server does not say."""

    number: int
    size: int
    etag: str
    crc: str = ""


def composite(parts: Sequence[Part]) -> str:
    """The ETag of the object that `parts` make, as S3 computes it: the MD5 of the parts' MD5s; empty where
    ETags are no MD5s (objects encrypted by a key of KMS)."""
    found = [_MD5.fullmatch(part.etag) for part in parts]
    digests = [bytes.fromhex(match[0]) for match in found if match]
    if not parts or len(digests) < len(parts):
        return ""
    return f'"{hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()}-{len(parts)}"'


def taken(parts: Sequence[Part], position: int) -> list[Part]:
    """The first of `parts` that make exactly `position` bytes; none if no number of them does. What
    lacks a part, or has a short one, is nothing to go on from: only the last one may be short."""
    kept: list[Part] = []
    size = 0
    for part in parts:
        if size == position or part.size < SMALLEST or part.number != len(kept) + 1:
            break
        kept.append(part)
        size += part.size
    return kept if size == position else []


def pin_of(parts: Sequence[Part]) -> str:
    """What tells these parts from any others that make as many bytes."""
    return hashlib.blake2b("".join(part.etag for part in parts).encode(), digest_size=6).hexdigest()


class Comparison:
    """Whether an object, read from its beginning, is made of the bytes that ``parts`` have; for a thread.

    By each part's CRC-32 and, where that is not known, the MD5 in its ETag; a part that has neither is taken
    for another one.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._left = list(reversed(parts))
        self._begin()
        self.same = True

    def _begin(self) -> None:
        self._part = self._left.pop() if self._left else None
        self._size = self._part.size if self._part else 0
        self._crc = 0
        self._md5 = hashlib.md5(usedforsecurity=False)

    def feed(self, block: bytes) -> None:
        """The object goes on with `block`."""
        view = memoryview(block)
        while view and self.same:
            if self._part is None:
                self.same = False  # longer than the parts
                return
            piece, view = view[: self._size], view[self._size :]
            self._size -= len(piece)
            if self._part.crc:
                self._crc = zlib.crc32(piece, self._crc)
            else:
                self._md5.update(piece)
            if not self._size:
                self.same = self._fits(self._part)
                self._begin()

    def close(self) -> bool:
        """Whether all of it was the same, to its end."""
        return self.same and self._part is None

    def _fits(self, part: Part) -> bool:
        if part.crc:
            return base64.b64decode(part.crc) == self._crc.to_bytes(4, "big")
        return part.etag == self._md5.hexdigest()


def crc_of(blocks: Sequence[bytes]) -> str:
    """The CRC-32 of `blocks`, one after the other, as S3 writes it."""
    crc, crc32 = 0, inflater().crc32
    for block in blocks:
        crc = crc32(block, crc)
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


class Blocks(io.RawIOBase):
    """Blocks of bytes as one file to be read, as the SDK wants a body; they are never joined."""

    def __init__(self, blocks: Sequence[bytes]) -> None:
        super().__init__()
        self._blocks = [block for block in blocks if block]
        self._ends = list(accumulate(map(len, self._blocks)))
        self.size = self._ends[-1] if self._ends else 0
        self._at = 0

    def readable(self) -> bool:
        """See ``io.IOBase``."""
        return True

    def seekable(self) -> bool:
        """See ``io.IOBase``: a request that is sent again is read again."""
        return True

    def tell(self) -> int:
        """See ``io.IOBase``."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See ``io.IOBase``."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes (any number: all that is left); without a copy where that is a whole block."""
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        number = bisect_right(self._ends, self._at)
        if number == len(self._ends):
            return b""
        block = self._blocks[number]
        first = self._at - (self._ends[number] - len(block))
        piece = block[first : first + size]
        self._at += len(piece)
        return piece
