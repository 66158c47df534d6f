"""Stores in memory: a lake to write to, and a web to read from that misbehaves as its script says.

Both are real implementations of ``ports.Store``. They are opened by URI through the plugin of this module,
so that lanes run on them unchanged::

    world = World()
    world.web.publish("web://archive/2024-01-01-0.json.gz", Page(data, cut=100, cuts=2))
    with using(world):
        async with open_application([lane], settings, registry=Registry({"testing": plugin})) as app:
            ...
    assert world.lake.objects == {"lake://raw/2024-01-01-0.json.gz": data}
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import msgspec

from flowlane.clock import Clock
from flowlane.errors import ConfigError, Fenced, Incomplete, Permanent, Retryable, Superseded
from flowlane.hookspecs import Provides, hookimpl
from flowlane.ports import Body, Environment, ObjectInfo, Sink, Source, Store, TableSpec, Upload
from flowlane.testing.tables import Tables

#: Bodies come in blocks of this many bytes, so that a small object takes several.
BLOCK = 64


class Landing(msgspec.Struct, frozen=True):
    """That an object became visible: where, by whom, and what."""

    url: str
    owner: str
    data: bytes


class _Part(msgspec.Struct):
    """An unfinished upload; ``owner`` alone may write to it."""

    id: str
    url: str
    owner: str
    data: bytearray


class _MemoryBody:
    """See ``ports.Body``; `ends` is raised where the bytes end."""

    proven_length = True

    def __init__(
        self,
        info: ObjectInfo,
        data: bytes,
        ends: Exception | None,
        pause: float,
        clock: Clock | None,
        block: int = 0,
    ) -> None:
        self.info = info
        self._data = data
        self._ends = ends
        self._pause = pause
        self._clock = clock
        self._block = block or BLOCK

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        for at in range(0, len(self._data), self._block):
            if self._pause and self._clock is not None:
                await self._clock.sleep(self._pause)
            yield self._data[at : at + self._block]
        if self._ends is not None:
            raise self._ends


class Lake:
    """A store in memory. ``objects`` is what can be seen; ``landings`` every time that something came to be
    seen, in order; ``parts`` the uploads that nobody has finished."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.landings: list[Landing] = []
        self.parts: dict[str, _Part] = {}
        self._made = 0

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """See ``Store.head``."""
        data = self.objects.get(url)
        return None if data is None else _describe(url, data)

    async def list(self, url: str) -> AsyncGenerator[ObjectInfo]:
        """See ``Store.list``."""
        wanted = _pattern(url)
        for found in sorted(self.objects):
            if wanted.fullmatch(found):
                yield _describe(found, self.objects[found])

    @asynccontextmanager
    async def read(
        self,
        url: str,
        *,
        start: int = 0,
        end: int | None = None,
        etag: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Body]:
        """See ``Store.read``."""
        data = self.objects.get(url)
        if data is None:
            raise Incomplete(f"{url}: there is no such object")
        info = _describe(url, data)
        if etag and etag != info.etag:
            raise Superseded(f"{url} is another object now")
        yield _MemoryBody(info, data[start:end], None, 0.0, None)

    @asynccontextmanager
    async def upload(
        self, url: str, *, owner: str, resume: str = "", position: int = 0, overwrite: bool = False
    ) -> AsyncIterator[Upload]:
        """See ``Store.upload``."""
        if url.endswith("/"):
            raise ConfigError(f"cannot write {url}: it names a folder")
        part = self.parts.get(resume)
        if part is not None and part.url != url:
            raise Permanent(f"{resume} is no unfinished upload to {url}")
        if part is None or len(part.data) < position:
            self._made += 1
            part = _Part(f"upload-{self._made}", url, owner, bytearray())
            self.parts[part.id] = part
        else:
            part.owner = owner
            del part.data[position:]
        yield _MemoryUpload(self, part, owner, overwrite)

    async def discard(self, url: str, upload: str) -> None:
        """See ``Store.discard``. Whether an owner is at work is not known here: it is fenced."""
        part = self.parts.get(upload)
        if part is not None and part.url != url:
            raise Permanent(f"{upload} is no unfinished upload to {url}")
        for name in [upload] if upload else [name for name, part in self.parts.items() if part.url == url]:
            self.parts.pop(name, None)

    def land(self, url: str, owner: str, data: bytes, *, overwrite: bool) -> ObjectInfo:
        """Make `data` visible under `url`.

        Raises:
            Fenced: something else is there, and is not to be replaced.
        """
        known = self.objects.get(url)
        if known is not None and not overwrite:
            if known != data:
                raise Fenced(f"{url}: another object stands there")
        else:
            self.objects[url] = data
            self.landings.append(Landing(url, owner, data))
        return _describe(url, data)


