"""Drops of the same tables on AWS, loaded from S3 into DynamoDB by three workers and a function, one of them
killed every second."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import botocore.session

from flowlane.compose import Application
from flowlane.state import status
from flowlane.testing.oracle import Log, check
from tests.dynamodb_tables import contents
from tests.kills.aws import BUCKET, AwsKiller
from tests.kills.drops import TABLES, archive, expected, inversions

_EACH = 3  #: drops that come before each kill

LANE = f"""
from flowlane import Policy
from flowlane.recipes import zip_tables

lane = zip_tables(
    "kills",
    source="s3://{BUCKET}/drops/",
    to="dynamodb://",
    tables=["orders", "customers"],
    every="2s",
    policy=Policy(
        lease=4.0, timeout=15.0, retries=1000, backoff=0.05, backoff_cap=0.2, concurrency=4, batch=40
    ),
)
"""


class AwsDrops(AwsKiller):
    """The tables, row by row, and the log stream by stream."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        self.drops = 0
        self.inversions = 0

    def make_lane(self, stack: ExitStack) -> str:
        """See ``AwsKiller``."""
        session = botocore.session.get_session()
        self._s3: Any = session.create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        stack.callback(self._s3.close)
        self.before_kill()
        return LANE

    def before_kill(self) -> None:
        """More drops have come."""
        for _ in range(_EACH):
            key = f"drops/{self.drops:05}.zip"
            self._s3.put_object(Bucket=BUCKET, Key=key, Body=archive(self.drops))
            self.drops += 1

    async def check(self, app: Application) -> None:
        """See ``AwsKiller``."""
        (lane,) = app.lanes
        assert await check(app.backend, lane) == []
        log = await Log.read(app.backend, lane)
        ends = Counter(status(stream[-1]) for stream in log.units("member/").values())
        assert ends == {"settled": self.drops * len(TABLES)}
        self.inversions = sum(inversions(log, table) for table in TABLES)
        found = {table: {row["id"]: row for row in contents(table)} for table in TABLES}
        assert found == expected(self.drops)


def main() -> int:
    """``python -m tests.kills.aws_drops 60``: a kill a second for so many seconds, then the reckoning."""
    with TemporaryDirectory() as folder:
        campaign = AwsDrops(Path(folder), seed=random.randrange(10**9))
        campaign.run(int(sys.argv[1]))
        print(f"{campaign.killed.total()} kills {dict(campaign.killed)}; ", end="")
        print(f"{campaign.done_by_function} messages went to the function; {campaign.drops} drops right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
