"""What a directory says of one member, and how much of an archive is believed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Literal

import msgspec

from flowlane.errors import ConfigError

STORED: Final = 0
DEFLATE: Final = 8
DEFLATE64: Final = 9
BZIP2: Final = 12
AES: Final = 99

#: Flag bits of a header (APPNOTE 6.3.10, section 4.4.4).
ENCRYPTED: Final = 0x1
DESCRIPTOR: Final = 0x8  #: sizes and CRC stand behind the data, not in the local header
PATCH: Final = 0x20
STRONG: Final = 0x40
UTF8: Final = 0x800
MASKED: Final = 0x2000  #: the local header's values are masked, as the directory was encrypted

Kind = Literal["file", "directory", "symlink"]


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One entry of a central directory. Its name is no identity: names repeat, its ``index`` does not.

    JSON-able, so that it travels in events; all that is needed to read the member by one range request. Sizes
    and offsets are bytes; none of them is proven by anything yet.
    """

    index: int  #: its place in the directory, from 0
    name: str  #: decoded; a text from outside, nothing more
    offset: int  #: of the local header in the object, bytes before the archive included
    packed: int  #: compressed size, with what encryption adds
    size: int  #: uncompressed size
    crc: int
    method: int
    flags: int = 0
    kind: Kind = "file"
    raw: bytes = b""  #: the name as stored; empty where it is ``name.encode()``
    strength: int = 0  #: AES (extra field 0x9901): 1, 2, 3 for keys of 128, 192, 256 bits
    aes_method: int = 0  #: what was compressed with, under the AES
    aes_version: int = 0  #: 1 (the CRC stands) or 2 (it is 0, and proves nothing)
    limit: int = 0  #: where its bytes have ended at the latest: the next local header, or the directory
    fault: str = ""  #: what in the directory makes this one entry unreadable, as a phrase

    @property
    def stored_name(self) -> bytes:
        """The bytes of the name in the directory."""
        return self.raw or self.name.encode()

    @property
    def encrypted(self) -> bool:
        return bool(self.flags & ENCRYPTED) or self.method == AES

    @property
    def compression(self) -> int:
        """The method of compression, also of a member that is encrypted with AES."""
        return self.aes_method if self.method == AES else self.method

    def __str__(self) -> str:
        """Fit for a message: the index and the name, without anything that a terminal would act upon."""
        name = self.name if len(self.name) <= 100 else f"{self.name[:100]}..."
        return f"entry {self.index} ({name!a})"


@dataclass(frozen=True)
class ZipLimits:
    """What is too much for an archive, or for one of its members: whatever claims or turns out to be more is
    refused. Sizes are bytes.

    Raises:
        ConfigError: a limit is no positive number.
    """

    entries: int = 50_000  #: of one archive
    size: int = 1 << 40  #: of one member, inflated
    total: int = 1 << 42  #: of all members of an archive, inflated
    ratio: float = 1040  #: inflated to packed; deflate itself reaches 1,032
    directory: int = 64 << 20  #: of the central directory
    manifest: int = 1 << 20  #: of a member that is read whole
    memory: int = 256 << 20  #: for all open members of a process together

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"zip {field.name}={value!r}: must be a number above 0")
