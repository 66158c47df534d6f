"""What a run has come to: the conservation table, as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from flowlane.events import Event
from flowlane.lane import Lane
from flowlane.ports import Backend
from flowlane.state import Counts, Progress, RunTally, StageTally, failure, progress, status


class Report(msgspec.Struct):
    """The figures of one run over all its rounds; what ``flowlane run --json`` prints."""

    lane: str
    run: str
    outcome: Literal["settled", "failed"]
    reason: str
    units: dict[str, int]
    records: dict[str, int]
    bytes: dict[str, int]
    stages: list[dict[str, Any]]
    dead: list[dict[str, str]]
    seconds: float = 0.0
    changes: list[dict[str, str]] = msgspec.field(default_factory=list)
    """What loads changed of their targets beyond rows, as far as the process that tells has seen to it."""

    def brief(self) -> dict[str, Any]:
        """The report as plain values, for an event or JSON."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


async def read_report(backend: Backend, lane: Lane, head: Event) -> Report:
    """What the run whose head is `head` has come to, over all its rounds."""
    now = progress(head)
    now.reason = failure(head)
    tallies = [await backend.tally(head.subject, n) for n in range(now.opened + 1)]
    return build_report(lane, head, now, tallies)


def build_report(lane: Lane, head: Event, now: Progress, tallies: Sequence[RunTally]) -> Report:
    """The report of the run whose head is `head` and state `now`, from the tallies of its rounds.

    A run has failed if a unit (or its discovery) is dead, if more records are in quarantine than its error
    budget allows, or if records are unaccounted for: that is the reason. One of which something is at work
    has not settled, without one.
    """
    stages: dict[str, StageTally] = {stage.name: StageTally() for stage in lane.stages if stage.counted}
    for tally in tallies:
        for name, part in tally.stages.items():
            stages.setdefault(name, StageTally()).add(part)
    total = StageTally()
    for part in stages.values():
        total.add(part)
    at_work = status(head) == "open" or total.found > total.settled
    died = "" if status(head) == "open" else now.reason  # of a discovery at work: why it is retried
    reason = _failure(lane, died, total)
    return Report(
        lane=lane.name,
        run=head.subject,
        outcome="failed" if reason or at_work else "settled",
        reason=reason,
        units=_units(total),
        records=_records(total.counts),
        bytes={"in": total.counts.bytes_in, "out": total.counts.bytes_out},
        stages=[
            {
                "stage": name,
                "units": _units(part),
                "records": _records(part.counts),
                "bytes": {"in": part.counts.bytes_in, "out": part.counts.bytes_out},
                "conserved": part.counts.conserved,
            }
            for name, part in stages.items()
        ],
        dead=[{"unit": head.subject, "reason": died}] if died else [],
    )


def _failure(lane: Lane, died: str, total: StageTally) -> str:
    if died:
        return f"discovery died: {died}"
    if total.dead > total.redriven:
        dead = total.dead - total.redriven
        return f"{dead} unit is dead" if dead == 1 else f"{dead} units are dead"
    budget = max((stage.policy.error_budget for stage in lane.stages), default=0.0)
    if total.counts.quarantined > budget * total.counts.records_in:
        return (
            f"{total.counts.quarantined} of {total.counts.records_in} records are in quarantine, "
            f"over the budget of {budget:.2%}"
        )
    if not total.counts.conserved:
        return "records are unaccounted for: in + expanded is not out + skipped + quarantined"
    return ""


def _units(part: StageTally) -> dict[str, int]:
    return {
        "found": part.found - part.redriven,
        "settled": part.settled - part.redriven,
        "dead": part.dead - part.redriven,
        "skipped": part.skipped,
        "superseded": part.superseded,
    }


def _records(counts: Counts) -> dict[str, int]:
    return {
        "in": counts.records_in,
        "expanded": counts.expanded,
        "out": counts.records_out,
        "skipped": counts.skipped,
        "quarantined": counts.quarantined,
    }
