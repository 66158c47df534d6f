"""``file:///`` as a store: objects are files, an upload is a hidden part next to its target.

An object appears by a hard link to its part (or a rename over what is to be replaced), so that nobody ever
sees half of it. Its ETag is made of what changes when a file does: modification time, size and inode.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

from flowlane.clock import Clock, rfc3339
from flowlane.connectors.hop import hop
from flowlane.connectors.parts import Part, discard, discard_all, is_part, is_part_of
from flowlane.connectors.paths import matches, path_of, split_pattern, url_of
from flowlane.errors import ConfigError, Incomplete, Permanent, Retryable, Superseded
from flowlane.ports import Body, Environment, ObjectInfo, Upload

#: A body hands out blocks of this size; an upload collects as much for one hop into a thread.
BLOCK: Final = 1 << 20
T = TypeVar("T")

_SLICE: Final = 256  # objects listed per hop
_SHORT: Final = 256 << 10  # bytes that are read in the hop that opens the file
_REFUSED: Final = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_SUCH: Final = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_NOT_A_TARGET: Final = {
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ELOOP,
    errno.EFBIG,
}


@asynccontextmanager
async def open_store(uri: str, environment: Environment) -> AsyncIterator[FileStore]:
    """The store of this machine's files. A ``?`` in a URL belongs to a pattern: there are no options."""
    split_pattern(uri)
    yield FileStore(environment.clock)


class FileStore:
    """See ``ports.Store``; `headers` mean nothing to a file."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """See ``Store.head``."""
        path = path_of(url)
        with _reading(url):
            return await hop(self._clock, _info, path)

    async def list(self, url: str) -> AsyncIterator[ObjectInfo]:
        """See ``Store.list``. A URL that ends in a slash means everything below it."""
        directory, pattern = split_pattern(url)
        found = _listing(directory, pattern)
        with _reading(url):
            while some := await hop(self._clock, _take, found):
                for info in some:
                    yield info

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
        return self._read(url, start, end, etag)

    @asynccontextmanager
    async def _read(self, url: str, start: int, end: int | None, etag: str) -> AsyncIterator[Body]:
        body = FileBody(self._clock, path_of(url), start, end)
        try:
            with _reading(url):
                await hop(self._clock, body.open)
            info = body.info
            if etag and etag != info.etag:
                raise Superseded(f"{url}: the file was changed: its ETag is {info.etag}, no longer {etag}")
            if start > info.size:
                raise (Superseded if etag else Incomplete)(f"{url}: the file ends before byte {start}")
            yield body
        finally:
            body.close()

    @asynccontextmanager
    async def upload(
        self, url: str, *, owner: str, resume: str = "", position: int = 0, overwrite: bool = False
    ) -> AsyncIterator[Upload]:
        """See ``Store.upload``. The id is the name of the part, which lies next to the target."""
        target = path_of(url)
        if not target.name or url.endswith("/"):
            raise ConfigError(f"cannot write {url}: it names a directory")
        if resume and not is_part_of(resume, target):
            raise Permanent(f"cannot write {url}: {resume!a} is no unfinished upload to it")
        upload = FileUpload(self._clock, url, target, overwrite)
        try:
            with _writing(url):
                await upload.open(owner, resume, position)
            yield upload
        finally:
            await hop(self._clock, upload.close)

    async def discard(self, url: str, upload: str) -> None:
        """See ``Store.discard``. A part's lock tells whether its owner is at work."""
        target = path_of(url)
        if upload and not is_part_of(upload, target):
            raise Permanent(f"{upload!a} is no unfinished upload to {url}")
        with _writing(url):
            if upload:
                await hop(self._clock, discard, target.parent / upload)
            else:
                await hop(self._clock, discard_all, target)


