"""A cold start pays for nothing that it may not need, and nothing happens at import."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

FORBIDDEN = {
    "aioboto3", "aiobotocore", "aiohttp", "asyncpg", "awslambdaric", "boto3", "botocore", "click", "duckdb",
    "hypothesis", "isal", "pytest", "rich", "sqlalchemy", "sqlite3", "yarl", "zstandard",
}  # fmt: skip


def after(code: str) -> dict[str, Any]:
    """What a fresh process has imported, and which threads it has, once it has run `code`."""
    told = "{'modules': sorted(sys.modules), 'threads': threading.active_count()}"
    report = f"import json, sys, threading; print(json.dumps({told}))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{code}\n{report}"], check=True, capture_output=True, text=True
    )
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "module", ["flowlane", "flowlane.aws_lambda", "flowlane.aws_lambda.invocation", "flowlane.compose"]
)
def test_no_sdk_is_imported(module: str) -> None:
    found = after(f"import {module}")
    assert not {name.partition(".")[0] for name in found["modules"]} & FORBIDDEN
    assert found["threads"] == 1


def test_the_handler_imports_neither_engine_nor_plugins_before_it_is_called() -> None:
    modules = after("import flowlane.aws_lambda")["modules"]
    assert not {"flowlane.engine", "flowlane.compose", "flowlane.plugins", "pluggy"} & set(modules)


def test_a_lane_on_the_memory_backend_needs_no_sdk_to_run() -> None:
    found = after(
        "import os\n"
        "os.environ['FLOWLANE_BACKEND'] = 'memory://'\n"
        "from flowlane import Lane\n"
        "from flowlane.aws_lambda import handler_for\n"
        "lane = Lane('toy')\n"
        "@lane.stage(on=lane.triggered)\n"
        "async def find(event, ctx): ...\n"
        "handler = handler_for(lane)\n"
        "event = {'specversion': '1.0', 'id': '1', 'source': 's', 'type': 't'}\n"
        "assert handler(event, None)['outcome'] == 'settled'\n"
    )
    assert not {name.partition(".")[0] for name in found["modules"]} & FORBIDDEN


def test_the_process_ends_without_a_complaint() -> None:
    code = (
        "import os\n"
        "os.environ.update(FLOWLANE_BACKEND='memory://')\n"
        "from flowlane.aws_lambda import handler\n"
        "try: handler({'Records': []}, None)\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    assert after(code)["threads"] == 1
