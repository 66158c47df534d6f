"""Settings: what the environment says, read once by the composition root and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from flowlane.errors import ConfigError, redact

#: Every variable that flowlane reads, and what it sets.
VARIABLES = {
    "FLOWLANE_BACKEND": "the backend's URI",
    "FLOWLANE_LANE": "the lane that a Lambda function runs: path/to/file.py[:name] or package.module[:name]",
    "FLOWLANE_STAGE": "the only stage that this worker or function handles (default: all of them)",
    "FLOWLANE_LOG_LEVEL": "debug, info, warning or error",
    "FLOWLANE_ALLOW_PRIVATE_HOSTS": "1: HTTP sources may reach loopback and private addresses",
}
_LEVELS = ("debug", "info", "warning", "error")


class Settings(msgspec.Struct, frozen=True):
    """The settings of one process; the defaults are those of the embedded worker."""

    backend: str = "sqlite:///.flowlane/flowlane.db"
    lane: str = ""
    stage: str = ""
    log_level: str = "warning"
    allow_private_hosts: bool = False

    def __repr__(self) -> str:
        """What of it may be shown: of the backend's URI all but user, password and options."""
        fields = {**msgspec.structs.asdict(self), "backend": redact(self.backend)}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings:
        """The settings that `environment` holds.

        Raises:
            ConfigError: a variable has a value that means nothing.
        """
        level = environment.get("FLOWLANE_LOG_LEVEL", "").lower() or "warning"
        if level not in _LEVELS:
            raise ConfigError(f"FLOWLANE_LOG_LEVEL={level!r}: must be one of {', '.join(_LEVELS)}")
        allow = environment.get("FLOWLANE_ALLOW_PRIVATE_HOSTS", "")
        if allow not in ("", "0", "1"):
            raise ConfigError(f"FLOWLANE_ALLOW_PRIVATE_HOSTS={allow!r}: must be 1 or 0")
        return cls(
            backend=environment.get("FLOWLANE_BACKEND") or cls.__struct_defaults__[0],
            lane=environment.get("FLOWLANE_LANE", ""),
            stage=environment.get("FLOWLANE_STAGE", ""),
            log_level=level,
            allow_private_hosts=allow == "1",
        )
