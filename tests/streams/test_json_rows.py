"""JSON Lines by the block: the same however the input is cut, every line in its place."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlane.errors import Permanent, Superseded
from flowlane.ports import Bad, Batch, Cut
from flowlane.state import Position
from flowlane.streams.cutting import Cutter
from flowlane.streams.jsonrows import JsonRows


def batches(
    data: bytes,
    cut: Cut = Cut(10**9, 10**9),  # noqa: B008 - a constant
    start: Position = Position(),  # noqa: B008 - a constant
    chunks: Sequence[int] = (),
    limit: int = 1 << 20,
) -> list[Batch]:
    rows, cutter = JsonRows(start, max_row=limit), Cutter(cut, start)
    found: list[Batch] = []
    at = turn = 0
    while at < len(data):
        size = chunks[turn % len(chunks)] if chunks else len(data)
        for chunk in rows.feed(data[at : at + size]):
            found += cutter.feed(chunk)
        at, turn = at + size, turn + 1
    for chunk in rows.close():
        found += cutter.feed(chunk)
    return [*found, *cutter.close()]


lines = st.lists(
    st.sampled_from(
        [b'{"a":1}', b'{"b":"x y"}', b"{}", b'{"c":{"d":[1]}}', b'{"a":1} {"a":2}', b'{"a":', b"1}", b"[1]",
         b"7", b"", b"  ", b"{x}", b'{"a":"\xff"}', b' {"a":1} ', b"{", b"}", b'{"e":"' + b"x" * 60 + b'"}']
    ),
    max_size=12,
)  # fmt: skip


@settings(deadline=None)  # the machine may be busy
@given(
    lines,
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.lists(st.integers(1, 30), max_size=3),
    st.integers(1, 4),
    st.integers(1, 40),
)
def test_the_same_however_it_is_cut_and_from_every_batch_on(
    some: list[bytes], end: bytes, ended: bool, chunks: list[int], rows: int, size: int
) -> None:
    data = end.join(some) + (end if ended else b"")
    cut = Cut(rows, size)
    whole = batches(data, cut, limit=50)
    assert batches(data, cut, chunks=chunks, limit=50) == whole
    for number, batch in enumerate(whole):
        assert batch.end.crc == zlib.crc32(data[: batch.end.offset])
        assert batches(data, cut, batch.end, chunks, limit=50) == whole[number + 1 :]
    expected: list[object] = []
    for line in data.split(b"\n"):
        if line.strip():
            try:
                expected.append(msgspec.json.decode(line, type=dict) if len(line) <= 50 else None)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                expected.append(None)
    bad = {b.row for batch in whole for b in batch.bad}
    good = iter(record for batch in whole for record in batch.records)
    assert [None if n in bad else next(good) for n in range(len(expected))] == expected


def test_lines_that_are_no_objects_say_why() -> None:
    (batch,) = batches(b'[1]\n{"a":\n' + b"[" * 100_000 + b'\n{"a":1}\n')
    assert [b.row for b in batch.bad] == [0, 1, 2]
    assert "not a JSON object" in batch.bad[0].reason
    assert "not JSON" in batch.bad[1].reason
    assert len(batch.bad[2].raw) <= 1000
    assert batch.records == [{"a": 1}]


@pytest.mark.parametrize(
    "data",
    [
        b'[{"a":1},{"a":2}]',
        b'[\n  {"a":1},\n  {"a":2}\n]\n',
        b'\xef\xbb\xbf[ \r\n{"a":1}\r\n]\r\n',
        b'\n  \n [ {"a":1},\n{"a":2}\n]',
        b'[{"a":1},' + b'{"a":2},' * 200 + b'{"a":3}]',  # longer than a line may be
        b"[",
    ],
)
@pytest.mark.parametrize("chunks", [(), (1,), (7,)])
def test_an_array_is_refused_as_a_whole(data: bytes, chunks: Sequence[int]) -> None:
    with pytest.raises(Permanent, match=r"is a JSON array.*jq -c '\.\[\]'\): it begins with '\["):
        batches(data, chunks=chunks, limit=1000)


def test_an_array_on_a_line_behind_an_object_is_one_bad_line() -> None:
    (batch,) = batches(b'{"a":1}\n[{"a":2}]\n')
    assert (batch.records, [bad.row for bad in batch.bad]) == ([{"a": 1}], [1])
    (rest,) = batches(b'{"a":1}\n[{"a":2}]\n', start=batches(b'{"a":1}\n')[0].end)
    assert (rest.records, [bad.row for bad in rest.bad]) == ([], [1])


def test_a_byte_order_mark_is_dropped() -> None:
    (batch,) = batches(b'\xef\xbb\xbf{"a":1}\n{"a":2}\n')
    assert batch.records == [{"a": 1}, {"a": 2}]


def test_a_line_that_is_too_long_is_bad() -> None:
    (batch,) = batches(b'{"a":"' + b"x" * 5000 + b'"}\n{"a":1}\n', chunks=[7], limit=1000)
    assert isinstance(batch.bad[0], Bad)
    assert batch.bad[0].reason.startswith("a line of 5,009 bytes, the limit is 1,000")
    assert batch.records == [{"a": 1}]


def test_what_is_passed_over_is_checked() -> None:
    data = b'{"a":1}\n{"a":2}\n'
    first, _ = batches(data, Cut(1, 100))
    with pytest.raises(Superseded):
        batches(data.replace(b"1", b"3"), Cut(1, 100), first.end)
    with pytest.raises(Superseded):
        batches(b"", Cut(1, 100), first.end)
