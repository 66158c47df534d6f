"""``secretsmanager://name?key=field``: secrets from AWS Secrets Manager.

The name is a secret's name or whole ARN; without ``key`` the secret is its text as it is, with ``key`` one
field of the JSON object that the text is (as RDS writes them). What was fetched is kept in this process for
an hour, as AWS's own caches do, and fetched anew when somebody was refused with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import ConfigError, FlowlaneError, Retryable
from flowlane.ports import Environment
from flowlane_aws.clients import asking, code_of, open_client

logger = logging.getLogger("flowlane")

#: Seconds for which a secret is kept.
TTL: Final = 3600.0
#: Seconds for which an expired one still serves where Secrets Manager did not answer.
RESPITE: Final = 60.0
#: Secrets kept at once, at most.
_KEPT: Final = 1024
_OPTIONS = ("key", "region")
_ARN = re.compile(r"arn:aws[a-z0-9-]*:secretsmanager:([a-z0-9-]+):\d{12}:secret:.+")
#: What is wrong with the secret itself, and not with this call.
_UNUSABLE = (
    "DecryptionFailure",
    "InvalidParameterException",
    "InvalidRequestException",
    "ValidationException",
)


class _Reference(NamedTuple):
    said: str  # as it was given, for messages
    region: str
    name: str
    key: str

    @property
    def kept_as(self) -> tuple[str, str]:
        return self.region, self.name


class _Kept:
    """A secret's text, until when it serves, and what became of the last of so many requests for it. It shows
    nothing of itself."""

    __slots__ = ("asked", "error", "text", "turn", "until")

    def __init__(self) -> None:
        self.text = ""
        self.until = float("-inf")
        self.asked = 0
        self.error: FlowlaneError | None = None
        self.turn = asyncio.Lock()


class SecretsManager:
    """See ``ports.Secrets``. Calls for one secret at the same time share one request."""

    def __init__(self, clock: Clock, stack: AsyncExitStack) -> None:
        self._clock = clock
        self._stack = stack
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._clients: dict[str, Any] = {}
        self._opening = asyncio.Lock()

    async def get(self, reference: str, *, fresh: bool = False) -> str:
        """See ``ports.Secrets``; a secret that is bytes is refused.

        Raises:
            ConfigError: there is no such secret or field, it is not text, or it may not be read.
        """
        wanted = read(reference)
        return _field(wanted, await self._text(wanted, fresh=fresh))

    async def _text(self, wanted: _Reference, *, fresh: bool) -> str:
        kept = self._kept.setdefault(wanted.kept_as, _Kept())
        if len(self._kept) > _KEPT:  # whoever waits for the oldest one has it in hand
            del self._kept[next(iter(self._kept))]
        before = kept.asked
        async with kept.turn:
            # What became of a request that was made meanwhile is everybody's answer.
            if kept.asked == before and (fresh or self._clock.monotonic() >= kept.until):
                await self._renew(wanted, kept)
            if kept.error is not None and (fresh or self._clock.monotonic() >= kept.until):
                raise kept.error.with_traceback(None)
            return kept.text

    async def _renew(self, wanted: _Reference, kept: _Kept) -> None:
        """One request; an old text serves a little longer where Secrets Manager does not answer it."""
        served = kept.until > float("-inf")
        kept.error = None
        try:
            kept.text = await self._fetch(wanted)
            kept.until = self._clock.monotonic() + TTL
        except FlowlaneError as error:
            kept.error = error
            if served and isinstance(error, Retryable):
                kept.until = max(kept.until, self._clock.monotonic() + RESPITE)
                logger.warning("%s could not be fetched anew: %s", wanted.said, error)
        kept.asked += 1

    async def _fetch(self, wanted: _Reference) -> str:
        client = await self._client(wanted.region)
        try:
            async with asking(f"fetching {wanted.said}", passing=_UNUSABLE):
                answer = await client.get_secret_value(SecretId=wanted.name)
        except ClientError as error:
            raise ConfigError(
                f"{wanted.said} cannot be read ({code_of(error)}): check that it is not scheduled for "
                "deletion, and its KMS key"
            ) from None
        text = answer.get("SecretString")
        if text is None:
            raise ConfigError(f"{wanted.said} holds bytes (SecretBinary): store it as text (SecretString)")
        return str(text)

    async def _client(self, region: str) -> Any:
        async with self._opening:
            if region not in self._clients:
                opening = open_client("secretsmanager", region=region, connections=8)
                self._clients[region] = await self._stack.enter_async_context(opening)
        return self._clients[region]


def read(reference: str) -> _Reference:
    """What `reference` names.

    Raises:
        ConfigError: it names no secret, or has an option that there is not.
    """
    name, _, query = reference.removeprefix("secretsmanager://").partition("?")
    name = unquote(name)
    options: dict[str, str] = {}
    for option, value in parse_qsl(query, keep_blank_values=True):
        if option not in _OPTIONS or option in options or not value:
            raise ConfigError(
                f"{reference}: option {option!r} is unknown, empty or given twice; "
                f"known: {', '.join(_OPTIONS)}"
            )
        options[option] = value
    known = _ARN.fullmatch(name)
    if not name or (name.startswith("arn:") and known is None):
        raise ConfigError(
            f"{reference} names no secret: write secretsmanager://NAME?key=FIELD, or a whole ARN for NAME"
        )
    region = options.get("region", "") or (known[1] if known else "")
    return _Reference(reference, region, name, options.get("key", ""))


def _field(wanted: _Reference, text: str) -> str:
    if not wanted.key:
        return text
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):  # the error would hold the text
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f"{wanted.said}: the secret is no JSON object, it has no fields: leave out key=")
    if wanted.key not in fields:
        raise ConfigError(f"{wanted.said}: the secret's JSON has no field {wanted.key!r}")
    value = fields[wanted.key]
    if isinstance(value, dict | list) or value is None:
        raise ConfigError(f"{wanted.said}: the field {wanted.key!r} is neither text nor a number")
    return value if isinstance(value, str) else json.dumps(value)


@asynccontextmanager
async def open_secrets(uri: str, environment: Environment) -> AsyncIterator[SecretsManager]:
    """All of Secrets Manager; no client is made before a secret is asked for."""
    async with AsyncExitStack() as stack:
        yield SecretsManager(environment.clock, stack)
