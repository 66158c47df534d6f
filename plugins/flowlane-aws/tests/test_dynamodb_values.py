"""Records become items exactly, or are refused with a reason; sizes are never under those that AWS counts."""

from __future__ import annotations

import math
from base64 import b64decode
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane_aws.dynamodb.values import _KNOWN, MAX_ITEM, Items, Key, Misfit, key_of, value_of

PK = Key("pk", "S", 2048)
NUMBER = Key("pk", "N", 2048)
BYTES = Key("sk", "B", 1024)


class Colour(StrEnum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, {"NULL": True}),
        (True, {"BOOL": True}),
        (0, {"N": "0"}),
        (-12, {"N": "-12"}),
        (10**38 - 1, {"N": "9" * 38}),
        (10**40, {"N": "1" + "0" * 40}),
        (0.1, {"N": "0.1"}),
        (1e22, {"N": "1e+22"}),
        (Decimal("1.10"), {"N": "1.10"}),
        (Decimal("-0E+200"), {"N": "0"}),
        ("", {"S": ""}),
        ("zażółć", {"S": "zażółć"}),
        (b"\0\xff", {"B": "AP8="}),
        (bytearray(b"a"), {"B": "YQ=="}),
        (datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC), {"S": "2024-01-02T03:04:05+00:00"}),
        (date(2024, 1, 2), {"S": "2024-01-02"}),
        (time(3, 4), {"S": "03:04:00"}),
        (UUID(int=1), {"S": "00000000-0000-0000-0000-000000000001"}),
        (Colour.RED, {"S": "red"}),
        (Level.HIGH, {"N": "3"}),
        ([1, "a", None], {"L": [{"N": "1"}, {"S": "a"}, {"NULL": True}]}),
        ((), {"L": []}),
        ({"a": {"b": True}}, {"M": {"a": {"M": {"b": {"BOOL": True}}}}}),
    ],
)
def test_values(value: Any, wanted: Any) -> None:
    assert value_of(value)[0] == wanted


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (math.nan, "no number to DynamoDB"),
        (-math.inf, "no number to DynamoDB"),
        (1e126, "beyond the numbers"),
        (1e-131, "beyond the numbers"),
        (10**38 + 1, "more than 38 digits"),
        (10**126, "more than 38 digits"),
        pytest.param(10**10_000, "more than 38 digits", id="no text"),
        (Decimal("1." + "1" * 38), "more than 38 digits"),
        (Decimal("1E+126"), "beyond"),
        (Decimal("sNaN"), "no number"),
        ("\ud800", "lone surrogate"),
        ({1: 2}, "name is empty, or no text"),
        ({"": 2}, "name is empty, or no text"),
        ({1, 2}, "a value of type set"),
        (object(), "a value of type object"),
        ([{"a": [math.nan]}], "no number"),
    ],
)
def test_what_dynamodb_does_not_hold(value: Any, why: str) -> None:
    with pytest.raises(Misfit, match=why):
        value_of(value)


def test_nesting_is_bounded() -> None:
    value: Any = 1
    for _ in range(32):
        value = [value]
    value_of(value)
    for deeper in ([value], {"a": value}):
        with pytest.raises(Misfit, match="32 levels"):
            value_of(deeper)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_the_number_of_its_shortest_text(value: float) -> None:
    if value and not 1e-130 <= abs(value) < 1e126:
        return
    assert float(value_of(value)[0]["N"]) == value
    assert Decimal(value_of(value)[0]["N"]) == Decimal(repr(value))


@given(st.integers() | st.decimals(allow_nan=False, allow_infinity=False) | st.floats(), st.integers(0, 130))
def test_a_number_is_exact_or_refused(value: Any, more: int) -> None:
    value = value * 10**more if isinstance(value, int) else value
    try:
        found = value_of(value)[0]["N"]
    except Misfit:
        number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
        assert not number.is_finite() or not _storable(number)
    else:
        number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
        assert Decimal(found) == number
        assert _storable(number)


def _storable(number: Decimal) -> bool:
    digits = "".join(map(str, number.as_tuple().digits)).strip("0")
    return not number or (len(digits) <= 38 and -130 <= number.adjusted() <= 125)


# ---------------------------------------------------------------------- sizes


def counted(value: dict[str, Any]) -> float:
    """As the Developer Guide counts ("DynamoDB item sizes and formats")."""
    ((kind, held),) = value.items()
    if kind == "S":
        return len(held.encode())
    if kind == "N":
        digits = len("".join(map(str, Decimal(held).as_tuple().digits)).strip("0"))
        return math.ceil(digits / 2) + 1 + (Decimal(held) < 0)
    if kind == "B":
        return len(b64decode(held))
    if kind == "M":
        return 3 + sum(1 + len(name.encode()) + counted(each) for name, each in held.items())
    if kind == "L":
        return 3 + sum(1 + counted(each) for each in held)
    return 1


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(10**38) + 1, 10**38 - 1)
    | st.text()
    | st.binary()
    | st.floats(-1e100, 1e100, allow_subnormal=False).filter(lambda f: not f or abs(f) > 1e-100)
    | st.decimals(-(10**30), 10**30, places=4)
)
ANY = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner, max_size=4)
)


@given(st.dictionaries(st.text(min_size=1), ANY, max_size=5))
def test_sizes_are_not_under_those_of_the_documentation(record: dict[str, Any]) -> None:
    items = Items({}, frozenset())
    item, size = items.item(record)
    wanted = sum(len(name.encode()) + counted(value) for name, value in item.items())
    assert wanted <= size <= wanted + 22 * (1 + str(item).count("'N'"))
    assert items.item(record) == (item, size)  # the short way, of names that are known


