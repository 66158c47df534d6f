"""Members against what was packed: every codec however it is fed, and every lie told."""

from __future__ import annotations

import bz2
import hashlib
import hmac
import random
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
import stream_unzip
from Crypto.Cipher import AES as Cipher
from Crypto.Util import Counter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from flowlane.errors import Damaged, Refused
from flowlane.streams.members import PIECE
from flowlane.streams.zip import codecs
from flowlane.streams.zip.entry import AES, BZIP2, DEFLATE, DEFLATE64, DESCRIPTOR, ENCRYPTED, STORED, Entry
from flowlane.streams.zip.member import HEADER, Member
from flowlane.streams.zip.run import AT_ONCE, GAP, ROOM, SPAN, Run, batches, end_of
from tests.streams.zip.making import Made, archive, encrypted
from tests.streams.zip.making import read as listed

ENGINES = ("isal", "zlib")
TEXT = b"".join(b"%d,city %d,some text that repeats\n" % (n, n % 7) for n in range(2000))
#: For what takes its time over each byte, or is fed byte by byte: longer than any block or look-ahead.
SHORT = TEXT[:5000]
NAME = b"orders.csv"


def body_of(method: int, data: bytes) -> bytes:
    """`data`, packed by `method`."""
    if method == STORED:
        return data
    if method == BZIP2:
        return bz2.compress(data)
    # Without matches, deflate64 is the same as deflate.
    strategy = zlib.Z_HUFFMAN_ONLY if method == DEFLATE64 else zlib.Z_DEFAULT_STRATEGY
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 8, strategy)
    return deflate.compress(data) + deflate.flush()


def header(entry: Entry, **lies: Any) -> bytes:
    """The local header of `entry`, with what it says otherwise."""
    told: dict[str, Any] = {
        "flags": entry.flags,
        "method": entry.method,
        "crc": entry.crc,
        "name": NAME,
        "extra": b"",
    }
    told |= {"packed": entry.packed, "size": entry.size, "magic": b"PK\3\4", "time": 0x6A00} | lies
    if told["flags"] & DESCRIPTOR and not lies:
        told |= {"crc": 0, "packed": 0, "size": 0}
    fixed = [told[key] for key in ("magic", "flags", "method", "time", "crc", "packed", "size")]
    magic, flags, method, time, *sizes = fixed
    lengths = len(told["name"]), len(told["extra"])
    head: bytes = struct.pack("<4sHHHHHIIIHH", magic, 45, flags, method, time, 0x5A21, *sizes, *lengths)
    return b"".join((head, told["name"], told["extra"]))


def packed(data: bytes, method: int = DEFLATE, **changes: Any) -> tuple[Entry, bytes]:
    """An entry, and its bytes in the archive."""
    body = body_of(method, data)
    entry = Entry(3, NAME.decode(), 0, len(body), len(data), zlib.crc32(data), method)
    entry = replace(entry, **changes)
    whole = header(entry) + body
    return replace(entry, limit=len(whole)), whole


def aes(data: bytes, method: int, strength: int, version: int, password: bytes) -> tuple[Entry, bytes]:
    """As ``packed``, encrypted as WinZip has it (www.winzip.com/aes_info.htm)."""
    body = body_of(method, data)
    salt = bytes(range(4 + 4 * strength))
    length = 8 + 8 * strength
    keys = hashlib.pbkdf2_hmac("sha1", password, salt, 1000, 2 * length + 2)
    counter = Counter.new(nbits=128, little_endian=True)
    cipher = Cipher.new(keys[:length], Cipher.MODE_CTR, counter=counter).encrypt(body)
    code = hmac.new(keys[length : 2 * length], cipher, "sha1").digest()[:10]
    body = salt + keys[-2:] + cipher + code
    crc = zlib.crc32(data) if version == 1 else 0
    kind = {"flags": ENCRYPTED, "strength": strength, "aes_method": method, "aes_version": version}
    entry = Entry(3, NAME.decode(), 0, len(body), len(data), crc, AES, **kind)  # type: ignore[arg-type]
    extra = struct.pack("<HHH2sBH", 0x9901, 7, version, b"AE", strength, method)
    whole = header(entry, extra=extra) + body
    return replace(entry, limit=len(whole)), whole


