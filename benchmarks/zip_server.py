"""Serves an archive made of parts, each any number of times: ranges by sendfile, a process of its own.

``python -m benchmarks.zip_server PATH COUNT [PATH COUNT ...]`` prints its port, and serves until killed.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from benchmarks.responder import started
from benchmarks.zips import Layout

_RANGE = re.compile(rb"(?i)range: *bytes=(\d*)-(\d*)")


@contextmanager
def serving(layout: Layout) -> Iterator[str]:
    """The URL of the archive on a running server."""
    with started("zip_server", *chain.from_iterable(layout)) as endpoint:
        yield f"{endpoint}/archive.zip"


class Parts:
    """The archive: where each repetition of each part begins."""

    def __init__(self, layout: Layout) -> None:
        self.pieces: list[
            tuple[int, int, Path]
        ] = []  # begin, length of one, path; one for each run of a part
        self.size = 0
        for path, count in layout:
            length = path.stat().st_size
            self.pieces.append((self.size, length, path))
            self.size += length * count
        self._ends = [begin for begin, _, _ in self.pieces[1:]] + [self.size]
        self._files = {path: path.open("rb") for _, _, path in self.pieces}

    def send(self, connection: socket.socket, first: int, stop: int) -> None:
        """The bytes [first, stop)."""
        for (begin, length, path), end in zip(self.pieces, self._ends, strict=True):
            while max(first, begin) < min(stop, end):
                inside = (first - begin) % length
                count = min(length - inside, min(stop, end) - first)
                first += os.sendfile(connection.fileno(), self._files[path].fileno(), inside, count)


def serve(layout: Layout) -> None:
    """Accept connections for ever."""
    parts = Parts(layout)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_talk, args=(connection, parts), daemon=True).start()


def _talk(connection: socket.socket, parts: Parts) -> None:
    try:
        with connection, connection.makefile("rb") as requests:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := requests.readline():
                first, stop, partial = 0, parts.size, False
                while line := requests.readline().strip():
                    if wanted := _RANGE.fullmatch(line):
                        partial, first = True, int(wanted[1])
                        stop = min(int(wanted[2]) + 1, parts.size) if wanted[2] else parts.size
                said = f"Content-Range: bytes {first}-{stop - 1}/{parts.size}\r\n" if partial else ""
                status = "206 Partial Content" if partial else "200 OK"
                connection.sendall(
                    f"HTTP/1.1 {status}\r\nContent-Length: {stop - first}\r\n{said}"
                    f'Accept-Ranges: bytes\r\nETag: "zip-{parts.size}"\r\n\r\n'.encode()
                )
                if request.startswith(b"GET"):
                    parts.send(connection, first, stop)
    except ConnectionError:
        return  # the client has gone


if __name__ == "__main__":
    told = sys.argv[1:]
    serve([(Path(path), int(count)) for path, count in zip(told[::2], told[1::2], strict=True)])
