"""GH Archive into a lake: every hour's archive of GitHub events, found by HEAD, landed as it is.

    flowlane run examples/gharchive.py

As it stands it lands one day (about 2 GB) under ./lake. For all of it, for ever, take `until` away and give
`to` a bucket; then `flowlane worker` looks for new hours every 30 minutes.
"""

import os
from pathlib import Path

from flowlane import Policy
from flowlane.recipes import http_archive

lane = http_archive(
    "gharchive",
    url=os.environ.get("GHARCHIVE_URL", "https://data.gharchive.org") + "/{t:%Y-%m-%d}-{t.hour}.json.gz",
    start="2024-01-01T00",
    until="2024-01-02T00",
    step="1h",
    every="30m",
    to=os.environ.get("GHARCHIVE_LAKE", Path("lake/raw").absolute().as_uri() + "/"),
    policy=Policy(retries=3, backoff="500ms"),
)