def read(entry: Entry, blocks: Sequence[bytes], **options: Any) -> bytes:
    """The member out of `blocks`, proven."""
    member = Member(entry, **options)
    out = []
    for block in blocks:
        for piece in member.feed(block):
            assert 0 < len(piece) <= PIECE
            out.append(piece)
    member.close()
    assert member.ended
    return b"".join(out)


def cut(data: bytes, step: int) -> list[bytes]:
    return [data[at : at + step] for at in range(0, len(data), step)]


# --------------------------------------------------------------------------- what is right

METHODS = [STORED, DEFLATE, DEFLATE64, BZIP2]


@pytest.mark.parametrize("method", METHODS)
@given(
    data=st.one_of(st.binary(max_size=3000), st.just(SHORT)),
    step=st.sampled_from([1, 3, 29, 30, 31, 1000, 1 << 20]),
    behind=st.binary(max_size=40),
)
@example(data=TEXT, step=1000, behind=b"behind")
@example(data=TEXT, step=1 << 20, behind=b"")
@settings(deadline=None, max_examples=30)
def test_what_was_packed_comes_out(method: int, data: bytes, step: int, behind: bytes) -> None:
    entry, whole = packed(data, method)
    assert read(entry, cut(whole + behind, step)) == data


@pytest.mark.parametrize("engine", ENGINES)
def test_both_engines_inflate_alike(engine: str) -> None:
    data = random.Random(1).randbytes(300_000) + bytes(3_000_000)
    entry, whole = packed(data)
    for step in (100, 70_000, 1 << 30):
        assert read(entry, cut(whole, step), name=engine) == data


@pytest.mark.parametrize("method", METHODS)
def test_sizes_may_stand_behind_the_data(method: int) -> None:
    entry, whole = packed(TEXT, method, flags=DESCRIPTOR)
    descriptor = b"PK\7\10" + struct.pack("<III", entry.crc, entry.packed, entry.size)
    assert read(entry, cut(whole + descriptor, 500)) == TEXT


def test_a_local_header_of_its_own_length() -> None:
    entry, whole = packed(TEXT)
    whole = (
        header(entry, extra=b"\x55\x54" + struct.pack("<H", 600) + bytes(600)) + whole[HEADER + len(NAME) :]
    )
    member = Member(replace(entry, limit=0))
    assert b"".join(piece for block in cut(whole, 100) for piece in member.feed(block)) == TEXT
    member.close()
    assert member.start == HEADER + len(NAME) + 604


@pytest.mark.parametrize("both", [True, False])
def test_sizes_in_zip64_form(both: bool) -> None:
    entry, whole = packed(TEXT)
    full = 0xFFFFFFFF
    field = struct.pack("<QQ", entry.size, entry.packed) if both else struct.pack("<Q", entry.packed)
    extra = b"\xfe\xca\2\0ab" + struct.pack("<HH", 1, len(field)) + field
    sizes = {"packed": full} | ({"size": full} if both else {})
    blocks = [header(entry, extra=extra, **sizes) + whole[HEADER + len(NAME) :]]
    assert read(replace(entry, limit=0), blocks) == TEXT
    lying = extra[:-8] + struct.pack("<Q", entry.packed + 1)
    with pytest.raises(Damaged, match=rf"a packed size of {entry.packed + 1:,}, the directory says"):
        read(entry, [header(entry, extra=lying, **sizes)])


