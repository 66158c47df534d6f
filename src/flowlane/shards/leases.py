"""Leases: who reads a shard for a consumer, and from where on, as one stream of the log for each shard.

Every event carries the whole state, so the last one is the lease. Its version is the fence: whoever takes,
settles, hands over or rewinds appends one event that expects the version it has seen, and so a worker that
was paused while another one took its shard can settle nothing any more.

No clock is compared with another one's: what counts is for how long a stream's version has not moved, by the
clock of the process that looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from flowlane.clock import Clock, rfc3339
from flowlane.errors import Retryable, VersionConflict
from flowlane.events import SHARD_WANTED, Event, encode_data
from flowlane.ports import Append, Backend, Commit, Committed
from flowlane.shards.port import Place

#: Tries for one change whose outcome is unknown, at most, and seconds of pause between them, at most.
_TRIES: Final = 3
_PAUSE: Final = 0.5


class Lease(msgspec.Struct, frozen=True, omit_defaults=True):
    """``owner`` reads the shard on from ``place`` (empty: whoever comes first may); ``settled`` records lie
    before it, and the newest one of the shard was ``behind`` seconds further when last looked at. ``wanted``:
    who asked the owner for it. ``ended``: all of the shard is settled, and it is closed."""

    owner: str = ""
    place: Place = Place()
    settled: int = 0
    behind: float | None = None
    ended: bool = False
    wanted: str = ""


class Known(msgspec.Struct, frozen=True):
    """What this process knows of a lease: the last `version` it saw (0: there was no stream), and since when
    (``Clock.monotonic``) it has been seen as its owner left it. That somebody asked for it (``asked``: since
    when) is no sign of the owner's life."""

    version: int
    lease: Lease
    since: float
    asked: float | None = None


#: What a change makes of a lease: the event's type and the new state; ``None``: nothing, it is not to be.
Change = Callable[[Lease], tuple[str, Lease] | None]
#: Told of each event that this process appended or read: the shard's id, the event's type, the lease.
Listener = Callable[[str, str, Lease], None]

_decoder = msgspec.json.Decoder(Lease)


def stream_of(channel: str, shard: str, consumer: str) -> str:
    """The name of the lease's stream. No unit's stream is called so: an exclamation mark is in their names
    only before a digest, at the end (``lane.stream_of``)."""
    return f"{channel}!{shard}/{consumer}"


class Leases:
    """The leases of one consumer of one channel, as far as this process knows them; for all its workers."""

    def __init__(self, channel: str, consumer: str, log: Backend, clock: Clock) -> None:
        self._channel, self._consumer = channel, consumer
        self._log, self._clock = log, clock
        self._known: dict[str, Known] = {}
        self._commits = _Together(log)
        self.listeners: dict[object, Listener] = {}

    def known(self, shard: str) -> Known:
        """What is known of the lease of `shard`; asks nothing."""
        found = self._known.get(shard)
        if found is None:
            found = self._known[shard] = Known(0, Lease(), self._clock.monotonic())
        return found

    async def refresh(self, shards: Iterable[str]) -> None:
        """What is known of `shards` is at least as new as this call.

        Raises:
            Retryable: the log is away.
        """
        streams = {self._stream(shard): shard for shard in shards}
        for shard in streams.values():
            self.known(shard)  # a lease that nobody has begun is watched from now on, too
        heads = await self._log.last(list(streams)) if streams else {}
        for stream, event in heads.items():
            self._see(streams[stream], event)

    async def change(self, shard: str, change: Change, *, strict: bool = False) -> bool:
        """Append what `change` makes of the lease of `shard`; if another event came between, of the lease as
        it is then, or (`strict`) nothing. Whether the change stands (others may have followed it already).

        A lost answer is looked into: the event is in the stream, or it is tried again.

        Raises:
            Retryable: the log is away; whether the change stands is not known. To try again is harmless for
                a `change` that makes the same state of its own result.
        """
        failures = 0
        while True:
            known = self.known(shard)
            wish = change(known.lease)
            if wish is None:
                return False
            event = self._event(shard, known.version + 1, *wish)
            try:
                answer = await self._commits(Append(event.subject, known.version, (event,)))
            except Retryable:
                failures += 1
                if failures == _TRIES:
                    raise
                await self._clock.sleep(_PAUSE * self._clock.random())
                await self.refresh([shard])
                if await self._stands(event):
                    return True
                if strict and self.known(shard).version != known.version:
                    return False
                continue
            if isinstance(answer, Committed):
                self._see(shard, event)
                return True
            await self.refresh([shard])
            if strict:
                return False

    def _stream(self, shard: str) -> str:
        return stream_of(self._channel, shard, self._consumer)

    def _event(self, shard: str, version: int, kind: str, lease: Lease) -> Event:
        return Event(
            id=self._clock.token(),
            source=f"{self._channel}!",  # no lane's: a lane's events are its units'
            type=kind,
            subject=self._stream(shard),
            time=rfc3339(self._clock.now()),
            data=msgspec.Raw(encode_data(lease)),
            version=version,
        )

    async def _stands(self, event: Event) -> bool:
        async for found in self._log.read(event.subject, after=event.version - 1):
            return found.id == event.id
        return False

    def _see(self, shard: str, event: Event) -> None:
        """`event` is in the stream: what is known becomes it, unless that is newer already."""
        if event.version <= self.known(shard).version:
            return
        lease, now, before = _decoder.decode(event.data), self._clock.monotonic(), self.known(shard)
        if event.type == SHARD_WANTED and event.version == before.version + 1:
            self._known[shard] = Known(event.version, lease, before.since, now)
        else:  # or something unseen came between
            self._known[shard] = Known(event.version, lease, now, now if lease.wanted else None)
        for listener in list(self.listeners.values()):
            listener(shard, event.type, lease)


class _Together:
    """Appends that come while a commit is under way go into the next one together, each applied or not by
    itself. Whoever comes first commits for the others; no task is needed."""

    def __init__(self, log: Backend) -> None:
        self._log = log
        self._turn = asyncio.Lock()
        self._work: list[tuple[Append, asyncio.Future[Committed | VersionConflict]]] = []

    async def __call__(self, append: Append) -> Committed | VersionConflict:
        """Raises what ``Backend.commit`` does, with the same meaning."""
        answer: asyncio.Future[Committed | VersionConflict] = asyncio.get_running_loop().create_future()
        entry = (append, answer)
        self._work.append(entry)
        try:
            async with self._turn:
                if not answer.done():
                    work, self._work = self._work, []
                    await self._commit(work)
        finally:
            if entry in self._work:  # cancelled in the line: nobody is to commit it later
                self._work.remove(entry)
        return answer.result()

    async def _commit(
        self, work: Sequence[tuple[Append, asyncio.Future[Committed | VersionConflict]]]
    ) -> None:
        try:
            answers = await self._log.commit([Commit(appends=(append,)) for append, _ in work])
        except BaseException as error:
            # Also when the one that commits is cancelled: for the others the outcome is as unknown.
            told = error if isinstance(error, Exception) else Retryable("another one's commit was cut short")
            for _, answer in work:
                if not answer.done():
                    answer.set_exception(told)
                    answer.exception()  # that a cancelled one does not ask for it is no complaint
            if not isinstance(error, Exception):
                raise
            return
        for (_, answer), given in zip(work, answers, strict=True):
            if not answer.done():
                answer.set_result(given)
