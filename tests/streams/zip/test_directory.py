from __future__ import annotations

import contextlib
import io
import struct
import time
import zipfile
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowlane import ZipLimits
from flowlane.errors import ConfigError, Damaged, FlowlaneError, Refused
from flowlane.streams.zip.end import TAIL, _found, find_end
from flowlane.streams.zip.entry import AES, DEFLATE, STORED, UTF8, Entry
from tests.streams.zip.making import (
    Made,
    archive,
    archive64,
    directory,
    end,
    local,
    oracle,
    outcome,
    read,
    record,
    told,
)

SMALL = [
    Made(b"orders.csv", b"id,name\n1,a\n" * 9, DEFLATE),
    Made(b"orders.json", b'{"table": "orders"}', extra=b"ux\4\0abcd", comment=b"a manifest"),
    Made(b"empty/"),
]

names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12
)  # zipfile ends a name at a NUL, and makes a directory of one that ends with a slash
ascii_names = st.binary(min_size=1, max_size=12).map(lambda b: bytes(c & 0x7F for c in b))


@st.composite
def made(draw: st.DrawFn) -> Made:
    utf8 = draw(st.booleans())
    name = draw(names).encode() if utf8 else draw(st.binary(min_size=1, max_size=12))
    large = draw(st.sets(st.sampled_from(("size", "packed", "offset"))))
    extra = b"".join(
        struct.pack("<2H", kind, len(data)) + data
        for kind, data in draw(st.lists(st.tuples(st.integers(2, 0x6FFF), st.binary(max_size=9)), max_size=3))
    )
    return Made(
        name,
        draw(st.binary(max_size=60)),
        draw(st.sampled_from((STORED, DEFLATE))),
        UTF8 if utf8 else 0,
        extra + draw(st.sampled_from((b"", b"\0", b"\0\0\0"))),
        draw(st.binary(max_size=20)),
        large=sorted(large),
    )


# --------------------------------------------------------------------------- as CPython reads it