# --------------------------------------------------------------------------- encrypted


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("method", [STORED, DEFLATE, BZIP2])
def test_aes(method: int, strength: int, version: int) -> None:
    for data in (b"", b"x", SHORT, TEXT):
        entry, whole = aes(data, method, strength, version, b"secret")
        for step in (4096, 1 << 20) if data is TEXT else (1, 7, 4096, 1 << 20):
            assert read(entry, cut(whole, step), password="secret") == data
        directory = b"PK\1\2" + bytes(60)
        (_, _, chunks), *_ = (
            stream_unzip.stream_unzip([whole + directory], password=b"secret")
            if not data
            else [(b"", 0, [data])]
        )
        assert b"".join(chunks) == data


@pytest.mark.parametrize("data", [b"", b"x", SHORT, TEXT], ids=len)
@pytest.mark.parametrize("late", [False, True])
def test_zipcrypto(data: bytes, late: bool) -> None:
    """With the CRC, or where that came later the time, as the last of the random bytes."""
    made = encrypted(NAME, data, b"secret")
    entry = Entry(3, NAME.decode(), 0, len(made.cipher), len(data), zlib.crc32(data), STORED, flags=ENCRYPTED)
    whole = header(entry) + made.cipher
    if late:
        entry = replace(entry, flags=ENCRYPTED | DESCRIPTOR)
        whole = header(entry, time=zlib.crc32(data) >> 24 << 8, crc=0, packed=0, size=0) + made.cipher
    for step in (4096, 1 << 20) if data is TEXT else (1, 7, 4096, 1 << 20):
        assert read(entry, cut(whole, step), password=b"secret") == data


def test_a_wrong_password_is_told_and_not_shown() -> None:
    made = encrypted(NAME, TEXT[:100], b"secret")
    weak = Entry(3, NAME.decode(), 0, len(made.cipher), 100, zlib.crc32(TEXT[:100]), STORED, flags=ENCRYPTED)
    for entry, whole in ((weak, header(weak) + made.cipher), aes(TEXT, DEFLATE, 3, 2, b"secret")):
        with pytest.raises(Refused, match=r"^entry 3 \('orders.csv'\) is not read: the password is wrong$"):
            read(entry, [whole], password="hunter2")
        with pytest.raises(Refused, match="give password="):
            read(entry, [whole])


def test_a_wrong_password_that_passes_the_check_is_hinted_at() -> None:
    """One in 256 does, for ZipCrypto."""
    made = encrypted(NAME, TEXT, b"secret")
    entry = Entry(3, NAME.decode(), 0, len(made.cipher), len(TEXT), zlib.crc32(TEXT), STORED, flags=ENCRYPTED)
    told = set()
    for number in range(2000):
        try:
            read(entry, [header(entry) + made.cipher], password=f"wrong {number}")
        except Refused:
            continue
        except Damaged as error:
            told.add(str(error).partition("says")[2].partition("(")[2])
            break
    assert told == {"or the password is wrong)"}


@pytest.mark.parametrize("version", [1, 2])
def test_aes_data_that_was_touched(version: int) -> None:
    entry, whole = aes(TEXT, STORED, 3, version, b"secret")
    for place in (-11, -5, 100):
        touched = bytearray(whole)
        touched[place] ^= 1
        with pytest.raises(Damaged, match=r"authentication code .* \(or the password is wrong\)"):
            read(entry, cut(bytes(touched), 999), password=b"secret")


@pytest.mark.parametrize("count", [0, 11, 27])
def test_too_little_for_an_encryption(count: int) -> None:
    entry, _ = aes(b"", STORED, 3, 2, b"secret")
    entry = replace(entry, packed=count, limit=0)
    with pytest.raises(Damaged, match="too few for what encryption adds"):
        read(entry, [header(entry), bytes(count)], password=b"x")


