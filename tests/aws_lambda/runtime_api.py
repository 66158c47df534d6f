"""A loopback server of the Lambda Runtime API (2018-06-01), and a real ``awslambdaric`` process behind it.

::

    with RuntimeApi("flowlane.aws_lambda.handler", folder, environment) as function:
        answer = function.invoke(event, seconds=30)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol, Self

_RUNTIME = "/2018-06-01/runtime"


class FunctionError(Exception):
    """What the function raised, as its runtime reports it: ``type`` and message."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type


class Process(Protocol):
    """See ``subprocess.Popen``."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


#: Starts ``python -m`` with these arguments, in a folder and an environment, its output added to a file.
Launch = Callable[[Sequence[str], Path, Mapping[str, str], Path], Process]


def _launch(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], output: Path
) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=folder, env=environment, stdout=file, stderr=file
        )


class _Server(ThreadingHTTPServer):
    """Closing it waits for the threads of its connections: none is left to run beside the next test."""

    daemon_threads = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A process that was killed resets its connection; all else is a fault of this file."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@dataclass
class _Call:
    id: str
    payload: bytes
    deadline: int  # milliseconds since the epoch
    done: threading.Event = field(default_factory=threading.Event)
    answer: Any = None
    error: FunctionError | None = None


class RuntimeApi:
    """See the module. One function, one invocation at a time; ``log`` is what the process wrote."""

    def __init__(
        self, handler: str, folder: Path, environment: Mapping[str, str], launch: Launch | None = None
    ) -> None:
        self._handler, self._folder, self._environment = handler, folder, environment
        self._launch = launch or _launch
        self._pending: SimpleQueue[_Call | None] = SimpleQueue()
        self._calls: dict[str, _Call] = {}
        self._names = count(1)
        self._current: _Call | None = None
        self._failed_init: FunctionError | None = None

    def __enter__(self) -> Self:
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # whole answers: half ones wait for the client's delayed acknowledgement

            def do_GET(self) -> None:
                api._next(self)

            def do_POST(self) -> None:
                api._posted(self)

            def log_message(self, *_: Any) -> None: ...

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        output = self._folder / "output.log"
        output.write_bytes(b"")
        self._process = self._launch(["awslambdaric", self._handler], self._folder, self._variables(), output)
        self._watching = threading.Thread(target=self._watch)
        self._watching.start()
        return self

    def _variables(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{self._server.server_address[1]}",
            "LAMBDA_TASK_ROOT": str(self._folder),
            "AWS_LAMBDA_FUNCTION_NAME": "function",
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "512",
            "AWS_LAMBDA_LOG_GROUP_NAME": "group",
            "AWS_LAMBDA_LOG_STREAM_NAME": "stream",
            "PYTHONPATH": os.pathsep.join([str(self._folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **self._environment,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._watching.join()
        self._pending.put(None)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def log(self) -> str:
        """What the process wrote up to now."""
        return (self._folder / "output.log").read_text()

    def cpu(self) -> float:
        """Seconds of CPU that the function's process has had (Linux: proc(5), stat)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def invoke(self, event: Any, *, seconds: float = 60.0) -> Any:
        """The function's answer to `event`, with `seconds` until its time-out.

        Raises:
            FunctionError: what it raised instead; or the process died.
        """
        call = _Call(f"request-{next(self._names)}", json.dumps(event).encode(), _now() + int(seconds * 1000))
        self._calls[call.id] = self._current = call
        self._pending.put(call)
        if self._failed_init is not None or self._process.poll() is not None:
            call.done.set()
        if not call.done.wait(seconds + 30):
            raise AssertionError(f"no answer to {call.id}:\n{self.log}")
        if call.error is not None:
            raise call.error
        if call.answer is None:
            raise self._failed_init or FunctionError(
                "Runtime.ExitError", f"the process has ended:\n{self.log}"
            )
        return json.loads(call.answer)

    def kill(self) -> None:
        """The sandbox is gone (out of memory, say), in the middle of whatever it did."""
        self._process.kill()

    def _watch(self) -> None:
        self._process.wait()
        if self._current is not None:
            self._current.done.set()

    # ------------------------------------------------------------------ the API

    def _next(self, request: BaseHTTPRequestHandler) -> None:
        assert request.path == f"{_RUNTIME}/invocation/next", request.path
        call = self._pending.get()
        if call is None:
            request.close_connection = True
            return
        request.send_response(200)
        for name, value in {
            "Lambda-Runtime-Aws-Request-Id": call.id,
            "Lambda-Runtime-Deadline-Ms": str(call.deadline),
            "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu-west-1:1:function:function",
            "Lambda-Runtime-Trace-Id": "Root=1-0-0;Parent=0;Sampled=0",
            "Content-Type": "application/json",
            "Content-Length": str(len(call.payload)),
        }.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(call.payload)

    def _posted(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.removeprefix(_RUNTIME)
        if path == "/init/error":
            self._failed_init = _error(body)
            if self._current is not None:
                self._current.done.set()
        else:
            _, _, name, what = path.split("/")
            call = self._calls[name]
            if what == "response":
                call.answer = body
            else:
                call.error = _error(body)
            call.done.set()
        request.send_response(202)
        request.send_header("Content-Length", "0")
        request.end_headers()


def _error(body: bytes) -> FunctionError:
    told = json.loads(body)
    return FunctionError(told["errorType"], told["errorMessage"])


def _now() -> int:
    return int(time.time() * 1000)
