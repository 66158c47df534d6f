"""Making the streams of stages whose deliveries a channel carries, for ``flowlane init``; never at run time.

They are made on demand: shards come and go with what is put, and nobody has to guess how many a stage wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import Retryable
from flowlane.ports import QueueSpec
from flowlane_aws.bounded import all_of
from flowlane_aws.clients import asking
from flowlane_aws.names import Names

#: Streams in the making at once; of an account Kinesis makes five (API reference of CreateStream).
_AT_ONCE: Final = 4
#: Seconds that are waited for a stream to be made.
_PATIENCE: Final = 300
#: How its shards are made; CloudFormation calls it the same.
MODE: Final[Mapping[str, Any]] = {"StreamModeDetails": {"StreamMode": "ON_DEMAND"}}
#: Hours that records are kept: as long as a stage's queue keeps messages. By default Kinesis keeps them for a
#: day, and what is lost over a weekend comes again behind its group (by the sweep).
KEPT: Final = 96


async def create(client: Any, names: Names, specs: Sequence[QueueSpec], clock: Clock) -> Sequence[str]:
    """The streams of `specs` are there and take records; the names of those that were made now. One that is
    there is left as somebody set it.

    Raises:
        ConfigError: one may not be asked for or made.
        Retryable: Kinesis is away; or one is being deleted, or not ready after some minutes.
    """
    calls = [partial(_make, client, names.stream(spec.name), clock) for spec in specs]
    return [name for name in await all_of(calls, _AT_ONCE) if name]


async def _make(client: Any, name: str, clock: Clock) -> str:
    """The stream called `name` is there; its name if it was made now."""
    made = name
    try:
        async with asking(f"making Kinesis stream {name}", passing={"ResourceInUseException"}):
            await client.create_stream(StreamName=name, **MODE)
    except ClientError:  # passed: it is there, or in the making
        made = ""
    for _ in range(_PATIENCE):
        async with asking(f"looking at Kinesis stream {name}"):
            answer = await client.describe_stream_summary(StreamName=name)
        status = answer["StreamDescriptionSummary"]["StreamStatus"]
        if status in ("ACTIVE", "UPDATING"):  # its shards change, and it takes records all the while
            if made:
                await _keep(client, name)
            return made
        if status == "DELETING":
            raise Retryable(
                f"the Kinesis stream {name} is being deleted, and none of that name can be made before it is "
                "gone: run `flowlane init` again in a minute",
                delay=60,
            )
        await clock.sleep(1.0)
    raise Retryable(
        f"the Kinesis stream {name} is there, and not active after {_PATIENCE} s: run this again later"
    )


async def _keep(client: Any, name: str) -> None:
    async with asking(f"having Kinesis stream {name} keep its records"):
        await client.increase_stream_retention_period(StreamName=name, RetentionPeriodHours=KEPT)
