"""Serves one piece of a file any number of times over as one body: a process of its own, by sendfile.

``python -m benchmarks.server PIECE COUNT`` prints its port, and serves until it is killed: HEAD and GET of
any path, with a length and a strong ETag. A thread for each connection; sendfile needs little of a core.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import python


@contextmanager
def serving(piece: Path, count: int) -> Iterator[str]:
    """The base URL of a running server."""
    command = python("server", piece, count)
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def serve(piece: Path, count: int) -> None:
    """Accept connections for ever."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_talk, args=(connection, piece, count), daemon=True).start()


def _talk(connection: socket.socket, piece: Path, count: int) -> None:
    size = piece.stat().st_size
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Length: {size * count}\r\nContent-Type: application/gzip\r\n"
        f'ETag: "bench-{size}-{count}"\r\n\r\n'
    ).encode()
    try:
        with connection, connection.makefile("rb") as requests, piece.open("rb") as file:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := requests.readline():
                while requests.readline().strip():
                    pass
                connection.sendall(head)
                if request.startswith(b"GET"):
                    for _ in range(count):
                        _send(connection, file.fileno(), size)
    except ConnectionError:
        return  # the client has gone


def _send(connection: socket.socket, file: int, size: int) -> None:
    sent = 0
    while sent < size:
        sent += os.sendfile(connection.fileno(), file, sent, size - sent)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
