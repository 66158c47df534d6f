"""``docs/channels.md`` keeps its word: what it puts is applied once in effect, however often it comes; and
the ledger of the examples is kept by its lane."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flowlane.cli.verbs import cli
from flowlane.compose import open_application
from flowlane.ports import ChannelRecord
from flowlane.settings import Settings

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "channels.md").read_text()
SCRIPTS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))
BACKEND = "sqlite:///flowlane.db"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The names that the script of that name on the page defines, in a directory and backend of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWLANE_BACKEND", BACKEND)

    def load(name: str) -> Any:
        names: dict[str, Any] = {"__name__": name}
        code = SCRIPTS[name].replace("wait=5", "wait=0")
        exec(compile(code, f"docs/channels.md: {name}.py", "exec"), names)
        return names["main"]()

    return load


def rows(database: str, query: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


async def test_the_scripts_apply_each_change_once(
    script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    customers = "SELECT * FROM customer ORDER BY id"
    await script("put")
    await script("apply")
    wanted = [("north", 1, 2, "Northern Ltd"), ("south", 1, 2, None)]
    assert rows("customers.db", customers) == wanted
    await script("put")  # once more, as after a lost reply
    async with open_application([], Settings(backend=BACKEND)) as app:
        junk = [b"\xff", b"[]", b'{"seq": 1}']
        old = json.dumps({"generation": 1, "seq": 1, "name": "North Ltd"}).encode()  # and late
        await app.backend.channel("changes").put([ChannelRecord("north", data) for data in [*junk, old]])
    for _ in range(2):
        await script("apply")
        assert rows("customers.db", customers) == wanted
        assert len(rows("customers.db", "SELECT * FROM refused")) == 3
        capsys.readouterr()
        await script("again")  # all of it is applied a second time, to no effect
        lags = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert sorted(lag[1:] for lag in lags) == [
            ["nobody", "4", "0", "None", "False"],
            ["nobody", "8", "0", "None", "False"],
        ]


def test_every_link_of_the_page_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", PAGE)
    assert targets
    for target, anchor in targets:
        text = (ROOT / "docs" / target).read_text()
        headings = [re.sub(r"[^\w -]", "", line).strip() for line in text.splitlines() if line[:1] == "#"]
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_the_ledger_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    amounts = {"north": [100, -30, 5], "south": [50, -80, 6]}
    lines = [
        json.dumps({"account": account, "number": n + 1, "amount": amounts[account][n]})
        for n in range(3)
        for account in amounts
    ]
    Path("changes").mkdir()
    Path("changes/a.jsonl").write_text("\n".join(lines))
    lane = str(ROOT / "examples" / "ledger.py")

    def run(verb: str, *, code: int) -> Any:
        result = CliRunner().invoke(cli, [verb, lane, "--json", "--backend", BACKEND])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    (dead,) = run("run", code=1)["dead"]
    assert dead["reason"] == "south has 50, and is to pay 80: ask its owner"
    book = [("north", 3, 75), ("south", 3, 56)]
    assert rows("ledger.db", "SELECT * FROM accounts ORDER BY account") == book
    assert run("redrive", code=0)["count"] == 1
    (drained,) = run("run", code=0)["drained"]
    assert (drained["units"]["dead"], drained["units"]["superseded"]) == (0, 1)
    assert rows("ledger.db", "SELECT * FROM accounts ORDER BY account") == book
