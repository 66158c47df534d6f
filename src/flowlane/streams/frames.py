"""Zstandard frames by the block: no I/O, and no piece of output larger than asked for.

The ``zstandard`` package decodes whatever it is given in one go, and four bytes of zstd may stand for 128 KiB
(RFC 8878, section 3.1.1.2.2, RLE blocks). So the frames are walked here, block by block, and the package is
given no more at a time than may decode to one piece. The walk also knows where a frame ends, and so whether a
body was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import zstandard

from flowlane.errors import Damaged
from flowlane.streams.preview import preview

#: A frame may ask for this much memory to be decoded, as for the ``zstd`` command (its ``--long=27``).
MAX_WINDOW: Final = 128 << 20

_MAGIC: Final = b"\x28\xb5\x2f\xfd"  # RFC 8878, section 3.1.1
_SKIPPABLE: Final = b"\x2a\x4d\x18"  # behind 0x50..0x5f: section 3.1.2
_MAX_BLOCK: Final = 128 << 10  # no block decodes to more: section 3.1.1.2.4
_RAW, _RLE, _COMPRESSED = 0, 1, 2


class Zstd:
    """A multi-frame zstd decoder; skippable frames are skipped."""

    def __init__(self, *, piece: int = 2 * _MAX_BLOCK) -> None:
        self._piece = max(piece, _MAX_BLOCK)
        self._frames = 0
        self._step: Callable[[], Iterator[bytes]] = self._magic
        self._need = 4  # bytes that the next step wants at hand
        self._held = bytearray()
        self._skip = 0
        self._ready = bytearray()  # walked, not yet decoded
        self._worth = 0  # the most that `_ready` may decode to
        self._view = memoryview(b"")  # what is left of the block in hand

    def feed(self, block: bytes) -> Iterator[bytes]:
        """See ``inflate.Decoder.feed``."""
        self._view = memoryview(block)
        while self._view:
            if self._skip:
                taken = min(self._skip, len(self._view))
                self._skip -= taken
            else:
                taken = min(self._need - len(self._held), len(self._view))
                self._held += self._view[:taken]
            self._view = self._view[taken:]
            if not self._skip and len(self._held) == self._need:
                yield from self._step()

    def close(self) -> None:
        """See ``inflate.Decoder.close``."""
        if self._step != self._magic or self._held or self._skip:
            raise Damaged(f"cut: the zstd body ends inside frame {self._frames + 1}")
        if not self._frames:
            raise Damaged("not zstd: there is no frame in it")

    def _then(self, step: Callable[[], Iterator[bytes]], need: int) -> None:
        self._held.clear()
        self._step, self._need = step, need

    def _magic(self) -> Iterator[bytes]:
        head = bytes(self._held)
        if head[0] >> 4 == 5 and head[1:] == _SKIPPABLE:
            self._then(self._skippable, 4)
        elif head == _MAGIC:
            context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
            self._decompress: Any = context.decompressobj(write_size=_MAX_BLOCK)
            self._ready += head
            self._then(self._descriptor, 1)
        else:
            seen = preview(head + self._view[:40])
            if self._frames:
                raise Damaged(f"damaged: {seen} behind the end of zstd frame {self._frames}")
            raise Damaged(f"not zstd: it begins with {seen}")
        yield from ()

    def _skippable(self) -> Iterator[bytes]:
        self._skip = int.from_bytes(self._held, "little")
        self._then(self._magic, 4)
        yield from ()

    def _descriptor(self) -> Iterator[bytes]:
        """Frame_Header_Descriptor (section 3.1.1.1.1) says how long the rest of the header is."""
        flags = self._held[0]
        single = flags >> 5 & 1
        self._checksum = flags >> 2 & 1
        rest = (1 - single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]
        self._ready += self._held
        self._then(self._header, rest)
        yield from ()

    def _header(self) -> Iterator[bytes]:
        self._ready += self._held
        self._then(self._block, 3)
        yield from ()

    def _block(self) -> Iterator[bytes]:
        """Block_Header (section 3.1.1.2): last block, type and size in 3 bytes."""
        head = int.from_bytes(self._held, "little")
        self._last, kind, size = head & 1, head >> 1 & 3, head >> 3
        if size > _MAX_BLOCK or kind > _COMPRESSED:
            raise Damaged(f"damaged: zstd frame {self._frames + 1} holds a block of an impossible kind")
        worth = _MAX_BLOCK if kind == _COMPRESSED else size
        if self._worth + worth > self._piece:
            yield from self._decode()
        self._worth += worth
        self._ready += self._held
        content = 1 if kind == _RLE else size
        self._then(self._content, content)
        if not content:
            yield from self._content()

    def _content(self) -> Iterator[bytes]:
        self._ready += self._held
        if not self._last:
            self._then(self._block, 3)
        elif self._checksum:
            self._then(self._end, 4)
        else:
            self._held.clear()
            yield from self._end()

    def _end(self) -> Iterator[bytes]:
        self._ready += self._held
        yield from self._decode()
        if not self._decompress.eof:
            raise Damaged(f"damaged: zstd frame {self._frames + 1} does not end where its blocks do")
        self._frames += 1
        self._then(self._magic, 4)

    def _decode(self) -> Iterator[bytes]:
        try:
            out = self._decompress.decompress(bytes(self._ready))
        except zstandard.ZstdError as error:
            raise Damaged(f"damaged or undecodable: zstd frame {self._frames + 1}: {error}") from None
        self._ready.clear()
        self._worth = 0
        if out:
            yield out
