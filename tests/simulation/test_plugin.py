"""The fixtures that users get."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from flowlane.testing.clock import VirtualLoop


def test_virtual_time(flowlane_virtual: Callable[..., Any]) -> None:
    async def main(loop: VirtualLoop) -> float:
        await asyncio.sleep(3600)
        return loop.time()

    assert round(flowlane_virtual(main, seed=1)) == 3600


def test_the_simulator(flowlane_simulator: Callable[..., Any]) -> None:
    assert flowlane_simulator(1).violations == []


def test_the_plugin_imports_next_to_nothing() -> None:
    script = (
        "import sys, pytest; before = set(sys.modules); import flowlane.testing.pytest_plugin; "
        "print(sorted(m for m in set(sys.modules) - before if m.startswith('flowlane')))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "simulator" not in out.stdout
    assert "testing.clock" not in out.stdout
