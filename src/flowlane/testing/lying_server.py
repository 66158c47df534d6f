"""An HTTP server that lies as told, for the tests of whoever reads over HTTP: loopback only, any free port.

::

    async with LyingServer() as server:
        server.serve("/a.gz", data)  # honest: ETag, Range, If-Match, HEAD
        server.serve("/cut.gz", data, cut=1000, times=1)  # the first GET breaks off, the next one does not
        server.serve("/busy.gz", data, status=503, headers={"Retry-After": "7"}, times=2)
        ...  # read server.url("/cut.gz")
        assert [r.range for r in server.requests if r.method == "GET"] == ["", "bytes=1000-"]

A path that is not served is 404. Written on bare streams, because no HTTP library agrees to lie.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from types import TracebackType
from typing import Final, Literal, Self

import msgspec

_RANGE: Final = re.compile(r"bytes=(\d+)-(\d*)")
_PIECE: Final = 64 << 10


class Request(msgspec.Struct, frozen=True):
    """One request as it arrived; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def range(self) -> str:
        """The Range header; empty if there is none."""
        return self.headers.get("range", "")


class Lie(msgspec.Struct, frozen=True, kw_only=True):
    """How a path is answered. Without any of these, honestly.

    ``times``: only the first so many requests are lied to (HEAD counts where it is answered differently).
    """

    times: int = -1
    status: int = 200  #: not 200: an answer of that status with the body as it is, to every method
    headers: dict[str, str] = {}  #: sent besides (and instead of) the server's own
    redirect: str = ""  #: the Location of a 302
    head: int = 200  #: the status of HEAD
    etags: Sequence[str] = ()  #: the ETag of each GET in turn, the last one for good; "" for none
    deaf: bool = False  #: If-Match is ignored
    ranges: Literal["honest", "ignored", "shifted", "silent", "short"] = "honest"
    """``ignored``: 200 and everything; ``shifted``: 206 from one byte later, and saying so; ``silent``: 206
    without Content-Range; ``short``: 206 with less than was asked for, and saying so."""
    length: int | None = None  #: the Content-Length claimed; -1 for none, and the end of the connection
    chunked: bool = False  #: chunked instead of a Content-Length
    cut: int = -1  #: the connection is closed after so many bytes of the body
    reset: int = -1  #: ... is reset
    hang: int = -1  #: ... is left open, and nothing more comes; 0: not even the headers
    drip: float = 0.0  #: seconds before each piece (64 KiB) of the body
    raw: bytes = b""  #: sent instead of any answer, then the connection is closed


