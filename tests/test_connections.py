"""Rotated secrets: what is refused for its credentials is opened again with new ones, and asked for once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import ModuleType
from typing import Any, cast

import pytest

from flowlane import ConfigError, Context, Event, Lane, Permanent, Policy, Unit, plugins, veil
from flowlane.clock import SystemClock
from flowlane.compose import open_application
from flowlane.connections import IDLE, OpenConnections
from flowlane.errors import Unauthorized
from flowlane.hookspecs import Provides, hookimpl
from flowlane.plugins import Registry
from flowlane.ports import Environment
from flowlane.settings import Settings
from flowlane.state import progress
from flowlane.veil import conceal
from flowlane.worker import run_once

OLD, NEW = "the-old-password", "the-new-password"
PG = "pg://host/db?table=t&password=vault%3A%2F%2Fpg"


class Outside:
    """A vault, which keeps what it fetched, and a database, which knows one password at a time."""

    def __init__(self) -> None:
        self.stored = self.kept = self.accepted = OLD
        self.fetched = 0
        self.tried: list[str] = []
        self.closed = 0

    def rotate(self) -> None:
        self.stored = self.accepted = NEW

    def check(self, password: str) -> None:
        self.tried.append(password)
        if password != self.accepted:
            raise Unauthorized(f"pg://host/db: the password {password} is refused")


OUTSIDE = Outside()


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    OUTSIDE.__init__()  # type: ignore[misc]  # the plugin is found by its module, which is imported once
    monkeypatch.setattr(veil, "_known", {})


class Vault:
    async def get(self, reference: str, *, fresh: bool = False) -> str:
        assert reference == "vault://pg"
        if fresh:
            OUTSIDE.fetched += 1
            OUTSIDE.kept = OUTSIDE.stored
        return OUTSIDE.kept


class Pool:
    """What a driver's pool is: connections are made when they are needed, with the password of the start."""

    def __init__(self, password: str) -> None:
        self.password = password

    async def query(self) -> str:
        OUTSIDE.check(self.password)
        return "rows"

    async def send(self, subject: str, text: str, *, idempotency_key: str) -> None:
        OUTSIDE.check(self.password)


@asynccontextmanager
async def open_vault(uri: str, environment: Environment) -> AsyncIterator[Vault]:
    yield Vault()


@asynccontextmanager
async def open_eager(
    uri: str, environment: Environment, *, password: str, table: str = ""
) -> AsyncIterator[Pool]:
    OUTSIDE.check(password)
    try:
        yield Pool(password)
    finally:
        OUTSIDE.closed += 1


@asynccontextmanager
async def open_lazy(
    uri: str, environment: Environment, *, password: str, table: str = ""
) -> AsyncIterator[Pool]:
    try:
        yield Pool(password)
    finally:
        OUTSIDE.closed += 1


@asynccontextmanager
async def open_broken(uri: str, environment: Environment, *, password: str) -> AsyncIterator[Pool]:
    yield Pool(password)
    raise OSError(f"gone with {password}")


@hookimpl
def flowlane_provides() -> Sequence[Provides]:
    kinds: tuple[Any, ...] = ("source", "sink", "notifier", "store", "backend")
    return [
        Provides("secrets", "vault", f"{__name__}:open_vault"),
        Provides("sink", "broken", f"{__name__}:open_broken"),
        *(Provides(kind, "pg", f"{__name__}:open_eager") for kind in kinds),
        *(Provides(kind, "lazy", f"{__name__}:open_lazy") for kind in kinds),
    ]


def registry() -> Registry:
    plugin = ModuleType("a_plugin")
    vars(plugin)["flowlane_provides"] = flowlane_provides
    return Registry({"builtin": plugins, "mine": plugin})


@asynccontextmanager
async def connections() -> AsyncIterator[OpenConnections]:
    async with AsyncExitStack() as stack:
        yield OpenConnections(registry(), SystemClock(), stack, allow_private=False)


@asynccontextmanager
async def opened(made: OpenConnections, kind: str, url: str) -> AsyncIterator[Pool]:
    """`url` as `kind`, however that is opened."""
    if kind == "store":
        yield cast("Any", await made.store(url))
        return
    options: tuple[Any, ...] = ({},) if kind in ("source", "sink") else ()
    async with getattr(made, kind)(url, *options) as pool:
        yield pool


async def refused(made: OpenConnections, url: str) -> Any:
    """The sink at `url`, in whose context a query was refused."""
    used: list[Any] = []
    try:
        async with made.sink(url, {}) as sink:
            used.append(sink)
            await used[0].query()
    except Unauthorized:
        return used[0]
    raise AssertionError("it was not refused")


# --------------------------------------------------------------------------- refused when opening


@pytest.mark.parametrize("kind", ["source", "sink", "notifier", "store", "backend"])
async def test_what_rejects_the_old_password_is_opened_with_the_new_one(kind: str) -> None:
    OUTSIDE.rotate()
    async with connections() as made, opened(made, kind, PG) as pool:
        assert await pool.query() == "rows"
    assert OUTSIDE.tried == [OLD, NEW, NEW]
    assert OUTSIDE.fetched == 1
    assert OUTSIDE.closed == 1


