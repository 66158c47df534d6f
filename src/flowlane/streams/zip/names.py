"""The names of members: decoded, and judged. A name is data from outside: nothing here makes it a path."""

from __future__ import annotations

import re
import zlib
from typing import Final

from flowlane.streams.zip.entry import UTF8

#: Bytes of the longest name that is believed; S3 takes keys as long as this.
MAX_NAME: Final = 1024

#: Control characters of ASCII and Latin-1, and the two line ends that Unicode adds.
_CONTROL: Final = re.compile("[\x01-\x1f\x7f-\x9f\u2028\u2029]")
_DRIVE: Final = re.compile("[A-Za-z]:")


def decode(raw: bytes, flags: int, unicode_path: bytes = b"") -> tuple[str, str]:
    """The name that `raw` stands for, and what is wrong with it, as a phrase (mostly empty).

    UTF-8 where flag bit 11 says so (APPNOTE 6.3.10, appendix D); what the Info-ZIP unicode path extra field
    (`unicode_path`: the data of 0x7075, section 4.6.9) says where its CRC is that of `raw`, since a tool that
    does not know the field may have renamed the member; else code page 437. What does not decode comes with
    its bytes written out as ``\\xNN``.
    """
    if raw.isascii() and not unicode_path:
        return raw.decode("ascii"), ""
    if flags & UTF8:
        return _utf8(raw, "its name claims to be UTF-8 and is not")
    if len(unicode_path) > 5 and unicode_path[0] == 1 and _crc(unicode_path) == zlib.crc32(raw):
        return _utf8(unicode_path[5:], "its unicode path claims to be UTF-8 and is not")
    return raw.decode("cp437"), ""


def _crc(unicode_path: bytes) -> int:
    return int.from_bytes(unicode_path[1:5], "little")


def _utf8(raw: bytes, otherwise: str) -> tuple[str, str]:
    try:
        return raw.decode(), ""
    except UnicodeDecodeError:
        return raw.decode("utf-8", "backslashreplace"), otherwise


def objection(name: str) -> str:
    """Why no member may be called `name`, as a phrase; empty if one may.

    What is refused here is what would lead a path made of it elsewhere, on some system, or would deceive
    whoever reads it on a screen.
    """
    if "\0" in name:
        return "its name holds a NUL"
    if _CONTROL.search(name):
        return "its name holds a control character"
    if "\\" in name:
        return "its name holds a backslash"
    if name.startswith("/"):
        return "its name is an absolute path"
    if _DRIVE.match(name):
        return "its name begins with a drive"
    if ".." in name.split("/"):
        return "its name leads upwards (..)"
    if len(name) > MAX_NAME or len(name.encode()) > MAX_NAME:
        return f"its name has more than {MAX_NAME:,} bytes"
    return ""
