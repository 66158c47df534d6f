"""CSV by the block: as ``csv.reader`` reads it, the same however the input is cut, every row in its place."""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowlane.errors import ConfigError, Damaged, Permanent, Superseded
from flowlane.ports import Bad, Batch, Cut, Record
from flowlane.state import Position
from flowlane.streams.csvrows import CsvRows
from flowlane.streams.cutting import Cutter
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.encode import CsvLines, encoded
from flowlane.streams.nulls import Nulls

BIG = Cut(10**9, 10**9)


def batches(
    data: bytes,
    form: CsvFormat,
    cut: Cut = BIG,
    start: Position = Position(),  # noqa: B008 - a constant
    chunks: Sequence[int] = (),
) -> list[Batch]:
    """All batches of `data`, fed in pieces of the lengths `chunks`, over and over; whole by default."""
    rows, cutter = CsvRows(form, start), Cutter(cut, start)
    found: list[Batch] = []
    for piece in pieces(data, chunks):
        for chunk in rows.feed(piece):
            found += cutter.feed(chunk)
    for chunk in rows.close():
        found += cutter.feed(chunk)
    return [*found, *cutter.close()]


def pieces(data: bytes, chunks: Sequence[int]) -> Iterable[bytes]:
    at = turn = 0
    while at < len(data):
        size = chunks[turn % len(chunks)] if chunks else len(data)
        yield data[at : at + size]
        at, turn = at + size, turn + 1


def items(found: Iterable[Batch]) -> list[dict[str, Any] | Bad]:
    """Records and bad ones, in order of row."""
    everything: list[tuple[int, dict[str, Any] | Bad]] = []
    for batch in found:
        bad = {b.row: b for b in batch.bad}
        good = iter(batch.records)
        everything += [(n, bad.get(n) or next(good)) for n in range(batch.start.row, batch.end.row)]
        assert next(good, None) is None
    return [item for _, item in everything]


def records(data: bytes, **options: Any) -> list[dict[str, Any] | Bad]:
    return items(batches(data, CsvFormat(**options)))


field = st.text(st.sampled_from("ab,;\"'`\r\n é\U0001f600\0\\"), max_size=8)
table = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(field, min_size=width, max_size=width), max_size=12)
)
chunking = st.lists(st.integers(1, 40), max_size=4)
quoting = st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])


def written(rows: list[list[str]], how: int, end: str, delimiter: str, quote: str) -> tuple[bytes, CsvFormat]:
    columns = [f"c{n}" for n in range(len(rows[0]) if rows else 1)]
    text = io.StringIO(newline="")
    make: Any = csv.writer
    writer = make(text, quoting=how, lineterminator=end, delimiter=delimiter, quotechar=quote)
    writer.writerow(columns)
    writer.writerows(rows)
    form = CsvFormat(delimiter=delimiter, quote=quote, null=None)
    return text.getvalue().encode("utf-8", "surrogatepass"), form


@settings(deadline=None)  # the machine may be busy
@given(
    table,
    quoting,
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(",;\t|"),
    st.sampled_from("\"'`"),
    chunking,
)
def test_what_was_written_is_read(
    rows: list[list[str]], how: int, end: str, delimiter: str, quote: str, chunks: list[int]
) -> None:
    if end == "\n" and any("\r" in value for row in rows for value in row):
        how = csv.QUOTE_ALL  # the writer forgets that a lone CR needs quotes (3.11)
    data, form = written(rows, how, end, delimiter, quote)
    found = items(batches(data, form, chunks=chunks))
    assert [list(r.values()) for r in found if isinstance(r, dict)] == rows
    assert len(found) == len(rows)


junk = st.lists(
    st.sampled_from(
        [b"a", b"b", b",", b",", b'"', b'"', b'""', b"\n", b"\n", b"\r\n", b"\r", b"\xff", b"\xc3\xa9"]
    ),
    max_size=40,
).map(b"".join)


@settings(deadline=None)  # the machine may be busy
@given(junk, chunking, st.sampled_from([4, 7, 12, 1000]), st.sampled_from([None, "", "a"]), st.booleans())
@example(b'"\n"a\n', [2], 4, None, False)
@example(b'a,b\n"x\n1,2\n3,4\n', [1], 1000, "", False)
def test_junk_is_read_the_same_however_it_is_cut(
    data: bytes, chunks: list[int], limit: int, null: str | None, escaped: bool
) -> None:
    form = CsvFormat(
        header=False, columns=["x", "y"], null=null, max_row=limit, escape="b" if escaped else ""
    )
    whole = batches(data, form)
    assert batches(data, form, chunks=chunks or [1]) == whole
    assert batches(data, form, chunks=[1]) == whole


