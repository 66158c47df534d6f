"""What a terminal gets: rich tables and trees, and nothing that it would obey."""

import io
import json
import logging
import re

import pytest

from flowlane.cli.logs import logging_to_stderr
from flowlane.cli.screen import Screen
from flowlane.cli.text import one_line, plural, safe, seconds, size

NASTY = "a\x1b[31mred\x1b[0m\x07\r\n\x9b2J\u202egnp.exe[bold]markup[/bold]:smile:\udc80"
HARMLESS = r"a\x1b[31mred\x1b[0m\x07\r\n\x9b2J\u202egnp.exe[bold]markup[/bold]:smile:\udc80"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_safe() -> None:
    assert safe(NASTY) == HARMLESS
    assert safe("Grüße, 東京") == "Grüße, 東京"
    assert one_line("a\n  b\tc") == "a b c"
    assert len(one_line("x" * 10_000)) == 2000


def test_words_for_numbers() -> None:
    assert [plural(n, "unit") for n in (0, 1, 2000)] == ["0 units", "1 unit", "2,000 units"]
    sizes = [-1, 0, 999, 1000, 1_500_000, 10**15, 10**19]
    assert [size(n) for n in sizes] == ["?", "0 B", "999 B", "1.0 kB", "1.5 MB", "1.0 PB", "10000.0 PB"]
    assert [seconds(n) for n in (0.5, 90, 900, 3600, 86400, 604800)] == [
        "0.5s",
        "90s",
        "15m",
        "1h",
        "1d",
        "1w",
    ]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_nothing_from_data_is_obeyed(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    screen = Screen(stream)
    screen.line(NASTY)
    screen.line(NASTY, "bold")
    screen.table(["name", "number"], [[NASTY, 1]])
    screen.tree([(0, NASTY), (1, NASTY)])
    printed = stream.getvalue()
    assert printed.count(HARMLESS) == 5
    # What is left of escapes is rich's own.
    assert not re.findall(r"\x1b(?!\[[0-9;]*m)|[\x07\r\x9b\u202e]", printed)


def test_a_terminal_gets_a_table_and_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(terminal := Terminal())
    screen.table(["name", "bytes"], [["a", 1000], ["b", 5]])
    screen.tree([(0, "root"), (1, "child"), (2, "grandchild"), (1, "other")])
    printed = terminal.getvalue()
    assert "1,000" in printed
    assert "└── other" in printed
    assert "grandchild" in printed


@pytest.mark.parametrize("columns", ["1", "20", "60"])
def test_a_narrow_terminal_loses_no_figure(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(terminal := Terminal())
    head = ["units", "found", "settled", "dead", "skipped", "superseded", "bytes in", "bytes out"]
    screen.table(head, [["load", 1_234_567, 2_345_678, 3, 4, 5, 6_789_012, 7_890_123]])
    assert {"1,234,567", "2,345,678", "6,789,012", "7,890,123"} <= set(terminal.getvalue().split())


def test_a_pipe_gets_plain_lines() -> None:
    screen = Screen(pipe := io.StringIO())
    screen.table(["name", "bytes", "why"], [["a", 1000, ""], ["long one", 5, "x"]])
    screen.table(["nothing"], [])
    screen.tree([(0, "root"), (1, "child")])
    assert pipe.getvalue() == (
        "name      bytes  why\na         1,000\nlong one      5  x\nnothing\nroot\n  child\n"
    )


def test_an_encoding_that_lacks_a_character_does_not_end_the_report() -> None:
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii")
    Screen(stream).line("東京")
    stream.flush()
    assert raw.getvalue() == rb"\u6771\u4eac" + b"\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_one_record_is_one_line(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    with logging_to_stderr("info", as_json=as_json, debug=False):
        log = logging.getLogger("flowlane")
        log.info("from %s", NASTY, extra={"run": "r\n1"})
        log.debug("not at this level")
        try:
            raise ValueError("two\nlines")
        except ValueError:
            log.exception("it went wrong")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    if as_json:
        first, second = map(json.loads, lines)
        assert first["message"] == f"from {NASTY}"
        assert (first["level"], first["run"]) == ("info", "r\n1")
        assert second["message"] == "it went wrong: ValueError: two\nlines"
    else:
        assert HARMLESS in lines[0]
        assert lines[0].endswith(r"run=r\n1")
        assert "Traceback" not in lines[1]


def test_debug_logs_the_traceback_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("info", as_json=False, debug=True):
        try:
            raise ValueError
        except ValueError:
            logging.getLogger("flowlane").exception("it went wrong")
    (line,) = capsys.readouterr().err.splitlines()
    assert "Traceback" in line


def test_no_handler_stays_behind() -> None:
    before = list(logging.getLogger().handlers)
    with logging_to_stderr("info", as_json=False, debug=False):
        pass
    assert logging.getLogger().handlers == before
