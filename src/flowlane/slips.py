"""Slips in a lane's handlers that can be told before anything runs: Python itself takes them for right."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Final

from flowlane.errors import ConfigError
from flowlane.lane import Lane
from flowlane.ports import Context

#: What of ``ctx`` has no effect before it is awaited.
_AWAITED: Final = frozenset(name for name, it in vars(Context).items() if inspect.iscoroutinefunction(it))


def check_handlers(lane: Lane) -> None:
    """Nothing is run. What has no source (made by ``exec``, say) is passed over, and so is what only running
    it would show.

    Raises:
        ConfigError: a handler cannot be called with ``(event, ctx)``, or calls what has to be awaited and
            drops the answer: the stage would do nothing of it, and settle its units.
    """
    for stage in lane.stages:
        _check_arguments(lane, stage.name, stage.handler)
        # What a wrapper hands on to the function that it wraps is its own business.
        if inspect.isfunction(stage.handler) and not hasattr(stage.handler, "__wrapped__"):
            _check_awaits(lane, stage.name, stage.handler)


def _check_arguments(lane: Lane, stage: str, handler: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(handler, follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None)
    except TypeError:
        name = getattr(handler, "__name__", stage)
        raise ConfigError(
            f"stage {stage} of lane {lane.name} is {name}{signature}, but is called with the event and the "
            f"context: write `async def {name}(event, ctx)`"
        ) from None


def _check_awaits(lane: Lane, stage: str, handler: Callable[..., Any]) -> None:
    try:
        lines, first = inspect.getsourcelines(handler)
        (function,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (OSError, SyntaxError, ValueError):
        return
    if not isinstance(function, ast.AsyncFunctionDef):
        return
    named = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    for node in ast.walk(function):
        match node:
            case ast.Expr(ast.Call(ast.Attribute(ast.Name(owner), called))) if (
                owner in named[1:2] and called in _AWAITED
            ):
                raise ConfigError(
                    f"stage {stage} of lane {lane.name}, line {first + node.lineno - 1}: "
                    f"{owner}.{called}(...) does nothing until it is awaited: "
                    f"write `await {owner}.{called}(...)`"
                )