@pytest.mark.parametrize("kind", ["source", "sink", "notifier", "store", "backend"])
async def test_what_rejects_the_one_there_is_is_not_asked_again_in_vain(kind: str) -> None:
    OUTSIDE.accepted = "some-other-password"
    async with connections() as made:
        with pytest.raises(Unauthorized) as caught:
            async with opened(made, kind, PG):
                pass
    assert OUTSIDE.tried == [OLD], "a second try with the same password may lock the account"
    assert OUTSIDE.fetched == 1
    assert str(caught.value) == "pg://host/db: the password *** is refused"


async def test_a_password_that_is_written_down_is_tried_once() -> None:
    async with connections() as made:
        with pytest.raises(Unauthorized) as caught:
            async with made.sink("pg://host/db?password=written-down", {}):
                pass
    assert (OUTSIDE.tried, OUTSIDE.fetched) == (["written-down"], 0)
    assert "written-down" not in str(caught.value)


async def test_what_is_held_open_shows_no_password() -> None:
    url = PG.replace("pg://host", "pg://user:written-down@host")
    async with connections() as made:
        async with made.sink(url, {}):
            assert OUTSIDE.tried == [OLD]
        assert OLD not in repr(vars(made))
        assert "written-down" not in repr(vars(made))


# --------------------------------------------------------------------------- refused later


async def test_what_is_refused_at_work_goes_on_with_the_new_one_at_the_next_try() -> None:
    lazy = PG.replace("pg://", "lazy://", 1)
    async with connections() as made:
        async with made.sink(lazy, {}) as before:
            await cast("Any", before).query()
        OUTSIDE.rotate()
        async with made.sink(lazy, {}):
            assert await refused(made, lazy) is before, "it is kept while it does its work"
            assert OUTSIDE.closed == 0, "others may be at work with the old one still"
        assert OUTSIDE.closed == 1
        async with made.sink(lazy, {}) as sink:
            assert await cast("Any", sink).query() == "rows"
        async with made.sink(lazy, {}) as again:
            assert again is sink
        assert OUTSIDE.fetched == 1
        assert OUTSIDE.closed == 1
    assert OUTSIDE.closed == 2


async def test_a_refusal_among_several_errors_is_one() -> None:
    lazy = PG.replace("pg://", "lazy://", 1)

    async def both(sink: Any) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sink.query())
            tasks.create_task(sink.query())

    async with connections() as made:
        async with made.sink(lazy, {}) as sink:
            await both(sink)
        OUTSIDE.rotate()
        with pytest.raises(ExceptionGroup):
            async with made.sink(lazy, {}) as sink:
                await both(sink)
        async with made.sink(lazy, {}) as sink:
            await both(sink)


async def test_who_is_refused_late_does_not_throw_away_what_works() -> None:
    """Of several that hold the old pool, the first that is refused has it replaced, and no other one has the
    new pool replaced."""
    lazy = PG.replace("pg://", "lazy://", 1)
    async with connections() as made:
        contexts = [made.sink(lazy, {}) for _ in range(3)]
        old = [await context.__aenter__() for context in contexts]
        OUTSIDE.rotate()
        seen: set[int] = set()
        for context in contexts:
            error = Unauthorized("the old password is refused")
            assert not await context.__aexit__(Unauthorized, error, None)
            async with made.sink(lazy, {}) as new:
                seen.add(id(new))
        assert len(seen) == 1
        assert not seen & {id(each) for each in old}
    assert OUTSIDE.closed == 2


async def test_a_pool_that_is_refused_in_vain_is_kept() -> None:
    lazy = PG.replace("pg://", "lazy://", 1)
    OUTSIDE.accepted = "some-other-password"
    async with connections() as made:
        for _ in range(5):
            with pytest.raises(Unauthorized):
                async with made.sink(lazy, {}) as sink:
                    await cast("Any", sink).query()
    assert OUTSIDE.closed == 1, "or a worker would hold one more with every attempt"


async def test_that_the_vault_is_away_does_not_hide_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(self: Vault, reference: str, *, fresh: bool = False) -> str:
        if fresh:
            raise ConfigError("the vault is locked")
        return OLD

    monkeypatch.setattr(Vault, "get", away)
    OUTSIDE.accepted = NEW
    async with connections() as made:
        with pytest.raises(Unauthorized):
            async with made.notifier(PG.replace("pg://", "lazy://", 1)) as notifier:
                await notifier.send("s", "t", idempotency_key="k")


