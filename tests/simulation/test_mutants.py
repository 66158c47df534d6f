"""Each guard, taken away from outside, makes a scenario fail that looks only at lake, table and log.

The scenarios return what they found wrong, and nothing as long as every guard is in place.
"""

from __future__ import annotations

import asyncio
import gzip
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from flowlane import Context, Event, Lane, Policy, Retryable, Unit
from flowlane import discovery as discovery_module
from flowlane import landing as landing_module
from flowlane.attempt import Attempt
from flowlane.backends.memory import MemoryBackend
from flowlane.conveyor import _Belt, _Line
from flowlane.engine import Engine
from flowlane.errors import VersionConflict
from flowlane.ports import Append, Bad, Batch, Commit, Committed, Delivery, ObjectInfo, Publish, Via
from flowlane.recipes import http_archive
from flowlane.state import Position, Transfer
from flowlane.testing import stores, tables
from flowlane.testing.channels import ShardedBackend
from flowlane.testing.clock import VirtualClock, VirtualLoop, run
from flowlane.testing.faults import CANCEL, DIE_AFTER, DIE_BEFORE, CrashAt, Faults, Process
from flowlane.testing.stores import Lake, Landing, Page
from tests.simulation.lab import Lab

POLICY = Policy(concurrency=2, retries=8, timeout=60.0, backoff=0.1, backoff_cap=0.2, lease=1.5)
#: Long enough for a slow one to be landed in several parts.
BODIES = [gzip.compress(random.Random(n).randbytes(20_000), mtime=0) for n in range(3)]
RECORDS = [{"n": n} for n in range(17)]


class Drop(Unit, key=("url",)):
    """Records to load."""

    url: str


def landing(process: Process) -> Sequence[Lane]:
    """``http_archive`` over three hours."""
    return [
        http_archive(
            "archive",
            url="web://archive/{t:%Y-%m-%d}-{t.hour}.json.gz",
            start="2024-01-01T00",
            until="2024-01-01T03",
            to="lake://raw/",
            policy=POLICY,
        )
    ]


def loading(process: Process) -> Sequence[Lane]:
    """One drop into one table, in four batches."""
    lane = Lane("load", policy=Policy(retries=8, lease=1.5, batch=5))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> Any:
        yield Drop(url="rows://drop")

    @lane.stage(on=Drop)
    async def load(event: Event, ctx: Context) -> None:
        await ctx.load(ctx.rows(event.data.url), to="table://orders")

    return [lane]


class Change(Unit, key=("customer", "n")):
    """Records to load in the order in which the changes of their customer come."""

    customer: str
    n: int


def changing(process: Process, via: Via = "queue") -> Sequence[Lane]:
    """Three changes of each of two customers, two of which fail at first."""
    lane = Lane("change", policy=POLICY)

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> Any:
        for n in range(3):
            for customer in "ab":
                yield Change(customer=customer, n=n)

    @lane.stage(on=Change, order="customer", via=via)
    async def apply(event: Event, ctx: Context) -> None:
        change = event.data
        if (change.customer, change.n) in (("a", 0), ("b", 1)) and ctx.attempts_left == POLICY.retries:
            raise Retryable("busy")
        await ctx.load(ctx.rows(f"rows://{change.customer}/{change.n}"), to="table://changes")

    return [lane]


def publish(lab: Lab, **page: Any) -> None:
    """What there is to land and to load."""
    for hour, body in enumerate(BODIES):
        lab.world.web.publish(f"web://archive/2024-01-01-{hour}.json.gz", Page(data=body, block=4096, **page))
    lab.world.tables.publish("rows://drop", [RECORDS])


def publish_changes(lab: Lab) -> None:
    """The rows of each change of each customer."""
    for customer in "ab":
        for n in range(3):
            rows = [{"customer": customer, "n": n, "row": row} for row in range(2)]
            lab.world.tables.publish(f"rows://{customer}/{n}", [rows])


def wrong_order(lab: Lab) -> list[str]:
    """Where the rows of a customer do not stand in the table in the order of its changes."""
    table = lab.world.tables.tables.get("table://changes")
    found = []
    for customer in "ab":
        order = [row["n"] for row in table.rows if row["customer"] == customer] if table else []
        found += [f"{customer}: {order}"] if order != [0, 0, 1, 1, 2, 2] else []
    return found