@settings(deadline=None)  # the machine may be busy
@given(junk)
def test_junk_is_read_as_the_module_reads_it(data: bytes) -> None:
    form = CsvFormat(header=False, columns=["x", "y"], null=None)
    found = items(batches(data, form, chunks=[3]))
    try:
        text = io.StringIO(data.removeprefix(b"\xef\xbb\xbf").decode(), newline="\n")
        expected = [row for row in csv.reader(text, strict=True) if row]
    except (csv.Error, UnicodeDecodeError):
        assert any(isinstance(item, Bad) for item in found)
        return
    assert len(found) == len(expected)
    for item, row in zip(found, expected, strict=True):
        assert isinstance(item, Bad) if len(row) != 2 else item == {"x": row[0], "y": row[1]}


@settings(deadline=None)  # the machine may be busy
@given(junk, st.integers(1, 5), st.integers(1, 30), chunking)
def test_batches_are_cut_the_same_from_every_batch_on(
    data: bytes, rows: int, size: int, chunks: list[int]
) -> None:
    data = b"x,y\n" + data
    form, cut = CsvFormat(max_row=20), Cut(rows, size)
    whole = batches(data, form, cut)
    assert batches(data, form, cut, chunks=chunks) == whole
    for number, batch in enumerate(whole):
        assert batch.end.crc == zlib.crc32(data[: batch.end.offset])
        assert batches(data, form, cut, batch.end, chunks) == whole[number + 1 :]
    for before, after in pairwise(whole):
        assert before.end == after.start
    for batch in whole[:-1]:
        count, span = batch.end.row - batch.start.row, batch.end.offset - batch.start.offset
        assert count == rows or (count < rows and span >= size)


@settings(deadline=None)  # the machine may be busy
@given(table, quoting)
def test_quoted_fields_are_told_from_plain_ones(rows: list[list[str]], how: int) -> None:
    for row in rows:
        text = io.StringIO(newline="")
        csv.writer(text, quoting=how).writerow(row)  # type: ignore[arg-type]
        quoted = Nulls(CsvFormat()).quoted_fields(text.getvalue())
        assert len(quoted) == len(row)
        if how != csv.QUOTE_MINIMAL:
            assert all(quoted)
        else:
            assert all(q for q, value in zip(quoted, row, strict=True) if set(value) & set('",\n\r'))


def test_null_is_what_is_not_quoted() -> None:
    assert records(b'a,b\n,""\n"",\n"",""\n') == [
        {"a": None, "b": ""},
        {"a": "", "b": None},
        {"a": "", "b": ""},
    ]
    assert records(b'a,b\nNULL,"NULL"\n,x\n', null="NULL") == [
        {"a": None, "b": "NULL"},
        {"a": "", "b": "x"},
    ]
    assert records(b'a,b\n\\N,"\n"\n', null="\\N") == [{"a": None, "b": "\n"}]
    assert records(b'a,b\n,""\n', null=None) == [{"a": "", "b": ""}]


@pytest.mark.parametrize("chunks", [(), (1,), (7,)])
@pytest.mark.parametrize("quoted", [b'"NULL"', b'"N\\ULL"', b"\\NULL", b"NUL\\L"])
def test_an_escaped_null_is_text(quoted: bytes, chunks: list[int]) -> None:
    """However the input is cut, and whatever else is in the same stretch."""
    form = CsvFormat(null="NULL", escape="\\")
    for rest, last in ((b"x", "x"), (b"NULL", None), (b'"NULL"', "NULL")):
        data = b"a,b\n" + quoted + b",y\nx," + rest + b"\n"
        found = items(batches(data, form, chunks=chunks))
        assert found == [{"a": "NULL", "b": "y"}, {"a": "x", "b": last}]


def encode(form: CsvFormat, rows: Sequence[Record]) -> tuple[bytes, list[str]]:
    """`rows` as a file of that form, and why some of them are not in it."""
    refused: list[tuple[int, str]] = []
    lines = CsvLines(form, list(rows[0]))
    return lines.header() + b"".join(encoded(lines, rows, refused)), [reason for _, reason in refused]


value = st.one_of(
    st.none(),
    field,
    st.integers(-2, 2),
    st.sampled_from(["N", "0", "-1", "\\N", 0.0, -1.0, 1e22, "0.0"]),
)


