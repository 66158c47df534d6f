"""A delivery as the body of an SQS message: its event's structured JSON, or where in the log it stands.

A body may hold U+0009, U+000A, U+000D, U+0020-D7FF, U+E000-FFFD and what lies beyond U+FFFF (the SQS API's
``SendMessage``); anything else is ``InvalidMessageContents``. Of what JSON leaves as it is in a string, only
U+FFFE and U+FFFF are not among those, so they alone are escaped: every other event travels byte for byte. A
body's length counts in bytes of UTF-8.
"""

from __future__ import annotations

from typing import Final

import msgspec

from flowlane.errors import Permanent
from flowlane.events import MAX_EVENT_BYTES, Event, Reference, decode, encode, encode_data, refer

#: Every queue takes messages so long (bytes; the least that its ``MaximumMessageSize`` may be).
ALWAYS_FITS: Final = 1024

#: No body is longer, whatever the queue takes: ``decode`` would refuse it.
LONGEST: Final = MAX_EVENT_BYTES

_decoder = msgspec.json.Decoder(Reference)


def write(event: Event) -> str:
    """The body that carries `event` itself. It may be too long for its queue, or for ``LONGEST``: then it
    goes as ``write_reference``."""
    raw = encode(event)
    text = raw.decode()
    return text if raw.isascii() else _acceptable(text)


def write_reference(event: Event) -> str:
    """The body that says where in the log `event` stands."""
    return _acceptable(encode_data(refer(event)).decode())


def _acceptable(text: str) -> str:
    return text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")


def read(body: str) -> Event | Reference:
    """What a message with that `body` carries.

    Raises:
        Permanent: neither an event nor a reference to one; the reason does not quote the body.
    """
    if not body.startswith('{"flowlane"'):
        return decode(body)
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise Permanent(f"not a reference to an event: {error}") from None


def length(body: str) -> int:
    """Bytes of `body`, as SQS counts them."""
    return len(body) if body.isascii() else len(body.encode())
