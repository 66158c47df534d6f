"""Text for people: whatever comes from data is made harmless before a terminal sees it."""

from __future__ import annotations

_LONGEST = 2000
_UNITS = ("kB", "MB", "GB", "TB", "PB")


def safe(text: str) -> str:
    """`text` without anything that a terminal obeys rather than shows: control characters, direction marks
    and line breaks come out as escapes (``\\x1b``), so that one record stays one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str) -> str:
    """`text` in one harmless line of bearable length."""
    line = safe(" ".join(text.split()))
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def plural(number: int, word: str) -> str:
    """``1 unit``, ``2 units``."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def size(number: int) -> str:
    """Bytes as people read them; a negative number is one that the source did not say."""
    if number < 0:
        return "?"
    if number < 1000:
        return f"{number} B"
    power = min((len(str(number)) - 1) // 3, len(_UNITS))
    return f"{number / 1000**power:.1f} {_UNITS[power - 1]}"


def seconds(number: float) -> str:
    """A duration as a lane writes it: ``90s``, ``15m``, ``1h``."""
    for length, unit in ((604800, "w"), (86400, "d"), (3600, "h"), (60, "m")):
        if number >= length and number % length == 0:
            return f"{number / length:g}{unit}"
    return f"{number:g}s"
