"""The jobs that the simulator runs: real lanes on simulated stores, and what must have come of them.

A job publishes what there is to ingest, makes its lane for each process anew (releases may differ), and
judges the world once everything is at rest.
"""

from __future__ import annotations

import gzip
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import msgspec

from flowlane import events
from flowlane.errors import BadRecord
from flowlane.events import Event
from flowlane.lane import Lane, Policy, Unit
from flowlane.ports import Context, Record
from flowlane.recipes import http_archive
from flowlane.state import status
from flowlane.testing.oracle import Log
from flowlane.testing.stores import Page, World

#: When simulated time begins.
EPOCH = datetime(2024, 1, 1, 16, tzinfo=UTC)
ERROR_PAGE = b"<html><body>Something went wrong, please come back later. We are sorry.</body></html>"

Post = Callable[[str], Awaitable[None]]


class Job(Protocol):
    """One lane's world: see the module."""

    def publish(self, world: World) -> None: ...
    def lane(self, rng: random.Random, post: Post) -> Lane: ...
    def judge(self, world: World, log: Log) -> list[str]: ...


def policy(rng: random.Random, **more: Any) -> Policy:
    """A policy under which a simulation gets through within virtual minutes."""
    return Policy(
        concurrency=rng.choice((1, 2, 4)),
        retries=3,
        timeout=60.0,
        backoff=0.5,
        backoff_cap=4.0,
        lease=6.0,
        error_budget=1.0,
        quarantine="lake://quarantine/",
        **more,
    )


# --------------------------------------------------------------------------- archives


