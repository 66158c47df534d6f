"""Aggregates are made as the Kinesis Producer Library makes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane.streams import aggregate as module
from flowlane.streams import kpl
from flowlane.streams.aggregate import AROUND, EACH, pack
from tests.aws_lambda.aggregate import aggregate

RECORDS = st.lists(st.tuples(st.text(max_size=8), st.binary(max_size=300)), max_size=12)

#: SHA-256 of what aws-kinesis-agg 1.2.3 (by protobuf's own encoder) makes of the records below.
BY_THE_LIBRARY = "8d5053426540d366d4ff028d6a319df4908484989541c52b6567091e118d637b"


def packed(records: list[tuple[str, bytes]]) -> bytes:
    return pack([key for key, _ in records], [data for _, data in records])


@given(RECORDS)
def test_the_format_is_the_librarys(records: list[tuple[str, bytes]]) -> None:
    whole = packed(records)
    assert whole == aggregate(*records)
    assert [(one.key, one.data) for one in kpl.unpack(whole) or ()] == records
    most = sum(EACH + len(data) for _, data in records) + sum(len(key.encode()) for key, _ in records)
    assert len(whole) <= AROUND + most


@pytest.mark.parametrize("keys", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("size", [0, 1, 120, 121, 122, 123, 124, 127, 128, 16_377, 16_378, 16_379, 16_384])
@pytest.mark.parametrize("again", [0, 2])
def test_numbers_of_one_byte_and_of_more(keys: int, size: int, again: int) -> None:
    records = [(f"k{number % keys}", b"x" * size) for number in range(keys + again)]
    assert packed(records) == aggregate(*records)


@pytest.mark.parametrize("keys", [0x4000, 0x4001, 0x4002])
def test_more_keys_than_two_bytes_count(keys: int) -> None:
    records = [(f"{number}", b"") for number in range(keys)]
    assert [(one.key, one.data) for one in kpl.unpack(packed(records)) or ()] == records
    assert len(packed(records)) <= AROUND + sum(EACH + len(key) for key, _ in records)
    assert len(module._NUMBERS) == 0x4000


def test_two_threads_that_pack_at_once_number_keys_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers that are known are both's: the one is still learning some when the other begins."""
    number = module._number
    monkeypatch.setattr(module, "_NUMBERS", [])

    def cut_in(wanted: int) -> bytes:
        monkeypatch.setattr(module, "_number", number)
        with ThreadPoolExecutor(1) as other:
            other.submit(pack, [f"{n}" for n in range(5)], [b""] * 5).result()
        return number(wanted)

    monkeypatch.setattr(module, "_number", cut_in)
    records = [(f"{n}", b"x") for n in range(3)]
    assert packed(records) == aggregate(*records)
    assert [number(n) for n in range(5)] == module._NUMBERS


def test_a_library_of_awss_makes_the_same() -> None:
    records = [("a", b"first"), ("b" * 200, b""), ("a", b"third" * 40), ("\N{GRINNING FACE}", b"\x00\xff")]
    assert sha256(packed(records)).hexdigest() == BY_THE_LIBRARY
