"""One HTTP request at a time: redirects followed by hand, addresses guarded, every failure typed.

Whatever aiohttp or a server may do ends in one of flowlane's errors, whose message names the URL without its
query (a presigned URL is a secret) and without user info.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NoReturn

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from flowlane.clock import Clock
from flowlane.connectors.guard import refused
from flowlane.errors import ConfigError, Damaged, Incomplete, Permanent, Retryable
from flowlane.streams.inflate import Decoder, decoder

MAX_HOPS: Final = 5
#: aiohttp stops reading from the socket at twice this many unread bytes: the backpressure. What waits any
#: longer has left the CPU's cache when it is worked on (1 MiB: three fifths more CPU for landing).
READ_BUFFER: Final = 256 << 10
CONNECT_TIMEOUT: Final = 15.0
READ_TIMEOUT: Final = 60.0
#: From sending a request (and following its redirects) to the headers of the answer.
ANSWER_TIMEOUT: Final = 120.0

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_TRY_AGAIN: Final = frozenset({408, 425, 429})
_MAX_DELAY: Final = 24 * 3600.0
_ENCODED: Final = re.compile(r"""(?:[^%\x00-\x20\x7f-\U0010ffff"<>\\^`{|}]|%[0-9A-Fa-f]{2})*""")

#: What a body that breaks off raises; caught here and by whoever reads bodies, nowhere else.
BROKEN: Final = (aiohttp.ClientError, OSError, asyncio.TimeoutError)

#: No real errno: marks our own refusal after happy eyeballs has merged the errors of several addresses, which
#: keeps the number where all of them have the same and nothing else.
_REFUSED: Final = -4096


def redact(url: str | URL) -> str:
    """`url` fit for a message: without query, fragment, user and password, and printable."""
    text = str(url)
    try:
        parsed = _split(text)
        bare = parsed.with_user(None).with_query(None).with_fragment(None)
    except ValueError:
        return ascii(text.partition("?")[0].rpartition("@")[2])
    return _printable(str(bare)) + ("?..." if parsed.raw_query_string else "")


def parse(url: str, base: URL | None = None) -> URL:
    """`url` as a request will be made to it (relative to `base`); what is encoded already is left as it is,
    because a presigned URL's signature covers the encoding.

    Raises:
        ValueError: it is no http(s) URL with a host.
    """
    parsed = _split(url, encoded=_ENCODED.fullmatch(url) is not None)
    if base is not None:
        parsed = base.join(parsed)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("not an http or https URL with a host")
    if not 0 < (parsed.port or 0) < 65536:
        raise ValueError("not a port")
    return parsed


def _split(url: str, *, encoded: bool = False) -> URL:
    try:
        return URL(url, encoded=encoded)
    except IndexError:  # what yarl 1.25 makes of //[::1]:80@/
        raise ValueError("no host behind the user") from None


def open_session(*, allow_private_hosts: bool) -> aiohttp.ClientSession:
    """A session that neither decodes, redirects, keeps cookies nor reads proxies from the environment."""

    def guarded(info: tuple[Any, ...]) -> socket.socket:
        family, kind, proto, _, address = info
        reason = "" if allow_private_hosts else refused(address[0])
        if reason:
            raise OSError(_REFUSED, f"address {address[0]} is {reason}")
        return socket.socket(family=family, type=kind, proto=proto)

    return aiohttp.ClientSession(
        # Concurrency is a stage's policy: a limit here would be a queue in which time-outs run.
        connector=aiohttp.TCPConnector(limit=0, socket_factory=guarded),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=READ_BUFFER,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT),
        trust_env=False,
    )


async def ask(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    *,
    own: Mapping[str, str],
    headers: Mapping[str, str] | None,
) -> aiohttp.ClientResponse:
    """The answer to `method` on `url` after redirects, its body unread; the caller closes it.

    `own` headers go to every hop; the user's `headers` only as far as the origin stays the same, for any of
    them may be a credential.

    Raises:
        ConfigError: the URL or a header cannot be sent.
        Permanent: an address or a redirect is refused or cannot be followed, or the server's certificate is
            refused.
        Retryable: no answer, or none that is HTTP.
    """
    try:
        target = parse(url)
    except ValueError as error:
        raise ConfigError(f"bad URL {redact(url)}: {error}") from None
    always = {"Accept-Encoding": "identity", "User-Agent": "flowlane"}
    sent = CIMultiDict(always)
    sent.update(headers or {})
    sent.update(own)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            for hops in range(MAX_HOPS + 1):
                response = await _send(session, method, target, sent, redirected=hops > 0)
                if response.status not in _REDIRECTS or "Location" not in response.headers:
                    return response
                response.close()
                hop = _hop(target, response.headers["Location"])
                if hop.origin() != target.origin():
                    sent = CIMultiDict(always | dict(own))
                target = hop
    except TimeoutError:
        raise Retryable(f"{method} {redact(url)}: no answer within {ANSWER_TIMEOUT:.0f} s") from None
    raise Retryable(f"{method} {redact(url)}: more than {MAX_HOPS} redirects")


def _hop(current: URL, location: str) -> URL:
    try:
        target = parse(location, current)
    except ValueError as error:
        raise Permanent(f"{redact(current)} redirects to {redact(location)}: {error}") from None
    if current.scheme == "https" and target.scheme == "http":
        raise Permanent(f"{redact(current)} redirects from https to {redact(target)}: refused")
    if target.raw_user is None and target.origin() == current.origin():
        # A Location that spells out the origin names no user; that is no reason to forget ours.
        target = target.with_user(current.user).with_password(current.password) if current.user else target
    return target


