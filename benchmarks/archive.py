"""An archive of any size, made of one piece: GH-Archive-like JSON lines, one gzip member, repeated.

The same size always gives the same bytes. Only the piece is kept in a file; the server sends it again and
again, so that a large archive costs neither disk nor time to make.
"""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

PIECE = 16 << 20  #: bytes of a compressed piece, about
_WORDS = ["fix", "add", "merge", "update", "remove", "test", "docs", "bump", "cache", "parser", "client"]


_BLOCK = 1 << 20


def make_piece(path: Path, size: int = PIECE) -> tuple[int, int]:
    """Write a gzip member of about `size` bytes to `path`; returns its exact size and its lines."""
    chance = random.Random(20240101)
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    written = count = 0
    with path.open("wb") as file:
        while written < size:
            lines = b"".join(_line(chance) for _ in range(200))
            count += 200
            written += file.write(packer.compress(lines))
        written += file.write(packer.flush())
    return written, count


def _line(chance: random.Random) -> bytes:
    """One event: nested, about 1 KiB, mostly names and URLs; its ids, hashes and times do not repeat."""
    login = f"{chance.choice(_WORDS)}{chance.randrange(50_000)}"
    name = f"{login}/{chance.choice(_WORDS)}-{chance.choice(_WORDS)}"
    base = f"https://api.github.com/repos/{name}"
    actor = chance.randrange(10**7)
    commits = [
        {
            "sha": f"{chance.getrandbits(160):040x}",
            "author": {"email": f"{login}@users.noreply.github.com", "name": login},
            "message": f"{' '.join(chance.choices(_WORDS, k=8))} (#{chance.randrange(10**4)})",
            "distinct": True,
            "url": f"{base}/commits/",
        }
        for _ in range(chance.choice((1, 1, 2)))
    ]
    event = {
        "id": str(chance.randrange(10**10, 10**11)),
        "type": "PushEvent",
        "actor": {
            "id": actor,
            "login": login,
            "display_login": login,
            "gravatar_id": "",
            "url": f"https://api.github.com/users/{login}",
            "avatar_url": f"https://avatars.githubusercontent.com/u/{actor}?",
        },
        "repo": {"id": chance.randrange(10**8), "name": name, "url": base},
        "payload": {
            "push_id": chance.randrange(10**9),
            "ref": "refs/heads/master",
            "head": f"{chance.getrandbits(160):040x}",
            "commits": commits,
        },
        "public": True,
        "created_at": f"2024-01-01T00:{chance.randrange(60):02}:{chance.randrange(60):02}Z",
    }
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


def is_whole(path: Path, piece: Path, size: int) -> bool:
    """Whether the file at `path` has `size` bytes, every one as served."""
    if path.stat().st_size != size:
        return False
    with path.open("rb") as landed, piece.open("rb") as served:
        for _ in range(size // piece.stat().st_size):
            served.seek(0)
            while block := served.read(_BLOCK):
                if landed.read(len(block)) != block:
                    return False
    return True
