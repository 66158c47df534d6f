"""The process behind the handler: one event loop and one open application, from the first invocation on."""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

from flowlane.aws_lambda import payload
from flowlane.aws_lambda.visibility import Visibility
from flowlane.aws_lambda.wanted import understand_direct
from flowlane.clock import Clock, SystemClock
from flowlane.deadline import Deadline
from flowlane.errors import ConfigError, FlowlaneError, Retryable
from flowlane.lane import Lane, duration
from flowlane.settings import Settings
from flowlane.veil import conceal

if TYPE_CHECKING:
    from flowlane.compose import Application
    from flowlane.ports import Backend

logger = logging.getLogger("flowlane")

#: Seconds before the end of an invocation at which nothing more is begun, where there is time enough for it.
MARGIN = 10.0


def margin_of(seconds: float) -> float:
    """The margin of an invocation that has `seconds` left: ten seconds, or a tenth of less than a hundred; at
    least one, so that there is time to commit, but never more than half."""
    return max(0.0, min(MARGIN, max(seconds / 10, 1.0), seconds / 2))


def lane_of_environment(settings: Settings) -> Lane:
    """The lane that ``FLOWLANE_LANE`` names.

    Raises:
        ConfigError: it is not set, or names none.
    """
    from flowlane.compose import load_lane

    if not settings.lane:
        raise ConfigError(
            "FLOWLANE_LANE is not set: name the lane as path/to/file.py[:name] or package.module[:name]"
        )
    return load_lane(settings.lane)


class Function:
    """Calls a lane with Lambda's events. Made without any effect: loop, lane and application are opened (and
    the engine is imported) by the first call and kept for the later ones; leaving its context closes them.

    ``environment`` is what the settings are read from; ``clock`` and ``backend`` replace the process's own.
    """

    def __init__(
        self,
        find: Callable[[Settings], Lane],
        *,
        margin: float | str | None = None,
        environment: Mapping[str, str] = os.environ,
        clock: Clock | None = None,
        backend: Backend | None = None,
    ) -> None:
        self._find = find
        self._margin = None if margin is None else duration(margin)
        self._environment = environment
        self._clock = clock or SystemClock()
        self._backend = backend
        self._runner: asyncio.Runner | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._app: Application | None = None
        self._leave = asyncio.Event()
        self._resident: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._visible = Visibility()

    def __call__(self, event: Any, context: Any) -> dict[str, Any]:
        """The answer to `event`: ``{"batchItemFailures": [...]}`` for the messages of a queue or stream, the
        run's report for an event that the function was invoked with itself. Nothing runs on after it.

        `context` is Lambda's; ``None``, or one that does not tell the remaining time, sets no deadline.

        Raises:
            ConfigError: lane, settings or backend are wrong: the next call tries to open them again. Or the
                queue shows messages again while the function may still work on them (see ``visibility``).
            Permanent: the event is nothing that flowlane understands.
            Retryable: the event's run is not finished, or the log is away: the same event goes on with it.
        """
        seconds = _remaining(context)
        deadline = self._deadline(seconds)  # before the first call imports the engine, which takes time
        batch = payload.batch(event)
        if self._runner is None:
            self._runner = asyncio.Runner()
            atexit.register(self._at_exit)
        try:
            return self._runner.run(self._invoke(event, batch, seconds, deadline))
        except FlowlaneError as error:
            if logger.isEnabledFor(logging.DEBUG):
                raise
            # The message says what and where; Lambda would print the way it took through this code besides.
            raise error.with_traceback(None) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            try:
                self._runner.run(self._close())
            finally:
                self._runner.close()
                self._runner = None
                atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        with suppress(Exception):  # the interpreter is half gone; every backend survives worse
            self.__exit__(None, None, None)

    def _deadline(self, seconds: float) -> Deadline:
        margin = margin_of(seconds) if self._margin is None else self._margin
        return Deadline(self._clock.monotonic() + seconds, margin)

    async def _invoke(
        self, event: Any, batch: payload.Batch | None, seconds: float, deadline: Deadline
    ) -> dict[str, Any]:
        from flowlane.aws_lambda.direct import handle_direct
        from flowlane.aws_lambda.messages import handle

        app = await self._opened()
        lane = app.lanes[0]
        try:
            if batch is None:
                wanted = understand_direct(event, lane.name)
                return await handle_direct(app, lane, wanted, deadline)
            await self._visible.check(app.backend, batch.queue, seconds)
            return await handle(app, lane, batch, deadline)
        except FlowlaneError:
            raise
        except Exception as error:
            # What is in an unknown state is not worked with again; the log is as good as ever.
            logger.exception("lane %s: the invocation broke off", lane.name)
            await self._close()
            raise Retryable(f"the invocation broke off: {conceal(repr(_first(error)))[:500]}") from error
        finally:
            await self._still()

    # ------------------------------------------------------------------ the application

    async def _opened(self) -> Application:
        if self._app is None:
            opened: asyncio.Future[Application] = asyncio.get_running_loop().create_future()
            self._leave.clear()
            self._keeper = asyncio.create_task(self._keep(opened), name="flowlane-application")
            self._app = await opened
            self._resident.update(asyncio.all_tasks())
        return self._app

    async def _keep(self, opened: asyncio.Future[Application]) -> None:
        """Hold the application open: contexts want to be left by the task that entered them, and each
        invocation is a task of its own."""
        from flowlane.compose import open_application

        try:
            settings = Settings.read(self._environment)
            logging.getLogger("flowlane").setLevel(settings.log_level.upper())
            lane = self._find(settings)
            _check_stage(lane, settings.stage)
            async with open_application([lane], settings, clock=self._clock, backend=self._backend) as app:
                opened.set_result(app)
                await self._leave.wait()
        except Exception as error:
            if opened.done():
                raise
            opened.set_exception(error)

    async def _close(self) -> None:
        keeper, self._app, self._keeper = self._keeper, None, None
        self._leave.set()
        if keeper is not None:
            await asyncio.wait([keeper])
            if not keeper.cancelled() and keeper.exception() is not None:
                logger.error("closing failed: %s", keeper.exception())

    async def _still(self) -> None:
        """Nothing runs on: the process may be frozen for hours, or for good, the moment the answer is out."""
        stray = asyncio.all_tasks() - set(self._resident) - {asyncio.current_task()}
        stray.discard(self._keeper)
        for task in stray:
            task.cancel()
        if stray:
            await asyncio.wait(stray)


def _check_stage(lane: Lane, only: str) -> None:
    """
    Raises:
        ConfigError: FLOWLANE_STAGE names no stage of `lane`: the function would never handle anything.
    """
    known = sorted(stage.name for stage in lane.stages)
    if only not in ("", *known):
        raise ConfigError(
            f"FLOWLANE_STAGE={only!r}: lane {lane.name} has no such stage; there are {', '.join(known)}"
        )


def _remaining(context: Any) -> float:
    """Seconds until Lambda ends the invocation; endless where it does not tell."""
    remaining = getattr(context, "get_remaining_time_in_millis", None)
    return math.inf if remaining is None else remaining() / 1000


def _first(error: BaseException) -> BaseException:
    """The first error in a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
