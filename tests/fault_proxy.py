"""A proxy on loopback that stands between the SDK and a stand-in for AWS, and does to chosen calls what
networks and services do.

::

    async with FaultProxy(endpoint) as proxy:
        lost = proxy.inject("s3.CompleteMultipartUpload", lost_reply())  # applied, and nobody is told
        busy = proxy.inject("dynamodb.PutItem", throttled(), nth=2, times=3)
        torn = proxy.inject("s3.GetObject", cut(1000), where="bytes=0-")
        ...  # the SDK's endpoint is proxy.url
        assert (lost.fired, busy.fired, torn.fired) == (1, 3, 1)

A fault is any ``async def (exchange) -> bool``: it forwards the request or not, answers or not, and says
whether the client's connection stays open. Bodies are held whole: stand-ins' are small. Written on bare
streams, because no HTTP library agrees to break off in the middle.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from tests.aws_wire import Answer, Request, error_answer, head, read_answer, read_request, throttle_answer

#: Between the proxy and one side only, or set anew by it (RFC 9110, 7.6.1).
_OWN: Final = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
#: Seconds for which a connection to the server is used again: servers close theirs after 5 s and more.
_FRESH: Final = 1.0


class Upstream:
    """Connections to the server; an answer that came whole leaves its own for the next request."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._kept: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that the caller closes, or gives back."""
        oldest = asyncio.get_running_loop().time() - _FRESH
        while self._kept:
            since, reader, writer = self._kept.pop()
            if since > oldest and not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address)

    def give_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Nothing is under way on it, and the server keeps it open."""
        self._kept.append((asyncio.get_running_loop().time(), reader, writer))

    def close(self) -> None:
        """None is kept any more."""
        for _, _, writer in self._kept:
            writer.close()
        self._kept.clear()


class Exchange:
    """One request, and what may be done about it."""

    def __init__(
        self,
        request: Request,
        upstream: Upstream,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.request = request
        self._upstream = upstream
        self._reader, self._writer = reader, writer

    async def forward(self, *, stop: int | None = None) -> Answer:
        """The server's answer; with the request's body ending before byte `stop`, whatever it had promised.

        Raises:
            IncompleteReadError, ConnectionError: the server does not answer that.
        """
        request = self.request
        headers = {"content-length": str(len(request.body))}
        headers |= {name: value for name, value in request.headers.items() if name not in _OWN}
        reader, writer = await self._upstream.take()
        stays_open = False
        try:
            writer.write(head(f"{request.method} {request.target} HTTP/1.1", headers))
            writer.write(request.body[:stop])
            await writer.drain()
            if stop is not None:
                writer.write_eof()
            answer = await read_answer(reader, request.method)
            stays_open = stop is None and answer.headers.get("connection", "").lower() != "close"
            return answer
        finally:
            if stays_open:
                self._upstream.give_back(reader, writer)
            else:
                writer.close()

    async def answer(self, answer: Answer, *, cut: int | None = None) -> bool:
        """The client gets `answer`; with `cut`, its body breaks off before that byte (counted from the end
        where negative), and so does the connection."""
        bodiless = self.request.method == "HEAD"
        headers = {name: value for name, value in answer.headers.items() if name not in _OWN}
        headers["content-length"] = str(len(answer.body))
        if bodiless:  # of the body that a GET would get
            headers["content-length"] = answer.headers.get("content-length", "0")
        self._writer.write(head(f"HTTP/1.1 {answer.status} Passed", headers))
        if not bodiless:
            self._writer.write(answer.body[:cut])
        await self._writer.drain()
        return cut is None

    def reset(self) -> bool:
        """The client's connection is reset."""
        # Closing with a linger time of zero sends RST instead of FIN: socket(7), SO_LINGER.
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()
        return False

    async def hang(self) -> bool:
        """Nothing (more) comes, until the client gives up."""
        await self._reader.read()
        return False


Fault = Callable[[Exchange], Awaitable[bool]]


class Rule:
    """One injected fault: which calls it meets, how many of them it has ``seen``, how often it ``fired``."""

    def __init__(self, call: str, fault: Fault, where: str, nth: int, times: int) -> None:
        self.fault = fault
        self.seen = self.fired = 0
        self._call, self._where, self._nth, self._times = call, re.compile(where), nth, times

    def takes(self, request: Request) -> bool:
        """Whether `request` is to meet the fault; counts it."""
        if self._call not in ("", request.call) or not self._where.search(request.text):
            return False
        self.seen += 1
        meant = self._nth <= self.seen and (self._times < 0 or self.fired < self._times)
        self.fired += meant
        return meant


