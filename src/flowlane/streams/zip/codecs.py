"""What a member's data is packed in: stored, deflate, deflate64 and bzip2, each also encrypted. No I/O.

All of it is pushed, and bounded: a codec is fed what there is and gives what that makes. stream-unzip pulls,
so it is asked for no more than it alone can do, decrypting (see ``Decrypting``), and loaded for that alone.
"""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterator
from struct import Struct
from typing import Any, Final, Protocol

from flowlane.errors import Damaged, Refused
from flowlane.streams.members import inflater
from flowlane.streams.zip.entry import AES, BZIP2, DEFLATE, DEFLATE64, DESCRIPTOR, ENCRYPTED, STORED, Entry

_SLICE: Final = 64 << 10

#: stream-inflate keeps the interpreter to itself from one piece to the next, at about 2 MB/s.
_INFLATE64_PIECE: Final = 8 << 10
_INFLATE64_SLICE: Final = 64
#: It gives nothing for up to 65,536 literals, which take some 8 bits each. What takes more input than that is
#: a code that has no end, over which it becomes slower with every bit: some 20 s of a thread up to here, no
#: more than some milliseconds of them at a time.
_INFLATE64_PATIENCE: Final = 72 << 10

_LOCAL: Final = Struct("<4sHHHHHIIIHH")
_SATURATED: Final = 0xFFFFFFFF


class Codec(Protocol):
    """Turns packed data into pieces of what is packed in it."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The non-empty pieces that `data` adds; use them up before more is fed.

        Raises (while iterating):
            Damaged: it is not packed as it is said to be.
            Refused: the password is wrong.
        """
        ...

    def close(self) -> None:
        """Nothing more will come.

        Raises:
            Damaged: what is packed goes on.
        """
        ...


class Stored:
    """Data as it is."""

    def __init__(self, piece: int) -> None:
        self._piece = piece

    def feed(self, data: bytes) -> Iterator[bytes]:
        """See ``Codec.feed``."""
        if len(data) <= self._piece:
            if data:
                yield data
            return
        for at in range(0, len(data), self._piece):
            yield data[at : at + self._piece]

    def close(self) -> None:
        """See ``Codec.close``; any end will do."""


class Deflate:
    """RFC 1951, by isal or zlib."""

    def __init__(self, piece: int, name: str = "") -> None:
        self._engine = inflater(name)
        self._piece = piece
        self._inflate = self._engine.decompressobj(-15)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """See ``Codec.feed``."""
        inflate, piece, at = self._inflate, self._piece, 0
        while at < len(data):
            if inflate.eof:
                raise _early("deflate", len(data) - at)
            # The inflater copies what it has not used yet, after every piece: short slices keep that small.
            part: Any = data[at : at + _SLICE]
            at += len(part)
            while True:
                try:
                    out = inflate.decompress(part, piece)
                except self._engine.error as error:
                    raise Damaged(f"its deflate stream is damaged: {error}") from None
                if out:
                    yield out
                part = inflate.unconsumed_tail
                # A full piece may leave more inside the inflater, with no input left to show for it.
                if inflate.eof or (not part and len(out) < piece):
                    break
            if inflate.eof and inflate.unused_data:
                raise _early("deflate", len(inflate.unused_data) + len(data) - at)

    def close(self) -> None:
        """See ``Codec.close``."""
        if not self._inflate.eof:
            raise _late("deflate")


class Bzip2:
    """One bzip2 stream."""

    def __init__(self, piece: int) -> None:
        self._piece = piece
        self._inflate = bz2.BZ2Decompressor()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """See ``Codec.feed``."""
        inflate = self._inflate
        if data and inflate.eof:
            raise _early("bzip2", len(data))
        while not inflate.eof:
            try:
                out = inflate.decompress(data, self._piece)
            except OSError as error:
                raise Damaged(f"its bzip2 stream is damaged: {error}") from None
            if out:
                yield out
            elif inflate.needs_input:
                return
            data = b""
        if inflate.unused_data:
            raise _early("bzip2", len(inflate.unused_data))

    def close(self) -> None:
        """See ``Codec.close``."""
        if not self._inflate.eof:
            raise _late("bzip2")


class Deflate64:
    """Deflate with a window of 64 KiB (method 9), by stream-inflate."""

    def __init__(self) -> None:
        from stream_inflate import stream_inflate64  # type: ignore[import-untyped]

        self._pieces: Callable[[tuple[bytes]], Iterator[bytes]]
        self._pieces, self._ended, self._unused = stream_inflate64(chunk_size=_INFLATE64_PIECE)
        self._quiet = 0  # bytes fed since the last output

    def feed(self, data: bytes) -> Iterator[bytes]:
        """See ``Codec.feed``."""
        for at in range(0, len(data), _INFLATE64_SLICE):
            if self._ended():
                raise _early("deflate64", len(data) - at)
            part = data[at : at + _INFLATE64_SLICE]
            self._quiet += len(part)
            if self._quiet > _INFLATE64_PATIENCE:
                raise Damaged("its deflate64 stream is damaged: a code without an end")
            for piece in self._inflated(part):
                self._quiet = 0
                yield piece
            if self._ended() and (unused := self._unused()):
                raise _early("deflate64", unused + len(data) - at - len(part))

    def _inflated(self, part: bytes) -> Iterator[bytes]:
        try:
            yield from self._pieces((part,))
        except Exception as error:  # noqa: BLE001  # whatever its tables stumble over: it checks none of them
            raise Damaged(f"its deflate64 stream is damaged: {str(error) or type(error).__name__}") from None

    def close(self) -> None:
        """See ``Codec.close``."""
        if not self._ended():
            raise _late("deflate64")


