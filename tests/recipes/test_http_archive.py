"""``http_archive`` as a user runs it: a real server that lies, real files, both embedded backends."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import sys
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from flowlane import ConfigError, Context, Event, Lane, Policy, Unit, plugins
from flowlane.backends.memory import MemoryBackend
from flowlane.clock import SystemClock
from flowlane.compose import Application, open_application
from flowlane.events import encode
from flowlane.hookspecs import Provides, hookimpl
from flowlane.plugins import Registry
from flowlane.ports import Backend, Environment
from flowlane.recipes import http_archive
from flowlane.recipes.http_archive import Archive
from flowlane.redrive import redrive
from flowlane.report import Report
from flowlane.settings import Settings
from flowlane.state import progress
from flowlane.status import LogView
from flowlane.testing.lying_server import LyingServer
from flowlane.testing.oracle import check
from flowlane.worker import run_once

DAY = datetime(2024, 1, 1, tzinfo=UTC)
PAGE = b"<!DOCTYPE html><html><body><h1>We'll be right back</h1></body></html>"
QUICK = Policy(retries=2, backoff="1ms", backoff_cap="20ms")

_bodies = itertools.count()


def archive(size: int = 2000) -> bytes:
    """Two gzip members, unlike any other archive."""
    line = f'{{"id": {next(_bodies)}}}\n'.encode()
    halves = [gzip.compress(line * (size // 20), mtime=0), gzip.compress(line, mtime=0)]
    return b"".join(halves)


def text(hour: int) -> str:
    """The hour as it stands in streams and views."""
    return (DAY + timedelta(hours=hour)).strftime("%Y-%m-%dT%H:%M:%SZ")


class WallClock(SystemClock):
    """The machine's clock, but for the date: it is whatever day a test says, and goes on from there."""

    def __init__(self, start: datetime) -> None:
        self._start = start
        self._began = self.monotonic()

    def now(self) -> datetime:
        """See ``Clock.now``."""
        return self._start + timedelta(seconds=self.monotonic() - self._began)

    def jump(self, **span: float) -> None:
        """It is later by ``timedelta(**span)``."""
        self._start += timedelta(**span)


class Site:
    """An archive's server, a lake, a clock, and one backend for all runs: what the tests below stand on."""

    def __init__(self, server: LyingServer, folder: Path, backend: str) -> None:
        self.server = server
        self.folder = folder
        self.lake = folder / "lake"
        self.clock = WallClock(DAY + timedelta(hours=6, minutes=1))
        self.settings = Settings(
            backend="memory://" if backend == "memory" else f"sqlite:///{folder}/flow.db",
            allow_private_hosts=True,
        )
        self._kept: Backend | None = MemoryBackend(self.clock) if backend == "memory" else None

    def serve(self, hours: range, **lie: Any) -> dict[str, bytes]:
        """Serve an archive for each of `hours`; the bytes by file name."""
        served = {}
        for hour in hours:
            name = f"2024-01-01-{hour}.json.gz"
            served[name] = archive()
            self.server.serve(f"/{name}", served[name], **lie)
        return served

    def lane(self, **options: Any) -> Lane:
        """The lane of six hours, or as `options` say."""
        given: dict[str, Any] = {
            "url": self.server.url("/{t:%Y-%m-%d}-{t.hour}.json.gz"),
            "start": "2024-01-01T00",
            "to": self.lake.as_uri(),
            "max_gap": "2h",
            "policy": QUICK,
        }
        return http_archive("hub", **{**given, **options})

    @asynccontextmanager
    async def app(self, lane: Lane) -> AsyncIterator[Application]:
        """The lane, opened as by one process."""
        async with open_application([lane], self.settings, clock=self.clock, backend=self._kept) as app:
            yield app

    async def run(self, lane: Lane) -> Report:
        """One run in a process of its own; what the log must fulfil is checked after it."""
        async with self.app(lane) as app:
            report = await run_once(app, lane)
            assert await check(app.backend, lane) == []
        return report

    async def redrive(self, lane: Lane) -> list[str]:
        """Redrive all that is dead, in a process of its own."""
        async with self.app(lane) as app:
            return await redrive(app.engine, lane.name)

    async def hours(self, lane: Lane) -> dict[str, Any]:
        """The map that ``flowlane status`` shows."""
        async with self.app(lane) as app:
            return await lane.views["hours"](LogView(app.engine, lane.name))

    async def log(self, lane: Lane) -> list[Event]:
        """Every event of the lane."""
        async with self.app(lane) as app:
            return [event async for event in app.backend.scan(lane.name)]

    def landed(self) -> dict[str, bytes]:
        """All files in the lake, hidden ones too, by their path below it."""
        found = self.lake.rglob("*") if self.lake.exists() else ()
        return {str(path.relative_to(self.lake)): path.read_bytes() for path in found if path.is_file()}

    def asked(self, method: str) -> list[str]:
        """The paths asked for by `method`, in order."""
        return [request.path for request in self.server.requests if request.method == method]


