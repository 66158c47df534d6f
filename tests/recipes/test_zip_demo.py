"""The drops of the demo, and its act with them: the lane of the examples, unchanged, on generated zips."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from examples import demo, tpch


def test_the_drops_are_the_same_every_time() -> None:
    assert tpch.make_archives(0.0001) == tpch.make_archives(0.0001)


def test_tables_have_the_sizes_and_keys_of_tpch() -> None:
    tables = tpch.generate(0.001)
    sizes = {name: len(table.rows) for name, table in tables.items()}
    lines = sizes.pop("lineitem")
    assert sizes == {"region": 5, "nation": 25, "supplier": 10, "customer": 150, "orders": 1500}
    assert 3.5 * 1500 < lines < 4.5 * 1500  # one to seven of each order
    for table in tables.values():
        assert len({row[: table.keys] for row in table.rows}) == len(table.rows)
    customers = {row[0] for row in tables["customer"].rows}
    assert {row[1] for row in tables["orders"].rows} <= customers
    assert {row[0] for row in tables["lineitem"].rows} == {row[0] for row in tables["orders"].rows}


def test_the_first_drop_has_one_bad_row_and_one_forbidden_table() -> None:
    archives, _ = tpch.make_archives(0.001)
    with zipfile.ZipFile(io.BytesIO(archives[tpch.FIRST])) as archive:
        names = archive.namelist()
        manifests = {name: json.loads(archive.read(name)) for name in names if name.endswith(".json")}
        rows = {
            name: list(csv.reader(io.StringIO(archive.read(name).decode())))
            for name in names
            if name.endswith(".csv")
        }
    assert {name.removesuffix(".json") for name in manifests} == {name.removesuffix(".csv") for name in rows}
    tables = {manifest["table"] for manifest in manifests.values()}
    assert tables == {*tpch.NAMES, tpch.FORBIDDEN}
    ragged = [(name, row[0]) for name, found in rows.items() for row in found if len(row) != len(found[0])]
    assert ragged == [("tpch/customer.csv", str(tpch.BAD_CUSTOMER))]


def test_the_second_drop_has_a_new_column_and_the_third_is_cut() -> None:
    archives, tables = tpch.make_archives(0.001)
    with zipfile.ZipFile(io.BytesIO(archives[tpch.SECOND])) as archive:
        header = archive.read("customer.csv").decode().splitlines()[0]
    assert header.split(",")[-1] == "c_email"
    told = [row for row in tables["customer"] if "c_email" in row]
    assert 0 < len(told) < len(tables["customer"])
    assert str(tpch.BAD_CUSTOMER) not in {row["c_custkey"] for row in tables["customer"]}
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(io.BytesIO(archives[tpch.CUT]))


def test_canonical_tables_are_told_apart_by_any_value() -> None:
    rows: list[dict[str, Any]] = [
        {"r_regionkey": 10, "r_name": "B"},
        {"r_regionkey": "9", "r_name": None, "_flowlane": 1},
    ]
    assert tpch.canonical("region", rows) == [
        {"r_regionkey": "9"},
        {"r_regionkey": "10", "r_name": "B"},
    ]


async def test_what_was_refused_is_loaded_once_the_lane_allows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await demo.drops(tmp_path)
    allowed = demo.DROPS.read_text().replace('tables=["region"', f'tables=["{tpch.FORBIDDEN}", "region"')
    fixed = tmp_path / "fixed.py"
    fixed.write_text(allowed)
    place = {
        "DROPS_SOURCE": (tmp_path / "drops").as_uri() + "/",
        "DROPS_TO": f"sqlite:///{tmp_path}/tables.db",
    }
    console = demo.Console(tmp_path, fixed, **place)
    await console.flowlane("redrive")
    _, said = await console.flowlane("run", "--json")
    assert json.loads(said)["units"]["found"] == 0  # of its own run; the earlier one is finished with it
    found = tpch.read_sqlite(tmp_path / "tables.db")
    assert found.pop(tpch.FORBIDDEN) == [{"clerk": "1", "salary": "100000"}]
    assert found == tpch.make_archives()[1]
    _, dead = await console.flowlane("dead")
    assert tpch.CUT in dead
    assert tpch.FORBIDDEN not in dead


async def test_the_act_of_the_demo_keeps_its_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = await demo.drops(tmp_path)
    said = capsys.readouterr().out
    assert all(checks.values()), (checks, said)
    for refused in (tpch.FORBIDDEN, tpch.CUT):
        assert refused in said
