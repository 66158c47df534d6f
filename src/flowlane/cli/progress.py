"""What a run shows while it runs: bars on a terminal, a line now and then in a pipe; all of it on stderr."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from flowlane.cli.screen import Screen
from flowlane.cli.text import size
from flowlane.compose import Application
from flowlane.errors import FlowlaneError
from flowlane.lane import Lane
from flowlane.state import StageTally, progress, status
from flowlane.worker import GRACE

_BARS_EVERY = 0.25
_LINES_EVERY = 10.0


class Totals:
    """The figures of some runs together, as the log has them now."""

    def __init__(self, app: Application, lane: Lane, runs: Sequence[str]) -> None:
        self.app = app
        self.lane = lane
        self._runs = list(runs)
        self.stages: dict[str, StageTally] = {s.name: StageTally() for s in lane.stages if s.counted}
        self.discovering = True

    async def read(self) -> None:
        """Read them again."""
        backend = self.app.backend
        heads = await backend.last(self._runs)
        stages = {name: StageTally() for name in self.stages}
        for run, head in heads.items():
            for number in range(progress(head).opened + 1):
                for name, part in (await backend.tally(run, number)).stages.items():
                    if name in stages:
                        stages[name].add(part)
        self.stages = stages
        self.discovering = len(heads) < len(self._runs) or any(status(h) == "open" for h in heads.values())


@asynccontextmanager
async def showing(totals: Totals, stop: asyncio.Event, *, quiet: bool) -> AsyncIterator[None]:
    """Show `totals` while the context is open; looking never hinders the run."""
    if quiet:
        yield
        return
    screen = Screen(sys.stderr)
    shown = asyncio.create_task(_bars(totals, stop, screen) if screen.tty else _lines(totals, screen))
    try:
        yield
    finally:
        shown.cancel()
        await asyncio.gather(shown, return_exceptions=True)


async def _lines(totals: Totals, screen: Screen) -> None:
    while True:
        await totals.app.clock.sleep(_LINES_EVERY)
        if await _look(totals):
            parts = [f"{name} {_figures(part)}" for name, part in totals.stages.items()]
            more = ", still discovering" if totals.discovering else ""
            screen.line(f"{totals.lane.name}: {', '.join(parts)}{more}")
            screen.stream.flush()


async def _bars(totals: Totals, stop: asyncio.Event, screen: Screen) -> None:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
    )
    told = False
    # Drawn by this task alone: a thread of rich's own would be one more thing at work in a run.
    with Progress(*columns, console=screen.console, auto_refresh=False, transient=True) as bars:
        tasks = {name: bars.add_task(name, total=None, figures="") for name in totals.stages}
        while True:
            if await _look(totals):
                for name, part in totals.stages.items():
                    total = None if totals.discovering and part.found == part.settled else part.found or 1
                    done = part.settled if part.found or totals.discovering else 1
                    bars.update(tasks[name], total=total, completed=done, figures=_figures(part))
            if stop.is_set() and not told:
                told = True
                bars.console.print(f"stopping within {GRACE:.0f} s; press again to stop now")
            bars.refresh()
            await totals.app.clock.sleep(_BARS_EVERY)


async def _look(totals: Totals) -> bool:
    try:
        await totals.read()
    except (FlowlaneError, OSError):
        return False  # the log is away; whoever works with it will say so
    return True


def _figures(part: StageTally) -> str:
    dead = f", {part.dead - part.redriven:,} dead" if part.dead > part.redriven else ""
    moved = part.counts.bytes_in
    return f"{part.settled:,}/{part.found:,} units{dead}" + (f", {size(moved)}" if moved else "")