class FileBody:
    """See ``ports.Body``."""

    proven_length = True

    def __init__(self, clock: Clock, path: Path, start: int, end: int | None) -> None:
        self._clock = clock
        self._path = path
        self._file = -1
        self._position = start
        self._end = end
        self._info = ObjectInfo("")
        self._first: tuple[bytes, str] | None = None  # the block that opening it has read

    @property
    def info(self) -> ObjectInfo:
        """See ``Body.info``."""
        return self._info

    def open(self) -> None:
        """Open the file and say what it is; for a thread."""
        # Not blocking, lest a pipe wait for its writer; to a regular file that is all the same.
        self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode):
            raise Permanent(f"cannot read {url_of(self._path)}: it is not a regular file")
        self._info = _describe(self._path, found)
        if self._end is not None and 0 < self._end - self._position <= _SHORT:
            self._first = self._next(self._end - self._position)

    def close(self) -> None:
        """Let go of the file. Closing twice is fine."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """See ``Body.__aiter__``. A file that is written to meanwhile is no longer the one asked for."""
        url, size = self._info.url, self._info.size
        stop = size if self._end is None else min(self._end, size)
        while self._position < stop:
            if self._first is not None:
                (block, etag), self._first = self._first, None
            else:
                with _reading(url):
                    block, etag = await hop(self._clock, self._next, min(BLOCK, stop - self._position))
            if etag != self._info.etag:
                raise Superseded(f"{url}: the file was written to while it was read")
            if not block:
                raise Incomplete(f"{url}: cut at byte {self._position:,} of {size:,}")
            self._position += len(block)
            yield block

    def _next(self, count: int) -> tuple[bytes, str]:
        block = os.pread(self._file, count, self._position)
        return block, _etag(os.fstat(self._file))


class FileUpload:
    """See ``ports.Upload``."""

    def __init__(self, clock: Clock, url: str, target: Path, overwrite: bool) -> None:
        self._clock = clock
        self._url = url
        self._target = target
        self._overwrite = overwrite
        self._part: Part | None = None
        self._blocks: list[bytes] = []
        self._held = 0
        self._position = 0
        self._done: ObjectInfo | None = None

    @property
    def id(self) -> str:
        """See ``Upload.id``."""
        return self._mine.path.name

    @property
    def position(self) -> int:
        """See ``Upload``: what ``flush`` has put on the disk."""
        return self._position

    async def open(self, owner: str, resume: str, position: int) -> None:
        """Take over `position` bytes of the part called `resume`, or make a new one."""
        await hop(self._clock, self._begin, owner, resume, position)
        while await hop(self._clock, self._mine.catch_up):
            pass
        if self._mine.size:
            self._position = await hop(self._clock, self._mine.sync)

    def _begin(self, owner: str, resume: str, position: int) -> None:
        # Kept from within the thread: a cancellation on the way back must not lose an open file.
        if resume:
            self._part = Part.take_over(self._target, owner, resume, position)
        else:
            self._part = Part.create(self._target, owner)

    async def write(self, block: bytes) -> None:
        """See ``Upload.write``. Blocks are collected up to 1 MiB, then written by one hop."""
        self._blocks.append(block)
        self._held += len(block)
        if self._held >= BLOCK:
            await self._drain()

    async def flush(self) -> int:
        """See ``Upload.flush``."""
        await self._drain()
        with _writing(self._url):
            self._position = await hop(self._clock, self._mine.sync)
        return self._position

    async def commit(self) -> ObjectInfo:
        """See ``Upload.commit``. Repeatable."""
        if self._done is None:
            await self._drain()
            with _writing(self._url):
                self._done = await hop(self._clock, self._publish)
            self._position = self._mine.size
        return self._done

    async def abort(self) -> None:
        """See ``Upload.abort``; what was committed stays."""
        self._blocks, self._held, self._position = [], 0, 0
        with _writing(self._url):
            await hop(self._clock, self._mine.abort)

    def close(self) -> None:
        """Let go of the part, which stays where it is."""
        if self._part is not None:
            self._part.close()

    @property
    def _mine(self) -> Part:
        if self._part is None:
            raise RuntimeError("the upload is not open")
        return self._part

    async def _drain(self) -> None:
        blocks, self._blocks, self._held = self._blocks, [], 0
        if blocks:
            with _writing(self._url):
                await hop(self._clock, self._mine.write, blocks)

    def _publish(self) -> ObjectInfo:
        self._mine.publish(overwrite=self._overwrite)
        return _describe(self._target, self._target.stat())


def _etag(found: os.stat_result) -> str:
    text = f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def _describe(path: Path, found: os.stat_result) -> ObjectInfo:
    modified = rfc3339(datetime.fromtimestamp(found.st_mtime, UTC))
    return ObjectInfo(url=url_of(path), size=found.st_size, etag=_etag(found), modified=modified)


def _info(path: Path) -> ObjectInfo | None:
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in _NO_SUCH:
            return None
        raise
    return _describe(path, found) if stat.S_ISREG(found.st_mode) else None


def _listing(directory: Path, pattern: list[str]) -> Iterator[ObjectInfo]:
    for entry in matches(directory, pattern):
        try:
            if not is_part(entry.name):
                yield _describe(Path(entry.path), entry.stat())
        except FileNotFoundError:
            continue  # gone since it was listed


def _take(found: Iterator[T]) -> list[T]:
    return list(islice(found, _SLICE))


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Types what the operating system says to a reader."""
    try:
        yield
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        if error.errno in _NO_SUCH:
            raise Incomplete(f"cannot read {url}: {why}: the file is gone") from None
        if error.errno in _REFUSED | _NOT_A_TARGET:
            raise Permanent(f"cannot read {url}: {why}") from None
        raise Retryable(f"cannot read {url}: {why}") from None


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """Types what the operating system says to a writer."""
    try:
        yield
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        if error.errno in _REFUSED:
            raise ConfigError(f"cannot write {url}: {why}: choose another target") from None
        if error.errno in _NOT_A_TARGET:
            raise Permanent(f"cannot write {url}: {why}: choose another name") from None
        hint = ": make room, then redrive what is dead" if error.errno in _FULL else ""
        raise Retryable(f"cannot write {url}: {why}{hint}") from None
