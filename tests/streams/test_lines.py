from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlane.streams.lines import Block, Lines


def cut(pieces: list[bytes], *, limit: int, start: int = 0) -> list[Block]:
    """The blocks that `pieces` make."""
    lines = Lines(limit=limit, start=start)
    return [block for piece in pieces for block in lines.feed(piece)] + list(lines.close())


@given(
    data=st.text(alphabet="ab\n", max_size=200).map(str.encode),
    marks=st.lists(st.integers(0, 200), max_size=12),
    limit=st.integers(1, 12),
    start=st.integers(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_lines_do_not_depend_on_how_they_come(data: bytes, marks: list[int], limit: int, start: int) -> None:
    places = sorted({0, len(data), *(mark for mark in marks if mark < len(data))})
    pieces = [data[a:b] for a, b in pairwise(places)]
    blocks = cut(pieces, limit=limit, start=start)
    expected = data.splitlines(keepends=True)
    # Every byte is in one block, in order.
    assert [b.start for b in blocks] == [start, *(b.end for b in blocks)][: len(blocks)]
    assert (blocks[-1].end if blocks else start) == start + len(data)
    # Lines within the limit come whole; longer ones are left out, each by itself, and named.
    assert b"".join(b.data for b in blocks if not b.reason) == b"".join(
        line for line in expected if len(line.rstrip(b"\n")) <= limit
    )
    refused = [data[b.start - start : b.end - start] for b in blocks if b.reason]
    assert refused == [line for line in expected if len(line.rstrip(b"\n")) > limit]
    for block in blocks:
        if not block.reason:
            assert block.data == data[block.start - start : block.end - start]
            assert block.data.endswith(b"\n") or block.end == start + len(data)


def test_blocks_are_as_large_as_they_come() -> None:
    assert cut([b"a\nb\nc", b"c\nd\n"], limit=100) == [Block(0, 4, b"a\nb\n"), Block(4, 9, b"cc\nd\n")]


def test_only_a_line_feed_ends_a_line() -> None:
    data = "a\r\nb\x0b\x0c\x1c\x85\u2028c\r".encode()
    assert [block.data for block in cut([data], limit=100)] == [b"a\r\n", data[3:]]


def test_a_line_too_long_is_left_out_and_shown() -> None:
    blocks = cut([b"ok\n", b"x" * 500, b"y" * 500, b"\nok"], limit=700)
    assert [block.reason for block in blocks] == [
        "",
        f"a line of 1,001 bytes, the limit is 700: it begins with {'x' * 40!r}...",
        "",
    ]
    assert [(block.start, block.end) for block in blocks] == [(0, 3), (3, 1004), (1004, 1006)]


@pytest.mark.parametrize("size", [1, 4096])
def test_an_endless_line_takes_no_memory(size: int) -> None:
    lines = Lines(limit=10_000)
    for _ in range(100_000 // size):
        assert list(lines.feed(b"x" * size)) == []
    assert len(lines._carry) <= 10_000
    assert [block.reason[:9] for block in lines.close()] == ["a line of"]
