"""``http(s)://`` as a store that is read: HEAD, and GET that takes a broken body up where it broke.

A body is pinned to its ETag. When it breaks off, the rest is asked for by Range under If-Match (RFC 9110,
sections 13.1.1 and 14.2), and what comes is believed only if it says that it is the rest of the same thing.
Without a strong ETag nothing can say that: then a broken body is ``Incomplete``.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Final, NamedTuple

import aiohttp
import msgspec

from flowlane.clock import Clock
from flowlane.connectors import fetch
from flowlane.connectors.fetch import redact
from flowlane.errors import ConfigError, Incomplete, Permanent, Retryable, Superseded
from flowlane.ports import Body, Environment, ObjectInfo, Upload

#: A body may break off this often with less than so many bytes read in between.
MAX_RESUMES: Final = 5
PROGRESS: Final = 1 << 20
#: A server that asks for more than these seconds before a resume is left to the stage's retry policy.
MAX_PATIENCE: Final = 5.0

#: Blocks are handed out as they come; smaller ones than this are put together, for so many seconds.
_WORTH: Final = 64 << 10
_PATIENCE: Final = 1.0

_NO_HEAD: Final = frozenset({400, 403, 405, 501})
_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_STRONG: Final = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')  # RFC 9110, section 8.8.3: not W/"..."
_UNSATISFIED: Final = re.compile(r"bytes \*/(\d{1,18})")


@asynccontextmanager
async def open_store(uri: str, environment: Environment) -> AsyncIterator[HttpStore]:
    """The store of whatever http(s) reaches. A URL's query belongs to the server: there are no options."""
    async with fetch.open_session(allow_private_hosts=environment.allow_private_hosts) as session:
        yield HttpStore(session, environment.clock)


class HttpStore:
    """See ``ports.Store``. It neither lists nor uploads."""

    def __init__(self, session: aiohttp.ClientSession, clock: Clock) -> None:
        self._session = session
        self._clock = clock

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """See ``Store.head``. 404 and 410 say for certain that there is nothing; a server that does not
        know HEAD (405, 501), or does not allow it here (400, 403: a URL that is signed for GET, say), is
        asked for one byte instead."""
        response = await fetch.ask(self._session, "HEAD", url, own={}, headers=headers)
        response.close()
        if response.status in _NO_HEAD:
            own = {"Range": "bytes=0-0"}
            response = await fetch.ask(self._session, "GET", url, own=own, headers=headers)
            response.close()
            if empty := _UNSATISFIED.fullmatch(response.headers.get("Content-Range", "")):
                return _describe(url, response, int(empty[1]))
        if response.status in (404, 410):
            return None
        fetch.check(response.method, url, response, self._clock)
        return _describe(url, response, _Extent.of(url, response).total)

    async def list(self, url: str) -> AsyncIterator[ObjectInfo]:
        """Refused: HTTP knows no listing."""
        raise ConfigError(
            f"{redact(url)} cannot be listed: HTTP has no listing, name the objects by a template"
        )
        yield ObjectInfo(url)  # makes this an asynchronous iterator

    def read(
        self,
        url: str,
        *,
        start: int = 0,
        end: int | None = None,
        etag: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Body]:
        """See ``Store.read``."""
        return self._read(_Wanted(url, start, end, etag, headers))

    @asynccontextmanager
    async def _read(self, wanted: _Wanted) -> AsyncIterator[Body]:
        body = HttpBody(self._session, self._clock, wanted)
        try:
            await body.open()
            yield body
        finally:
            body.close()

    @asynccontextmanager
    async def upload(
        self, url: str, *, owner: str, resume: str = "", position: int = 0, overwrite: bool = False
    ) -> AsyncIterator[Upload]:
        """Refused: there is no one way to write over HTTP."""
        raise ConfigError(f"{redact(url)} cannot be written to: choose a file:// or s3:// target")
        yield

    async def discard(self, url: str, upload: str) -> None:
        """Refused, as every upload is."""
        raise Permanent(f"{redact(url)} cannot be written to: it has no unfinished upload {upload!a}")


class _Wanted(NamedTuple):
    """What a reader asked for."""

    url: str
    start: int
    end: int | None
    etag: str
    headers: Mapping[str, str] | None


class _Extent(NamedTuple):
    """What part of the whole an answer's body is: [first, stop) of `total`; -1 where it does not say."""

    first: int
    stop: int
    total: int

    @classmethod
    def of(cls, url: str, response: aiohttp.ClientResponse) -> _Extent:
        """By Content-Range for 206, by Content-Length for 200; refused if the two disagree."""
        where = f"{response.method} {redact(url)}"
        length = response.content_length
        length = -1 if length is None else length
        if response.status == 200:
            return cls(0, length, length)
        if response.status != 206:
            raise Permanent(f"{where}: status {response.status} where 200 or 206 was expected")
        said = response.headers.get("Content-Range", "")
        match = _RANGE.fullmatch(said.strip())
        if match is None:
            raise Incomplete(f"{where}: status 206 with Content-Range {said[:80]!a}")
        first, last = int(match[1]), int(match[2])
        total = -1 if match[3] == "*" else int(match[3])
        if last < first or (total >= 0 and last >= total) or length not in (-1, last + 1 - first):
            raise Incomplete(f"{where}: Content-Range {said[:80]!a} and Content-Length {length} disagree")
        return cls(first, last + 1, total)


