"""Servers of the benchmarks: each a process that prints its port; and AWS JSON over HTTP for some of them.

What is measured against a responder is who asks: so it speaks as little of HTTP/1.1 as the SDK's requests
need (POST, one at a time on a connection, with a Content-Length), and none of its own.
"""

from __future__ import annotations

import asyncio
import subprocess
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import ROOT, python

#: The body of the answer to an operation (``ReceiveMessage``, without what it is prefixed with) and its body.
Answer = Callable[[str, bytes], bytes | Awaitable[bytes]]


@contextmanager
def started(module: str, *arguments: object) -> Iterator[str]:
    """The endpoint of a module of this package that prints its port, and serves until it is killed."""
    with subprocess.Popen(python(module, *arguments), cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


async def serve(
    answer: Answer, *, crc: bool = False, port: Callable[[int], None] = lambda port: None
) -> None:
    """Serve for ever: ``X-Amz-Target`` names the operation; `crc`: answers have a CRC-32, as DynamoDB's.
    `port` is told before the port is printed."""
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(answer, crc), "127.0.0.1", 0)
    number: int = server.sockets[0].getsockname()[1]
    port(number)
    print(number, flush=True)
    await server.serve_forever()


class _Connection(asyncio.Protocol):
    def __init__(self, answer: Answer, crc: bool) -> None:
        self._answer = answer
        self._crc = crc
        self._parts: list[bytes] = []
        self._missing = 0
        self._task: asyncio.Task[None] | None = None  # held, or it may be collected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._missing -= len(data)
        if self._missing > 0:
            return
        request = b"".join(self._parts)
        self._parts = [request]
        head, found, body = request.partition(b"\r\n\r\n")
        if not found:
            return
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        self._missing = int(fields[b"content-length"]) - len(body)
        if self._missing > 0:
            if b"expect" in fields:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        self._parts = []
        told = self._answer(fields[b"x-amz-target"].decode().rpartition(".")[2], body)
        if isinstance(told, bytes):
            self._tell(told)
        else:
            self._task = asyncio.ensure_future(self._later(told))

    async def _later(self, told: Awaitable[bytes]) -> None:
        self._tell(await told)

    def _tell(self, told: bytes) -> None:
        crc = b"x-amz-crc32: %d\r\n" % zlib.crc32(told) if self._crc else b""
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\nx-amzn-RequestId: 0\r\n"
            b"%bContent-Length: %d\r\n\r\n%b" % (crc, len(told), told)
        )
