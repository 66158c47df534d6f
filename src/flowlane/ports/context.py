"""What a handler is given."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from flowlane.ports.records import Record
from flowlane.ports.storage import Archive, ObjectInfo
from flowlane.state import Counts
from flowlane.streams.zip.entry import ZipLimits

if TYPE_CHECKING:
    from flowlane.lane import Fact, Unit


F = TypeVar("F", bound="Fact")
R = TypeVar("R")
Mapper = Callable[[Record], "Record | list[Record] | None"]
Enricher = Callable[[list[Record]], Awaitable[list[Record]]]


class Rows(Protocol):
    """Records on their way from a source to ``Context.load``; nothing is read before that."""

    def map(self, function: Mapper) -> Rows:
        """Each record through a pure `function`: to a record, a list (expanded), or None (skipped).
        ``raise BadRecord(reason)`` sends the record to quarantine."""
        ...

    def enrich(self, function: Enricher) -> Rows:
        """Each batch through an async `function`, which returns as many records in the same order."""
        ...


class Context(Protocol):
    """What a stage may do to the world, so that it is logged, fenced, resumed and counted.

    Effects are named by their order in the handler, or by name, and found in the log again when the unit is
    handled once more: what was done is not done twice.
    """

    @property
    def lane(self) -> str: ...
    @property
    def run(self) -> str:
        """The stream of the run."""
        ...

    @property
    def unit(self) -> str:
        """The stream of the unit being handled."""
        ...

    def now(self) -> datetime:
        """The wall clock, in UTC."""
        ...

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """As ``Store.head``."""
        ...

    def list(self, url: str) -> AsyncIterator[ObjectInfo]:
        """As ``Store.list``."""
        ...

    async def recall(self, fact: type[F], **key: Any) -> F | None:
        """The last fact of its stream; yielding a newer one is refused if another one came in between."""
        ...

    def archive(
        self, url: str, *, etag: str = "", limits: ZipLimits | None = None, password: str | None = None
    ) -> AbstractAsyncContextManager[Archive]:
        """The ZIP archive at `url`: its directory is read on entering, by two ranged reads at most.

        `password` is that of encrypted members: a secret reference. `limits`: ``ZipLimits()`` by default.

        Raises (on entering):
            Damaged: it is no zip, it is cut, or its directory contradicts itself.
            Refused: it is beyond `limits`.
            Superseded: `etag` was given and the object has another one now.
            Incomplete: there is no such object.
        """
        ...

    async def known(self, units: Sequence[Unit]) -> Sequence[bool]:
        """For each of `units`, some hundred at most, whether the log knows it: it need not be yielded.

        One that is not known may be by the time that it is yielded; it is registered once all the same.
        """
        ...

    async def offload(self, function: Callable[..., R], *args: Any) -> R:
        """``function(*args)``, which computes for long and has no effects, off the loop."""
        ...

    def turn(self, name: str, most: int) -> AbstractAsyncContextManager[None]:
        """Wait until fewer than `most` units of this lane have a turn of that name in this process, and have
        one. In order of asking; the time it takes is not held against the stage's timeout, nor is an end of
        the process that comes in between against the unit. Ask before the first effect."""
        ...

    def rows(self, url: str, **options: Any) -> Rows:
        """The records of the source at `url`."""
        ...

    async def load(self, rows: Rows, *, to: str, **options: Any) -> Counts:
        """Write `rows` to the sink `to`, in batches, resumed from the log.

        Raises:
            Permanent: the unit's error budget is spent, or the sink refuses for good.
            Retryable: anything that may pass.
        """
        ...

    async def copy(
        self,
        url: str,
        *,
        to: str,
        verify: Literal["content", "length"] = "content",
        headers: Mapping[str, str] | None = None,
        etag: str = "",
        overwrite: bool = False,
    ) -> ObjectInfo:
        """The object at `url` lands under `to`, its bytes untouched, whole and proven, or not at all.

        ``verify="content"`` decodes a ``.gz`` or ``.zst`` on the way through and demands its proper end.

        Raises:
            Incomplete: the body is cut or is not what its name says.
            Superseded: `etag` was given and the object has another one now.
        """
        ...

    async def step(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """``await function(*args)``, once it has been logged not again; its (JSON) result is in the log.

        At least once: a crash between the call and the log repeats it, with the same ``idempotency_key``,
        which is passed as a keyword if `function` takes one.
        """
        ...

    async def secret(self, reference: str, *, fresh: bool = False) -> str:
        """The secret that `reference` (``env://NAME``, ``secretsmanager://name``) names.

        `fresh`: for when the one given last has been refused; it may have been rotated since.
        """
        ...

    @property
    def attempts_left(self) -> int:
        """Attempts that the policy still allows after this one."""
        ...

    def skip(self, reason: str) -> None:
        """The unit ends as skipped rather than settled."""
        ...
