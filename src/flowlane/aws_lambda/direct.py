"""What the function is invoked with itself: by hand, asynchronously, by a source that has no batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from flowlane.aws_lambda.invocation import Invocation
from flowlane.aws_lambda.wanted import Sweep, Wanted
from flowlane.compose import Application
from flowlane.deadline import Deadline
from flowlane.errors import FlowlaneError, Permanent, Retryable
from flowlane.lane import Lane
from flowlane.worker import report_of


async def handle_direct(
    app: Application, lane: Lane, wanted: Sequence[Wanted], deadline: Deadline
) -> dict[str, Any]:
    """Do what the function was invoked for, all of it whatever becomes of each; the run's report (of a run
    that is drained elsewhere: its name), or a list of them where it is not one run that was wanted.

    Raises:
        Permanent: some of it makes no sense; the rest is done.
        Retryable: a run is not finished: the same event, sent again, goes on with it (as AWS does by itself
            where the invocation is an asynchronous one).
    """
    invocation = Invocation(app, lane, deadline)
    began = app.clock.monotonic()
    runs: dict[str, None] = {}  # in order
    answer: dict[str, Any] = {"lane": lane.name}
    errors: list[FlowlaneError] = []
    async with invocation.open():
        if invocation.near:
            errors.append(Retryable("nothing was begun: too little of the function's time is left"))
            wanted = ()
        others = (await invocation.open_runs())[0] if invocation.drains and wanted else set()
        for each in wanted:
            try:
                if isinstance(each, Sweep):
                    answer["swept"] = msgspec.to_builtins(await invocation.sweep())
                else:
                    runs[await invocation.take(each)] = None
            except FlowlaneError as error:
                errors.append(error)
        try:
            await invocation.unended({*runs, *others}, needed=set(runs))
        except Permanent as error:
            errors.append(error)
    if errors:
        raise next((error for error in errors if isinstance(error, Retryable)), errors[0])
    reports = [await _report(app, lane, invocation, run, began) for run in runs]
    if len(reports) == 1 and len(wanted) == 1:
        return reports[0]
    return {**answer, "runs": reports} if reports or "swept" not in answer else answer


async def _report(
    app: Application, lane: Lane, invocation: Invocation, run: str, began: float
) -> dict[str, Any]:
    if not invocation.drains:
        return {"lane": lane.name, "run": run, "outcome": "open"}
    if run not in await invocation.look({run}):
        raise Retryable(f"the run {run} is not finished: send the same event again, and it goes on")
    report = await report_of(app, lane, run)
    report.seconds = round(app.clock.monotonic() - began, 3)
    return report.brief()
