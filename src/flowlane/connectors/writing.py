"""Records into any store: one object for each split, one gzip member or zstd frame for each batch.

An object appears whole or not at all, under a name that is the same on every attempt. An unfinished one is
resumed at the end of a batch; all that takes is one string, ``ObjectWriter.resume``, logged with the position
of the batch. It also tells what the object decodes to up to there, so that one which an earlier attempt had
finished, and died before it could say so, is known again.
"""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from hashlib import blake2b
from itertools import chain
from typing import Any, Final, Literal

import msgspec

from flowlane.blocks import gathered
from flowlane.clock import Clock
from flowlane.connectors.hop import hop
from flowlane.errors import Damaged, Fenced, Incomplete, Permanent, redact
from flowlane.ports import Bad, Batch, Record, Split, Store, UnitRef, Upload
from flowlane.state import Position
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.encode import CsvLines, Encoder, JsonLines, encoded, only, packer
from flowlane.streams.inflate import decoder
from flowlane.streams.kinds import Kind, stem_of

_BLOCK: Final = 1 << 20
_MAX_HEADER: Final = 16 << 10  # bytes of column names that a resume string may carry
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._=-]+")
_END: Final = object()


class Resume(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where an unfinished object stands: what ``ObjectWriter.resume`` holds, as JSON."""

    upload: str
    size: int = 0  #: bytes that are safely in it
    end: Position = Position()  #: in the source, of the last batch that is in them
    raw: int = 0  #: what they decode to: bytes,
    crc: int = 0  #: and the CRC-32 of those
    columns: list[str] | None = None


_resume: Final = msgspec.json.Decoder(Resume)


class StoreSink:
    """See ``ports.Sink``: objects below the folder `base`, or the one object `base`."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        base: str,
        kind: Kind,
        form: CsvFormat,
        schema: Literal["evolve", "freeze", "quarantine"],
    ) -> None:
        self._store = store
        self._clock = clock
        self._base = base
        self._kind = kind
        self._form = form
        self._schema = schema

    def url(self, split: Split, unit: UnitRef) -> str:
        """The object that `unit` writes of `split`: in a folder, readable, and no other unit's or split's."""
        if not self._base.endswith("/"):
            return self._base
        stem = _UNSAFE.sub("-", stem_of(split.url))[:80].strip(".-") or "rows"
        digest = blake2b(f"{unit.stream}\0{split.id}".encode(), digest_size=8).hexdigest()
        return f"{self._base}{stem}-{digest}.{self._kind}"

    @asynccontextmanager
    async def open(self, split: Split, unit: UnitRef, resume: str = "") -> AsyncIterator[ObjectWriter]:
        """See ``Sink.open``. `resume` is what the writer of an earlier attempt said after a batch."""
        async with AsyncExitStack() as stack:
            writer = ObjectWriter(
                self._store, self._clock, self.url(split, unit), self._kind, self._form, self._schema
            )
            await writer.begin(stack, f"{unit.stream}#{unit.token}", resume)
            yield writer