@given(
    contents=st.dictionaries(names, st.tuples(st.binary(max_size=200), st.booleans()), max_size=6),
    comment=st.binary(max_size=40),
    prefix=st.binary(max_size=30),
)
def test_what_zipfile_writes_is_read_as_zipfile_reads_it(
    contents: dict[str, tuple[bytes, bool]], comment: bytes, prefix: bytes
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.comment = comment
        for name, (data, packed) in contents.items():
            made.writestr(name, data, compress_type=DEFLATE if packed else STORED)
    data = prefix + buffer.getvalue()
    if prefix.startswith(b"PK\3\4") or b"PK\5\6" in comment or b"PK\6\7" in data:
        return
    assert told(read(data)) == oracle(data)


@settings(max_examples=150)
@given(
    members=st.lists(made(), max_size=5),
    saturated=st.sets(st.sampled_from(("count", "size", "offset"))),
    zip64=st.booleans(),
    prefix=st.binary(max_size=20),
    block=st.integers(1, 200),
)
def test_what_is_made_by_hand_is_read_as_zipfile_reads_it(
    members: list[Made], saturated: set[str], zip64: bool, prefix: bytes, block: int
) -> None:
    data = archive64(members, sorted(saturated), prefix=prefix) if zip64 else archive(members, prefix=prefix)
    if prefix.startswith(b"PK\3\4"):
        return
    found = read(data, block=block)
    if zip64 or not data[-42:].startswith(b"PK\6\7"):  # in an entry, where zipfile takes it for a locator
        assert told(found) == oracle(data)
    assert [entry.index for entry in found] == list(range(len(members)))
    assert [entry.stored_name for entry in found] == [each.name for each in members]
    assert not any(entry.fault for entry in found)
    for entry, each in zip(found, members, strict=True):
        assert data[entry.offset : entry.limit] == local(each)
        assert msgspec.json.decode(msgspec.json.encode(entry), type=Entry) == entry


def test_what_looks_like_a_locator_in_an_entry_is_none() -> None:
    """CPython's zipfile takes it for one, right before the end record as it stands, and refuses it."""
    comments = (b"PK\6\7" + b"\2" * 16, b"note" + b"\2" * 16)
    one, other = (told(read(archive([*SMALL, Made(b"a.csv", comment=comment)]))) for comment in comments)
    assert one == other
    assert len(one) == len(SMALL) + 1


@pytest.mark.parametrize("more", [b"\1\0\4\0\0\0more", b"PK\6\6" + bytes(60), b"PK\6\6" * 20, bytes(900)])
def test_zip64_with_extensible_data_before_its_locator(more: bytes) -> None:
    assert told(read(archive64(SMALL, ["count"], more=more))) == told(read(archive(SMALL)))


# --------------------------------------------------------------------------- finding the end


@given(
    st.lists(
        st.one_of(
            st.sampled_from((b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\0" * 8, b"\xff" * 4)),
            st.binary(max_size=6),
        ),
        max_size=12,
    ).map(b"".join)
)
@example(b"PK\5\6" + bytes(18))
@example(b"x" + end(0, 0, 0))
@example(b"PK\5\6" * 9)
def test_a_comment_is_never_taken_for_a_directory(comment: bytes) -> None:
    plain = read(archive(SMALL))
    found = outcome(archive(SMALL, comment=comment))
    if found != plain:  # as the comment ends with a whole record, which fits: which one is meant?
        assert "two end records fit" in found
        assert b"PK\5\6" + bytes(8) in comment


def test_a_comment_that_holds_another_record_which_fits_is_refused() -> None:
    data, entries = directory(SMALL)
    other = end(1, len(record(SMALL[0], 0)), len(data) + 7)
    whole = data + entries
    with pytest.raises(Damaged, match="two end records fit"):
        read(whole + end(3, len(entries), len(data), comment=end(0, 0, 0)))
    assert len(read(whole + end(3, len(entries), len(data), comment=other))) == 3


@pytest.mark.parametrize("junk", [b"\n", b"\0" * 300, b"bla PK\5\6", b"PK\1\2" * 9])
def test_what_lies_behind_the_archive_is_passed_over(junk: bytes) -> None:
    assert read(archive(SMALL, comment=b"a comment", suffix=junk)) == read(archive(SMALL))


def test_the_record_whose_comment_ends_the_object_goes_before_one_with_something_behind() -> None:
    inner = archive([Made(b"other")])
    whole = archive([Made(b"inner.zip", inner), *SMALL])
    assert [entry.name for entry in read(whole)] == ["inner.zip", "orders.csv", "orders.json", "empty/"]
    comment = archive(SMALL, comment=end(0, 0, 0) + b"and more")
    assert read(comment) == read(archive(SMALL))


NESTED = [Made(b"inner.zip", archive(SMALL)), Made(b"none.zip", archive([])), Made(b"packed", b"x" * 99, 8)]


@pytest.mark.parametrize(
    "whole",
    [
        archive(SMALL),
        archive(SMALL, comment=b"a comment, PK\5\6 in it"),
        archive64(SMALL, ["count", "size", "offset"]),
        archive(NESTED),
        archive(NESTED[::-1]),
        archive([Made(b"sfx.exe", b"MZ" + archive(SMALL))]),
    ],
    ids=["plain", "comment", "zip64", "nested", "nested last", "nested with a prefix"],
)
def test_an_archive_that_was_cut_is_damaged_wherever_it_was(whole: bytes) -> None:
    entries = read(whole)
    for length in range(len(whole)):
        with pytest.raises(Damaged) as raised:
            read(whole[:length])
        assert "\n" not in str(raised.value)
    assert read(whole) == entries


def test_an_archive_that_lost_its_beginning_is_damaged() -> None:
    whole = archive(SMALL)
    data, entries = directory(SMALL)
    for lost in range(1, len(data) + len(entries)):
        with pytest.raises(Damaged):
            read(whole[lost:])


@pytest.mark.parametrize("mask", [0x01, 0x40, 0x80, 0xFF])
def test_a_flipped_byte_is_an_answer_or_a_typed_error(mask: int) -> None:
    for whole in (archive(SMALL, comment=b"note"), archive64(SMALL, ["offset"])):
        answers = errors = 0
        for at in range(len(whole)):
            bent = bytearray(whole)
            bent[at] ^= mask
            if isinstance(outcome(bytes(bent)), str):
                errors += 1
            else:
                answers += 1
        assert answers > 10
        assert errors > 10


@settings(max_examples=150)
@given(st.binary(max_size=300), st.booleans())
def test_junk_is_damaged(junk: bytes, ends: bool) -> None:
    found = outcome(junk + end(1, len(junk) % 120, 0) if ends else junk)
    assert isinstance(found, str) or not found or b"PK\1\2" in junk


@pytest.mark.parametrize(
    "junk",
    [
        b"PK\5\6",
        b"PK\6\7" + b"PK\6\6" * 4 + b"PK\5\6" + b"PK\6\6" * 4 + b"\0\0",
        b"PK\5\6" + bytes(18),
        b"PK\6\7" + bytes(16) + b"PK\5\6" + bytes(18),
    ],
)
def test_a_tail_made_to_be_searched_for_ever_is_not(junk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def counted(tail: bytes, signature: bytes) -> Iterator[int]:
        nonlocal looks
        for at in _found(tail, signature):
            looks += 1
            yield at

    monkeypatch.setattr("flowlane.streams.zip.end._found", counted)
    tail = junk * (TAIL // len(junk))
    with contextlib.suppress(FlowlaneError):
        find_end(tail, len(tail))
    assert 0 < looks < 8 * TAIL  # 303,677 of the second; 8 million without an end to the way back


# --------------------------------------------------------------------------- what an end record may not say


def ending(**changes: int) -> bytes:
    data, entries = directory(SMALL)
    values = {"count": 3, "size": len(entries), "offset": len(data), **changes}
    return data + entries + end(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"count": 2, "here": 2}, "has 3 entries and claims 2"),
        ({"count": 4, "here": 4}, "claims 4 entries in"),
        ({"count": 3, "here": 2}, "claims 3 entries, and that 2"),
        ({"size": 0xFFFFFFFF}, "too far ahead"),
        ({"offset": 0x7FFFFFFF}, "too far ahead"),
        ({"disk": 2, "first_disk": 1}, "volume 3 of a split archive"),
        ({"disk": 2, "first_disk": 2, "here": 1}, "volume 3 of a split archive"),
        ({"size": 160}, "where its directory must begin, is none"),
    ],
)
def test_an_end_record_that_contradicts_the_archive(changes: dict[str, int], what: str) -> None:
    with pytest.raises(Damaged, match=what):
        read(ending(**changes))


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (lambda e: e[: len(e) // 2] + b"XX\1\2" + e[len(e) // 2 + 4 :], "entry 1 of its directory"),
        (lambda e: e + b"\0" * 50, "entry 3 of its directory"),
        (lambda e: e + b"\0" * 9, "does not end with an entry, but 9 bytes behind entry 2"),
        (lambda e: e[:-1], "does not end with an entry"),
    ],
)
def test_a_directory_that_is_not_made_of_entries(broken: Callable[[bytes], bytes], what: str) -> None:
    same = [Made(b"a"), Made(b"b")] if "entry 1" in what else SMALL
    data, entries = directory(same)
    bad = broken(entries)
    with pytest.raises(Damaged, match=what):
        read(data + bad + end(len(same), len(bad), len(data)))


def test_zip64_that_cannot_be_found_or_is_one_of_several_volumes() -> None:
    data, entries = directory(SMALL)
    start = len(data) + len(entries)
    whole = archive64(SMALL, ["count"])
    for saturated in ([], ["count"]):
        with pytest.raises(Damaged, match="ZIP64 end record is not where it must be"):
            read(archive64(SMALL, saturated).replace(b"PK\6\6", b"PK\6\0"))
    with pytest.raises(Damaged, match="volume 3 of a split archive"):
        read(
            whole.replace(
                b"PK\6\7" + struct.pack("<LQL", 0, start, 1), b"PK\6\7" + struct.pack("<LQL", 0, start, 3)
            )
        )


def test_the_signature_of_a_directory_is_passed_over() -> None:
    data, entries = directory(SMALL)
    for length in (0, 5, 80):
        signed = entries + b"PK\5\5" + struct.pack("<H", length) + bytes(length)
        assert len(read(data + signed + end(3, len(signed), len(data)))) == 3
        with pytest.raises(Damaged):
            read(data + signed + b"\0" + end(3, len(signed) + 1, len(data)))


def test_what_is_no_archive() -> None:
    for data in (b"", b"PK", b"<html>404</html>", b"PK\3\4" + bytes(100), bytes(100_000)):
        with pytest.raises(Damaged, match="not a zip, or cut"):
            read(data)
    assert read(archive([])) == []


def test_an_error_page_in_place_of_an_archive_is_told_by_how_it_begins() -> None:
    with pytest.raises(Damaged, match=r"18 bytes: it begins with '<html>404</html>\\r\\n'"):
        read(b"<html>404</html>\r\n")
    with pytest.raises(Damaged, match="it is empty"):
        read(b"")
    with pytest.raises(Damaged, match=r"in its last 65,\d+ bytes$"):
        read(b"<html>" + bytes(100_000))


def test_an_archive_behind_another_one_is_damaged_behind_anything_else_it_is_read() -> None:
    whole = archive(SMALL)
    with pytest.raises(Damaged, match="two archives in one file"):
        read(whole + whole)
    shifted = read(b"#!/bin/sh\n" + whole)
    assert [entry.offset - 10 for entry in shifted] == [entry.offset for entry in read(whole)]


# --------------------------------------------------------------------------- how many


def many(count: int, *, extra: bytes = b"") -> bytes:
    one = record(Made(b"orders-000000.csv", extra=extra), 0)
    empty = local(Made(b"orders-000000.csv"))
    entries = bytearray(one * count)
    data = bytearray(empty * count)
    for n in range(count):
        name = b"%06d" % n
        entries[n * len(one) + 53 : n * len(one) + 59] = name
        entries[n * len(one) + 42 : n * len(one) + 46] = struct.pack("<L", n * len(empty))
        data[n * len(empty) + 37 : n * len(empty) + 43] = name
    return bytes(data + entries) + end(count & 0xFFFF, len(entries), len(data))


def test_more_members_than_the_limit_are_refused_before_they_are_read() -> None:
    data = many(60_000)
    with pytest.raises(Refused, match=r"60,000 entries or more, the limit is 50,000 \(ZipLimits.entries\)"):
        read(data)
    assert len(read(data, ZipLimits(entries=60_000))) == 60_000


def test_a_count_that_does_not_fit_its_field_is_modulo_65536() -> None:
    data = many(65_539)
    assert len(read(data, ZipLimits(entries=65_539))) == 65_539
    with pytest.raises(Refused, match="entries or more"):  # which its count does not tell
        read(data, ZipLimits(entries=65_538), block=1 << 16)


def test_a_directory_beyond_the_limit_is_refused() -> None:
    with pytest.raises(Refused, match=r"ZipLimits.directory"):
        read(archive(SMALL), ZipLimits(directory=100))


def test_fifty_thousand_entries_take_seconds_at_most() -> None:
    data = many(50_000, extra=b"UT\5\0\3abcdux\x0b\0\1\4\0\0\0\0\4\0\0\0\0")
    begun = time.process_time()
    found = read(data, block=128 << 10)
    taken = time.process_time() - begun
    assert [entry.name for entry in found[-2:]] == ["orders-049998.csv", "orders-049999.csv"]
    assert taken < 5  # 0.2 s of CPU on a fast machine; what grows faster than their number takes minutes


@pytest.mark.parametrize("bad", [0, -1, True, "5", float("nan")])
def test_a_limit_is_a_number_above_zero(bad: object) -> None:
    with pytest.raises(ConfigError, match="zip entries="):
        ZipLimits(entries=bad)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- one entry at fault


def fault(bad: Made, *, last: Made | None = None) -> str:
    """What is wrong with `bad`, which stands between two that are right."""
    first, second, third = read(archive([SMALL[0], bad, last or SMALL[1]]))
    assert (first.fault, third.fault) == ("", "")
    return second.fault


AES_FIELD = struct.pack("<2H", 0x9901, 7) + b"\2\0AE\3\x08\0"


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (Made(b"x", extra=b"\3\x11\x41\x33ab"), "extra field 0x1103 is longer than all of them"),
        (Made(b"x", extra=b"\1\0\4\0abcd", size=0xFFFFFFFF), "ZIP64 extra field is too short"),
        (Made(b"x", extra=b"\1\0\0\0", size=0xFFFFFFFF), "ZIP64 extra field is too short"),
        (Made(b"\xff\xfe", flags=UTF8), "its name claims to be UTF-8 and is not"),
        (Made(b"x", needed=64), "version 6.4 of the format, the newest known is 6.3"),
        (Made(b"x", method=AES, flags=1), "AES extra field is missing or too short"),
        (Made(b"x", method=AES, flags=1, extra=AES_FIELD[:-1]), "longer than all"),
        (Made(b"x", offset=0xFFFFFFF0), "local header would lie in the directory"),
        (Made(b"x", packed=0xFFFFFFFF), "overlapping entries"),
        (Made(b"x", packed=1), "overlapping entries"),
    ],
)
def test_a_fault_is_its_own_entry_s(bad: Made, what: str) -> None:
    assert what in fault(bad)


