"""The README keeps its word: its lanes run, its commands exist, its links lead somewhere."""

import asyncio
import gzip
import json
import re
import shlex
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from examples import tpch
from flowlane.cli.verbs import cli as main
from flowlane.testing.lying_server import LyingServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^\$ (flowlane|make) ([^#\n]+)", README, re.MULTILINE)


def lane_file(folder: Path, snippet: str, **changes: str) -> Path:
    """The snippet as a lane file, its places moved to `folder`."""
    snippet = snippet.replace("/data/", f"{folder}/data/")
    for old, new in changes.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    path = folder / "lane.py"
    path.write_text(snippet)
    return path


def run(path: Path, folder: Path, *arguments: str) -> dict[str, object]:
    """``flowlane run --json`` on the lane file; its report."""
    backend = f"sqlite:///{folder}/flowlane.db"
    result = CliRunner().invoke(main, ["run", str(path), "--backend", backend, "--json", *arguments])
    assert result.exit_code == 0, result.output
    report: dict[str, object] = json.loads(result.stdout)
    return report


async def test_the_first_lane_lands_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWLANE_ALLOW_PRIVATE_HOSTS", "1")
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=2)
    data = gzip.compress(b'{"id": "1"}\n')
    async with LyingServer() as server:
        server.serve(f"/{now:%Y-%m-%d}-{now.hour}.json.gz", data)
        path = lane_file(tmp_path, SNIPPETS[0])
        text = path.read_text().replace("https://data.gharchive.org/", server.url("/"))
        path.write_text(text.replace("2024-01-01T00", f"{now:%Y-%m-%dT%H}"))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flowlane", "run", str(path), "--json"),
            *("--backend", f"sqlite:///{tmp_path}/flowlane.db"),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
    assert json.loads(output)["units"]["found"] == 1
    assert (tmp_path / f"data/lake/raw/{now:%Y-%m-%d}-{now.hour}.json.gz").read_bytes() == data


def test_the_lane_of_zips_loads_tables(tmp_path: Path) -> None:
    drops = tmp_path / "data" / "drops"
    drops.mkdir(parents=True)
    tables = tpch.generate(0.0001)
    wanted = {name: tables[name] for name in ("customer", "orders", "lineitem")}
    (drops / "a.zip").write_bytes(tpch.pack(tpch.members(wanted)))
    report = run(lane_file(tmp_path, SNIPPETS[1]), tmp_path)
    assert report["dead"] == []
    assert tpch.read_sqlite(tmp_path / "data" / "tables.db") == {
        name: tpch.canonical(name, table.records()) for name, table in wanted.items()
    }


def test_the_lane_of_ones_own_loads_rows(tmp_path: Path) -> None:
    drops = tmp_path / "data" / "drops"
    drops.mkdir(parents=True)
    rows = "".join(f"{'' if n == 150 else n},{n}.5\n" for n in range(300))
    (drops / "a.csv.gz").write_bytes(gzip.compress(f"id,amount\n{rows}".encode()))
    report = run(lane_file(tmp_path, SNIPPETS[2]), tmp_path)
    assert report["records"] == {"in": 300, "expanded": 0, "out": 299, "skipped": 0, "quarantined": 1}
    (bad,) = (tmp_path / "quarantine").rglob("*.jsonl")
    assert json.loads(bad.read_text())["reason"] == "an order without an id"


@pytest.mark.parametrize(("tool", "line"), COMMANDS)
def test_every_command_exists(tool: str, line: str) -> None:
    verb = shlex.split(line)[0]
    if tool == "make":
        assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert CliRunner().invoke(main, [verb, "--help"]).exit_code == 0


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
