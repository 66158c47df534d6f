"""Processes that are there at once: forked from one that has imported what they are to run, and done no more.

Python and the SDK of AWS take half a second of CPU to start, which a test that kills would pay for each kill.
What is forked here is a process like any other, with a pid of its own, and the loops, threads, connections
and sockets that it makes itself. None outlives the process that asked for it, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

#: Imported before anything is forked, where it is installed: no module that is run by its name.
_IMPORTED = (
    "awslambdaric.bootstrap",
    "flowlane.aws_lambda",
    "flowlane.cli.verbs",
    "flowlane_aws.backend",
    "flowlane_aws.dynamodb.sink",
    "flowlane_aws.kinesis",
    "flowlane_aws.s3.store",
    "tests.kills.victim",
    "tests.servers",
)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(_IMPORTED))

#: Held while a process is asked for its exit status, by starting another, too: of two threads that ask at
#: once, one would be told 255, for the status comes by a pipe, and once.
_ASKING = threading.Lock()


def start(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that calls `target` with `arguments`, in this one's environment."""
    process = context.Process(target=_be, args=(dict(os.environ), target, arguments), daemon=True)
    with _ASKING:
        process.start()
    return process


def _be(environment: Mapping[str, str], target: Callable[..., Any], arguments: Sequence[Any]) -> None:
    threading.Thread(target=_follow, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


def _follow() -> None:
    """End as soon as the process that asked for this one has: what forks is alive as long as this one is."""
    asked = multiprocessing.parent_process()
    assert asked is not None
    asked.join()
    os.kill(os.getpid(), signal.SIGKILL)


class Command:
    """``python -m`` with `arguments`, the module's name first, in `folder`; what it writes is added to
    the file `output`, what it says of errors to `errors` if there is one. Its methods are those of
    ``subprocess.Popen``, for several threads, too."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        output: Path,
        errors: Path | None = None,
    ) -> None:
        self._arguments = arguments
        files = (str(output), str(errors or output))
        self._process = start(_module, list(arguments), str(folder), dict(environment), files)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        with _ASKING:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        wait([self._process.sentinel], timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self._arguments, timeout or 0.0)
        return status

    def kill(self) -> None:
        """SIGKILL; nothing where it has ended, and its pid may be another's."""
        if self.poll() is None:
            self._process.kill()

    def terminate(self) -> None:
        """SIGTERM; as ``kill``."""
        if self.poll() is None:
            self._process.terminate()


def _module(arguments: list[str], folder: str, environment: Mapping[str, str], files: Sequence[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [folder]
    for number, file in enumerate(files, 1):
        written = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(written, number)
        os.close(written)
    sys.argv[1:] = arguments[1:]
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def run(arguments: Sequence[str], folder: Path, *, seconds: float) -> subprocess.CompletedProcess[str]:
    """What such a command, in this one's environment, ends with, and what it wrote.

    Raises:
        subprocess.TimeoutExpired: it still runs after `seconds`.
    """
    with TemporaryDirectory() as scratch:
        output, errors = Path(scratch, "output"), Path(scratch, "errors")
        command = Command(arguments, folder, os.environ, output, errors)
        try:
            status = command.wait(seconds)
        finally:
            command.kill()
        return subprocess.CompletedProcess(arguments, status, output.read_text(), errors.read_text())
