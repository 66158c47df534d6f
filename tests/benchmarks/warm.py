"""Candidates in forks of one process that has imported what they import: each begins in 10 ms, not in 500.

For checking what a candidate puts out, not for its figures: ``wall`` and ``cpu`` leave its imports out, and
its peak begins with that of the process that it is forked from.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import ROOT, Candidate, Figures, told

#: What takes long to import, and the modules that nearly all candidates have.
IMPORTS = (
    "aioboto3",
    "aiohttp",
    "boto3.dynamodb.types",
    "flowlane.aws_lambda.function",
    "flowlane.compose",
    "flowlane.connectors.http",
    "flowlane.connectors.members",
    "flowlane.recipes",
    "flowlane.worker",
    "flowlane_aws.clients",
    "flowlane_aws.dynamodb.factory",
    "flowlane_aws.kinesis",
    "flowlane_aws.queue.queue",
    "flowlane_aws.s3.store",
    "isal.isal_zlib",
    "stream_unzip",
    "taskiq",
    "tests.aws_backend",
)


class Warm:
    """The process that is forked from."""

    def __init__(self, process: subprocess.Popen[str], scratch: Path) -> None:
        self._process = process
        self._output = scratch / "output"

    def measure(self, candidate: Candidate) -> Figures:
        """The candidate's own figures, and those of its fork.

        Raises:
            WrongOutput: it did not exit with 0.
        """
        python, option, module, *arguments = candidate.command
        assert (python, option) == (sys.executable, "-m"), candidate.command
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([module, arguments, str(self._output)]), file=self._process.stdin, flush=True)
        code: int
        figures: Figures
        code, figures = json.loads(self._process.stdout.readline())
        return figures | told(candidate, code, self._output.read_text())


@contextmanager
def warm(scratch: Path) -> Iterator[Warm]:
    """The process, which ends with the context; `scratch`: where a candidate's output is written."""
    command = [sys.executable, "-m", __name__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        yield Warm(process, scratch)


def serve() -> None:
    """Fork for each line of stdin; tell the exit code of the fork, and what the system counted."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is shared stays so
    for line in sys.stdin:
        module, arguments, output = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if not child:
            become(module, arguments, output)
            os._exit(0)  # quicker than taking down all that is imported
        _, status, usage = os.wait4(child, 0)
        figures = {
            "wall": time.monotonic() - began,
            "cpu": usage.ru_utime + usage.ru_stime,
            "peak": usage.ru_maxrss / 1024,
        }
        print(json.dumps([os.waitstatus_to_exitcode(status), figures]), flush=True)


def become(module: str, arguments: list[str], output: str) -> None:
    """What ``python -m module arguments`` does, with its standard output in the file `output`."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
