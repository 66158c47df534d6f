"""Stand-ins for AWS, as processes on loopback, started by whoever needs them: tests, demo, benchmarks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
#: ``make setup`` puts them here: they want another botocore than aioboto3 does.
PROGRAMS = ROOT / ".venv-servers" / "bin"

#: And one for node there, where there is node.
KINESALITE = ROOT / ".venv-servers" / "node" / "node_modules" / "kinesalite"

#: What the SDK needs to talk to a stand-in: signatures are made, and not checked.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _reserved() -> Iterator[int]:
    """A port of 127.0.0.1 for a server that is about to start. While the context is open nobody is given it
    who asks for any, and one may listen on it: a server takes seconds to start on a busy machine, on which
    others open ports all the time."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = int(held.getsockname()[1])
        if sys.platform != "linux":
            held.close()  # elsewhere an address is not shared, even with one that does not listen
        yield port


def environment(endpoint: str) -> Mapping[str, str]:
    """What points the SDK at the stand-in at `endpoint`, and nowhere else."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}


@contextmanager
def server(kind: Literal["ministack", "moto", "kinesalite"], log: Path | None = None) -> Iterator[str]:
    """A new, empty stand-in, as its endpoint; killed with the context."""
    with _reserved() as port:
        yield from _serving(kind, port, log)


def _serving(kind: str, port: int, log: Path | None) -> Iterator[str]:
    endpoint = f"http://127.0.0.1:{port}"
    if kind == "kinesalite":
        # How long streams take to be made and shards to be split: half a second each otherwise.
        times = "{createStreamMs: 20, updateStreamMs: 20, deleteStreamMs: 20, shardLimit: 100}"
        script = f"require({str(KINESALITE)!r})({times}).listen({port}, '127.0.0.1')"
        command, ready = ["node", "-e", script], endpoint
    elif kind == "ministack":
        # Its application under another server than its own, which takes a third less CPU for a request: a
        # seventh of what all tests use went into those.
        command = [str(PROGRAMS / "uvicorn"), "ministack.app:app", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--http", "httptools", "--loop", "asyncio", "--ws", "none", "--timeout-keep-alive", "75"]
        command += ["--log-level", "error", "--no-access-log", "--no-server-header", "--no-date-header"]
        ready = f"{endpoint}/_ministack/health"
    else:
        command = [str(PROGRAMS / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
        ready = f"{endpoint}/moto-api/"
    # MiniStack's default is every interface, and its IoT broker knows no other.
    names = {
        "BIND_HOST": "127.0.0.1",
        "IOT_MTLS_ENABLED": "0",
        "GATEWAY_PORT": str(port),
        **CREDENTIALS,
    }
    with (log or Path(os.devnull)).open("ab") as output:
        process = subprocess.Popen(command, env={**os.environ, **names}, stdout=output, stderr=output)
        try:
            _await_answer(ready, process)
            yield endpoint
        finally:
            process.kill()
            process.wait()


def has_kinesalite() -> bool:
    """Whether there is what ``server("kinesalite")`` starts."""
    return KINESALITE.is_dir() and shutil.which("node") is not None


def reset(endpoint: str) -> None:
    """Forget all that a stand-in holds, MiniStack or moto."""
    for path in ("/_ministack/reset", "/moto-api/reset"):
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint + path, method="POST"), timeout=60):
                return
        except OSError:
            continue
    raise RuntimeError(f"{endpoint} could not be reset")


def _await_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}: run `make setup`")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return  # it is there, and wants to be asked otherwise
            time.sleep(0.02)
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"{url} did not answer within 90 s")
