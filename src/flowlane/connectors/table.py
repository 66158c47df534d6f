"""How records get into a SQLite table: columns followed, values converted, rows refused one by one.

All of it runs inside the writer's transaction. What is decided here depends on the records and the table
alone, not on how the records were cut into batches.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import date, datetime, time
from decimal import Decimal
from itertools import groupby
from math import isnan
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

import msgspec

from flowlane.connectors.database import GENERATION, UNFIT, escaped, folded, plain, quoted
from flowlane.errors import Permanent
from flowlane.ports import Bad, Record, TableSpec

_AS_THEY_ARE: Final = frozenset({str, int, float, bytes, bool, type(None)})
_AS_TEXT: Final = (datetime, date, time, Decimal, UUID)
#: By the types of ``TableSpec``. Numbers have no affinity: see ``_affinity``.
_DECLARED: Final = {"S": "TEXT", "N": "", "B": "BLOB"}
#: What is never equal to a value of that type, by SQLite's storage classes. A number may be held as a text.
_FOREIGN: Final = {"S": ("integer", "real", "blob"), "N": ("blob",), "B": ("integer", "real", "text")}

Numbered = tuple[int, Record]


class Table:
    """The table that `spec` names, for units of `generation`."""

    def __init__(self, spec: TableSpec, generation: int) -> None:
        self._spec = spec
        self._generation = generation
        self._name = quoted(spec.name, "table")
        self._upsert = spec.mode == "upsert"
        self._types = {folded(name): type_ for name, type_ in spec.types}
        self.changes: list[str] = []  #: what the last ``write`` changed beyond rows, see ``ports.Writer``
        self._columns: dict[str, str] = {}  # names as the table has them, by their lower case
        self._agrees = not self._types  # the keys that are there are of the types that come
        self._primary: set[str] = set()  # in lower case: the columns of its primary key, mostly the spec's

    def write(self, connection: sqlite3.Connection, records: Sequence[Record], first: int) -> list[Bad]:
        """Insert or upsert `records`, of which the first is row `first`; those that were refused.

        Fields that a record does not have are left as they are in the table, unless a unit of an earlier
        generation wrote the row: then they become what they are in a new one.

        Raises:
            Permanent: a column may not be added, or the table has no such key, or one of another type.
        """
        self.changes = []
        refused: list[tuple[int, str]] = []
        numbered: list[Numbered] = list(enumerate(records))
        if numbered:
            numbered = self._fit(connection, numbered, refused)
        for shape, run in groupby(numbered, key=lambda item: tuple(item[1])):
            self._insert(connection, shape, list(run), refused)
        refused.sort(key=itemgetter(0))
        return [Bad(first + number, reason, repr(records[number])[:1000]) for number, reason in refused]

    # ------------------------------------------------------------------ columns

    def _fit(
        self, connection: sqlite3.Connection, numbered: list[Numbered], refused: list[tuple[int, str]]
    ) -> list[Numbered]:
        """Make the table and the records fit each other; the records that do."""
        self._columns = self._existing(connection)
        numbered, shapes = self._named(numbered, refused)
        if not numbered:
            return numbered
        names = list(dict.fromkeys(name for shape in shapes for name in shape))
        kept = numbered
        if not self._columns:
            self._refuse_names([name for name in names if not plain(name)])
            self._create(connection, names, numbered)
        else:
            mine = {GENERATION}  # is there, but not for records: one could outlive every later generation
            new = [name for name in names if folded(name) not in self._columns.keys() - mine]
            kept = self._meet(connection, numbered, new, refused) if new else numbered
        if self._upsert and GENERATION not in self._columns:
            self._add_generation(connection)
        if not self._agrees:
            self._check_types(connection)
        twice = {shape for shape in shapes if len({folded(name) for name in shape}) < len(shape)}
        if twice:
            refused += [
                (number, "two of its fields name one column") for number, r in kept if tuple(r) in twice
            ]
            kept = [item for item in kept if tuple(item[1]) not in twice]
        return kept

    def _named(
        self, numbered: list[Numbered], refused: list[tuple[int, str]]
    ) -> tuple[list[Numbered], dict[tuple[str, ...], None]]:
        """The records whose fields have names (a ``map`` may return anything), and the shapes among them."""
        shapes = dict.fromkeys(tuple(record) for _, record in numbered)
        odd = {shape for shape in shapes if not all(isinstance(name, str) for name in shape)}
        if not odd:
            return numbered, shapes
        refused += [(number, "a field's name is no text") for number, r in numbered if tuple(r) in odd]
        return (
            [item for item in numbered if tuple(item[1]) not in odd],
            {shape: None for shape in shapes if shape not in odd},
        )

    def _existing(self, connection: sqlite3.Connection) -> dict[str, str]:
        found = connection.execute(f"PRAGMA table_info({self._name})").fetchall()
        self._primary = {folded(name) for _, name, *_, primary in found if primary}
        return {folded(name): name for _, name, *_ in found}

    def _create(
        self, connection: sqlite3.Connection, names: Sequence[str], numbered: Sequence[Numbered]
    ) -> None:
        wanted = {folded(name): name for name in reversed([*self._spec.key, *names])}
        ordered = [wanted[low] for low in dict.fromkeys(folded(n) for n in (*self._spec.key, *names))]
        if not ordered:
            raise Permanent(f"table {self._spec.name} does not exist, and records without fields make none")
        declared = [f"{quoted(name, 'column')} {self._type(name, numbered)}".strip() for name in ordered]
        if self._upsert:
            declared.append(f'"{GENERATION}" INTEGER NOT NULL DEFAULT 0')
            declared.append(f"PRIMARY KEY ({self._keys()})")
        connection.execute(f"CREATE TABLE {self._name} ({', '.join(declared)})")
        self._columns = self._existing(connection)
        self.changes.append(f"table {self._spec.name} was made: {', '.join(ordered)[:150]}")

    def _meet(
        self,
        connection: sqlite3.Connection,
        numbered: list[Numbered],
        new: list[str],
        refused: list[tuple[int, str]],
    ) -> list[Numbered]:
        """Columns that the table does not have: added, refused, or put aside row by row."""
        if self._spec.schema == "quarantine":
            unknown = set(new)
            refused += [
                (number, f"the table has no column {min(unknown.intersection(record))[:80]!a}")
                for number, record in numbered
                if not unknown.isdisjoint(record)
            ]
            return [item for item in numbered if unknown.isdisjoint(item[1])]
        if self._spec.schema == "freeze":
            raise Permanent(
                f"table {self._spec.name} has no column {new[0][:80]!a}, and schema=freeze adds none"
            )
        self._refuse_names([name for name in new if not plain(name)])
        spelled = {folded(name): name for name in reversed(new)}  # as it is where it comes first
        for name in map(spelled.__getitem__, dict.fromkeys(map(folded, new))):
            kind = self._type(name, numbered)
            connection.execute(f"ALTER TABLE {self._name} ADD COLUMN {quoted(name, 'column')} {kind}")
            self.changes.append(f"table {self._spec.name}: column {name} was added")
        self._columns = self._existing(connection)
        return numbered

    def _check_types(self, connection: sqlite3.Connection) -> None:
        """Refuse keys that are equal to none in the table, though they are written alike: each row would be
        there twice."""
        self._agrees = True
        held = [self._columns.get(folded(name), "") for name in self._spec.key]
        if not self._upsert or not all(held):
            return
        # The row with the least key, by its index: numbers are less than texts, and these than bytes.
        kinds = ", ".join(f"typeof({escaped(name)})" for name in held)
        found = connection.execute(
            f"SELECT {kinds} FROM {self._name} ORDER BY {escaped(held[0])} LIMIT 1"  # noqa: S608 - escaped
        ).fetchone()
        for name, kind in zip(self._spec.key, found or (), strict=bool(found)):
            type_ = self._types.get(folded(name), "")
            if kind in _FOREIGN.get(type_, ()):
                raise Permanent(
                    f"table {self._spec.name} has values of type {kind} in its key {name}, beside which "
                    f"those of type {type_} would make other rows: declare the type that it had"
                )

    def _type(self, name: str, numbered: Sequence[Numbered]) -> str:
        """What a new column is declared as: by its type where that is known, or by what is to be in it."""
        type_ = self._types.get(folded(name), "")
        return _DECLARED[type_] if type_ else _affinity(name, numbered)

    def _refuse_names(self, names: Sequence[str]) -> None:
        for name in names:
            quoted(name, "column")

    def _add_generation(self, connection: sqlite3.Connection) -> None:
        if self._spec.schema != "evolve":
            raise Permanent(
                f"table {self._spec.name} has no column {GENERATION}, which upserts need: add it as "
                "INTEGER NOT NULL DEFAULT 0, or use schema=evolve"
            )
        connection.execute(f'ALTER TABLE {self._name} ADD COLUMN "{GENERATION}" INTEGER NOT NULL DEFAULT 0')
        self.changes.append(f"table {self._spec.name}: column {GENERATION} was added")
        self._columns = self._existing(connection)

    # ------------------------------------------------------------------ rows

    def _insert(
        self,
        connection: sqlite3.Connection,
        shape: tuple[str, ...],
        run: list[Numbered],
        refused: list[tuple[int, str]],
    ) -> None:
        """Consecutive records with the same fields."""
        numbers, rows = self._rows(shape, run, refused)
        statement = self._statement([self._columns[folded(name)] for name in shape])
        connection.execute("SAVEPOINT run")
        try:
            connection.executemany(statement, rows)
        except sqlite3.OperationalError as error:
            if "ON CONFLICT" not in str(error):
                raise
            raise Permanent(
                f"table {self._spec.name} has no primary key or unique index over "
                f"({', '.join(self._spec.key)}), by which rows are to be replaced: make one, name the key "
                "that it has, or load with mode=append"
            ) from None
        except UNFIT:
            connection.execute("ROLLBACK TO run")
            for number, values in zip(numbers, rows, strict=True):
                try:
                    connection.execute(statement, values)
                except UNFIT as error:
                    refused.append((number, f"the table refuses it: {error}"))
        connection.execute("RELEASE run")

    def _rows(
        self, shape: tuple[str, ...], run: list[Numbered], refused: list[tuple[int, str]]
    ) -> tuple[list[int], list[tuple[Any, ...]]]:
        """The values of those that can be written, and their numbers."""
        numbers: list[int] = []
        rows: list[tuple[Any, ...]] = []
        behind = (self._generation,) if self._upsert else ()
        low = [folded(name) for name in shape]
        missing = [name for name in self._spec.key if self._upsert and folded(name) not in low]
        keys = [low.index(folded(name)) for name in self._spec.key] if self._upsert and not missing else []
        for number, record in run:
            values = tuple(record.values())
            if not _AS_THEY_ARE.issuperset(map(type, values)):
                try:
                    values = tuple(map(_stored, values))
                except UNFIT as error:
                    refused.append((number, f"cannot be stored: {error}"))
                    continue
            if missing or any(map(_nothing, map(values.__getitem__, keys))):
                refused.append((number, f"no value for its key ({', '.join(self._spec.key)})"))
            else:
                numbers.append(number)
                rows.append(values + behind)
        return numbers, rows

    def _statement(self, columns: list[str]) -> str:
        names = [escaped(name) for name in columns]
        if self._upsert:
            names.append(f'"{GENERATION}"')
        if not names:
            return f"INSERT INTO {self._name} DEFAULT VALUES"
        marks = ", ".join("?" * len(names))
        insert = f"INSERT INTO {self._name} ({', '.join(names)}) VALUES ({marks})"  # noqa: S608 - checked
        if not self._upsert:
            return insert
        keys = {
            escaped(self._columns[folded(name)]) for name in self._spec.key if folded(name) in self._columns
        }
        changes = ", ".join(
            [f"{name} = excluded.{name}" for name in names if name not in keys] + self._defaults(names)
        )
        # SQLite keeps to the order of the rows: of those that share a key, the last one stays.
        return (
            f"{insert} ON CONFLICT ({self._keys()}) DO UPDATE SET {changes} "
            f'WHERE excluded."{GENERATION}" >= {self._name}."{GENERATION}"'
        )

    def _defaults(self, names: Sequence[str]) -> list[str]:
        """A row of a later generation replaces the one that is there whole: what it lacks becomes what that
        is in a new row. Else what is left of an older row would depend on which of the two came first. A
        primary key other than the spec's stays: SQLite gives out its numbers, and would give another one."""
        later = f'excluded."{GENERATION}" > {self._name}."{GENERATION}"'
        kept = {GENERATION, *self._primary}
        known = {escaped(name) for low, name in self._columns.items() if low not in kept} - set(names)
        return [
            f"{name} = CASE WHEN {later} THEN excluded.{name} ELSE {self._name}.{name} END"
            for name in sorted(known)
        ]

    def _keys(self) -> str:
        return ", ".join(quoted(name, "key column") for name in self._spec.key)


def _nothing(value: Any) -> bool:
    """Whether SQLite stores NULL for `value`, which is the key of no row: as it does for NaN."""
    return value is None or (isinstance(value, float) and isnan(value))


def _affinity(name: str, numbered: Sequence[Numbered]) -> str:
    """``TEXT`` for a column of texts, nothing for any other: SQLite's numeric affinities would turn ``'007'``
    into 7 (sqlite.org/datatype3.html, section 3), and without one every value stays as it is."""
    kinds = {type(record[name]) for _, record in numbered if name in record}
    return "TEXT" if kinds - {type(None)} == {str} else ""


def _stored(value: Any) -> Any:
    """What SQLite holds of `value`: lists and records as JSON, moments and decimals as text."""
    if type(value) in _AS_THEY_ARE or isinstance(value, str | int | float | bytes):
        return value
    if isinstance(value, _AS_TEXT):
        return value.isoformat() if isinstance(value, date | time) else str(value)
    if isinstance(value, dict | list | tuple):
        return msgspec.json.encode(value).decode()
    raise ValueError(f"a value of type {type(value).__name__}")
