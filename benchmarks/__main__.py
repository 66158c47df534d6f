"""``python -m benchmarks [case...] [--rounds N] [--quick] [--json FILE]``: exit 0 if every bar was met."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import (
    channel,
    cold,
    decode,
    dynamodb,
    engine,
    fan_in,
    imports,
    lag,
    landing,
    rows,
    sqs,
    stores,
    zip_member,
    zip_resume,
)
from benchmarks.harness import Result, WrongOutput, run

CASES = (
    engine.CASE,
    landing.CASE,
    lag.CASE,
    imports.CASE,
    decode.CASE,
    sqs.CASE,
    stores.CASE,
    dynamodb.CASE,
    dynamodb.CLIENT,
    fan_in.CASE,
    rows.CASE,
    cold.CASE,
    *zip_member.CASES,
    zip_resume.CASE,
    *channel.CASES,
)
QUICK = {
    "engine": 20_000,
    "landing": 512 << 20,
    "lag": 256 << 20,
    "decode": 64 << 20,
    "sqs": 4_000,
    "stores": 256 << 20,
    "dynamodb": 1_000,
    "dynamodb-client": 10_000,
    "fan-in": 400,
    "rows": 50_000,
    "zip-member": 64 << 20,
    "zip-resume": 1 << 30,
    "channel-put": 20_000,
    "channel-read": 20_000,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases, print their tables, and then which bars are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = {case.name: case for case in CASES}
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--rounds", type=int, help="how often each candidate runs (default: the case's own)")
    parser.add_argument("--size", type=int, help="of every case: deliveries, or bytes of archive")
    parser.add_argument("--quick", action="store_true", help="small sizes: a look, not a measurement")
    parser.add_argument("--scratch", type=Path, help="where files are written (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write every figure of every round to this file")
    options = parser.parse_args(arguments)
    for name in options.cases:
        if name not in known:
            parser.error(f"no case {name!r}: there are {', '.join(known)}")
    results = []
    print(machine())
    for case in [known[name] for name in options.cases] or CASES:
        size = options.size or (QUICK.get(case.name) if options.quick else None)
        print(f"{case.name}: {case.title}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="flowlane-bench-", dir=options.scratch) as scratch:
            try:
                result = run(case, size=size, rounds=options.rounds, scratch=Path(scratch))
            except WrongOutput as error:
                print(f"{case.name}: {error}", file=sys.stderr)
                return 2
        results.append(result)
        print(f"\n## {case.name}: {case.title}\n\n{table(result)}")
    if options.json:
        options.json.write_text(json.dumps([plain(result) for result in results], indent=1))
    missed = bars(results)
    return 1 if missed else 0


def machine() -> str:
    """Where and when this was measured."""
    load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, load {load}"
    )


def table(result: Result) -> str:
    """The medians as a Markdown table, with the ratio of the first column to the case's peer."""
    case, medians = result.case, result.medians()
    first = next(iter(case.columns))
    heads = ["", *case.columns.values(), *([f"x {case.peer}"] if case.peer else [])]
    rows = []
    for name, figures in medians.items():
        row = [name, *(number(figures[f]) if f in figures else "-" for f in case.columns)]
        if case.peer:
            row.append(f"{figures[first] / medians[case.peer][first]:.2f}")
        rows.append(row)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """`value` with as many digits as mean something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def bars(results: list[Result]) -> int:
    """Print every bar and whether it is met; how many are not."""
    missed = 0
    print("\n## Bars\n\n| case | bar | measured | |\n| --- | --- | --- | --- |")
    for result in results:
        for bar, value, met in result.verdicts():
            missed += not met
            print(f"| {result.case.name} | {bar} | {value:.3g} | {'met' if met else 'MISSED'} |")
    return missed


def plain(result: Result) -> dict[str, Any]:
    """`result` for the JSON file."""
    verdicts = [{"bar": str(bar), "value": value, "met": met} for bar, value, met in result.verdicts()]
    return {
        "case": result.case.name,
        "machine": machine(),
        "rounds": result.rounds,
        "medians": result.medians(),
        "bars": verdicts,
    }


if __name__ == "__main__":
    sys.exit(main())
