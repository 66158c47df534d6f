"""A responder for the part of S3 that a copy needs, which keeps digests instead of bytes.

``python -m benchmarks.s3_server SIZE RATE`` prints its port, and serves until it is killed. ``GET
/source/...`` with or without a range generates an object of SIZE bytes, which differ from MiB to MiB, at
RATE bytes a second; uploads and puts to any other key are digested and forgotten. What must be right is
checked: the CRC-32 of every part, its ETag when it is named, the numbers of parts, that only the last is
under 5 MiB, If-None-Match. ``GET /digest/BUCKET/KEY`` answers with what arrived: one SHA-256 for each part,
and that of the same range of the source beside it.

A thread for each connection; hashing gives up the interpreter's lock, so that it uses the cores there are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, unquote

from benchmarks.harness import python

_MIB = 1 << 20
_SMALLEST = 5 << 20
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_PART = re.compile(rb"<Part>(.*?)</Part>", re.DOTALL)
_NUMBER = re.compile(rb"<PartNumber>(\d+)</PartNumber>")
_ETAG = re.compile(rb"<ETag>(?:&quot;|\")?([0-9a-f]+)")
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n'


@contextmanager
def serving(size: int, rate: float) -> Iterator[str]:
    """The endpoint of a running responder."""
    command = python("s3_server", size, rate)
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


class Source:
    """An object that is made when it is read: each MiB is a slice of one noise, and numbered."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.etag = f'"source-{size}"'
        self._noise = hashlib.shake_128(b"stores").digest(3 * _MIB)

    def blocks(self, first: int, stop: int) -> Iterator[memoryview]:
        """The bytes [first, stop), by the MiB."""
        while first < stop:
            number, inside = divmod(first, _MIB)
            block = memoryview(number.to_bytes(8, "big") + self._noise[number * 7919 % _MIB :][: _MIB - 8])
            piece = block[inside : inside + stop - first]
            first += len(piece)
            yield piece

    def digest(self, first: int, stop: int) -> str:
        """The SHA-256 of the bytes [first, stop)."""
        hashed = hashlib.sha256()
        for block in self.blocks(first, stop):
            hashed.update(block)
        return hashed.hexdigest()


@dataclass
class Part:
    """What is left of a part."""

    size: int
    sha: str
    crc: str

    @property
    def etag(self) -> str:
        """As S3's: 32 hexadecimal digits."""
        return self.sha[:32]


