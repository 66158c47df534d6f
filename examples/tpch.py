"""Drops of TPC-H tables: the zips that ``examples/drops.py`` loads, made here, the same ones every time.

Tables, columns and the shapes of their values are those of the TPC-H specification (tpc.org, clause 1.4 and
4.2), at a tiny scale: region and nation whole, 10,000 suppliers, 150,000 customers and 1,500,000 orders times
`scale`, each order with one to seven lines.

``make_drops`` lays three zips into a folder, one data file and its sidecar manifest for each table:

* everything; with one bad row, and one member whose manifest asks for a table that nobody allowed
* updates of some customers, who have a new column, of some orders, and new orders with their lines
* a zip that was cut on its way

and returns what the tables must hold once they are loaded in order. ``canonical`` is the form in which tables
are compared, wherever they lie.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import sqlite3
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

#: What ``canonical`` gives of each table, by its name.
Tables = dict[str, list[dict[str, str]]]

REGIONS = ("AFRICA", "AMERICA", "ASIA", "EUROPE", "MIDDLE EAST")
NATIONS = (  # in the order of their keys, each with its region's
    *(("ALGERIA", 0), ("ARGENTINA", 1), ("BRAZIL", 1), ("CANADA", 1), ("EGYPT", 4), ("ETHIOPIA", 0)),
    *(("FRANCE", 3), ("GERMANY", 3), ("INDIA", 2), ("INDONESIA", 2), ("IRAN", 4), ("IRAQ", 4)),
    *(("JAPAN", 2), ("JORDAN", 4), ("KENYA", 0), ("MOROCCO", 0), ("MOZAMBIQUE", 0), ("PERU", 1)),
    *(("CHINA", 2), ("ROMANIA", 3), ("SAUDI ARABIA", 4), ("VIETNAM", 2), ("RUSSIA", 3)),
    *(("UNITED KINGDOM", 3), ("UNITED STATES", 1)),
)
SEGMENTS = ("AUTOMOBILE", "BUILDING", "FURNITURE", "HOUSEHOLD", "MACHINERY")
PRIORITIES = ("1-URGENT", "2-HIGH", "3-MEDIUM", "4-NOT SPECIFIED", "5-LOW")
INSTRUCTIONS = ("COLLECT COD", "DELIVER IN PERSON", "NONE", "TAKE BACK RETURN")
MODES = ("AIR", "FOB", "MAIL", "RAIL", "REG AIR", "SHIP", "TRUCK")
WORDS = (
    *("furiously", "sly", "carefully", "blithely", "quickly", "fluffily", "final", "ironic", "even", "bold"),
    *("silent", "express", "regular", "pending", "special", "unusual", "deposits", "requests", "accounts"),
    *("packages,", "foxes", "ideas", '"theodolites"', "instructions;", "dolphins"),
)

#: The columns of each table, and how many of them, the first ones, are its key.
COLUMNS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "region": (1, ("r_regionkey", "r_name", "r_comment")),
    "nation": (1, ("n_nationkey", "n_name", "n_regionkey", "n_comment")),
    "supplier": (
        1,
        ("s_suppkey", "s_name", "s_address", "s_nationkey", "s_phone", "s_acctbal", "s_comment"),
    ),
    "customer": (
        1,
        (
            *("c_custkey", "c_name", "c_address", "c_nationkey", "c_phone", "c_acctbal", "c_mktsegment"),
            "c_comment",
        ),
    ),
    "orders": (
        1,
        (
            *("o_orderkey", "o_custkey", "o_orderstatus", "o_totalprice", "o_orderdate", "o_orderpriority"),
            *("o_clerk", "o_shippriority", "o_comment"),
        ),
    ),
    "lineitem": (
        2,
        (
            *("l_orderkey", "l_linenumber", "l_partkey", "l_suppkey", "l_quantity", "l_extendedprice"),
            *("l_discount", "l_tax", "l_returnflag", "l_linestatus", "l_shipdate", "l_commitdate"),
            *("l_receiptdate", "l_shipinstruct", "l_shipmode", "l_comment"),
        ),
    ),
}
NAMES = tuple(COLUMNS)
FORBIDDEN = "salaries"  #: the table that the first drop asks for, and that no lane here allows
BAD_CUSTOMER = 7  #: whose row in the first drop has a field too many
FIRST, SECOND, CUT = "tpch-2024-01-01.zip", "tpch-2024-01-02.zip", "tpch-2024-01-03.zip"
_BEGIN = date(1992, 1, 1)
_DAYS = 2406  # up to 1998-08-02


@dataclass(frozen=True)
class Table:
    """One table: its first ``keys`` columns are its key; ``rows`` are texts, as a CSV has them."""

    name: str
    keys: int
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @property
    def key(self) -> tuple[str, ...]:
        """The key's columns."""
        return self.columns[: self.keys]

    def csv(self) -> str:
        """The table as a CSV file with a header."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def manifest(self) -> str:
        """What lies beside the CSV file: the table it belongs into, and that table's key."""
        names = ("partition_key", "sort_key")
        told = {"table": self.name}
        for name, column in zip(names, self.key, strict=False):
            told |= {name: column, f"{name}_type": "N"}
        return json.dumps(told)

    def records(self) -> list[dict[str, str]]:
        """The rows, by column."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


# --------------------------------------------------------------------------- the tables


def generate(scale: float = 0.001, seed: int = 1) -> dict[str, Table]:
    """All tables at that scale, by name."""
    maker = _Maker(random.Random(seed))
    suppliers, customers = max(1, round(10_000 * scale)), max(8, round(150_000 * scale))
    rows: dict[str, list[tuple[str, ...]]] = {
        "region": [(str(n), name, maker.comment()) for n, name in enumerate(REGIONS)],
        "nation": [(str(n), name, str(of), maker.comment()) for n, (name, of) in enumerate(NATIONS)],
        "supplier": [maker.supplier(n) for n in range(1, suppliers + 1)],
        "customer": [maker.customer(n) for n in range(1, customers + 1)],
        "orders": [],
        "lineitem": [],
    }
    for number in range(1, 10 * customers + 1):
        order, lines = maker.order(number, customers, suppliers)
        rows["orders"].append(order)
        rows["lineitem"] += lines
    return {name: Table(name, keys, columns, rows[name]) for name, (keys, columns) in COLUMNS.items()}


class _Maker:
    """Rows of their own kinds, by chance."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def comment(self) -> str:
        chosen = self._chance.choices(WORDS, k=self._chance.randrange(3, 9))
        return " ".join(chosen)

    def money(self, least: int, most: int) -> str:
        cents = self._chance.randrange(100 * least, 100 * most)
        return f"{cents / 100:.2f}"

    def _contact(self) -> tuple[str, str, str]:
        """Address, nation and phone; the phone's country is 10 more than the nation."""
        chance = self._chance
        nation = chance.randrange(len(NATIONS))
        address = "".join(chance.choices("abcdefghijklmnop ,ABCDEF0123456789", k=chance.randrange(10, 30)))
        phone = f"{nation + 10}-{chance.randrange(100, 1000)}-{chance.randrange(100, 1000)}-"
        return address, str(nation), f"{phone}{chance.randrange(1000, 10_000)}"

    def supplier(self, n: int) -> tuple[str, ...]:
        return (str(n), f"Supplier#{n:09}", *self._contact(), self.money(-999, 9999), self.comment())

    def customer(self, n: int) -> tuple[str, ...]:
        segment = self._chance.choice(SEGMENTS)
        return (str(n), f"Customer#{n:09}", *self._contact(), self.money(-999, 9999), segment, self.comment())

    def order(
        self, number: int, customers: int, suppliers: int
    ) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """An order and its lines. Keys are sparse: of 32 in a row, the first 8 are used."""
        chance = self._chance
        key = (number - 1) // 8 * 32 + (number - 1) % 8 + 1
        day = _BEGIN + timedelta(days=chance.randrange(_DAYS))
        lines = [self._line(key, line, day, suppliers) for line in range(1, chance.randrange(1, 8) + 1)]
        states = {line[9] for line in lines}
        order = (
            str(key),
            str(chance.randrange(1, customers + 1)),
            states.pop() if len(states) == 1 else "P",
            f"{sum(float(line[5]) for line in lines):.2f}",
            day.isoformat(),
            chance.choice(PRIORITIES),
            f"Clerk#{chance.randrange(1, 1001):09}",
            "0",
            self.comment(),
        )
        return order, lines

    def _line(self, order: int, number: int, day: date, suppliers: int) -> tuple[str, ...]:
        chance = self._chance
        shipped = day + timedelta(days=chance.randrange(1, 122))
        received = shipped + timedelta(days=chance.randrange(1, 31))
        today = date(1995, 6, 17)
        return (
            str(order),
            str(number),
            str(chance.randrange(1, 200_001)),
            str(chance.randrange(1, suppliers + 1)),
            str(chance.randrange(1, 51)),
            self.money(900, 100_000),
            f"0.{chance.randrange(11):02}",
            f"0.{chance.randrange(9):02}",
            chance.choice("RA") if received <= today else "N",
            "O" if shipped > today else "F",
            shipped.isoformat(),
            (day + timedelta(days=chance.randrange(30, 91))).isoformat(),
            received.isoformat(),
            chance.choice(INSTRUCTIONS),
            chance.choice(MODES),
            self.comment(),
        )


