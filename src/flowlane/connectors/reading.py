"""Records out of any store's objects: body -> decoded bytes -> rows -> batches, a slice at a time.

Inflating and parsing are one pipeline of generators, which a thread pulls until it has a batch, has used up
its block or has decoded ``_SLICE`` pieces: one hop for all of that. No more than a batch is ever in memory.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from hashlib import blake2b
from typing import Final, Protocol, TypeVar

from flowlane.blocks import gathered
from flowlane.clock import Clock
from flowlane.connectors.hop import hop
from flowlane.errors import Damaged, Incomplete, Permanent, Superseded, redact
from flowlane.ports import Batch, Cut, ObjectInfo, Split, Store
from flowlane.state import Position
from flowlane.streams.csvrows import CsvRows
from flowlane.streams.cutting import Chunk, Cutter
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.inflate import Decoder, decoder
from flowlane.streams.jsonrows import JsonRows
from flowlane.streams.kinds import Kind, kind_of
from flowlane.streams.preview import is_page, preview

T = TypeVar("T")

_SLICE: Final = 16  # pieces decoded in one hop, where no batch is found in them
_WILD: Final = frozenset("*?[")
_END: Final = object()


class Rows(Protocol):
    """See ``CsvRows`` and ``JsonRows``."""

    @property
    def skipping(self) -> bool: ...
    @property
    def ready(self) -> bool: ...
    def jump(self) -> None: ...
    def feed(self, piece: bytes) -> Iterator[Chunk]: ...
    def close(self) -> Iterator[Chunk]: ...


class StoreSource:
    """See ``ports.Source``: the objects at `url`, which may be a pattern where the store can list.

    An object is one split, pinned to its ETag; one without an ETag is not replayable.
    """

    def __init__(self, store: Store, clock: Clock, url: str, form: CsvFormat, given: str = "") -> None:
        self._store = store
        self._clock = clock
        self._url = url
        self._form = form
        self._given = given
        if not self._wild:
            kind_of(url, given)

    @property
    def _wild(self) -> bool:
        scheme, _, rest = self._url.partition("://")
        return scheme not in ("http", "https") and (rest.endswith("/") or bool(_WILD & set(rest)))

    async def splits(self) -> AsyncGenerator[Split]:
        """See ``Source.splits``.

        Raises:
            Incomplete: there is no such object (a pattern may match none).
            ConfigError: the name of one does not say what rows are in it.
        """
        if not self._wild:
            info = await self._store.head(self._url)
            if info is None:
                raise Incomplete(f"there is no {redact(self._url)}")
            yield self._split(info)
            return
        async with pulled(self._store.list(self._url)) as found:
            async for info in found:
                yield self._split(info)

    async def read(self, split: Split, position: Position, cut: Cut) -> AsyncGenerator[Batch]:
        """See ``Source.read``.

        Raises:
            Damaged: its content is damaged, cut, or not what its name says.
            Permanent: nothing would tell whether it is whole; or its header is none.
        """
        kind = kind_of(split.url, self._given)
        with told(split.url):
            async with (
                self._store.read(split.url, etag=split.etag) as body,
                aclosing(gathered(body, self._clock)) as lists,
            ):
                if not kind.packing and not body.proven_length and split.size < 0:
                    raise Permanent("neither a length nor a checksum tells whether it is whole")
                reading = Reading(decoder(f".{kind.packing}"), kind, self._form, position, cut)
                async for blocks in lists:
                    found = reading.feed(blocks)
                    while batch := await following(self._clock, found):
                        yield batch
                found = reading.close(split.size)
                while batch := await following(self._clock, found):
                    yield batch

    async def prove(self, split: Split, position: Position) -> AsyncGenerator[int]:
        """See ``Source.prove``: nothing, a body is proven while it is read."""
        return
        yield 0  # makes this a generator

    def _split(self, info: ObjectInfo) -> Split:
        kind_of(info.url, self._given)
        return Split(split_id(info.url), info.url, etag=info.etag, size=info.size, replayable=bool(info.etag))


class Reading:
    """One body's way from blocks to batches; its methods are for a thread."""

    def __init__(self, decoder: Decoder, kind: Kind, form: CsvFormat, position: Position, cut: Cut) -> None:
        self._decoder = decoder
        self._rows: Rows = CsvRows(form, position) if kind.rows == "csv" else JsonRows(position)
        self._cutter = Cutter(cut, position)
        self._what = kind.rows
        self._begun = False
        self._read = 0  # bytes, as stored
        self._counted = 0  # of them, those in the sizes of batches

    @property
    def ready(self) -> bool:
        """Whether all was read that ``jump`` does not make superfluous: the header of a CSV."""
        return self._rows.ready

    def jump(self) -> None:
        """What the decoder gives next begins at the position to start from (see ``CsvRows.jump``)."""
        self._rows.jump()

    def feed(self, blocks: Sequence[bytes]) -> Iterator[Batch | None]:
        """The batches that `blocks` complete; ``None`` now and then, to come up for air."""
        pieces = 0
        for block in blocks:
            self._read += len(block)
            for piece in self._decoder.feed(block):
                if not self._begun and is_page(piece):
                    raise Damaged(f"it is a web page, not {self._what}: it begins with {preview(piece)}")
                self._begun = True
                if self._rows.skipping:
                    self._counted = self._read
                yield from self._batches(self._rows.feed(piece))
                pieces += 1
                if pieces % _SLICE == 0:
                    yield None

    def close(self, size: int = -1) -> Iterator[Batch | None]:
        """The last batches, once the end is proven: by the decoder, and by the `size` as stored, if known."""
        self._decoder.close()
        if 0 <= size != self._read:
            raise Incomplete(f"{self._read:,} bytes came, it has {size:,}")
        yield from self._batches(self._rows.close())
        for batch in self._cutter.close():
            yield self._sized(batch)

    def _batches(self, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        for chunk in chunks:
            for batch in self._cutter.feed(chunk):
                yield self._sized(batch)

    def _sized(self, batch: Batch) -> Batch:
        batch.size, self._counted = self._read - self._counted, self._read
        return batch


async def following(clock: Clock, found: Iterator[Batch | None]) -> Batch | None:
    """The next batch of `found`, a hop off the loop for each step to it; ``None``: there is none."""
    while (batch := await hop(clock, next, found, _END, waits=False)) is not _END:
        if isinstance(batch, Batch):
            return batch
    return None


def split_id(url: str) -> str:
    """What names the split without giving away what a query may hold."""
    query = url.partition("?")[2]
    return redact(url) + (f"?{blake2b(query.encode(), digest_size=8).hexdigest()}" if query else "")


@asynccontextmanager
async def pulled(some: AsyncIterable[T]) -> AsyncIterator[AsyncIterator[T]]:
    """`some`, iterated, and closed when whoever pulls has stopped pulling."""
    iterator = aiter(some)
    try:
        yield iterator
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


@contextmanager
def told(url: str) -> Iterator[None]:
    """Says of which object the decoders and parsers speak, who do not know it."""
    where = redact(url)
    try:
        yield
    except (Damaged, Permanent, Superseded, Incomplete) as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error
