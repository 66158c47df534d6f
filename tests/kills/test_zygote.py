"""What is forked for a test does not outlive it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

# Nothing imported beforehand: it is the end that counts here.
_SCRIPT = """
import os, signal, sys, time
from tests.kills import zygote

if __name__ == "__main__":
    zygote.context.set_forkserver_preload([])
    print(zygote.start(time.sleep, 600).pid, flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""

_ASKED_BY_MANY = """
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.kills import zygote

if __name__ == "__main__":
    zygote.context.set_forkserver_preload([])
    command = zygote.Command(["ends_with_7"], Path({folder!r}), os.environ, Path(os.devnull))
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(command.wait) for _ in range(4)]
        print({{each.result() for each in asked}}, command.poll())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd_open(2) is Linux's")
def test_a_forked_process_ends_with_a_killed_test() -> None:
    command = [sys.executable, "-c", _SCRIPT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as asking:
        assert asking.stdin is not None
        assert asking.stdout is not None
        forked = os.pidfd_open(int(asking.stdout.readline()))
        try:
            asking.stdin.close()
            ended, _, _ = select.select([forked], [], [], 60)
            assert ended, "it is still there"
        finally:
            os.close(forked)


def test_all_threads_that_wait_are_told_the_same_end(tmp_path: Path) -> None:
    (tmp_path / "ends_with_7.py").write_text("raise SystemExit(7)\n")
    script = _ASKED_BY_MANY.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "{7} 7\n"
