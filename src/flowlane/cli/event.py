"""The file given with ``--event``: which run it opens, and what the lane's discovery is told."""

from __future__ import annotations

import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from flowlane.errors import ConfigError, Permanent
from flowlane.events import MAX_EVENT_BYTES, encode_data
from flowlane.lane import Trigger

#: What the envelope around the outer event may take of an event's size.
_ENVELOPE = 4096


class Given(msgspec.Struct, frozen=True):
    """An outer event, and the slot of the run that it opens."""

    slot: str
    value: dict[str, Any]


def read_event(name: str) -> Given:
    """The JSON object in the file `name` (``-``: stdin).

    A CloudEvent's source and id name the run (a scheduled event's time, any other object's bytes): the same
    event never opens two runs, whether it comes here or by Lambda.

    Raises:
        ConfigError: it cannot be read, is no JSON object, or is too long for an event.
    """
    what = "stdin" if name == "-" else name
    raw = _read(name, what)
    if len(raw) > MAX_EVENT_BYTES:
        raise ConfigError(f"--event {what}: more than {MAX_EVENT_BYTES:,} bytes: {_BULK}")
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--event {what}: is no JSON ({error}): give one JSON object") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"--event {what}: is JSON, but no object: give one JSON object, such as a CloudEvent"
        )
    given = _start(value, raw, what)
    if len(encode_data(Trigger(slot=given.slot, event=given.value))) + _ENVELOPE > MAX_EVENT_BYTES:
        raise ConfigError(
            f"--event {what}: with its envelope it is more than {MAX_EVENT_BYTES:,} bytes: {_BULK}"
        )
    return given


_BULK = "put the bulk into a store and its URL into the event"


def _read(name: str, what: str) -> bytes:
    try:
        if name == "-":
            stdin = sys.stdin.buffer if hasattr(sys.stdin, "buffer") else None
            return stdin.read(MAX_EVENT_BYTES + 1) if stdin is not None else b""
        with Path(name).open("rb") as file:
            return file.read(MAX_EVENT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--event {what}: cannot be read ({error.strerror}): give a file or -") from None


def _start(value: dict[str, Any], raw: bytes, what: str) -> Given:
    """The slot and the inner event that the Lambda handler makes of that event, where it opens one run."""
    from flowlane.aws_lambda.payload import batch
    from flowlane.aws_lambda.wanted import Start, Wanted, understand, understand_direct

    try:
        messages = batch(value)
        wanted: list[Wanted] = []
        if messages is None:
            wanted = understand_direct(value, "")
        for message in messages.messages if messages else ():
            wanted += understand(message.body, "")
    except Permanent as error:
        if "specversion" in value:
            raise ConfigError(f"--event {what}: {error}") from None
        wanted = []
    match wanted:
        case [Start(slot=slot, event=event)]:
            return Given(slot, event)
    return Given("blake2b-" + blake2b(raw, digest_size=16).hexdigest(), value)
