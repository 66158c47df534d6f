"""The hot calls of services that speak JSON, without the SDK's five sixths of their CPU.

The SDK serialises, resolves, signs, parses and checks each request in general; for the few operations that a
worker makes all day long, all of that comes down to one signed POST. What goes wrong is the SDK's to judge:
its parser reads every answer but a 200, its rules say whether there is another try, and wait for it. So a
request is sent as often as by the SDK, and fails with the same error.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import zlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

import msgspec
from aiobotocore.parsers import AioResponseParserFactory
from botocore import xform_name
from botocore.awsrequest import AWSPreparedRequest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import BotoCoreError, HTTPClientError

#: Bytes of a body that are sent at once, which holds the loop for 1 ms with TLS. aiohttp warns of more.
PIECE: Final = 1 << 20
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode
_SIGNED: Final = "content-type;host;x-amz-date;x-amz-target"


class Signer:
    """Signs POST requests to one service in one region (Signature Version 4: AWS General Reference, "Create a
    signed AWS API request"). The key that is derived for a day is kept for that day."""

    def __init__(self, service: str, region: str, host: str) -> None:
        self._service = service
        self._region = region
        self._host = host
        self._day = self._for = ""
        self._key = b""

    def sign(
        self, body: bytes, content_type: str, target: str, secret: ReadOnlyCredentials, now: datetime
    ) -> dict[str, str]:
        """The headers with which `body` is to be sent to the service's root."""
        moment = now.strftime("%Y%m%dT%H%M%SZ")
        day = moment[:8]
        token = secret.token
        signed = (
            f"{_SIGNED.removesuffix('x-amz-target')}x-amz-security-token;x-amz-target" if token else _SIGNED
        )
        known = f"x-amz-security-token:{token}\n" if token else ""
        digest = hashlib.sha256(body).hexdigest()
        canonical = (
            f"POST\n/\n\ncontent-type:{content_type}\nhost:{self._host}\nx-amz-date:{moment}\n{known}"
            f"x-amz-target:{target}\n\n{signed}\n{digest}"
        )
        scope = f"{day}/{self._region}/{self._service}/aws4_request"
        hashed = hashlib.sha256(canonical.encode()).hexdigest()
        proof = hmac.digest(
            self._derived(str(secret.secret_key), day),
            f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashed}".encode(),
            "sha256",
        ).hex()
        headers = {
            "Content-Type": content_type,
            "X-Amz-Date": moment,
            "X-Amz-Target": target,
            "Authorization": f"AWS4-HMAC-SHA256 Credential={secret.access_key}/{scope}, "
            f"SignedHeaders={signed}, Signature={proof}",
        }
        if token:
            headers["X-Amz-Security-Token"] = token
        return headers

    def _derived(self, key: str, day: str) -> bytes:
        if (day, key) != (self._day, self._for):
            derived = f"AWS4{key}".encode()
            for part in (day, self._region, self._service, "aws4_request"):
                derived = hmac.digest(derived, part.encode(), "sha256")
            self._day, self._for, self._key = day, key, derived
        return self._key


class _Way(NamedTuple):
    """Where requests go, and who signs them."""

    url: str
    signer: Signer


