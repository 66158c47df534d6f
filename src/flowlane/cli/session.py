"""One call of the command line: its settings, its answer, and what becomes of its errors."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

import click
import msgspec

from flowlane.cli.logs import logging_to_stderr
from flowlane.cli.loop import Loop
from flowlane.cli.screen import Screen
from flowlane.cli.standard import Spoken, to_nowhere
from flowlane.cli.text import one_line
from flowlane.deadline import Deadline
from flowlane.errors import ConfigError, FlowlaneError
from flowlane.lane import Lane
from flowlane.settings import Settings
from flowlane.veil import conceal

if TYPE_CHECKING:
    from flowlane.compose import Application

#: Exit codes: 0 and 1 are the lane's; 2 means that nothing was started; 130 that the user ended it.
FAILED, CONFIGURATION, INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Answer:
    """What a verb has to say: `document` for ``--json``, `show` for people, and the exit code."""

    document: Any
    show: Callable[[Screen], None]
    code: int = 0


class Session:
    """What the verbs are given. With ``--json``, stdout gets one document and nothing else, whatever the
    lane's own code prints: that goes to stderr. ``left``: something of the lane's code still goes on."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.left = False
        self.json = "--json" in arguments
        self.debug = "--debug" in arguments
        self.settings = Settings()
        self._stdout = sys.stdout
        self._said = False

    def configure(self, *, backend: str | None, as_json: bool, debug: bool) -> None:
        """Take the environment's settings, and what the options say over it.

        Raises:
            ConfigError: a variable has a value that means nothing.
        """
        self.json |= as_json
        self.debug |= debug
        self.settings = Settings.read(os.environ)
        if backend is not None:
            self.settings = msgspec.structs.replace(self.settings, backend=backend)

    def lane(self, reference: str) -> Lane:
        """The lane that `reference` names.

        Raises:
            ConfigError: it cannot be loaded.
        """
        from flowlane.compose import load_lane

        return load_lane(reference)

    def perform(self, work: Callable[[], Coroutine[Any, Any, Answer | None]], *, level: str = "error") -> int:
        """Run a verb to its end, say its answer, and return its exit code. What is logged meanwhile is said
        from `level` on, where the environment sets none: most verbs tell it all in their answer. With
        ``--debug`` that is all of it, the tracebacks of stages among it.

        `work` loads what it needs before it makes the coroutine: lane files are imported outside the loop.
        """
        level = "debug" if self.debug else level
        chosen = self.settings.log_level if os.environ.get("FLOWLANE_LOG_LEVEL") else level
        with (
            logging_to_stderr(chosen, as_json=self.json, debug=self.debug),
            redirect_stdout(cast(TextIO, Spoken(sys.stderr if self.json else sys.stdout))),
        ):
            loop = Loop()
            try:
                answer = _finish(loop, work())
            finally:
                self.left = bool(loop.left)
        if answer is None:
            return 0
        self.say(answer)
        return answer.code

    def say(self, answer: Answer) -> None:
        """Print `answer`. A reader that has gone away (``| head``) is no failure of the lane.

        Raises:
            FlowlaneError: stdout does not take it, for any other reason.
        """
        try:
            if self.json:
                self._document(answer.document)
            else:
                answer.show(Screen(self._stdout))
            self._stdout.flush()
        except BrokenPipeError:
            to_nowhere(self._stdout)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self._stdout.closed:
                raise
            to_nowhere(self._stdout)
            said = getattr(error, "strerror", None) or error
            raise FlowlaneError(
                f"stdout takes no answer ({said}); what was done is in the log: see `flowlane status`"
            ) from error

    def _document(self, document: Any) -> None:
        self._said = True
        # Only ASCII leaves: a terminal obeys some characters that JSON does not demand to be escaped.
        self._stdout.write(json.dumps(msgspec.to_builtins(document), ensure_ascii=True) + "\n")

    def fail(self, error: BaseException) -> int:
        """Say in one line what went wrong, and return the exit code for it."""
        error = _leaf(error)
        if self.debug:
            print(conceal("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        kind, code, message = _classified(error)
        # A terminal has just shown ^C: the message begins on a line of its own.
        begin = "\n" if code == INTERRUPTED and sys.stderr.isatty() else ""
        with suppress(OSError, ValueError):
            print(f"{begin}flowlane: {message}", file=sys.stderr, flush=True)
        if self.json and not self._said:
            try:
                self._document({"error": {"kind": kind, "message": message}})
                self._stdout.flush()
            except (OSError, ValueError):
                to_nowhere(self._stdout)
        return code


def _finish(loop: Loop, work: Coroutine[Any, Any, Answer | None]) -> Answer | None:
    """Run `work` in `loop`.

    Raises:
        FlowlaneError: the lane's code called ``sys.exit`` (one unit does not decide when a worker ends), or a
            connection of the lane's broke.
    """
    left: list[BaseException] = []

    async def quiet() -> Answer | None:
        try:
            return await work
        except (SystemExit, KeyboardInterrupt) as error:
            # It has left through the loop already; out of here, it would be told as lost besides.
            left.append(error)
            return None

    try:
        answer = loop.run(quiet())
        if left:
            raise left[0]
    except SystemExit as error:
        said = "" if error.code is None else repr(error.code)
        raise FlowlaneError(
            f"the lane's code called sys.exit({said}) in the middle of its work: raise Permanent(...) there "
            "instead, and run again to go on"
        ) from error
    except BrokenPipeError as error:  # a connection of the lane's: stdout and stderr are seen to elsewhere
        raise FlowlaneError(f"{type(error).__name__}: {error}") from error
    return answer


def until_told(app: Application) -> tuple[asyncio.Event, Deadline]:
    """What SIGTERM and SIGINT set, and the deadline that they move close. A thread gets no signals."""
    from flowlane.worker import stop_on_signals

    stop, deadline = asyncio.Event(), Deadline()
    if threading.current_thread() is threading.main_thread():
        stop_on_signals(asyncio.get_running_loop(), app.clock.monotonic, stop, deadline)
    return stop, deadline


def _leaf(error: BaseException) -> BaseException:
    """What a group of errors comes down to: the first that says what is wrong with the settings, or the
    first one."""
    while isinstance(error, BaseExceptionGroup):
        known = error.subgroup(ConfigError) or error.subgroup(FlowlaneError) or error
        error = known.exceptions[0]
    return error


def _classified(error: BaseException) -> tuple[str, int, str]:
    if isinstance(error, KeyboardInterrupt | asyncio.CancelledError | click.Abort):
        return "interrupted", INTERRUPTED, "interrupted"
    if isinstance(error, click.ClickException):
        return "usage", CONFIGURATION, one_line(_usage(error))
    text = conceal(str(error))
    if isinstance(error, ConfigError):
        return "config", CONFIGURATION, one_line(text)
    if isinstance(error, FlowlaneError):
        return "failed", FAILED, one_line(text)
    if isinstance(error, OSError):
        return "failed", FAILED, one_line(f"{type(error).__name__}: {text}")
    return "internal", FAILED, one_line(f"{type(error).__name__}: {text} (--debug shows the traceback)")


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "flowlane"
    return f"{error.format_message().rstrip('.')}; see `{where} --help`"