class Archives:
    """``http_archive`` over a few hours: good ones, slow and flaky ones, one that comes late, missing ones,
    one that is truncated for good, and one that is an error page."""

    name = "archive"
    hours = 8

    def __init__(self, rng: random.Random) -> None:
        kinds = ["good", "slow", "flaky", "truncated", "error page", "missing"]
        rng.shuffle(kinds)
        # The last two are recent enough to be waited for.
        self.kinds = kinds + rng.sample(["late", "missing", "good"], 2)
        self.bodies = [gzip.compress(rng.randbytes(rng.randrange(100, 700)), mtime=0) for _ in self.kinds]
        self.start = datetime(2024, 1, 1, tzinfo=UTC)
        self._rng = random.Random(rng.getrandbits(64))

    def key(self, hour: int) -> str:
        """What the archive of `hour` is called."""
        return f"2024-01-01-{hour}.json.gz"

    def publish(self, world: World) -> None:
        """See ``Job``."""
        for hour, (kind, body) in enumerate(zip(self.kinds, self.bodies, strict=True)):
            page = Page(data=body)
            if kind == "missing":
                continue
            if kind == "slow":
                page.pause = self._rng.choice((0.5, 2.0))
            elif kind == "flaky":
                page.busy, page.breaks, page.cut, page.cuts = 2, 2, len(body) // 2, 1
            elif kind == "truncated":
                page.cut, page.cuts = len(body) - 4, -1
            elif kind == "error page":
                page.data = ERROR_PAGE
            elif kind == "late":
                page.appears = (EPOCH + timedelta(minutes=30)).timestamp()
            world.web.publish(f"web://archive/{self.key(hour)}", page)

    def lane(self, rng: random.Random, post: Post) -> Lane:
        """See ``Job``."""
        return http_archive(
            self.name,
            url="web://archive/{t:%Y-%m-%d}-{t.hour}.json.gz",
            start=self.start,
            until=self.start + timedelta(hours=self.hours),
            to="lake://raw/",
            every="20s",
            max_gap="10h",
            policy=policy(rng),
        )

    def judge(self, world: World, log: Log) -> list[str]:
        """See ``Job``."""
        return self._judge_lake(world) + self._judge_units(log) + self._judge_bookmark(log)

    @property
    def landed(self) -> dict[str, bytes]:
        """What must be in the lake."""
        return {
            f"lake://raw/{self.key(hour)}": body
            for hour, (kind, body) in enumerate(zip(self.kinds, self.bodies, strict=True))
            if kind in ("good", "slow", "flaky", "late")
        }

    def _judge_lake(self, world: World) -> list[str]:
        lake = {url: data for url, data in world.lake.objects.items() if url.startswith("lake://raw/")}
        found = [f"{url} is not in the lake" for url in sorted(self.landed.keys() - lake.keys())]
        found += [f"{url} should not be in the lake" for url in sorted(lake.keys() - self.landed.keys())]
        found += [
            f"{url} has other bytes in the lake than it had"
            for url in sorted(lake.keys() & self.landed.keys())
            if lake[url] != self.landed[url]
        ]
        times = Counter(landing.url for landing in world.lake.landings if landing.url in lake)
        return found + [f"{url} came to be seen {n} times" for url, n in times.items() if n > 1]

    def _judge_units(self, log: Log) -> list[str]:
        wanted = {}
        for hour, kind in enumerate(self.kinds):
            if kind != "missing":
                end = "dead" if kind in ("truncated", "error page") else "settled"
                wanted[f"{self.name}/hour/{self._text(hour)}"] = end
        got = {name: status(stream[-1]) for name, stream in log.units("hour/").items()}
        return [] if got == wanted else [f"the hours ended {got}, and not {wanted}"]

    def _text(self, hour: int) -> str:
        return (self.start + timedelta(hours=hour)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def _judge_bookmark(self, log: Log) -> list[str]:
        """At every version: each hour before it is a unit, pending, or a gap, and only one of them; in the
        end it has passed all, nothing is pending, and the gaps are what is missing."""
        found: list[str] = []
        known: set[str] = set()
        mark: dict[str, Any] = {}
        for event in log.events:  # in a commit, units come before the bookmark
            if event.type == "hour":
                known.add(event.subject.rpartition("hour/")[2])
            if event.type != "bookmark":
                continue
            mark = msgspec.json.decode(event.data)
            gaps = {
                self._text(hour)
                for hour in range(self.hours)
                for first, last in mark.get("gaps", ())
                if first <= self._text(hour) <= last
            }
            for hour in range(self.hours):
                text = self._text(hour)
                places = (text in known) + (text in mark.get("pending", {})) + (text in gaps)
                if text < mark["next"] and places != 1:
                    found.append(f"bookmark {event.version} has passed {text}, which is in {places} places")
            if gaps - {self._text(hour) for hour, kind in enumerate(self.kinds) if kind == "missing"}:
                found.append(f"bookmark {event.version} has gaps that are none: {gaps}")
        if mark.get("next") != self._text(self.hours) or mark.get("pending"):
            found.append(f"the bookmark has not come through: {mark}")
        return found


# --------------------------------------------------------------------------- rows


class Orders(Unit, key=("url",), type="orders"):
    """One drop of records."""

    url: str


class Tables:
    """A lane of one's own: drops of records in several splits, mapped (kept, skipped, expanded, bad), loaded
    into one table, which refuses some; and people are told of it by a step."""

    name = "orders"
    drops = 6

    def __init__(self, rng: random.Random) -> None:
        self.splits = {
            f"rows://drop/{n}": [
                [{"drop": n, "split": s, "n": i} for i in range(rng.randrange(0, 30))]
                for s in range(rng.randrange(1, 3))
            ]
            for n in range(self.drops)
        }
        self.posted: Counter[str] = Counter()

    def publish(self, world: World) -> None:
        """See ``Job``."""
        for uri, splits in self.splits.items():
            world.tables.publish(uri, splits)

    def lane(self, rng: random.Random, post: Post) -> Lane:
        """See ``Job``; another release may cut batches differently."""
        lane = Lane(self.name, every="15s", policy=policy(rng, batch=rng.choice((3, 5, 7))))
        drops = list(self.splits)

        @lane.stage(on=lane.triggered)
        async def find(event: Event, ctx: Context) -> Any:
            for number, uri in enumerate(drops):
                if ctx.now() >= EPOCH + timedelta(seconds=10 * number):  # they come one after another
                    yield Orders(url=uri)

        @lane.stage(on=Orders)
        async def load(event: Event, ctx: Context) -> None:
            await ctx.load(ctx.rows(event.data.url).map(change), to="table://orders")

        async def announce(subject: str, *, idempotency_key: str) -> str:
            await post(f"{subject} {idempotency_key}")
            return subject

        async def tell(event: Event, ctx: Context) -> None:
            await ctx.step("announce", announce, event.data.run)

        lane.stage(on=lane.completed, name="tell-completed")(tell)
        lane.stage(on=lane.failed, name="tell-failed")(tell)

        @lane.stage(on=lane.dead)
        async def mourn(event: Event, ctx: Context) -> None:
            await ctx.step("announce", announce, event.data.unit)

        return lane

    def judge(self, world: World, log: Log) -> list[str]:
        """See ``Job``."""
        found = []
        table = world.tables.tables.get("table://orders")
        rows = table.rows if table else []
        wanted = [
            out for splits in self.splits.values() for split in splits for r in split for out in good(r)
        ]
        for drop, split in sorted({(r["drop"], r["split"]) for r in wanted}):
            mine = [r for r in wanted if (r["drop"], r["split"]) == (drop, split)]
            got = [r for r in rows if (r["drop"], r["split"]) == (drop, split)]
            if mine != got:
                found.append(f"drop {drop}, split {split}: {len(got)} rows in the table, not {len(mine)}")
        if len(rows) != len(wanted):
            found.append(f"{len(rows)} rows in the table, not {len(wanted)}")
        tokens: dict[tuple[str, str], int] = {}
        for write in table.writes if table else ():
            if write.token < tokens.get((write.unit, write.split), 0):
                found.append(f"{write}: a token that goes back")
            tokens[write.unit, write.split] = write.token
        return found + self._judge_units(log) + self._judge_quarantine(world)

    def _judge_units(self, log: Log) -> list[str]:
        ends = Counter(status(stream[-1]) for stream in log.units("orders/").values())
        found = [] if ends == {"settled": self.drops} else [f"the drops ended {dict(ends)}"]
        told = {
            name
            for prefix in ("notice/", "dead/")
            for name, stream in log.units(prefix).items()
            for event in stream
            if event.type == events.UNIT_SETTLED
        }
        keys = {text.partition(" ")[2].rpartition("#")[0] for text in self.posted}
        if told - keys:
            found.append(f"nobody was told of {sorted(told - keys)}")
        return found

    def _judge_quarantine(self, world: World) -> list[str]:
        lines = [
            msgspec.json.decode(line)
            for url, data in world.lake.objects.items()
            if url.startswith("lake://quarantine/")
            for line in data.splitlines()
        ]
        wanted = sum(bad(r) for splits in self.splits.values() for split in splits for r in split)
        return [] if len(lines) == wanted else [f"{len(lines)} records in quarantine, not {wanted}"]


def change(record: Record) -> Record | list[Record] | None:
    """What the lane does to each record; pure."""
    kind = record["n"] % 10
    if kind == 3:
        return None
    if kind == 5:
        raise BadRecord("it is a five")
    if kind == 7:
        return [{**record, "part": 1}, {**record, "part": 2}]
    return {**record, "refuse": True} if kind == 8 else record


def bad(record: Record) -> bool:
    """Whether the record belongs into quarantine."""
    return record["n"] % 10 in (5, 8)


def good(record: Record) -> list[Record]:
    """The rows that come of `record`."""
    if bad(record):
        return []
    changed = change(record)
    return changed if isinstance(changed, list) else [changed] if changed else []