class BriskClient:
    """The SDK's `client`, of which the `operations` (as in the API reference, ``ReceiveMessage``) take the
    short way. They take and give what the SDK's do, except that answers have no ``ResponseMetadata``, are not
    checked against the model (bytes in them are base64), and no idempotency token is made up. What is
    registered for ``provide-client-params``, ``before-call``, ``after-call`` and ``needs-retry`` is called as
    ever, and what they put in the place of the request's body is sent.

    Where `operations` maps an operation to a type, msgspec makes that of its answer: base64 becomes bytes,
    and what the type does not name is passed over.

    Raises, from any operation: what the SDK's client raises.
    """

    def __init__(self, client: Any, credentials: Any, operations: Collection[str]) -> None:
        self._client = client
        types = operations if isinstance(operations, Mapping) else dict.fromkeys(operations)
        self._decoders = {
            name: msgspec.json.Decoder(kind).decode if kind else _decode for name, kind in types.items()
        }
        model = client.meta.service_model
        self._model = model
        self._events = client.meta.events
        self._credentials = credentials
        self._service = model.service_id.hyphenize()
        self._way: _Way | None = None
        self._looked = False  # for the way
        self._content_type = f"application/x-amz-json-{model.metadata.get('jsonVersion', '1.0')}"
        self._prefix = model.metadata.get("targetPrefix", "")
        self._headers = {"User-Agent": client.meta.config.user_agent}
        if model.is_query_compatible:
            self._headers["x-amzn-query-mode"] = "true"  # errors have the codes that they had before JSON
        if fits(client, credentials):
            self._parser = AioResponseParserFactory().create_parser("json")
            for operation in operations:
                setattr(self, xform_name(operation), self._brisk(operation))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def _brisk(self, operation: str) -> Callable[..., Awaitable[Mapping[str, Any]]]:
        model = self._model.operation_model(operation)
        where = f"{self._service}.{operation}"
        slow = getattr(self._client, xform_name(operation))

        async def call(**params: Any) -> Mapping[str, Any]:
            if not self._looked:
                self._way, self._looked = await self._find_way(model, params), True
            if self._way is None:
                return cast("Mapping[str, Any]", await slow(**params))
            context: dict[str, Any] = {}
            about: dict[str, Any] = {"model": model, "context": context}
            for _, told in await self._events.emit(f"provide-client-params.{where}", params=params, **about):
                params = params if told is None else told
            request = {
                "url": self._way.url,
                "method": "POST",
                "body": msgspec.json.encode(params),
                "headers": dict(self._headers),
            }
            _, instead = await self._events.emit_until_response(
                f"before-call.{where}", params=request, request_signer=None, **about
            )
            http, parsed = instead or await self._ask(model, context, request)
            await self._events.emit(f"after-call.{where}", http_response=http, parsed=parsed, **about)
            if http.status_code >= 300:
                # The override is a handler's of the SDK, for codes that SQS had before it spoke JSON.
                code = context.get("error_code_override") or parsed.get("Error", {}).get("Code")
                raise self._client.exceptions.from_code(code)(parsed, operation)
            return cast("Mapping[str, Any]", parsed)

        return call

    async def _find_way(self, model: Any, params: Mapping[str, Any]) -> _Way | None:
        """Whither the SDK would send requests: its rules know FIPS, dual stack, accounts' own endpoints and
        partitions, and ``meta.endpoint_url`` is not always theirs. ``None`` if not to a server's root.

        Raises:
            BotoCoreError: there is no such endpoint, or there are no credentials to tell it by.
        """
        meta = self._client.meta
        context: dict[str, Any] = {
            "client_region": meta.region_name,
            "client_config": meta.config,
            "auth_type": model.resolved_auth_type,
        }
        found, headers, _ = await self._client._resolve_endpoint_ruleset(model, params, context)
        url = f"{found.rstrip('/')}/"
        parts = urlsplit(url)
        if parts.path != "/" or headers or context["auth_type"] not in (None, "v4"):
            return None
        host = parts.netloc.removesuffix(":443" if parts.scheme == "https" else ":80")
        region = context.get("signing", {}).get("region", meta.region_name)
        return _Way(url, Signer(self._model.signing_name, region, host))

    async def _ask(
        self, model: Any, context: dict[str, Any], request: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """The answer, after as many tries as the SDK's rules allow."""
        tries = 1
        while True:
            answer, error = None, None
            try:
                answer = await self._send(model, request)
                if answer[0].status_code == 200:
                    return answer
            except BotoCoreError as failed:
                error = failed
            # It waits, too, and keeps the client's quota of tries in `context`.
            if not await self._client._endpoint._needs_retry(
                tries, model, {"context": context}, answer, error
            ):
                break
            tries += 1
        if answer is None:
            assert error is not None
            raise error
        return answer

    async def _send(self, model: Any, request: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        body = request["body"]
        signed = await self._signed(model.name, body)
        headers: Any = {**request["headers"], **signed, "Content-Length": str(len(body))}
        content = body if len(body) <= PIECE else io.BytesIO(body)
        prepared = AWSPreparedRequest("POST", request["url"], headers, content, stream_output=False)
        http = await self._client._endpoint.http_session.send(prepared)
        told = await http.content
        expected = http.headers.get("x-amz-crc32")  # DynamoDB's, of every answer
        if expected and str(zlib.crc32(told)) != expected:
            raise HTTPClientError(error=f"an answer to {model.name} whose CRC-32 is not {expected}")
        if http.status_code == 200:
            return http, _object(told, model.name, self._decoders[model.name])
        return http, await self._refusal(model, http, told)

    async def _signed(self, operation: str, body: bytes) -> dict[str, str]:
        """The headers that sign `body`. By itself: where a request fails, no frame of its traceback, which
        some print with all that is in it, holds the key."""
        assert self._way is not None
        secret = await self._credentials.get_frozen_credentials()
        return self._way.signer.sign(
            body, self._content_type, f"{self._prefix}.{operation}", secret, datetime.now(UTC)
        )

    async def _refusal(self, model: Any, http: Any, told: bytes) -> dict[str, Any]:
        """What an answer other than 200 says, as the SDK tells it."""
        answer = {
            "headers": http.headers,
            "status_code": http.status_code,
            "body": told,
            "context": {"operation_name": model.name},
        }
        parsed: dict[str, Any] = await self._parser.parse(answer, model.output_shape)
        shape = self._model.shape_for_error_code(parsed.get("Error", {}).get("Code"))
        if shape is not None:
            parsed.update(await self._parser.parse(answer, shape))
        return parsed


def _object(told: bytes, operation: str, decode: Callable[[bytes], Any]) -> Any:
    """The JSON object `told`; an error that is worth another try if it is none (a proxy's page, say)."""
    try:
        return decode(told or b"{}")
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise HTTPClientError(error=f"an answer to {operation} that is no JSON object: {error}") from None


def fits(client: Any, credentials: Any) -> bool:
    """Whether requests of `client` are what this module makes of them, wherever they go."""
    model = client.meta.service_model
    return (
        credentials is not None
        and model.resolved_protocol == "json"
        and client.meta.config.signature_version == "v4"
    )
