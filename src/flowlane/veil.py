"""The secrets that this process has resolved, so that no text which leaves it shows one of them.

Errors quote what they were given, drivers and people's own handlers too: nobody can be trusted to leave a
password out of a message. So what becomes text for the log, for stderr or for an error passes ``conceal``.
It hides what it knows, whole or escaped as texts commonly escape; it is the last line of defence, not a
licence to write secrets into messages.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Final
from urllib.parse import quote, quote_plus

#: What stands in a text where a secret stood.
HIDDEN: Final = "***"
#: Shorter values are not hidden: they are parts of too many words, and hiding them would tell what they are.
SHORTEST: Final = 6
#: Values known at once, at most; the oldest are forgotten. Rotation brings a new one now and then.
_KEPT: Final = 1024

#: So much of the beginning of a longer one is enough to hide it: errors are cut.
_HEAD: Final = 12

#: Each secret with what it begins with and how it is written, in pairs, for every way to write it.
_known: dict[str, list[tuple[str, str]]] = {}


def remember(secret: str) -> None:
    """`secret` is hidden by ``conceal`` from now on, for as long as the process lives."""
    if len(secret) < SHORTEST or secret in _known:
        return
    _known[secret] = [_begun(spelling) for spelling in _spellings(secret)]
    if len(_known) > _KEPT:
        _known.pop(next(iter(_known)), None)


def conceal(text: str) -> str:
    """`text` with ``***`` for every secret known to this process, and for the beginning of one that was cut;
    `text` itself where it holds none. For any thread; a thousand secrets cost a line half a millisecond."""
    heads: dict[str, list[str]] = {}
    for pairs in [*_known.values()]:  # others may come meanwhile, in other threads
        for head, rest in pairs:
            if head in text:
                heads.setdefault(head, []).append(rest)
    if not heads:
        return text
    # The longest first: one may begin as another one does.
    pattern = re.compile("|".join(map(re.escape, sorted(heads, key=len, reverse=True))))
    shown, at = "", 0
    while (found := pattern.search(text, at)) is not None:
        begin = found.start()
        end = max(_common(text, begin, rest) for rest in heads[found[0]])
        shown, at = f"{shown}{text[at:begin]}{HIDDEN}", end
    return shown + text[at:]


def _begun(spelling: str) -> tuple[str, str]:
    """What tells that `spelling` begins, and what of it is hidden then."""
    scheme = spelling.find("://", 0, 24) + 3  # too many texts begin with one
    rest = spelling[scheme:] if scheme > 2 else spelling
    head = rest[:_HEAD] if len(rest) > _HEAD + 3 else rest
    return (spelling, spelling) if len(head) < SHORTEST else (head, rest)


def _common(text: str, begin: int, spelling: str) -> int:
    """Where `text`, from `begin` on, ceases to be what `spelling` begins with."""
    if text.startswith(spelling, begin):
        return begin + len(spelling)
    pairs = zip(text[begin : begin + len(spelling)], spelling, strict=False)
    return begin + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _spellings(secret: str) -> set[str]:
    """How texts write `secret`: as it is, on one line, in URLs, in JSON, and as Python shows it."""
    return {
        secret,
        " ".join(secret.split()) or secret,
        quote(secret, safe="", errors="surrogatepass"),
        quote_plus(secret, errors="surrogatepass"),
        quote(secret, errors="surrogatepass"),
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
    }


class _Concealing(logging.Filter):
    """Rewrites records that hold a secret, in their message or in the error they tell of."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001  # arguments that do not fit: no reason to fail whoever logs them
            record.msg, record.args = f"{record.msg} % {record.args!r}", None
            message = record.msg
        shown = conceal(message)
        if shown != message:
            record.msg, record.args = shown, None
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            trace = "".join(traceback.format_exception(error)).rstrip()
            hidden = conceal(trace)
            if hidden != trace:
                # No handler gets at the error itself any more: some print more of it than its traceback.
                record.msg = f"{record.getMessage()}: {type(error).__name__}: {conceal(str(error))}"
                record.args, record.exc_info, record.exc_text = None, None, hidden
        return True


@contextmanager
def concealing(logger: logging.Logger) -> Iterator[None]:
    """While open, no record logged to `logger` shows a secret, whoever formats it."""
    own = _Concealing()
    logger.addFilter(own)
    try:
        yield
    finally:
        logger.removeFilter(own)
