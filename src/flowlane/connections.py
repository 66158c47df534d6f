"""What lanes name by URI, opened: their secrets resolved, and fetched anew where they are refused."""

from __future__ import annotations

import asyncio
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
from urllib.parse import urlsplit

from flowlane.clock import Clock
from flowlane.errors import FlowlaneError, Unauthorized
from flowlane.hookspecs import Kind
from flowlane.plugins import Registry
from flowlane.ports import Backend, Environment, Notifier, Sink, Source, Store
from flowlane.veil import conceal, remember

#: Options whose values are secrets, should somebody write them down instead of a reference.
_SECRET = ("password", "secret", "token")


@dataclass(frozen=True, slots=True, repr=False)  # the options that it was opened with have secrets in them
class _Opened:
    port: Any
    given: dict[str, Any]


class OpenConnections:
    """Opens what lanes name by URI, once per URI and options, and closes all of it in the end.

    An option that is a secret reference reaches the plugin as the secret. What is then refused as
    ``Unauthorized`` is opened once more with the secret asked for anew, if that is another one.
    """

    def __init__(
        self, registry: Registry, clock: Clock, stack: AsyncExitStack, *, allow_private: bool
    ) -> None:
        self._registry = registry
        self._stack = stack
        self._kept: dict[str, _Opened] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.environment = Environment(clock, self, allow_private)

    # ------------------------------------------------------------------ see ``ports.Connections``

    async def store(self, url: str) -> Store:
        """The store of `url`'s scheme."""
        plain, options = self._split("store", url, {})
        _, opened = await self._keep("store", f"{plain.partition('://')[0]}://", plain, options)
        store: Store = opened.port
        return store

    def source(self, url: str, options: Mapping[str, Any]) -> AbstractAsyncContextManager[Source]:
        """The source at `url`, closed with its context."""
        return self._fresh("source", url, options)

    @asynccontextmanager
    async def sink(self, url: str, options: Mapping[str, Any]) -> AsyncIterator[Sink]:
        """The sink at `url`, shared by all that write to it and closed in the end."""
        plain, wanted = self._split("sink", url, options)
        key, opened = await self._keep("sink", plain, plain, wanted)
        async with self._renewing(wanted, opened, key):
            yield opened.port

    def notifier(self, url: str) -> AbstractAsyncContextManager[Notifier]:
        """The notifier at `url`, closed with its context."""
        return self._fresh("notifier", url, {})

    def backend(self, url: str) -> AbstractAsyncContextManager[Backend]:
        """The backend at `url`, closed with its context."""
        return self._fresh("backend", url, {})

    async def secret(self, reference: str, *, fresh: bool = False) -> str:
        """The secret named by `reference`; from now on ``veil.conceal`` knows it."""
        scheme = reference.partition("://")[0]
        _, opened = await self._keep("secrets", f"{scheme}://", reference, {})
        asked = opened.port.get(reference, fresh=True) if fresh else opened.port.get(reference)
        value: str = await asked
        remember(value)
        return value

    # ------------------------------------------------------------------ options

    def _split(self, kind: Kind, url: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """`url` without its options, and these and `options`, as they are."""
        plain, given = self._registry.split(kind, url)
        with suppress(ValueError):
            remember(urlsplit(plain).password or "")
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
            elif any(word in name.lower() for word in _SECRET):
                remember(value)
        return resolved

    # ------------------------------------------------------------------ opening

    async def _keep(self, kind: Kind, name: str, url: str, options: Mapping[str, Any]) -> tuple[str, _Opened]:
        # By the references, not by what they stand for: a rotated secret makes no second one of it.
        said = repr((kind, name, sorted(options.items(), key=lambda item: item[0])))
        key = blake2b(said.encode("utf-8", "surrogatepass")).hexdigest()  # some write a password into a URI
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._kept:
                self._kept[key] = await self._stack.enter_async_context(self._opening(kind, url, options))
        return key, self._kept[key]

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
        self, options: Mapping[str, Any], opened: _Opened, key: str | None = None
    ) -> AsyncIterator[None]:
        """Where what was opened is refused in here, its secrets are fetched anew, for the next attempt; if
        they have changed, what is kept under `key` is not used again."""
        try:
            with _concealed():
                yield
        except Exception as error:
            if _is_refusal(error):
                with suppress(FlowlaneError):  # the refusal is what is told of
                    renewed = await self._resolved(options, fresh=True)
                    if renewed != opened.given and key is not None and self._kept.get(key) is opened:
                        del self._kept[key]  # who uses it still may go on; it is closed in the end
            raise


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
