"""What the resources of a backend are called: the same in every process, by its name alone."""

from __future__ import annotations

import re
from hashlib import blake2b
from shlex import quote
from typing import Final
from urllib.parse import urlencode

import msgspec

from flowlane.errors import ConfigError

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
_TABLE: Final = re.compile(r"[A-Za-z0-9_.-]{3,255}")
_STAGE: Final = re.compile(r"(?:[a-z][a-z0-9_]*/)?[a-z][a-z0-9_]*")
_PLAIN: Final = re.compile(r"(?:[a-z][a-z0-9_]*-)?[a-z][a-z0-9_]*(?:-dead)?(?:\.fifo)?")
_DIGESTED: Final = re.compile(r".*-[0-9A-F]{10}(?:-dead)?(?:\.fifo)?")
_UNFIT: Final = re.compile(r"[^A-Za-z0-9_-]+")

#: SQS: 80 characters, the ``.fifo`` that ends an ordered queue's name included (CreateQueue, QueueName).
_QUEUE: Final = 80 - len("-dead.fifo")
#: Kinesis: 128 characters (CreateStream, StreamName).
_STREAM: Final = 128


class Names(msgspec.Struct, frozen=True):
    """The names that begin with ``name``; ``table`` and ``queue_prefix`` stand in for what follows from it.
    ``aggregate`` and ``hold`` (a duration) are no part of any, but of the URI.

    Different stages (channels) never share a queue (stream): a text that does not survive being made a name,
    or is too long for one, has a digest of itself put behind what is left of it.
    """

    name: str
    table: str = ""
    queue_prefix: str = ""
    region: str = ""
    aggregate: bool = False
    hold: str = ""

    @property
    def uri(self) -> str:
        """What opens the backend again, quoted for a shell."""
        return quote(self._uri(region=self.region))

    @property
    def uri_there(self) -> str:
        """What opens the backend again for a process that runs in its region, as Lambda's do."""
        return self._uri(region="")

    def _uri(self, *, region: str) -> str:
        given = {
            "region": region,
            "table": self.table,
            "queue_prefix": self.queue_prefix,
            "aggregate": "true" if self.aggregate else "",
            "hold": self.hold,
        }
        query = urlencode({option: value for option, value in given.items() if value})
        return f"aws://{self.name}?{query}" if query else f"aws://{self.name}"

    @property
    def log(self) -> str:
        """The log's table."""
        return self.table or f"{self.name}-log"

    def queue(self, stage: str, *, ordered: bool = False) -> str:
        """The queue of `stage` (as ``Publish.stage`` has it: lane/stage)."""
        return self._queue(stage) + (".fifo" if ordered else "")

    def dead(self, stage: str, *, ordered: bool = False) -> str:
        """The queue for what the queue of `stage` gave up."""
        return f"{self._queue(stage)}-dead" + (".fifo" if ordered else "")

    def stream(self, channel: str) -> str:
        """The Kinesis stream of `channel`; a stage's, which is called as its queue would be (lane/stage), has
        a dot in its name, and no other one has."""
        if _STAGE.fullmatch(channel):
            return _shortened(f"{self.name}-{channel.replace('/', '.')}", channel, _STREAM, unfit=False)
        return _shortened(
            f"{self.name}-{_UNFIT.sub('-', channel)}", channel, _STREAM, bool(_UNFIT.search(channel))
        )

    def _queue(self, stage: str) -> str:
        # A dash within a lane's or a stage's own name could be the one between another backend (whose name
        # may have dashes), lane and stage; and a stage called "dead" could be the dead letters of a stage
        # called like its lane. Lanes and stages are in lower case, digests in upper: a digest is no stage.
        fit = bool(_STAGE.fullmatch(stage)) and stage.rpartition("/")[2] != "dead"
        prefix = self.queue_prefix or self.name
        return _shortened(f"{prefix}-{_UNFIT.sub('-', stage)}", f"{prefix} {stage}", _QUEUE, not fit)

    @property
    def of_queues(self) -> str:
        """What the names of all queues of the backend begin with; see ``has_queue``."""
        return f"{self.queue_prefix or self.name}-"

    def has_queue(self, name: str) -> bool:
        """Whether a queue whose name begins with ``of_queues`` is the backend's: not one of another backend,
        whose own name begins so. Of a name with a digest that cannot be told, and it is."""
        rest = name.removeprefix(self.of_queues)
        return bool(_PLAIN.fullmatch(rest) or _DIGESTED.fullmatch(rest))


def checked(names: Names) -> Names:
    """`names`, of which AWS would take every one.

    Raises:
        ConfigError: it would not; says which part of the URI is to be another.
    """
    if not _NAME.fullmatch(names.name):
        raise ConfigError(
            f"aws://{names.name}: a backend's name is 1 to 40 letters, digits, - and _, with a letter first"
        )
    if not _TABLE.fullmatch(names.log):
        raise ConfigError(f"aws://{names.name}: table={names.table} is no name of a DynamoDB table")
    if names.queue_prefix and not _NAME.fullmatch(names.queue_prefix):
        raise ConfigError(
            f"aws://{names.name}: queue_prefix={names.queue_prefix} is not 1 to 40 letters, digits, - and _"
        )
    return names


def _shortened(name: str, text: str, limit: int, unfit: bool) -> str:
    if not unfit and len(name) <= limit:
        return name
    digest = blake2b(text.encode(), digest_size=5).hexdigest().upper()
    return f"{name[: limit - len(digest) - 1]}-{digest}"
