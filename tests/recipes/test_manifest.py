"""Manifests: every shape that is read, and what is refused with a reason; data, manifests and the rest."""

from __future__ import annotations

import json
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane import BadRecord, Permanent
from flowlane.recipes.manifest import (
    Declared,
    Key,
    Whole,
    by_sidecar,
    by_whole,
    checked,
    declared,
    parsed,
    sort_out,
    stem_of,
)
from flowlane.recipes.values import inferred, keyed
from flowlane.streams.zip.entry import Entry, Kind


def entries(*names: str, kind: Kind = "file") -> list[Entry]:
    """Entries of those names; a name that ends in a slash is a directory."""
    return [
        Entry(n, name, 0, 0, 0, 0, 0, kind="directory" if name.endswith("/") else kind)
        for n, name in enumerate(names)
    ]


# --------------------------------------------------------------------------- one table


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"partition_key": "id"}, Declared("orders", (Key("id"),))),
        ({"table": "o", "partition_key": "id", "partition_key_type": "N"}, Declared("o", (Key("id", "N"),))),
        (
            {"partition_key": "id", "sort_key": "day", "sort_key_type": "S"},
            Declared("orders", (Key("id"), Key("day"))),
        ),
        (
            {"partition_key": "id", "range_key": "no", "range_key_type": "B"},
            Declared("orders", (Key("id"), Key("no", "B"))),
        ),
        (
            {"partition_key": "id", "sort_key": "no", "range_key": "no"},
            Declared("orders", (Key("id"), Key("no"))),
        ),
        (
            {"partition_key": {"name": "id", "type": "N"}, "sort_key": {"name": "day"}},
            Declared("orders", (Key("id", "N"), Key("day"))),
        ),
        (
            {"partition_key": {"name": "id"}, "partition_key_type": "N"},
            Declared("orders", (Key("id", "N"),)),
        ),
        ({"partition_key": "id", "version": 3, "columns": ["id"]}, Declared("orders", (Key("id"),))),
        ({}, Declared("orders")),
        ({"table": "a" * 63}, Declared("a" * 63)),
    ],
)
def test_what_a_manifest_declares(fields: dict[str, Any], wanted: Declared) -> None:
    assert declared(fields, "orders") == wanted


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"partitionKey": "id"}, "field 'partitionKey' is not known: write partition_key"),
        ({"partition_key": "id", "sortKey": "n"}, "field 'sortKey' is not known: write sort_key"),
        ({"partition_key": "id", "Range-Key": "n"}, "write range_key"),
        ({"table_name": "x", "partition_key": "id"}, "write table"),
        ({"hash_key": "id"}, "write partition_key"),
        ({"partition_key": "id", "partition_key_type": "string"}, "type 'string' of partition_key"),
        ({"partition_key": "id", "partition_key_type": "n"}, "write S, N or B"),
        ({"partition_key": "id", "sort_key": "id"}, "are both 'id'"),
        ({"partition_key": "id", "sort_key": "ID"}, "are both 'id'"),
        ({"partition_key": "id", "sort_key": "a", "range_key": "b"}, "differ"),
        ({"sort_key": "a"}, "no partition_key"),
        ({"partition_key": "id", "sort_key_type": "N"}, "a sort_key_type and no sort_key"),
        ({"partition_key": {"type": "N"}}, "partition_key has no name"),
        ({"partition_key": {"name": "a", "type": "N"}, "partition_key_type": "S"}, "differs"),
        ({"partition_key": 7}, "'7' is no plain name"),
        ({"partition_key": ["id"]}, "is no plain name"),
        ({"table": "a" * 64}, "63 at most"),
        ({"table": "orders; DROP TABLE users"}, "is no plain name"),
        ({"table": "../../etc/passwd"}, "is no plain name"),
        ({"table": 'or"ders'}, "is no plain name"),
        ({"table": "_flowlane_fence"}, "is no plain name"),
        ({"table": "sqlite_master"}, "is no plain name"),
        ({"table": "pg_catalog"}, "is no plain name"),
        ({"table": "1orders"}, "is no plain name"),
        ({"table": ""}, "is no plain name"),
        ({"table": "täble"}, "is no plain name"),
        ({"table": "orders\n"}, "is no plain name"),
        ({"table": None}, "is no plain name"),
        ({"partition_key": "a b"}, "is no plain name"),
        ([], "is no object"),
        ("orders", "is no object"),
    ],
)
def test_what_is_refused_says_why_in_one_short_line(fields: Any, said: str) -> None:
    with pytest.raises(Permanent) as caught:
        declared(fields, "orders")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_name_of_a_megabyte_makes_no_message_of_one() -> None:
    with pytest.raises(Permanent) as caught:
        declared({"table": "x" * 1_000_000}, "orders")
    assert len(str(caught.value)) < 300


