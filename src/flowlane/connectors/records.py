"""Records in the objects of any store: CSV and JSON lines, plain, gzip or zstd, as sources and sinks.

What an object holds is told by its name: ``.csv``, ``.jsonl`` (also ``.json``, ``.ndjson``), with ``.gz`` or
``.zst`` behind it.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from hashlib import blake2b
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from flowlane.clock import Clock
from flowlane.errors import ConfigError, Damaged, Incomplete, Permanent, Superseded, redact
from flowlane.ports import Bad, Batch, Cut, Environment, Record, Split, Store, UnitRef, Upload, Writer
from flowlane.state import Position
from flowlane.streams.csvrows import CsvRows
from flowlane.streams.cutting import Cutter
from flowlane.streams.dialect import CsvFormat
from flowlane.streams.inflate import Decoder, decoder
from flowlane.streams.jsonrows import JsonRows

_GLOB = ("*", "?", "[")
_JSON = ("jsonl", "json", "ndjson")
_CODINGS = ("gz", "zst")


def kind_of(name: str) -> tuple[str, str]:
    """The format (``csv`` or ``jsonl``) and coding (``gz``, ``zst`` or none) that `name` tells.

    Raises:
        ConfigError: it tells neither.
    """
    parts = urlsplit(name).path.lower().rsplit("/", 1)[-1].split(".")[1:]
    coding = parts.pop() if parts and parts[-1] in _CODINGS else ""
    form = parts[-1] if parts else ""
    if form == "csv":
        return "csv", coding
    if form in _JSON:
        return "jsonl", coding
    raise ConfigError(f"{redact(name)}: its name tells no format: .csv or .jsonl, and .gz or .zst behind it")


# --------------------------------------------------------------------------- source


@asynccontextmanager
async def open_source(
    uri: str, environment: Environment, *, csv: CsvFormat | None = None
) -> AsyncIterator[StoreSource]:
    """The records of the object, or of every object that the pattern `uri` matches, in order of URL."""
    store = await environment.connections.store(uri)
    yield StoreSource(uri, store, environment.clock, csv or CsvFormat())


class StoreSource:
    """See ``ports.Source``: one split an object."""

    def __init__(self, url: str, store: Store, clock: Clock, form: CsvFormat) -> None:
        self._url = url
        self._store = store
        self._clock = clock
        self._form = form

    async def splits(self) -> AsyncGenerator[Split]:
        """See ``Source.splits``."""
        if not any(character in urlsplit(self._url).path for character in _GLOB):
            found = await self._store.head(self._url)
            if found is None:
                raise Incomplete(f"{redact(self._url)} does not exist (any more)")
            yield Split(self._url, self._url, found.etag, found.size, bool(found.etag))
            return
        async for found in self._store.list(self._url):
            yield Split(found.url, found.url, found.etag, found.size, bool(found.etag))

    async def read(self, split: Split, position: Position, cut: Cut) -> AsyncGenerator[Batch]:
        """See ``Source.read``. Parsing runs off the loop, a piece of 256 KiB at a time."""
        where = redact(split.url)
        form, coding = kind_of(split.url)
        rows = CsvRows(self._form, position) if form == "csv" else JsonRows(position)
        cutter = Cutter(cut, position)
        decoding = decoder(split.url)
        read = 0
        with _located(where):
            async with self._store.read(split.url, etag=split.etag) as body:
                if not coding and not body.proven_length:
                    raise Permanent("neither a length nor a checksum tells whether its body is whole")
                async for block in body:
                    read += len(block)
                    pieces = decoding.feed(block)
                    step = partial(_step, pieces, rows, cutter)
                    while (batches := await self._clock.offload(step)) is not None:
                        for batch in batches:
                            batch.size, read = read, 0
                            yield batch
            for batch in await self._clock.offload(lambda: _end(decoding, rows, cutter)):
                batch.size, read = read, 0
                yield batch


def _step(pieces: Iterator[bytes], rows: CsvRows | JsonRows, cutter: Cutter) -> list[Batch] | None:
    """The batches that the next piece completes; ``None`` if there is no piece left."""
    piece = next(pieces, None)
    if piece is None:
        return None
    return [batch for chunk in rows.feed(piece) for batch in cutter.feed(chunk)]


def _end(decoding: Decoder, rows: CsvRows | JsonRows, cutter: Cutter) -> list[Batch]:
    decoding.close()
    batches = [batch for chunk in rows.close() for batch in cutter.feed(chunk)]
    return [*batches, *cutter.close()]


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Say where it was that decoding or parsing failed."""
    try:
        yield
    except (Damaged, Permanent, Superseded) as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from None


# --------------------------------------------------------------------------- sink


