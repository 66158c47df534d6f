"""What the texts of a file become on their way into a table: pure functions over records."""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from itertools import islice
from typing import Any, Final

from flowlane.errors import BadRecord, Permanent
from flowlane.ports import Record

#: A number that is written as numbers are shown, so that its text can be had again: no 007, 1.50, +1 or 1e3.
_INTEGER: Final = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)  # what 64 bits surely hold
_DECIMAL: Final = re.compile(r"-?(?:0|[1-9]\d{0,18})\.\d{0,18}[1-9]", re.ASCII)
_CONSTANTS: Final[dict[str, bool | None]] = {"true": True, "false": False, "null": None}
#: A number of a key; DynamoDB has 38 digits for one.
_NUMBER: Final = re.compile(r"[+-]?(?:\d{1,100}\.?\d{0,100}|\.\d{1,100})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_EXACT: Final = Context(prec=400)
_DIGITS: Final = 38
_COLUMNS_TOLD: Final = 8


def inferred(record: Record) -> Record:
    """`record`, with each text that is a number, ``true``, ``false`` or ``null`` as JSON has it made one.

    By the value alone, and only where nothing of the text is lost: ``007``, ``1.50`` and ``1e3`` stay texts.
    """
    return {name: _inferred(value) if type(value) is str else value for name, value in record.items()}


def _inferred(text: str) -> Any:
    if not text or text[0] not in "-0123456789tfn":
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return Decimal(text)
    return _CONSTANTS.get(text, text)


def keyed(key: Sequence[tuple[str, str]], *, alike: bool = False) -> Callable[[Record], Record]:
    """A function that gives the columns of `key` their types (``S``, ``N``, ``B``), so that equal keys are
    equal however they were written: ``1``, ``01`` and ``1.0`` are one number.

    It raises ``BadRecord`` for a record that has no value for one of them, or none that fits; where records
    are `alike`, as a header makes them, ``Permanent`` for one without the column: so are they all.
    """
    columns = [(name, type_, _KEYS[type_]) for name, type_ in key]

    def typed(record: Record) -> Record:
        made = dict(record)
        for name, type_, convert in columns:
            value = record.get(name)
            if value is None and alike and name not in record:
                raise Permanent(_absent(record, name))
            if value is None or (isinstance(value, str | bytes) and not value):
                raise BadRecord(f"no value for its key {name}{_alike(record, name)}")
            try:
                made[name] = convert(value)
            except (ValueError, TypeError, ArithmeticError) as error:
                raise BadRecord(f"its key {name} is of type {type_}: {error}") from None
        return made

    return typed


def _absent(record: Record, name: str) -> str:
    """What is said of a file none of whose records has the column `name`."""
    columns = ", ".join(map(ascii, islice(record, _COLUMNS_TOLD)))
    more = ", ..." if len(record) > _COLUMNS_TOLD else ""
    return (
        f"it has no column {name}, which is its key by its manifest, but {columns[:200]}{more}: mend csv= or "
        "map of the lane and redrive, or the manifest and send it again"
    )


def _alike(record: Record, name: str) -> str:
    """What is said of a field that differs from `name` in cases alone, if there is one."""
    alike = (other for other in record if other != name and str(other).lower() == name.lower())
    other = next(alike, None)
    return "" if other is None else f": it has {str(other)[:80]}, which is another name"


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise TypeError(f"{_shown(value)} is no text")
    return value if isinstance(value, str) else str(value)


def _number(value: Any) -> int | Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise TypeError(f"{_shown(value)} is no number")
    if isinstance(value, int) and abs(value) < 10**_DIGITS:
        return value
    text = value.strip() if isinstance(value, str) else str(value)
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{_shown(value)} is no number")
    number = _EXACT.normalize(Decimal(text))
    exponent = number.as_tuple().exponent
    if len(number.as_tuple().digits) > _DIGITS or not -130 <= number.adjusted() <= 125:
        raise ValueError(f"{_shown(value)} has more than {_DIGITS} digits")
    whole = isinstance(exponent, int) and exponent >= 0 and number.adjusted() < _DIGITS
    return int(number) if whole else number


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str):
        raise TypeError(f"{_shown(value)} is no base64")
    try:
        return b64decode(value, validate=True)
    except (Base64Error, ValueError):
        raise ValueError(f"{_shown(value)} is no base64") from None


_KEYS: Final[dict[str, Callable[[Any], Any]]] = {"S": _text, "N": _number, "B": _bytes}


def _shown(value: Any) -> str:
    return ascii(value)[:80]
