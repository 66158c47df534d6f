"""Records as DynamoDB holds them: attribute values, numbers, keys and sizes; pure, and fast.

What a table can hold is said in the Amazon DynamoDB Developer Guide, "Constraints" and "DynamoDB item sizes
and formats": items of 400 KB at most, names and all; numbers of 38 significant digits between 1E-130 and
9.99...E+125; 32 levels of nesting; keys of type S, N or B that are not empty, 2,048 bytes at most for the
partition key and 1,024 for the sort key.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import date, time
from decimal import Context, Decimal
from typing import Any, Final
from uuid import UUID

import msgspec

#: An attribute value, as DynamoDB's JSON has it: ``{"S": "text"}``.
Value = dict[str, Any]
#: A value and what it counts for in the size of its item, in bytes.
Sized = tuple[Value, int]

MAX_ITEM: Final = 400 << 10
_MAX_NAME: Final = 64 << 10
_KNOWN: Final = 1000  # names that are remembered, of 64 KB at most
_MAX_LEVELS: Final = 32
_DIGITS: Final = 38
_FIT: Final = 10**_DIGITS
_HIGHEST, _LOWEST = 125, -130  # decimal exponents of a number's first digit
_EXACT: Final = Context(prec=200)
_NUMBER: Final = re.compile(r"[+-]?(\d{1,200}\.?\d{0,200}|\.\d{1,200})([eE][+-]?\d{1,4})?", re.ASCII)


class Misfit(ValueError):
    """DynamoDB does not hold this value; the text says why, and is fit for a quarantine."""


class Key(msgspec.Struct, frozen=True):
    """A key attribute of a table or an index of it: its type (``S``, ``N`` or ``B``) and how many bytes
    it may have."""

    name: str
    type: str
    limit: int


class Items:
    """Records as items of one table, by attribute name. The attributes in `typed` are keys and get the type
    that the table gave them; those of them that are not `required` (keys of an index) are left out where
    they are ``None``. `reserve` bytes of each item are kept free."""

    def __init__(self, typed: Mapping[str, Key], required: frozenset[str], reserve: int = 0) -> None:
        self._typed = typed
        self._required = required
        self._room = MAX_ITEM - reserve
        #: How many bytes the names have that were found to be in order, and are no keys: a record mostly has
        #: the names of the one before it. Bounded: names may be data.
        self._known: dict[str, int] = {}

    def item(self, record: Mapping[str, Any]) -> Sized:
        """`record` as an item.

        Raises:
            Misfit: a value cannot be stored, a key is missing, or the item is too large.
        """
        item: Value = {}
        size = 0
        known = self._known
        for name, value in record.items():
            if name not in known:
                size += self._put(item, name, value)
                continue
            size += known[name]
            kind = type(value)
            # What most fields of most records are takes a fifth of the time so.
            if kind is str and value.isascii():
                item[name] = {"S": value}
                size += len(value)
                continue
            try:
                item[name], found = _BY_TYPE.get(kind, value_of)(value)
            except Misfit as error:
                raise _of(name, error) from None
            size += found
        if not self._required.issubset(item):
            raise Misfit(f"no value for its key ({', '.join(sorted(self._required.difference(item)))})")
        if size > self._room:
            raise Misfit(f"{size + MAX_ITEM - self._room:,} bytes, and an item has {MAX_ITEM:,} at most")
        return item, size

    def _put(self, item: Value, name: Any, value: Any) -> int:
        """Put a field that is a key, or whose name is not known, into `item`; what it counts for."""
        key = self._typed.get(name)
        if key is not None and value is None:
            return 0
        length = self._named(name)
        try:
            item[name], size = value_of(value) if key is None else key_of(value, key)
        except Misfit as error:
            raise _of(name, error) from None
        return size + length

    def _named(self, name: Any) -> int:
        """The bytes of a field's name, which an attribute can have."""
        if type(name) is not str:
            raise Misfit("a field's name is no text")
        if not name or len(name) > _MAX_NAME:
            raise Misfit("a field's name is empty, or over 64 KB")
        length = _length(name)
        if name not in self._typed and len(self._known) < _KNOWN:
            self._known[name] = length
        return length


def _of(name: str, error: Misfit) -> Misfit:
    return Misfit(f"{name[:80]!a}: {error}")


def value_of(value: Any, levels: int = _MAX_LEVELS) -> Sized:
    """Any value; texts stay texts, moments become ISO texts, floats the shortest decimal that tells them.

    Raises:
        Misfit: DynamoDB has nothing for it.
    """
    known = _BY_TYPE.get(type(value))
    if known is not None:
        return known(value)
    if isinstance(value, dict):
        return _map(value, levels)
    if isinstance(value, list | tuple):
        return _list(value, levels)
    for kind, convert in _BY_TYPE.items():
        if isinstance(value, kind):
            return convert(value)
    raise Misfit(f"a value of type {type(value).__name__}")


