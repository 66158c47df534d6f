"""``env://NAME``: secrets from environment variables."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flowlane.errors import ConfigError
from flowlane.ports import Environment


class EnvironmentSecrets:
    """Resolves ``env://NAME`` when asked, so that a changed variable is seen (``ports.Secrets``)."""

    async def get(self, reference: str, *, fresh: bool = False) -> str:
        """See ``ports.Secrets``."""
        name = reference.removeprefix("env://")
        value = os.environ.get(name)
        if value is None:
            raise ConfigError(f"{reference}: the environment has no variable {name}: set it")
        return value


@asynccontextmanager
async def open_secrets(uri: str, environment: Environment) -> AsyncIterator[EnvironmentSecrets]:
    """The environment's secrets."""
    yield EnvironmentSecrets()
