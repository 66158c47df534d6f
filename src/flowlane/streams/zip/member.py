"""One member of a ZIP archive by the block: local header, data, and the proof against the directory. No I/O.

The directory is what counts (APPNOTE 6.3.10, section 4.3.12): a local header may leave sizes and CRC to a
descriptor behind the data, but where it says something else than the directory, one of the two lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

from flowlane.errors import Damaged
from flowlane.streams.members import PIECE, inflater
from flowlane.streams.preview import preview
from flowlane.streams.zip.codecs import Codec, codec
from flowlane.streams.zip.entry import DESCRIPTOR, ENCRYPTED, Entry

#: A local header without its name and extra fields (section 4.3.7).
HEADER: Final = 30
#: It has at most this many bytes more.
MAX_TAIL: Final = 2 * 0xFFFF

_LOCAL: Final = Struct("<4sHHHHHIIIHH")
_SATURATED: Final = 0xFFFFFFFF
_ZIP64: Final = 0x0001


class Member:
    """See ``inflate.Decoder``: the member `entry`, fed from the first byte of its local header on.

    More bytes than it has are left alone. No more is given than the directory says it has, and ``close``
    returns only if all of that came and has the right CRC.
    """

    def __init__(
        self, entry: Entry, *, password: str | bytes | None = None, piece: int = PIECE, name: str = ""
    ) -> None:
        """`entry` is one that ``checks.refuse`` lets pass; `name` chooses the inflater."""
        self._entry = entry
        self._password = password.encode() if isinstance(password, str) else password
        self._piece = piece
        self._name = name
        self._crc32 = inflater(name).crc32
        self._codec: Codec | None = None
        self._held = b""  # of the local header, while it is not complete
        self._left = entry.packed
        self._size = 0
        self._crc = 0
        self.start = 0  #: where its data begins, counted from the local header; 0: not known yet

    @property
    def ended(self) -> bool:
        """Whether all of its packed bytes were fed."""
        return self._codec is not None and not self._left

    @property
    def seekable(self) -> bool:
        """Whether its data can be gone on with in the middle: known once the local header was read."""
        return self._codec is not None and not (self._entry.compression or self._entry.encrypted)

    def seek(self, offset: int, crc: int) -> None:
        """What is fed next begins at `offset` of a seekable member's data; the bytes before have that CRC."""
        assert self.seekable
        self._left = self._entry.packed - offset
        self._size, self._crc = offset, crc

    def feed(self, block: bytes) -> Iterator[bytes]:
        """See ``Decoder.feed``.

        Raises (while iterating):
            Damaged: header or data disprove the directory.
            Refused: there is no codec for it, or the password is wrong.
        """
        if self._codec is None:
            block = self._header(block)
            if self._codec is None:
                return
        if len(block) > self._left:
            block = block[: self._left]
        self._left -= len(block)
        if block:
            yield from self._pieces(self._codec, block)

    def _pieces(self, codec: Codec, data: bytes) -> Iterator[bytes]:
        pieces = codec.feed(data)
        while True:
            try:
                piece = next(pieces, None)
            except Damaged as error:
                raise self._damaged(str(error)) from None
            if piece is None:
                return
            self._size += len(piece)
            if self._size > self._entry.size:
                raise self._damaged(
                    f"more bytes come out of it than the {self._entry.size:,} of the directory"
                )
            self._crc = self._crc32(piece, self._crc)
            yield piece

    def close(self) -> None:
        """See ``Decoder.close``.

        Raises:
            Damaged: it is cut, or sizes or CRC disprove the directory.
        """
        entry = self._entry
        if self._codec is None:
            raise self._damaged("the archive is cut inside its local header")
        if self._left:
            raise self._damaged(
                f"the archive is cut: {self._left:,} of its {entry.packed:,} bytes are missing"
            )
        try:
            self._codec.close()
        except Damaged as error:
            raise self._damaged(str(error)) from None
        if self._size != entry.size:
            raise self._damaged(f"it has {self._size:,} bytes, the directory says {entry.size:,}")
        if self._crc != entry.crc and entry.aes_version != 2:
            raise self._damaged(f"its CRC is {self._crc:08x}, the directory says {entry.crc:08x}")

    def _damaged(self, what: str) -> Damaged:
        hint = " (or the password is wrong)" if self._entry.encrypted else ""
        return Damaged(f"{self._entry}: {what}{hint}")

    # ------------------------------------------------------------------ the local header

    def _header(self, block: bytes) -> bytes:
        """Read the local header as far as it has come; what follows it."""
        held = self._held + block if self._held else block
        if not b"PK\3\4".startswith(held[:4]):
            raise self._damaged(f"there is no local header at byte {self._entry.offset:,}: {preview(held)}")
        end = HEADER
        if len(held) >= HEADER:
            *_, name, extra = _LOCAL.unpack_from(held)
            end += name + extra
        if len(held) < end:
            self._held = held
            return b""
        self._held = b""
        self._compare(held[:end])
        self.start = end
        self._codec = codec(self._entry, held[:end], self._password, self._piece, self._name)
        return held[end:]

    def _compare(self, header: bytes) -> None:
        """Hold the local header against the directory."""
        entry = self._entry
        _, _, flags, method, _, _, crc, packed, size, length, _ = _LOCAL.unpack_from(header)
        name, extra = header[HEADER : HEADER + length], header[HEADER + length :]
        if name != entry.stored_name:
            self._disagree("the name", preview(name), preview(entry.stored_name))
        if method != entry.method:
            self._disagree("method", method, entry.method)
        if (flags ^ entry.flags) & ENCRYPTED:
            self._disagree("the encryption bit", flags & ENCRYPTED, entry.flags & ENCRYPTED)
        if not flags & DESCRIPTOR:
            size, packed = _zip64(extra, size, packed)
            if packed not in (entry.packed, _SATURATED):
                self._disagree("a packed size of", f"{packed:,}", f"{entry.packed:,}")
            if size not in (entry.size, _SATURATED):
                self._disagree("a size of", f"{size:,}", f"{entry.size:,}")
            if crc != entry.crc:
                self._disagree("a CRC of", f"{crc:08x}", f"{entry.crc:08x}")
        end = entry.offset + len(header) + entry.packed
        if entry.limit and end > entry.limit:
            raise self._damaged(
                f"its data goes on to byte {end:,}, but ends at byte {entry.limit:,} at the latest"
            )

    def _disagree(self, what: str, local: object, central: object) -> None:
        raise self._damaged(f"its local header says {what} {local}, the directory says {central}")


def _zip64(extra: bytes, size: int, packed: int) -> tuple[int, int]:
    """`size` and `packed` with what saturated ones of them stand for (section 4.5.3), if `extra` has it."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = (
            int.from_bytes(extra[at : at + 2], "little"),
            int.from_bytes(extra[at + 2 : at + 4], "little"),
        )
        at += 4
        if kind == _ZIP64:
            values = [
                int.from_bytes(extra[i : i + 8], "little") for i in range(at, at + min(length, 16) - 7, 8)
            ]
            size = values.pop(0) if size == _SATURATED and values else size
            packed = values.pop(0) if packed == _SATURATED and values else packed
            break
        at += length
    return size, packed
