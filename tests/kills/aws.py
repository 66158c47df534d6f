"""Three workers and a Lambda function on the same queues, log and lake, one of them killed every second."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import Counter
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flowlane.compose import Application, load_lane, open_application
from flowlane.settings import Settings
from tests import servers
from tests.aws_lambda.mapping import QueueMapping
from tests.aws_lambda.runtime_api import FunctionError, RuntimeApi
from tests.kills import zygote
from tests.kills.campaign import check_log, serving
from tests.kills.victim import START, archive

HANDLER = "flowlane.aws_lambda.handler"
BACKEND = "aws://kills"
BUCKET = "kills-lake"

LANE = """
from flowlane import Policy
from flowlane.recipes import http_archive

lane = http_archive(
    "kills",
    url="{url}/{{t:%Y-%m-%d}}-{{t.hour}}.json.gz",
    start="{start}",
    until="{until}",
    to="s3://{bucket}/raw/",
    every="2s",
    policy=Policy(lease=4.0, timeout=15.0, retries=1000, backoff=0.05, backoff_cap=0.2, concurrency=4),
)
"""


#: Seconds within which a function that nobody kills has handled its first messages.
_STARTS = 120.0


class Fleet:
    """The processes, by name; each can be killed and is started anew."""

    def __init__(self, folder: Path, environment: dict[str, str], workers: int) -> None:
        self._folder, self._environment = folder, environment
        self._workers: dict[str, zygote.Command] = {}
        self._function: RuntimeApi | None = None
        self.names = [*(f"worker-{n}" for n in range(workers)), "function"]

    def start(self, name: str) -> None:
        """Start the worker or the function of that name."""
        if name == "function":
            settings = {**self._environment, "FLOWLANE_LANE": "kills_lane.py", "FLOWLANE_BACKEND": BACKEND}
            function = RuntimeApi(HANDLER, self._folder, settings, zygote.Command)
            function.__enter__()
            self._function = function  # not before: the mapping's thread invokes what it finds here
            return
        command = ["flowlane", "worker", "kills_lane.py", "--backend", BACKEND]
        settings = {**os.environ, **self._environment}
        self._workers[name] = zygote.Command(command, self._folder, settings, self._folder / f"{name}.log")

    def kill(self, name: str) -> None:
        """End it with SIGKILL, in whatever it is doing."""
        if name == "function":
            function, self._function = self._function, None
            if function is not None:
                function.kill()
                function.__exit__(None, None, None)
            return
        process = self._workers.pop(name)
        process.kill()
        process.wait()

    def invoke(self, event: Any, *, seconds: float) -> Any:
        """Invoke the function, if there is one at this moment."""
        function = self._function
        if function is None:
            raise FunctionError("Runtime.ExitError", "the function is being started anew")
        return function.invoke(event, seconds=seconds)

    def end(self) -> None:
        """Kill what is left."""
        for name in [*self._workers, "function"]:
            self.kill(name)


class AwsKiller:
    """The kills of workers and a function that run the lane of ``make_lane``; then the reckoning."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.done_by_function = 0

    def make_lane(self, stack: ExitStack) -> str:
        """The text of the lane file, once what it needs is there; `stack` is closed when all is over."""
        raise NotImplementedError

    def before_kill(self) -> None:
        """Called before each kill."""

    def before_rest(self) -> None:
        """Called when the last kill is done, and one undisturbed worker is about to finish."""

    async def check(self, app: Application) -> None:
        """The reckoning."""
        raise NotImplementedError

    def run(self, seconds: int, pause: float = 1.0) -> None:
        """Kill one of them every `pause` seconds for so long (as often, on a machine that is late), then let
        one undisturbed worker finish."""
        with ExitStack() as stack:
            endpoint = stack.enter_context(servers.server("ministack"))
            environment = {**servers.environment(endpoint), "FLOWLANE_ALLOW_PRIVATE_HOSTS": "1"}
            stack.enter_context(variables(environment))
            asyncio.run(_make_bucket())
            (self.folder / "kills_lane.py").write_text(self.make_lane(stack))
            self._command("init", "kills_lane.py", "--backend", BACKEND)
            fleet = Fleet(self.folder, environment, workers=3)
            stack.callback(fleet.end)
            for name in fleet.names:
                fleet.start(name)
            with QueueMapping(lambda: fleet.invoke, environment, "kills-", seconds=3.0) as mapping:
                began = time.monotonic()
                for number in range(1, round(seconds / pause) + 1):
                    time.sleep(max(0.0, began + number * pause - time.monotonic()))
                    self.before_kill()
                    name = self.chance.choice(fleet.names)
                    fleet.kill(name)
                    fleet.start(name)
                    self.killed[name] += 1
                end = time.monotonic() + _STARTS
                while not mapping.messages and time.monotonic() < end:
                    time.sleep(0.1)  # on a busy machine a function takes longer to start than it lives here
                self.done_by_function = mapping.messages
            fleet.end()
            self.before_rest()
            self._command("run", "kills_lane.py", "--backend", BACKEND, "--json")
            asyncio.run(self._reckon())

    def _command(self, *arguments: str) -> None:
        done = zygote.run(["flowlane", *arguments], self.folder, seconds=400)
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-2000:])

    async def _reckon(self) -> None:
        lane = load_lane(str(self.folder / "kills_lane.py"))
        async with open_application([lane], Settings(backend=BACKEND, allow_private_hosts=True)) as app:
            await self.check(app)