async def wrong(lab: Lab) -> list[str]:
    """What lake, table and log show that they should not."""
    found = await lab.violations()
    if (await lab.log()).lane.name == "archive":
        if lab.world.lake.objects != {
            f"lake://raw/2024-01-01-{hour}.json.gz": body for hour, body in enumerate(BODIES)
        }:
            found.append("the lake does not hold what the web had")
        if len(lab.world.lake.landings) != len(BODIES):
            found.append(f"{len(lab.world.lake.landings)} times something came to be seen in the lake")
    else:
        table = lab.world.tables.tables.get("table://orders")
        if table is None or table.rows != RECORDS:
            found.append("the table does not hold the records once each")
    return found


def first(attempts: Iterator[list[str]]) -> list[str]:
    """What the first attempt that went wrong found; nothing if all went well."""
    return next((found for found in attempts if found), [])


# --------------------------------------------------------------------------- the scenarios


def crashed(lanes: Callable[[Process], Sequence[Lane]]) -> list[str]:
    """A process dies at one of its port calls, another one takes over; for every call, before and after."""

    def one(number: int, mode: str) -> tuple[list[str], int]:
        faults = CrashAt(number, mode)

        async def main(loop: VirtualLoop) -> list[str]:
            lab = Lab(loop, lanes)
            publish(lab)
            stuck = await lab.until_done(lab.process(faults), lab.run(), faults=faults)
            return ([stuck] if stuck else []) + await wrong(lab)

        return run(main, seed=number), len(faults.calls)

    def all_of_them() -> Iterator[list[str]]:
        found, calls = one(0, "")
        yield found
        for number in range(1, calls + 1):
            for mode in (DIE_BEFORE, DIE_AFTER):
                yield one(number, mode)[0]

    return first(all_of_them())


def landing_crashed() -> list[str]:
    """See ``crashed``."""
    return crashed(landing)


def loading_crashed() -> list[str]:
    """See ``crashed``."""
    return crashed(loading)


def occupied() -> list[str]:
    """Something else stands already where an archive is to land."""
    theirs, url = b"not ours", "lake://raw/2024-01-01-0.json.gz"

    async def main(loop: VirtualLoop) -> list[str]:
        lab = Lab(loop, landing)
        publish(lab)
        lab.world.lake.objects[url] = theirs
        await lab.until_done(lab.process(), lab.run())
        return [] if lab.world.lake.objects[url] == theirs else ["what stood there is gone"]

    return run(main, seed=0)


def torn() -> list[str]:
    """A process dies at any of its callbacks, in the middle of whatever it does; another one takes over."""

    def one(fuse: int) -> tuple[list[str], int]:
        async def main(loop: VirtualLoop) -> tuple[list[str], int]:
            lab = Lab(loop, loading)
            publish(lab)
            process = lab.process()
            process.fate.fuse = fuse
            stuck = await lab.until_done(process, lab.run())
            return ([stuck] if stuck else []) + await wrong(lab), loop.steps

        return run(main, seed=0)

    def all_of_them() -> Iterator[list[str]]:
        found, steps = one(0)
        yield found
        for fuse in range(1, steps):
            yield one(fuse)[0]

    return first(all_of_them())


def zombies() -> list[str]:
    """A process stands still for longer than its lease while it lands slow archives, and then goes on, while
    another one has taken over."""

    def one(seed: int) -> list[str]:
        async def main(loop: VirtualLoop) -> list[str]:
            lab = Lab(loop, landing)
            publish(lab, pause=0.7)
            both = [lab.process(latency=0.3) for _ in range(2)]
            done = [loop.create_task(lab.until_done(process, lab.run())) for process in both]
            for _ in range(4):
                await asyncio.sleep(loop.rng.uniform(0.5, 2.5))
                frozen = loop.rng.choice(both)
                if not frozen.fate.frozen:
                    await frozen.freeze(loop.rng.uniform(1.6, 3.0))
            stuck = [text for task in done if (text := await task)]
            return stuck + await wrong(lab)

        return run(main, seed=seed)

    return first(one(seed) for seed in range(60))