@given(st.text(max_size=70))
def test_a_name_is_allowed_if_any_database_takes_it(name: str) -> None:
    plain = (
        0 < len(name) <= 63
        and all(c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_" for c in name)
        and not name[0].isdigit()
        and not name.lower().startswith(("_flowlane", "sqlite_", "pg_"))
    )
    try:
        assert checked(name, "table") == name
        assert plain
    except Permanent:
        assert not plain


# --------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_manifest_may_have_a_byte_order_mark(encoding: str) -> None:
    data = json.dumps({"table": "o", "note": "é"}, ensure_ascii=False).encode(encoding)
    assert by_sidecar(data, "x.json", "x.csv") == Declared("o")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe{",
        b"\xef\xbb\xbf",
        b"\x00\x01",
        b"nope",
        b'{"a": 1} x',
        b"\xfe\xff\xd8\x00",
        b"[" * 5000,
    ],
)
def test_what_is_no_json_is_said(data: bytes) -> None:
    with pytest.raises(Permanent, match="is no JSON"):
        parsed(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_declaration_or_refused(data: bytes) -> None:
    for read in (lambda: by_sidecar(data, "a.json", "a.csv"), lambda: Whole(data)):
        with suppress(Permanent):
            assert read() is not None


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["files", "tables", "table", "file", "partition_key", "sort_key", "a.csv", "name", "type"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(_json)
def test_any_json_is_a_manifest_or_refused(content: Any) -> None:
    data = json.dumps(content).encode()
    with suppress(Permanent):
        found = by_whole(Whole(data), "manifest.json", "a.csv")
        assert found is None or checked(found.table, "table")


# --------------------------------------------------------------------------- whole manifests

SPEC = {"table": "o", "partition_key": "id"}
FOUND = Declared("o", (Key("id"),))


@pytest.mark.parametrize(
    "content",
    [
        {"orders.csv": SPEC},
        {"./orders.csv": SPEC},
        {"version": 1, "made": "today", "orders.csv": SPEC},
        {"files": {"orders.csv": SPEC}},
        {"files": [{"file": "orders.csv", **SPEC}]},
        {"tables": [{"file": "orders.csv", **SPEC}]},
        {"tables": [{"files": ["a.csv", "orders.csv"], **SPEC}]},
        {"tables": {"o": {"file": "orders.csv", "partition_key": "id"}}},
        SPEC,
    ],
)
def test_the_shapes_of_a_manifest_for_several_files(content: Any) -> None:
    whole = Whole(json.dumps(content).encode())
    assert by_whole(whole, "manifest.json", "orders.csv") == FOUND
    if content is not SPEC:
        assert by_whole(whole, "manifest.json", "old/orders.csv") is None
    assert by_whole(whole, "in/manifest.json", "in/orders.csv") == FOUND


def test_a_table_without_files_is_of_those_that_are_called_so() -> None:
    for content in (
        {"tables": {"orders": {"partition_key": "id"}}},
        {"tables": [{"table": "orders", "partition_key": "id"}]},
    ):
        whole = Whole(json.dumps(content).encode())
        wanted = Declared("orders", (Key("id"),))
        assert by_whole(whole, "manifest.json", "orders.csv.gz") == wanted
        assert by_whole(whole, "manifest.json", "deep/down/orders.jsonl") == wanted
        assert by_whole(whole, "manifest.json", "other.csv") is None


def test_a_file_named_in_a_list_has_its_stem_for_a_table_by_default() -> None:
    whole = Whole(b'{"orders.csv": {"partition_key": "id"}}')
    assert by_whole(whole, "manifest.json", "orders.csv") == Declared("orders", (Key("id"),))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "no object"),
        ({}, "names no file"),
        ({"partitionKey": "id"}, "names no file"),
        ({"files": {}}, "names no file"),
        ({"files": [{"partition_key": "id"}]}, 'lists something without "file"'),
        ({"files": [7]}, "lists '7': write an object"),
        ({"tables": ["orders"]}, "lists 'orders': write an object"),
        ({"tables": [{"partition_key": "id"}]}, 'lists something without "table"'),
        ({"tables": [{"file": 7, "table": "x"}]}, "names '7' as a file"),
        ({"tables": [{"table": "a b"}]}, "no plain name"),
        ({"files": [{"file": "a.csv"}, {"file": "./a.csv"}]}, "twice"),
    ],
)
def test_a_whole_manifest_that_says_nothing_is_refused(content: Any, said: str) -> None:
    with pytest.raises(Permanent, match=said):
        Whole(json.dumps(content).encode())


