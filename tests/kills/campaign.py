"""Two workers on one SQLite file, killed over and over, each time in the middle of something."""

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from flowlane.compose import Application, open_application
from flowlane.events import Event
from flowlane.recipes.http_archive import Bookmark
from flowlane.settings import Settings
from flowlane.state import fold
from flowlane.status import LogView
from flowlane.worker import run_once
from tests.kills import zygote
from tests.kills.victim import PHASES, START, Page, archive, lane_of, serve_archives, work

#: Seconds between two looks at what a worker is in the middle of; a commit takes some milliseconds.
_GLANCE = 0.0003
#: Seconds for which a worker that has begun to work is waited for to do what is aimed at; and for which it is
#: waited for to begin, which takes a while on a busy machine.
_PATIENCE, _STARTS = 2.0, 30.0
#: Of so many kills, one at least is to hit each phase.
_EACH_PHASE = 6
#: Hours that come before each start of a worker: about what two workers land until the next.
_EACH = 16


class Archives:
    """A server of archives, in a process of its own, at ``url``."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.url: str = pipe.recv()

    def quicken(self) -> None:
        """Serve them as fast as can be from now on."""
        self._pipe.send("fast")
        self._pipe.recv()


@contextmanager
def serving(hours: int, drip: float = 0.4) -> Iterator[Archives]:
    """The archives of so many hours, each served over `drip` seconds until told otherwise."""
    ours, theirs = zygote.context.Pipe()
    server = zygote.start(serve_archives, hours, drip, theirs)
    theirs.close()  # should the server end, it is not waited for
    try:
        yield Archives(ours)
    finally:
        server.kill()
        server.join()


class Killer:
    """Kills spread over effect, commit and ack, of two workers that held a delivery."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.hits: Counter[str] = Counter()
        self.misses = 0
        self.settings: dict[str, str] = {"backend": f"sqlite:///{folder}/flowlane.db"}

    def before_start(self) -> None:
        """Called before a worker is started, again or for the first time."""

    def kill(self, kills: int, until: float) -> None:
        """Kill so many times (and more, until each phase was hit), or until that moment of
        ``time.monotonic``."""
        workers: list[tuple[BaseProcess, Page]] = [self._start(n) for n in range(2)]
        try:
            while self._wanted(kills) and time.monotonic() < until:
                number = self.chance.randrange(2)
                process, page = workers[number]
                rarest = min(PHASES[1:], key=lambda phase: self.hits[phase])
                aim = rarest if self.chance.random() < 0.7 else self.chance.choice(PHASES[1:])
                self._strike(process, page, aim)
                workers[number] = self._start(number)
        finally:
            for process, _ in workers:
                process.kill()
                process.join()

    def _wanted(self, kills: int) -> bool:
        """Whether less than `kills` have hit, or too few of them one of the phases: on a busy machine a
        worker is often past what was aimed at when the signal comes."""
        least = min(self.hits[phase] for phase in PHASES[1:])
        return sum(self.hits.values()) < kills or least < kills // _EACH_PHASE

    def _start(self, number: int) -> tuple[BaseProcess, Page]:
        self.before_start()
        path = self.folder / f"page-{number}"
        path.write_bytes(bytes(4096))
        return zygote.start(work, self.settings, str(path)), Page(path)

    def _strike(self, process: BaseProcess, page: Page, aim: str) -> None:
        patience = time.monotonic() + _STARTS
        skip = self.chance.randrange(5)  # not always the first chance after the start
        begun = seen = False
        while time.monotonic() < patience and process.is_alive():
            for _ in range(200):
                now = page.read()
                if not begun and now["held"] > 0:
                    begun, patience = True, time.monotonic() + _PATIENCE
                on = now[aim] > 0
                if on and not seen:
                    skip -= 1
                seen = on
                if on and skip < 0:
                    break
                time.sleep(_GLANCE)  # the core is the workers'
            if seen and skip < 0:
                break
        process.kill()
        process.join()
        state = page.read()
        phase = next((p for p in ("ack", "commit", "effect") if state[p] > 0), "")
        if phase and state["held"] > 0:
            self.hits[phase] += 1
        else:
            self.misses += 1


class Campaign(Killer):
    """The kills of workers that land archives, `hours` at the most; then the reckoning."""

    def __init__(self, folder: Path, hours: int, seed: int) -> None:
        super().__init__(folder, seed)
        self.most = hours
        self.hours = 0

    @property
    def until(self) -> datetime:
        """The end of the lane's periods."""
        return datetime.fromisoformat(START) + timedelta(hours=self.hours)

    def run(self, kills: int, seconds: float) -> None:
        """Kill so many times (or until the time is up), then see everything through without kills."""
        with serving(self.most) as archives:
            self.settings |= {"url": archives.url, "lake": (self.folder / "lake").as_uri() + "/"}
            self.kill(kills, time.monotonic() + seconds)
            archives.quicken()
            asyncio.run(self._see_through())

    def before_start(self) -> None:
        """More hours have come: what is not landed when the kills are over is work that shows nothing."""
        self.hours = min(self.hours + _EACH, self.most)
        self.settings["until"] = self.until.isoformat()

    async def _see_through(self) -> None:
        """Let one undisturbed worker finish, then compare lake and log with what must be."""
        watched = lane_of(self.settings)
        settings = Settings(backend=self.settings["backend"], allow_private_hosts=True)
        async with open_application([watched], settings) as app:
            report = await run_once(app, watched)
            assert report.outcome == "settled", report
            await check_log(app, self.hours, self.until)
        self._check_lake()

    def _check_lake(self) -> None:
        lake = {
            path.name: path.read_bytes() for path in (self.folder / "lake").iterdir() if path.name[0] != "."
        }
        begin = datetime.fromisoformat(START)
        expected = {}
        for hour in range(self.hours):
            moment = begin + timedelta(hours=hour)
            expected[f"{moment:%Y-%m-%d}-{moment.hour}.json.gz"] = archive(hour)
        assert lake == expected


async def check_log(app: Application, hours: int, until: datetime) -> None:
    """Each of so many hours was settled once, each run completed once, nothing is open, and the bookmark is
    at `until`."""
    streams: dict[str, list[Event]] = {}
    async for event in app.backend.scan("kills"):
        streams.setdefault(event.subject, []).append(event)
    assert not [head.subject async for head in app.backend.units("kills", "open")]
    mark = await LogView(app.engine, "kills").recall(Bookmark)
    assert mark is not None
    assert datetime.fromisoformat(mark.next).replace(tzinfo=None) == until
    assert not mark.pending
    assert not mark.gaps
    units = {name: events for name, events in streams.items() if name.startswith("kills/hour/")}
    assert len(units) == hours
    for name, events in units.items():
        now, _ = fold(sorted(events, key=lambda event: event.version))
        assert now == "settled", name
        assert sum(event.type.startswith("unit.") for event in events) == 1, name
    for name, events in streams.items():
        if name.startswith("kills/run/"):
            assert sum(event.type == "run.completed" for event in events) == 1, name


def main() -> int:
    """``python -m tests.kills.campaign 500``: so many kills, then the reckoning."""
    kills = int(sys.argv[1])
    with TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), hours=500 + 20 * kills, seed=random.randrange(10**9))
        campaign.run(kills, seconds=3600)
        print(f"{sum(campaign.hits.values())} kills {dict(campaign.hits)}, {campaign.misses} hit nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