def unfinished() -> list[str]:
    """A process dies right after any of its port calls. No sweep: another process is handed what the queue
    still holds, and once more everything that it ever held; every run must complete."""

    def one(number: int) -> tuple[list[str], int]:
        faults = CrashAt(number, DIE_AFTER)

        async def main(loop: VirtualLoop) -> list[str]:
            lab = Lab(loop, landing)
            publish(lab)
            lab.process(faults).start(lab.handle())
            await asyncio.sleep(2.0)
            lab.process().start(lab.handle())
            await asyncio.sleep(4.0)
            await lab.redeliver(lambda event: True)
            stuck = await lab.until_empty()
            return ([stuck] if stuck else []) + await wrong(lab)

        found = run(main, seed=number)
        return found, len(faults.calls)

    def all_of_them() -> Iterator[list[str]]:
        found, calls = one(0)
        yield found
        for number in range(1, calls + 1):
            yield one(number)[0]

    return first(all_of_them())


def conflicted() -> list[str]:
    """A unit is handed to a second process while the first one begins, because a lease was too short; one of
    them wins, and the first one dies. No sweep: the delivery must still be there."""

    class ShortLease(Faults):
        def chance(self, kind: str) -> bool:
            return kind == "short lease"

    def one(seed: int) -> list[str]:
        async def main(loop: VirtualLoop) -> list[str]:
            lab = Lab(loop, landing)
            publish(lab, pause=0.5)
            doomed = lab.process(ShortLease(), latency=0.2).start(lab.handle())
            lab.process(latency=0.2).start(lab.handle())
            await asyncio.sleep(loop.rng.uniform(1.0, 2.5))
            doomed.kill()
            stuck = await lab.until_empty("/hour/")
            return [stuck] if stuck else []

        return run(main, seed=seed)

    return first(one(seed) for seed in range(60))


def ordered() -> list[str]:
    """A process dies at one of its port calls, another one takes over; for every call. The rows of each
    customer must stand in the table in the order of its changes."""

    def one(number: int) -> tuple[list[str], int]:
        faults = CrashAt(number, DIE_AFTER)

        async def main(loop: VirtualLoop) -> list[str]:
            lab = Lab(loop, changing)
            publish_changes(lab)
            stuck = await lab.until_done(lab.process(faults), lab.run(), faults=faults)
            return ([stuck] if stuck else []) + wrong_order(lab) + await lab.violations()

        return run(main, seed=number), len(faults.calls)

    def all_of_them() -> Iterator[list[str]]:
        found, calls = one(0)
        yield found
        for number in range(1, calls + 1):
            yield one(number)[0]

    return first(all_of_them())


def conveyed() -> list[str]:
    """The changes are carried by a channel. A process dies or is cancelled at one of its port calls, another
    one goes on; for every call. No sweep: what is not done must still be in the channel."""
    return _conveyed(MemoryBackend, (DIE_AFTER, CANCEL))


def conveyed_by_shards() -> list[str]:
    """As ``conveyed``, by a stream of shards."""
    return _conveyed(ShardedBackend, (CANCEL, DIE_AFTER))


def _conveyed(backend: Callable[[VirtualClock], MemoryBackend], modes: Sequence[str]) -> list[str]:
    def one(number: int) -> tuple[list[str], int]:
        faults = CrashAt(number, modes[number % len(modes)])

        async def main(loop: VirtualLoop) -> list[str]:
            lab = Lab(loop, lambda process: changing(process, "channel"))
            lab.memory = lab.backend = backend(lab.clock)
            publish_changes(lab)
            both = [lab.process(faults).start(lab.handle())]
            await asyncio.sleep(2.0)
            both.append(lab.process().start(lab.handle()))
            await asyncio.sleep(10.0)  # until all are found
            stuck = await lab.until_empty("/change/")
            for process in both:
                process.kill()
            await asyncio.sleep(0)
            return ([stuck] if stuck else []) + wrong_order(lab)

        return run(main, seed=number), len(faults.calls)

    def all_of_them() -> Iterator[list[str]]:
        found, calls = one(0)
        yield found
        for number in range(1, calls + 1):
            yield one(number)[0]

    return first(all_of_them())