class _MemoryUpload:
    """See ``ports.Upload``; what is not flushed is lost with the process."""

    def __init__(self, lake: Lake, part: _Part, owner: str, overwrite: bool) -> None:
        self._lake = lake
        self._part = part
        self._owner = owner
        self._overwrite = overwrite
        self._buffer: list[bytes] = []
        self._done: ObjectInfo | None = None
        self.position = len(part.data)

    @property
    def id(self) -> str:
        return self._part.id

    def _mine(self) -> _Part:
        part = self._lake.parts.get(self._part.id)
        if part is None or part.owner != self._owner:
            raise Fenced(f"{self._part.id} to {self._part.url} is no longer {self._owner}'s")
        return part

    async def write(self, block: bytes) -> None:
        self._mine()
        self._buffer.append(block)

    async def flush(self) -> int:
        part = self._mine()
        for block in self._buffer:
            part.data += block
        self._buffer.clear()
        self.position = len(part.data)
        return self.position

    async def commit(self) -> ObjectInfo:
        if self._done is None:
            await self.flush()
            part = self._mine()
            self._done = self._lake.land(part.url, part.owner, bytes(part.data), overwrite=self._overwrite)
            del self._lake.parts[part.id]
        return self._done

    async def abort(self) -> None:
        self._buffer.clear()
        self.position = 0
        part = self._lake.parts.get(self._part.id)
        if part is not None and part.owner == self._owner:
            del self._lake.parts[part.id]


class Page(msgspec.Struct, kw_only=True):
    """What the web has under one URL, and how it misbehaves.

    The first ``busy`` requests are answered with 503; the first ``cuts`` bodies (-1: all) end after ``cut``
    bytes, their length claiming that this is all; the first ``breaks`` bodies break off half-way and say so.
    From second ``changes`` on the object is ``then``, with another ETag.
    """

    data: bytes
    appears: float = 0.0  #: second since 1970, of the clock of the web, before which there is none
    busy: int = 0
    cut: int = 0
    cuts: int = 0
    breaks: int = 0
    pause: float = 0.0  #: seconds before each block
    block: int = 0  #: bytes in a block; ``BLOCK`` unless it says otherwise
    changes: float = float("inf")
    then: bytes = b""
    tagless: bool = False  #: it has no ETag


