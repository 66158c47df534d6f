from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flowlane import ZipLimits
from flowlane.errors import Refused
from flowlane.streams.zip.checks import LOCAL, READ, place, refusal, refuse, refuse_total
from flowlane.streams.zip.entry import AES, DEFLATE, ENCRYPTED, MASKED, PATCH, STORED, STRONG, Entry
from tests.streams.zip.making import Made, archive, directory, end, local, read, record

GOOD = Entry(3, "orders.csv", 100, 40, 400, 5, DEFLATE, limit=200)


def test_what_is_ordinary_is_read() -> None:
    assert refusal(GOOD, ZipLimits()) == ""
    refuse(GOOD, ZipLimits())
    for method in READ:
        assert refusal(replace(GOOD, method=method, size=40), ZipLimits()) == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"fault": "it is at fault"}, "it is at fault"),
        ({"name": "../a"}, "upwards"),
        ({"kind": "symlink"}, "symbolic link"),
        ({"kind": "directory"}, "is a directory, and has content"),
        ({"flags": PATCH}, "patched data"),
        ({"flags": STRONG | ENCRYPTED}, "strong encryption"),
        ({"flags": MASKED}, "strong encryption"),
        ({"flags": ENCRYPTED}, "give its password"),
        ({"method": AES, "flags": ENCRYPTED}, "give its password"),
        ({"method": 14}, r"compression 14 (LZMA) is not supported"),
        ({"method": 93}, r"compression 93 (zstd) is not supported"),
        ({"method": 77}, r"compression 77 is not supported"),
        ({"size": 1 << 41, "packed": 1 << 40}, "ZipLimits.size"),
        ({"size": 40 * 1040 + 1}, "ZipLimits.ratio"),
        ({"size": 1, "packed": 0}, "ZipLimits.ratio"),
        ({"method": STORED}, "stored, with 40 bytes for 400"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], why: str) -> None:
    entry = replace(GOOD, **changes)
    with pytest.raises(Refused) as raised:
        refuse(entry, ZipLimits())
    assert why in str(raised.value)
    assert str(raised.value).startswith("entry 3 (")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("password", ["secret", b"secret"])
def test_with_a_password(password: str | bytes) -> None:
    aes = replace(GOOD, method=AES, flags=ENCRYPTED, aes_method=DEFLATE, strength=3, aes_version=2)
    assert refusal(replace(GOOD, flags=ENCRYPTED), ZipLimits(), password=password) == ""
    assert refusal(aes, ZipLimits(), password=password) == ""
    assert "strength 4" in refusal(replace(aes, strength=4), ZipLimits(), password=password)
    assert "version 3" in refusal(replace(aes, aes_version=3), ZipLimits(), password=password)
    assert "compression 98" in refusal(replace(aes, aes_method=98), ZipLimits(), password=password)
    # Encryption adds to what is stored.
    stored = replace(GOOD, method=STORED, flags=ENCRYPTED, size=28)
    assert refusal(stored, ZipLimits(), password=password) == ""


def test_limits_are_the_lane_s() -> None:
    bomb = replace(GOOD, size=40 * 5000)
    assert "ZipLimits.ratio" in refusal(bomb, ZipLimits())
    assert refusal(bomb, ZipLimits(ratio=5000)) == ""
    assert "ZipLimits.size" in refusal(bomb, ZipLimits(ratio=5000, size=1000))


def test_a_name_is_shown_without_its_control_characters_and_not_whole() -> None:
    with pytest.raises(Refused) as raised:
        refuse(replace(GOOD, name="\x1b[2J\n" + "x" * 500), ZipLimits())
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 250


def test_the_total_is_that_of_the_members_that_are_read() -> None:
    entries = [replace(GOOD, size=60), replace(GOOD, size=40), replace(GOOD, size=1 << 50, fault="overlaps")]
    refuse_total(entries, ZipLimits(total=100))
    with pytest.raises(Refused, match=r"claim 100 bytes together, the limit is 99 \(ZipLimits.total\)"):
        refuse_total(entries, ZipLimits(total=99))


def test_an_archive_beyond_the_total_is_refused() -> None:
    whole = archive([Made(b"a", bytes(60)), Made(b"b", bytes(60))])
    assert len(read(whole, ZipLimits(total=120))) == 2
    with pytest.raises(Refused, match=r"ZipLimits\.total"):
        read(whole, ZipLimits(total=119))


# --------------------------------------------------------------------------- overlaps


def faults(data: bytes) -> list[str]:
    return [entry.fault for entry in read(data)]


def test_a_full_overlap_is_refused_for_all_that_share() -> None:
    one = Made(b"a", bytes(2000), DEFLATE)
    data = local(one)
    entries = record(one, 0) + record(Made(b"b", bytes(2000), DEFLATE), 0) + record(Made(b"c"), len(data))
    data += local(Made(b"c"))
    shared = "it shares its local header with another entry (overlapping entries)"
    assert faults(data + entries + end(3, len(entries), len(data))) == [shared, shared, ""]


def test_a_quoted_overlap_is_refused_for_whom_it_reaches_from() -> None:
    # Fifield's way: the first member's data are the other's local header, quoted, and go on in its data.
    kernel = local(Made(b"c", b"x" * 50))
    quoted = Made(b"a", b"y" * 10)
    entries = record(Made(b"a", b"y" * (10 + len(kernel))), 0)
    data = local(quoted)
    entries += record(Made(b"c", b"x" * 50), len(data))
    data += kernel
    first, second = read(data + entries + end(2, len(entries), len(data)))
    assert "overlapping entries" in first.fault
    assert second.fault == ""
    assert first.limit == second.offset


spans = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 120)), max_size=8)


@given(spans, st.integers(0, 400))
def test_entries_that_are_not_at_fault_are_disjoint(spans: list[tuple[int, int]], start: int) -> None:
    entries = [Entry(n, f"{n}", offset, packed, 0, 0, STORED) for n, (offset, packed) in enumerate(spans)]
    place(entries, start)
    held: list[range] = []
    for entry in sorted((each for each in entries if not each.fault), key=lambda each: each.offset):
        span = range(entry.offset, entry.offset + LOCAL + len(entry.name) + entry.packed)
        assert span.stop <= entry.limit <= start
        assert not held or held[-1].stop <= span.start
        held.append(span)
    # And nobody is at fault without a reason.
    for entry in entries:
        inside = [other for other in entries if other is not entry and entry.offset <= other.offset]
        reached = min((other.offset for other in inside if other.offset < start), default=start)
        clean = entry.offset < start and entry.offset + LOCAL + len(entry.name) + entry.packed <= reached
        assert bool(entry.fault) == (not clean)


def test_one_archive_s_entries_end_where_the_next_begins() -> None:
    members = [Made(b"a", b"x" * 9), Made(b"b"), Made(b"c", b"y")]
    data, _ = directory(members)
    found = read(archive(members))
    assert [entry.limit for entry in found] == [found[1].offset, found[2].offset, len(data)]