@dataclass
class State:
    """What was uploaded, and what is being uploaded."""

    source: Source
    rate: float
    objects: dict[str, list[Part]] = field(default_factory=dict)
    uploads: dict[str, dict[int, Part]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Request:
    """One request; its body is read by whoever answers it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


class Answer(Exception):
    """Ends a request."""

    def __init__(self, status: int, body: str = "", **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.body = body.encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def refused(status: int, code: str) -> Answer:
    """An error as S3 words it."""
    return Answer(status, f"{_XML}<Error><Code>{code}</Code><Message>{code}</Message></Error>")


class Talk:
    """One connection."""

    def __init__(self, connection: socket.socket, state: State) -> None:
        self._connection = connection
        self._state = state
        self._buffer = bytearray(_MIB)

    def run(self) -> None:
        """Answer until the client goes."""
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with self._connection, self._connection.makefile("rb") as stream:
                while line := stream.readline():
                    self._one(line.decode("latin-1"), stream)
        except OSError:
            return

    def _one(self, line: str, stream: BinaryIO) -> None:
        method, target, _ = line.split(" ", 2)
        headers: dict[str, str] = {}
        while (header := stream.readline().strip()) != b"":
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        path, _, query = target.partition("?")
        asked = {k: v[0] for k, v in parse_qs(query, keep_blank_values=True).items()}
        if headers.get("expect", "").lower() == "100-continue":
            self._connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        request = Request(method, unquote(path), asked, headers)
        try:
            self._answer(request, stream)
        except Answer as answer:
            self._send(answer, with_body=method != "HEAD")

    def _send(self, answer: Answer, *, with_body: bool) -> None:
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        lines = [f"HTTP/1.1 {answer.status} Said", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        self._connection.sendall("\r\n".join(lines).encode() + (answer.body if with_body else b""))

    def _answer(self, request: Request, stream: BinaryIO) -> None:
        if request.method in ("GET", "HEAD") and request.path.startswith("/source/"):
            self._give(request)
            return
        if request.path.startswith("/digest/"):
            raise Answer(200, self._digests(request.path.removeprefix("/digest")))
        if "uploadId" in request.query or "uploads" in request.query:
            raise self._multipart(request, stream)
        if request.method == "PUT":
            part = self._digested(request, stream)
            raise self._show(request, [part])
        raise self._described(request)

    def _give(self, request: Request) -> None:
        source = self._state.source
        if request.headers.get("if-match", source.etag) != source.etag:
            raise refused(412, "PreconditionFailed")
        first, stop = 0, source.size
        if match := _RANGE.fullmatch(request.headers.get("range", "")):
            first, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else source.size, source.size)
            if first >= stop:
                raise refused(416, "InvalidRange")
        lines = [
            f"HTTP/1.1 {206 if match else 200} Said",
            f"Content-Length: {stop - first}",
            f"ETag: {source.etag}",
            "Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT",
            *([f"Content-Range: bytes {first}-{stop - 1}/{source.size}"] if match else []),
        ]
        self._connection.sendall("\r\n".join([*lines, "", ""]).encode())
        if request.method == "GET":
            began, sent = time.monotonic(), 0
            for block in source.blocks(first, stop):
                time.sleep(max(0.0, began + sent / self._state.rate - time.monotonic()))
                self._connection.sendall(block)
                sent += len(block)

    def _multipart(self, request: Request, stream: BinaryIO) -> Answer:
        state = self._state
        if "uploads" in request.query:
            upload = secrets.token_hex(8)
            state.uploads[upload] = {}
            return Answer(200, f"{_XML}<R><UploadId>{upload}</UploadId></R>")
        upload = request.query["uploadId"]
        parts = state.uploads.get(upload)
        if request.method == "PUT":
            part = self._digested(request, stream)
            if parts is None:
                return refused(404, "NoSuchUpload")
            parts[int(request.query["partNumber"])] = part
            return Answer(200, ETag=f'"{part.etag}"')
        body = stream.read(int(request.headers.get("content-length", "0")))
        if parts is None:
            return refused(404, "NoSuchUpload")
        if request.method == "DELETE":
            del state.uploads[upload]
            return Answer(204)
        return self._listed(request, parts) if request.method == "GET" else self._complete(request, body)

    def _listed(self, request: Request, parts: dict[int, Part]) -> Answer:
        after, most = (
            int(request.query.get("part-number-marker", 0)),
            int(request.query.get("max-parts", 1000)),
        )
        numbers = sorted(number for number in parts if number > after)
        some = numbers[:most]
        listed = "".join(
            f"<Part><PartNumber>{n}</PartNumber><Size>{parts[n].size}</Size><ETag>{parts[n].etag}</ETag>"
            f"<ChecksumCRC32>{parts[n].crc}</ChecksumCRC32></Part>"
            for n in some
        )
        more = str(len(numbers) > len(some)).lower()
        return Answer(200, f"{_XML}<R><IsTruncated>{more}</IsTruncated>{listed}</R>")

    def _complete(self, request: Request, body: bytes) -> Answer:
        parts = self._state.uploads[request.query["uploadId"]]
        named: list[Part] = []
        for text in _PART.findall(body):
            number, etag = _NUMBER.search(text), _ETAG.search(text)
            part = parts.get(int(number[1])) if number else None
            if part is None or etag is None or etag[1].decode() != part.etag:
                return refused(400, "InvalidPart")
            if int(number[1] if number else 0) != len(named) + 1:
                return refused(400, "InvalidPartOrder")  # as S3 does where parts carry checksums
            named.append(part)
        if any(part.size < _SMALLEST for part in named[:-1]):
            return refused(400, "EntityTooSmall")
        answer = self._show(request, named)
        if answer.status == 200:
            del self._state.uploads[request.query["uploadId"]]
        return answer

    def _show(self, request: Request, parts: list[Part]) -> Answer:
        with self._state.lock:
            if "if-none-match" in request.headers and request.path in self._state.objects:
                return refused(412, "PreconditionFailed")
            self._state.objects[request.path] = parts
        etag = f'"{parts[0].etag}-{len(parts)}"'
        return Answer(200, f"{_XML}<R><ETag>{etag}</ETag></R>", ETag=etag)

    def _described(self, request: Request) -> Answer:
        parts = self._state.objects.get(request.path)
        if parts is None:
            return refused(404, "NoSuchKey")
        size = sum(part.size for part in parts)
        if request.method != "HEAD":
            return refused(501, "NotImplemented")
        return Answer(
            200,
            ETag=f'"{parts[0].etag}-{len(parts)}"',
            Content_Length=str(size),
            Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT",
        )

    def _digested(self, request: Request, stream: BinaryIO) -> Part:
        left = size = int(request.headers["content-length"])
        hashed, crc = hashlib.sha256(), 0
        view = memoryview(self._buffer)
        while left:
            count = stream.readinto(view[: min(left, _MIB)])  # type: ignore[attr-defined]  # a BufferedReader
            if not count:
                raise ConnectionError("cut")
            hashed.update(view[:count])
            crc = zlib.crc32(view[:count], crc)
            left -= count
        said = base64.b64encode(crc.to_bytes(4, "big")).decode()
        if request.headers.get("x-amz-checksum-crc32", said) != said:
            raise refused(400, "BadDigest")
        return Part(size, hashed.hexdigest(), said)

    def _digests(self, path: str) -> str:
        """What arrived, and what should have."""
        at, pairs = 0, []
        for part in self._state.objects.get(path, []):
            pairs.append((part.sha, self._state.source.digest(at, at + part.size)))
            at += part.size
        left = sum(len(parts) for parts in self._state.uploads.values())
        return json.dumps({"size": at, "parts": pairs, "left": left})


def serve(size: int, rate: float) -> None:
    """Accept connections for ever."""
    state = State(Source(size), rate)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=Talk(connection, state).run, daemon=True).start()


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]))
