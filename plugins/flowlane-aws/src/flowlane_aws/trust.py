"""The SDK's connections, and whom they take for AWS: certificates are read once, and their names checked."""

from __future__ import annotations

import ssl
from functools import cache
from typing import Any

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession
from botocore.httpsession import create_urllib3_context, get_cert_path


class Connections(AIOHTTPSession):
    """The SDK's own, whose clients share what they trust.

    By itself, it reads the certificates anew for each client (18 ms, on the loop, whatever the endpoint),
    takes a certificate for any name as the server's, and behind a proxy takes any certificate at all.
    """

    # Set by the SDK's constructor; a test says if these names change.
    _verify: Any
    _max_pool_connections: int
    _connector_args: dict[str, Any]

    def _create_connector(self, proxy_url: str | None) -> aiohttp.TCPConnector:
        trusted = _trusted(get_cert_path(self._verify)) if self._verify else False
        return aiohttp.TCPConnector(limit=self._max_pool_connections, ssl=trusted, **self._connector_args)


@cache
def _trusted(certificates: str) -> ssl.SSLContext:
    """As the SDK sets TLS up, with the names checked: those are urllib3's to check, and this is aiohttp."""
    context: ssl.SSLContext = create_urllib3_context()
    context.check_hostname = True
    context.load_verify_locations(certificates)
    return context
