from __future__ import annotations

import gzip
import io
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlane.errors import Damaged
from flowlane.streams.frames import Zstd
from flowlane.streams.inflate import Decoder, Plain, decoder, prove
from flowlane.streams.members import Gzip, inflater

ENGINES = ("isal", "zlib")
TEXT = b"".join(b'{"id":"%d","type":"PushEvent"}\n' % n for n in range(40))


def decode(decoder: Decoder, blocks: Sequence[bytes]) -> bytes:
    """All that `decoder` makes of `blocks`, which end there."""
    out = b"".join(piece for block in blocks for piece in decoder.feed(block))
    decoder.close()
    return out


def chopped(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """`data` in pieces that end at `cuts`."""
    marks = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(marks)]


def member(data: bytes, *, level: int = 6, flags: int = 0, extra: bytes = b"", name: bytes = b"n") -> bytes:
    """One gzip member with any of the optional header fields (RFC 1952, section 2.3)."""
    head = b"\x1f\x8b\x08" + bytes([flags]) + b"\1\2\3\4\0\xff"
    if flags & 4:
        head += struct.pack("<H", len(extra)) + extra
    if flags & 8:
        head += name + b"\0"
    if flags & 16:
        head += b"comment\0"
    if flags & 2:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
    body = deflate.compress(data) + deflate.flush()
    return head + body + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)


# --------------------------------------------------------------------------- gzip


@pytest.mark.parametrize("engine", ENGINES)
@given(
    parts=st.lists(st.binary(max_size=2000), min_size=1, max_size=5),
    levels=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    flags=st.lists(st.integers(0, 31), min_size=5, max_size=5),
    padding=st.integers(0, 600),
    cuts=st.lists(st.integers(min_value=0), max_size=20),
    piece=st.integers(1, 5000),
)
@settings(max_examples=150, deadline=None)
def test_gzip_is_what_pythons_gzip_says(
    engine: str,
    parts: list[bytes],
    levels: list[int],
    flags: list[int],
    padding: int,
    cuts: list[int],
    piece: int,
) -> None:
    made = (
        member(p, level=lv, flags=f, extra=p[:50]) for p, lv, f in zip(parts, levels, flags, strict=False)
    )
    data = b"".join(made) + bytes(padding)
    small = Gzip(piece=piece, name=engine)
    pieces = [out for block in chopped(data, cuts) for out in small.feed(block)]
    small.close()
    assert b"".join(pieces) == gzip.decompress(data) == b"".join(parts)
    assert all(0 < len(out) <= piece for out in pieces)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("step", [1, 2, 7])
def test_every_way_of_cutting_blocks(engine: str, step: int) -> None:
    data = b"".join(member(TEXT, flags=flags, extra=b"xx") for flags in range(32))
    blocks = [data[at : at + step] for at in range(0, len(data), step)]
    assert decode(Gzip(name=engine), blocks) == TEXT * 32


@pytest.mark.parametrize("engine", ENGINES)
def test_gzip_cut_at_every_byte_is_damaged(engine: str) -> None:
    first = member(TEXT, flags=31)
    data = first + member(TEXT[:500])
    for cut in range(len(data)):
        if cut == len(first):  # the end of a member is an end of the file
            assert decode(Gzip(name=engine), [data[:cut]]) == TEXT
            continue
        with pytest.raises(Damaged, match=r"^(cut: |not gzip: the body is empty)"):
            decode(Gzip(name=engine), [data[:cut]])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flipped_bit_never_changes_what_comes_out(engine: str) -> None:
    data = member(TEXT)
    passed = set()
    for at in range(len(data)):
        for bit in range(8):
            bad = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            verdict = _verdict(Gzip(name=engine), [bad])
            assert verdict in (None, TEXT)
            if verdict is not None:
                passed.add(at)
    # Nobody reads the bit "text" of FLG, the time, the maker's flags, the system, and the bits that fill up
    # the last byte of the data; every other bit is proven.
    assert passed <= {*range(3, 10), len(data) - 9}


@given(
    edits=st.lists(st.tuples(st.integers(min_value=0), st.integers(1, 255)), min_size=1, max_size=4),
    cuts=st.lists(st.integers(min_value=0), max_size=5),
)
@settings(max_examples=300, deadline=None)
def test_isal_and_zlib_agree(edits: list[tuple[int, int]], cuts: list[int]) -> None:
    data = bytearray(member(TEXT, flags=31) + member(TEXT))
    for at, change in edits:
        data[at % len(data)] ^= change
    verdicts = {_verdict(Gzip(name=engine), chopped(bytes(data), cuts)) for engine in ENGINES}
    assert len(verdicts) == 1


