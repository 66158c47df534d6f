"""A delivery as an SQS body: within SQS's characters, exact, by reference where it is too long."""

from __future__ import annotations

import json
import re

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flowlane.errors import Permanent
from flowlane.events import MAX_EVENT_BYTES, Event, Reference, encode
from flowlane.testing.units import found
from flowlane_aws.queue.message import length, read, write, write_reference

#: SQS API, SendMessage, MessageBody: what it takes.
ALLOWED = re.compile("[\x09\x0a\x0d\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")

#: Anything that UTF-8 can hold, and much of what SQS does not take.
text = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\x1f\x7f\x85\ufffe\uffff\u2028"))
#: JSON, and a name, of anything.
payloads = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@example("\ufffe\uffff", "\ufffe\uffff")
@given(text, payloads)
def test_every_event_travels_exactly_within_the_characters_of_sqs(key: str, payload: object) -> None:
    event = found(key, data=payload)
    body = write(event)
    assert ALLOWED.fullmatch(body)
    assert length(body) == len(body.encode())
    back = read(body)
    assert isinstance(back, Event)
    assert msgspec.structs.replace(back, data=msgspec.Raw()) == msgspec.structs.replace(
        event, data=msgspec.Raw()
    )
    assert json.loads(bytes(back.data)) == json.loads(bytes(event.data))


@given(text)
def test_what_sqs_takes_travels_byte_for_byte(name: str) -> None:
    kept = "".join(c for c in name if c not in "\ufffe\uffff")
    event = found(kept, data={"name": kept})
    assert write(event).encode() == encode(event)
    assert read(write(event)) == event


@example("\ufffe\uffff")
@given(text)
def test_a_reference_names_the_place_in_the_log(key: str) -> None:
    event = found(key)
    body = write_reference(event)
    assert ALLOWED.fullmatch(body)
    assert read(body) == Reference(event.subject, event.version, event.id)
    assert json.loads(body)["flowlane"] == "reference"


def test_an_event_of_the_greatest_length_is_its_own_message() -> None:
    bare = len(encode(found("a", data="")))
    event = found("a", data="x" * (MAX_EVENT_BYTES - bare - 2))
    assert MAX_EVENT_BYTES - 9 < length(write(event)) <= MAX_EVENT_BYTES
    assert read(write(event)) == event


@pytest.mark.parametrize(
    "body",
    [
        "hello",
        "",
        "{}",
        "[1]",
        '{"specversion":"1.0"}',
        '{"flowlane":"reference"}',
        '{"flowlane":"reference","stream":1,"version":1,"id":"e"}',
        '{"flowlane":"sweep"}',
        '{"flowlane": "reference", "stream": "a", "version": "1", "id": "secret-in-a-body"}',
        '{"secret-in-a-body":' * 100_000,
    ],
)
def test_anything_else_is_refused_without_being_quoted(body: str) -> None:
    with pytest.raises(Permanent) as caught:
        read(body)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 300