class Web:
    """A store that can only be read, and does as each ``Page`` says."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, str]] = []  #: method and URL, in order
        self.calm = False  #: nothing passing goes wrong any more: no 503, no break

    def publish(self, url: str, page: Page) -> None:
        """From now on `url` answers as `page` says."""
        self.pages[url] = page

    def _ask(self, method: str, url: str) -> tuple[Page, bytes] | None:
        self.requests.append((method, url))
        page = self.pages.get(url)
        now = self._clock.now().timestamp()
        if page is None or now < page.appears:
            return None
        if page.busy and not self.calm:
            page.busy -= 1
            raise Retryable(f"{url}: 503 Service Unavailable")
        return page, page.then if now >= page.changes else page.data

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """See ``Store.head``."""
        answer = self._ask("HEAD", url)
        if answer is None:
            return None
        page, data = answer
        info = _describe(url, data[: page.cut] if page.cuts else data)
        return msgspec.structs.replace(info, etag="") if page.tagless else info

    async def list(self, url: str) -> AsyncGenerator[ObjectInfo]:
        """See ``Store.list``; the web cannot be listed."""
        for _ in ():
            yield _
        raise Permanent(f"{url}: the web cannot be listed")

    @asynccontextmanager
    async def read(
        self,
        url: str,
        *,
        start: int = 0,
        end: int | None = None,
        etag: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Body]:
        """See ``Store.read``."""
        answer = self._ask("GET", url)
        if answer is None:
            raise Incomplete(f"{url}: 404 Not Found")
        page, data = answer
        if page.cuts:
            page.cuts -= 1 if page.cuts > 0 else 0
            data = data[: page.cut]
        info = _describe(url, data)
        if page.tagless:
            info = msgspec.structs.replace(info, etag="")
        if etag and etag != info.etag:
            raise Superseded(f"{url} is another object now")
        ends = None
        asked = data[start:end]
        if page.breaks and not self.calm:
            page.breaks -= 1
            asked = asked[: len(asked) // 2]
            ends = Incomplete(f"{url}: the connection broke")
        pause = 0.0 if self.calm else page.pause
        yield _MemoryBody(info, asked, ends, pause, self._clock, page.block)

    def upload(
        self, url: str, *, owner: str, resume: str = "", position: int = 0, overwrite: bool = False
    ) -> AbstractAsyncContextManager[Upload]:
        """See ``Store.upload``; the web cannot be written."""
        raise Permanent(f"cannot write {url}: the web can only be read")

    async def discard(self, url: str, upload: str) -> None:
        """See ``Store.discard``."""
        raise Permanent(f"cannot write {url}: the web can only be read")


def _describe(url: str, data: bytes) -> ObjectInfo:
    return ObjectInfo(url=url, size=len(data), etag=f'"{hashlib.blake2b(data, digest_size=8).hexdigest()}"')


def _pattern(url: str) -> re.Pattern[str]:
    scheme, _, path = url.partition("://")
    glob = {"**/": "(?:[^/]+/)*", "**": ".+", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]*\])", path + "**" if path.endswith("/") else path)
    return re.compile(
        re.escape(scheme + "://")
        + "".join(glob.get(part) or (part if part[:1] == "[" else re.escape(part)) for part in parts)
    )


class Ports(Protocol):
    """What opens the schemes of this module's plugin: a ``World``, or a process's view of one."""

    def store(self, scheme: str) -> Store: ...
    def source(self, uri: str, options: Mapping[str, Any]) -> Source: ...
    def sink(self, uri: str, into: TableSpec | None = None) -> Sink: ...


class World:
    """All that lives outside the processes: ``web://`` to read from, ``lake://`` to write to, ``rows://``
    to load from, and ``table://`` to load into."""

    def __init__(self, clock: Clock) -> None:
        self.web = Web(clock)
        self.lake = Lake()
        self.tables = Tables()

    def store(self, scheme: str) -> Store:
        """The lake, or the web."""
        return self.lake if scheme == "lake" else self.web

    def source(self, uri: str, options: Mapping[str, Any]) -> Source:
        """The records at `uri`."""
        return self.tables.source(uri)

    def sink(self, uri: str, into: TableSpec | None = None) -> Sink:
        """The table at `uri`, or the one that `into` names there."""
        return self.tables.sink(uri, into)


_PORTS: ContextVar[Ports] = ContextVar("flowlane_testing_ports")


@contextmanager
def using(ports: Ports) -> Iterator[None]:
    """Within this context (and the tasks begun in it) the plugin's schemes are opened by `ports`."""
    token = _PORTS.set(ports)
    try:
        yield
    finally:
        _PORTS.reset(token)


# --------------------------------------------------------------------------- the plugin


@hookimpl
def flowlane_provides() -> Sequence[Provides]:
    """The schemes of simulated worlds."""
    here = "flowlane.testing.stores"
    return [
        Provides("store", "web", f"{here}:open_store"),
        Provides("store", "lake", f"{here}:open_store"),
        *(Provides("source", name, "flowlane.connectors.records:open_source") for name in ("web", "lake")),
        Provides("source", "rows", f"{here}:open_source"),
        Provides("sink", "table", f"{here}:open_sink"),
    ]


#: To be given to ``plugins.Registry``.
plugin = sys.modules[__name__]


@asynccontextmanager
async def open_store(uri: str, environment: Environment) -> AsyncIterator[Store]:
    """The store of `uri`'s scheme in the world in use."""
    yield _PORTS.get().store(uri.partition("://")[0])


@asynccontextmanager
async def open_source(uri: str, environment: Environment) -> AsyncIterator[Source]:
    """The records at `uri` in the world in use."""
    yield _PORTS.get().source(uri, {})


@asynccontextmanager
async def open_sink(
    uri: str, environment: Environment, *, schema: str = "evolve", into: TableSpec | None = None
) -> AsyncIterator[Sink]:
    """The table at `uri` in the world in use, or the one that `into` names there."""
    yield _PORTS.get().sink(uri, into)
