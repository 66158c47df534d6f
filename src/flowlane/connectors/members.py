"""Records out of one member of a ZIP archive: a range request, inflated, proven, parsed, cut into batches.

Nothing of the archive is read but the member's own bytes. What an earlier attempt has had is passed over:
inflated and dropped, or, where the member is stored as it is, not even fetched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from itertools import islice
from typing import Any, Final, Literal, get_args
from weakref import WeakKeyDictionary

from flowlane.archive import open_archive
from flowlane.blocks import gathered
from flowlane.connectors.hop import hop
from flowlane.connectors.reading import Reading, following, split_id, told
from flowlane.errors import ConfigError, Damaged, Incomplete, Permanent, Superseded, redact
from flowlane.ports import Batch, Connections, Cut, Environment, ObjectInfo, Split
from flowlane.state import Position
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.inflate import Decoder, decoder
from flowlane.streams.kinds import kind_of
from flowlane.streams.members import PIECE
from flowlane.streams.zip import checks
from flowlane.streams.zip.entry import DEFLATE, STORED, Entry, ZipLimits
from flowlane.streams.zip.member import HEADER, MAX_TAIL, Member
from flowlane.turns import waiting

Verify = Literal["content", "stream"]

#: What a reader holds besides its records: a block, what waits behind it, a stretch of rows, the inflater.
_BASE: Final = 6 << 20
#: Bytes of records that are reckoned for each byte of a batch: 32 MiB for a default one (10,000 rows, 8 MiB).
#: By tracemalloc such a one takes, all told, 11 MB with 10 CSV columns of 10 characters, 16 MB with 10 of 100
#: or 2 of one, 31 MB with 50 JSON fields of 10; more than is reckoned with 50 CSV columns of 10 characters
#: (48 MB), 400 of 10 (72 MB) and 400 of two (238 MB: 28 bytes a byte).
_BLOWN_UP: Final = 4
#: Pieces inflated in one hop while they are only proven.
_SLICE: Final = 64
#: A packed member of at most this many bytes is fetched once, though it is proven and then read.
_KEPT: Final = 1 << 20
#: A member of at most this many bytes is parsed on the loop: it takes a millisecond.
_PARSED: Final = 64 << 10
#: Fetched at a time to learn where a member's data and rows begin.
_HEAD: Final = 64 << 10


class Budget:
    """Memory for all open members of a process: whoever comes first is served first."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self.used = 0  #: bytes

    @asynccontextmanager
    async def hold(self, size: int, limit: int) -> AsyncIterator[None]:
        """Hold `size` bytes, once all that is held comes to `limit` at most, or nobody else holds any."""
        with waiting():
            async with self._turn:
                while self.used and self.used + size > limit:
                    self._freed.clear()
                    await self._freed.wait()
                self.used += size
        try:
            yield
        finally:
            self.used -= size
            self._freed.set()


_BUDGETS: Final[WeakKeyDictionary[Connections, Budget]] = WeakKeyDictionary()


def budget_of(environment: Environment) -> Budget:
    """The one budget of a process's readers: of all that its connections have open."""
    return _BUDGETS.setdefault(environment.connections, Budget())


async def open_member(
    url: str,
    environment: Environment,
    wanted: object,
    *,
    etag: str,
    verify: str,
    password: str | None,
    limits: ZipLimits | None,
    format: str,
    form: CsvFormat,
) -> MemberSource:
    """The rows of the entry `wanted` (itself, its name or its index) of the archive at `url`.

    Raises:
        Refused: the entry is one that is not read.
        Permanent: there is none of that name or index, or several have the name.
        ConfigError: an option is wrong, or the entry's name does not say what rows are in it.
    """
    if verify not in get_args(Verify):
        raise ConfigError(f"verify={verify!r}: must be {' or '.join(get_args(Verify))}")
    limits = ZipLimits() if limits is None else limits
    if not isinstance(limits, ZipLimits):
        raise ConfigError(f"limits={limits!r}: must be a ZipLimits(...)")
    store = await environment.connections.store(url)
    if isinstance(wanted, Entry):
        entry = wanted
        info = ObjectInfo(url, etag=etag) if etag else await store.head(url)
        if info is None:
            raise Incomplete(f"there is no {redact(url)}")
    else:
        opened = open_archive(store, environment.clock, url, etag=etag, limits=limits, password=password)
        async with opened as archive:
            with told(url):
                entry, info = _find(archive.entries, wanted), archive.info
    with told(url):
        checks.refuse(entry, limits, password=password)
    return MemberSource(environment, info, entry, format, form, verify == "content", password, limits)


