"""The SDK's connections, and whom they take for AWS: certificates are read once, and their names checked."""

from __future__ import annotations

import ssl
from functools import cache
from typing import Any

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.httpsession import create_urllib3_context, get_cert_path

from flowlane.errors import ConfigError


class Session(AioSession):
    """The SDK's own, all of whose clients have ``Connections``: those, too, that it opens by itself and tells
    tokens in return for credentials (STS, SSO)."""

    def create_client(self, *args: Any, **kwargs: Any) -> Any:
        config: Any = AioConfig().merge(kwargs.get("config") or AioConfig())
        config.http_session_cls = Connections  # were it merged again, it would lose this
        return super().create_client(*args, **{**kwargs, "config": config})


class Connections(AIOHTTPSession):
    """The SDK's own, whose clients share what they trust.

    By itself, it reads the certificates anew for each client (18 ms, on the loop, whatever the endpoint),
    takes a certificate for any name as the server's, behind a proxy takes any certificate at all, and does so
    everywhere where ``AWS_CA_BUNDLE`` is set, but empty; here that is as if it were not set.

    Raises, when made:
        ConfigError: what is to be trusted cannot be read.
    """

    # Set by the SDK's constructor; a test says if these names change.
    _max_pool_connections: int
    _connector_args: dict[str, Any]

    def __init__(self, *, verify: Any = True, **settings: Any) -> None:
        super().__init__(verify=verify or True, **settings)
        self._trusted = _trusted(get_cert_path(verify or True))

    def _create_connector(self, proxy_url: str | None) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(
            limit=self._max_pool_connections, ssl=self._trusted, **self._connector_args
        )


@cache
def _trusted(certificates: str) -> ssl.SSLContext:
    """As the SDK sets TLS up, with the names checked: those are urllib3's to check, and this is aiohttp."""
    context: ssl.SSLContext = create_urllib3_context()
    context.check_hostname = True
    try:
        context.load_verify_locations(certificates)
    except OSError as error:
        raise ConfigError(
            f"{certificates}: the certificates to be trusted cannot be read ({error}): have AWS_CA_BUNDLE, "
            "or ca_bundle of the profile, name a PEM file"
        ) from error
    return context
