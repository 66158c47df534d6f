"""The corpus of real Lambda events."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def corpus() -> Callable[[str], Any]:
    """Reads a Lambda event of the corpus by its path."""
    folder = os.environ.get("FLOWLANE_CORPUS")
    if not folder:
        pytest.skip("FLOWLANE_CORPUS is not set: it names the folder with lambda_events/ in it")
    return lambda name: json.loads((Path(folder) / "lambda_events" / name).read_text())
