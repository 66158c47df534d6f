"""How bytes that were refused are shown to a person."""

from __future__ import annotations

import re
from typing import Final

_PAGE: Final = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html)[\s>]", re.IGNORECASE)


def preview(head: bytes) -> str:
    """What `head` looks like, for a message: its first 40 bytes, escaped, in quotes, on one line."""
    return ascii(bytes(head[:40]).decode("latin-1")) + ("..." if len(head) > 40 else "")


def is_page(head: bytes) -> bool:
    """Whether what begins with `head` is a web page, as servers send it in place of what was asked for."""
    return _PAGE.match(head) is not None