class ObjectWriter:
    """See ``ports.Writer``. Nothing is written, and no object appears, for a split without records."""

    def __init__(
        self, store: Store, clock: Clock, url: str, kind: Kind, form: CsvFormat, schema: str
    ) -> None:
        self._store = store
        self._clock = clock
        self._url = url
        self._kind = kind
        self._form = form
        self._schema = schema
        self._stack: AsyncExitStack | None = None
        self._owner = ""
        self._upload: Upload | None = None
        self._state = Resume("")
        self._safe = Resume("")  # the last state that the store has all the bytes of
        self._end: Position | None = None
        self._stands: tuple[int, int] | None = None  # what the finished object decodes to, if there is one
        self._writing = self._fenced = False
        self._done = False

    @property
    def position(self) -> Position | None:
        """Where the object stands: at the beginning if what `resume` named is gone, so that all of the split
        has to be written again; ``None`` while there is no object, and only the log knows."""
        return self._end

    @property
    def resume(self) -> str:
        """See ``Writer.resume``. Where the store keeps large parts only, what was written last is not in it
        yet: then the position that this goes on from is an earlier one, and the split is read again."""
        return msgspec.json.encode(self._safe).decode() if self._safe.upload else ""

    @property
    def unfinished(self) -> tuple[str, str]:
        """See ``Writer.unfinished``."""
        return self._url, self._safe.upload

    @property
    def changes(self) -> Sequence[str]:
        """See ``Writer.changes``: an object has none."""
        return ()

    async def begin(self, stack: AsyncExitStack, owner: str, resume: str) -> None:
        """Take over what `resume` names, if it is still there."""
        self._stack, self._owner = stack, owner
        if not resume:
            return
        try:
            state = _resume.decode(resume)
        except msgspec.MsgspecError:
            raise Permanent(f"{redact(self._url)}: cannot be resumed by {resume[:200]!r}") from None
        upload = await self._open(state.upload, state.size)
        if upload.position == state.size:
            self._state, self._end = msgspec.structs.replace(state, upload=upload.id), state.end
            self._safe = self._state
            return
        self._stands = await self._content(state.raw, state.crc)
        if self._stands is not None:
            await upload.abort()
            self._state, self._end = state, state.end
        else:
            self._state, self._end = Resume(upload.id), Position()
        self._safe = self._state

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """See ``Writer.write``. Records that cannot be written as ``format`` has it are returned.

        Raises:
            Fenced: another attempt has taken the unfinished object over.
            Incomplete: a write failed midway: only another attempt can tell how far it went.
            Permanent: what the batch follows is gone (see ``position``); or the schema is frozen, and a
                record has another column.
        """
        if self._end is not None:
            if batch.end.row <= self._end.row and batch.end.offset <= self._end.offset:
                return []
            if batch.start != self._end:
                raise self._gone()
        self._check()
        self._writing = True
        refused: list[tuple[int, str]] = []
        if batch.records:
            try:
                await self._write(batch.records, refused)
            except Fenced:
                self._fenced = True
                raise
        if self._upload is not None:
            self._state = msgspec.structs.replace(self._state, end=batch.end)
            self._end = batch.end
            if self._stands is not None or self._upload.position == self._state.size:
                self._safe = self._state
        self._writing = False
        return [
            Bad(batch.start.row + number, reason, repr(batch.records[number])[:1000])
            for number, reason in refused
        ]

    async def finish(self) -> None:
        """See ``Writer.finish``.

        Raises:
            Fenced: another attempt has taken the unfinished object over.
            Permanent: an object with another content stands there; or what was written before is gone.
        """
        self._check()
        if self._done or self._upload is None:
            return
        if self._stands is not None:
            self._compare(self._stands)
        elif self._end == Position():
            raise self._gone()
        elif self._state.size:
            await self._commit()
        self._done = True

    # ------------------------------------------------------------------ inside

    async def _open(self, resume: str = "", size: int = 0) -> Upload:
        assert self._stack is not None
        self._upload = await self._stack.enter_async_context(
            self._store.upload(self._url, owner=self._owner, resume=resume, position=size)
        )
        self._safe = Resume(self._upload.id)
        return self._upload

    async def _write(self, records: Sequence[Record], refused: list[tuple[int, str]]) -> None:
        first = not self._state.size
        columns = self._columns(records) if first else self._state.columns
        upload = self._upload or await self._open()
        if self._schema == "freeze" and columns is not None:
            await hop(self._clock, self._hold_to, frozenset(columns), records)
        packing = _Packing(self._kind, self._encoder(columns), self._state)
        found = packing.pieces(records, refused, self._header(columns) if first else b"")
        while isinstance(piece := await hop(self._clock, next, found, _END), bytes):
            if self._stands is None:
                await upload.write(piece)
        if packing.size:
            size = self._state.size + packing.size
            if self._stands is None:
                await upload.flush()
            upload_id = self._state.upload if self._stands else upload.id
            self._state = Resume(upload_id, size, Position(), packing.raw, packing.crc, columns)

    def _columns(self, records: Sequence[Record]) -> list[str] | None:
        if self._kind.rows == "jsonl" and self._schema == "evolve":
            return None
        # A name that is no text makes no column: whatever record has it is refused.
        names: dict[Any, None] = dict.fromkeys(name for record in records for name in record)
        columns = [name for name in names if isinstance(name, str)]
        if self._form.columns and self._kind.rows == "csv":
            columns = list(self._form.columns)
        if sum(map(len, columns)) > _MAX_HEADER:
            raise Permanent(f"{redact(self._url)}: too many columns to be held to: write format=jsonl")
        return columns

    def _hold_to(self, columns: frozenset[str], records: Sequence[Record]) -> None:
        for record in records:
            try:
                only(record, columns)
            except ValueError as error:
                raise Permanent(f"{redact(self._url)}: {error}, and schema=freeze adds none") from None

    def _encoder(self, columns: list[str] | None) -> Encoder:
        return CsvLines(self._form, columns or []) if self._kind.rows == "csv" else JsonLines(columns)

    def _header(self, columns: list[str] | None) -> bytes:
        if self._kind.rows != "csv" or not self._form.header:
            return b""
        try:
            return CsvLines(self._form, columns or []).header()
        except (csv.Error, UnicodeEncodeError) as error:
            raise Permanent(
                f"{redact(self._url)}: its columns make no CSV header ({error}): rename them "
                "in map, or write format=jsonl"
            ) from None

    def _check(self) -> None:
        if self._writing:
            error = Fenced if self._fenced else Incomplete
            raise error(f"{redact(self._url)}: a write failed midway: resume in another attempt")

    def _gone(self) -> Permanent:
        return Permanent(
            f"{redact(self._url)}: the unfinished object is gone, and what was written to it: "
            "write the split from its beginning"
        )

    async def _commit(self) -> None:
        assert self._upload is not None
        try:
            await self._upload.commit()
        except Fenced:
            there = await self._content(0, 0)
            if there is None:
                raise
            # An earlier attempt got through; another release of zlib may have packed the same rows otherwise.
            self._compare(there)

    def _compare(self, there: tuple[int, int]) -> None:
        if there != (self._state.raw, self._state.crc):
            raise Permanent(
                f"{redact(self._url)} exists already, with another content: remove it, or write elsewhere"
            )

    async def _content(self, raw: int, crc: int) -> tuple[int, int] | None:
        """Bytes and CRC-32 of what the object there decodes to; ``None`` if there is none, or if its first
        `raw` bytes do not have the CRC-32 `crc`."""
        if await self._store.head(self._url) is None:
            return None
        digest = _Digest(self._kind, raw, crc)
        try:
            async with (
                self._store.read(self._url) as body,
                aclosing(gathered(body, self._clock)) as lists,
            ):
                async for blocks in lists:
                    await hop(self._clock, digest.feed, blocks)
        except Damaged:
            return None
        return (digest.size, digest.crc) if digest.begins else None


