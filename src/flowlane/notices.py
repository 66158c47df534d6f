"""What people are told of a run that has come to rest, through the notifier that the lane's policy names.

A notice is a unit of its own, published by the commit that appends ``run.completed``. Its attempt is in the
log before it is sent, it is retried by the policy and sent again under the same key if nobody knows whether
it went out; that it is dead changes nothing of its run. Reading the log, or building anything from it anew,
sends nothing.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec

from flowlane.report import Report
from flowlane.state import progress

if TYPE_CHECKING:
    from flowlane.attempt import Attempt
    from flowlane.engine import Engine
    from flowlane.lane import Completed

#: Dead units named in a notice, at most; the counters have all of them.
LISTED = 10
#: Dead units of the lane looked at to find those of the run, at most: old ones may be many.
_LOOKED_AT = 1000
_LONGEST_REASON = 300


async def announce(attempt: Attempt, told: Completed) -> None:
    """Tell the notifier of the attempt's policy what `told` says.

    Raises:
        ConfigError: no plugin opens the notifier's URI, or the URI is wrong.
        Retryable, Permanent: the notifier's own.
    """
    report = msgspec.convert(told.report, Report)
    engine, url = attempt.engine, attempt.stage.policy.notify or ""
    dead: list[list[str]] = []
    if report.units["dead"]:
        # Looked up once, and logged: the same notice says the same, however often it is tried.
        dead = await attempt.step("dead", _dead_units, engine, report)
    await attempt.step("send", _send, engine, url, subject(report), text(report, told.round, dead))


async def _send(engine: Engine, url: str, subject: str, text: str, *, idempotency_key: str) -> None:
    async with engine.connections.notifier(url) as notifier:
        await notifier.send(subject, text, idempotency_key=idempotency_key)


async def _dead_units(engine: Engine, report: Report) -> list[list[str]]:
    """Some of the run's dead units with their reasons, in the order of their names."""
    found: list[list[str]] = []
    looked_at = 0
    async with aclosing(engine.backend.units(report.lane, "dead")) as heads:  # type: ignore[type-var]  # a generator in every backend
        async for head in heads:
            looked_at += 1
            handling = engine.handling_of(head)
            counts = handling is None or handling.counted
            if counts and head.run == report.run and head.subject != report.run:
                found.append([head.subject, _plain(progress(head).reason, _LONGEST_REASON)])
            if len(found) == LISTED or looked_at == _LOOKED_AT:
                break
    return sorted(found)


def subject(report: Report) -> str:
    """What a run has come to in one line."""
    said = f"{report.lane}: run {report.run.rpartition('/')[2]} {report.outcome}"
    return _plain(f"{said}: {report.reason}" if report.reason else said, 1000)


def text(report: Report, round: int, dead: list[list[str]]) -> str:
    """The report for people, in plain text: the same for the same arguments.

    `round`: the run's redrives so far; `dead`: dead units that it found, each with its reason.
    """
    redriven = f" after {round} redrives" if round > 1 else " after a redrive" if round else ""
    reason = f": {_plain(report.reason, 1000)}" if report.reason else ""
    lines = [f"Run {report.run} of lane {report.lane} has {report.outcome}{redriven}{reason}", ""]
    lines += _figures("", report.units, report.records, report.bytes)
    if len(report.stages) > 1:
        for stage in report.stages:
            lines += ["", f"stage {stage['stage']}", *_figures("  ", *(stage[name] for name in _FIGURES))]
    listed = [[each["unit"], each["reason"]] for each in report.dead] + dead
    if listed:
        lines += ["", "dead", *(f"  {unit}: {_plain(why, _LONGEST_REASON)}" for unit, why in listed)]
        more = report.units["dead"] + len(report.dead) - len(listed)
        lines += [f"  and {more:,} more"] if more > 0 else []
    if listed or report.units["dead"]:
        lines += ["", "`flowlane dead` lists what is dead, `flowlane redrive` puts it back to work."]
    return "\n".join(lines) + "\n"


_FIGURES = ("units", "records", "bytes")


def _figures(indent: str, *parts: dict[str, int]) -> list[str]:
    return [
        f"{indent}{name:<8} " + ", ".join(f"{number:,} {what}" for what, number in part.items())
        for name, part in zip(_FIGURES, parts, strict=True)
    ]


def _plain(text: str, limit: int) -> str:
    """`text` on one line of at most `limit` characters, without any that a mail or a terminal obeys."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
