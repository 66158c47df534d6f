"""The map of an archive's periods: which are covered, landing, pending, dead, or missing for good."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from flowlane.cli.screen import Screen
from flowlane.cli.text import plural

_DAY = timedelta(days=1)
_HALF_HOUR = timedelta(minutes=30)

#: What each state looks like: in blocks, and where the stream has none.
_SIGNS = {
    "covered": ("█", "#"),
    "landing": ("▒", "~"),
    "pending": ("░", "?"),
    "dead": ("x", "x"),
    "missing": ("·", "."),
}


class Coverage(msgspec.Struct):
    """What a view says that is shown as a map; ``step`` in seconds, periods by their beginning."""

    start: datetime
    next: datetime
    step: float
    covered: int
    bookmark: datetime | None = None
    landing: list[str] = []
    pending: dict[str, str] = {}
    missing: list[tuple[datetime, datetime]] = []
    dead: dict[str, str] = {}


class Stretch(NamedTuple):
    """Consecutive periods, first and last inclusive, of one state for one reason."""

    first: datetime
    last: datetime
    periods: int
    state: str
    reason: str


def read_coverage(view: Any) -> Coverage | None:
    """The coverage that `view` tells of; ``None`` if it is another kind of view."""
    try:
        coverage = msgspec.convert(view, Coverage)
    except msgspec.ValidationError:
        return None
    return coverage if coverage.step > 0 else None


def stretches(coverage: Coverage) -> list[Stretch]:
    """Everything that is not covered, joined where state and reason are the same, in order of time."""
    step = timedelta(seconds=coverage.step)
    single = [(moment, "landing", "") for moment in map(_moment, coverage.landing)]
    single += [(_moment(text), "pending", reason) for text, reason in coverage.pending.items()]
    single += [(_moment(text), "dead", reason) for text, reason in coverage.dead.items()]
    found = [
        Stretch(first, last, int((last - first) / step) + 1, "missing", "a permanent gap")
        for first, last in coverage.missing
    ]
    # Periods that follow each other lie as many steps from a common time as their numbers say.
    numbered = enumerate(sorted(single))
    for _, group in groupby(numbered, key=lambda item: (item[1][0] - item[0] * step, item[1][1:])):
        listed = [period for _, period in group]
        (first, state, reason), last = listed[0], listed[-1][0]
        found.append(Stretch(first, last, len(listed), state, reason))
    return sorted(found)


def rows(coverage: Coverage, found: Sequence[Stretch], days: int) -> Iterator[tuple[str, list[str]]]:
    """The map: each row's name, and the state of each of its places; a day a row where that fits, otherwise
    an hour or a month. Only the last `days` days; places without a state are not asked for yet."""
    step = timedelta(seconds=coverage.step)
    first = max(coverage.start, _midnight(coverage.next - step) - (days - 1) * _DAY)
    first = coverage.start + -((coverage.start - first) // step) * step
    begins = [stretch.first for stretch in found]
    row: list[str] = []
    name = ""
    moment = first
    while moment < coverage.next:
        named, place = _place(moment, step)
        if named != name:
            if row:
                yield name, row
            name, row = named, []
        row += [""] * (place - len(row))
        at = bisect_right(begins, moment) - 1
        row.append(found[at].state if at >= 0 and moment <= found[at].last else "covered")
        moment += step
    if row:
        yield name, row


def _place(moment: datetime, step: timedelta) -> tuple[str, int]:
    if step >= _DAY:
        return moment.strftime("%Y-%m"), moment.day - 1 if step == _DAY else 0
    if step >= _HALF_HOUR:
        return moment.strftime("%Y-%m-%d"), int((moment - _midnight(moment)) / step)
    return moment.strftime("%Y-%m-%dT%H"), int(timedelta(minutes=moment.minute, seconds=moment.second) / step)


def _midnight(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def show_coverage(screen: Screen, name: str, coverage: Coverage, days: int) -> None:
    """The map with its legend, then every stretch that is not covered, with its reason."""
    found = stretches(coverage)
    blocks = screen.blocks
    signs = {state: pair[0] if blocks else pair[1] for state, pair in _SIGNS.items()}
    counts = _counts(coverage, found)
    screen.line(f"{name} from {_text(coverage.start)} to {_text(coverage.next)} (excluded)")
    for label, states in rows(coverage, found, days):
        screen.line(f"{label} " + "".join(signs.get(state, " ") for state in states).rstrip())
    screen.line("  ".join(f"{signs[state]} {state} {count:,}" for state, count in counts.items()))
    for stretch in found:
        many = (
            f" .. {_text(stretch.last)} ({plural(stretch.periods, 'period')})" if stretch.periods > 1 else ""
        )
        why = f": {stretch.reason}" if stretch.reason else ""
        screen.line(f"{stretch.state} {_text(stretch.first)}{many}{why}", _STYLES.get(stretch.state, ""))


_STYLES = {"dead": "red", "pending": "yellow"}


def _counts(coverage: Coverage, found: Sequence[Stretch]) -> Mapping[str, int]:
    counts = dict.fromkeys(_SIGNS, 0)
    counts["covered"] = coverage.covered
    for stretch in found:
        counts[stretch.state] += stretch.periods
    return counts


def _moment(text: str) -> datetime:
    """A period's beginning; an archive's version (``@etag``) is no part of it."""
    return datetime.fromisoformat(text.partition("@")[0])


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
