"""What is said of errors: one line that says what and, for errors that nobody knows, where."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from flowlane.errors import Permanent
from flowlane.reasons import describe


def parse(text: str) -> Any:
    return json.loads(text)


def raised(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # any
        call()
    return caught.value


def test_an_unknown_error_says_where_it_came_through_the_users_code() -> None:
    """Not the line of the library that raised it, and not the path, which is the machine's."""
    line = parse.__code__.co_firstlineno + 1
    said = describe(raised(lambda: parse("{")))
    assert said.startswith("JSONDecodeError: Expecting property name")
    assert said.endswith(f" (test_reasons.py, line {line}, in parse)")


def test_what_was_noted_on_its_way_is_said() -> None:
    error = ValueError("no number")
    error.add_note("row 7")
    error.add_note("of\nmany lines")
    assert describe(error) == "ValueError: no number (row 7; of many lines)"


def test_a_long_error_does_not_push_out_where_it_was() -> None:
    def fail() -> None:
        raise ValueError("x" * 5000)

    said = describe(raised(fail))
    assert len(said) <= 1000
    assert said.endswith("in fail)")


def test_typed_errors_speak_for_themselves() -> None:
    def fail() -> None:
        raise Permanent("no such customer")

    assert describe(raised(fail)) == "no such customer"
