"""Records: sources, sinks, and what passes between them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

import msgspec

from flowlane.state import Position

Record = dict[str, Any]


class Bad(msgspec.Struct, frozen=True):
    """A record that could not be read or was refused: where it was, what was wrong, what it looked like."""

    row: int
    reason: str
    raw: str


class Split(msgspec.Struct, frozen=True):
    """A piece of a source, read in the same order every time while ``replayable``."""

    id: str
    url: str
    etag: str = ""
    size: int = -1
    replayable: bool = True
    first: str = ""
    last: str = ""
    member: str = ""  #: of an archive at ``url``: the name, for people


class Cut(msgspec.Struct, frozen=True):
    """The cutting policy: a batch ends at `rows` records or `size` decoded bytes, whichever comes first.
    Written into a unit's first event, so that no later release cuts an old unit otherwise."""

    rows: int = 10_000
    size: int = 8 << 20

    def __str__(self) -> str:
        return f"{self.rows}/{self.size}"

    @classmethod
    def parse(cls, text: str) -> Cut:
        """The inverse of ``str``; the default policy for an empty text."""
        if not text:
            return cls()
        rows, _, size = text.partition("/")
        return cls(int(rows), int(size))


class Batch(msgspec.Struct):
    """Consecutive records of one split: [start, end) in source coordinates, and what was unreadable there."""

    records: list[Record]
    start: Position
    end: Position
    bad: list[Bad]
    size: int = 0  #: bytes read from the source for it, as stored there


class Source(Protocol):
    """Where records come from; opened by URI."""

    def splits(self) -> AsyncGenerator[Split]:
        """The pieces, in the same order while the source is unchanged."""
        ...

    def read(self, split: Split, position: Position, cut: Cut) -> AsyncGenerator[Batch]:
        """The batches of `split` from `position` on (``Position()``: the beginning), cut by `cut` alone: the
        same batches every time.

        Raises:
            Incomplete: the split cannot be proven to have been read whole.
            Permanent: nothing could ever prove it (neither length nor checksum).
            Superseded: it is no longer what was listed.
        """
        ...

    def prove(self, split: Split, position: Position) -> AsyncGenerator[int]:
        """Go through what of `split` can be proven whole before a record of it is read from `position` on,
        and say now and then, while there is more to go through, how many bytes that was. A source that has
        nothing to prove, or proves it at once, says nothing.

        Raises:
            Incomplete, Permanent, Superseded: as for ``read``.
        """
        ...


class UnitRef(msgspec.Struct, frozen=True):
    """Who writes: the unit's stream, its generation among units of one target, the attempt's token.

    Of rows that share a key the one of the latest generation stays, whole, in whatever order units write.
    """

    stream: str
    token: int
    generation: int = 0


class TableSpec(msgspec.Struct, frozen=True):
    """The table wanted: its name, key columns, and how rows meet what is there.

    ``types``: of columns whose type is known, the keys' above all, in DynamoDB's words: ``S`` (text), ``N``
    (number) or ``B`` (bytes). A sink that makes the table declares them so. What a sink is opened with says
    the same by options in its URI, or by this under the option ``into``.
    """

    name: str
    key: tuple[str, ...] = ()
    mode: Literal["append", "upsert"] = "append"
    schema: Literal["evolve", "freeze", "quarantine"] = "evolve"
    types: tuple[tuple[str, Literal["S", "N", "B"]], ...] = ()


class Writer(Protocol):
    """One unit's way into one target, under one token."""

    @property
    def position(self) -> Position | None:
        """Where the sink itself says this unit's split stands; ``None`` where only the log knows.

        Less than the log knows of means that what had been written is gone: the split begins again."""
        ...

    @property
    def resume(self) -> str:
        """What ``Sink.open`` is given to go on behind the last batch written; empty if it needs nothing."""
        ...

    @property
    def unfinished(self) -> tuple[str, str]:
        """The URL of the object in a store that is being written, and what names its unfinished upload (empty
        while there is none): for ``Store.discard``, should nobody go on with it. Two empty texts where a sink
        leaves nothing behind."""
        ...

    @property
    def changes(self) -> Sequence[str]:
        """What the last ``write`` changed of the target beyond rows (a column added, a table made), as texts
        fit for the log; the same ones when that batch is written again. Empty for most."""
        ...

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """The batch's records are in the target, once: a batch that ends at or before ``position`` changes
        nothing. Returns the records that the target refuses, which were left out.

        Raises:
            Fenced: a later token or generation has taken over; nothing was written.
        """
        ...

    async def finish(self) -> None:
        """The split is whole: make the effect visible where it is not yet. Repeatable."""
        ...


class Sink(Protocol):
    """Where records go; opened by URI."""

    def open(self, split: Split, unit: UnitRef, resume: str = "") -> AbstractAsyncContextManager[Writer]: ...


class Database(Protocol):
    """Where SQL runs."""

    def transaction(self) -> AbstractAsyncContextManager[Any]: ...
    async def ensure(self, spec: TableSpec) -> None: ...