class Decrypting:
    """What is encrypted, decrypted by stream-unzip and unpacked by another codec.

    stream-unzip is shown a local header of a member that is stored, and encrypted as this one is: so it
    checks the password, decrypts and (AES) authenticates, and leaves the rest to those who know the
    directory. It pulls: an empty block tells it that there is nothing yet, and comes back through it as an
    empty piece. Only while it gathers a field of fixed length it would ask for ever, so the first and the
    last bytes of the data are handed to it in one go.
    """

    def __init__(self, entry: Entry, header: bytes, password: bytes, inner: Codec) -> None:
        self._entry = entry
        self._inner = inner
        self._aes = entry.method == AES
        #: Salt and verification of the password; or ZipCrypto's random bytes.
        self._front = 4 + 4 * entry.strength + 2 if self._aes else 12
        self._back = 10 if self._aes else 0  # authentication code
        self._plain = entry.packed - self._front - self._back  # bytes that decryption has still to give
        self._todo = entry.packed
        self._held = b""
        self._shown = _header_of_stored(entry, header, max(self._plain, 0))
        self._password = password
        self._pieces: Iterator[bytes] | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """See ``Codec.feed``."""
        if self._plain < 0:
            raise self._too_few()
        self._todo -= len(data)
        held = self._held + data if self._held else data
        cut = len(held)
        if self._todo:
            cut -= self._back + 1
            if cut < (1 if self._pieces else self._front):
                cut = 0
        self._shown, self._held = self._shown + held[:cut], held[cut:]
        if not cut:
            return
        for plain in self._decrypted():
            yield from self._inner.feed(plain)

    def _decrypted(self) -> Iterator[bytes]:
        import stream_unzip

        try:
            if self._pieces is None:
                _, _, self._pieces = next(stream_unzip.stream_unzip(self._input(), password=self._password))
            # Behind the last byte of ZipCrypto it would compare the CRC of what is packed.
            while self._plain or self._aes:
                plain = next(self._pieces, None)
                if not plain:
                    return
                self._plain -= len(plain)
                yield plain
        except stream_unzip.IncorrectPasswordError:
            raise Refused(f"{self._entry} is not read: the password is wrong") from None
        except stream_unzip.HMACIntegrityError:
            raise Damaged("its authentication code (AES) does not fit its data") from None

    def _input(self) -> Iterator[bytes]:
        shown = b"-"
        while shown or self._shown:
            shown, self._shown = self._shown, b""
            yield shown
        raise Damaged("its encryption goes on where its data ends")  # it would ask for ever

    def close(self) -> None:
        """See ``Codec.close``."""
        if self._plain < 0:
            raise self._too_few()
        self._inner.close()

    def _too_few(self) -> Damaged:
        return Damaged(f"its {self._entry.packed:,} bytes are too few for what encryption adds")


def codec(entry: Entry, header: bytes, password: bytes | None, piece: int, name: str = "") -> Codec:
    """The codec for the data of `entry`, whose local header is `header`.

    Raises:
        Refused: there is none for its method, or it is encrypted and there is no password.
    """
    found: Codec
    method = entry.compression
    if method == STORED:
        found = Stored(piece)
    elif method == DEFLATE:
        found = Deflate(piece, name)
    elif method == DEFLATE64:
        found = Deflate64()
    elif method == BZIP2:
        found = Bzip2(piece)
    else:
        raise Refused(f"{entry} is not read: method {method} is not supported")
    if not entry.encrypted:
        return found
    if password is None:
        raise Refused(f"{entry} is not read: it is encrypted: give password=")
    return Decrypting(entry, header, password, found)


def _header_of_stored(entry: Entry, header: bytes, plain: int) -> bytes:
    """A local header that says of `entry` that it is stored, in ZIP64 form, and encrypted as it is."""
    _, version, flags, _, time, date, *_ = _LOCAL.unpack_from(header)
    # The last of ZipCrypto's 12 random bytes repeats one of the CRC, or of the time where the CRC came later
    # (APPNOTE 6.3.10, section 6.1.6; by the time: as Info-ZIP has it).
    check = time >> 8 if flags & DESCRIPTOR else entry.crc >> 24
    extra = b"\x01\x00\x10\x00" + Struct("<QQ").pack(plain, entry.packed)
    method = STORED
    if entry.method == AES:
        # As AE-2, which has no CRC: that of what is packed nobody knows.
        extra += b"\x01\x99\x07\x00\x02\x00AE" + Struct("<BH").pack(entry.strength, STORED)
        method = AES
    sizes = (check << 24, _SATURATED, _SATURATED, 0, len(extra))
    return _LOCAL.pack(b"PK\3\4", version, ENCRYPTED, method, time, date, *sizes) + extra


def _early(what: str, count: int) -> Damaged:
    return Damaged(f"its {what} stream ends {count:,} bytes before its data does")


def _late(what: str) -> Damaged:
    return Damaged(f"its {what} stream goes on where its data ends")
