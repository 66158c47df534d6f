"""What connects lanes to the world by URI, and what plugins are given."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from flowlane.clock import Clock
from flowlane.ports.records import Sink, Source
from flowlane.ports.storage import Store


class Notifier(Protocol):
    """Tells people; at least once."""

    async def send(self, subject: str, text: str, *, idempotency_key: str) -> None:
        """Tell `text` (plain, lines ended by line feeds) under `subject`, one line of any length: what the
        medium does not carry is cut or left out, not refused. The same notice has the same key.

        Raises:
            Retryable: it may not have gone out.
            Permanent, ConfigError: it never will.
        """
        ...


class Secrets(Protocol):
    """Resolves the references of one scheme."""

    async def get(self, reference: str, *, fresh: bool = False) -> str:
        """The secret's value; one that was kept from an earlier call only if not `fresh`.

        Raises:
            ConfigError: there is none of that name; the message names the reference, never a value.
            Retryable: it cannot be asked for now.
        """
        ...


class Connections(Protocol):
    """Opens by URI what lanes read from and write to; owns what it opened and closes it in the end."""

    async def store(self, url: str) -> Store: ...
    def source(self, url: str, options: Mapping[str, Any]) -> AbstractAsyncContextManager[Source]: ...
    def sink(self, url: str, options: Mapping[str, Any]) -> AbstractAsyncContextManager[Sink]: ...
    def notifier(self, url: str) -> AbstractAsyncContextManager[Notifier]: ...

    async def secret(self, reference: str, *, fresh: bool = False) -> str:
        """The secret named by `reference`; asked for anew if `fresh`, since the one known was refused."""
        ...


class Environment(msgspec.Struct):
    """What a plugin's factory is given besides its URI and options.

    A factory is ``factory(uri, environment, *, option=..., ...)`` and returns an async context manager that
    yields the port; its keyword-only parameters are the options that the URI's query may set (as strings).
    """

    clock: Clock
    connections: Connections
    allow_private_hosts: bool = False
