"""What lanes name by URI, opened: their secrets resolved, and fetched anew where they are refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import unquote, urlsplit
from weakref import WeakValueDictionary

import msgspec

from flowlane.clock import Clock
from flowlane.errors import FlowlaneError, Unauthorized
from flowlane.hookspecs import Kind
from flowlane.plugins import Registry
from flowlane.ports import Backend, Environment, Notifier, Sink, Source, Store
from flowlane.reasons import describe
from flowlane.veil import conceal, remember

logger = logging.getLogger("flowlane")

#: Options (and fields of secrets that are JSON) whose values are secrets have one of these in their name; of
#: options, should somebody write them down instead of a reference.
_SECRET = ("password", "secret", "token")


#: Sinks kept open though nobody writes to them, at most.
IDLE = 64


@dataclass(frozen=True, slots=True, repr=False)  # the options that it was opened with have secrets in them
class _Opened:
    port: Any
    given: dict[str, Any]


@dataclass(slots=True, repr=False)
class _Shared:
    """A sink, how it is closed, and how many write to it."""

    opened: _Opened
    closing: AsyncExitStack
    users: int = 0


class OpenConnections:
    """Opens what lanes name by URI, once per URI and options, and closes all of it in the end; of sinks that
    nobody writes to, those in excess of ``IDLE`` at once: a lane may name another one for each unit.

    An option that is a secret reference reaches the plugin as the secret. What is then refused as
    ``Unauthorized`` is opened once more with the secret asked for anew, if that is another one.
    """

    def __init__(
        self, registry: Registry, clock: Clock, stack: AsyncExitStack, *, allow_private: bool
    ) -> None:
        self._registry = registry
        self._stack = stack
        self._kept: dict[str, _Opened] = {}
        self._sinks: dict[str, _Shared] = {}
        self._idle: dict[str, _Shared] = {}  # of these, longest idle first
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.environment = Environment(clock, self, allow_private)

    # ------------------------------------------------------------------ see ``ports.Connections``

    async def store(self, url: str) -> Store:
        """The store of `url`'s scheme."""
        plain, options = self._split("store", url, {})
        opened = await self._keep("store", f"{plain.partition('://')[0]}://", plain, options)
        store: Store = opened.port
        return store

    def source(self, url: str, options: Mapping[str, Any]) -> AbstractAsyncContextManager[Source]:
        """The source at `url`, closed with its context."""
        return self._fresh("source", url, options)

    @asynccontextmanager
    async def sink(self, url: str, options: Mapping[str, Any]) -> AsyncIterator[Sink]:
        """The sink at `url`, shared by all that write to it."""
        plain, wanted = self._split("sink", url, options)
        key = _key("sink", plain, wanted)
        sink = await self._share(key, plain, wanted)
        sink.users += 1
        self._idle.pop(key, None)
        try:
            async with self._renewing(wanted, sink.opened, key):
                yield sink.opened.port
        finally:
            sink.users -= 1
            await self._leave(key, sink)

    def notifier(self, url: str) -> AbstractAsyncContextManager[Notifier]:
        """The notifier at `url`, closed with its context."""
        return self._fresh("notifier", url, {})

    def backend(self, url: str) -> AbstractAsyncContextManager[Backend]:
        """The backend at `url`, closed with its context."""
        return self._fresh("backend", url, {})

    async def secret(self, reference: str, *, fresh: bool = False) -> str:
        """The secret named by `reference`; from now on ``veil.conceal`` knows it."""
        scheme = reference.partition("://")[0]
        opened = await self._keep("secrets", f"{scheme}://", reference, {})
        asked = opened.port.get(reference, fresh=True) if fresh else opened.port.get(reference)
        value: str = await asked
        _remember(value)
        return value

    # ------------------------------------------------------------------ options

    def _split(self, kind: Kind, url: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """`url` without its options, and these and `options`, as they are."""
        plain, given = self._registry.split(kind, url)
        with suppress(ValueError):
            password = urlsplit(plain).password or ""
            remember(password)
            remember(unquote(password))  # as drivers quote it
        return plain, {**given, **options}

    async def _resolved(self, options: Mapping[str, Any], *, fresh: bool = False) -> dict[str, Any]:
        """`options` with every secret reference replaced by the secret."""
        secrets = tuple(f"{scheme}://" for scheme in self._registry.schemes("secrets"))
        resolved = dict(options)
        for name, value in options.items():
            if not isinstance(value, str):
                continue
            if value.startswith(secrets):
                resolved[name] = await self.secret(value, fresh=fresh)
            elif _is_secret(name):
                remember(value)
        return resolved

    # ------------------------------------------------------------------ opening

    async def _keep(self, kind: Kind, name: str, url: str, options: Mapping[str, Any]) -> _Opened:
        key = _key(kind, name, options)
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._kept:
                self._kept[key] = await self._stack.enter_async_context(self._opening(kind, url, options))
                self._stack.push_async_callback(self._close_sinks)  # which may stand on it
        return self._kept[key]

    async def _share(self, key: str, url: str, options: Mapping[str, Any]) -> _Shared:
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._sinks:
                async with AsyncExitStack() as closing:
                    opened = await closing.enter_async_context(self._opening("sink", url, options))
                    if not self._sinks:
                        self._stack.push_async_callback(self._close_sinks)
                    self._sinks[key] = _Shared(opened, closing.pop_all())
            return self._sinks[key]

    async def _leave(self, key: str, sink: _Shared) -> None:
        """Close `sink` if it was replaced and this was the last of its users; or another one for its sake.
        What was written is safe by then: that it cannot be closed fails nobody."""
        if sink.users:
            return
        if self._sinks.get(key) is sink:
            self._idle[key] = sink
            if len(self._idle) <= IDLE:
                return
            key = next(iter(self._idle))
            sink = self._idle.pop(key)
            del self._sinks[key]
        try:
            await sink.closing.aclose()
        except Exception as error:  # noqa: BLE001  # whatever a plugin's sink raises
            logger.warning("a sink could not be closed: %s", describe(error))

    async def _close_sinks(self) -> None:
        self._idle.clear()
        async with AsyncExitStack() as closing:
            for sink in self._sinks.values():
                closing.push_async_exit(sink.closing)
            self._sinks.clear()

    @asynccontextmanager
    async def _fresh(self, kind: Kind, url: str, options: Mapping[str, Any]) -> AsyncIterator[Any]:
        plain, wanted = self._split(kind, url, options)
        async with self._opening(kind, plain, wanted) as opened, self._renewing(wanted, opened):
            yield opened.port

    @asynccontextmanager
    async def _opening(self, kind: Kind, url: str, options: Mapping[str, Any]) -> AsyncIterator[_Opened]:
        """`url` opened; if it is refused for its secrets, once more with others, if there are others."""
        async with AsyncExitStack() as stack:
            given = await self._resolved(options)
            with _concealed():
                try:
                    port = await stack.enter_async_context(self._open(kind, url, given))
                except Unauthorized:
                    renewed = await self._resolved(options, fresh=True)
                    if renewed == given:
                        raise
                    given = renewed
                    port = await stack.enter_async_context(self._open(kind, url, given))
            yield _Opened(port, given)

    def _open(self, kind: Kind, url: str, given: Mapping[str, Any]) -> AbstractAsyncContextManager[Any]:
        return self._registry.open(kind, url, self.environment, given)

    @asynccontextmanager
    async def _renewing(
        self, options: Mapping[str, Any], opened: _Opened, key: str = ""
    ) -> AsyncIterator[None]:
        """Where what was opened is refused in here, its secrets are fetched anew, for the next attempt; if
        they have changed, the sink kept under `key` is not used again."""
        try:
            with _concealed():
                yield
        except Exception as error:
            if _is_refusal(error):
                with suppress(FlowlaneError):  # the refusal is what is told of
                    renewed = await self._resolved(options, fresh=True)
                    kept = self._sinks.get(key) if key else None
                    if renewed != opened.given and kept is not None and kept.opened is opened:
                        del self._sinks[key]  # who uses it still may go on; the last one closes it
            raise


def _key(kind: Kind, name: str, options: Mapping[str, Any]) -> str:
    """What names one that is kept. By the references, not by what they stand for: a rotated secret makes no
    second one of it; and hashed, since some write a password into a URI."""
    said = repr((kind, name, sorted(options.items(), key=lambda item: item[0])))
    return blake2b(said.encode("utf-8", "surrogatepass")).hexdigest()


def _remember(secret: str) -> None:
    """`secret` is known to ``veil``; of one that is a JSON object, as RDS writes them, what it is about, too:
    who asks for all of it takes it apart."""
    remember(secret)
    fields: Any = None
    if secret.startswith("{"):
        with suppress(ValueError, RecursionError):
            fields = msgspec.json.decode(secret)
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if isinstance(value, str) and _is_secret(name):
            remember(value)


def _is_secret(name: str) -> bool:
    return any(word in name.lower() for word in _SECRET)


def _is_refusal(error: Exception) -> bool:
    group = error.subgroup(Unauthorized) if isinstance(error, ExceptionGroup) else None
    return isinstance(error, Unauthorized) or group is not None


@contextmanager
def _concealed() -> Iterator[None]:
    """An error of flowlane's that quotes a secret, as one given to the wrong option, quotes it no longer."""
    try:
        yield
    except FlowlaneError as error:
        error.args = tuple(conceal(each) if isinstance(each, str) else each for each in error.args)
        raise
