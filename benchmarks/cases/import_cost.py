"""What ``import flowlane.aws_lambda`` costs: CPU of a cold process, and what it pulls in.

``python benchmarks/cases/import_cost.py [runs]`` prints one JSON object. ``cpu_ms`` is the median over fresh
processes (user and system time, the interpreter's own start left out); what asyncio and msgspec cost, without
which nothing works, is measured in turn with it. The first process may compile byte code and does not count.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

LIMIT_MS = 120
#: What a cold start must not pay for: SDKs, and what only some lanes or the command line need.
FORBIDDEN = ("aiobotocore", "aioboto3", "aiohttp", "boto3", "botocore", "click", "rich")

_PROBE = """
import json, sys, time
before = time.process_time()
{statement}
cost = time.process_time() - before
print(json.dumps({{"ms": cost * 1000, "modules": sorted(sys.modules)}}))
"""
CANDIDATES = {
    "floor": "import asyncio, msgspec",
    "handler": "import flowlane.aws_lambda",
    "engine": "import flowlane.aws_lambda.invocation",
}


def probe(statement: str) -> tuple[float, list[str]]:
    """CPU milliseconds that `statement` takes in a process of its own, and the modules there are after it."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE.format(statement=statement)], check=True, capture_output=True, text=True
    )
    said = json.loads(done.stdout)
    return said["ms"], said["modules"]


def measure(runs: int) -> dict[str, object]:
    """The figures of `runs` processes of each candidate, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    modules: list[str] = []
    for turn in range(runs + 1):
        for name, statement in CANDIDATES.items():
            cost, known = probe(statement)
            if turn:
                taken[name].append(cost)
            modules = known if name == "handler" else modules
    medians = {name: round(statistics.median(costs), 1) for name, costs in taken.items()}
    imported = {name.partition(".")[0] for name in modules}
    return {
        "case": "import_cost",
        "cpu_ms": medians["handler"],
        "limit_ms": LIMIT_MS,
        "worst_cpu_ms": round(max(taken["handler"]), 1),
        "floor_cpu_ms": medians["floor"],
        "engine_cpu_ms": medians["engine"],
        "modules": len(modules),
        "forbidden": sorted(imported & set(FORBIDDEN)),
        "runs": runs,
        "ok": medians["handler"] < LIMIT_MS and not imported & set(FORBIDDEN),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if the limit is missed."""
    given = sys.argv[1:] if arguments is None else arguments
    figures = measure(int(given[0]) if given else 11)
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
