"""What a Lambda function pays before its first event: the CPU time of importing the entry point.

Measured inside the fresh process, around the import alone; bare Python (``pass``) and aiohttp are there for
comparison. No SDK, HTTP client or terminal library may come with it.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import Bar, Candidate, Case, peak_mb, python

FORBIDDEN = ("aioboto3", "aiobotocore", "aiohttp", "boto3", "botocore", "click", "duckdb", "isal", "rich")


@contextmanager
def opened(size: int | None, scratch: Path) -> Iterator[Sequence[Candidate]]:
    """The handler's module, what it is made of, and a library of the size that it must not bring along."""
    yield [
        Candidate("flowlane.aws_lambda", python("imports", "flowlane.aws_lambda")),
        Candidate("flowlane", python("imports", "flowlane")),
        Candidate("asyncio, msgspec", python("imports", "asyncio", "msgspec")),
        Candidate("aiohttp", python("imports", "aiohttp")),
    ]


CASE = Case(
    "imports",
    "CPU milliseconds of an import in a fresh process",
    opened,
    {"ms": "CPU ms", "modules": "modules", "peak": "peak MB"},
    [Bar("flowlane.aws_lambda", "ms", "at most", 120)],
    rounds=15,
)


def main(names: Sequence[str]) -> dict[str, float]:
    """Import `names`, here."""
    before, began = len(sys.modules), time.process_time()
    for name in names:
        importlib.import_module(name)
    seconds = time.process_time() - began
    brought = sorted(name for name in FORBIDDEN if name in sys.modules and name not in names)
    assert not brought or not names[0].startswith("flowlane"), f"{names[0]} imports {', '.join(brought)}"
    return {"ms": seconds * 1000, "modules": len(sys.modules) - before, "peak": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
