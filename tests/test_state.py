"""State is a fold: of a unit, of a run, of counters."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane import Event, events, state
from flowlane.events import encode_data
from flowlane.state import (
    Counts,
    Position,
    Progress,
    RunTally,
    StageTally,
    Transfer,
    failure,
    fold,
    index,
    progress,
    status,
)

RUN = "toy/run/1"
OWN = {value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)}
LANE = {
    events.LANE_TRIGGERED,
    events.LANE_COMPLETED,
    events.LANE_FAILED,
    events.LANE_DEAD,
    events.LANE_NOTIFY,
}
TERMINAL = {
    events.UNIT_SETTLED: "settled",
    events.UNIT_SKIPPED: "skipped",
    events.UNIT_SUPERSEDED: "superseded",
    events.UNIT_DEAD: "dead",
    events.RECORD_PARKED: "dead",
}
#: Of leases, which are no units: what they carry is a ``Lease``, and no stage is owed them.
OF_SHARDS = {kind for kind in OWN if kind.startswith("shard.")}
OF_RUNS = {events.RUN_COMPLETED, events.RUN_REDRIVEN}
GOING_ON = OWN - LANE - set(TERMINAL) - OF_RUNS - OF_SHARDS


def event(kind: str, now: Progress | None = None, *, subject: str = "toy/thing/1", **fields: Any) -> Event:
    """An event of that type, which carries `now`."""
    data = events.EMPTY if now is None else msgspec.Raw(encode_data(now))
    made = Event("e", "toy", kind, subject, "2024-01-01T00:00:00.000Z", data, 1, RUN, stage="load")
    return msgspec.structs.replace(made, **fields)


# --------------------------------------------------------------------------- one unit


def test_every_type_of_the_engine_is_in_the_tables_below() -> None:
    assert LANE <= OWN
    assert set(TERMINAL) | OF_RUNS | GOING_ON | LANE | OF_SHARDS == OWN
    assert len(GOING_ON) >= 8
    assert len(OF_SHARDS) == 7
    assert state._ENGINE == OWN - LANE - OF_SHARDS, "what carries a Progress"


@pytest.mark.parametrize("kind", sorted(GOING_ON | LANE | {"thing"}))
def test_a_unit_is_open_until_it_ends(kind: str) -> None:
    head = event(kind, Progress(reason="it was busy") if kind in GOING_ON else None)
    assert status(head) == "open"
    assert index(head) == "open"


@pytest.mark.parametrize("kind", sorted(TERMINAL))
def test_a_unit_ends_as_its_last_event_says(kind: str) -> None:
    head = event(kind, Progress())
    assert status(head) == TERMINAL[kind]
    assert index(head) == ("dead" if TERMINAL[kind] == "dead" else None)


def test_a_redriven_unit_is_open_again() -> None:
    head = event(events.UNIT_REDRIVEN, Progress(), round=1)
    assert (status(head), index(head)) == ("open", "open")


def test_a_fact_is_owed_to_nobody() -> None:
    assert index(event("bookmark", stage="")) is None


# --------------------------------------------------------------------------- a run


def of_run(kind: str, **now: Any) -> Event:
    return event(kind, Progress(**now), subject=RUN)


@pytest.mark.parametrize(
    ("head", "state_", "listed"),
    [
        (event(events.LANE_TRIGGERED, subject=RUN), "open", "open"),
        (of_run(events.ATTEMPT_STARTED), "open", "open"),
        (of_run(events.DISCOVERY_PROGRESS, children=3), "open", "open"),
        (of_run(events.UNIT_SETTLED), "closed", "open"),
        (of_run(events.UNIT_SKIPPED, reason="nothing new"), "closed", "open"),
        (of_run(events.UNIT_SUPERSEDED), "closed", "open"),
        (of_run(events.UNIT_DEAD, reason="no answer"), "closed", "open"),
        (of_run(events.RUN_COMPLETED, completed=[0]), "settled", None),
        (of_run(events.RUN_COMPLETED, completed=[0], reason="no answer"), "dead", "dead"),
        (of_run(events.RUN_REDRIVEN, opened=1, completed=[0]), "closed", "open"),
        (of_run(events.RUN_REDRIVEN, opened=1), "closed", "open"),
        (of_run(events.UNIT_REDRIVEN, opened=1, completed=[0]), "open", "open"),
        (of_run(events.RUN_COMPLETED, opened=1, completed=[0]), "closed", "open"),
        (of_run(events.RUN_COMPLETED, opened=1, completed=[1]), "closed", "open"),
        (of_run(events.RUN_COMPLETED, opened=1, completed=[0, 1]), "settled", None),
        (of_run(events.RUN_COMPLETED, opened=2, completed=[0, 1, 2], reason="no answer"), "dead", "dead"),
    ],
)
def test_a_run_is_closed_then_completed_once_a_round(head: Event, state_: str, listed: str | None) -> None:
    assert status(head) == state_
    assert index(head) == listed


def test_a_run_that_skipped_has_not_failed() -> None:
    assert failure(of_run(events.UNIT_SKIPPED, reason="nothing new")) == ""
    assert failure(of_run(events.UNIT_DEAD, reason="no answer")) == "no answer"
    assert failure(of_run(events.RUN_COMPLETED, reason="no answer")) == "no answer"
    assert failure(of_run(events.UNIT_SETTLED)) == ""


# --------------------------------------------------------------------------- folds

small = st.integers(0, 2**40)
counts = st.builds(Counts, small, small, small, small, small, small, small)
transfers = st.builds(
    Transfer,
    split=st.integers(0, 99),
    position=st.builds(Position, small, small, st.integers(0, 2**32 - 1)),
    high=small,
    etag=st.text(st.characters(codec="utf-8"), max_size=9),
    upload=st.text(st.characters(codec="utf-8"), max_size=9),
    done=st.booleans(),
    counts=counts,
)
states = st.builds(
    Progress,
    attempt=st.integers(0, 9),
    token=st.integers(0, 99),
    hops=st.integers(0, 9),
    children=small,
    counts=counts,
    steps=st.dictionaries(st.sampled_from(["one", "two"]), st.none() | small | st.text("ab\n☃")),
    transfers=st.dictionaries(st.sampled_from(["copy-1", "load-1"]), transfers),
    reason=st.text(st.characters(codec="utf-8"), max_size=20),
    delay=st.floats(0, 1e6),
    tallied=st.none() | counts,
    opened=st.integers(0, 5),
    completed=st.lists(st.integers(0, 5), max_size=3),
)


@st.composite
def streams(draw: st.DrawFn) -> list[Event]:
    """The events of one stream as an engine appends them: a first one, then its own, in order."""
    subject = draw(st.sampled_from([RUN, "toy/thing/1"]))
    first = events.LANE_TRIGGERED if subject == RUN else "thing"
    kinds = sorted(OWN - LANE if subject == RUN else OWN - LANE - OF_RUNS)
    stream = [event(first, subject=subject)]
    for now in draw(st.lists(states, max_size=8)):
        kind = draw(st.sampled_from(kinds))
        stream.append(event(kind, now, subject=subject, version=len(stream) + 1))
    return stream


@given(streams())
def test_the_fold_of_a_stream_is_the_state_of_its_last_event(stream: list[Event]) -> None:
    assert fold(stream) == (status(stream[-1]), progress(stream[-1]))
    for n in range(1, len(stream)):
        assert fold(stream[:n]) == (status(stream[n - 1]), progress(stream[n - 1]))


@given(streams())
def test_a_status_and_an_index_agree(stream: list[Event]) -> None:
    for head in stream:
        owed = status(head) in ("open", "closed")
        assert index(head) == ("open" if owed else "dead" if status(head) == "dead" else None)


@given(states)
def test_progress_survives_the_log(now: Progress) -> None:
    assert progress(event(events.STEP_DONE, now)) == now


def test_a_first_event_has_no_progress_yet() -> None:
    assert progress(event("thing", data=msgspec.Raw(b'{"attempt": 7}'))) == Progress()


@pytest.mark.parametrize(
    "stream",
    [
        [event("thing", version=2)],
        [event("thing"), event(events.STEP_DONE, Progress(), version=3)],
        [event("thing"), event(events.STEP_DONE, Progress(), version=1)],
        [event("thing"), event(events.STEP_DONE, Progress(), version=2, subject="toy/thing/2")],
        [event(events.STEP_DONE, Progress(), version=2), event("thing")],
    ],
)
def test_what_is_not_one_stream_in_order_is_refused(stream: list[Event]) -> None:
    with pytest.raises(ValueError, match="not one stream in order at toy/thing/"):
        fold(stream)


def test_an_empty_stream_has_no_state() -> None:
    with pytest.raises(ValueError, match="empty"):
        fold([])


def test_what_a_newer_release_adds_is_ignored() -> None:
    """A rollback reads what the newer release wrote: fields unknown to this one do not stop it."""
    raw = msgspec.Raw(b'{"attempt":2,"later":{"x":1},"counts":{"records_in":3,"later":9}}')
    now = progress(event(events.STEP_DONE, data=raw))
    assert (now.attempt, now.counts.records_in) == (2, 3)


# --------------------------------------------------------------------------- counters


@given(counts, counts)
def test_counts_add_up_and_come_apart(one: Counts, two: Counts) -> None:
    total = msgspec.structs.replace(one)
    total.add(two)
    assert total.since(one) == two
    assert total.since(two) == one
    assert msgspec.structs.astuple(total) == tuple(
        a + b for a, b in zip(msgspec.structs.astuple(one), msgspec.structs.astuple(two), strict=True)
    )


@given(counts)
def test_counts_are_conserved_if_every_record_is_accounted_for(one: Counts) -> None:
    accounted = one.records_out + one.skipped + one.quarantined
    assert one.conserved == (one.records_in + one.expanded == accounted)


@pytest.mark.parametrize(
    ("fields", "conserved"),
    [
        ({}, True),
        ({"records_in": 3, "records_out": 3}, True),
        ({"records_in": 3, "records_out": 1, "skipped": 1, "quarantined": 1}, True),
        ({"records_in": 1, "expanded": 2, "records_out": 3}, True),
        ({"records_in": 3, "records_out": 2}, False),
        ({"records_in": 3, "records_out": 4}, False),
        ({"bytes_in": 10, "bytes_out": 3}, True),
    ],
)
def test_conservation(fields: dict[str, int], conserved: bool) -> None:
    assert Counts(**fields).conserved is conserved


@given(counts, counts)
def test_stage_tallies_add_up(one: Counts, two: Counts) -> None:
    left = StageTally(1, 2, 3, 4, 5, 6, msgspec.structs.replace(one))
    left.add(StageTally(10, 20, 30, 40, 50, 60, two))
    assert msgspec.structs.astuple(left)[:6] == (11, 22, 33, 44, 55, 66)
    assert left.counts.since(one) == two


@pytest.mark.parametrize(
    ("closed", "stages", "complete"),
    [
        (False, {}, False),
        (True, {}, True),
        (True, {"a": (2, 2)}, True),
        (False, {"a": (2, 2)}, False),
        (True, {"a": (2, 1)}, False),
        (True, {"a": (2, 2), "b": (1, 0)}, False),
        (True, {"a": (1, 2), "b": (2, 1)}, False),
        (True, {"a": (2, 2), "b": (1, 1)}, True),
    ],
)
def test_a_round_is_complete_when_closed_and_all_found_have_ended(
    closed: bool, stages: dict[str, tuple[int, int]], complete: bool
) -> None:
    tally = RunTally(closed, {name: StageTally(*figures) for name, figures in stages.items()})
    assert tally.complete is complete
