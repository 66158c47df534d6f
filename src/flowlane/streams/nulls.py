"""The null token of a CSV file: text in quotes, nothing without (PostgreSQL, COPY, option NULL)."""

from __future__ import annotations

import re

from flowlane.streams.dialect import CsvFormat


class Nulls:
    """Tells a quoted or escaped null token, which is text, from a plain one, which is none: the module does
    not."""

    def __init__(self, form: CsvFormat) -> None:
        self._form = form
        self._escape = form.escape.encode(form.codec)
        quote, escape, delimiter = (re.escape(c) for c in (form.quote, form.escape, form.delimiter))
        escaped = f"|{escape}." if escape else ""
        inside = f"{quote}(?:[^{quote}{escape}]++|{quote}{quote}{escaped})*+{quote}"
        self._inside = re.compile(inside if quote else r"(?!)", re.DOTALL)
        self._outside = re.compile(f"(?:[^{delimiter}{escape}\r\n]++{escaped})*+", re.DOTALL)
        token, edge = (form.null or "").encode(form.codec), form.delimiter.encode()
        self._quoted = form.quote + (form.null or "") + form.quote
        self._quoted_bytes = self._quoted.encode(form.codec)
        self._first = (token + edge, token + b"\r", token + b"\n")
        self._plain = [before + end for before in (edge, b"\n") for end in self._first]

    def quoted_in(self, data: bytes | str) -> bool:
        """Whether a null token that is text may be in `data`."""
        form = self._form
        if isinstance(data, str):
            return bool((form.escape and form.escape in data) or (form.quote and self._quoted in data))
        return bool((form.escape and self._escape in data) or (form.quote and self._quoted_bytes in data))

    def plain_in(self, data: bytes) -> bool:
        """Whether a plain null token may be in `data`, whole lines each of which ends with a line end."""
        return not data.endswith(b"\n") or data.startswith(self._first) or any(p in data for p in self._plain)

    def quoted_fields(self, text: str) -> list[bool]:
        """For each field of the well-formed row `text`, whether it is text even if it reads as the token:
        it is quoted, or written otherwise than the token is."""
        found: list[bool] = []
        at = 0
        while True:
            match = self._inside.match(text, at)
            start = at
            at = (match or self._outside.match(text, at)).end()  # type: ignore[union-attr]  # one matches
            found.append(match is not None or text[start:at] != self._form.null)
            if text[at : at + 1] != self._form.delimiter:
                return found
            at += 1
