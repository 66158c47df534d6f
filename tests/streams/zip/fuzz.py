"""Archives bent at random and read with all that is in them: a typed error or the truth, in bounded time and
memory.

What is bent are fields more than data, for most of the code is about those. Run for long by ``tests.prove``.
"""

from __future__ import annotations

import bz2
import faulthandler
import json
import os
import random
import resource
import signal
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from flowlane import FlowlaneError, ZipLimits
from flowlane.streams.members import PIECE
from flowlane.streams.zip.checks import refuse
from flowlane.streams.zip.entry import BZIP2, DEFLATE, Entry
from flowlane.streams.zip.member import Member
from tests.streams.zip.making import Made, archive, archive64, encrypted, read

#: Small, so that what is bent into a bomb is over soon. The entries of one archive are read all the same.
LIMITS = ZipLimits(entries=200, size=256 << 10, total=1 << 20, directory=1 << 20)
#: Seconds that one archive may take.
PATIENCE = 10.0
#: Bytes by which the process may have grown in the end.
GROWTH = 64 << 20
_ADDRESSES = 3 << 30

PASSWORD = b"helloworld"
TEXT = b"id,name\n" + b"".join(b"%d,number %d\n" % (n, n) for n in range(60))
_BZIP2 = bz2.compress(TEXT)

MADE = [
    Made(b"stored.csv", TEXT),
    Made(b"deflated.csv", TEXT, DEFLATE, extra=b"UT\5\0\3abcd", comment=b"a note"),
    Made("caf\u00e9.csv".encode(), TEXT, BZIP2, 0x800, cipher=_BZIP2),
    Made(b"large.csv", TEXT, DEFLATE, large=("size", "packed", "offset")),
    encrypted(b"secret.csv", TEXT, PASSWORD),
    Made(b"folder/", attributes=0x10),
]

FIELDS = [b"\0", b"\1", b"\xff", b"\0\0", b"\1\0", b"\xff\xff", b"\x99\x01", bytes(4), b"\xff" * 4, b"PK\1\2"]
SIGNATURES = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7")


def seeds() -> list[bytes]:
    """Archives of every kind: by hand, and those of the corpus where it is."""
    found = [
        archive(MADE, comment=b"PK\5\6 and so on"),
        archive64(MADE[:3], ["count", "offset"]),
        archive([Made(b"inner.zip", archive(MADE[:2])), *MADE[3:]], prefix=b"MZ" * 9),
    ]
    if folder := os.environ.get("FLOWLANE_CORPUS"):
        zips = Path(folder) / "zip"
        names = [file["file"] for file in json.loads((zips / "MANIFEST.json").read_text())["files"]]
        found += [(zips / name).read_bytes() for name in names]
    return [data for data in found if len(data) < 4000]


def bend(chance: random.Random, seed: bytes) -> bytes:
    """`seed` with a few fields changed, mostly in place; now and then cut, grown or doubled."""
    data = bytearray(seed)
    heads = [at for signature in SIGNATURES for at in _places(seed, signature)] or [0]
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        near = chance.random() < 0.7
        at = min(
            chance.choice(heads) + chance.randrange(60) if near else chance.randrange(len(data) + 1),
            len(data),
        )
        way = chance.randrange(12)
        if way < 6:
            field = chance.choice(
                (*FIELDS, chance.randbytes(1), struct.pack("<L", chance.randrange(len(data) + 99)))
            )
            data[at : at + len(field)] = field
        elif way < 9 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif way == 9:
            del data[at : at + chance.choice((1, 4, 50))]
        elif way == 10:
            data[at:at] = chance.randbytes(chance.choice((1, 4, 50)))
        else:
            other = chance.randrange(len(data) + 1)
            data[at:at] = data[other : other + chance.randrange(120)]
    return bytes(data)


def _places(data: bytes, signature: bytes) -> Iterator[int]:
    at = data.find(signature)
    while at >= 0:
        yield at
        at = data.find(signature, at + 1)


def attempt(chance: random.Random, data: bytes) -> Sequence[str]:
    """Read `data` and all its members; what became of each of them.

    Raises:
        AssertionError: something was accepted that is not true.
        Exception: whatever a reader lets through that is no error of flowlane's.
    """
    try:
        entries = read(data, LIMITS, block=chance.choice((7, 64, 1 << 20)))
    except FlowlaneError as error:
        return [_one_line(error)]
    return [_member(chance, data, entry) for entry in entries] or ["empty"]


def _member(chance: random.Random, data: bytes, entry: Entry) -> str:
    password = chance.choice((PASSWORD, b"password", None))
    block = chance.choice((1, 13, 1 << 20))
    member = Member(entry, password=password)
    size = crc = 0
    try:
        refuse(entry, LIMITS, password=password)
        packed = data[entry.offset : entry.limit]
        for at in range(0, len(packed), block):
            for piece in member.feed(packed[at : at + block]):
                size += len(piece)
                crc = zlib.crc32(piece, crc)
                assert 0 < len(piece) <= PIECE, f"{entry}: a piece of {len(piece)} bytes"
                assert size <= entry.size, f"{entry}: {size} bytes of {entry.size}"
        member.close()
    except FlowlaneError as error:
        return _one_line(error)
    assert size == entry.size, f"{entry}: {size} bytes, not {entry.size}"
    assert crc == entry.crc or entry.aes_version == 2, f"{entry}: {crc:x}, not {entry.crc:x}"
    return "read"


def _one_line(error: FlowlaneError) -> str:
    assert "\n" not in str(error), str(error)
    assert str(error).isprintable(), ascii(str(error))
    return type(error).__name__


class Late(BaseException):
    """An archive takes too long; no ``except Exception`` on the way takes it for damage."""


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    """A hang ends as an error; one that no signal interrupts, with the process and its stack."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Late(f"more than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, late)
    faulthandler.dump_traceback_later(6 * seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def campaign(seed: int, *, seconds: float = float("inf"), count: int = sys.maxsize) -> Counter[str]:
    """Bend and read archives, the same ones for the same `seed`, for so long or so many; what became of them.

    Raises:
        AssertionError: with the archive that shows it, in hexadecimal digits.
    """
    warnings.simplefilter("ignore", DeprecationWarning)  # of pycryptodome, about how WinZip derives keys
    chance, begun, some = random.Random(seed), time.monotonic(), seeds()
    done: Counter[str] = Counter()
    for each in some:  # warm: what is loaded and kept is no growth
        attempt(chance, each)
    before = _peak()
    while time.monotonic() - begun < seconds and done["archives"] < count:
        data = bend(chance, chance.choice(some))
        try:
            with _in_time(PATIENCE):
                done.update(attempt(chance, data))
        except (Exception, Late) as error:
            raise AssertionError(
                f"seed {seed}, archive {done['archives']}: {error!r} for {data.hex()}"
            ) from error
        done["archives"] += 1
    assert _peak() - before < GROWTH, f"seed {seed}: the process grew by {_peak() - before:,} bytes"
    return done


def apart(seed: int, seconds: float) -> Counter[str]:
    """As ``campaign``, in a process of its own, which may not take more than a few GiB of addresses."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, resource.RLIM_INFINITY))
    return campaign(seed, seconds=seconds)


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