class FaultProxy:
    """See the module. ``calls`` counts what arrived, by ``Request.call``."""

    def __init__(self, endpoint: str) -> None:
        url = urlsplit(endpoint)
        assert url.hostname is not None
        assert url.port is not None
        self.calls: Counter[str] = Counter()
        self.url = ""
        self._upstream = Upstream(url.hostname, url.port)
        self._rules: list[Rule] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def inject(self, call: str, fault: Fault, *, where: str = "", nth: int = 1, times: int = 1) -> Rule:
        """From the `nth` `call` on (``service.Operation``; empty: any) with the pattern `where` in its
        ``Request.text``, `times` of them meet `fault` (-1: all). Of several rules, the first one counts."""
        rule = Rule(call, fault, where, nth, times)
        self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """No fault any more, and nothing counted."""
        self._rules.clear()
        self.calls.clear()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._upstream.close()
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer):
                    pass
        except asyncio.CancelledError:
            pass  # the proxy is being closed; asyncio.streams would log this
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = await read_request(reader, writer)
        self.calls[request.call] += 1
        exchange = Exchange(request, self._upstream, reader, writer)
        rule = next((rule for rule in self._rules if rule.takes(request)), None)
        return await (passed if rule is None else rule.fault)(exchange)


# ---------------------------------------------------------------------------------------------- faults


async def passed(exchange: Exchange) -> bool:
    """No fault."""
    return await exchange.answer(await exchange.forward())


def slow(seconds: float) -> Fault:
    """The answer takes `seconds` longer."""

    async def fault(exchange: Exchange) -> bool:
        answer = await exchange.forward()
        await asyncio.sleep(seconds)
        return await exchange.answer(answer)

    return fault


def cut(at: int, *, reset: bool = False) -> Fault:
    """The answer's body ends before byte `at` (counted from the end where negative) with the connection,
    which is closed, or `reset`."""

    async def fault(exchange: Exchange) -> bool:
        stays_open = await exchange.answer(await exchange.forward(), cut=at)
        return exchange.reset() if reset else stays_open

    return fault


def stalled(at: int) -> Fault:
    """The answer's body comes up to byte `at`, and then nothing more: the connection stays open."""

    async def fault(exchange: Exchange) -> bool:
        await exchange.answer(await exchange.forward(), cut=at)
        return await exchange.hang()

    return fault


def lost_request() -> Fault:
    """The connection is reset before the server has seen the request."""

    async def fault(exchange: Exchange) -> bool:
        return exchange.reset()

    return fault


def lost_reply() -> Fault:
    """The connection is reset when the server has answered: applied, and the client does not know."""

    async def fault(exchange: Exchange) -> bool:
        await exchange.forward()
        return exchange.reset()

    return fault


def truncated(at: int) -> Fault:
    """The connection breaks while the client sends: the server gets the body's first `at` bytes."""

    async def fault(exchange: Exchange) -> bool:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await exchange.forward(stop=at)
        return exchange.reset()

    return fault


def hanging(*, applied: bool = False) -> Fault:
    """No answer ever comes; the request is `applied` all the same, or was never seen."""

    async def fault(exchange: Exchange) -> bool:
        if applied:
            await exchange.forward()
        return await exchange.hang()

    return fault


def refused(status: int, code: str, message: str = "injected") -> Fault:
    """The server answers with the error `code`, in the form of its protocol, and does nothing."""

    async def fault(exchange: Exchange) -> bool:
        return await exchange.answer(error_answer(exchange.request, status, code, message))

    return fault


def throttled() -> Fault:
    """The service says that it is asked too often, in its own words."""

    async def fault(exchange: Exchange) -> bool:
        return await exchange.answer(throttle_answer(exchange.request))

    return fault


def changed(change: Callable[[Answer], None]) -> Fault:
    """The server's answer comes as `change` has made it."""

    async def fault(exchange: Exchange) -> bool:
        answer = await exchange.forward()
        change(answer)
        return await exchange.answer(answer)

    return fault


def another_etag(answer: Answer) -> None:
    """For ``changed``: the object has been replaced, and the server does not mind ``If-Match``."""
    answer.headers["etag"] = '"00000000000000000000000000000000"'


def ignored_range() -> Fault:
    """200 with the whole object, whatever range was asked for."""

    async def fault(exchange: Exchange) -> bool:
        exchange.request.headers.pop("range", None)
        return await exchange.answer(await exchange.forward())

    return fault