# --------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("lies", "what"),
    [
        ({"magic": b"PK\3\5"}, r"no local header at byte 0: 'PK\\x03\\x05"),
        ({"name": b"others.csv"}, r"the name 'others.csv', the directory says 'orders.csv'"),
        ({"method": STORED}, r"method 0, the directory says 8"),
        ({"flags": ENCRYPTED}, r"the encryption bit 1, the directory says 0"),
        ({"packed": 17}, r"a packed size of 17, the directory says [\d,]+"),
        ({"size": 17}, r"a size of 17, the directory says [\d,]+"),
        ({"crc": 17}, r"a CRC of 00000011, the directory says [0-9a-f]{8}"),
        ({"extra": bytes(5)}, r"goes on to byte [\d,]+, but ends at byte [\d,]+ at the latest"),
    ],
)
def test_a_local_header_that_disagrees(lies: dict[str, Any], what: str) -> None:
    entry, whole = packed(TEXT)
    for step in (1, 1 << 20):
        with pytest.raises(Damaged, match=rf"^entry 3 \('orders.csv'\): .*{what}"):
            read(entry, cut(header(entry, **lies) + whole[HEADER + len(NAME) :], step))


@pytest.mark.parametrize("method", METHODS)
def test_more_comes_out_than_was_declared(method: int) -> None:
    entry, whole = packed(TEXT, method)
    lying = replace(entry, size=entry.size - 1, flags=DESCRIPTOR)
    whole = header(lying) + whole[HEADER + len(NAME) :]
    member = Member(lying)
    with pytest.raises(
        Damaged, match=rf"more bytes come out of it than the {len(TEXT) - 1:,} of the directory"
    ):
        list(member.feed(whole))


def test_a_bomb_is_left_at_the_size_declared() -> None:
    entry, whole = packed(bytes(50_000_000))
    lying = replace(entry, size=1000, flags=DESCRIPTOR)
    member = Member(lying)
    pieces = member.feed(header(lying) + whole[HEADER + len(NAME) :])
    with pytest.raises(Damaged, match="more bytes come out"):
        next(pieces)


@pytest.mark.parametrize("method", METHODS)
def test_less_comes_out_than_was_declared(method: int) -> None:
    entry, whole = packed(TEXT, method)
    lying = replace(entry, size=entry.size + 1, flags=DESCRIPTOR)
    with pytest.raises(Damaged, match=rf"it has {len(TEXT):,} bytes, the directory says {len(TEXT) + 1:,}"):
        read(lying, [header(lying) + whole[HEADER + len(NAME) :]])


@pytest.mark.parametrize("method", METHODS)
def test_another_crc(method: int) -> None:
    entry, whole = packed(TEXT, method)
    lying = replace(entry, crc=entry.crc ^ 1, flags=DESCRIPTOR)
    with pytest.raises(Damaged, match=r"its CRC is [0-9a-f]{8}, the directory says [0-9a-f]{8}"):
        read(lying, [header(lying) + whole[HEADER + len(NAME) :]])


@pytest.mark.parametrize("step", [1, 100, 1 << 20])
@pytest.mark.parametrize("method", [DEFLATE, DEFLATE64, BZIP2])
def test_a_stream_that_ends_early(method: int, step: int) -> None:
    entry, whole = packed(TEXT, method)
    lying = replace(entry, packed=entry.packed + 20, flags=DESCRIPTOR, limit=0)
    with pytest.raises(Damaged, match=r"stream ends \d+ bytes before its data does"):
        read(lying, cut(header(lying) + whole[HEADER + len(NAME) :] + bytes(20), step))


