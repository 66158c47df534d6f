"""A scene: lanes and the world that they meet, to be run with a crash at any port call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flowlane.events import Event
from flowlane.lane import Lane
from flowlane.testing.faults import Process
from tests.simulation.lab import Lab


@dataclass(frozen=True)
class Scene:
    """What is run, and what must come of it the same however it was disturbed."""

    name: str
    lanes: Callable[[Process], Sequence[Lane]]  #: as each process has them
    publish: Callable[[Lab], None]  #: what the world has
    effects: Callable[[Lab], dict[str, Any]]  #: what stands outside the log in the end
    doubled: Callable[[Event], bool]  #: units (by their first events) delivered again while at work
    belated: Callable[[Event], bool]  #: units delivered again when all is over
    ports: frozenset[str]  #: every port method that must be reached in the undisturbed run
    doubled_at: float = 0.3  #: seconds after the start
    deadline: float = 2.0  #: seconds after the start that the first process has; a second less to begin with
