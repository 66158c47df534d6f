from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane.streams.zip.entry import UTF8
from flowlane.streams.zip.names import MAX_NAME, decode, objection


def path_field(name: bytes, crc: int, version: int = 1) -> bytes:
    """The data of the unicode path extra field 0x7075."""
    return struct.pack("<BL", version, crc) + name


CHINESE = "七个房间.txt"
RAW = CHINESE.encode("gbk")


@pytest.mark.parametrize(
    ("raw", "flags", "field", "name", "wrong"),
    [
        (b"plain.csv", 0, b"", "plain.csv", ""),
        (b"plain.csv", UTF8, b"", "plain.csv", ""),
        ("caf\u00e9".encode(), UTF8, b"", "caf\u00e9", ""),
        (b"caf\x82", 0, b"", "caf\u00e9", ""),  # code page 437
        (b"caf\x82", UTF8, b"", "caf\\x82", "claims to be UTF-8"),
        (RAW, 0, path_field(CHINESE.encode(), zlib.crc32(RAW)), CHINESE, ""),
        (RAW, 0, path_field(CHINESE.encode(), 5), RAW.decode("cp437"), ""),  # renamed since
        (RAW, 0, path_field(CHINESE.encode(), zlib.crc32(RAW), 2), RAW.decode("cp437"), ""),
        (RAW, 0, path_field(b"", zlib.crc32(RAW)), RAW.decode("cp437"), ""),
        (RAW, 0, path_field(b"\xff", zlib.crc32(RAW)), "\\xff", "unicode path claims"),
        (b"ab", 0, path_field(b"cd", zlib.crc32(b"ab")), "cd", ""),
        (b"ab", UTF8, path_field(b"cd", zlib.crc32(b"ab")), "ab", ""),  # bit 11 says how `raw` is written
    ],
)
def test_decoding(raw: bytes, flags: int, field: bytes, name: str, wrong: str) -> None:
    found, fault = decode(raw, flags, field)
    assert found == name
    assert wrong in fault
    assert bool(wrong) == bool(fault)


@given(st.binary(max_size=40), st.sampled_from((0, UTF8)), st.binary(max_size=12))
def test_every_name_decodes_to_a_text_that_can_be_written(raw: bytes, flags: int, field: bytes) -> None:
    name, fault = decode(raw, flags, field)
    assert name.encode().decode() == name
    assert fault or not flags or name.encode() == raw


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../etc/passwd", "upwards"),
        ("a/../b", "upwards"),
        ("..", "upwards"),
        ("/etc/passwd", "absolute"),
        ("c:/x", "drive"),
        ("C:x", "drive"),
        ("a\\b", "backslash"),
        ("\\\\host\\share", "backslash"),
        ("a\0.csv", "NUL"),
        ("a\n.csv", "control"),
        ("a\x1b[31m", "control"),
        ("a\x7f", "control"),
        ("a\x9b", "control"),
        ("a\u2028b", "control"),
        ("a" * (MAX_NAME + 1), "1,024 bytes"),
        ("\u00e9" * (MAX_NAME // 2 + 1), "1,024 bytes"),
    ],
)
def test_names_that_are_refused(name: str, why: str) -> None:
    assert why in objection(name)


@pytest.mark.parametrize(
    "name",
    [
        "orders.csv",
        "./orders.csv",
        "a//b",
        "..orders",
        "a..b/c...",
        "caf\u00e9.csv",
        CHINESE,
        "a" * MAX_NAME,
        "",
        "__MACOSX/._a",
        "10:30.csv",
        "'; DROP TABLE orders; --",
    ],
)
def test_names_that_are_not(name: str) -> None:
    assert objection(name) == ""