def truncated() -> list[str]:
    """An archive is cut at its source, its length claiming that this is all: it must not be in the lake."""

    async def main(loop: VirtualLoop) -> list[str]:
        lab = Lab(loop, landing)
        publish(lab, cut=len(BODIES[0]) - 9, cuts=-1)
        stuck = await lab.until_done(lab.process(), lab.run())
        found = [stuck] if stuck else []
        return found + [f"{url} is in the lake" for url in lab.world.lake.objects]

    return run(main)


# --------------------------------------------------------------------------- the mutants

Patch = pytest.MonkeyPatch


def no_fence_in_the_log(patch: Patch) -> None:
    """Appends ignore the versions they expect."""
    whole = MemoryBackend.commit

    async def anyway(self: MemoryBackend, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        answers: list[Committed | VersionConflict] = []
        for commit in work:
            heads = await self.last([append.stream for append in commit.appends])
            answers += await whole(
                self, [msgspec.structs.replace(commit, appends=[behind(a, heads) for a in commit.appends])]
            )
        return answers

    def behind(append: Append, heads: Mapping[str, Event]) -> Append:
        head = heads.get(append.stream)
        version = head.version if head else 0
        events = [
            msgspec.structs.replace(event, version=version + n) for n, event in enumerate(append.events, 1)
        ]
        return Append(append.stream, version, events)

    patch.setattr(MemoryBackend, "commit", anyway)


def no_fence_in_the_store(patch: Patch) -> None:
    """Anybody may go on writing to an upload that somebody else has taken over."""

    def mine(self: Any) -> Any:
        return self._part

    patch.setattr(stores._MemoryUpload, "_mine", mine)


def several_commits(patch: Patch) -> None:
    """Ack, append, publish and tally, one after another."""
    whole = MemoryBackend.commit

    async def pieces(self: MemoryBackend, work: Sequence[Commit]) -> Sequence[Committed | VersionConflict]:
        answers: list[Committed | VersionConflict] = []
        for commit in work:
            (answer,) = await whole(self, [Commit(appends=commit.appends)])
            if isinstance(answer, Committed):
                await asyncio.sleep(0)
                await whole(self, [Commit(ack=commit.ack)])
                await asyncio.sleep(0)
                await whole(self, [Commit(publish=commit.publish)])
                await asyncio.sleep(0)
                (answer,) = await whole(self, [Commit(tally=commit.tally)])
            answers.append(answer)
        return answers

    patch.setattr(MemoryBackend, "commit", pieces)


def no_repeated_obligations(patch: Patch) -> None:
    """Whoever finds a unit settled acks, and that is that."""

    async def nothing(self: Engine, head: Event) -> None:
        return None

    patch.setattr(Engine, "repeat_obligations", nothing)


def ack_on_conflict(patch: Patch) -> None:
    """Whoever comes second believes that the first will see to it."""

    async def conflict(self: Engine, delivery: Delivery) -> str:
        await delivery.ack()
        return "settled"

    patch.setattr(Engine, "conflict", conflict)


def position_before_effect(patch: Patch) -> None:
    """That an object is whole and visible is logged, then it is made so."""
    publish = landing_module._Copy.publish

    async def logged_first(self: Any) -> ObjectInfo:
        self.state = Transfer(position=Position(self.offset, 0, self.crc), done=True)
        await self.log("batch.written")
        return await publish(self)

    patch.setattr(landing_module._Copy, "publish", logged_first)


def one_token_for_all(patch: Patch) -> None:
    """Every attempt of a unit has the same token."""

    async def start(self: Attempt) -> None:
        if not self.started:
            self.progress.attempt += 1
            self.progress.token = 1
            await self._append("attempt.started")
            self.started = True

    patch.setattr(Attempt, "start", start)


def no_proof(patch: Patch) -> None:
    """What is landed is not decoded on the way."""

    class Believer:
        def feed(self, block: bytes) -> None: ...

        def close(self) -> None: ...

    patch.setattr(landing_module, "prove", lambda name: Believer())


def uploads_replace(patch: Patch) -> None:
    """An upload appears again, and over what stands there."""

    def land(self: Lake, url: str, owner: str, data: bytes, *, overwrite: bool) -> ObjectInfo:
        self.objects[url] = data
        self.landings.append(Landing(url, owner, data))
        return ObjectInfo(url, len(data))

    patch.setattr(Lake, "land", land)


def batches_taken_twice(patch: Patch) -> None:
    """The sink takes whatever comes, wherever it stands."""

    async def write(self: tables.TableWriter, batch: Batch) -> Sequence[Bad]:
        self._table.rows += batch.records
        return ()

    patch.setattr(tables.TableWriter, "write", write)


def no_groups(patch: Patch) -> None:
    """The queue is told nothing of groups."""
    patch.setattr(discovery_module, "group_of", lambda unit, order: "")


def groups_in_a_heap(patch: Patch) -> None:
    """A group hands out all that it has, though its first is not settled."""

    def line_up(self: MemoryBackend, publish: Publish) -> None:
        self._put(publish.event, publish.stage, 0, publish.delay, publish.group)
        self._queues[publish.stage].behind.setdefault(publish.group, deque())

    def move_up(self: MemoryBackend, stage: str, group: str) -> None:
        return None

    patch.setattr(MemoryBackend, "_line_up", line_up)
    patch.setattr(MemoryBackend, "_move_up", move_up)


def retried_behind_its_group(patch: Patch) -> None:
    """A retry of a stage with an order key is another message, as of any other stage."""

    def postpone(self: Attempt, kind: str, delay: float, reason: str = "") -> Commit:
        self.ending = (kind, delay, reason)
        self.progress.reason, self.progress.delay = reason, delay
        self.final = self._make_counting(kind)
        commit = self._commit(self.final, (), ack=self.delivery, again=delay)
        behind = [msgspec.structs.replace(p, group=p.event.partitionkey) for p in commit.publish]
        return msgspec.structs.replace(commit, publish=behind)

    patch.setattr(Attempt, "postpone", postpone)


def settled_past_what_is_not_done(patch: Patch) -> None:
    """Who stops settles all of a channel's batch, whatever of it is not done."""
    patch.setattr(_Belt, "prefix", property(lambda self: len(self.done)))


def handed_out_in_a_heap(patch: Patch) -> None:
    """The records of a batch are handed out beside one another, whatever their keys."""

    def each_by_itself(self: Any, batch: Any, attempt: int, now: float) -> None:
        init(self, batch, attempt, now)
        self.lines = {}
        for place in range(len(batch.records)):
            line = self.lines[str(place)] = _Line(self)
            line.places.append(place)

    init = _Belt.__init__
    patch.setattr(_Belt, "__init__", each_by_itself)


SCENARIOS = (
    conveyed,
    conveyed_by_shards,
    ordered,
    landing_crashed,
    loading_crashed,
    occupied,
    torn,
    zombies,
    unfinished,
    conflicted,
    truncated,
)
MUTANTS: Sequence[tuple[Callable[[Patch], None], Callable[[], list[str]]]] = (
    (no_fence_in_the_log, zombies),
    (no_fence_in_the_store, zombies),
    (several_commits, torn),
    (no_repeated_obligations, unfinished),
    (ack_on_conflict, conflicted),
    (position_before_effect, landing_crashed),
    (one_token_for_all, zombies),
    (no_proof, truncated),
    (uploads_replace, occupied),
    (batches_taken_twice, loading_crashed),
    (no_groups, ordered),
    (groups_in_a_heap, ordered),
    (retried_behind_its_group, ordered),
    (settled_past_what_is_not_done, conveyed),
    (settled_past_what_is_not_done, conveyed_by_shards),
    (handed_out_in_a_heap, conveyed),
)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_goes_wrong_with_every_guard_in_place(scenario: Callable[[], list[str]]) -> None:
    assert scenario() == []


@pytest.mark.parametrize(("mutant", "scenario"), MUTANTS)
def test_a_guard_that_is_missing_is_missed(
    mutant: Callable[[Patch], None], scenario: Callable[[], list[str]], monkeypatch: Patch
) -> None:
    mutant(monkeypatch)
    assert scenario() != []
