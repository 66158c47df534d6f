"""Who is taken for AWS: whoever shows a certificate that is trusted, and has that name."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from flowlane.errors import ConfigError, Retryable
from flowlane_aws.clients import asking, open_client
from tests import servers

ANSWER = b'{"QueueUrls":["https://seen/q"]}'


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other settings of TLS and proxies than the test's."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in servers.CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def localhost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """What a server shows that is ``localhost`` and nobody else, and the SDK is told to trust."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make certificates with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    named = "-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout key.pem -out certificate.pem"
    subprocess.run([*command.split(), *named.split()], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


@asynccontextmanager
async def listening(answer: Any, **settings: Any) -> AsyncIterator[int]:
    """The port where every connection is given to `answer`, up to its end."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]  # this runs in one
        with suppress(OSError, asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, **settings) as server:
        yield server.sockets[0].getsockname()[1]
    await asyncio.gather(*tasks)


async def as_sqs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An answer to one request."""
    await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(2)  # {}
    kind = b"content-type: application/x-amz-json-1.0\r\nconnection: close\r\n"
    writer.write(b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (kind, len(ANSWER), ANSWER))
    await writer.drain()


async def as_proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A tunnel to wherever the client wants."""

    async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
        sink.close()

    asked = (await reader.readuntil(b"\r\n\r\n")).split()
    assert asked[0] == b"CONNECT"
    upstream, sender = await asyncio.open_connection("127.0.0.1", int(asked[1].rpartition(b":")[2]))
    writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
    await asyncio.gather(pass_on(reader, sender), pass_on(upstream, writer))


async def queues(endpoint: str) -> list[str]:
    async with open_client("sqs", endpoint=endpoint, attempts=1) as sqs, asking("listing queues"):
        found = await sqs.list_queues()
        return list(found["QueueUrls"])


@pytest.mark.parametrize("behind", ["nothing", "proxy"])
async def test_a_certificate_is_good_for_its_name_only(
    localhost: ssl.SSLContext, behind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(as_sqs, ssl=localhost) as port, listening(as_proxy) as proxy:
        if behind == "proxy":
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy}")
        assert await queues(f"https://localhost:{port}") == ["https://seen/q"]
        with pytest.raises(Retryable, match=r"certificate is not valid for '127\.0\.0\.1'"):
            await queues(f"https://127.0.0.1:{port}")
        monkeypatch.delenv("AWS_CA_BUNDLE")
        with pytest.raises(Retryable, match=r"certificate verify failed: self-signed.*: AWS_CA_BUNDLE names"):
            await queues(f"https://localhost:{port}")


async def test_who_gives_credentials_has_a_name_too(
    localhost: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token with which a pod asks for credentials is worth as much as they are."""
    told: list[bytes] = []

    async def as_sts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.append(await reader.readuntil(b"\r\n\r\n"))

    (tmp_path / "token").write_text("secret")
    for name in servers.CREDENTIALS:
        if name != "AWS_REGION":
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pod")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    async with listening(as_sts, ssl=localhost) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"https://127.0.0.1:{port}")
        with pytest.raises(Retryable, match=r"certificate is not valid for '127\.0\.0\.1'"):
            await queues(f"https://localhost:{port}")
        assert told == []


async def test_an_empty_setting_trusts_nobody_more(
    localhost: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "")
    async with listening(as_sqs, ssl=localhost) as port:
        with pytest.raises(Retryable, match="certificate verify failed: self-signed"):
            await queues(f"https://localhost:{port}")


@pytest.mark.parametrize(("name", "why"), [("nowhere.pem", "No such file"), ("empty.pem", "no certificate")])
async def test_certificates_that_cannot_be_read_are_said(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.pem").touch()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / name))
    with pytest.raises(ConfigError, match=rf"{name}: the certificates .* cannot be read \(.*{why}.*AWS_CA_B"):
        await queues("https://localhost:1")


async def test_all_clients_share_what_they_trust(ministack: str) -> None:
    async with open_client("sqs") as sqs, open_client("sns") as sns:
        await sqs.list_queues()
        await sns.list_topics()
        one, other = (
            session.connector._ssl
            for client in (sqs, sns)
            for session in client._endpoint.http_session._sessions.values()
        )
    assert one is other
    assert (one.check_hostname, one.verify_mode) == (True, ssl.CERT_REQUIRED)
