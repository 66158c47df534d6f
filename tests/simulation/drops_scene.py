"""The scene of ``zip_tables``: two drops of the same tables, the older one slow to come, so that the newer
one is loaded first; members across a deadline, a bad row, a table that nobody allowed, a zip that was cut."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncGenerator
from string import ascii_letters, digits
from typing import Any
from zipfile import ZIP_STORED

from examples.tpch import pack
from flowlane.lane import Lane, Policy
from flowlane.ports import ObjectInfo, Record
from flowlane.recipes import zip_tables
from flowlane.testing.faults import Process
from flowlane.testing.stores import Page, Web
from tests.simulation.lab import Lab
from tests.simulation.scene import Scene

_OLDER, _NEWER, _CUT = "web://drops/1.zip", "web://drops/2.zip", "web://drops/3.zip"


#: Every port method that the lane must reach in the undisturbed run.
_PORTS = frozenset(
    {
        "backend.commit",
        "backend.last",
        "backend.read",
        "backend.receive",
        "backend.resend",
        "backend.tally",
        "backend.units",
        "body.read",
        "delivery.ack",
        "delivery.extend",
        "delivery.nack",
        "sink.open",
        "store.head",
        "store.list",
        "store.read",
        "store.upload",
        "upload.commit",
        "upload.write",
        "writer.finish",
        "writer.write",
    }
)


class Shelf(Web):
    """A web that can be listed, as a bucket can."""

    async def list(self, url: str) -> AsyncGenerator[ObjectInfo]:
        """See ``Store.list``; folders only."""
        for found in sorted(self.pages):
            if found.startswith(url) and (info := await self.head(found)) is not None:
                yield info


def member(table: str, columns: str, *rows: str, key: str = "id") -> dict[str, str]:
    """A data file and its manifest."""
    lines = [columns, *rows]
    manifest = {"table": table, "partition_key": key, "partition_key_type": "N"}
    return {f"{table}.csv": "".join(f"{line}\n" for line in lines), f"{table}.json": json.dumps(manifest)}


def note(n: int) -> str:
    """A long text that hardly packs: the proof of a member of some is done in parts."""
    return "".join(random.Random(n).choices(ascii_letters + digits, k=600))


ARCHIVES = {
    _OLDER: pack(
        {
            **member("customers", "id,name", *(f"{n},old {n}" for n in range(8)), "8,too,many"),
            **member("orders", "id,of,state,note", *(f"{n},{n % 8},open,{note(n)}" for n in range(12))),
            **member("salaries", "id,salary", "1,100"),
        }
    ),
    _NEWER: pack(
        {
            **member("customers", "id,name,email", *(f"{n},new {n},{n}@example.com" for n in range(5, 11))),
            **member("orders", "id,of,state,note", *(f"{n},{n % 8},done," for n in range(0, 16, 3))),
        },
        ZIP_STORED,
    ),
    _CUT: pack(member("customers", "id,name", "1,cut"))[:-30],
}


def expected() -> dict[str, list[dict[str, Any]]]:
    """The tables after the older drop and then the newer one, in the order of their keys."""
    customers: dict[int, dict[str, Any]] = {n: {"id": n, "name": f"old {n}"} for n in range(8)}
    customers |= {n: {"id": n, "name": f"new {n}", "email": f"{n}@example.com"} for n in range(5, 11)}
    orders: dict[int, dict[str, Any]] = {
        n: {"id": n, "of": str(n % 8), "state": "open", "note": note(n)} for n in range(12)
    }
    orders |= {n: {"id": n, "of": str(n % 8), "state": "done", "note": None} for n in range(0, 16, 3)}
    return {
        "customers": [customers[n] for n in sorted(customers)],
        "orders": [orders[n] for n in sorted(orders)],
    }


def lanes(process: Process) -> list[Lane]:
    """Small batches, so that a member takes several."""
    policy = Policy(
        concurrency=2,
        retries=4,
        timeout=60.0,
        backoff=0.1,
        backoff_cap=0.1,
        lease=1.5,
        hops=5,
        batch=3,
        error_budget=1.0,
        quarantine="lake://quarantine/",
    )

    async def enrich(records: list[Record]) -> list[Record]:
        """What the older drop has of orders takes its time."""
        if records and records[0].get("state") == "open":
            await process.clock.sleep(0.6)
        return records

    drops = zip_tables(
        "drops",
        source="web://drops/",
        to="table://drops/",
        tables=["customers", "orders"],
        enrich=enrich,
        policy=policy,
    )
    return [drops]


def publish(lab: Lab) -> None:
    """What lies on the shelf; the older drop is slow, and breaks off once."""
    lab.world.web = Shelf(lab.clock)
    for url, data in ARCHIVES.items():
        slow = url == _OLDER
        page = Page(data=data, block=1024, pause=0.26 if slow else 0.0, breaks=1 if slow else 0)
        lab.world.web.publish(url, page)


def effects(lab: Lab) -> dict[str, Any]:
    """The tables, in the order of their keys, and what is in quarantine."""
    tables = {
        uri.rpartition("/")[2]: sorted(table.rows, key=lambda row: int(row["id"]))
        for uri, table in lab.world.tables.tables.items()
    }
    return {"tables": tables, "quarantine": dict(sorted(lab.world.lake.objects.items()))}


DROPS = Scene(
    name="drops",
    lanes=lanes,
    publish=publish,
    effects=effects,
    doubled=lambda event: event.type == "member",
    belated=lambda event: _OLDER in event.subject,
    ports=_PORTS,
    doubled_at=5.0,
    deadline=8.2,
)
