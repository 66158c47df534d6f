"""The benchmarks run, on small sizes: every candidate's output is checked, no figure is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.__main__ import CASES, bars, main, number, plain, table
from benchmarks.archive import is_whole, make_piece
from benchmarks.harness import Bar, Candidate, Case, WrongOutput, measure, python, run
from tests.benchmarks.warm import Warm, warm

SIZES = {
    "engine": 300,
    "landing": 1 << 18,
    "lag": 4 << 20,  # some samples of each
    "decode": 1 << 18,
    "sqs": 300,
    "stores": 12 << 20,
    "fan-in": 40,
    "dynamodb": 100,
    "dynamodb-client": 200,
    "rows": 500,
    "zip-member": 24 << 20,  # more than is proven in one step
    "zip-late": 20,
    "zip-many": 20,
    "zip-resume": 1 << 20,
    "channel-put": 300,
    "channel-read": 300,
}


#: It tells nothing unless its processes are fresh.
FRESH = ("imports",)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with warm(tmp_path_factory.mktemp("warm")) as process:
        yield process


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_every_case_runs_and_checks_its_output(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], forks: Warm
) -> None:
    measured = measure if case.name in FRESH else forks.measure
    result = run(case, size=SIZES.get(case.name), rounds=1, scratch=tmp_path, measured=measured)
    shown = table(result)
    for name, figures in result.medians().items():
        assert name in shown
        assert {"wall", "cpu", "peak"} <= set(figures)
    for bar, value, met in result.verdicts():
        assert met == bar.met(value)
    assert json.loads(json.dumps(plain(result)))["case"] == case.name
    assert bars([result]) == sum(not met for _, _, met in result.verdicts())
    assert case.name in capsys.readouterr().out


def test_ratios_are_taken_within_a_round() -> None:
    bar = Bar("ours", "rate", "at least", 2.0, "theirs")
    rounds = [
        {"ours": {"rate": 30.0}, "theirs": {"rate": 10.0}},
        {"ours": {"rate": 6.0}, "theirs": {"rate": 3.0}},
        {"ours": {"rate": 100.0}, "theirs": {"rate": 100.0}},
    ]
    assert bar.value(rounds) == 2.0
    assert bar.met(2.0)
    assert not bar.met(1.9)
    assert not Bar("ours", "us", "at most", 2.0).met(2.1)


def test_a_candidate_that_fails_is_an_error() -> None:
    with pytest.raises(WrongOutput, match="broken ended with 3"):
        measure(Candidate("broken", [sys.executable, "-c", "print('{}'); raise SystemExit(3)"]))


def test_a_fork_that_fails_is_an_error_and_the_next_one_is_not(forks: Warm) -> None:
    with pytest.raises(WrongOutput, match="broken ended with 1"):
        forks.measure(Candidate("broken", python("imports", "no_such_module")))
    assert forks.measure(Candidate("whole", python("imports", "aiohttp")))["modules"] == 0


def test_the_archive_is_the_same_every_time(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert make_piece(one, 1 << 18) == make_piece(two, 1 << 18)
    assert one.read_bytes() == two.read_bytes()
    assert is_whole(two, one, one.stat().st_size)
    two.write_bytes(one.read_bytes()[:-1] + b"?")
    assert not is_whole(two, one, one.stat().st_size)


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "no case 'nonsense': there are engine, landing" in capsys.readouterr().err


def test_numbers_are_short() -> None:
    assert [number(n) for n in (1234567.8, 123.4, 12.34, 0.012345)] == ["1,234,568", "123", "12.3", "0.0123"]