def updates(tables: Mapping[str, Table], seed: int = 2) -> dict[str, Table]:
    """What the second drop holds: a third of the customers (not the bad one), who have an e-mail address
    now, a fifth of the orders, all finished, and new orders with their lines, a tenth of what there was."""
    chance = random.Random(seed)
    maker = _Maker(chance)
    customers, orders = tables["customer"], tables["orders"]
    told = [row for row in customers.rows if int(row[0]) % 3 == 2 and int(row[0]) != BAD_CUSTOMER]
    people = [(*row[:5], maker.money(-999, 9999), *row[6:], f"{row[0]}@example.com") for row in told]
    finished = [(*row[:2], "F", *row[3:8], "settled, finally") for row in orders.rows[::5]]
    fresh = [
        maker.order(len(orders.rows) + 1 + n, len(customers.rows), len(tables["supplier"].rows))
        for n in range(len(orders.rows) // 10)
    ]
    lines = [line for _, some in fresh for line in some]
    return {
        "customer": replace(customers, columns=(*customers.columns, "c_email"), rows=people),
        "orders": replace(orders, rows=[*finished, *(order for order, _ in fresh)]),
        "lineitem": replace(tables["lineitem"], rows=lines),
    }


# --------------------------------------------------------------------------- the drops


def members(tables: Mapping[str, Table], folder: str = "") -> dict[str, str]:
    """Data files and their manifests, by the names they have in a zip."""
    found = {}
    for name, table in tables.items():
        found[f"{folder}{name}.csv"] = table.csv()
        found[f"{folder}{name}.json"] = table.manifest()
    return found


def pack(files: Mapping[str, str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of `files`, the same bytes every time."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, text in files.items():
            about = zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0))
            about.compress_type = method
            archive.writestr(about, text)
    return held.getvalue()


def make_archives(scale: float = 0.001) -> tuple[dict[str, bytes], Tables]:
    """The three zips by name, in the order in which they come; and what the tables must hold after them."""
    tables = generate(scale)
    later = updates(tables)
    first = members(tables, "tpch/")
    first["tpch/customer.csv"] = _with_a_bad_row(tables["customer"])
    first["tpch/salaries.csv"] = "clerk,salary\n1,100000\n"
    first["tpch/salaries.json"] = json.dumps({"table": FORBIDDEN, "partition_key": "clerk"})
    whole = pack(members(generate(scale, seed=3)))
    archives = {FIRST: pack(first), SECOND: pack(members(later)), CUT: whole[: len(whole) * 2 // 3]}
    return archives, expected(tables, later)


def _with_a_bad_row(customers: Table) -> str:
    lines = customers.csv().splitlines(keepends=True)
    at = next(n for n, row in enumerate(customers.rows, 1) if row[0] == str(BAD_CUSTOMER))
    lines[at] = f"{lines[at].rstrip()},one field too many\n"
    return "".join(lines)


def make_drops(folder: Path, scale: float = 0.001) -> Tables:
    """The three zips in `folder`, a day between each; what the tables must hold once all is loaded."""
    archives, tables = make_archives(scale)
    for day, (name, data) in enumerate(archives.items(), 1):
        path = folder / name
        path.write_bytes(data)
        moment = datetime(2024, 1, day, 6, tzinfo=UTC).timestamp()
        os.utime(path, (moment, moment))
    return tables


# --------------------------------------------------------------------------- what must come of them


def expected(*drops: Mapping[str, Table]) -> Tables:
    """The tables after `drops`, loaded one after the other, without the bad row; told without flowlane."""
    found: dict[str, dict[tuple[str, ...], dict[str, str]]] = {}
    for number, tables in enumerate(drops):
        for name, table in tables.items():
            rows = found.setdefault(name, {})
            for record in table.records():
                if (name, number) == ("customer", 0) and record["c_custkey"] == str(BAD_CUSTOMER):
                    continue
                key = tuple(record[column] for column in table.key)
                rows[key] = {**rows.get(key, {}), **record}
    return {name: canonical(name, rows.values()) for name, rows in found.items()}


def canonical(name: str, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of table `name` as texts, without the columns that hold nothing, in the order of its key: the
    same wherever they lie. Columns of flowlane's own are left out."""
    texts = [
        {column: str(value) for column, value in row.items() if value is not None and column[0] != "_"}
        for row in rows
    ]
    if name not in COLUMNS:
        return sorted(texts, key=str)
    keys, columns = COLUMNS[name]
    return sorted(texts, key=lambda row: [int(row[column]) for column in columns[:keys]])


def read_sqlite(path: Path) -> Tables:
    """The tables of a SQLite file, canonical; flowlane's own are left out."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: canonical(name, [dict(row) for row in connection.execute(f'SELECT * FROM "{name}"')])
            for name in names
            if not name.startswith(("_flowlane", "sqlite_"))
        }


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    make_drops(where)