@asynccontextmanager
async def open_sink(
    uri: str,
    environment: Environment,
    *,
    format: str = "jsonl.gz",
    schema: str = "evolve",
) -> AsyncIterator[StoreSink]:
    """Records into the folder `uri`, an object for each split and unit, or into the one object it names."""
    kind_of(f"x.{format}" if uri.endswith("/") else uri)
    yield StoreSink(uri, await environment.connections.store(uri), environment.clock, format)


class StoreSink:
    """See ``ports.Sink``. Each batch is a gzip member (or zstd frame) of its own, so that an object can be
    taken up behind any batch; its bytes depend on the records alone."""

    def __init__(self, url: str, store: Store, clock: Clock, form: str) -> None:
        self._url = url
        self._store = store
        self._clock = clock
        self._form = form

    def open(self, split: Split, unit: UnitRef, resume: str = "") -> AbstractAsyncContextManager[Writer]:
        """See ``Sink.open``."""
        return self._open(split, unit, resume)

    @asynccontextmanager
    async def _open(self, split: Split, unit: UnitRef, resume: str) -> AsyncIterator[Writer]:
        state = msgspec.json.decode(resume, type=_Resume) if resume else _Resume()
        url = self._target(split, unit)
        owner = f"{unit.stream}#{unit.token}"
        async with self._store.upload(url, owner=owner, resume=state.upload, position=state.size) as upload:
            if upload.position != state.size:
                raise Permanent(
                    f"{redact(url)}: the unfinished object that {state.row:,} rows went into is gone"
                )
            yield StoreWriter(upload, state, self._clock, *kind_of(url))

    def _target(self, split: Split, unit: UnitRef) -> str:
        if not self._url.endswith("/"):
            return self._url
        name = quote(unit.stream.rpartition("/")[2], safe="")[-80:]
        digest = blake2b(f"{unit.stream}\0{split.id}".encode(), digest_size=8).hexdigest()
        return f"{self._url}{name}-{digest}.{self._form}"


class _Resume(msgspec.Struct, omit_defaults=True):
    """What names an unfinished object and says how far it has come."""

    upload: str = ""
    size: int = 0
    row: int = 0
    columns: list[str] = msgspec.field(default_factory=list)


class StoreWriter:
    """See ``ports.Writer``."""

    def __init__(self, upload: Upload, state: _Resume, clock: Clock, form: str, coding: str) -> None:
        self._upload = upload
        self._state = state
        self._clock = clock
        self._form = form
        self._coding = coding
        state.upload = upload.id

    @property
    def position(self) -> Position | None:
        """See ``Writer.position``: only the log knows."""
        return None

    @property
    def resume(self) -> str:
        """See ``Writer.resume``."""
        return msgspec.json.encode(self._state).decode()

    async def write(self, batch: Batch) -> Sequence[Bad]:
        """See ``Writer.write``."""
        if batch.end.row <= self._state.row:
            return []
        refused: list[Bad] = []
        await self._upload.write(await self._clock.offload(lambda: self._encode(batch, refused)))
        self._state.size = await self._upload.flush()
        self._state.row = batch.end.row
        return refused

    async def finish(self) -> None:
        """See ``Writer.finish``."""
        await self._upload.commit()

    def _encode(self, batch: Batch, refused: list[Bad]) -> bytes:
        plain = self._csv(batch, refused) if self._form == "csv" else _json_lines(batch, refused)
        if self._coding == "gz":
            return gzip.compress(plain, compresslevel=6, mtime=0) if plain else b""
        if self._coding == "zst":
            import zstandard  # loaded by those who need it

            return zstandard.ZstdCompressor(level=3).compress(plain) if plain else b""
        return plain

    def _csv(self, batch: Batch, refused: list[Bad]) -> bytes:
        text = io.StringIO(newline="")
        columns = self._state.columns
        if not columns and batch.records:
            columns = self._state.columns = list(dict.fromkeys(c for row in batch.records for c in row))
            csv.writer(text, lineterminator="\n").writerow(columns)
        writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
        for number, record in enumerate(batch.records, batch.start.row):
            if strange := record.keys() - set(columns):
                refused.append(
                    Bad(number, f"column {min(strange)!r} came after the header", repr(record)[:1000])
                )
            else:
                writer.writerow({name: _text(value) for name, value in record.items()})
        return text.getvalue().encode()


def _json_lines(batch: Batch, refused: list[Bad]) -> bytes:
    lines = []
    for number, record in enumerate(batch.records, batch.start.row):
        try:
            lines.append(msgspec.json.encode(record))
        except (TypeError, msgspec.EncodeError, UnicodeEncodeError) as error:
            refused.append(Bad(number, f"JSON cannot hold it: {error}", repr(record)[:1000]))
    return b"".join(line + b"\n" for line in lines)


def _text(value: Record | Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, dict | list) else value
