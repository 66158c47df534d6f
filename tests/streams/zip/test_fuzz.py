from __future__ import annotations

from tests.streams.zip.fuzz import campaign


def test_bent_archives_are_a_typed_error_or_the_truth() -> None:
    """A few of those of ``make prove``; the same ones every time."""
    done = campaign(1, count=1500)
    assert done["archives"] == 1500
    assert min(done["read"], done["Refused"], done["Damaged"]) > 100, done