class _Digest:
    """What an object decodes to, in two numbers."""

    def __init__(self, kind: Kind, raw: int, crc: int) -> None:
        self._decoder = decoder(f".{kind.packing}")
        self._raw, self._expected = raw, crc
        self.size = self.crc = 0
        self.begins = not raw  #: with the `raw` bytes expected

    def feed(self, blocks: Sequence[bytes]) -> None:
        """Follow the object through `blocks`."""
        for piece in chain.from_iterable(map(self._decoder.feed, blocks)):
            left = self._raw - self.size
            if 0 < left <= len(piece):
                self.begins = zlib.crc32(piece[:left], self.crc) == self._expected
            self.crc = zlib.crc32(piece, self.crc)
            self.size += len(piece)


class _Packing:
    """One batch on its way into the object, and what the object decodes to with it."""

    def __init__(self, kind: Kind, encoder: Encoder, before: Resume) -> None:
        self._kind = kind
        self._encoder = encoder
        self.raw, self.crc = before.raw, before.crc
        self.size = 0  #: packed bytes

    def pieces(
        self, records: Sequence[Record], refused: list[tuple[int, str]], header: bytes
    ) -> Iterator[bytes]:
        """The packed batch, in pieces of about 1 MiB; nothing if no record is left of it."""
        packing = packer(self._kind.packing)
        held: list[bytes] = []
        lines = 0
        for data in encoded(self._encoder, records, refused):
            if not data:
                continue
            for part in (header, data) if not lines else (data,):
                self.raw, self.crc = self.raw + len(part), zlib.crc32(part, self.crc)
                held.append(packing.feed(part))
            lines += 1
            if sum(map(len, held)) >= _BLOCK:
                yield self._counted(held)
        if lines:
            held.append(packing.close())
            yield self._counted(held)

    def _counted(self, held: list[bytes]) -> bytes:
        piece = b"".join(held)
        held.clear()
        self.size += len(piece)
        return piece
