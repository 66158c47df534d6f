"""``docs/lanes.md`` keeps its word: it names all that a stage may do; its second lane does what it says."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from flowlane.cli.verbs import cli
from flowlane.ports import Context

PAGE = (Path(__file__).parent.parent / "docs" / "lanes.md").read_text()
SHOPS = PAGE.split("```python\n")[2].split("```")[0]


def test_everything_that_a_stage_may_do_has_a_row() -> None:
    table = PAGE.split("## What a stage may do\n\n")[1].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"ctx\.(\w+)", row.split(" | ")[0])}
    assert named == {name for name in vars(Context) if not name.startswith("_")}


@pytest.mark.parametrize("via", ["queue", "channel"])
def test_the_lane_with_an_order_key(via: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, by_channel = (part.split("```")[0] for part in PAGE.split("```python\n")[3:5])
    if via == "channel":
        code = code[: code.index("@lane.stage(on=OrderChanged")] + by_channel
    Path("lane.py").write_text(code)
    result = CliRunner().invoke(cli, ["run", "lane.py"])
    assert result.exit_code == 0, result.output
    applied = re.findall(r"apply (\w+) (\d)", result.output)
    assert [n for customer, n in applied if customer == "north"] == ["0", "2"]
    assert [n for customer, n in applied if customer == "south"] == ["1", "3"]


def test_the_lane_with_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRICES_TOKEN", "secret")
    for shop in ("north", "south"):
        folder = tmp_path / "drops" / shop
        folder.mkdir(parents=True)
        rows = "".join(f"{'' if n == 7 else f'{shop}-{n}'},{n}\n" for n in range(100))
        (folder / "a.csv").write_text(f"id,amount\n{rows}")
    (tmp_path / "lake").mkdir()
    code = SHOPS.replace("/drops/", f"{tmp_path}/drops/").replace("/lake/", f"{tmp_path}/lake/")
    Path("lane.py").write_text(code)

    def run(code: int) -> dict[str, object]:
        result = CliRunner().invoke(cli, ["run", "lane.py", "--json"])
        assert result.exit_code == code, result.output
        if code:
            assert "to the owner: " in result.stderr
        report: dict[str, object] = json.loads(result.stdout)
        return report

    assert run(0)["records"] == {"in": 200, "expanded": 0, "out": 198, "skipped": 0, "quarantined": 2}
    assert len(list((tmp_path / ".flowlane" / "quarantine" / "shops").rglob("*.jsonl"))) == 2
    assert run(0)["units"] == {"found": 2, "settled": 2, "dead": 0, "skipped": 0, "superseded": 0}
    (tmp_path / "drops" / "north" / "b.csv").write_text("id,amount\n1,2\n")
    monkeypatch.delenv("PRICES_TOKEN")
    assert run(1)["dead"]
