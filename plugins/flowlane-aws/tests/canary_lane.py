"""The lanes of ``test_canaries.py``: every way in which a stage may fail with secrets in its hands.

``LANE_NOTIFY``: its notifier. ``LANE_CLOSED``: a URL that nobody answers. ``LANE_HERE``: a folder.
``LANE_LITERAL``: a secret that is written into URIs, percent-encoded.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

from flowlane import BadRecord, Context, Event, Lane, Permanent, Policy, Retryable, Superseded, Unit
from flowlane.recipes import http_archive

DATABASE = "secretsmanager://db?key=password"
TOKEN = "env://TOKEN"
NOTIFY, CLOSED = os.environ["LANE_NOTIFY"], os.environ["LANE_CLOSED"]
HERE, LITERAL = os.environ["LANE_HERE"], os.environ["LANE_LITERAL"]
lane = Lane(
    "toy",
    policy=Policy(
        retries=1,
        backoff=0.001,
        backoff_cap=0.001,
        notify=NOTIFY,
        error_budget=1.0,
        quarantine=f"file://{HERE}/quarantine/",
    ),
)


class Thing(Unit, key="n"):
    n: int


@lane.stage(on=lane.triggered)
async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
    for n in range(len(WAYS)):
        yield Thing(n=n)


@lane.stage(on=Thing)
async def load(event: Event, ctx: Context) -> Any:
    password, token = await ctx.secret(DATABASE), await ctx.secret(TOKEN)
    return await WAYS[event.data.n](ctx, password, token)


@lane.stage(on=lane.failed, retries=0)
async def tell(event: Event, ctx: Context) -> None:
    raise Permanent(await ctx.secret(DATABASE))


@lane.stage(on=lane.dead, retries=0)
async def bury(event: Event, ctx: Context) -> None:
    raise KeyError(await ctx.secret(TOKEN))


async def permanent(ctx: Context, password: str, token: str) -> None:
    raise Permanent(f"login as x with {password} failed")


async def retryable(ctx: Context, password: str, token: str) -> None:
    raise Retryable(token) from ValueError(password)


async def superseded(ctx: Context, password: str, token: str) -> None:
    raise Superseded(token)


async def unknown(ctx: Context, password: str, token: str) -> None:
    try:
        raise OSError(5, password)
    except OSError as error:
        raise KeyError({"Authorization": token}) from error


async def in_a_group(ctx: Context, password: str, token: str) -> None:
    async def fail() -> None:
        raise ValueError(f"https://u:{password}@host/?t={token}")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(fail())
        tasks.create_task(fail())


async def in_scope(ctx: Context, password: str, token: str) -> None:
    headers = {"Authorization": token, "X": password}
    del headers["Cookie"]


async def in_a_step(ctx: Context, password: str, token: str) -> None:
    async def call(value: str, *, idempotency_key: str) -> None:
        raise RuntimeError(f"{idempotency_key}: {value} is refused")

    await ctx.step("call", call, password)


async def returned(ctx: Context, password: str, token: str) -> Any:
    return {"password": password}


async def skipped(ctx: Context, password: str, token: str) -> None:
    ctx.skip(f"with {password} there is nothing to do")


async def exits(ctx: Context, password: str, token: str) -> None:
    raise SystemExit(token)


async def logged(ctx: Context, password: str, token: str) -> None:
    logging.getLogger("flowlane").warning("it is %s", password)
    logging.getLogger("a.driver").error("connecting with %s", token)
    try:
        raise OSError(5, password)
    except OSError:
        logging.getLogger("a.driver").exception("it broke")
        logging.getLogger("flowlane").exception("it broke")


async def never_awaited(ctx: Context, password: str, token: str) -> None:
    async def fail() -> None:
        raise RuntimeError(token)

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    del task


async def missing(ctx: Context, password: str, token: str) -> None:
    await ctx.secret("secretsmanager://none?key=" + "x")


async def no_field(ctx: Context, password: str, token: str) -> None:
    await ctx.secret("secretsmanager://db?key=none")


async def no_json(ctx: Context, password: str, token: str) -> None:
    await ctx.secret("secretsmanager://plain?key=none")


async def refused_connection(ctx: Context, password: str, token: str) -> None:
    url = CLOSED + f"/x.gz?signature={LITERAL}"
    await ctx.copy(url, to=f"file://{HERE}/lake/x.gz", headers={"Authorization": token, "Cookie": password})


async def bad_header(ctx: Context, password: str, token: str) -> None:
    await ctx.head(CLOSED + "/y", headers={"Authorization": token + chr(10) + "Injected: " + password})


async def sink_with_a_bad_option(ctx: Context, password: str, token: str) -> None:
    rows = ctx.rows(f"file://{HERE}/rows.jsonl")
    await ctx.load(rows, to=f"sqlite:///{HERE}/t.db?table=t&mode=env%3A%2F%2FTOKEN")


async def sink_with_a_strange_table(ctx: Context, password: str, token: str) -> None:
    rows = ctx.rows(f"file://{HERE}/rows.jsonl")
    await ctx.load(rows, to=f"sqlite:///{HERE}/t.db?table=secretsmanager%3A%2F%2Fplain&mode=upsert&key=no")


async def sink_with_an_unknown_option(ctx: Context, password: str, token: str) -> None:
    rows = ctx.rows(f"file://{HERE}/rows.jsonl")
    await ctx.load(rows, to=f"sqlite:///{HERE}/t.db?table=t&password={LITERAL}")


async def sink_of_no_kind(ctx: Context, password: str, token: str) -> None:
    rows = ctx.rows(f"file://{HERE}/rows.jsonl")
    await ctx.load(rows, to=f"postgres9://user:{LITERAL}@host/db?password={LITERAL}")


async def bad_records(ctx: Context, password: str, token: str) -> None:
    def clean(row: Any) -> None:
        raise BadRecord(f"{password} is no good for {row['id']}")

    await ctx.load(ctx.rows(f"file://{HERE}/rows.jsonl").map(clean), to=f"sqlite:///{HERE}/t.db?table=t")


async def enriched(ctx: Context, password: str, token: str) -> None:
    async def price(rows: Any) -> Any:
        raise RuntimeError(f"401 for {token}")

    await ctx.load(ctx.rows(f"file://{HERE}/rows.jsonl").enrich(price), to=f"sqlite:///{HERE}/t.db?table=t")


WAYS = [
    permanent,
    retryable,
    superseded,
    unknown,
    in_a_group,
    in_scope,
    in_a_step,
    returned,
    skipped,
    exits,
    logged,
    never_awaited,
    missing,
    no_field,
    no_json,
    refused_connection,
    bad_header,
    sink_with_a_bad_option,
    sink_with_a_strange_table,
    sink_with_an_unknown_option,
    sink_of_no_kind,
    bad_records,
    enriched,
]

archive = http_archive(
    "archive",
    url=CLOSED.replace("http://", f"http://user:{LITERAL}@") + "/{t.hour}.gz?signature=" + LITERAL,
    start="2024-01-01T00",
    until="2024-01-01T02",
    to=f"file://{HERE}/lake/",
    headers={"Authorization": TOKEN, "X-Key": DATABASE},
    policy=Policy(retries=0, notify=NOTIFY),
)