def _verdict(decoder: Decoder, blocks: list[bytes]) -> bytes | None:
    try:
        return decode(decoder, blocks)
    except Damaged:
        return None


@given(data=st.binary(max_size=400), cuts=st.lists(st.integers(min_value=0), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_a_verdict(data: bytes, cuts: list[int]) -> None:
    for prefix in (b"", b"\x1f\x8b\x08\0\0\0\0\0\0\0", b"\x28\xb5\x2f\xfd"):
        for make in (Gzip, Zstd):
            _verdict(make(), chopped(prefix + data, cuts))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not gzip: the body is empty"),
        (b"<html><h1>404 Not Found</h1>\n" * 5, r"not gzip: it begins with '<html><h1>404 Not Found</h1>\\n"),
        (b"\x1f", "cut: the body ends inside the header of gzip member 1"),
        (b"\0\0\0", "not gzip: it begins with"),
        (member(TEXT) + b"garbage", "damaged: 'garbage' behind the end of gzip member 1"),
        (member(TEXT) + b"\0\0garbage", "damaged: 'garbage' behind the end of gzip member 1"),
        (member(TEXT)[:-8] + b"\0\0\0\0" + member(TEXT)[-4:], "has CRC .*, its trailer says 00000000"),
        (member(TEXT)[:-4] + b"\1\0\0\0", "bytes, its trailer says 1"),
        (member(TEXT)[:-2], "cut: the body ends inside the trailer of gzip member 1"),
        (member(TEXT) * 2 + member(TEXT)[:50], "cut: the body ends inside the data of gzip member 3"),
        (b"\x1f\x8b\x08\x20" + member(b"")[4:], "not gzip"),
        (b"\x1f\x8b\x07\x00" + member(b"")[4:], "not gzip"),
        (
            member(b"", flags=2)[:10] + b"??" + member(b"", flags=2)[12:],
            "a gzip header does not match its own CRC",
        ),
        (b"\x1f\x8b\x08\x08" + b"n" * 200_000, "a gzip header of more than 131,072 bytes"),
    ],
    ids=range(14),
)
def test_what_is_wrong_is_said_in_one_line(engine: str, data: bytes, says: str) -> None:
    for step in (1 << 20, 1000):
        with pytest.raises(Damaged, match=says) as caught:
            decode(Gzip(name=engine), [data[at : at + step] for at in range(0, len(data), step)])
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("engine", ENGINES)
def test_zeros_behind_a_member_are_padding(engine: str) -> None:
    for padding in (1, 511, 5000, 70_000):
        data = member(TEXT) + bytes(padding) + member(b"more") + bytes(padding)
        assert decode(Gzip(name=engine), [data]) == gzip.decompress(data) == TEXT + b"more"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bomb_comes_in_small_pieces(engine: str) -> None:
    data = gzip.compress(bytes(50 << 20))
    sizes = [len(piece) for piece in Gzip(name=engine).feed(data)]
    assert sum(sizes) == 50 << 20
    assert max(sizes) <= 256 << 10


def test_many_tiny_members_take_linear_time() -> None:
    """20-byte members: if each end copied the rest of the block, this would copy 26 GB and take minutes."""
    data = member(b"") * 50_000
    assert decode(Gzip(), [data]) == b""


def test_isal_is_used_where_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inflater("").error is inflater("isal").error
    inflater.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "isal.isal_zlib", None)
    try:
        assert inflater("").error is zlib.error
        assert decode(Gzip(), [member(TEXT)]) == TEXT
        with pytest.raises(ImportError):
            inflater("isal")
    finally:
        inflater.cache_clear()


# --------------------------------------------------------------------------- zstd