class LyingServer:
    """See the module. ``requests`` lists what arrived, ``connections`` counts who came."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self._paths: dict[str, tuple[bytes, Lie]] = {}
        self._told: dict[str, int] = {}
        self._gets: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = 0

    def serve(self, path: str, body: bytes, lie: Lie | None = None, /, **faults: object) -> str:
        """Answer `path` (which begins with a slash; queries are ignored) with `body`; returns its URL.

        Replaces what was said of the path before. `faults` are the fields of ``Lie``.
        """
        self._paths[path] = (body, lie or msgspec.convert(faults, Lie, strict=True))
        self._told[path] = self._gets[path] = 0
        return self.url(path)

    def remove(self, path: str) -> None:
        """`path` is 404 from now on."""
        self._paths.pop(path, None)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """The URL of `path`."""
        return f"http://{host}:{self._port}{path}"

    def gets(self, path: str) -> int:
        """How many GETs of `path` there were."""
        return sum(r.method == "GET" and r.path.partition("?")[0] == path for r in self.requests)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._answer(reader, writer):
                    pass
        except asyncio.CancelledError:
            pass  # the server is being closed; asyncio.streams would log this
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ", 2)
        fields = (line.partition(":") for line in head[1:] if line)
        request = Request(method, target, {name.lower(): value.strip() for name, _, value in fields})
        self.requests.append(request)
        path = target.partition("?")[0]
        if path not in self._paths:
            return await _send(writer, request.method, 404, {}, b"nothing here", Lie())
        body, lie = self._paths[path]
        if 0 <= lie.times <= self._told[path]:
            lie = Lie(etags=lie.etags)
        elif method == "HEAD" and not _concerns_head(lie):
            lie = Lie(etags=lie.etags, headers=lie.headers)
        else:
            self._told[path] += 1
        if lie.raw:
            writer.write(lie.raw)
            await writer.drain()
            return False
        if lie.hang == 0:
            await reader.read()
            return False
        return await self._object(reader, writer, request, body, lie)

    async def _object(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        request: Request,
        body: bytes,
        lie: Lie,
    ) -> bool:
        etag = self._etag(request, body, lie)
        headers = {"Accept-Ranges": "bytes"} | ({"ETag": etag} if etag else {})
        match = request.headers.get("if-match")
        if lie.redirect:
            return await _send(writer, request.method, 302, {"Location": lie.redirect}, b"", lie)
        if lie.status != 200:
            return await _send(writer, request.method, lie.status, headers, body, lie)
        if request.method == "HEAD" and lie.head != 200:
            return await _send(writer, request.method, lie.head, {}, b"", lie)
        if match and match != etag and not lie.deaf:
            return await _send(writer, request.method, 412, {}, b"", Lie())
        status, extra, part = _part(request.range, body, lie)
        open_ = await _send(writer, request.method, status, headers | extra, part, lie)
        if lie.hang >= 0 and request.method != "HEAD":
            await reader.read()
        return open_

    def _etag(self, request: Request, body: bytes, lie: Lie) -> str:
        path = request.path.partition("?")[0]
        if not lie.etags:
            return _digest(body)
        turn = min(self._gets[path], len(lie.etags) - 1)
        self._gets[path] += request.method == "GET"
        return lie.etags[turn]


@lru_cache(8)
def _digest(body: bytes) -> str:
    """The ETag of an honest server, which is asked for the same few bodies in many ranges."""
    return f'"{hashlib.sha256(body).hexdigest()[:16]}"'


def _concerns_head(lie: Lie) -> bool:
    return bool(lie.status != 200 or lie.head != 200 or lie.redirect or lie.raw or lie.hang == 0)


def _part(range_: str, body: bytes, lie: Lie) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and bytes of the answer to a Range header."""
    match = _RANGE.fullmatch(range_)
    if match is None or lie.ranges == "ignored":
        return 200, {}, body
    first = int(match[1]) + (lie.ranges == "shifted")
    stop = min(int(match[2]) + 1 if match[2] else len(body), len(body))
    if lie.ranges == "short":
        stop = first + (stop - first + 1) // 2
    if first >= stop:
        return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
    said = {} if lie.ranges == "silent" else {"Content-Range": f"bytes {first}-{stop - 1}/{len(body)}"}
    return 206, said, body[first:stop]


async def _send(
    writer: asyncio.StreamWriter,
    method: str,
    status: int,
    headers: dict[str, str],
    body: bytes,
    lie: Lie,
) -> bool:
    """Send one answer, as far as the lie lets it come; whether the connection stays open."""
    length = len(body) if lie.length is None else lie.length
    framing = {} if length < 0 or lie.chunked else {"Content-Length": str(length)}
    if lie.chunked:
        framing = {"Transfer-Encoding": "chunked"}
    lines = [
        f"HTTP/1.1 {status} Told",
        *(f"{k}: {v}" for k, v in (framing | headers | lie.headers).items()),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    if method == "HEAD":
        await writer.drain()
        return True
    limits = [mark for mark in (lie.cut, lie.reset, lie.hang) if mark >= 0]
    whole = not limits or min(limits) >= len(body)
    body = body[: min(limits, default=len(body))]
    for at in range(0, len(body), _PIECE):
        if lie.drip:
            await asyncio.sleep(lie.drip)
        piece = body[at : at + _PIECE]
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if lie.chunked else piece)
        await writer.drain()
    if lie.chunked and whole:
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    if lie.reset >= 0:
        _reset(writer)
    return whole and not limits and length == len(body)


def _reset(writer: asyncio.StreamWriter) -> None:
    # Closing with a linger time of zero sends RST instead of FIN: socket(7), SO_LINGER.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
