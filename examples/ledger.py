"""A ledger: the changes of an account are booked one after the other, accounts beside one another.

    flowlane run examples/ledger.py

As it stands it reads ./changes/*.jsonl, each line of which is one change, numbered by its account, such as
``{"account": "north", "number": 1, "amount": 250}``, and books them into ./ledger.db.

The channel keeps the order, and brings a change at least once; `write` compares numbers, and so books it at
most once. With a backend on AWS the channel is a Kinesis stream (then give the ledger a database that all
workers reach).
"""

import asyncio
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from flowlane import Lane, Permanent, Superseded, Unit

CHANGES = Path(os.environ.get("LEDGER_CHANGES", "changes"))
BOOK = Path(os.environ.get("LEDGER_BOOK", "ledger.db"))

lane = Lane("ledger", every="1m")


class Change(Unit, key=("account", "number")):
    account: str
    number: int
    amount: int


def read():
    """All changes, in the order of the files' names and their lines."""
    files = sorted(CHANGES.glob("*.jsonl"))
    return [Change(**json.loads(line)) for file in files for line in file.read_text().splitlines()]


@lane.stage(on=lane.triggered)
async def find(event, ctx):
    for change in await ctx.offload(read):
        yield change


@lane.stage(on=Change, order="account", via="channel")
async def apply(event, ctx):
    change = event.data
    await ctx.step("book", book, change.account, change.number, change.amount)


async def book(account, number, amount):
    await asyncio.to_thread(write, account, number, amount)


def write(account, number, amount):
    """The change is in the book, once, however often it comes; and never behind a later one."""
    with closing(sqlite3.connect(BOOK, timeout=30, isolation_level="IMMEDIATE")) as connection, connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY, number INTEGER, balance INTEGER)"
        )
        connection.execute("INSERT OR IGNORE INTO accounts VALUES (?, 0, 0)", (account,))
        found = connection.execute("SELECT number, balance FROM accounts WHERE account = ?", (account,))
        last, balance = found.fetchone()
        if number == last:
            return  # it was booked, and its process ended before the log knew
        if number < last:
            raise Superseded(f"{account} has been booked up to {last}")
        if balance + amount < 0:
            raise Permanent(f"{account} has {balance}, and is to pay {-amount}: ask its owner")
        changed = (number, balance + amount, account)
        connection.execute("UPDATE accounts SET number = ?, balance = ? WHERE account = ?", changed)