#: Methods that inflate a piece in a fraction of a millisecond.
_FAST: Final = frozenset({STORED, DEFLATE})


class MemberSource:
    """See ``ports.Source``: the rows of one member, as one split, pinned to the archive's ETag.

    Positions count bytes of what the rows are parsed from: of the member, or, where its name ends in ``.gz``
    or ``.zst``, of what that decodes to.
    """

    def __init__(
        self,
        environment: Environment,
        info: ObjectInfo,
        entry: Entry,
        format: str,
        form: CsvFormat,
        proves: bool,
        password: str | None,
        limits: ZipLimits,
    ) -> None:
        self._environment = environment
        self._clock = environment.clock
        self._info = info
        self._entry = entry
        self._kind = kind_of(entry.name.rpartition("/")[2], format)
        self._form = form
        self._proves = proves
        self._password = password
        self._limits = limits
        self._kept: list[bytes] | None = None  # the member, packed, from its proof to its reading

    async def splits(self) -> AsyncGenerator[Split]:
        """See ``Source.splits``."""
        info, entry = self._info, self._entry
        name = f"{split_id(info.url)}#{entry.index}"
        yield Split(
            name, info.url, info.etag, entry.packed, replayable=bool(info.etag), member=entry.name[:200]
        )

    async def prove(self, split: Split, position: Position) -> AsyncGenerator[int]:
        """See ``Source.prove``: the member is inflated once, and its sizes and CRC held against the
        directory's, unless it is verified by the ``stream``."""
        if not self._proves:
            return
        member, packing = self._decoder()
        passed = 0
        with told(split.url):
            async with self._holding(None), self._fetched(split, self._entry.offset) as lists:
                async for blocks in lists:
                    pieces, ended = _fed(packing, blocks), False
                    while not ended:
                        count, ended = await self._run(_drained, pieces)
                        passed += count
                        if not (ended and member.ended):
                            yield passed
                    if member.ended:
                        self._keep(blocks, member)
                        break
                await self._run(packing.close)

    async def read(self, split: Split, position: Position, cut: Cut) -> AsyncGenerator[Batch]:
        """See ``Source.read``.

        Raises:
            Damaged: header, sizes or CRC disprove the directory; it says how many rows went out before.
            Permanent: its CSV header is none.
            Refused: the password is wrong.
        """
        member, packing = self._decoder()
        reading = Reading(packing, self._kind, self._form, position, cut)
        with told(split.url), _counted(position) as out:
            async with self._holding(cut):
                start = self._entry.offset
                if self._jumps(position):
                    if position.offset > self._entry.size:
                        at = f"byte {position.offset:,}, up to which it was read before"
                        raise Superseded(f"{self._entry} ends before {at}")
                    await self._begin(split, member, reading)
                    member.seek(position.offset, position.crc)
                    reading.jump()
                    start += member.start + position.offset
                async with self._fetched(split, start) as lists:
                    async for blocks in lists:
                        found = _through(reading, member, blocks)
                        while batch := await self._following(found):
                            out.end = batch.end
                            yield batch
                        if member.ended:
                            return
                found = reading.close()  # which says that it is cut
                while batch := await following(self._clock, found):
                    yield batch

    # ------------------------------------------------------------------ parts of both

    def _decoder(self) -> tuple[Member, Decoder]:
        member = Member(self._entry, password=self._password)
        return member, _Packed(member, decoder(f".{self._kind.packing}")) if self._kind.packing else member

    @asynccontextmanager
    async def _holding(self, cut: Cut | None) -> AsyncIterator[None]:
        """The memory that reading takes: a part of the budget; without records if there is no `cut`."""
        entry = self._entry
        size = min(_BASE, entry.packed + entry.size)
        if cut is not None:
            size += _BLOWN_UP * (cut.size if self._kind.packing else min(cut.size, entry.size))
        async with budget_of(self._environment).hold(size, self._limits.memory):
            yield

    @asynccontextmanager
    async def _fetched(
        self, split: Split, start: int, count: int | None = None
    ) -> AsyncIterator[AsyncIterator[list[bytes]]]:
        """The archive's bytes from `start` on, no more than the member can have; `count` of them at most."""
        if self._kept is not None and start == self._entry.offset:
            blocks, self._kept = self._kept, None
            yield _one(blocks)
            return
        entry = self._entry
        # The local header's own name and extra fields may be longer than those in the directory.
        end = entry.offset + HEADER + MAX_TAIL + entry.packed
        end = min(end, entry.limit or end, end if count is None else start + count)
        if start >= end:
            yield _one([])
            return
        store = await self._environment.connections.store(split.url)
        async with (
            store.read(split.url, start=start, end=end, etag=split.etag) as body,
            aclosing(gathered(body, self._clock)) as lists,
        ):
            yield lists

    def _keep(self, blocks: list[bytes], member: Member) -> None:
        """Keep `blocks` for the reading that follows, if they are all of a small member."""
        size = sum(map(len, blocks))
        if member.start + self._entry.packed <= size <= _KEPT:
            self._kept = blocks

    def _is_small(self, most: int) -> bool:
        """Whether it takes less time than the way to a thread and back to inflate it: `most` bytes do."""
        entry = self._entry
        fast = entry.compression in _FAST and not (entry.encrypted or self._kind.packing)
        return fast and entry.size <= most

    async def _run(self, work: Any, *args: object) -> Any:
        """`work` off the loop, unless the member is small."""
        return work(*args) if self._is_small(PIECE) else await hop(self._clock, work, *args, waits=False)

    async def _following(self, found: Iterator[Batch | None]) -> Batch | None:
        """See ``following``; on the loop, if the member is small to a parser, too."""
        if not self._is_small(_PARSED):
            return await following(self._clock, found)
        return next((batch for batch in found if batch is not None), None)

    # ------------------------------------------------------------------ a stored member from its middle

    def _jumps(self, position: Position) -> bool:
        """Whether what lies before `position` need not be fetched, nor is at hand."""
        entry = self._entry
        if entry.compression or entry.encrypted or self._kind.packing or self._kept is not None:
            return False
        return position.offset > self._form.max_row + _HEAD + HEADER + MAX_TAIL

    async def _begin(self, split: Split, member: Member, reading: Reading) -> None:
        """Read local header and CSV header."""
        start = self._entry.offset
        while not (member.seekable and reading.ready):
            came = 0
            async with self._fetched(split, start, _HEAD) as lists:
                async for blocks in lists:
                    came += sum(map(len, blocks))
                    await following(self._clock, reading.feed(blocks))  # none: all of it lies before
            if not came:
                member.close()  # which says that it is cut
            start += came