@settings(deadline=None)  # the machine may be busy
@given(
    st.integers(2, 3).flatmap(
        lambda width: st.lists(st.lists(value, min_size=width, max_size=width), min_size=1, max_size=5)
    ),
    st.sampled_from(",;\t|"),
    st.sampled_from("\"'`"),
    st.sampled_from(["", "\\", "^"]),
    st.sampled_from(["", "N", "0", "-1", "0.0", None]),
    chunking,
)
@example([[0, None]], ",", '"', "", "0", [])
def test_values_and_nothing_survive_any_dialect(
    rows: list[list[Any]], delimiter: str, quote: str, escape: str, null: str | None, chunks: list[int]
) -> None:
    form = CsvFormat(delimiter=delimiter, quote=quote, escape=escape, null=null)
    given_rows = [{f"c{n}": v for n, v in enumerate(row)} for row in rows]
    data, refused = encode(form, given_rows)
    nothing = "" if null is None else None
    wanted = [{name: nothing if v is None else str(v) for name, v in row.items()} for row in given_rows]
    assert not refused
    assert items(batches(data, form, chunks=chunks)) == wanted


@pytest.mark.parametrize("taken", ["N", "0", 0])
def test_without_quotes_a_null_token_is_nothing_else(taken: Any) -> None:
    form = CsvFormat(quote="", null=str(taken))
    data, refused = encode(form, [{"a": taken, "b": 1}, {"a": None, "b": 2}])
    assert data == f"a,b\r\n{taken},2\r\n".encode()
    assert refused == [
        f"cannot be written: '{taken}' stands for no value, and without quotes for nothing else"
    ]


def test_a_byte_order_mark_is_dropped_and_counted() -> None:
    (batch,) = batches(b"\xef\xbb\xbfa\n1\n", CsvFormat(), chunks=[1])
    assert batch.records == [{"a": "1"}]
    assert batch.end.offset == 7
    (batch,) = batches(b"\xef\xbb\xbf1\n", CsvFormat(header=False, columns=["a"]), chunks=[1])
    assert batch.records == [{"a": "1"}]


def test_bad_rows_say_where_and_why() -> None:
    data = b'a,b\n1,2\n1\n\xff,2\n"x"y,2\n1,2,3\nq,w\rz\n\n3,4\n'
    found = [(b.row, b.reason, b.raw) for b in records(data) if isinstance(b, Bad)]
    assert [row for row, _, _ in found] == [1, 2, 3, 4, 5]
    assert [raw for _, _, raw in found] == ["1\n", "\\xff,2\n", '"x"y,2\n', "1,2,3\n", "q,w\rz\n"]
    assert found[0][1] == "1 fields, there are 2 columns"
    assert found[1][1] == "not utf-8"
    assert "',' expected after '\"'" in found[2][1]
    assert found[4][1] == "a CR within a field that is not quoted: quote it, or end lines with LF"
    assert records(data)[-1] == {"a": "3", "b": "4"}


def test_a_quote_that_is_left_open_costs_one_line() -> None:
    for data in (b'a,b\n1,"2\n3,4\n5,6\n', b'a,b\n1,"2\n3,4\n5,6\n' + b"7,8\n" * 50):
        found = records(data, max_row=100)
        assert isinstance(found[0], Bad)
        assert "is a quote left open" in found[0].reason
        assert found[1:3] == [{"a": "3", "b": "4"}, {"a": "5", "b": "6"}]


@pytest.mark.parametrize("chunks", [[], [1], [7]])
def test_no_row_goes_on_through_a_line_that_is_too_long(chunks: list[int]) -> None:
    data = b'a\n"x\n2\n' + b"y" * 50 + b'\n"3"\n'
    found = batches(data, CsvFormat(max_row=20), Cut(1), chunks=chunks)
    assert [item if isinstance(item, dict) else item.raw for item in items(found)] == [
        '"x\n',
        {"a": "2"},
        "y" * 50 + "\n",
        {"a": "3"},
    ]
    assert [batch.end.offset for batch in found] == [5, 7, 58, 62]
    assert all(batch.end.crc == zlib.crc32(data[: batch.end.offset]) for batch in found)


def test_a_line_that_is_too_long_is_bad_and_not_held() -> None:
    rows = CsvRows(CsvFormat(header=False, columns=["a"], max_row=1000))
    for _ in range(10_000):
        assert all(not chunk.items for chunk in rows.feed(b"x" * 1000))
        assert len(rows._aligned._carry) <= 1000
    found = [item for chunk in rows.feed(b"\nshort\n") for item in chunk.items]
    assert isinstance(found[0], Bad)
    assert "10,000,000 bytes" not in found[0].reason
    assert "a line of 10,000,001 bytes" in found[0].reason
    assert found[1] == {"a": "short"}


