"""The SDK's clients, and its errors as flowlane's: the only module that knows how AWS is asked.

Clients are made with a bounded pool and short time-outs; ``asking`` puts an outer time-out around every
call, since the SDK has none for waiting for a free connection. Retries of single requests are the SDK's (its
standard mode, three tries, full jitter); everything longer is the engine's.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import datetime
from functools import cache
from typing import Any, Final

import aiobotocore
import aiohttp
import botocore
from aiobotocore.config import AioConfig
from aiobotocore.hooks import AioHierarchicalEmitter
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    EndpointProviderError,
    EndpointVariantError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import (
    ConnectionError as NoConnection,
)
from botocore.loaders import Loader, create_loader
from botocore.parsers import DEFAULT_TIMESTAMP_PARSER, ResponseParserError

from flowlane.errors import ConfigError, FlowlaneError, Permanent, Retryable
from flowlane.veil import conceal, remember
from flowlane_aws.brisk import PIECE, BriskClient
from flowlane_aws.trust import Session

#: Seconds for one call, all of its tries included, unless the caller says otherwise.
PATIENCE: Final = 30.0

_THROTTLED = frozenset(
    {
        "BandwidthLimitExceeded",
        "KMSThrottling",
        "KMSThrottlingException",
        "KMS.ThrottlingException",
        "KmsThrottled",
        "LimitExceededException",
        "OverLimit",
        "PriorRequestNotComplete",
        "ProvisionedThroughputExceeded",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "Throttled",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "TransactionConflictException",
        "TransactionInProgressException",
    }
)
_AWAY = frozenset(
    {
        "InternalError",
        "InternalErrorException",
        "InternalFailure",
        "InternalServerError",
        "InternalServiceError",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
    }
)
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
_REFUSED = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "AllAccessDisabled",
        "AuthorizationError",
        "AuthorizationErrorException",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "InvalidToken",
        "MissingAuthenticationToken",
        "SignatureDoesNotMatch",
        "UnauthorizedOperation",
        "UnrecognizedClientException",
    }
)
_UNSIGNED = frozenset({"InvalidSignatureException", "SignatureDoesNotMatch"})
#: What is said, in code or message, where a request came later, or earlier, than it was signed for: it waited
#: in a process that was frozen or asleep, or the clock is off.
_UNTIMELY = ("RequestTimeTooSkewed", "RequestInTheFuture", "Signature expired", "Signature not yet current")
#: The SDK's own errors that tell of wrong settings.
_WRONG = (ValueError, ProfileNotFound, ConfigParseError, EndpointProviderError, EndpointVariantError)
_MISSING = frozenset(
    {
        "AWS.SimpleQueueService.NonExistentQueue",
        "NoSuchBucket",
        "NotFound",
        "NotFoundException",
        "QueueDoesNotExist",
        "ResourceNotFoundException",
    }
)
_ELSEWHERE = frozenset(
    {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
)


@asynccontextmanager
async def open_client(
    service: str,
    *,
    region: str = "",
    endpoint: str = "",
    connections: int = 64,
    read_timeout: float = 25.0,
    checksums: bool = False,
    attempts: int = 3,
    brisk: Collection[str] = (),
) -> AsyncIterator[Any]:
    """The SDK's client of `service`, for as long as the context is open.

    Region, endpoint and credentials are the SDK's own settings (``AWS_REGION``, ``AWS_ENDPOINT_URL``,
    profiles, roles) where they are not given; credentials refresh themselves. `checksums`: have S3 objects
    carry those that the SDK computes by default. `attempts`: of one call; 1 where callers repeat it. `brisk`:
    the operations that are worth the short way (see ``brisk``).

    Raises:
        ConfigError: there is no region, or what AWS_CA_BUNDLE names cannot be read.
    """
    _keep_secrets()
    session = Session(event_hooks=_handlers(), include_builtin_handlers=False)
    session.register_component("data_loader", _models())
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_moment)
    config = AioConfig(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=5,
        read_timeout=read_timeout,
        max_pool_connections=connections,
        parameter_validation=False,
        tcp_keepalive=True,
        # The SDK's own is put together anew for each request, which takes an eighth of a call's CPU.
        user_agent=f"flowlane aiobotocore/{aiobotocore.__version__} botocore/{botocore.__version__}",
        request_checksum_calculation="when_supported" if checksums else "when_required",
        response_checksum_validation="when_required",
    )
    try:
        opening = session.create_client(
            service,
            region_name=region or os.environ.get("AWS_REGION") or None,
            endpoint_url=endpoint or None,
            config=config,
        )
        client = await opening.__aenter__()
        credentials = await session.get_credentials() if brisk else None
    except (BotoCoreError, ValueError) as error:
        raise told(error, f"opening {service}") from error
    client.meta.events.register("before-send", _in_pieces)
    client.meta.events.register("needs-retry", _let_go)
    try:
        yield BriskClient(client, credentials, brisk) if brisk else client
    finally:
        await opening.__aexit__(None, None, None)


def _moment(value: Any) -> Any:
    """A timestamp, parsed without trying out formats: that takes four fifths of the 58 ms in which the SDK
    parses a listing of 1,000 objects, on the loop."""
    try:
        if isinstance(value, str) and value[10:11] == "T":
            return datetime.fromisoformat(value)
    except ValueError:
        pass
    return DEFAULT_TIMESTAMP_PARSER(value)


def _in_pieces(request: Any, **kwargs: Any) -> None:
    """A large body of JSON goes out in pieces, between which the loop turns; else aiohttp warns of it."""
    if isinstance(request.body, bytes) and len(request.body) > PIECE:
        request.body = io.BytesIO(request.body)


def _let_go(endpoint: Any, caught_exception: Exception | None = None, **kwargs: Any) -> None:
    """A connection that breaks is seldom alone: of those that were kept through a freeze (Lambda) or a change
    of servers all are dead, and each try would find it out for one of them. None of the idle ones is used
    again; those at work are left alone."""
    if not isinstance(caught_exception, HTTPClientError | NoConnection):
        return
    # The SDK has no call for it. Were these names to change, three dead connections fail a call again.
    sessions = getattr(endpoint.http_session, "_sessions", {})
    pools = [getattr(session.connector, "_conns", {}) for session in sessions.values()]
    for idle in [connection for pool in pools for kept in pool.values() for connection, _ in kept]:
        idle.close()


#: Whose debug lines hold signed headers, session tokens and whole answers (of Secrets Manager, too).
_TALKATIVE = ("aioboto3", "aiobotocore", "boto3", "botocore", "urllib3")


def _keep_secrets() -> None:
    """What the SDK knows of secrets gets into no log line, whatever level the process logs at."""
    for name in _TALKATIVE:
        logger = logging.getLogger(name)
        if not logger.level > logging.DEBUG:
            logger.setLevel(logging.WARNING)  # of less they tell with every client that is opened
    for variable in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        remember(os.environ.get(variable, ""))


@cache
def _models() -> Loader:
    """The SDK's service models, read once a process: 90 ms of a client's 95."""
    return create_loader()


@cache
def _handlers() -> AioHierarchicalEmitter:
    """What the SDK does around each call, put together once a process: half of what is left. Every client
    gets a copy."""
    handlers = AioHierarchicalEmitter()
    Session(event_hooks=handlers)
    return handlers


@asynccontextmanager
async def asking(
    what: str, *, seconds: float = PATIENCE, passing: Collection[str] = ()
) -> AsyncIterator[None]:
    """Calls in here take `seconds` at most, and fail with flowlane's errors, which say `what` was asked.

    Raises:
        ClientError: with a code that is in `passing`: the caller knows what it means.
        Retryable: throttled, away, out of time, no answer of AWS's, or the credentials have expired.
        ConfigError: what was asked for does not exist, lies elsewhere, or is not allowed; or its key is not.
        Permanent: AWS refuses it as it is.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except ClientError as error:
        if code_of(error) in passing:
            raise
        raise told(error, what) from error
    except TimeoutError as error:
        raise Retryable(f"{what}: no answer within {seconds:g} s") from error
    except (BotoCoreError, ResponseParserError, aiohttp.ClientError, OSError) as error:
        raise told(error, what) from error