class _Packed:
    """See ``inflate.Decoder``: what is packed once more inside of a member."""

    def __init__(self, member: Member, inner: Decoder) -> None:
        self._member = member
        self._inner = inner

    def feed(self, block: bytes) -> Iterator[bytes]:
        """See ``Decoder.feed``."""
        for piece in self._member.feed(block):
            yield from self._inner.feed(piece)

    def close(self) -> None:
        """See ``Decoder.close``: by both."""
        self._member.close()
        self._inner.close()


class _Out:
    """How far rows have been handed out."""

    def __init__(self, end: Position) -> None:
        self.end = end


@contextmanager
def _counted(position: Position) -> Iterator[_Out]:
    """Where the proof fails behind rows that went out, says how many."""
    out = _Out(position)
    try:
        yield out
    except Damaged as error:
        if not out.end.row:
            raise
        raise Damaged(f"{error}; {out.end.row:,} rows of it had gone out before that was known") from error


def _through(reading: Reading, member: Member, blocks: list[bytes]) -> Iterator[Batch | None]:
    """The batches that `blocks` complete; all that are left, if those are the last ones."""
    yield from reading.feed(blocks)
    if member.ended:
        yield from reading.close()


def _fed(decoder: Decoder, blocks: list[bytes]) -> Iterator[bytes]:
    for block in blocks:
        yield from decoder.feed(block)


def _drained(pieces: Iterator[bytes]) -> tuple[int, bool]:
    """The length of the next ``_SLICE`` of `pieces` at most, and whether they were the last ones."""
    count = size = 0
    for piece in islice(pieces, _SLICE):
        count += 1
        size += len(piece)
    return size, count < _SLICE


async def _one(blocks: list[bytes]) -> AsyncIterator[list[bytes]]:
    yield blocks


def _find(entries: Sequence[Entry], wanted: object) -> Entry:
    """The entry of that index or name."""
    if isinstance(wanted, int) and 0 <= wanted < len(entries):
        return entries[wanted]
    found = [entry for entry in entries if entry.name == wanted]
    if len(found) == 1:
        return found[0]
    if not found:
        raise Permanent(f"there is no entry {str(wanted)[:100]!a} in it")
    raise Permanent(
        f"{len(found)} of its entries are called {found[0].name[:100]!a}: give entry=, the index of one"
    )