class AwsCampaign(AwsKiller):
    """Archives landed in a lake: byte for byte, and the log stream by stream."""

    def __init__(self, folder: Path, hours: int, seed: int) -> None:
        super().__init__(folder, seed)
        self.hours = hours
        self.until = datetime.fromisoformat(START) + timedelta(hours=hours)

    def make_lane(self, stack: ExitStack) -> str:
        """See ``AwsKiller``."""
        self._archives = stack.enter_context(serving(self.hours, drip=0.15))
        return LANE.format(url=self._archives.url, start=START, until=self.until.isoformat(), bucket=BUCKET)

    def before_rest(self) -> None:
        """See ``AwsKiller``."""
        self._archives.quicken()

    async def check(self, app: Application) -> None:
        """See ``AwsKiller``."""
        await check_log(app, self.hours, self.until)
        lake = await _read_bucket()
        begin = datetime.fromisoformat(START)
        expected = {}
        for hour in range(self.hours):
            moment = begin + timedelta(hours=hour)
            expected[f"raw/{moment:%Y-%m-%d}-{moment.hour}.json.gz"] = archive(hour)
        assert lake.keys() == expected.keys(), sorted(lake.keys() ^ expected.keys())[:10]
        assert lake == expected


class variables:
    """The environment of this process while the context is open."""

    def __init__(self, wanted: dict[str, str]) -> None:
        self._wanted = wanted
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._wanted}
        os.environ.update(self._wanted)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def _make_bucket() -> None:
    from flowlane_aws.clients import open_client

    async with open_client("s3") as s3:
        await s3.create_bucket(Bucket=BUCKET)


async def _read_bucket() -> dict[str, bytes]:
    from flowlane_aws.clients import open_client

    found: dict[str, bytes] = {}
    async with open_client("s3") as s3:
        uploads = await s3.list_multipart_uploads(Bucket=BUCKET)
        assert not uploads.get("Uploads"), "unfinished uploads are left"
        async for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for item in page.get("Contents", ()):
                answer = await s3.get_object(Bucket=BUCKET, Key=item["Key"])
                async with answer["Body"] as body:
                    found[item["Key"]] = await body.read()
    return found


def main() -> int:
    """``python -m tests.kills.aws 60``: a kill a second for so many seconds, then the reckoning."""
    seconds = int(sys.argv[1])
    with TemporaryDirectory() as folder:
        campaign = AwsCampaign(Path(folder), hours=8 * seconds, seed=random.randrange(10**9))
        campaign.run(seconds)
        print(f"{campaign.killed.total()} kills {dict(campaign.killed)}; ", end="")
        print(f"{campaign.done_by_function} messages went to the function; {campaign.hours} archives right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