class HttpBody:
    """See ``ports.Body``. Holds one answer at a time; ``close`` gives its connection back."""

    def __init__(self, session: aiohttp.ClientSession, clock: Clock, wanted: _Wanted) -> None:
        self._session = session
        self._clock = clock
        self._wanted = wanted
        self._position = wanted.start
        self._response: aiohttp.ClientResponse | None = None
        self._skip = 0  # bytes of the answer before what was asked for
        self._stop = -1  # where the answer's body ends, in the object; -1: where the connection does
        self._info = ObjectInfo(wanted.url, etag=wanted.etag)
        self._proven = False
        self._wrapping: fetch.Wrapping | None = None
        self._ended = False  # the answer's body has, by what the transport says

    @property
    def info(self) -> ObjectInfo:
        """See ``Body.info``."""
        return self._info

    @property
    def proven_length(self) -> bool:
        """See ``Body.proven_length``."""
        return self._proven

    def close(self) -> None:
        """Let go of the connection; one whose body was not read to its end is closed."""
        if self._response is not None:
            self._response.close()
            self._response = None

    async def open(self) -> None:
        """Ask for what is wanted, from the position reached on, and take nothing for it that is not it."""
        self.close()
        url, end = self._wanted.url, self._wanted.end
        own = {}
        if self._position or end is not None:
            own["Range"] = f"bytes={self._position}-{'' if end is None else max(end - 1, self._position)}"
        if self._info.etag:
            own["If-Match"] = self._info.etag
        self._response = response = await fetch.ask(
            self._session, "GET", url, own=own, headers=self._wanted.headers
        )
        if response.status in (404, 410):
            raise Incomplete(f"GET {redact(url)}: status {response.status}: the object is gone")
        if response.status == 412:
            raise await self._replaced()
        if response.status == 416:
            self._at_the_end(response)
            return
        fetch.check("GET", url, response, self._clock)
        fetch.refuse_encoding(url, response)
        if not self._position:
            self._wrapping = fetch.Wrapping(url) if fetch.encodings(response) else None
        extent = _Extent.of(url, response)
        found = _describe(url, response, extent.total)
        if self._info.etag and found.etag not in ("", self._info.etag):
            raise await self._replaced(found.etag)
        self._accept(response, extent, found)

    async def _replaced(self, found: str = "") -> Superseded | Incomplete:
        """What to raise: the ETag is no longer the one that was pinned, but `found`, if that is known.

        HEAD has to bear it out: an ETag that changes with every answer, with the replica that gives it, or
        between HEAD and GET tells of no other version, and nobody would ever find one.
        """
        self.close()
        url, pinned = self._wanted.url, self._info.etag
        is_now = f"is {found}, no longer {pinned}" if found else f"is no longer {pinned}"
        why = f"GET {redact(url)}: the object's ETag {is_now}"
        said = None
        with suppress(Permanent, Retryable):
            said = await self._head()
        if said is None or not said.etag or (said.etag != pinned and found in ("", said.etag)):
            return Superseded(why)
        return Incomplete(
            f"{why}; but HEAD says {said.etag}: have its server give one content one ETag, or none"
        )

    async def _head(self) -> ObjectInfo | None:
        store = HttpStore(self._session, self._clock)
        return await store.head(self._wanted.url, headers=self._wanted.headers)

    def _accept(self, response: aiohttp.ClientResponse, extent: _Extent, found: ObjectInfo) -> None:
        url = self._wanted.url
        pinned = self._info
        if pinned.etag and not found.etag:
            raise Incomplete(f"GET {redact(url)}: the answer has no ETag, {pinned.etag} was asked for")
        if pinned.etag and min(pinned.size, found.size) >= 0 and pinned.size != found.size:
            raise Incomplete(
                f"GET {redact(url)}: {found.size:,} bytes, {pinned.size:,} before, with one ETag"
            )
        if extent.first > self._position or (extent.first and extent.first != self._position):
            raise Incomplete(
                f"GET {redact(url)}: asked from byte {self._position}, answered from {extent.first}"
            )
        # Range ignored (200): what was asked for follows what must be dropped.
        self._skip = self._position - extent.first
        self._stop = extent.stop
        self._proven = extent.stop >= 0 or "chunked" in response.headers.get("Transfer-Encoding", "").lower()
        self._ended = False
        size = pinned.size if pinned.etag and found.size < 0 else found.size
        self._info = msgspec.structs.replace(found, size=size)

    def _at_the_end(self, response: aiohttp.ClientResponse) -> None:
        """416: nothing from the position on. That is an empty rest if the object ends there."""
        url, position = self._wanted.url, self._position
        match = _UNSATISFIED.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != position or self._info.size not in (-1, position):
            raise Incomplete(f"GET {redact(url)}: status 416: the object has no byte {position:,}")
        self._info = _describe(url, response, position)
        self._stop, self._proven = position, True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """See ``Body.__aiter__``."""
        failures = progress = 0
        while not self._reached():
            block, over = await self._next()
            if block:
                self._position += len(block)
                progress += len(block)
                yield block
            if over and not self._reached():
                # A range that ends where it said, if short of what was asked for, is no failure.
                as_announced = progress > 0 and self._position == self._stop
                failures = 0 if as_announced else 1 if progress >= PROGRESS else failures + 1
                progress = 0
                await self._resume(over, failures)
        if self._ended and self._info.size < 0 and self._wrapping is None:
            await self._confirm()

    def _reached(self) -> bool:
        """Whether all that was asked for has been handed out."""
        known = [mark for mark in (self._wanted.end, self._info.size) if mark is not None and mark >= 0]
        goal = min(known, default=self._stop)
        return self._position >= goal if goal >= 0 else self._ended

    async def _confirm(self) -> None:
        """The body ended, and nothing said how long it is. A connection ends when its server dies, too; a
        proxy before such a one ends its chunks as if nothing was; and what lies behind the end of a gzip
        member nobody misses. HEAD may know of more."""
        url = self._wanted.url
        try:
            said = await self._head()
        except Permanent:
            return  # it does not say
        except Retryable:
            if self._proven:
                return
            raise
        if said is None or (said.etag and self._info.etag and said.etag != self._info.etag):
            return  # it speaks of another one
        # Only of more: some that count as they send answer HEAD with a length of 0.
        if said.size > self._position:
            raise Incomplete(
                f"GET {redact(url)}: the body ended at byte {self._position:,}, "
                f"HEAD says that there are {said.size:,}"
            )

    async def _next(self) -> tuple[bytes, str]:
        """A block, and why there is no more to come (empty while there is)."""
        parts: list[bytes] = []
        over = ""
        try:
            await self._gather(parts)
        except fetch.BROKEN as error:
            over = fetch.one_line(error)
        if not parts and not over:
            self._ended, over = True, "the body ended"
        block = self._cut(parts[0] if len(parts) == 1 else b"".join(parts))
        if 0 <= self._stop < self._position + len(block):
            raise Incomplete(f"GET {redact(self._wanted.url)}: more bytes came than the answer announced")
        if self._wrapping is not None:
            self._wrapping.check(block)
        return block, over

    async def _gather(self, parts: list[bytes]) -> None:
        """Read a block into `parts`, less at the end or if it comes slowly; what came before an error stays
        there."""
        assert self._response is not None
        size, began = 0, self._clock.monotonic()
        while size < _WORTH and (not size or self._clock.monotonic() - began < _PATIENCE):
            # Empty at the end of the body, and where only the end of a chunk has come (RFC 9112, 7.1).
            part, chunk_ended = await self._response.content.readchunk()
            if not part and not chunk_ended:
                return
            parts.append(part)
            size += len(part)

    def _cut(self, block: bytes) -> bytes:
        """`block` without what was not asked for."""
        dropped = min(self._skip, len(block))
        self._skip -= dropped
        end = self._wanted.end
        room = len(block) if end is None else max(end - self._position, 0)
        return block[dropped : dropped + room] if dropped or room < len(block) else block

    async def _resume(self, why: str, failures: int) -> None:
        """Ask for the rest, as often as ``MAX_RESUMES`` allows after `failures` in a row."""
        size = f" of {self._info.size:,}" if self._info.size >= 0 else ""
        where = f"GET {redact(self._wanted.url)}: cut at byte {self._position:,}{size}: {why}"
        if not self._info.etag and self._position > self._wanted.start:
            raise Incomplete(f"{where}; without a strong ETag it cannot be resumed")
        while failures <= MAX_RESUMES:
            if failures:
                await self._clock.sleep(self._clock.random() * min(0.1 * 2**failures, 3.0))
            try:
                return await self.open()
            except Incomplete:
                raise
            except Retryable as error:
                if (error.delay or 0.0) > MAX_PATIENCE:
                    raise
                failures += 1
                where = f"{where}; then {error}"
        raise Incomplete(f"{where}; gave up after {MAX_RESUMES} resumes without progress")


def _describe(url: str, response: aiohttp.ClientResponse, size: int) -> ObjectInfo:
    etag = response.headers.get("ETag", "").strip()
    return ObjectInfo(
        url=url,
        size=size,
        etag=etag if _STRONG.fullmatch(etag) else "",
        modified=response.headers.get("Last-Modified", ""),
        content_type=response.headers.get("Content-Type", ""),
    )
