"""The harness: runs a case's candidates in turn, each as a process, and holds their figures against bars.

A candidate prints one JSON object of figures as its last line and exits 0 only if its output was right; the
harness adds ``wall`` and ``cpu`` (seconds) and ``peak`` (MB of resident memory) of the whole process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent

Figures = dict[str, float]


class WrongOutput(Exception):
    """A candidate failed, or its output was not what it has to be: there is nothing to compare."""


@dataclass(frozen=True)
class Candidate:
    """One way of doing the case's work: its name in tables, and its command."""

    name: str
    command: Sequence[str]


@dataclass(frozen=True)
class Bar:
    """What a candidate's `figure` must be: by itself, or as a multiple of `peer`'s in the same round."""

    candidate: str
    figure: str
    sign: Literal["at least", "at most"]
    limit: float
    peer: str = ""

    def value(self, rounds: Sequence[Mapping[str, Figures]]) -> float:
        """The median over the rounds of the figure, or of its ratio to the peer's."""
        return median(
            done[self.candidate][self.figure] / (done[self.peer][self.figure] if self.peer else 1.0)
            for done in rounds
        )

    def met(self, value: float) -> bool:
        """Whether `value` is on the right side of the limit."""
        return value >= self.limit if self.sign == "at least" else value <= self.limit

    def __str__(self) -> str:
        of = f" x {self.peer}" if self.peer else ""
        return f"{self.candidate}: {self.figure} {self.sign} {self.limit:g}{of}"


@dataclass(frozen=True)
class Case:
    """What is measured: a context in which the candidates can run, and the bars they must meet.

    ``opened`` is given the size of the run (None: the full one) and a scratch folder.
    """

    name: str
    title: str
    opened: Callable[[int | None, Path], AbstractContextManager[Sequence[Candidate]]]
    columns: Mapping[str, str]  #: figures that the table shows, with their headings
    bars: Sequence[Bar]
    peer: str = ""  #: what the table gives ratios to, by the first column
    rounds: int = 3


@dataclass
class Result:
    """What came of a case."""

    case: Case
    rounds: list[dict[str, Figures]] = field(default_factory=list)

    def medians(self) -> dict[str, Figures]:
        """Each candidate's figures, over all rounds."""
        return {
            name: {figure: median(done[name][figure] for done in self.rounds) for figure in figures}
            for name, figures in self.rounds[0].items()
        }

    def verdicts(self) -> Iterator[tuple[Bar, float, bool]]:
        """Each bar with its value and whether it is met."""
        for bar in self.case.bars:
            value = bar.value(self.rounds)
            yield bar, value, bar.met(value)


def python(module: str, *arguments: object) -> list[str]:
    """The command that runs a module of this package in a fresh process."""
    return [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]


def peak_mb(*, children: bool = False) -> float:
    """The most memory this process has had resident since it was started, in MB; or its largest child."""
    if children:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def run(
    case: Case,
    *,
    size: int | None,
    rounds: int | None,
    scratch: Path,
    measured: Callable[[Candidate], Figures] | None = None,
) -> Result:
    """Run every candidate of `case` once a round, in turn, beginning with another one each time; each by
    `measured` (``measure``, where none is given).

    Raises:
        WrongOutput: a candidate failed.
    """
    each, result = measured or measure, Result(case)
    with case.opened(size, scratch) as candidates:
        for number in range(rounds or case.rounds):
            turn = number % len(candidates)
            done = {c.name: each(c) for c in (*candidates[turn:], *candidates[:turn])}
            result.rounds.append({c.name: done[c.name] for c in candidates})
    return result


def measure(candidate: Candidate) -> Figures:
    """Run the candidate's process; its own figures and the operating system's about it.

    Raises:
        WrongOutput: it did not exit with 0.
    """
    print(f"  {candidate.name} ...", end="", flush=True, file=sys.stderr)
    began = time.monotonic()
    with Popen(candidate.command, cwd=ROOT, stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        # Not process.wait(): only wait4 tells of this child alone.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - began
    print(f" {wall:.1f} s", file=sys.stderr)
    cpu = usage.ru_utime + usage.ru_stime
    # A process begins with its parent's peak: the candidate's own account of it is the better one.
    own = {"wall": wall, "cpu": cpu, "peak": usage.ru_maxrss / 1024}
    return own | told(candidate, process.returncode, output)


def told(candidate: Candidate, code: int, output: str) -> Figures:
    """The candidate's own figures, out of its exit code and what it wrote.

    Raises:
        WrongOutput: the code is not 0.
    """
    if code:
        raise WrongOutput(f"{candidate.name} ended with {code}")
    lines = output.splitlines()
    figures: Figures = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return figures
