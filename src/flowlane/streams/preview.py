"""How bytes that were refused are shown to a person."""

from __future__ import annotations


def preview(head: bytes) -> str:
    """What `head` looks like, for a message: its first 40 bytes, escaped, in quotes, on one line."""
    return ascii(bytes(head[:40]).decode("latin-1")) + ("..." if len(head) > 40 else "")