def test_what_is_wrong_with_one_file_is_no_matter_to_the_others() -> None:
    whole = Whole(json.dumps({"a.csv": {"partitionKey": "id"}, "b.csv": SPEC}).encode())
    with pytest.raises(Permanent, match=r"its manifest 'manifest.json': field 'partitionKey'"):
        by_whole(whole, "manifest.json", "a.csv")
    assert by_whole(whole, "manifest.json", "b.csv") == FOUND


# --------------------------------------------------------------------------- what is in an archive


def data_of(
    names: list[str], paths: list[str] | None = None, stems: list[str] | None = None
) -> dict[str, str]:
    """Each file of data, with its manifests in the order in which they count."""
    found = sort_out(entries(*names), paths or (), stems or ())
    return {
        file.entry.name: " ".join(e.name for e in (*file.sidecars, *file.wholes))
        + (f" as {file.format}" if file.format else "")
        for file in found.files
    }


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["orders.csv", "orders.json"], {"orders.csv": "orders.json"}),
        (["orders.json", "orders.csv.gz"], {"orders.csv.gz": "orders.json"}),
        (["a/orders.csv", "orders.json"], {"a/orders.csv": ""}),
        (
            ["a/orders.csv", "a/orders.json", "b/orders.csv"],
            {"a/orders.csv": "a/orders.json", "b/orders.csv": ""},
        ),
        (["orders.jsonl", "orders.json"], {"orders.jsonl": "orders.json"}),
        (["orders.csv", "orders.csv", "orders.json"], {"orders.csv": "orders.json"}),
        (["orders.csv", "orders.json", "orders.json"], {"orders.csv": "orders.json orders.json"}),
        (["orders.json"], {}),
        (["meta.json", "orders.csv"], {"orders.csv": ""}),
        (["orders.dat", "orders.json"], {"orders.dat": "orders.json as csv"}),
        (["orders.dat", "orders.csv", "orders.json"], {"orders.csv": "orders.json"}),
        (["orders", "orders.json"], {"orders": "orders.json as csv"}),
        (["README", "x.xlsx", "a/"], {}),
        (["manifest.json", "a/b/x.csv"], {"a/b/x.csv": "manifest.json"}),
        (
            ["manifest.json", "a/manifest.json", "a/b/x.csv", "c.csv"],
            {"a/b/x.csv": "a/manifest.json manifest.json", "c.csv": "manifest.json"},
        ),
        (["manifest.json", "manifest.csv"], {"manifest.csv": "manifest.json"}),
        (["__MACOSX/._orders.csv", "__MACOSX/orders.csv", ".hidden.csv", "Thumbs.db"], {}),
        (["ORDERS.CSV", "ORDERS.json"], {"ORDERS.CSV": "ORDERS.json"}),
        (["ORDERS.CSV", "ORDERS.JSON"], {"ORDERS.CSV": "ORDERS.JSON"}),
        (["orders.csv", "ORDERS.JSON"], {"orders.csv": ""}),
        (["orders.csv", "orders.json", "orders.JSON"], {"orders.csv": "orders.json orders.JSON"}),
        (["A/MANIFEST.JSON", "A/B/X.CSV"], {"A/B/X.CSV": "A/MANIFEST.JSON"}),
        (["META.JSON", "orders.csv"], {"orders.csv": ""}),
    ],
)
def test_data_and_its_manifests_are_told_by_their_names(names: list[str], wanted: dict[str, str]) -> None:
    assert data_of(names) == wanted


