"""How the log lies in its table: keys, attributes, shards. Pure functions; nothing here asks AWS.

An event is one item, its partition the stream, its sort key the version. Besides, where they apply:

==========  =====================================================================================
attribute   what it says, and which index (of the same name) it puts the item into
==========  =====================================================================================
event       the event, structured JSON
id          its id: whoever finds its own in its way has got through before
run         its run
lane        ``<lane>#<shard>``, sorted by ``stamp``: every event of the lane, in about the order of commits
waiting     first events: ``<lane>#open#<shard>`` or ``<lane>#dead#<shard>`` (``state.index`` of the head),
            sorted by ``look``
waiting_as  the version that ``waiting`` was set for
look        milliseconds of the epoch, as text: from when on the sweep is to look at the stream
unsent      ``<lane>#<shard>``, sorted by ``due``: owed to queues that have not accepted it yet
due         milliseconds of the epoch from when on the sweep is to send it, and a stamp, as text
owed        what is owed: JSON, a list of [stage, group], of a channel's [stage, group, "channel"]
runs        first events of runs: ``<lane>``, sorted by ``stamp``
==========  =====================================================================================

An item without an index's attribute is not in that index (DynamoDB, sparse indexes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from zlib import crc32

import msgspec

from flowlane import state
from flowlane.clock import Clock
from flowlane.events import Event, decode, encode
from flowlane.ports import Index, Publish, Via

Item = dict[str, dict[str, Any]]

#: Each index is spread over so many partitions: one takes 1,000 write units a second.
SHARDS: Final = 16
#: Of what is dead there is less: each listing costs a request a partition.
_OF_THE_DEAD: Final = 4

#: Seconds before the sweep looks at a stream for the first time: less than any stage may be silent for.
FIRST_LOOK: Final = 60.0

#: Index name -> its partition key, its sort key, and what it holds besides the keys.
INDEXES: Final[Mapping[str, tuple[str, str, Sequence[str]]]] = {
    "lane": ("lane", "stamp", ("run",)),
    "waiting": ("waiting", "look", ()),
    "unsent": ("unsent", "due", ()),
    "runs": ("runs", "stamp", ()),
}

#: Bytes of an item besides its event, at most, and what DynamoDB adds (100 an item; names count).
_AROUND: Final = 4096


def shard(stream: str, of: int = 0) -> str:
    """The shard of `stream` in an index with so many; the same in every process and release."""
    return f"{crc32(stream.encode()) % (of or SHARDS):02d}"


def shards(prefix: str, of: int = 0) -> list[str]:
    """The partitions of an index with so many that begin with `prefix`."""
    return [f"{prefix}#{n:02d}" for n in range(of or SHARDS)]


def text(value: str) -> dict[str, str]:
    """`value` as DynamoDB has it."""
    return {"S": value}


def key(stream: str, version: int) -> Item:
    """The key of one event."""
    return {"pk": text(stream), "sk": text(f"{version:012d}")}


def event_of(item: Mapping[str, Any]) -> Event:
    """The event in `item`.

    Raises:
        Permanent: something else than flowlane has written it.
    """
    return decode(item["event"]["S"])


def position_of(item: Mapping[str, Any]) -> tuple[str, int]:
    """Stream and version of the event in `item`."""
    return item["pk"]["S"], int(item["sk"]["S"])


def item_of(event: Event, stamp: str) -> Item:
    """`event` as an item that is in no index but its lane's.

    Raises:
        Permanent: the event is longer than ``events.MAX_EVENT_BYTES``.
    """
    item = key(event.subject, event.version)
    item["event"] = text(encode(event).decode())
    item["id"] = text(event.id)
    item["lane"] = text(f"{event.source}#{shard(event.subject)}")
    item["stamp"] = text(stamp)
    if event.run:
        item["run"] = text(event.run)
    if event.version == 1 and event.subject == event.run:
        item["runs"] = text(event.source)
    return item


def length(item: Item) -> int:
    """Bytes that DynamoDB counts for `item`, at most."""
    return _AROUND + len(item["event"]["S"].encode())


_WAITING: Final[Mapping[Index, int]] = {"open": 0, "dead": _OF_THE_DEAD}


def waiting(head: Event) -> str:
    """What ``waiting`` says while `head` is the stream's last event; empty if it is in no index."""
    index = state.index(head)
    return f"{head.source}#{index}#{shard(head.subject, _WAITING[index])}" if index else ""


def waiting_in(lane: str, index: Index) -> list[str]:
    """The partitions of the index ``waiting`` that list `lane`."""
    return shards(f"{lane}#{index}", _WAITING[index])


def first_look(head: Event, now: float) -> str:
    """``look`` of a stream that is marked with `head` as its last event: every sweep looks at open runs,
    which are few, since any of their units may have been the last one."""
    return milliseconds(0.0 if open_run(head) else now + FIRST_LOOK)


def open_run(head: Event) -> bool:
    """Whether `head` is the last event of a run that has not come to rest."""
    return head.subject == head.run and state.index(head) == "open"


def put_waiting(item: Item, head: Event, now: float) -> None:
    """Put the first event `item` into the index that `head`, the last one appended with it, belongs into."""
    if where := waiting(head):
        item["waiting"] = text(where)
        item["waiting_as"] = {"N": str(head.version)}
        item["look"] = text(first_look(head, now))


def gone_for_good(head: Event) -> bool:
    """Whether a stream that ends with `head` never has to be in an index again."""
    return head.subject != head.run and state.status(head) in ("settled", "skipped", "superseded")


def owing(event: Event, due: float, stamp: str, publishes: Sequence[Publish]) -> Item:
    """The attributes which say that queues and channels are owed `publishes` of `event`: to be sent by the
    sweep from `due` (seconds of the epoch) on, in the order of `stamp` where several are due at once."""
    owed = msgspec.json.encode([_whither(each) for each in publishes])
    return {
        "unsent": text(f"{event.source}#{shard(event.subject)}"),
        "due": text(f"{milliseconds(due)} {stamp}"),
        "owed": text(owed.decode()),
    }


def owed_by(item: Mapping[str, Any]) -> list[Publish]:
    """What the queues are owed of the event in `item`."""
    if "unsent" not in item:
        return []
    event = event_of(item)
    owed = msgspec.json.decode(item["owed"]["S"], type=list[_Whither])
    return [Publish(event, each.stage, group=each.group, via=each.via) for each in owed]


class _Whither(msgspec.Struct, array_like=True):
    stage: str
    group: str
    via: Via = "queue"


def _whither(owed: Publish) -> Sequence[str]:
    """Without what was no part of it before there were channels: an older release reads it, too."""
    return (owed.stage, owed.group) if owed.via == "queue" else (owed.stage, owed.group, owed.via)


def milliseconds(moment: float) -> str:
    """`moment` (seconds of the epoch) as ``due`` has it: texts that sort as the moments do."""
    return f"{max(0, round(moment * 1000)):015d}"


class Stamps:
    """The time of each append as a text that sorts; of one process no two are equal, and none goes back."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last, self._count = "", 0

    def __call__(self) -> str:
        now = self._clock.now().isoformat(timespec="microseconds").replace("+00:00", "Z")
        if now > self._last:
            self._last, self._count = now, 0
        else:
            self._count += 1
        return f"{self._last}{self._count:08d}"