@pytest.mark.parametrize("method", [DEFLATE, DEFLATE64, BZIP2])
def test_a_stream_that_ends_late(method: int) -> None:
    entry, whole = packed(TEXT, method)
    lying = replace(entry, packed=entry.packed - 1, flags=DESCRIPTOR)
    with pytest.raises(Damaged, match=r"stream goes on where its data ends"):
        read(lying, [header(lying) + whole[HEADER + len(NAME) :]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [0, 10, 35, 60])
def test_a_cut_archive(method: int, kept: int) -> None:
    entry, whole = packed(TEXT, method)
    what = "inside its local header" if kept < HEADER + len(NAME) else r"cut: [\d,]+ of its [\d,]+ bytes"
    with pytest.raises(Damaged, match=what):
        read(entry, cut(whole[:kept], 7))


@pytest.mark.parametrize("method", METHODS)
@given(data=st.binary(min_size=1, max_size=400), place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_a_flipped_bit_is_found(method: int, data: bytes, place: int, bit: int) -> None:
    entry, whole = packed(data, method)
    begin = HEADER + len(NAME)
    touched = bytearray(whole)
    touched[begin + place % (len(whole) - begin)] ^= 1 << bit
    with suppress(Damaged):  # or it is a bit that means nothing, behind the end of a stream
        assert read(entry, [bytes(touched)]) == data


@given(noise=st.binary(max_size=3000), method=st.sampled_from(METHODS))
@settings(deadline=None, max_examples=100)
def test_noise_is_damaged(noise: bytes, method: int) -> None:
    entry = Entry(0, NAME.decode(), 0, len(noise), 1 << 20, 1, method, flags=DESCRIPTOR)
    with pytest.raises(Damaged):
        read(entry, [header(entry) + noise])


def test_a_deflate64_code_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Incomplete codes are legal to write down; stream-inflate looks for one that never comes."""
    bits = "1" + "01"  # the last block, with dynamic codes
    bits += format(0, "05b")[::-1] + format(0, "05b")[::-1] + format(14, "04b")[::-1]
    order = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1]
    bits += "".join(format({18: 1, 1: 1}.get(code, 0), "03b")[::-1] for code in order)
    bits += "1" + format(127, "07b")[::-1] + "1" + format(107, "07b")[::-1] + "0" + "1" + "0" * 0
    data = int(bits[::-1].ljust(8, "0"), 2).to_bytes((len(bits) + 7) // 8, "little") + b"\xff" * 400_000
    monkeypatch.setattr(codecs, "_INFLATE64_PATIENCE", 4 << 10)
    with pytest.raises(Damaged, match="a code without an end"):
        list(codecs.Deflate64().feed(data))


# --------------------------------------------------------------------------- in the middle, and in a row


@given(place=st.integers(0, len(TEXT)), step=st.sampled_from([1000, 1 << 20]))
def test_a_stored_member_goes_on_anywhere(place: int, step: int) -> None:
    entry, whole = packed(TEXT, STORED)
    member = Member(entry)
    assert not member.seekable
    list(member.feed(whole[: HEADER + len(NAME)]))
    assert member.seekable
    member.seek(place, zlib.crc32(TEXT[:place]))
    rest = whole[member.start + place :]
    assert b"".join(p for block in cut(rest, step) for p in member.feed(block)) == TEXT[place:]
    member.close()
    member.seek(place, zlib.crc32(TEXT[:place]) ^ 1)
    list(member.feed(rest))
    with pytest.raises(Damaged, match="CRC"):
        member.close()


def test_only_what_is_stored_plainly_can_be_sought_in() -> None:
    for entry, whole in (packed(TEXT), aes(TEXT, STORED, 1, 2, b"x")):
        member = Member(entry, password=b"x")
        list(member.feed(whole))
        assert not member.seekable


def row(datas: Sequence[bytes], gaps: Sequence[int]) -> tuple[list[Entry], bytes]:
    """Members one behind the other, with gaps."""
    entries, whole = [], b""
    for number, data in enumerate(datas):
        entry, body = packed(data, METHODS[number % 2])
        limit = len(whole) + len(body) + gaps[number % len(gaps)]
        entries.append(replace(entry, index=number, offset=len(whole), limit=limit))
        whole = (whole + body).ljust(limit, b"-")
    return entries, whole


@given(
    datas=st.lists(st.binary(max_size=300), max_size=6),
    gaps=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    left_out=st.sets(st.integers(0, 5)),
    step=st.sampled_from([1, 17, 100, 1 << 20]),
)
@settings(deadline=None)
def test_members_in_a_row(datas: list[bytes], gaps: list[int], left_out: set[int], step: int) -> None:
    entries, whole = row(datas, gaps)
    wanted = [entry for entry in entries if entry.index not in left_out]
    run = Run(wanted)
    start = wanted[0].offset if wanted else 0
    out = [member for block in cut(whole[start:], step) for member in run.feed(block)]
    assert run.ended
    assert out == [(entry, datas[entry.index]) for entry in wanted]
    assert list(run.close()) == []


@pytest.mark.parametrize("step", [1, 999, 1 << 20])
def test_a_row_that_is_cut_or_damaged(step: int) -> None:
    entries, whole = row([TEXT, TEXT, TEXT], [12])
    for whole_ones, count in ((0, 0), (0, 10), (0, 1000), (1, entries[1].offset + 20), (2, len(whole) - 13)):
        run = Run(entries)
        out = [member for block in cut(whole[:count], step) for member in run.feed(block)]
        assert out == [(entry, TEXT) for entry in entries[:whole_ones]]
        assert not run.ended
        for (entry, error), wanted in zip(run.close(), entries[whole_ones:], strict=True):
            assert entry == wanted
            assert isinstance(error, Damaged)
            assert "cut" in str(error)
            assert str(entry) in str(error)
        assert run.ended
    lying = [replace(entry, crc=entry.crc ^ (entry.index == 1), flags=0) for entry in entries]
    run = Run(lying)
    out = [member for block in cut(whole, step) for member in run.feed(block)]
    assert [read for _, read in out if isinstance(read, bytes)] == [TEXT, TEXT]
    error = out[1][1]
    assert isinstance(error, Damaged)
    assert "entry 1" in str(error)
    assert "CRC" in str(error)
    assert error.__traceback__ is None
    assert error.__context__ is None


def test_a_row_with_a_wrong_password_in_it() -> None:
    hidden = encrypted(NAME, b"a secret", b"right")
    data = archive([Made(NAME, b"plain"), hidden, Made(NAME, b"after")])
    opened = listed(data)
    out = dict(Run(opened, password=b"wrong").feed(data))
    assert [out[opened[0]], out[opened[2]]] == [b"plain", b"after"]
    assert isinstance(out[opened[1]], Refused)
    assert dict(Run(opened, password=b"right").feed(data))[opened[1]] == b"a secret"


@given(
    members=st.lists(
        st.tuples(
            st.integers(0, 2 * GAP),  # bytes before it
            st.integers(0, 2 * SPAN) | st.integers(0, 500),  # its own
            st.integers(0, ROOM // 2) | st.integers(0, 500) | st.just(2 * ROOM),  # inflated
        ),
        max_size=60,
    )
)
@example([(2 * GAP, 100, 100)] * (2 * AT_ONCE + 1))
@settings(deadline=None)
def test_stretches_are_bounded_and_hold_each_once(members: list[tuple[int, int, int]]) -> None:
    entries, at = [], 0
    for number, (gap, packed, size) in enumerate(members):
        offset, at = at + gap, at + gap + HEADER + packed
        entries.append(Entry(number, "x", offset, packed, size, 0, DEFLATE, limit=at))
    found = list(batches(entries))
    assert [entry for batch in found for stretch in batch for entry in stretch.entries] == entries
    for batch in found:
        assert 0 < len(batch) <= AT_ONCE
        together = [entry for stretch in batch for entry in stretch.entries]
        assert len(together) == 1 or sum(entry.size for entry in together) <= ROOM
        for stretch in batch:
            assert stretch.start == stretch.entries[0].offset
            assert stretch.end == end_of(stretch.entries[-1])
            assert len(stretch.entries) == 1 or stretch.end - stretch.start <= SPAN
            pairs = zip(stretch.entries, stretch.entries[1:], strict=False)
            assert all(after.offset - end_of(before) <= GAP for before, after in pairs)
    for before, after in pairwise(stretch for batch in found for stretch in batch):
        first = after.entries[0]
        near = first.offset - before.end <= GAP and end_of(first) - before.start <= SPAN
        assert not near or any(before is batch[-1] for batch in found), "no stretch is cut without need"
