"""Gzip to blocks of whole lines, against the plain loops that a user would write around zlib or isal.

All read the same file in blocks of 1 MiB, with bounded output; the line count of each is checked. flowlane
proves every member's length and CRC on the way; the loops leave that to the library.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.archive import PIECE, make_piece
from benchmarks.harness import Bar, Candidate, Case, peak_mb, python

SIZE = 256 << 20
BLOCK = 1 << 20
SLICE = 256 << 10


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """The piece, decoded as often as it takes."""
    size = size or SIZE
    piece = scratch / "piece.gz"
    unit, lines = make_piece(piece, min(PIECE, size))
    count = max(1, round(size / unit))
    yield [
        Candidate(name, python("decode", kind, piece, count, lines * count))
        for name, kind in (("flowlane lines", "flowlane"), ("zlib loop", "zlib"), ("isal loop", "isal"))
    ]


CASE = Case(
    "decode",
    "gzip to blocks of whole JSON lines, MB of decoded bytes per CPU second",
    opened,
    {"speed": "MB/s-cpu", "ratio": "compression", "peak": "peak MB"},
    [
        Bar("flowlane lines", "speed", "at least", 1.7, "zlib loop"),
        Bar("flowlane lines", "peak", "at most", 50),
    ],
    peer="zlib loop",
)


def blocks(piece: Path, count: int) -> Iterator[bytes]:
    """The body, as it would come from a store."""
    for _ in range(count):
        with piece.open("rb") as file:
            while block := file.read(BLOCK):
                yield block


def flowlane(piece: Path, count: int) -> tuple[int, int]:
    """Decoded bytes and lines, by flowlane's streams."""
    from flowlane.streams.inflate import decoder
    from flowlane.streams.lines import Lines

    gzip, cutter = decoder(piece.name), Lines()
    size = lines = 0
    for block in blocks(piece, count):
        for part in gzip.feed(block):
            for whole in cutter.feed(part):
                size += len(whole.data)
                lines += whole.data.count(b"\n")
    gzip.close()
    assert not list(cutter.close())
    return size, lines


def loop(piece: Path, count: int, decompressobj: Callable[[int], Any]) -> tuple[int, int]:
    """Decoded bytes and lines, by a loop around a decompressor; what it hands out is not cut at lines."""
    inflater = decompressobj(31)
    size = lines = 0
    for block in blocks(piece, count):
        data = block
        while data:
            out = inflater.decompress(data, SLICE)
            size += len(out)
            lines += out.count(b"\n")
            data = inflater.unconsumed_tail
            if inflater.eof:
                data = inflater.unused_data
                inflater = decompressobj(31)
    return size, lines


def main(kind: str, piece: Path, count: int, expected: int) -> dict[str, float]:
    """One candidate, in this process."""
    began = time.process_time()
    if kind == "flowlane":
        size, lines = flowlane(piece, count)
    elif kind == "isal":
        from isal import isal_zlib

        size, lines = loop(piece, count, isal_zlib.decompressobj)
    else:
        size, lines = loop(piece, count, zlib.decompressobj)
    seconds = time.process_time() - began
    assert lines == expected, f"{lines:,} lines, not {expected:,}"
    return {"speed": size / seconds / 1e6, "ratio": size / (piece.stat().st_size * count), "peak": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
