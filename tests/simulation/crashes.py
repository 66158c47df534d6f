"""Crash points: a scene is run with a fault at one of its port calls (or some), restarting whatever dies; and
the normal form in which its outcome is compared with that of the undisturbed run."""

from __future__ import annotations

import asyncio
import logging
from functools import cache
from typing import Any

import msgspec

from flowlane.deadline import Deadline
from flowlane.state import progress, status
from flowlane.testing.clock import Deadlock, VirtualLoop, run
from flowlane.testing.faults import CrashAt
from tests.simulation.archive_scene import ARCHIVE
from tests.simulation.drops_scene import DROPS
from tests.simulation.lab import Lab
from tests.simulation.scene import Scene

SCENES = {scene.name: scene for scene in (ARCHIVE, DROPS)}


class Result(msgspec.Struct):
    """What one run of the scenario came to."""

    wrong: list[str]
    normal: dict[str, Any]
    calls: list[str]
    kinds: set[str]  #: the types of all events


def scenario(scene: Scene, number: int = 0, mode: str = "", *more: tuple[int, str], seed: int = 0) -> Result:
    """Run it with a fault at that port call (0: none), restarting whatever dies, and drain."""
    faults = CrashAt(number, mode, *more)

    async def main(loop: VirtualLoop) -> Result:
        lab = Lab(loop, scene.lanes)
        scene.publish(lab)
        first = lab.process(faults)
        deadline = Deadline(first.clock.monotonic() + scene.deadline, 1.0)
        doubled = loop.create_task(_double(lab, scene))
        wrong = [await lab.until_done(first, lab.run(deadline=deadline), again=lab.run(), faults=faults)]
        await doubled
        await lab.redeliver(scene.belated)
        wrong.append(await lab.until_done(lab.process(faults), lab.run(), faults=faults))
        wrong += await lab.violations()
        wrong += [f"asyncio complains: {text}" for text in loop.complaints]
        normal = await normal_form(lab, scene)
        kinds = {event.type for event in (await lab.log()).events}
        return Result([text for text in wrong if text], normal, faults.calls, kinds)

    try:
        return run(main, seed=seed)
    except Deadlock as error:
        return Result([f"deadlock: {error}"], {}, faults.calls, set())


async def _double(lab: Lab, scene: Scene) -> None:
    """What is being handled is delivered once more."""
    await asyncio.sleep(scene.doubled_at)
    await lab.redeliver(scene.doubled)


async def normal_form(lab: Lab, scene: Scene) -> dict[str, Any]:
    """Effects and log without ids, times and attempts: states, counts, payloads, facts, reports."""
    log = await lab.log()
    streams: dict[str, Any] = {}
    for name, stream in log.streams.items():
        first, last = stream[0], stream[-1]
        known: dict[str, Any] = {"type": first.type, "stage": first.stage, "cut": first.cut}
        if first.stage:
            now = progress(last)
            known["state"] = status(last)
            known["counts"] = msgspec.to_builtins(now.counts)
            known["ends"] = [event.type for event in stream if event.type.startswith(("unit.", "run."))]
            known["completed"] = now.completed
            known["report"] = {
                key: value for key, value in now.report.items() if key not in ("dead", "seconds")
            }
        data = msgspec.json.decode(first.data if first.stage else last.data)
        on_the_way = ("at", "by", "heard")
        known["payload"] = {key: value for key, value in data.items() if key not in on_the_way}
        streams[name] = known
    return {"log": streams, **scene.effects(lab)}


def difference(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two normal forms differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            text
            for key in sorted({*one, *other})
            for text in difference(one.get(key), other.get(key), f"{path}/{key}")
        ]
    return [] if one == other else [f"{path}: {one!r:.200} is not {other!r:.200}"]


@cache
def calm(name: str) -> Result:
    """The undisturbed run of the scene of that name."""
    return scenario(SCENES[name])


def crash(name: str, number: int, mode: str, *more: tuple[int, str]) -> list[str]:
    """What differs from the undisturbed run of the scene of that name if that call goes wrong."""
    logging.getLogger("flowlane").setLevel(logging.ERROR)  # that the log is away is no news here
    result = scenario(SCENES[name], number, mode, *more)
    return result.wrong + difference(result.normal, calm(name).normal)
