"""What a body must begin with to be taken for what its name says."""

from __future__ import annotations

import pytest

from flowlane.errors import Damaged
from flowlane.landing import beginning, check_magic

SKIPPABLE = b"\x5e\x2a\x4d\x18\x04\x00\x00\x00seek"


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("a.gz", b"\x1f\x8b\x08"),
        ("a.gz", b"\x1f"),  # the rest comes with the next block
        ("a.zst", b"\x28\xb5\x2f\xfd\x00"),
        ("a.zst", SKIPPABLE + b"\x28\xb5\x2f\xfd"),
        ("a.zst", b"\x5e\x2a"),
        ("a.zip", b"PK\x03\x04"),
        ("a.zip", b"PK\x05\x06"),
        ("a.json", b"<htm>"),
        ("a.xml", b"<html>"),
        ("a.csv", b"<html"),  # who knows
    ],
)
def test_what_begins_as_its_name_says(name: str, block: bytes) -> None:
    check_magic(f"http://h/{name}", block)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("a.gz", b"<"),
        ("a.GZ", b"<"),
        ("a.gz", b"\x1f\x8c"),
        ("a.zst", b"\x60\x2a\x4d\x18"),
        ("a.zip", b"Pk\x03\x04"),
    ],
)
def test_anything_else_is_damaged(name: str, block: bytes) -> None:
    with pytest.raises(Damaged, match=r"http://h/a\.\w+ is not a \.\w+ file: it begins with b'"):
        check_magic(f"http://h/{name}", block)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("a.csv", b"<html>"),
        ("a.JSON", b"\xef\xbb\xbf\r\n<!DOCTYPE html>"),
        ("a.jsonl", b"\n<HTML lang='en'>"),
    ],
)
def test_a_page_is_no_data(name: str, block: bytes) -> None:
    with pytest.raises(Damaged, match=rf"http://h/{name} is a web page: it begins with b"):
        check_magic(f"http://h/{name}", block)


@pytest.mark.parametrize("sizes", [[0], [1, 2, 3], [65_535, 1, 1], [65_536, 9], [3, 70_000, 5], [1] * 65_540])
def test_the_beginning_is_that_of_all_blocks(sizes: list[int]) -> None:
    blocks = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
    assert beginning(blocks) == b"".join(blocks)[:65_536]
