"""CloudEvents on the wire, and the upcasting of what older releases wrote."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane import Event, events
from flowlane.errors import ConfigError, Permanent
from flowlane.events import MAX_EVENT_BYTES, decode, encode, upcast

#: CloudEvents 1.0.2, section 3.1 and its JSON format: what every event must have, and what flowlane adds.
REQUIRED = ("id", "source", "specversion", "type")
OPTIONAL = ("subject", "time", "data", "datacontenttype")
EXTENSIONS = ("version", "run", "round", "cause", "stage", "cut", "schema", "traceparent", "partitionkey")

#: What JSON can hold: text that is no lone surrogate.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
payload = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
envelopes = st.builds(
    Event,
    text,
    text,
    text,
    text,
    text,
    payload.map(lambda value: msgspec.Raw(msgspec.json.encode(value))),
    st.integers(0, 2**53),
    text,
    st.integers(0, 2**31),
    text,
    text,
    text,
    st.integers(1, 100),
    text,
    text,
)


def event(data: Any = None, **fields: Any) -> Event:
    """A plain event."""
    raw = msgspec.Raw(msgspec.json.encode({} if data is None else data))
    first = Event("e1", "toy", "thing", "toy/thing/1", "2024-01-01T00:00:00.000Z", raw, 1, "toy/run/1")
    return msgspec.structs.replace(first, **fields)


@given(envelopes)
def test_decoding_is_the_inverse_of_encoding(one: Event) -> None:
    assert decode(encode(one)) == one
    assert decode(encode(one).decode()) == one
    assert encode(decode(encode(one))) == encode(one)


@given(envelopes)
def test_an_event_is_one_line_without_raw_controls(one: Event) -> None:
    assert not any(byte < 0x20 for byte in encode(one))


@pytest.mark.parametrize("control", [chr(n) for n in range(0x20)])
def test_every_control_character_is_escaped(control: str) -> None:
    one = event({"k" + control: control}, id=control, subject=f"toy/{control}")
    raw = encode(one)
    assert control.encode() not in raw
    assert decode(raw) == one


def test_somebody_elses_layout_of_the_payload_is_taken_out() -> None:
    pretty = b'{\n\t"a": [1,\r\n 2],\n "b": "x\\ny"}'
    raw = encode(msgspec.structs.replace(event(), data=msgspec.Raw(pretty)))
    assert b"\n" not in raw
    assert json.loads(raw)["data"] == {"a": [1, 2], "b": "x\ny"}


def test_the_wire_is_structured_cloudevents_json() -> None:
    given = {"round": 2, "cause": "e0", "stage": "load", "cut": "1/2", "schema": 3}
    one = event({"n": 1}, **given, traceparent="00-a-b-01", partitionkey="c1")
    wire = json.loads(encode(one))
    assert set(wire) == {*REQUIRED, *OPTIONAL, *EXTENSIONS} - {"datacontenttype"}
    assert wire["specversion"] == "1.0"
    assert wire["data"] == {"n": 1}
    assert all(isinstance(wire[name], str) and wire[name] for name in REQUIRED)


def test_what_has_its_default_is_left_out() -> None:
    """JSON is what a missing datacontenttype stands for (JSON format 1.0.2, section 3.1)."""
    bare = json.loads(encode(event()))
    assert not {"datacontenttype", "cause", "traceparent", "partitionkey", "round", "schema"} & set(bare)
    assert all(value != "" for value in bare.values())
    xml = json.loads(encode(msgspec.structs.replace(event(), datacontenttype="application/xml")))
    assert xml["datacontenttype"] == "application/xml"


def test_every_attribute_is_named_as_the_specification_wants() -> None:
    names = [field.encode_name for field in msgspec.structs.fields(Event)]
    assert sorted([*names, "specversion"]) == sorted([*REQUIRED, *OPTIONAL, *EXTENSIONS])
    for name in names:  # section 3: lower-case letters and digits, at most 20 of them
        assert name.isascii()
        assert name.isalnum()
        assert name == name.lower()
        assert len(name) <= 20


def test_a_foreign_event_is_read_whatever_else_it_carries() -> None:
    wire = json.loads(encode(event({"n": 1}))) | {"comexampleextension": "x", "dataschema": "https://x/y"}
    del wire["data"], wire["version"], wire["run"]
    one = decode(json.dumps(wire))
    assert bytes(one.data) == b"{}"
    assert (one.version, one.run) == (0, "")


@given(envelopes)
def test_defaults_may_as_well_be_spelled_out(one: Event) -> None:
    """As other producers do, and as flowlane itself did once."""
    fields = {field.encode_name: getattr(one, field.name) for field in msgspec.structs.fields(Event)}
    wire = msgspec.json.encode({"specversion": "1.0", **fields})
    assert decode(wire) == one == decode(encode(one))


GOOD = json.loads(encode(event({"n": 1})))


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"\x00",
        b"<html></html>",
        b"{}",
        "\ud800",
        '{"id": "\ud800"}',
        json.dumps({**GOOD, "specversion": "0.3"}),
        json.dumps({**GOOD, "specversion": "1.1"}),
        json.dumps({**GOOD, "specversion": 1.0}),
        json.dumps({name: value for name, value in GOOD.items() if name != "specversion"}),
        *(
            json.dumps({name: value for name, value in GOOD.items() if name != missing})
            for missing in ("id", "source", "type", "subject", "time")
        ),
        json.dumps({**GOOD, "id": 7}),
        json.dumps({**GOOD, "version": "1"}),
        json.dumps({**GOOD, "version": 1.5}),
        json.dumps({**GOOD, "round": None}),
        json.dumps(GOOD) + "x",
        json.dumps(GOOD) + json.dumps(GOOD),
        b'{"specversion":"1.0","id":"1","data":' + b"[" * 100_000,
        b'{"specversion":"1.0","id":"1","data":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_event_is_refused_in_one_line(junk: bytes | str) -> None:
    with pytest.raises(Permanent, match=r"not a CloudEvents 1\.0 event") as caught:
        decode(junk)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=300))
def test_no_bytes_at_all_raise_anything_else(junk: bytes) -> None:
    with pytest.raises(Permanent):
        decode(junk)


def test_an_event_that_is_too_long_is_refused_on_both_sides() -> None:
    room = MAX_EVENT_BYTES - len(encode(event("")))
    longest = event("x" * room)
    assert len(encode(longest)) == MAX_EVENT_BYTES
    assert decode(encode(longest)) == longest
    with pytest.raises(Permanent, match=r"event thing of toy/thing/1 has 262,145 bytes.*its URL") as caught:
        encode(event("x" * (room + 1)))
    assert "\n" not in str(caught.value)
    with pytest.raises(Permanent, match="the limit is 262,144"):
        decode(encode(longest) + b" ")


# --------------------------------------------------------------------------- upcasting


def lift(value: Any, schema: int, current: int, upcasters: Any) -> Any:
    return msgspec.json.decode(
        upcast(msgspec.Raw(msgspec.json.encode(value)), schema, current, upcasters, "thing toy/thing/1")
    )


def test_a_payload_of_this_schema_is_left_alone() -> None:
    raw = msgspec.Raw(b'{"n" :  1}')
    assert upcast(raw, 3, 3, {1: lambda value: 1 / 0}, "thing") is raw


def test_a_payload_is_lifted_step_by_step() -> None:
    steps = {1: lambda v: {**v, "b": v["a"]}, 2: lambda v: {"c": v["b"] + 1}, 3: lambda v: [v["c"]]}
    assert lift({"a": 1}, 1, 4, steps) == [2]
    assert lift({"a": 1}, 1, 3, steps) == {"c": 2}
    assert lift({"b": 5}, 2, 4, steps) == [6]


@given(payload)
def test_the_same_payload_is_lifted_the_same_way(value: Any) -> None:
    steps = {1: lambda v: {"was": v}, 2: lambda v: [v, v]}
    assert lift(value, 1, 3, steps) == lift(value, 1, 3, steps) == [{"was": value}, {"was": value}]


def test_a_missing_upcaster_is_named() -> None:
    with pytest.raises(ConfigError, match="thing toy/thing/1 has no upcaster from schema 2 to 3"):
        lift({}, 1, 4, {1: dict, 3: dict})


def test_nothing_is_guessed_of_a_newer_payload() -> None:
    with pytest.raises(Permanent, match="schema 5, this release knows 4: upgrade, then redrive"):
        lift({}, 5, 4, {})


@pytest.mark.parametrize(
    ("value", "steps", "said"),
    [
        ({}, {1: lambda v: v["gone"], 2: dict}, "from schema 1 to 2 failed (KeyError: 'gone')"),
        ({}, {1: dict, 2: lambda v: object()}, "from schema 2 to 3 failed (TypeError"),
        (7, {1: dict, 2: dict}, "from schema 1 to 2 failed (TypeError"),
    ],
)
def test_an_upcaster_that_fails_is_named(value: Any, steps: Any, said: str) -> None:
    with pytest.raises(Permanent) as caught:
        lift(value, 1, 3, steps)
    assert said in str(caught.value)
    assert str(caught.value).startswith("thing toy/thing/1")


def test_the_engines_own_types_are_told_from_units() -> None:
    """A unit's type has no dot, the engine's own have one: neither can be taken for the other."""
    own = [v for k, v in vars(events).items() if k.isupper() and isinstance(v, str)]
    assert len(own) == len(set(own)) >= 18
    assert all("." in kind for kind in own)