def test_a_file_that_a_folder_s_manifest_names_is_data_whatever_it_is_called() -> None:
    names = ["manifest.json", "orders.json", "x.dat", "y.dat"]
    assert data_of(names) == {}
    assert data_of(names, ["orders.json", "x.dat"]) == {
        "orders.json": "manifest.json",
        "x.dat": "manifest.json as csv",
    }
    assert data_of(names, [], ["orders", "y"]) == {
        "orders.json": "manifest.json",
        "y.dat": "manifest.json as csv",
    }
    assert data_of(["manifest.json", "orders.json", "orders.csv"], [], ["orders"]) == {
        "orders.csv": "orders.json manifest.json"
    }


def test_names_of_thousands_of_folders_take_no_time() -> None:
    deep = [f"{'a/' * 32_000}{n}.csv" for n in range(200)]
    found = sort_out(entries("manifest.json", *deep, "a/x.csv"))
    assert [len(file.wholes) for file in found.files] == [0] * 200 + [1]


def test_everything_is_data_a_manifest_or_counted() -> None:
    names = ["a/", "a/x.csv", "a/x.json", "__MACOSX/a", ".DS_Store", "README", "manifest.json", "lone.json"]
    found = sort_out(entries(*names))
    assert [file.entry.name for file in found.files] == ["a/x.csv"]
    assert [e.name for e in found.wholes] == ["manifest.json"]
    assert [e.name for e in found.others] == ["README", "lone.json"]
    assert (found.directories, found.litter) == (1, 2)


_names = st.lists(
    st.builds(
        "".join,
        st.tuples(
            st.sampled_from(["", "a/", "a/b/", "__MACOSX/"]),
            st.sampled_from(["x", "y", "manifest", ".z"]),
            st.sampled_from(["", ".csv", ".json", ".jsonl", ".csv.gz", ".dat", "/"]),
        ),
    ),
    max_size=12,
)


@given(
    _names, st.lists(st.sampled_from(["x.json", "a/y.dat", "x.csv"])), st.lists(st.sampled_from(["x", "a/y"]))
)
def test_no_entry_is_lost_or_counted_twice(names: list[str], paths: list[str], stems: list[str]) -> None:
    found = sort_out(entries(*names), paths, stems)
    data = [file.entry.index for file in found.files]
    others = [e.index for e in found.others]
    manifests = {e.index for file in found.files for e in file.sidecars} | {e.index for e in found.wholes}
    assert data == sorted(set(data))
    assert not set(data) & set(others)
    assert not set(others) & manifests
    for file in found.files:
        assert all(e.name.endswith(".json") for e in (*file.sidecars, *file.wholes))
        assert file.entry.index not in {e.index for e in file.sidecars}
    left = set(range(len(names))) - set(data) - set(others) - manifests
    assert len(left) == found.directories + found.litter


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a.csv", "a"),
        ("a.csv.gz", "a"),
        ("x/a.b.jsonl.zst", "x/a.b"),
        ("a.tar.gz", "a.tar"),
        ("a", "a"),
        (".csv", ".csv"),
    ],
)
def test_stems(path: str, stem: str) -> None:
    assert stem_of(path) == stem


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("0", 0),
        ("1.5", Decimal("1.5")),
        ("-0.25", Decimal("-0.25")),
        ("true", True),
        ("false", False),
        ("null", None),
        ("007", "007"),
        ("+7", "+7"),
        ("1.50", "1.50"),
        ("1e3", "1e3"),
        ("-0", "-0"),
        (".5", ".5"),
        ("1.", "1."),
        ("True", "True"),
        ("NULL", "NULL"),
        ("", ""),
        (" 7", " 7"),
        ("\u0667", "\u0667"),
        ("9" * 18, int("9" * 18)),
        ("9" * 19, "9" * 19),
        ("nan", "nan"),
        ("1_000", "1_000"),
    ],
)
def test_only_what_is_unambiguous_is_inferred(text: str, value: Any) -> None:
    found = inferred({"x": text, "n": 5, "none": None})["x"]
    assert (found, type(found)) == (value, type(value))


