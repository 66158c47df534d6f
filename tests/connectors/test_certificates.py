"""``https://``: whom a reader believes to be who the URL names."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from flowlane.clock import SystemClock
from flowlane.connectors import http
from flowlane.errors import Permanent
from flowlane.ports import Connections, Environment

#: Prints the size of what is under the URL; with certificates as the environment says, read when it starts.
ASK = """
import asyncio, sys
from flowlane.clock import SystemClock
from flowlane.connectors import http
from flowlane.ports import Environment

async def ask():
    environment = Environment(SystemClock(), None, allow_private_hosts=True)
    async with http.open_store("https://", environment) as store:
        print((await store.head(sys.argv[1])).size)

asyncio.run(ask())
"""
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of ``localhost``, signed by itself; its key is beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make certificates with")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    named = "-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout key.pem -out certificate.pem"
    subprocess.run([*command.split(), *named.split()], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "certificate.pem"


@asynccontextmanager
async def served(certificate: Path) -> AsyncIterator[int]:
    """The port where every HEAD is answered, behind `certificate`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        await writer.drain()
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def opened() -> AsyncIterator[http.HttpStore]:
    environment = Environment(SystemClock(), cast(Connections, None), allow_private_hosts=True)
    async with http.open_store("https://", environment) as store:
        yield store


async def test_a_certificate_that_nobody_vouches_for_is_refused_with_its_reason(certificate: Path) -> None:
    async with served(certificate) as port, opened() as store:
        with pytest.raises(Permanent, match=r"certificate is refused: .*self-signed.*SSL_CERT_FILE"):
            await store.head(f"https://localhost:{port}/a?token=secret")


async def test_who_is_named_in_the_environment_vouches_for_others(certificate: Path) -> None:
    async with served(certificate) as port:
        for host, said in (("localhost", b"4\n"), ("127.0.0.1", b"")):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", ASK, f"https://{host}:{port}/a"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "SSL_CERT_FILE": str(certificate)},
            )
            out, err = await process.communicate()
            assert (out, b"certificate is refused" in err) == (said, not said), err
