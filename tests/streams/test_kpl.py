"""Aggregates of the Kinesis Producer Library: unpacked if they are whole, left alone otherwise."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane.streams.kpl import UserRecord, unpack
from tests.aws_lambda.aggregate import aggregate, member, message, sealed, varint

RECORDS = st.lists(st.tuples(st.text(max_size=8), st.binary(max_size=300)), max_size=12)
WHOLE = aggregate(("a", b"first"), ("b", b""), ("a", b"third" * 100))


def unpacked(inner: bytes) -> list[tuple[str, bytes]] | None:
    found = unpack(sealed(inner))
    return None if found is None else [(one.key, one.data) for one in found]


@given(RECORDS, st.lists(st.text("0123456789", min_size=1), max_size=3))
def test_whatever_was_put_together_is_taken_apart(
    records: list[tuple[str, bytes]], hashes: list[str]
) -> None:
    assert unpacked(message(records, hashes)) == records


@given(st.integers(0, 2**64 - 1))
def test_numbers_of_any_length(number: int) -> None:
    tag = member(4, member(1, b"name"))
    inner = member(1, b"k") + member(3, member(1, 0) + member(2, number) + member(3, b"data") + tag)
    assert unpacked(inner) == [("k", b"data")]


def test_fields_that_a_later_release_adds_are_passed_over() -> None:
    later = (
        varint(9 << 3 | 1) + b"12345678" + varint(10 << 3 | 5) + b"1234" + member(11, b"x") + member(12, 3)
    )
    assert unpacked(later + message([("k", b"data")]) + later) == [("k", b"data")]


@given(st.data())
def test_one_byte_changed_anywhere_is_no_aggregate(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(WHOLE) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != WHOLE[place]))
    assert unpack(WHOLE[:place] + bytes([other]) + WHOLE[place + 1 :]) is None


@given(st.integers(0, len(WHOLE) - 1))
def test_a_cut_one_is_no_aggregate(length: int) -> None:
    assert unpack(WHOLE[:length]) is None


@given(st.binary(max_size=60))
def test_with_a_right_digest_anything_is_unpacked_or_left_alone(inner: bytes) -> None:
    found = unpack(sealed(inner))
    assert found is None or all(isinstance(one, UserRecord) for one in found)


@pytest.mark.parametrize(
    "inner",
    [
        member(3, member(1, 0) + member(3, b"data")),  # no key of that number
        member(1, b"k") + member(3, member(3, b"data")),  # no key's number
        member(1, b"k") + member(3, member(1, 0)),  # no data
        member(1, b"\xff") + member(3, member(1, 0) + member(3, b"data")),  # a key that is no text
        member(1, b"k") + b"\x1a\x7f",  # longer than what is left
        member(1, b"k") + member(3, member(1, 0) + member(3, b"data")) + b"\x22\x7fx",
        member(1, b"k") + b"\x80",  # a number that does not end
        member(1, b"k") + b"\xff" * 11,  # one of more than 64 bits
        member(1, b"k") + b"\x0b",  # a group, which proto3 does not have
    ],
)
def test_with_a_right_digest_and_no_right_message_it_is_left_alone(inner: bytes) -> None:
    assert unpack(sealed(inner)) is None


def test_the_digest_and_the_magic_number_both_count() -> None:
    assert unpack(WHOLE) is not None
    assert unpack(b"\x00" + WHOLE[1:]) is None
    assert unpack(WHOLE[:-16] + bytes(16)) is None
    assert unpack(b"") is None
    assert unpack(b"\xf3\x89\x9a\xc2") is None


def test_a_real_one() -> None:
    folder = os.environ.get("FLOWLANE_CORPUS")
    if not folder:
        pytest.skip("FLOWLANE_CORPUS is not set: it names the folder with lambda_events/ in it")
    file = Path(folder) / "lambda_events/sam_cli/kinesis.analytics-kpl.json"
    first, second = (base64.b64decode(each["data"]) for each in json.loads(file.read_text())["records"])
    found = unpack(first)
    assert found is not None
    assert [(one.key, one.data[:3], len(one.data)) for one in found] == [
        ("1505169645250", b"40,", 129),
        ("1505169645250", b"41,", 129),
    ]
    assert unpack(second) is None
