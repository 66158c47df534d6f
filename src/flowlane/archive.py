"""ZIP archives in any store: the directory by two ranged reads at most, small members whole.

Nothing is unzipped to a disk, and of an archive nothing is held but its entries.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from operator import attrgetter
from typing import Final

from flowlane.clock import Clock
from flowlane.errors import Damaged, Incomplete, Permanent, Refused, Superseded, redact
from flowlane.ports import Archive, Connections, ObjectInfo, Store
from flowlane.streams.zip import checks
from flowlane.streams.zip.directory import Directory
from flowlane.streams.zip.end import TAIL, check_head, find_end
from flowlane.streams.zip.entry import Entry, ZipLimits
from flowlane.streams.zip.member import Member
from flowlane.streams.zip.run import Read, Run, Stretch, batches, end_of
from flowlane.veil import remember

#: Bytes of a directory that a thread reads in one go: some 1,500 entries, a few milliseconds.
_SLICE: Final = 128 << 10
#: Bytes at an object's end that are fetched first: a directory of 3,000 entries comes with the end record.
#: Where objects lie far away, a request costs as much time as a megabyte does.
FIRST_READ: Final = 256 << 10
#: Bytes at an object's beginning that tell what it is.
_HEAD: Final = 4
#: Entries that are judged in one go, some microseconds each.
_JUDGED: Final = 512
#: Members, and bytes of them, that a thread reads in one go.
_COUNT: Final = 128
_SIZE: Final = 1 << 20


@asynccontextmanager
async def open_archive(
    store: Store,
    clock: Clock,
    url: str,
    *,
    etag: str = "",
    limits: ZipLimits | None = None,
    password: str | None = None,
) -> AsyncIterator[Archive]:
    """See ``Context.archive``: the archive at `url` in `store`, with the password itself."""
    info = await store.head(url)
    if info is None:
        raise Incomplete(f"there is no {redact(url)}")
    if etag and info.etag != etag:
        raise Superseded(f"{redact(url)}: its ETag is {info.etag or 'not told'}, no longer {etag}")
    if info.size < 0:
        raise Permanent(f"{redact(url)}: its size is not told: copy it to a store that does (ctx.copy)")
    limits = limits or ZipLimits()
    reading = _Object(store, info)
    with _told(url):
        entries = await _entries(reading, clock, limits)
    yield StoredArchive(reading, clock, entries, limits, password)


@asynccontextmanager
async def connect_archive(
    connections: Connections,
    clock: Clock,
    url: str,
    *,
    etag: str = "",
    limits: ZipLimits | None = None,
    password: str | None = None,
) -> AsyncIterator[Archive]:
    """See ``Context.archive``: as ``open_archive``, in the store of `url`, the password by reference."""
    known = password
    if password and "://" in password:
        known = await connections.secret(password)
    elif password:
        remember(password)
    store = await connections.store(url)
    async with open_archive(store, clock, url, etag=etag, limits=limits, password=known) as archive:
        yield archive


class _Object:
    """The bytes of one object by ranges, all of them of the version that `info` describes; its last ones,
    among which all of a small archive is, are fetched once."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store = store
        self._known = info.size  # where the bytes begin that are in memory
        self._tail = b""
        self.info = info

    async def tail(self) -> bytes:
        """The bytes in which the end record is."""
        first = max(0, self.info.size - FIRST_READ)
        self._tail = await self.whole(first, self.info.size)
        self._known = first
        return self._tail[-TAIL:]

    @asynccontextmanager
    async def blocks(self, start: int, end: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes [start, end), in blocks. Whoever wants no more of them may leave."""
        if start >= self._known:
            yield _one(self._tail[start - self._known : end - self._known])
            return
        async with self._store.read(self.info.url, start=start, end=end, etag=self.info.etag) as body:
            pulled = aiter(body)
            try:
                yield pulled
            finally:
                if isinstance(pulled, AsyncGenerator):
                    await pulled.aclose()

    async def whole(self, start: int, end: int) -> bytes:
        """The bytes [start, end).

        Raises:
            Incomplete: they are not all there.
        """
        async with self.blocks(start, end) as blocks:
            found = b"".join([block async for block in blocks])
        _check_length(len(found), end - start)
        return found


async def _one(block: bytes) -> AsyncGenerator[bytes]:
    yield block


def _check_length(came: int, wanted: int) -> None:
    if came != wanted:
        raise Incomplete(f"{came:,} bytes came of the {wanted:,} asked for")


async def _entries(reading: _Object, clock: Clock, limits: ZipLimits) -> list[Entry]:
    end = await clock.offload(partial(find_end, await reading.tail(), reading.info.size))
    if end.prefix:
        check_head(await reading.whole(0, _HEAD))
    directory = Directory(end, limits)
    came, held = 0, b""
    async with reading.blocks(end.start, end.start + end.size) as blocks:
        async for block in blocks:
            came += len(block)
            for at in range(0, len(block), _SLICE):
                if held:
                    await clock.offload(partial(directory.feed, held))
                held = block[at : at + _SLICE]
    _check_length(came, end.size)
    return await clock.offload(partial(_closed, directory, held))


def _closed(directory: Directory, last: bytes) -> list[Entry]:
    """The entries; `last` are the directory's last bytes (each trip to a thread costs as 50 entries do)."""
    directory.feed(last)
    return directory.close()


class StoredArchive:
    """See ``ports.Archive``."""

    def __init__(
        self,
        reading: _Object,
        clock: Clock,
        entries: Sequence[Entry],
        limits: ZipLimits,
        password: str | None,
    ) -> None:
        self.info = reading.info
        self.entries = entries
        self._reading = reading
        self._clock = clock
        self._limits = limits
        self._password = password

    def refuse(self, entry: Entry) -> None:
        """See ``ports.Archive``."""
        with _told(self.info.url):
            checks.refuse(entry, self._limits, password=self._password)

    async def read(self, entry: Entry, *, limit: int = 1 << 20) -> bytes:
        """See ``ports.Archive``."""
        with _told(self.info.url):
            self._check(entry, limit)
            return await self._whole(entry)

    async def read_all(
        self, entries: Iterable[Entry], *, limit: int = 1 << 20
    ) -> AsyncIterator[tuple[Entry, bytes | Damaged | Refused]]:
        """See ``ports.Archive``."""
        listed = await self._clock.offload(partial(_in_order, entries))
        for at in range(0, len(listed), _JUDGED):
            wanted: list[Entry] = []
            for entry in listed[at : at + _JUDGED]:
                try:
                    self._check(entry, limit)
                except Refused as error:
                    yield entry, self._named(error)
                else:
                    wanted.append(entry)
            for batch in batches(wanted):
                for entry, read in await self._batch(batch):
                    yield entry, read if isinstance(read, bytes) else self._named(read)

    def _check(self, entry: Entry, limit: int) -> None:
        checks.refuse(entry, self._limits, password=self._password)
        if entry.size > limit:
            raise Refused(f"{entry} is not read whole: it has {entry.size:,} bytes, of at most {limit:,}")

    def _named(self, error: Damaged | Refused) -> Damaged | Refused:
        return type(error)(f"{redact(self.info.url)}: {error}")

    async def _batch(self, batch: Sequence[Stretch]) -> list[tuple[Entry, Read]]:
        """The members in all of those stretches, which are read at once."""
        with _told(self.info.url):
            if len(batch) == 1:
                return await self._stretch(batch[0])
            try:
                async with asyncio.TaskGroup() as tasks:
                    reading = [tasks.create_task(self._stretch(stretch)) for stretch in batch]
            except ExceptionGroup as group:
                raise group.exceptions[0] from None  # of the store, or all of them of one defect
            return [member for task in reading for member in task.result()]

    async def _stretch(self, stretch: Stretch) -> list[tuple[Entry, Read]]:
        run = Run(stretch.entries, password=self._password)
        found: list[tuple[Entry, Read]] = []
        async with self._reading.blocks(stretch.start, stretch.end) as blocks:
            async for block in blocks:
                members, more = run.feed(block), True
                while more:
                    more = await self._clock.offload(partial(_take, members, found))
                if run.ended:
                    break
        found += run.close()
        return found

    async def _whole(self, entry: Entry) -> bytes:
        member = Member(entry, password=self._password)
        found: list[bytes] = []
        async with self._reading.blocks(entry.offset, end_of(entry)) as blocks:
            async for block in blocks:
                found += await self._clock.offload(_all(member, block))
                if member.ended:
                    break
        await self._clock.offload(member.close)
        return b"".join(found)


def _all(member: Member, block: bytes) -> Callable[[], list[bytes]]:
    return lambda: list(member.feed(block))


def _in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Each of `entries` once, by their places in the archive."""
    return sorted({entry.index: entry for entry in entries}.values(), key=attrgetter("offset"))


def _take(members: Iterator[tuple[Entry, Read]], found: list[tuple[Entry, Read]]) -> bool:
    """Move some of `members` to `found`; whether there may be more."""
    size = 0
    for count, member in enumerate(members, 1):
        found.append(member)
        size += member[0].size
        if count == _COUNT or size > _SIZE:
            return True
    return False


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Says of which archive the readers speak, who do not know it."""
    where = redact(url)
    try:
        yield
    except (Damaged, Refused, Incomplete) as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error