@given(st.text(alphabet="0123456789-+.eE nultrfas", max_size=12))
def test_what_is_inferred_can_be_written_as_it_was(text: str) -> None:
    found = inferred({"x": text})["x"]
    constant = found is None or isinstance(found, bool)
    assert (json.dumps(found) if constant else str(found)) == text


# Of 38 digits at most: a number in DynamoDB has no more, and those that do are refused.
@given(st.decimals(min_value=1 - 10**32, max_value=10**32 - 1, places=6), st.integers(0, 3))
def test_equal_numbers_are_one_key(number: Decimal, zeros: int) -> None:
    typed = keyed([("id", "N")])
    one = typed({"id": str(number)})["id"]
    other = typed({"id": f" {number:f}" + ("0" * zeros if "." in f"{number:f}" else "")})["id"]
    assert (one, type(one)) == (other, type(other))
    assert one == number


@pytest.mark.parametrize(
    ("type_", "value", "wanted"),
    [
        ("N", "01", 1),
        ("N", "1.0", 1),
        ("N", "1e2", 100),
        ("N", 1.5, Decimal("1.5")),
        ("N", "12345678901234567890", 12345678901234567890),
        ("S", "a", "a"),
        ("S", 5, "5"),
        ("B", "AAE=", b"\x00\x01"),
        ("B", b"x", b"x"),
    ],
)
def test_keys_have_the_type_that_was_declared(type_: str, value: Any, wanted: Any) -> None:
    found = keyed([("id", type_)])({"id": value, "other": "01"})
    assert (found["id"], type(found["id"])) == (wanted, type(wanted))
    assert found["other"] == "01"


@pytest.mark.parametrize(
    ("type_", "value", "said"),
    [
        ("S", None, "no value"),
        ("S", "", "no value"),
        ("B", b"", "no value"),
        ("N", "", "no value"),
        ("N", "abc", "no number"),
        ("N", "NaN", "no number"),
        ("N", "1,5", "no number"),
        ("N", True, "no number"),
        ("N", "1" * 39, "38 digits"),
        ("N", "1e400", "38 digits"),
        ("N", 10**39 + 1, "38 digits"),
        ("N", float("nan"), "no number"),
        ("B", "###", "no base64"),
        ("B", 7, "no base64"),
        ("S", ["a"], "no text"),
        ("S", True, "no text"),
    ],
)
def test_a_key_that_does_not_fit_is_a_bad_record(type_: str, value: Any, said: str) -> None:
    with pytest.raises(BadRecord, match=said):
        keyed([("id", type_)])({"id": value})
    with pytest.raises(BadRecord, match="no value"):
        keyed([("id", type_)])({"other": 1})


def test_files_of_one_name_share_their_sidecars() -> None:
    """Thousands of each would otherwise take their product in memory."""
    found = sort_out(entries(*["a.csv", "a.json"] * 2000))
    assert len(found.files) == 2000
    assert {len(file.sidecars) for file in found.files} == {2000}
    assert len({id(file.sidecars) for file in found.files}) == 1
