"""What a sharded stream is: shards that are read in order, split, merged, and closed some time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from flowlane.ports import ChannelRecord

#: Records that can bear one sequence number, at most (an aggregate of so many is larger than any record).
SUBS: Final = 1 << 20


class Shard(msgspec.Struct, frozen=True):
    """``id`` is the service's own, made of letters, digits and dashes; ``number`` is the partition that its
    records bear, no other shard's of the stream, ever. ``parents``: the ids of the shards that were split or
    merged into it: their records come before its own."""

    id: str
    number: int
    parents: tuple[str, ...] = ()


class Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """The place behind a record of a shard; ``Place()`` is before the oldest one that is left.

    ``sequence`` is the record's number as the service gave it, or, in a place that was made of a position, as
    a plain decimal number. ``sub`` counts, from 0, the records that bear the same number; ``whole`` if this
    is known to be the last one of them. ``whole=False`` is always true enough: whoever reads on looks at that
    number once more, and leaves out what is not behind ``sub``.
    """

    sequence: str = ""
    sub: int = 0
    whole: bool = False

    @property
    def position(self) -> int:
        """The ``ChannelRecord.position`` of the record that this is behind; 0 before the oldest."""
        return position(self.sequence, self.sub) if self.sequence else 0


def position(sequence: str, sub: int = 0) -> int:
    """The ``ChannelRecord.position`` of the record `sub` of those with the number `sequence`."""
    return int(sequence) * SUBS + sub


def place(position: int) -> Place:
    """The place behind the record at `position` (0: before the oldest)."""
    return Place(str(position // SUBS), position % SUBS) if position > 0 else Place()


class Page(msgspec.Struct, frozen=True):
    """Consecutive ``records`` of one shard, partition and position set, and the ``sequences`` (one for each)
    that the service gave them. All that bear one number are in the same page.

    ``behind``: by how many seconds the page's end is behind the newest record of the shard; 0: nothing is
    behind it; ``None``: not known, and taken for 0 where ``records`` is empty. ``ended``: the shard is closed
    (or gone altogether) and there is nothing behind this page and never will be.
    """

    records: Sequence[ChannelRecord] = ()
    sequences: Sequence[str] = ()
    behind: float | None = None
    ended: bool = False

    def place(self, index: int) -> Place:
        """The place behind the record `index`."""
        sequence = self.sequences[index]
        whole = index + 1 == len(self.sequences) or self.sequences[index + 1] != sequence
        return Place(sequence, self.records[index].position % SUBS, whole)


class Reader(Protocol):
    """Reads one shard from a place on. Holds nothing that would have to be closed; used by one task at once.

    What a service wants to see between reads (iterators that expire, calls per second) is its business.
    """

    async def page(self) -> Page:
        """The next page; the first begins at the reader's place. Answers as soon as it has looked (within
        seconds), with or without records: at once the first time and while behind; at the end of what there
        is, as often as the service likes to be asked: then it may wait some seconds for something to come. A
        page without records may be followed by one with some, if ``behind`` is not 0. After ``ended`` it is
        not called any more.

        When this raises (or is cancelled) nothing is skipped: the next call gives what this one would have.

        Raises:
            Retryable: the service is away or overloaded beyond what the reader waits out itself.
            ConfigError: there is no such stream, or it may not be read.
        """
        ...


class Shards(Protocol):
    """A sharded stream: all that the consumer (``ShardedChannel``) asks of a service."""

    async def shards(self) -> Sequence[Shard]:
        """Every shard that is open, or closed and still has records. One that is listed no longer has none
        left and never will have: whoever has it for a parent need not wait for it.

        Raises:
            Retryable: the service is away or overloaded.
            ConfigError: there is no such stream, or it may not be listed.
        """
        ...

    def read(self, shard: Shard, place: Place, *, limit: int | None = None) -> Reader:
        """A reader of what lies behind `place`; from the oldest record on where that place's record and more
        are gone. Asks nothing yet. ``limit``: pages are to hold no more numbers than this (for who only wants
        to know whether there is something); ``None``: as many as suit the service."""
        ...