def key_of(value: Any, key: Key) -> Sized:
    """`value` as `key` wants it; equal keys have equal values, numbers included (1, ``1.0`` and ``"01"``).

    Raises:
        Misfit: it cannot be converted, is empty or too long.
    """
    made = _KEYS[key.type](value)
    if key.type == "N":
        return {"N": _plainest(made)}, 21
    size = _length(made) if isinstance(made, str) else len(made)
    if not size:
        raise Misfit("is empty, and it is a key")
    if size > key.limit:
        raise Misfit(f"{size:,} bytes, and this key has {key.limit:,} at most")
    return ({"S": made} if isinstance(made, str) else {"B": b64encode(made).decode()}), size


# ---------------------------------------------------------------------- values


def _length(text: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise Misfit("its text has a lone surrogate, which UTF-8 does not") from None


def _text(value: str) -> Sized:
    return {"S": str.__str__(value)}, _length(value)


def _bytes(value: bytes) -> Sized:
    return {"B": b64encode(value).decode()}, len(value)


def _bool(value: bool) -> Sized:
    return {"BOOL": value}, 1


def _nothing(value: None) -> Sized:
    return {"NULL": True}, 1


def _int(value: int) -> Sized:
    digits = len(text := _integer(value))
    # One byte for two digits, one more, and one for a sign: never less than DynamoDB counts.
    return {"N": text}, min(digits // 2 + 2, 21)


def _integer(value: int) -> str:
    if -_FIT < value < _FIT:
        return int.__repr__(value)
    if value.bit_length() <= 420:  # 10**126 has 419: beyond, not even its text is wanted
        text = int.__repr__(value)
        if len(text.lstrip("-")) <= _HIGHEST + 1 and len(text.lstrip("-").rstrip("0")) <= _DIGITS:
            return text
    raise Misfit(f"an integer of more than {_DIGITS} digits")


def _float(value: float) -> Sized:
    if not math.isfinite(value):
        raise Misfit(f"{value} is no number to DynamoDB")
    if value and not 1e-130 <= abs(value) < 1e126:
        raise Misfit(f"{value!r} is beyond the numbers of DynamoDB")
    return {"N": float.__repr__(value)}, 12


def _decimal(value: Decimal) -> Sized:
    return {"N": str(_fitting(value))}, 21


def _fitting(value: Decimal) -> Decimal:
    if not value.is_finite():
        raise Misfit(f"{value} is no number to DynamoDB")
    if not value:
        return Decimal(0)
    digits = "".join(map(str, value.as_tuple().digits)).strip("0")
    if len(digits) > _DIGITS or not _LOWEST <= value.adjusted() <= _HIGHEST:
        raise Misfit(f"a decimal of more than {_DIGITS} digits, or beyond the numbers of DynamoDB")
    return value


def _moment(value: date | time) -> Sized:
    text = value.isoformat()
    return {"S": text}, len(text)


def _uuid(value: UUID) -> Sized:
    return {"S": str(value)}, 36


def _map(value: dict[Any, Any], levels: int) -> Sized:
    if not levels:
        raise Misfit(f"more than {_MAX_LEVELS} levels of lists and records")
    found: Value = {}
    size = 3
    for name, inner in value.items():
        if type(name) is not str or not name:
            raise Misfit("a field's name is empty, or no text")
        found[name], more = value_of(inner, levels - 1)
        size += more + _length(name) + 1
    return {"M": found}, size


def _list(value: list[Any] | tuple[Any, ...], levels: int) -> Sized:
    if not levels:
        raise Misfit(f"more than {_MAX_LEVELS} levels of lists and records")
    found = [value_of(inner, levels - 1) for inner in value]
    return {"L": [each for each, _ in found]}, 3 + sum(size + 1 for _, size in found)


# In order: a bool is an int, and a datetime a date.
_BY_TYPE: Final[dict[type, Callable[[Any], Sized]]] = {
    str: _text,
    bool: _bool,
    int: _int,
    float: _float,
    type(None): _nothing,
    Decimal: _decimal,
    bytes: _bytes,
    bytearray: _bytes,
    date: _moment,
    time: _moment,
    UUID: _uuid,
}


# ---------------------------------------------------------------------- keys


def _key_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | date | time | UUID):
        raise Misfit(f"a value of type {type(value).__name__}, and this key is a text")
    ((_, text),) = value_of(value)[0].items()
    return str(text)


def _key_number(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        raise Misfit(f"a value of type {type(value).__name__}, and this key is a number")
    if isinstance(value, str):
        if _NUMBER.fullmatch(value.strip()) is None:
            raise Misfit(f"{value[:80]!a} is no number, and this key is one")
        return _fitting(Decimal(value.strip()))
    return _fitting(Decimal(value_of(value)[0]["N"]))


def _key_bytes(value: Any) -> bytes:
    if not isinstance(value, bytes | bytearray):
        raise Misfit(f"a value of type {type(value).__name__}, and this key is bytes: make them in map")
    return bytes(value)


def _plainest(value: Decimal) -> str:
    """The one text for all decimals equal to `value`."""
    return f"{_EXACT.normalize(value):f}"


_KEYS: Final[dict[str, Callable[[Any], Any]]] = {"S": _key_text, "N": _key_number, "B": _key_bytes}