def code_of(error: ClientError) -> str:
    """The code of an error that AWS answered with; of one without a body, its HTTP status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """The HTTP status that the error came with; 0 if it is not known."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def told(error: Exception, what: str) -> FlowlaneError:
    """`error`, raised while `what` was asked, as an error of flowlane's that says what to do."""
    said = conceal(" ".join(str(error).split()))[:300] or type(error).__name__
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return ConfigError(
            f"{what}: there are no AWS credentials ({said}): set a role, a profile or AWS_ACCESS_KEY_ID"
        )
    if isinstance(error, NoRegionError):
        return ConfigError(f"{what}: there is no AWS region: set AWS_REGION, or region= in the URI")
    if not isinstance(error, ClientError):
        if isinstance(error, _WRONG):
            return ConfigError(f"{what}: {said}")
        hint = ": AWS_CA_BUNDLE names the certificates that are trusted" if "certificate" in said else ""
        return Retryable(f"{what}: {type(error).__name__}: {said}{hint}")
    return _answered(error, what)


def _answered(error: ClientError, what: str) -> FlowlaneError:
    code, status = code_of(error), status_of(error)
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())
    if code in _UNSIGNED:
        message = message.partition(". ")[0]  # what follows quotes the request's headers, tokens among them
    message = conceal(message)[:300]
    said = f"{code}: {message}" if message else code
    if code in _THROTTLED or status == 429:
        return Retryable(f"{what}: throttled ({said})")
    if said.startswith(_UNTIMELY) or (code in _UNSIGNED and message.startswith(_UNTIMELY)):
        return Retryable(f"{what}: signed too long ago, or too early ({said}): set this computer's clock")
    if code in _EXPIRED:
        return Retryable(f"{what}: the AWS credentials have expired ({said}): renew them, it is tried again")
    keyless = code.lower().startswith("kms") and status < 500  # services spell the rest each in its own way
    if keyless or code in _REFUSED or status in (401, 403):
        todo = "check the credentials and the role's policy"
        if keyless:
            todo = "see that its KMS key is there and enabled, and that its policy and the role's allow it"
        return ConfigError(f"{what}: not allowed ({said}): {todo}")
    if code in _ELSEWHERE or status == 301:
        return ConfigError(f"{what}: it lies in another region ({said}): set AWS_REGION or region=")
    if code in _MISSING:
        return ConfigError(
            f"{what}: it does not exist ({said}): create it (`flowlane init` makes what stages need), or "
            "check name and region"
        )
    if code in _AWAY or status >= 500:
        return Retryable(f"{what}: AWS could not ({said})")
    return Permanent(f"{what}: refused ({said})")
