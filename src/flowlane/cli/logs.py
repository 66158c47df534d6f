"""Logging to stderr: one record one line, whatever stands in it; as JSON where a program reads."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from flowlane.cli.text import safe
from flowlane.clock import rfc3339
from flowlane.veil import conceal

#: What a log call may add by ``extra=``: the ids by which lines are matched with the log's events.
IDS = ("lane", "run", "stage", "unit", "event")


class _Line(logging.Formatter):
    def __init__(self, *, as_json: bool, debug: bool) -> None:
        super().__init__()
        self._json = as_json
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            message += f": {type(error).__name__}: {error}"
            if self._debug:
                message += "\n" + self.formatException(record.exc_info)
        elif record.exc_text and self._debug:  # see ``veil.concealing``
            message += "\n" + record.exc_text
        message = conceal(message)  # other people's records come here as they are
        ids = {name: str(vars(record)[name]) for name in IDS if vars(record).get(name)}
        time = rfc3339(datetime.fromtimestamp(record.created, UTC))
        level = record.levelname.lower()
        if self._json:
            fields = {"time": time, "level": level, "logger": record.name, "message": message, **ids}
            return json.dumps(fields, ensure_ascii=True)
        named = "".join(f" {name}={value}" for name, value in ids.items())
        return safe(f"{time} {level:<7} {message}{named}")


@contextmanager
def logging_to_stderr(level: str, *, as_json: bool, debug: bool) -> Iterator[None]:
    """While open, flowlane's records of `level` and above, and everybody's warnings, are lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(as_json=as_json, debug=debug))
    own, root = logging.getLogger("flowlane"), logging.getLogger()
    before = own.level
    own.setLevel(level.upper())
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        own.setLevel(before)