def frame(data: bytes, *, level: int = 3, checksum: bool = True, size: bool = True, window: int = 0) -> bytes:
    """One zstd frame."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, write_checksum=checksum, write_content_size=size, window_log=window
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def skippable(data: bytes, kind: int = 0) -> bytes:
    """A skippable frame (RFC 8878, section 3.1.2)."""
    return struct.pack("<II", 0x184D2A50 + kind, len(data)) + data


def reference(data: bytes) -> bytes:
    """What the zstandard package itself makes of `data`."""
    return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read()


@given(
    parts=st.lists(
        st.one_of(st.binary(max_size=3000), st.integers(0, 400_000).map(bytes)), min_size=1, max_size=4
    ),
    levels=st.lists(st.integers(-5, 19), min_size=4, max_size=4),
    options=st.lists(
        st.tuples(st.booleans(), st.booleans(), st.sampled_from([0, 10, 17])), min_size=4, max_size=4
    ),
    cuts=st.lists(st.integers(min_value=0), max_size=20),
)
@settings(max_examples=150, deadline=None)
def test_zstd_is_what_zstandard_says(
    parts: list[bytes], levels: list[int], options: list[tuple[bool, bool, int]], cuts: list[int]
) -> None:
    data = b""
    for n, (part, level, (checksum, size, window)) in enumerate(zip(parts, levels, options, strict=False)):
        data += frame(part, level=level, checksum=checksum, size=size, window=window) + skippable(part[:9], n)
    small = Zstd()
    pieces = [out for block in chopped(data, cuts) for out in small.feed(block)]
    small.close()
    assert b"".join(pieces) == b"".join(parts) == reference(data)
    assert all(0 < len(out) <= 256 << 10 for out in pieces)


@pytest.mark.parametrize("checksum", [True, False])
def test_zstd_cut_at_every_byte_is_damaged(*, checksum: bool) -> None:
    noise = random.Random(0).randbytes(300)
    first = skippable(b"abc") + frame(TEXT, checksum=checksum)
    data = first + frame(noise, checksum=checksum)
    for cut in range(len(data)):
        if cut == len(first):
            assert decode(Zstd(), [data[:cut]]) == TEXT
            continue
        for step in (1 << 20, 1):
            with pytest.raises(Damaged, match=r"^(cut: |not zstd: there is no frame)"):
                decode(Zstd(), [data[at : min(at + step, cut)] for at in range(0, cut, step)])


def test_a_flipped_bit_of_a_checked_frame_never_changes_what_comes_out() -> None:
    data = frame(TEXT)
    for at in range(len(data)):
        for bit in range(8):
            bad = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            try:
                out = decode(Zstd(), [bad])
            except Damaged:
                continue
            # Flags that nobody reads, or a window larger than needed: the content is proven by its checksum.
            assert out == TEXT


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not zstd: there is no frame in it"),
        (skippable(b"abc"), "not zstd: there is no frame in it"),
        (b"<html>404 Not Found</html>", "not zstd: it begins with '<html>404 Not Found</html>'"),
        (gzip.compress(b"x"), "not zstd: it begins with"),
        (frame(TEXT) + b"garbage", "damaged: 'garbage' behind the end of zstd frame 1"),
        (frame(TEXT) + b"\0", "cut: the zstd body ends inside frame 2"),
        (frame(TEXT)[:-1] + b"?", "zstd frame 1: .*checksum"),
        (frame(TEXT)[:-5], "cut: the zstd body ends inside frame 1"),
        (b"\x28\xb5\x2f\xfd\x00\xff\1\0\0", "zstd frame 1: .*memory"),
        (b"\x28\xb5\x2f\xfd\x00\x58" + b"\xff" * 20, "zstd frame 1 holds a block of an impossible kind"),
    ],
    ids=range(10),
)
def test_what_is_wrong_with_zstd_is_said_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(Damaged, match=says) as caught:
        decode(Zstd(), [data])
    assert "\n" not in str(caught.value)


def test_a_zstd_bomb_comes_in_small_pieces() -> None:
    sizes = [len(piece) for piece in Zstd().feed(frame(bytes(200 << 20)))]
    assert sum(sizes) == 200 << 20
    assert max(sizes) <= 256 << 10


# --------------------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.json.gz", Gzip),
        ("A.GZ", Gzip),
        ("https://host/a.gz?signature=x.zst#.txt", Gzip),
        ("s3://bucket/a.csv.zst", Zstd),
        ("a.json", Plain),
        ("gz", Plain),
        ("https://host.gz/a", Plain),
        ("file:///a.gz/b", Plain),
    ],
)
def test_the_suffix_decides(name: str, kind: type) -> None:
    assert type(decoder(name)) is kind
    assert (prove(name) is None) == (kind is Plain)


def test_a_proof_counts() -> None:
    for name, encode in (("a.gz", member), ("a.zst", frame)):
        proof = prove(name)
        assert proof is not None
        data = encode(TEXT * 500)
        for block in blocks(data, 1000):
            proof.feed(block)
        proof.close()
        assert (proof.encoded, proof.decoded) == (len(data), len(TEXT) * 500)
        refuted = prove(name)
        assert refuted is not None
        refuted.feed(data[:-1])
        with pytest.raises(Damaged):
            refuted.close()


def blocks(data: bytes, size: int) -> Iterator[bytes]:
    """`data` in blocks of `size`."""
    return (data[at : at + size] for at in range(0, len(data), size))


def test_plain_is_plain() -> None:
    assert decode(Plain(), [b"a", b"", b"b"]) == b"ab"
