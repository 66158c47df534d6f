"""Decoding encoded bodies by the block, and proving that they are whole: no I/O, bounded output.

Whatever is cut, damaged or not of the kind its name promises raises ``Damaged``. This is pure computation;
callers run it in a thread, one hop per large block: isal, zlib and zstandard release the GIL while they work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol
from urllib.parse import urlsplit

from flowlane.streams.members import Gzip


class Decoder(Protocol):
    """Turns the blocks of an encoded body into pieces of what they encode."""

    def feed(self, block: bytes) -> Iterator[bytes]:
        """The non-empty pieces (256 KiB at most) that `block` adds; use them up before the next block.

        Raises (while iterating):
            Damaged: the body is damaged, or of another kind.
        """
        ...

    def close(self) -> None:
        """Nothing more will come.

        Raises:
            Damaged: the body was empty, or ended before its end.
        """
        ...


class Plain:
    """The decoder of what is not encoded: every block is a piece, and any end will do."""

    def feed(self, block: bytes) -> Iterator[bytes]:
        """See ``Decoder.feed``."""
        if block:
            yield block

    def close(self) -> None:
        """See ``Decoder.close``; plain bytes prove nothing."""


def decoder(name: str) -> Decoder:
    """The decoder for the object called `name` (a name or a URL), by its suffix (``.gz``, ``.zst``)."""
    match _suffix(name):
        case "gz":
            return Gzip()
        case "zst":
            from flowlane.streams.frames import Zstd  # zstandard is loaded by those who need it

            return Zstd()
        case _:
            return Plain()


class Proof:
    """Follows a body that goes elsewhere untouched, decoding it and keeping nothing, to prove it whole.

    A bomb is harmless here: it costs the time to inflate it, never memory.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.encoded = 0  #: bytes fed
        self.decoded = 0  #: bytes they decode to

    def feed(self, block: bytes) -> None:
        """Follow the body through `block`. 1 MiB of GH Archive takes about 5 ms: call it in a thread.

        Raises:
            Damaged: the body is damaged, or of another kind.
        """
        for piece in self._decoder.feed(block):
            self.decoded += len(piece)
        self.encoded += len(block)

    def close(self) -> None:
        """The body has ended; returns if that proves it whole.

        Raises:
            Damaged: it was empty, or ended before its end.
        """
        self._decoder.close()


def prove(name: str) -> Proof | None:
    """The proof for the object called `name` (a name or a URL), by its suffix; ``None`` if bodies of that
    name have no proof in themselves (they are neither ``.gz`` nor ``.zst``)."""
    return Proof(decoder(name)) if _suffix(name) in ("gz", "zst") else None


def _suffix(name: str) -> str:
    path = urlsplit(name).path if "://" in name else name
    _, dot, suffix = path.rpartition(".")
    return suffix.lower() if dot else ""