def test_an_item_has_400_kb_names_and_all() -> None:
    room = MAX_ITEM - len("pk") - len("a") - len("żółć".encode())
    fits = {"pk": "a", "żółć": "x" * room}
    assert Items({"pk": PK}, frozenset({"pk"})).item(fits)[1] == MAX_ITEM
    for record, reserve in (({**fits, "żółć": "x" * (room + 1)}, 0), (fits, 1)):
        items = Items({"pk": PK}, frozenset({"pk"}), reserve)
        for _ in range(2):
            with pytest.raises(Misfit, match="409,601 bytes, and an item has 409,600 at most"):
                items.item(record)


def test_a_misfit_tells_its_field_however_often_it_was_seen() -> None:
    items = Items({"pk": PK}, frozenset({"pk"}))
    for _ in range(2):
        with pytest.raises(Misfit, match="'a': nan is no number"):
            items.item({"pk": "x", "a": math.nan})
        with pytest.raises(Misfit, match="'a': its text has a lone surrogate"):
            items.item({"pk": "x", "a": "\ud800"})
        with pytest.raises(Misfit, match="'pk': is empty"):
            items.item({"pk": ""})


def test_names_that_are_remembered_are_bounded() -> None:
    items = Items({}, frozenset())
    for n in range(3 * _KNOWN):
        assert items.item({f"n{n}": "x"}) == ({f"n{n}": {"S": "x"}}, len(f"n{n}x"))
    assert len(items._known) == _KNOWN


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        (PK, "a", {"S": "a"}),
        (PK, 17, {"S": "17"}),
        (PK, Decimal("1.50"), {"S": "1.50"}),
        (PK, date(2024, 1, 2), {"S": "2024-01-02"}),
        (PK, "x" * 2048, {"S": "x" * 2048}),
        (NUMBER, "007", {"N": "7"}),
        (NUMBER, " 7.50 ", {"N": "7.5"}),
        (NUMBER, 7.0, {"N": "7"}),
        (NUMBER, Decimal("7E+2"), {"N": "700"}),
        (NUMBER, "-0.0", {"N": "0"}),
        (NUMBER, "12345678901234567890123456789012345678", {"N": "12345678901234567890123456789012345678"}),
        (BYTES, b"\0", {"B": "AA=="}),
    ],
)
def test_keys_get_the_type_of_the_table(key: Key, value: Any, wanted: Any) -> None:
    assert key_of(value, key)[0] == wanted


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        (PK, "", "is empty"),
        (PK, "x" * 2049, "2,049 bytes, and this key has 2,048"),
        (PK, "ż" * 1025, "2,050 bytes"),
        (PK, True, "type bool"),
        (PK, b"a", "type bytes"),
        (PK, ["a"], "type list"),
        (PK, math.inf, "no number"),
        (NUMBER, "", "is no number"),
        (NUMBER, "0x1", "is no number"),
        (NUMBER, "nan", "is no number"),
        (NUMBER, "1_000", "is no number"),
        (NUMBER, "1e999", "beyond"),
        (NUMBER, "٣", "is no number"),
        (NUMBER, False, "type bool"),
        (NUMBER, math.nan, "no number"),
        (BYTES, b"", "is empty"),
        (BYTES, b"x" * 1025, "1,025 bytes, and this key has 1,024"),
        (BYTES, "a", "make them in map"),
    ],
)
def test_what_no_key_can_be(key: Key, value: Any, why: str) -> None:
    with pytest.raises(Misfit, match=why):
        key_of(value, key)


@given(st.decimals(allow_nan=False, allow_infinity=False), st.decimals(allow_nan=False, allow_infinity=False))
def test_equal_numbers_are_one_key(one: Decimal, other: Decimal) -> None:
    try:
        first, second = key_of(one, NUMBER)[0], key_of(other, NUMBER)[0]
        scaled = key_of(str(one) + ("0" if "." in str(one) and "E" not in str(one) else ""), NUMBER)[0]
    except Misfit:
        return
    assert (first == second) == (one == other)
    assert scaled == first
    assert Decimal(first["N"]) == one


def test_keys_of_indexes_may_be_missing_but_not_wrong() -> None:
    typed = {"pk": PK, "sk": BYTES, "n": NUMBER}
    items = Items(typed, frozenset({"pk"}))
    item, _ = items.item({"pk": 1, "n": None, "a": None})
    assert item == {"pk": {"S": "1"}, "a": {"NULL": True}}
    assert items.item({"pk": 1, "n": "5"})[0]["n"] == {"N": "5"}
    with pytest.raises(Misfit, match="'n': 'x' is no number"):
        items.item({"pk": 1, "n": "x"})


@pytest.mark.parametrize("record", [{"sk": b"1"}, {"pk": None, "sk": b"1"}, {}])
def test_a_missing_key_is_named(record: dict[str, Any]) -> None:
    with pytest.raises(Misfit, match=r"no value for its key \(pk"):
        Items({"pk": PK, "sk": BYTES}, frozenset({"pk", "sk"})).item(record)


@pytest.mark.parametrize("record", [{"": 1}, {"x" * 65537: 1}, {1: 1}, {"\ud800": 1}])
def test_names_that_no_attribute_can_have(record: dict[Any, Any]) -> None:
    with pytest.raises(Misfit, match=r"name|surrogate"):
        Items({}, frozenset()).item(record)
