"""``flowlane graph``: a lane as a Mermaid flowchart, from its trigger over its stages and units."""

from __future__ import annotations

import functools
import inspect
import typing
from typing import Any

from flowlane import events
from flowlane.cli.screen import Screen
from flowlane.cli.session import Answer
from flowlane.cli.text import seconds
from flowlane.lane import Lane, Stage, Unit


async def show_graph(lane: Lane) -> Answer:
    """The flowchart of `lane`; nothing is opened for it."""
    stages = [_plain(lane, stage) for stage in lane.stages]
    text = mermaid(lane)

    def show(screen: Screen) -> None:
        for line in text.splitlines():
            screen.line(line)

    return Answer({"lane": lane.name, "every": lane.every, "stages": stages, "mermaid": text}, show)


def yields(lane: Lane, stage: Stage) -> list[str]:
    """The types of the units that the handler of `stage` may yield, as far as it can be told without running
    it: what its annotation says, or else the units of the lane that it mentions; if it mentions none, any."""
    if not inspect.isasyncgenfunction(stage.handler):
        return []
    handled = {other.unit: other.on for other in lane.stages if other.counted and other is not stage}
    for known in (_annotated(stage.handler), _mentioned(stage.handler)):
        named = [kind for unit, kind in handled.items() if unit in known]
        if named:
            return named
    return list(handled.values())


def _annotated(handler: Any) -> set[Any]:
    try:
        hint = typing.get_type_hints(handler).get("return")
    except Exception:  # noqa: BLE001  # a hint may name what exists for type checkers only
        return set()
    found: set[Any] = set()
    pending = [hint]
    while pending:
        part = pending.pop()
        pending.extend(typing.get_args(part))
        if isinstance(part, type) and issubclass(part, Unit):
            found.add(part)
    return found


def _mentioned(handler: Any) -> set[Any]:
    function = inspect.unwrap(handler)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    if not inspect.isfunction(function):
        return set()
    known = inspect.getclosurevars(function)
    return {
        value
        for value in (*known.nonlocals.values(), *known.globals.values())
        if isinstance(value, type) and issubclass(value, Unit)
    }


def _plain(lane: Lane, stage: Stage) -> dict[str, Any]:
    policy = stage.policy
    return {
        "stage": stage.name,
        "on": stage.on,
        "yields": yields(lane, stage),
        "concurrency": policy.concurrency,
        "retries": policy.retries,
        "timeout": policy.timeout,
        "order": list(stage.order),
        "via": stage.via,
    }


def mermaid(lane: Lane) -> str:
    """The flowchart: round ends are triggers and notices, boxes stages, hexagons units."""
    trigger = f"every {lane.every}" if lane.every else "when triggered"
    lines = ["flowchart TD", f'    trigger(["{lane.name}: {trigger}"])']
    for stage in lane.stages:
        policy = stage.policy
        label = (
            f"{stage.name}<br/>concurrency {policy.concurrency}, retries {policy.retries}, "
            f"timeout {seconds(float(policy.timeout))}"
        )
        if stage.order:
            label += f"<br/>in order of {', '.join(stage.order)}"
        lines.append(f'    {_id("stage", stage.name)}["{label}"]')
    for stage in lane.stages:
        if stage.on == events.LANE_TRIGGERED:
            lines.append(f"    trigger --> {_id('stage', stage.name)}")
        elif stage.counted:
            lines.append(f'    {_id("unit", stage.on)}{{{{"{stage.on}"}}}}')
            arrow = "-->|channel|" if stage.via == "channel" else "-->"
            lines.append(f"    {_id('unit', stage.on)} {arrow} {_id('stage', stage.name)}")
        else:
            lines.append(f'    {_id("notice", stage.on)}(["{stage.on}"]) --> {_id("stage", stage.name)}')
        lines.extend(
            f"    {_id('stage', stage.name)} --> {_id('unit', kind)}" for kind in yields(lane, stage)
        )
    return "\n".join(lines)


def _id(kind: str, name: str) -> str:
    """An identifier for Mermaid, which has reserved words."""
    return f"{kind}_{name.replace('.', '_').replace('-', '_')}"
