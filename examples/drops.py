"""Zips of many tables into one database: each drop's data files go where the manifests beside them say.

    flowlane run examples/drops.py

As it stands it loads what lies in ./drops into ./tables.db (``python -m examples.tpch drops`` makes some).
Give `source` a bucket, `to` a ``dynamodb://`` and bad rows a folder in a bucket, and it runs on AWS.
"""

import os
from pathlib import Path

from flowlane import Policy
from flowlane.recipes import zip_tables

lane = zip_tables(
    "drops",
    source=os.environ.get("DROPS_SOURCE", Path("drops").absolute().as_uri() + "/"),
    to=os.environ.get("DROPS_TO", f"sqlite:///{Path('tables.db').absolute()}"),
    tables=["region", "nation", "supplier", "customer", "orders", "lineitem"],
    every="5m",
    policy=Policy(retries=3, backoff="500ms", quarantine=os.environ.get("DROPS_QUARANTINE")),
)
