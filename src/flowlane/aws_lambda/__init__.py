"""A lane behind AWS Lambda: plain functions around one event loop that is kept for the process.

``flowlane.aws_lambda.handler`` runs the lane that ``FLOWLANE_LANE`` names on the backend that
``FLOWLANE_BACKEND`` names; ``handler = flowlane.aws_lambda.handler_for(lane)`` does the same in the file of a
lane. Both run the very engine that the worker runs; nothing here knows an SDK. ``objects`` says which objects
of S3 the event is about that opened a run.

``payload`` says which messages an invocation brings, ``wanted`` what each of them is about, ``refusals`` what
is not served and why, ``answer`` which messages come again (all without I/O); ``invocation`` does the work in
between, ``function`` keeps loop and application, and ``visibility`` looks at the queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flowlane.aws_lambda.function import Function, lane_of_environment
from flowlane.aws_lambda.s3 import Object, objects
from flowlane.lane import Lane

if TYPE_CHECKING:
    Handler = Callable[[Any, Any], dict[str, Any]]

__all__ = ["Object", "handler", "handler_for", "objects"]


def handler_for(lane: Lane, *, margin: float | str | None = None) -> Handler:
    """The Lambda handler of `lane`; nothing is opened before its first invocation.

    `margin` (seconds, or text like ``"30s"``) is how long before the function's time-out attempts stop at
    their next safe point; by default 10 s, less where the whole time is short (see ``function.margin_of``).

    Raises:
        ConfigError: `margin` is no duration.
    """
    function = Function(lambda settings: lane, margin=margin)

    def handler(event: Any, context: Any) -> dict[str, Any]:
        """See ``function.Function.__call__``."""
        return function(event, context)

    return handler


_environment = Function(lane_of_environment)


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Run the lane that the environment names on `event`; see ``function.Function.__call__``."""
    return _environment(event, context)
