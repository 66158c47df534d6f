"""Every verb on a toy lane: what people read (golden), what programs read, and the exit code."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Cli = Callable[..., Result]
EVENT = '{"specversion": "1.0", "id": "7", "source": "shop", "type": "order"}'
RUN = "toy/run/shop,7"


@pytest.fixture
def ran(cli_in: Cli) -> Cli:
    """The command line after one run of the toy lane, in which one unit died."""
    assert cli_in("run", "toy.py", "--event", "-", stdin=EVENT).exit_code == 1
    return cli_in


def plain(text: str) -> str:
    """`text` without what differs from run to run."""
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z(-[0-9a-f]{6})?", "TIME", text)
    return re.sub(r" in \d+\.\d s", " in N s", text)


def test_run_prints_the_conservation_table_and_each_dead_unit(cli_in: Cli) -> None:
    result = cli_in("run", "toy.py", "--event", "-", stdin=EVENT)
    assert result.exit_code == 1
    assert result.stderr == ""
    lines = plain(result.stdout).splitlines()
    assert lines[0] == "the lane's own words"
    assert lines[1:] == [
        "toy/run/shop,7: failed in N s",
        "units  found  settled  dead  skipped  superseded  bytes in  bytes out",
        "load       4        4     1        1           0         0          0",
        "records  in  + expanded  = out  + skipped  + quarantined  conserved",
        "load      0           0      0          0              0  yes",
        r"dead toy/found/2: two is \x1b[31mbad[/red] and ugly",
        "failed: 1 unit is dead",
    ]


def test_run_settles_with_code_0(cli_in: Cli) -> None:
    Path("mended").touch()
    result = cli_in("run", "toy.py")
    assert result.exit_code == 0
    assert plain(result.stdout).splitlines()[1] == "toy/run/TIME: settled in N s"


def test_run_on_the_memory_backend(cli_in: Cli) -> None:
    assert cli_in("run", "toy.py", "--backend", "memory://").exit_code == 1
    assert not Path(".flowlane").exists()


def test_run_json_is_the_pinned_shape(document: Callable[..., Any]) -> None:
    report = document("run", "toy.py", "--event", "-", stdin=EVENT, code=1)
    assert report["lane"] == "toy"
    assert report["run"] == RUN
    assert report["outcome"] == "failed"
    assert report["units"] == {"found": 4, "settled": 4, "dead": 1, "skipped": 1, "superseded": 0}
    assert set(report["records"]) >= {"in", "out", "skipped", "quarantined"}
    assert report["bytes"] == {"in": 0, "out": 0}
    assert [stage["stage"] for stage in report["stages"]][:1] == ["load"]
    assert report["dead"] == [{"unit": "toy/found/2", "reason": "two is \x1b[31mbad[/red] and ugly"}]
    assert report["seconds"] >= 0
    assert report["opened"] is True
    assert report["interrupted"] is False
    assert report["drained"] == []


def test_the_same_event_twice_is_one_run(ran: Cli, document: Callable[..., Any]) -> None:
    result = ran("run", "toy.py", "--event", "-", stdin=EVENT)
    assert result.exit_code == 1
    assert f"the run of this event existed already, no other was opened: {RUN}" in result.stdout
    assert document("run", "toy.py", "--event", "-", stdin=EVENT, code=1)["opened"] is False
    assert len(document("status", "toy.py")["runs"]) == 1


def test_a_second_run_finds_nothing_new(ran: Cli, document: Callable[..., Any]) -> None:
    report = document("run", "toy.py")
    assert report["outcome"] == "settled"
    assert report["units"]["found"] == 0


def test_status(ran: Cli, document: Callable[..., Any]) -> None:
    result = ran("status", "toy.py")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "lane toy: 0 open units, 1 dead",
        "run             state   found  settled  dead  bytes out  reason",
        "toy/run/shop,7  failed      4        4     1          0  1 unit is dead",
    ]
    status = document("status", "toy.py")
    assert status["open"] == 0
    assert status["dead"] == 1
    assert status["views"] == {}
    assert [(run["run"], run["state"]) for run in status["runs"]] == [(RUN, "failed")]


def test_status_lists_only_the_last_runs(ran: Cli, document: Callable[..., Any]) -> None:
    for _ in range(3):
        ran("run", "toy.py")
    runs = [run["run"] for run in document("status", "toy.py", "--runs", "2")["runs"]]
    assert len(runs) == 2
    assert RUN not in runs
    assert runs == sorted(runs)


def test_status_before_any_run(cli_in: Cli) -> None:
    assert cli_in("status", "toy.py").stdout.splitlines() == ["lane toy: 0 open units, 0 dead", "no run yet"]


def test_status_shows_any_view(cli_in: Cli, document: Callable[..., Any]) -> None:
    with Path("toy.py").open("a") as file:
        file.write(
            "@lane.view('stock')\n"
            "async def stock(log):\n"
            "    return {'left': 3, 'names': ['a', 'b\\x07'], 'none': {}}\n"
        )
    assert cli_in("status", "toy.py").stdout.splitlines()[3:] == [
        "stock:",
        "  left: 3",
        "  names:",
        "    -: a",
        r"    -: b\x07",
        "  none: none",
    ]
    assert document("status", "toy.py")["views"] == {
        "stock": {"left": 3, "names": ["a", "b\x07"], "none": {}}
    }


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("object()", "TypeError: Encoding objects of type object is unsupported"),
        ("{(1, 2): 3}", "TypeError: "),
        ("'\\udc80'", "UnicodeEncodeError: "),
    ],
)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_status_names_the_view_that_is_no_json(cli_in: Cli, value: str, said: str, more: list[str]) -> None:
    with Path("toy.py").open("a") as file:
        file.write(f"@lane.view('stock')\nasync def stock(log):\n    return {value}\n")
    result = cli_in("status", "toy.py", *more)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"flowlane: the view 'stock' of lane toy raised {said}")


def test_a_number_that_json_lacks_is_none(document: Callable[..., Any]) -> None:
    with Path("toy.py").open("a") as file:
        file.write("@lane.view('stock')\nasync def stock(log):\n    return {'share': float('nan')}\n")
    assert document("status", "toy.py")["views"] == {"stock": {"share": None}}


def test_status_names_the_view_that_raises(cli_in: Cli) -> None:
    with Path("toy.py").open("a") as file:
        file.write("@lane.view('stock')\nasync def stock(log):\n    return 1 / 0\n")
    result = cli_in("status", "toy.py")
    assert result.exit_code == 1
    expected = "flowlane: the view 'stock' of lane toy raised ZeroDivisionError: division by zero\n"
    assert result.stderr == expected


def test_trace_is_the_causal_tree(ran: Cli, document: Callable[..., Any]) -> None:
    lines = [re.sub(r"  \S+Z$", "", line) for line in ran("trace", "toy.py").stdout.splitlines()]
    assert lines[0] == "lane.triggered  run/shop,7  v1"
    assert "  found  found/2  v1" in lines
    assert r"    unit.dead  found/2  v2  two is \x1b[31mbad[/red] and ugly" in lines
    assert "    unit.skipped  found/3  v2  three is dull" in lines
    assert "  unit.settled  run/shop,7  v2  4 found" in lines
    traced = document("trace", "toy.py", "shop,7")
    assert traced["run"] == RUN
    assert traced["more"] is False
    depths = {(event["type"], event["subject"]): event["depth"] for event in traced["events"]}
    assert depths["lane.triggered", RUN] == 0
    assert depths["found", "toy/found/0"] == 1
    assert depths["unit.settled", "toy/found/0"] == 2
    assert traced["events"][0]["data"]["event"] == json.loads(EVENT)
    assert document("trace", "toy.py", RUN)["events"] == traced["events"]


def test_trace_is_limited(ran: Cli, document: Callable[..., Any]) -> None:
    assert ran("trace", "toy.py", "--limit", "2").stdout.endswith("the first 2 events; --limit shows more\n")
    assert document("trace", "toy.py", "--limit", "2")["more"] is True


def test_trace_before_any_run(cli_in: Cli, document: Callable[..., Any]) -> None:
    assert cli_in("trace", "toy.py").stdout == "lane toy has no run yet\n"
    assert document("trace", "toy.py") == {"lane": "toy", "run": None, "more": False, "events": []}


def test_plan_lists_units_and_bytes_and_moves_nothing(cli_in: Cli, document: Callable[..., Any]) -> None:
    result = cli_in("plan", "toy.py")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == [
        "unit         stage  bytes  url",
        "toy/found/0  load   0      file:///in/0",
        "toy/found/1  load   1,000  file:///in/1",
        "toy/found/2  load   2,000  file:///in/2",
        "toy/found/3  load   ?",
        "a run of toy would move 4 units, 3,000 bytes (3.0 kB), and 1 of unknown size",
    ]
    planned = document("plan", "toy.py", "--limit", "1")
    assert planned["stages"] == [{"stage": "load", "units": 4, "bytes": 3000, "unknown": 1}]
    assert (planned["units"], planned["bytes"], planned["unknown"]) == (4, 3000, 1)
    assert planned["planned"] == [{"unit": "toy/found/0", "stage": "load", "url": "file:///in/0", "size": 0}]
    assert document("status", "toy.py")["runs"] == []


def test_plan_says_what_it_does_not_list(cli_in: Cli) -> None:
    assert "and 3 units more; --limit lists them" in cli_in("plan", "toy.py", "--limit", "1").stdout


def test_plan_leaves_out_what_the_log_knows(ran: Cli) -> None:
    assert ran("plan", "toy.py").stdout.splitlines()[1:] == ["a run of toy would move 0 units, 0 bytes (0 B)"]


def test_graph_is_a_mermaid_flowchart(cli_in: Cli, document: Callable[..., Any]) -> None:
    result = cli_in("graph", "toy.py")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "flowchart TD",
        '    trigger(["toy: every 5m"])',
        '    stage_find["find<br/>concurrency 8, retries 1, timeout 15m"]',
        '    stage_load["load<br/>concurrency 2, retries 1, timeout 15m"]',
        '    stage_tell["tell<br/>concurrency 8, retries 1, timeout 15m"]',
        "    trigger --> stage_find",
        "    stage_find --> unit_found",
        '    unit_found{{"found"}}',
        "    unit_found --> stage_load",
        '    notice_lane_completed(["lane.completed"]) --> stage_tell',
    ]
    graph = document("graph", "toy.py")
    assert graph["mermaid"] == result.stdout.rstrip("\n")
    assert graph["stages"][0]["yields"] == ["found"]
    assert not Path(".flowlane").exists()


def test_graph_tells_of_an_order_key(cli_in: Cli, document: Callable[..., Any]) -> None:
    Path("ordered.py").write_text(
        "from flowlane import Lane, Unit\n"
        "lane = Lane('ordered')\n"
        "class Found(Unit, key='n'):\n    n: int\n    who: str\n"
        "async def load(event, ctx):\n    pass\n"
        "lane.stage(on=lane.triggered, name='find')(load)\n"
        "lane.stage(on=Found, order=('who', 'n'))(load)\n"
    )
    label = '"load<br/>concurrency 8, retries 5, timeout 15m<br/>in order of who, n"'
    assert label in cli_in("graph", "ordered.py").stdout
    orders = [stage["order"] for stage in document("graph", "ordered.py")["stages"]]
    assert orders == [[], ["who", "n"]]


@pytest.mark.parametrize(
    "handler",
    [
        "functools.partial(find_from, 1)",
        "functools.wraps(find_from)(functools.partial(find_from, 1))",
        "functools.wraps(found)(functools.partial(found, 1))",
    ],
)
def test_graph_of_a_handler_that_is_no_plain_function(
    cli_in: Cli, document: Callable[..., Any], handler: str
) -> None:
    Path("partly.py").write_text(
        "import functools\n"
        "from flowlane import Lane, Unit\n"
        "lane = Lane('partly')\n"
        "class Found(Unit, key='n'):\n    n: int\n"
        "class Other(Unit, key='n'):\n    n: int\n"
        "async def find_from(first, event, ctx):\n    yield Found(n=first)\n"
        "class Finder:\n"
        "    async def __call__(self, first, event, ctx):\n        yield Found(n=first)\n"
        "found = Finder()\n"
        f"handler = {handler}\n"
        "handler.__name__ = 'find'\n"
        "lane.stage(on=lane.triggered)(handler)\n"
        "@lane.stage(on=Found)\nasync def load(event, ctx): pass\n"
        "@lane.stage(on=Other)\nasync def other(event, ctx): pass\n"
    )
    assert cli_in("graph", "partly.py").exit_code == 0
    (find, *_) = document("graph", "partly.py")["stages"]
    assert find["yields"] == ([] if "found)" in handler else ["found"])


def test_graph_of_a_recipe(cli_in: Cli, document: Callable[..., Any]) -> None:
    Path("archive.py").write_text(
        "from flowlane.recipes import http_archive\n"
        "lane = http_archive('a', url='http://h/{t:%Y%m%d%H}.gz', start='2024-01-01T00', to='file:///l/')\n"
    )
    stages = {stage["stage"]: stage for stage in document("graph", "archive.py")["stages"]}
    assert stages["find"]["yields"] == ["hour"]
    assert stages["land"]["on"] == "hour"


def test_dead_lists_units_with_reason(ran: Cli, document: Callable[..., Any]) -> None:
    assert ran("dead", "toy.py").stdout.splitlines() == [
        "unit         stage  attempts  reason",
        r"toy/found/2  load          1  two is \x1b[31mbad[/red] and ugly",
    ]
    dead = document("dead", "toy.py")
    assert dead["count"] == 1
    assert {**dead["dead"][0], "time": ""} == {
        "unit": "toy/found/2",
        "stage": "load",
        "attempts": 1,
        "time": "",
        "run": RUN,
        "reason": "two is \x1b[31mbad[/red] and ugly",
    }
    assert ran("dead", "toy.py", "--limit", "0").stdout == "and 1 unit more; --limit lists them\n"


def test_dead_of_a_healthy_lane(cli_in: Cli) -> None:
    result = cli_in("dead", "toy.py")
    assert (result.exit_code, result.stdout) == (0, "lane toy has no dead units\n")


@pytest.mark.parametrize("unit", ["toy/found/2", "found/2", ""])
def test_redrive_puts_back_and_run_goes_on(ran: Cli, document: Callable[..., Any], unit: str) -> None:
    result = ran("redrive", "toy.py", *([unit] if unit else []))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "1 unit put back to work",
        "a worker goes on with them, or `flowlane run toy.py` does",
    ]
    assert document("status", "toy.py")["open"] == 1
    Path("mended").touch()
    report = document("run", "toy.py")
    assert [(other["run"], other["outcome"]) for other in report["drained"]] == [(RUN, "settled")]
    assert document("dead", "toy.py")["count"] == 0


def test_a_redriven_unit_that_dies_again_is_exit_1(ran: Cli) -> None:
    ran("redrive", "toy.py")
    result = ran("run", "toy.py")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert f"drained too: {RUN}: failed, 4 units" in lines
    assert lines[-1] == f"failed {RUN}: 1 unit is dead"


def test_redrive_json_and_nothing_to_redrive(ran: Cli, document: Callable[..., Any]) -> None:
    assert document("redrive", "toy.py") == {
        "lane": "toy",
        "count": 1,
        "redriven": ["toy/found/2"],
        "skipped": [],
    }
    assert ran("redrive", "toy.py").stdout == "lane toy has no dead units: nothing to redrive\n"


def test_what_cannot_be_put_back_is_said_and_exit_1(ran: Cli) -> None:
    toy = Path("toy.py")
    toy.write_text(toy.read_text().replace("async def load", "async def load_all"))
    result = ran("redrive", "toy.py")
    assert result.exit_code == 1
    reason = "toy/found/2 is owed to stage 'load', which the lane no longer has: "
    assert result.stdout.startswith(f"left as it is: {reason}")
    assert "nothing to redrive" not in result.stdout
    said = json.loads(ran("redrive", "toy.py", "--json").stdout)
    assert (said["count"], said["redriven"]) == (0, [])
    assert [skipped["stream"] for skipped in said["skipped"]] == ["toy/found/2"]
    assert said["skipped"][0]["reason"].startswith(reason)


def test_sweep(ran: Cli, document: Callable[..., Any]) -> None:
    nothing = {
        "lane": "toy",
        "resent": 0,
        "died": 0,
        "open": 0,
        "requeued": 0,
        "completed": 0,
        "discarded": 0,
        "stranded": {},
    }
    assert document("sweep", "toy.py") == nothing
    ran("redrive", "toy.py")
    assert ran("sweep", "toy.py").stdout.startswith("lane toy: ")


def test_plugins(cli_in: Cli, document: Callable[..., Any]) -> None:
    assert re.search(r"^backend +sqlite +builtin +flowlane\.", cli_in("plugins").stdout, re.MULTILINE)
    assert {"memory", "file", "https"} <= {item["scheme"] for item in document("plugins")["plugins"]}


def test_init_makes_the_database(cli_in: Cli, document: Callable[..., Any]) -> None:
    result = cli_in("init", "toy.py", "--backend", "sqlite:///deep/down/lane.db")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "sqlite:///deep/down/lane.db is ready for lane toy",
        "queues: toy/find, toy/load, toy/tell",
        "0 open units, 0 dead",
    ]
    assert Path("deep/down/lane.db").is_file()
    assert document("init", "toy.py")["backend"] == "sqlite:///.flowlane/flowlane.db"


def test_the_environment_names_the_backend_and_the_option_overrides_it(cli_in: Cli) -> None:
    env = {"FLOWLANE_BACKEND": "sqlite:///a.db"}
    cli_in("init", "toy.py", env=env)
    cli_in("init", "toy.py", "--backend", "sqlite:///b.db?synchronous=full", env=env)
    assert Path("a.db").exists()
    assert Path("b.db").exists()


def test_what_the_lane_prints_is_not_in_the_document(cli_in: Cli) -> None:
    result = cli_in("run", "toy.py", "--json")
    assert result.stderr == "the lane's own words\n"
    assert json.loads(result.stdout)["lane"] == "toy"


def test_a_run_in_a_thread_which_gets_no_signals(cli_in: Cli) -> None:
    with ThreadPoolExecutor() as threads:
        assert threads.submit(cli_in, "run", "toy.py").result().exit_code == 1