async def _send(
    session: aiohttp.ClientSession, method: str, url: URL, headers: Mapping[str, str], *, redirected: bool
) -> aiohttp.ClientResponse:
    try:
        return await session.request(method, url, headers=headers, allow_redirects=False)
    except ssl.SSLCertVerificationError as error:  # a ValueError, too
        no_answer(method, url, error)
    except ValueError as error:  # includes InvalidURL; of a header, aiohttp says only that it is unsafe
        # Only the first URL is the user's; what a server redirects to condemns that one object.
        kind = Permanent if redirected else ConfigError
        raise kind(f"{method} {redact(url)} cannot be sent: {type(error).__name__}") from None
    except BROKEN as error:
        no_answer(method, url, error)


def no_answer(method: str, url: str | URL, error: BaseException) -> NoReturn:
    """Raise `error`, which kept an answer from arriving, as one of ours."""
    where = f"{method} {redact(url)}"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno == _REFUSED:
        why = f"host {error.host}: {error.os_error.strerror}"
        raise Permanent(f"{where}: {why}: set FLOWLANE_ALLOW_PRIVATE_HOSTS=1 to allow") from None
    if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLCertVerificationError):
        why = one_line(getattr(error, "certificate_error", error))
        raise Permanent(
            f"{where}: the server's certificate is refused: {why}: to trust an authority of your own, name "
            "its certificates in SSL_CERT_FILE"
        ) from None
    if isinstance(error, aiohttp.ClientResponseError):
        raise Retryable(f"{where}: the answer is not HTTP: {one_line(error.message)}") from None
    if isinstance(error, TimeoutError):
        raise Retryable(f"{where}: no answer in time") from None
    raise Retryable(f"{where}: no connection: {one_line(error)}") from None


def one_line(error: object) -> str:
    """The first 200 characters of `error`, printable and on one line; what a server sent may be in it."""
    return _printable((" ".join(str(error).split()) or type(error).__name__)[:200])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def check(method: str, url: str, response: aiohttp.ClientResponse, clock: Clock) -> None:
    """Raise what a status of neither success nor absence means.

    Raises:
        Retryable: 5xx, 408, 425, 429; its ``delay`` is what Retry-After asks for.
        Permanent: any other status; the server will say the same again.
    """
    status = response.status
    if 200 <= status < 300:
        return
    where = f"{method} {redact(url)}: status {status}"
    if status >= 500 or status in _TRY_AGAIN:
        raise Retryable(where, delay=retry_after(response.headers.get("Retry-After", ""), clock.now()))
    hint = ": check the credentials in its headers or query" if status in (401, 403, 407) else ""
    raise Permanent(where + hint)


def retry_after(value: str, now: datetime) -> float | None:
    """The seconds that a Retry-After asks for (RFC 9110, section 10.2.3): a number, or until a date."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), _MAX_DELAY)
    try:
        until = parsedate_to_datetime(value)
    except (ValueError, IndexError, OverflowError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return min(max((until - now).total_seconds(), 0.0), _MAX_DELAY)


def refuse_encoding(url: str, response: aiohttp.ClientResponse) -> None:
    """Refuse a body that is encoded in spite of ``Accept-Encoding: identity``, for its bytes are not the
    object's. Many servers label a ``.gz`` file by its own encoding: there they are (see ``Wrapping``).

    Raises:
        Incomplete: the body is encoded and the URL does not say so.
    """
    for token in response.headers.get("Transfer-Encoding", "").lower().split(","):
        if token.strip() not in ("", "identity", "chunked"):
            raise Incomplete(
                f"GET {redact(url)}: the body is sent as {one_line(token)}, which was not asked for"
            )
    for encoding in encodings(response):
        suffix = {"gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst"}.get(encoding, "?")
        if url.partition("?")[0].lower().endswith(suffix):
            continue
        raise Incomplete(
            f"GET {redact(url)}: the body is encoded as {one_line(encoding)} although identity was asked for"
        )


def encodings(response: aiohttp.ClientResponse) -> list[str]:
    """The codings that the body is said to be in, in the order they were applied."""
    said = (token.strip() for token in response.headers.get("Content-Encoding", "").lower().split(","))
    return [coding for coding in said if coding not in ("", "identity", "aws-chunked")]


class Wrapping:
    """Looks whether a ``.gz`` (``.zst``) body that is labelled as encoded was encoded a second time on its
    way, which no proof of the body itself would notice: the object is then inside of what came."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._decoder: Decoder | None = decoder(url)
        self._head = b""

    def check(self, block: bytes) -> None:
        """The body goes on with `block`.

        Raises:
            Damaged: what it decodes to is of the kind that its name promises of itself.
        """
        if self._decoder is None:
            return
        try:
            for piece in self._decoder.feed(block):
                self._head += piece[:4]
                if len(self._head) >= 4:
                    break
            else:
                return
        except Damaged:
            pass  # to be found out, and said, by whoever proves it
        self._decoder = None
        if self._head.startswith((b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd")):
            raise Damaged(
                f"GET {redact(self._url)}: the server has compressed what was compressed already, although "
                "identity was asked for"
            )