async def test_a_rotation_between_two_runs_costs_no_unit() -> None:
    """A lane's notifier, opened for each notice and refused at its first word, and a secret that a stage asks
    for itself: both go on with the new password."""
    used: list[str] = []
    lane = Lane(
        "toy",
        policy=Policy(notify=PG.replace("pg://", "lazy://", 1), backoff=0.001, backoff_cap=0.001),
    )

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        password = await ctx.secret("vault://pg")
        try:
            OUTSIDE.check(password)
        except Unauthorized:
            password = await ctx.secret("vault://pg", fresh=True)
            OUTSIDE.check(password)
        used.append(password)

    async with open_application([lane], Settings(backend="memory://"), registry=registry()) as app:
        await run_once(app, lane, slot="1")
        OUTSIDE.stored = OUTSIDE.accepted = NEW
        report = await run_once(app, lane, slot="2")
        assert report.outcome == "settled"
        notices = [
            head
            for run in ("1", "2")
            for head in (await app.backend.last([f"toy/notify/toy/run/{run}@0"])).values()
        ]
        assert [head.type for head in notices] == ["unit.settled", "unit.settled"]
    assert used == [OLD, NEW]


# --------------------------------------------------------------------------- errors that quote a secret


class Thing(Unit, key="n"):
    n: int


async def test_no_reason_in_the_log_quotes_a_secret(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that writes the password into its error: the log, the report and the log lines do not."""
    monkeypatch.setenv("TOKEN_OF_MINE", 'a canary, with "quotes"\nand lines')
    lane = Lane("toy", policy=Policy(retries=1, backoff=0.001, backoff_cap=0.001))

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        for n in range(4):
            yield Thing(n=n)

    @lane.stage(on=Thing)
    async def load(event: Event, ctx: Context) -> None:
        token = await ctx.secret("env://TOKEN_OF_MINE")
        kinds: list[Exception] = [
            Permanent(f"no good: {token}"),
            ValueError({"Authorization": token}),
            KeyError(token),
            ExceptionGroup("several", [OSError(5, f"https://x/?t={token}")]),
        ]
        raise kinds[event.data.n]

    caplog.set_level("DEBUG")
    async with open_application([lane], Settings(backend="memory://")) as app:
        report = await run_once(app, lane, slot="1")
        heads = await app.backend.last([f"toy/thing/{n}" for n in range(4)])
        everything = [bytes(event.data) async for event in app.backend.scan("toy")]
    reasons = [progress(head).reason for head in heads.values()]
    assert len(reasons) == len(report.dead) == 4
    assert all("***" in reason for reason in reasons), reasons
    for shown in (str(reasons), str(report.dead), caplog.text, *(data.decode() for data in everything)):
        assert "canary" not in shown


# --------------------------------------------------------------------------- kept, and closed


async def test_a_sink_for_each_unit_keeps_no_more_open_than_a_few() -> None:
    url = "lazy://host/{}?password=pw-of-the-test"
    async with connections() as made, made.sink(url.format("busy"), {}) as busy:
        async with made.sink(url.format("often"), {}) as often:
            pass
        for n in range(3 * IDLE):
            for name in (n, "often"):
                async with made.sink(url.format(name), {}):
                    pass
        assert OUTSIDE.closed == 3 * IDLE - (IDLE - 1)
        for name, kept in (("busy", busy), ("often", often), (3 * IDLE - 1, None)):
            async with made.sink(url.format(name), {}) as again:
                assert kept in (again, None)
        assert OUTSIDE.closed == 3 * IDLE - (IDLE - 1), "those were open still"
        assert len(made._locks) == 0
    assert OUTSIDE.closed == 3 * IDLE + 2


async def test_a_sink_that_cannot_be_closed_fails_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flowlane.connections.IDLE", 1)
    url = "broken://host/{}?password=pw-of-the-test"
    async with AsyncExitStack() as stack:
        made = OpenConnections(registry(), SystemClock(), stack, allow_private=False)
        for n in range(3):
            async with made.sink(url.format(n), {}):
                pass
        stack.pop_all()
    said = r"a sink could not be closed: OSError: gone with \*\*\* \(test_connections.py, line \d+, in \w+\)"
    messages = [record.getMessage() for record in caplog.records]
    assert [bool(re.fullmatch(said, message)) for message in messages] == [True] * 2, messages


# --------------------------------------------------------------------------- what is hidden


async def test_a_password_in_a_uri_is_hidden_as_it_is_and_as_it_is_escaped() -> None:
    async with connections() as made, made.sink(PG.replace("pg://", "lazy://u:p%40ssw%2food@", 1), {}):
        assert conceal("no login for u with p@ssw/ood (p%40ssw%2food)") == "no login for u with *** (***)"


async def test_of_a_secret_that_is_json_the_password_is_hidden_by_itself() -> None:
    OUTSIDE.kept = '{"username": "postgres", "password": "hunter22", "port": 5432, "engine": "postgres"}'
    async with connections() as made:
        assert await made.secret("vault://pg") == OUTSIDE.kept
    assert conceal("postgres refuses hunter22") == "postgres refuses ***"
    assert OUTSIDE.kept[20:] not in conceal(f"bad {OUTSIDE.kept}")