@pytest.mark.parametrize(
    "good",
    [
        Made(b"x", needed=63),
        Made(b"x", disk=7),  # there is one volume: this number is nonsense, and harmless
        Made(b"x", extra=b"\1\0\4\0abcd"),
        Made(b"x", method=AES, flags=1, extra=AES_FIELD),
        Made(b"x", extra=b"\0\0\0"),
    ],
)
def test_what_is_odd_and_harmless_is_no_fault(good: Made) -> None:
    assert fault(good) == ""


def test_what_the_aes_field_says() -> None:
    (found,) = read(archive([Made(b"x", b"data", AES, 1, AES_FIELD)]))
    assert (found.strength, found.aes_version, found.aes_method) == (3, 2, DEFLATE)
    assert (found.compression, found.encrypted) == (DEFLATE, True)


def test_entries_on_other_volumes() -> None:
    data, entries = directory([Made(b"here", disk=1), Made(b"there", disk=0)])
    here, there = read(data + entries + end(2, len(entries), len(data), disk=1, first_disk=1))
    assert here.fault == ""
    assert "begins on volume 1 of a split archive" in there.fault


@pytest.mark.parametrize(
    ("name", "attributes", "data", "kind"),
    [
        (b"a", 0, b"", "file"),
        (b"a", 0o100644 << 16, b"x", "file"),
        (b"a/", 0, b"", "directory"),
        (b"a", 0o040755 << 16, b"", "directory"),
        (b"a", 0x10, b"", "directory"),
        (b"a", 0x10, b"hidden", "file"),
        (b"a", 0o120777 << 16, b"target", "symlink"),
    ],
)
def test_kinds(name: bytes, attributes: int, data: bytes, kind: str) -> None:
    (found,) = read(archive([Made(name, data, attributes=attributes)]))
    assert found.kind == kind


def test_names_that_repeat_are_told_apart_by_their_index() -> None:
    found = read(archive([Made(b"a.csv", b"1"), Made(b"a.csv", b"22"), Made(b"a.csv", b"333")]))
    assert [(entry.index, entry.name, entry.size) for entry in found] == [
        (0, "a.csv", 1),
        (1, "a.csv", 2),
        (2, "a.csv", 3),
    ]