@pytest.fixture(params=["memory", "sqlite"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    async with LyingServer() as server:
        yield Site(server, tmp_path, request.param)


@pytest.fixture
async def quick_site(tmp_path: Path) -> AsyncIterator[Site]:
    """For what no backend has a part in."""
    async with LyingServer() as server:
        yield Site(server, tmp_path, "memory")


# --------------------------------------------------------------------------- what lands


async def test_a_second_run_finds_and_fetches_nothing(site: Site) -> None:
    served = site.serve(range(6))
    lane = site.lane()
    first = await site.run(lane)
    assert (first.outcome, first.units["found"], first.units["settled"]) == ("settled", 6, 6)
    assert site.landed() == served
    size = sum(map(len, served.values()))
    assert first.bytes == {"in": size, "out": size}
    fetched = len(site.asked("GET"))
    asked = len(site.asked("HEAD"))
    second = await site.run(lane)
    assert (second.outcome, second.units["found"]) == ("settled", 0)
    assert (fetched, len(site.asked("GET"))) == (6, 6)
    assert len(site.asked("HEAD")) == asked, "the bookmark has passed them: nobody asks again"
    assert site.landed() == served


async def test_what_is_no_archive_leaves_no_file_and_is_named_with_its_reason(site: Site) -> None:
    served = site.serve(range(6))
    cut = served.pop("2024-01-01-2.json.gz")
    site.server.serve("/2024-01-01-2.json.gz", cut[: len(cut) // 2])  # cut at its source, the length agrees
    site.server.remove("/2024-01-01-3.json.gz")
    del served["2024-01-01-3.json.gz"]
    site.server.serve("/2024-01-01-4.json.gz", PAGE, headers={"Content-Type": "text/html"})
    del served["2024-01-01-4.json.gz"]
    lane = site.lane(max_gap="1s")
    report = await site.run(lane)
    assert report.outcome == "failed"
    assert report.units == {"found": 5, "settled": 5, "dead": 2, "skipped": 0, "superseded": 0}
    assert site.landed() == served
    hours = await site.hours(lane)
    assert set(hours["dead"]) == {text(2), text(4)}
    assert "compressed stream" in hours["dead"][text(2)] or "end" in hours["dead"][text(2)]
    assert "not a .gz file" in hours["dead"][text(4)]
    assert hours["missing"] == [[text(3), text(3)]]
    assert (hours["covered"], hours["pending"], hours["bookmark"]) == (3, {}, text(6))
    assert {d["unit"] for d in report.dead} == {f"hub/hour/{text(2)}", f"hub/hour/{text(4)}"}
    assert all(d["reason"] and "\n" not in d["reason"] for d in report.dead)


async def test_a_redriven_hour_lands_once_its_server_is_mended(site: Site) -> None:
    served = site.serve(range(6))
    whole = served["2024-01-01-2.json.gz"]
    site.server.serve("/2024-01-01-2.json.gz", whole[:-5])
    lane = site.lane()
    first = await site.run(lane)
    assert first.outcome == "failed"
    site.server.serve("/2024-01-01-2.json.gz", whole)
    assert await site.redrive(lane) == [f"hub/hour/{text(2)}"]
    await site.run(lane)  # another run, which drains the old one's second round
    assert site.landed() == served
    log = await site.log(lane)
    ends = [progress(e).report["outcome"] for e in log if e.type == "run.completed" and e.run == first.run]
    assert ends == ["failed", "settled"]
    assert (await site.hours(lane))["dead"] == {}
    async with site.app(lane) as app:
        with pytest.raises(ConfigError, match="is not a dead unit"):
            await redrive(app.engine, lane.name, [f"hub/hour/{text(2)}"])


async def test_start_is_inclusive_and_until_exclusive(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(6))
    report = await site.run(site.lane(start="2024-01-01T01", until="2024-01-01T04"))
    assert report.units["found"] == 3
    assert set(site.landed()) == {name for name in served if name[11] in "123"}
    assert sorted(site.asked("HEAD")) == [f"/2024-01-01-{n}.json.gz" for n in (1, 2, 3)]


async def test_an_hour_is_not_asked_for_before_it_is_over(quick_site: Site) -> None:
    site = quick_site
    site.serve(range(10))
    lane = site.lane()
    assert (await site.run(lane)).units["found"] == 6  # it is 06:01
    site.clock.jump(minutes=58)
    assert (await site.run(lane)).units["found"] == 0
    site.clock.jump(minutes=2)
    assert (await site.run(lane)).units["found"] == 1


async def test_the_target_may_be_a_template(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(2))
    await site.run(site.lane(until="2024-01-01T02", to=site.lake.as_uri() + "/{t:%Y}/{t.month:02d}"))
    assert site.landed() == {f"2024/01/{name}": data for name, data in served.items()}


async def test_many_hours_are_found_in_order_and_landed_all(quick_site: Site) -> None:
    site = quick_site
    site.clock.jump(hours=94)
    served = {}
    for n in range(100):
        moment = DAY + timedelta(hours=n)
        name = f"{moment:%Y-%m-%d}-{moment.hour}.json.gz"
        served[name] = archive(100)
        site.server.serve(f"/{name}", served[name])
    lane = site.lane()
    assert (await site.run(lane)).units["settled"] == 100
    assert site.landed() == served
    marks = [e for e in await site.log(lane) if e.type == "bookmark"]
    nexts = [next_ for e in marks if (next_ := _data(e)["next"])]
    assert nexts == sorted(nexts)
    assert nexts[-1] == text(100)


# --------------------------------------------------------------------------- servers that misbehave


async def test_a_server_without_head_is_asked_for_one_byte(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(2), head=405)
    assert (await site.run(site.lane(until="2024-01-01T02"))).outcome == "settled"
    assert site.landed() == served
    probes = [r.range for r in site.server.requests if r.method == "GET" and r.range]
    assert probes == ["bytes=0-0"] * 2


async def test_a_busy_server_is_asked_again(site: Site) -> None:
    served = site.serve(range(6))
    name = "2024-01-01-3.json.gz"
    site.server.serve(f"/{name}", served[name], status=503, times=2)
    lane = site.lane()
    report = await site.run(lane)
    assert (report.outcome, report.units["found"]) == ("settled", 6)
    assert site.landed() == served
    assert (await site.hours(lane))["pending"] == {}


async def test_a_server_busy_for_one_hour_holds_no_other_up(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(6))
    name = "2024-01-01-3.json.gz"
    site.server.serve(f"/{name}", served[name], status=503)
    lane = site.lane(max_gap="1s")
    report = await site.run(lane)
    assert (report.outcome, report.units["found"]) == ("settled", 5)
    hours = await site.hours(lane)
    assert (hours["bookmark"], hours["next"]) == (text(3), text(6)), "it never passes what is not answered"
    assert "503" in hours["pending"][text(3)]
    assert hours["missing"] == [], "no answer is not 'missing', however old the hour"
    site.server.serve(f"/{name}", served[name])
    assert (await site.run(lane)).units["settled"] == 1
    assert site.landed() == served


async def test_throttling_is_waited_for_as_long_as_asked(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(1))
    name = "/2024-01-01-0.json.gz"
    site.server.serve(name, served[name[1:]], status=429, headers={"Retry-After": "1"}, times=2)
    lane = site.lane(until="2024-01-01T01", policy=Policy(retries=3, backoff="1ms", backoff_cap="120ms"))
    report = await site.run(lane)
    assert report.outcome == "settled"
    failed = [e for e in await site.log(lane) if e.type == "attempt.failed"]
    assert failed
    assert {progress(e).delay for e in failed} == {0.12}, "as asked for, but no longer than the policy's cap"
    assert "429" in progress(failed[0]).reason


async def test_a_redirect_is_followed(quick_site: Site) -> None:
    site = quick_site
    data = archive()
    site.server.serve("/real/a.json.gz", data)
    site.server.serve("/2024-01-01-0.json.gz", b"", redirect=site.server.url("/real/a.json.gz"))
    assert (await site.run(site.lane(until="2024-01-01T01"))).outcome == "settled"
    assert site.landed() == {"2024-01-01-0.json.gz": data}


async def test_a_broken_connection_is_taken_up_where_it_broke(quick_site: Site) -> None:
    site = quick_site
    data = archive(60_000) * 40
    site.server.serve("/2024-01-01-0.json.gz", data, cut=1000, times=1)
    assert (await site.run(site.lane(until="2024-01-01T01"))).outcome == "settled"
    assert site.landed() == {"2024-01-01-0.json.gz": data}
    assert [r.range for r in site.server.requests if r.method == "GET"] == ["", "bytes=1000-"]


async def test_an_archive_replaced_while_it_is_read_is_read_anew(quick_site: Site) -> None:
    site = quick_site
    data = archive()
    # The first answer breaks off under one ETag; what is there then has another one.
    site.server.serve("/2024-01-01-0.json.gz", data, etags=['"old"', '"new"'], cut=50, times=1)
    lane = site.lane(until="2024-01-01T01")
    assert (await site.run(lane)).outcome == "settled"
    assert site.landed() == {"2024-01-01-0.json.gz": data}
    reasons = [progress(e).reason for e in await site.log(lane) if e.type == "attempt.failed"]
    assert len(reasons) == 1
    assert "replaced" in reasons[0]


async def test_nobody_at_home_is_a_dead_discovery_with_its_reason(site: Site) -> None:
    lane = site.lane(url="http://127.0.0.1:9/{t:%Y-%m-%d}-{t.hour}.gz")
    report = await site.run(lane)
    assert report.outcome == "failed"
    assert report.units["found"] == 0
    assert "discovery died" in report.reason
    assert "127.0.0.1:9" in report.reason
    assert "no connection" in report.reason
    assert [d["unit"] for d in report.dead] == [report.run]


async def test_a_refusal_is_a_dead_discovery_at_once(quick_site: Site) -> None:
    site = quick_site
    site.serve(range(6), status=401)
    report = await site.run(site.lane())
    assert "status 401" in report.reason
    assert len(site.asked("HEAD")) == 6, "asking again would not help"


async def test_a_private_address_is_refused_unless_allowed(quick_site: Site) -> None:
    site = quick_site
    site.serve(range(6))
    site.settings = Settings(backend="memory://")
    report = await site.run(site.lane())
    assert "FLOWLANE_ALLOW_PRIVATE_HOSTS=1" in report.reason
    assert site.server.requests == []


async def test_an_unwritable_target_is_dead_with_its_reason(quick_site: Site) -> None:
    site = quick_site
    site.serve(range(1))
    site.lake.write_bytes(b"a file, where a folder is wanted")
    report = await site.run(site.lane(until="2024-01-01T01"))
    assert report.outcome == "failed"
    assert report.units["dead"] == 1
    assert "cannot write" in report.dead[0]["reason"]
    assert site.asked("GET") == [], "nothing is fetched that cannot be put anywhere"


@pytest.mark.parametrize("url", ["ftp://host/{t.hour}.gz", "{t.hour}.gz", "http:///{t.hour}.gz"])
async def test_a_url_that_nothing_opens_is_dead_with_its_reason(quick_site: Site, url: str) -> None:
    report = await quick_site.run(quick_site.lane(url=url, until="2024-01-01T02"))
    assert report.outcome == "failed"
    assert "TaskGroup" not in report.reason
    assert ("ftp" if url.startswith("ftp") else "gz") in report.reason
    assert "attempts" not in report.reason


async def test_a_target_that_nothing_opens_is_dead_with_its_reason(quick_site: Site) -> None:
    quick_site.serve(range(1))
    report = await quick_site.run(quick_site.lane(to="gopher://host/", until="2024-01-01T01"))
    assert "gopher" in report.dead[0]["reason"]
    assert "file" in report.dead[0]["reason"], "what could be opened instead"


async def test_an_absurd_retry_after_holds_no_other_hour_up(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(6))
    absurd = {"Retry-After": "Wed, 27 Nov 99999999999999999999 04:00:00 GMT"}
    del served["2024-01-01-3.json.gz"]
    site.server.serve("/2024-01-01-3.json.gz", b"", status=503, headers=absurd)
    report = await site.run(site.lane())
    assert (report.outcome, report.units["found"]) == ("settled", 5)
    assert site.landed() == served


async def test_a_redirect_that_cannot_be_followed_holds_no_other_hour_up(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(6))
    del served["2024-01-01-3.json.gz"]
    site.server.serve("/2024-01-01-3.json.gz", b"", redirect="//[::1]:80@/")
    lane = site.lane()
    assert (await site.run(lane)).outcome == "settled"
    assert site.landed() == served
    assert "redirects to" in (await site.hours(lane))["pending"][text(3)]


async def test_the_longest_wait_asked_for_is_waited(quick_site: Site) -> None:
    site = quick_site
    site.serve(range(6))
    for hour, said in ((1, {}), (2, {"Retry-After": "1"})):
        path = f"/2024-01-01-{hour}.json.gz"
        site.server.serve(path, archive(), status=503, headers=said, times=1)
    lane = site.lane(policy=Policy(retries=3, backoff="1ms", backoff_cap="120ms"))
    assert (await site.run(lane)).units["settled"] == 6
    failed = [e for e in await site.log(lane) if e.type == "attempt.failed"]
    assert [progress(e).delay for e in failed] == [0.12]


async def test_an_archive_compressed_again_on_its_way_is_no_archive(quick_site: Site) -> None:
    site = quick_site
    twice = gzip.compress(archive())
    site.server.serve("/2024-01-01-0.json.gz", twice, headers={"Content-Encoding": "gzip"})
    report = await site.run(site.lane(until="2024-01-01T01"))
    assert "compressed already" in report.dead[0]["reason"]
    assert site.landed() == {}


@pytest.mark.parametrize("status", [0, 503])
async def test_a_server_that_is_down_is_not_asked_for_years_of_hours(quick_site: Site, status: int) -> None:
    """120 days, of which the bookmark could not even hold the excuses."""
    site = quick_site
    site.clock.jump(days=120)
    url = site.server.url("/{t:%Y-%m-%d}-{t.hour}.json.gz")
    asked = []

    async def busy(*given: Any) -> bool:
        asked.append(given)
        reader, writer = given
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n" if status else b"")
        return False

    real, site.server._answer = site.server._answer, busy  # type: ignore[assignment, method-assign]
    lane = site.lane(url=url, policy=Policy(retries=1, backoff="1ms"))
    report = await site.run(lane)
    assert "no answer for" in report.reason
    assert len(asked) <= 2 * 3 * 16, "16, and in the next attempt 32; aiohttp may ask each one twice"
    site.server._answer = real  # type: ignore[method-assign]
    served = site.serve(range(24))
    assert (await site.run(lane)).outcome == "settled"
    assert site.landed() == served, "nothing was passed over meanwhile"


async def test_many_hours_without_an_answer_hold_no_other_up(quick_site: Site) -> None:
    """More than are asked for at once, among others that are there."""
    site = quick_site
    site.clock.jump(hours=66)  # it is 72:01
    for hour in range(72):
        moment = DAY + timedelta(hours=hour)
        lie = {"status": 500} if 20 <= hour < 60 else {}
        site.server.serve(f"/{moment:%Y-%m-%d}-{moment.hour}.json.gz", archive(100), **lie)
    lane = site.lane()
    report = await site.run(lane)
    assert (report.outcome, report.units["settled"]) == ("settled", 32)
    hours = await site.hours(lane)
    assert (len(hours["pending"]), hours["bookmark"], hours["next"]) == (40, text(20), text(72))


async def test_a_bookmark_takes_up_no_more_than_an_event_holds(
    quick_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive whose absent hours are forbidden, not missing: no end of pending ones."""
    site = quick_site
    monkeypatch.setattr(sys.modules[http_archive.__module__], "MAX_BOOKMARK", 10_000)
    site.clock.jump(days=30)
    site.serve(range(1))
    for hour in range(1, 24 * 31):
        moment = DAY + timedelta(hours=hour)
        site.server.serve(f"/{moment:%Y-%m-%d}-{moment.hour}.json.gz", b"", status=418)
    lane = site.lane()
    assert "the bookmark is full" in (await site.run(lane)).reason
    assert "status 418" in (await site.run(lane)).reason, "nobody answered otherwise any more"
    hours = await site.hours(lane)
    assert 10 < len(hours["pending"]) < 200
    assert hours["bookmark"] == text(1)
    assert set(site.landed()) == {"2024-01-01-0.json.gz"}


# --------------------------------------------------------------------------- missing, late, again


async def test_a_late_hour_is_pending_and_lands_when_it_appears(site: Site) -> None:
    served = site.serve(range(6))
    name = "2024-01-01-5.json.gz"
    site.server.remove(f"/{name}")
    lane = site.lane()
    report = await site.run(lane)
    assert (report.outcome, report.units["found"]) == ("settled", 5)
    hours = await site.hours(lane)
    assert (hours["bookmark"], hours["missing"], hours["covered"]) == (text(5), [], 5)
    assert list(hours["pending"]) == [text(5)]
    assert "404" in hours["pending"][text(5)]
    site.clock.jump(minutes=30)
    site.server.serve(f"/{name}", served[name])
    assert (await site.run(lane)).units["settled"] == 1
    assert site.landed() == served
    hours = await site.hours(lane)
    assert (hours["bookmark"], hours["pending"], hours["covered"]) == (text(6), {}, 6)


async def test_gaps_are_asked_for_once_more_when_the_url_was_wrong(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(40))
    served.pop("2024-01-01-30.json.gz")
    site.server.remove("/2024-01-01-30.json.gz")
    site.clock.jump(days=9)
    wrong = site.lane(url=site.server.url("/typo/{t:%Y-%m-%d}-{t.hour}.json.gz"), until="2024-01-02T00")
    await site.run(wrong)
    assert (await site.hours(wrong))["missing"] == [[text(0), text(23)]]
    right = site.lane(until="2024-01-02T00")
    assert (await site.hours(right))["missing"] == [[text(0), text(23)]], "nothing was asked yet"
    site.server.remove("/2024-01-01-7.json.gz")
    await site.run(right)
    hours = await site.hours(right)
    assert (hours["missing"], hours["covered"]) == ([[text(7), text(7)]], 23)
    assert site.landed() == {
        f"2024-01-01-{n}.json.gz": served[f"2024-01-01-{n}.json.gz"] for n in range(24) if n != 7
    }
    asked = len(site.asked("HEAD"))
    await site.run(right)
    assert len(site.asked("HEAD")) == asked, "a gap for good"


async def test_a_gap_doubted_need_not_end_with_a_period(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(8))
    site.clock.jump(days=9)
    await site.run(
        site.lane(url=site.server.url("/typo/{t:%Y-%m-%d}-{t.hour}.json.gz"), until="2024-01-01T08")
    )
    await site.run(site.lane(until="2024-01-01T08", step="5h"))
    assert sorted(site.landed()) == ["2024-01-01-0.json.gz", "2024-01-01-5.json.gz"]
    assert all(served[name] == data for name, data in site.landed().items())


async def test_an_hour_missing_for_too_long_becomes_a_gap_for_good(site: Site) -> None:
    site.serve(range(6))
    for hour in (0, 1, 4):
        site.server.remove(f"/2024-01-01-{hour}.json.gz")
    lane = site.lane()  # it is 06:01 and gaps are given up after 2 hours
    await site.run(lane)
    hours = await site.hours(lane)
    assert hours["missing"] == [[text(0), text(1)]]
    assert list(hours["pending"]) == [text(4)]
    site.clock.jump(hours=1)
    await site.run(lane)
    hours = await site.hours(lane)
    assert hours["missing"] == [[text(0), text(1)], [text(4), text(4)]]
    assert hours["bookmark"] == text(6)
    site.clock.jump(minutes=10)
    asked = len(site.asked("HEAD"))
    report = await site.run(lane)
    assert (report.outcome, report.units["found"]) == ("settled", 0)
    assert set(site.asked("HEAD")[asked:]) <= {"/2024-01-01-6.json.gz"}, "gaps are for good"


async def test_an_hour_that_is_a_unit_is_neither_pending_nor_missing(quick_site: Site) -> None:
    """An attempt that found it ended, at its deadline, say, before the bookmark was kept; and the next one
    is told that it is not there."""
    site = quick_site
    served = site.serve(range(6))
    begun = Lane("hub", policy=QUICK)

    @begun.stage(on=begun.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for hour in (0, 3, 5):
            name = f"2024-01-01-{hour}.json.gz"
            yield Archive(
                period=text(hour), url=site.server.url(f"/{name}"), to=f"{site.lake.as_uri()}/{name}"
            )

    @begun.stage(on=Archive)
    async def land(event: Event, ctx: Context) -> None:
        await ctx.copy(event.data.url, to=event.data.to)

    await site.run(begun)
    site.server.remove("/2024-01-01-0.json.gz")  # for so long that it would be a gap
    site.server.serve("/2024-01-01-3.json.gz", served["2024-01-01-3.json.gz"], status=503)
    site.server.remove("/2024-01-01-5.json.gz")
    report = await site.run(site.lane())
    assert (report.outcome, report.units["found"]) == ("settled", 3)
    hours = await site.hours(site.lane())
    assert (hours["missing"], hours["pending"], hours["covered"]) == ([], {}, 6)
    assert site.landed() == served


async def test_an_hour_published_again_is_ignored(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(6))
    lane = site.lane()
    await site.run(lane)
    site.serve(range(6))
    assert (await site.run(lane)).units["found"] == 0
    assert site.landed() == served


async def test_refresh_lands_what_is_published_again(site: Site) -> None:
    served = site.serve(range(6))
    lane = site.lane(refresh=True)
    assert (await site.run(lane)).units["settled"] == 6
    assert (await site.run(lane)).units["found"] == 0
    site.server.serve("/2024-01-01-1.json.gz", archive())  # too old to be looked at again
    served |= site.serve(range(5, 6))
    report = await site.run(lane)
    assert (report.outcome, report.units["settled"]) == ("settled", 1)
    assert site.landed() == served


async def test_refresh_keeps_what_was_landed_and_taken_away(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(6))
    lane = site.lane(refresh=True)
    await site.run(lane)
    site.server.remove("/2024-01-01-5.json.gz")
    assert (await site.run(lane)).outcome == "settled"
    hours = await site.hours(lane)
    assert (hours["pending"], hours["bookmark"], hours["covered"]) == ({}, text(6), 6)
    site.clock.jump(hours=3)
    await site.run(lane)
    hours = await site.hours(lane)
    assert [text(5), text(5)] not in hours["missing"], "it is a unit: it cannot be a gap too"
    assert site.landed() == served


async def test_coverage_counts_a_period_once_and_none_before_the_start(quick_site: Site) -> None:
    site = quick_site
    site.serve(range(6))
    lane = site.lane(refresh=True, max_gap="7d")
    for page in (PAGE, PAGE + b"<!-- again -->"):
        site.server.serve("/2024-01-01-3.json.gz", page)
        assert (await site.run(lane)).units["dead"] == 1
    hours = await site.hours(lane)
    assert (len(hours["dead"]), hours["covered"]) == (2, 5), "two versions of one hour"
    assert (await site.hours(site.lane(start="2024-01-01T04", refresh=True)))["covered"] == 2


async def test_refresh_knows_versions_without_etags(quick_site: Site) -> None:
    site = quick_site
    first, second = ({"Last-Modified": f"Mon, 01 Jan 2024 0{n}:00:00 GMT"} for n in (6, 7))
    served = site.serve(range(6), etags=[""], headers=first)
    lane = site.lane(refresh=True)
    assert (await site.run(lane)).units["settled"] == 6
    assert (await site.run(lane)).units["found"] == 0
    served |= site.serve(range(5, 6), etags=[""], headers=second)
    report = await site.run(lane)
    assert (report.outcome, report.units["settled"]) == ("settled", 1)
    assert site.landed() == served


async def test_a_start_moved_back_covers_what_lies_before(site: Site) -> None:
    """Without asking again for what is covered; a gap among it, and more hours than are asked for at once."""
    site.clock.jump(hours=18)  # it is 24:01
    served = site.serve(range(24))
    for hour in (2, 22):
        site.server.remove(f"/2024-01-01-{hour}.json.gz")
        del served[f"2024-01-01-{hour}.json.gz"]
    later = site.lane(start="2024-01-01T21", max_gap="1h")
    assert (await site.run(later)).units["settled"] == 2
    lane = site.lane(max_gap="1h")
    hours = await site.hours(lane)
    assert (hours["start"], hours["covered"]) == (text(21), 2), "what nobody asked for is not covered"
    asked = len(site.asked("HEAD"))
    assert (await site.run(lane)).units["settled"] == 20
    assert len(site.asked("HEAD")) == asked + 21
    assert site.landed() == served
    hours = await site.hours(lane)
    assert (hours["start"], hours["next"], hours["covered"]) == (text(0), text(24), 22)
    assert hours["missing"] == [[text(2), text(2)], [text(22), text(22)]]
    assert (await site.run(lane)).units["found"] == 0


async def test_a_start_moved_on_leaves_out_what_lies_before(quick_site: Site) -> None:
    site = quick_site
    site.serve(range(6))
    site.server.remove("/2024-01-01-1.json.gz")
    site.server.serve("/2024-01-01-2.json.gz", b"", status=418)
    await site.run(site.lane(until="2024-01-01T03", max_gap="1h"))
    lane = site.lane(start="2024-01-01T04")
    hours = await site.hours(lane)
    assert (hours["bookmark"], hours["covered"], hours["pending"], hours["missing"]) == (text(4), 0, {}, [])
    asked = len(site.asked("HEAD"))
    assert (await site.run(lane)).units["settled"] == 2
    assert sorted(site.asked("HEAD")[asked:]) == [f"/2024-01-01-{n}.json.gz" for n in (4, 5)]
    assert (await site.hours(lane))["covered"] == 2
    served = site.serve(range(6))
    assert (await site.run(site.lane())).units["settled"] == 3, "back again: 1, 2 and 3 were never landed"
    assert site.landed().keys() == served.keys()


async def test_an_earlier_span_apart_from_what_is_covered(quick_site: Site) -> None:
    site = quick_site
    served = site.serve(range(6))
    await site.run(site.lane(start="2024-01-01T04"))
    assert (await site.run(site.lane(until="2024-01-01T02"))).units["settled"] == 2
    assert (await site.run(site.lane())).units["settled"] == 2
    assert site.landed() == served
    assert (await site.hours(site.lane()))["covered"] == 6


async def test_refresh_supersedes_the_version_that_is_gone(quick_site: Site) -> None:
    """Replaced between its discovery and its landing: the registered version ends as superseded."""
    site = quick_site
    data = archive()
    # HEAD tells the first ETag, every GET the second one.
    path = "/2024-01-01-0.json.gz"
    site.server.serve(path, data, etags=['"v1"'])
    lane = site.lane(until="2024-01-01T01", refresh=True, max_gap="7d")
    async with site.app(lane) as app:
        real = app.connections.store

        async def store(url: str) -> Any:
            found = await real(url)
            if url.startswith("file"):  # the first thing that a landing opens after its source
                site.server.serve(path, data, etags=['"v2"'])
            return found

        app.connections.store = store  # type: ignore[method-assign]  # the moment between the two
        report = await run_once(app, lane)
    assert report.units["superseded"] == 1
    assert report.outcome == "settled"
    assert site.landed() == {}
    assert (await site.run(lane)).units["settled"] == 1
    assert site.landed() == {"2024-01-01-0.json.gz": data}


# --------------------------------------------------------------------------- proof


async def test_length_alone_is_trusted_when_told_to(quick_site: Site) -> None:
    site = quick_site
    cut = archive()[:-9]
    site.server.serve("/2024-01-01-0.json.gz", cut)
    assert (await site.run(site.lane(until="2024-01-01T01", verify="length"))).outcome == "settled"
    assert site.landed() == {"2024-01-01-0.json.gz": cut}


async def test_length_alone_is_no_proof_where_there_is_none(quick_site: Site) -> None:
    site = quick_site
    site.server.serve("/2024-01-01-0.json.gz", archive(), length=-1)
    report = await site.run(site.lane(until="2024-01-01T01", verify="length"))
    assert "neither a length nor a checksum" in report.dead[0]["reason"]
    assert site.landed() == {}


async def test_an_error_page_is_no_data_even_where_length_is_trusted(quick_site: Site) -> None:
    site = quick_site
    site.server.serve("/2024-01-01-0.json.gz", PAGE)
    report = await site.run(site.lane(until="2024-01-01T01", verify="length"))
    assert "not a .gz file" in report.dead[0]["reason"]
    assert site.landed() == {}


async def test_an_empty_body_is_no_archive(quick_site: Site) -> None:
    site = quick_site
    site.server.serve("/2024-01-01-0.json.gz", b"")
    report = await site.run(site.lane(until="2024-01-01T01"))
    assert report.units["dead"] == 1
    assert "empty" in report.dead[0]["reason"]


# --------------------------------------------------------------------------- secrets


async def test_secrets_in_headers_reach_the_server_and_nothing_else(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    canary = "canary-5f2c9d"
    monkeypatch.setenv("HUB_TOKEN", canary)
    site.serve(range(6))
    site.server.serve("/2024-01-01-1.json.gz", PAGE)
    site.server.serve("/2024-01-01-2.json.gz", b"", status=503)
    lane = site.lane(headers={"Authorization": "env://HUB_TOKEN", "X-Plain": "plain"})
    report = await site.run(lane)
    assert report.units["dead"] == 1
    assert {r.headers.get("authorization") for r in site.server.requests} == {canary}
    assert {r.headers.get("x-plain") for r in site.server.requests} == {"plain"}
    log = await site.log(lane)
    assert len(log) > 10
    assert not [event for event in log if canary.encode() in encode(event)]
    assert canary not in str(report.brief())
    assert canary not in caplog.text
    for file in site.folder.rglob("*"):
        assert not file.is_file() or canary.encode() not in file.read_bytes(), file


async def test_user_and_password_of_a_url_reach_the_server_and_nothing_else(site: Site) -> None:
    canary = "canary@7d1e"
    served = site.serve(range(2))
    site.server.serve("/2024-01-01-1.json.gz", b"", redirect=site.server.url("/there"))
    site.server.serve("/there", served["2024-01-01-1.json.gz"])
    url = site.server.url("/{t:%Y-%m-%d}-{t.hour}.json.gz").replace("//", "//user:canary%407d1e@")
    lane = site.lane(url=url, until="2024-01-01T02")
    assert (await site.run(lane)).outcome == "settled"
    assert site.landed() == served
    basic = b64encode(f"user:{canary}".encode()).decode()
    assert {r.headers.get("authorization") for r in site.server.requests} == {f"Basic {basic}"}
    for event in await site.log(lane):
        assert b"canary" not in encode(event)
        assert basic.encode() not in encode(event)
    with pytest.raises(ConfigError) as caught:
        site.lane(url=url.replace("{t:%Y-%m-%d}-{t.hour}", "always"))
    assert "canary" not in str(caught.value)
    site.server.requests.clear()
    other = http_archive(
        "other",
        url=url,
        start=DAY,
        until=DAY + timedelta(hours=1),
        to=site.lake.as_uri() + "/o",
        headers={"authorization": "Bearer mine"},
        policy=QUICK,
    )
    await site.run(other)
    assert {r.headers.get("authorization") for r in site.server.requests} == {"Bearer mine"}


async def test_a_secret_that_is_not_there_is_named(quick_site: Site) -> None:
    quick_site.serve(range(6))
    report = await quick_site.run(quick_site.lane(headers={"Authorization": "env://NO_SUCH_TOKEN"}))
    assert "env://NO_SUCH_TOKEN" in report.reason
    assert quick_site.server.requests == []


class _Vault:
    """Keeps a token which the server refuses from the ask of that number on, until it is fetched anew."""

    def __init__(self, site: Site, refuse_at: int, renewed: str) -> None:
        self.site, self.refuse_at, self.renewed = site, refuse_at, renewed
        self.token, self.asked, self.fetched = "the-old-token", 0, 0
        self.served = site.serve(range(6))

    async def get(self, reference: str, *, fresh: bool = False) -> str:
        """See ``ports.Secrets``."""
        self.asked += 1
        if fresh:
            self.fetched += 1
            self.token = self.renewed
        right = self.asked < self.refuse_at or self.token == "the-new-token"
        for name, body in self.served.items():
            self.site.server.serve(f"/{name}", body, status=200 if right else 401)
        return self.token

    def registry(self, monkeypatch: pytest.MonkeyPatch) -> Registry:
        """Where it is found under the scheme of one that keeps what it fetched."""

        @asynccontextmanager
        async def open_secrets(uri: str, environment: Environment) -> AsyncIterator[_Vault]:
            yield self

        @hookimpl
        def flowlane_provides() -> list[Provides]:
            return [Provides("secrets", "secretsmanager", "a_vault:open_secrets")]

        module = ModuleType("a_vault")
        vars(module).update(open_secrets=open_secrets, flowlane_provides=flowlane_provides)
        monkeypatch.setitem(sys.modules, "a_vault", module)
        return Registry({"builtin": plugins, "vault": module})


@pytest.mark.parametrize("refuse_at", [1, 2], ids=["found", "landed"])
@pytest.mark.parametrize("renewed", ["the-new-token", "the-old-token"])
async def test_a_token_that_was_rotated_costs_no_hour(
    quick_site: Site, monkeypatch: pytest.MonkeyPatch, refuse_at: int, renewed: str
) -> None:
    """One that was not is refused at once: there is nothing to try again with."""
    vault = _Vault(quick_site, refuse_at, renewed)
    lane = quick_site.lane(headers={"Authorization": "secretsmanager://hub"})
    async with open_application(
        [lane], quick_site.settings, clock=quick_site.clock, registry=vault.registry(monkeypatch)
    ) as app:
        report = await run_once(app, lane)
    if renewed == "the-new-token":
        assert report.outcome == "settled"
        assert quick_site.landed() == vault.served
    else:
        assert report.outcome == "failed"
        assert "401" in report.reason or report.units["dead"] == 6
        assert vault.fetched == (1 if refuse_at == 1 else 6)
        assert {quick_site.server.gets(f"/{name}") for name in vault.served} == {refuse_at - 1}


# --------------------------------------------------------------------------- two at once


class _Meeting:
    """A backend whose first reader of the bookmark waits there for the other process's."""

    def __init__(self, backend: Any, meet: asyncio.Barrier) -> None:
        self._backend = backend
        self._meet: asyncio.Barrier | None = meet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def last(self, streams: Any) -> Any:
        answer = await self._backend.last(streams)
        if streams == ["hub/bookmark"] and self._meet is not None:
            meet, self._meet = self._meet, None
            await meet.wait()
        return answer


async def test_two_runs_at_once_find_each_hour_once(site: Site) -> None:
    served = site.serve(range(6))
    lane = site.lane()
    meet = asyncio.Barrier(2)
    async with AsyncExitStack() as stack:
        apps = [await stack.enter_async_context(site.app(lane)) for _ in range(2)]
        for app in apps:
            app.engine.backend = _Meeting(app.engine.backend, meet)
        reports = await asyncio.gather(*(run_once(app, lane) for app in apps))
        assert await check(apps[0].backend, lane) == []
    assert [report.outcome for report in reports] == ["settled"] * 2
    assert sum(report.units["found"] for report in reports) == 6
    assert site.landed() == served
    assert len(site.asked("GET")) == 6
    assert len(site.asked("HEAD")) == 12, "both looked, the one that came second found it all known"


# --------------------------------------------------------------------------- settings that cannot be used


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "http://h/archive.gz"}, "same for every period"),
        ({"url": "http://h/{x}.gz"}, "cannot be filled in"),
        ({"url": "http://h/{t.nothing}.gz"}, "cannot be filled in"),
        ({"url": "http://h/{0}.gz"}, "cannot be filled in"),
        ({"url": "http://h/{t:%H.gz"}, "cannot be filled in"),
        ({"url": None}, "cannot be filled in"),
        ({"url": "http://h/all.gz?hour={t.hour}"}, "archives of different periods would land in"),
        ({"url": "http://h/{t.hour}/"}, "no file name"),
        ({"to": "file:///lake/{hour}/"}, "cannot be filled in"),
        ({"to": "/data/lake"}, "is no URL"),
        ({"to": Path("/data/lake")}, "is no URL"),
        ({"to": None}, "is no URL"),
        ({"url": "http://{t.hour}:pw@h/{t.hour}.gz"}, "put it into headers="),
        ({"step": "99999999d"}, "no second period before the year 10000"),
        ({"start": "9999-12-31T23"}, "no second period before the year 10000"),
        ({"start": "0001-01-01T00:00+05:00"}, "is no time"),
        ({"start": "yesterday"}, "is no time"),
        ({"start": 2024}, "is no time"),
        ({"until": "2023-12-31T00"}, "is not after start"),
        ({"until": "2024-01-01T00"}, "is not after start"),
        ({"step": "an hour"}, "is not a duration"),
        ({"step": "500ms"}, "whole seconds"),
        ({"start": "2024-01-01T00:00:00.5"}, "whole seconds"),
        ({"every": "often"}, "is not a duration"),
        ({"max_gap": "-1d"}, "is not a duration"),
        ({"verify": "hope"}, "must be content or length"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(options: dict[str, Any], said: str) -> None:
    good: dict[str, Any] = {
        "url": "https://data.gharchive.org/{t:%Y-%m-%d}-{t.hour}.json.gz",
        "start": "2024-01-01T00",
        "to": "file:///lake/",
    }
    assert http_archive("hub", **good).name == "hub"
    assert http_archive("hub", **{**good, "step": "3650d"}).name == "hub", "the calendar's end is far"
    with pytest.raises(ConfigError, match=said) as caught:
        http_archive("hub", **{**good, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "start",
    ["2024-01-01T00", "2024-01-01T00:00:00Z", "2024-01-01T02:00:00+02:00", datetime(2024, 1, 1), DAY],  # noqa: DTZ001
)
async def test_times_are_utc_unless_they_say_otherwise(quick_site: Site, start: str | datetime) -> None:
    quick_site.serve(range(1))
    lane = quick_site.lane(start=start, until=DAY + timedelta(hours=1))
    assert (await quick_site.run(lane)).units["settled"] == 1
    assert quick_site.landed().keys() == {"2024-01-01-0.json.gz"}


def _data(event: Event) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.json.decode(event.data)
    return data