def test_limits_of_fields_and_columns() -> None:
    found = records(b"a,b\nxxxx,1\nxxx,1\n", max_field=3)
    assert isinstance(found[0], Bad)
    assert "4 characters" in found[0].reason
    assert found[1] == {"a": "xxx", "b": "1"}
    with pytest.raises(Permanent, match="3 columns, the limit is 2"):
        records(b"a,b,c\n", max_columns=2)


def test_fields_longer_than_the_modules_own_limit() -> None:
    assert records(b"a\n" + b"x" * 200_000 + b"\n") == [{"a": "x" * 200_000}]


def test_other_encodings() -> None:
    data = "a\nä\n".encode("cp1252")
    assert records(data, encoding="cp1252") == [{"a": "ä"}]
    assert isinstance(records(b"a\n\x81\n", encoding="cp1252")[0], Bad)
    assert isinstance(records(data)[0], Bad)


def test_columns_rename_the_header() -> None:
    assert records(b"A,B\n1,2\n", columns=["x", "y"]) == [{"x": "1", "y": "2"}]
    with pytest.raises(Permanent, match="2 columns, columns= names 1"):
        records(b"A,B\n1,2\n", columns=["x"])


def test_quotes_that_mean_nothing() -> None:
    assert records(b'a\tb\n"x\ty"\n', delimiter="\t", quote="") == [{"a": '"x', "b": 'y"'}]


def test_escapes() -> None:
    data = b'a,b\n"x\\"y",z\\,w\n"",\n'
    assert records(data, escape="\\")[0] == {"a": 'x"y', "b": "z,w"}
    assert records(data, escape="\\")[1] == {"a": "", "b": None}


def test_a_header_and_nothing_else_has_no_rows() -> None:
    assert batches(b"a,b\n", CsvFormat()) == []
    assert batches(b"\n\na,b", CsvFormat()) == []
    assert batches(b"", CsvFormat(header=False, columns=["a"])) == []


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_not_even_a_header(data: bytes) -> None:
    with pytest.raises(Damaged, match="not even a CSV header"):
        batches(data, CsvFormat(), chunks=[1])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"a,a\n", "two columns are called 'a'"),
        (b"a,,b\n", "column 2 has no name"),
        (b'"a\nb', "does not end"),
        (b'"a"b\n', "malformed"),
        (b"a,b\r1,2\r", "its lines end with CR alone: convert them to LF"),
        (b"\xff\n", "not utf-8: say what it is in encoding="),
        ("\ufeffa,b\n1,2\n".encode("utf-16-le"), "is UTF-16: convert it to UTF-8"),
        ("\ufeffa,b\n1,2\n".encode("utf-16-be"), "is UTF-16: convert it to UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-le"), "header is UTF-16, or no text: convert it to UTF-8"),
        (b"PK\5\6" + bytes(18), "header is UTF-16, or no text"),
        (b"x" * 300, "no end of its CSV header within 200 bytes"),
    ],
)
def test_headers_that_are_none(data: bytes, says: str) -> None:
    with pytest.raises(Permanent, match=says):
        batches(data, CsvFormat(max_row=200), chunks=[50])


@pytest.mark.parametrize("chunks", [[], [1], [3]])
def test_utf_16_is_refused_without_a_header_too(chunks: list[int]) -> None:
    form = CsvFormat(header=False, columns=["a", "b"])
    with pytest.raises(Permanent, match="is UTF-16"):
        batches("\ufeff1,2\n3,4\n".encode("utf-16-le"), form, chunks=chunks)


def test_what_is_passed_over_is_checked() -> None:
    data = b"a\n1\n2\n"
    first, _ = batches(data, CsvFormat(), Cut(1, 100))
    with pytest.raises(Superseded, match="not those that were read before"):
        batches(b"a\n9\n2\n", CsvFormat(), Cut(1, 100), first.end)
    with pytest.raises(Superseded, match="ends before byte 4"):
        batches(b"a\n", CsvFormat(), Cut(1, 100), first.end)


@pytest.mark.parametrize(
    "options",
    [
        {"delimiter": ""},
        {"delimiter": ";;"},
        {"delimiter": "\n"},
        {"delimiter": "é"},
        {"delimiter": '"'},
        {"quote": ","},
        {"escape": '"'},
        {"null": ","},
        {"null": 'x"'},
        {"encoding": "utf-16"},
        {"encoding": "gbk"},
        {"encoding": "utf-7"},
        {"encoding": "none-such"},
        {"header": False},
        {"columns": "a,b"},
        {"columns": ["a", "a"]},
        {"columns": ["a", ""]},
        {"max_row": 0},
    ],
)
def test_dialects_that_contradict_themselves(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"CSV|column"):
        CsvFormat(**options)
