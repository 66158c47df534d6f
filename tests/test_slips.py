"""What Python takes for right, and would have a stage settle its units for nothing."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from flowlane import ConfigError
from flowlane.compose import load_lane

LANE = """
from flowlane import Lane, Unit

lane = Lane("slips")


class Found(Unit, key="url"):
    url: str


@lane.stage(on=lane.triggered)
async def find(event, ctx):
    yield Found(url="file:///a")


"""


def load(tmp_path: Path, stage: str) -> None:
    file = tmp_path / "lane.py"
    file.write_text(LANE + textwrap.dedent(stage).lstrip())
    load_lane(str(file))


@pytest.mark.parametrize(
    "call",
    [
        'load(ctx.rows(event.data.url), to="sqlite:///x.db?table=t")',
        'copy(event.data.url, to="file:///b")',
        'step("one", print)',
    ],
)
def test_an_effect_that_nobody_awaits_is_refused(tmp_path: Path, call: str) -> None:
    """It would settle its unit, with nothing but a warning of Python's on stderr."""
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path,
            f"@lane.stage(on=Found)\nasync def take(event, ctx):\n    if event:\n        ctx.{call}\n",
        )
    name = call.partition("(")[0]
    assert str(caught.value) == (
        f"stage take of lane slips, line 19: ctx.{name}(...) does nothing until it is awaited: "
        f"write `await ctx.{name}(...)`"
    )


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("async def take(): ...", "take()"),
        ("async def take(event): ...", "take(event)"),
        ("async def take(event, ctx, more): ...", "take(event, ctx, more)"),
        ("async def take(event, *, ctx): ...", "take(event, *, ctx)"),
    ],
)
def test_a_handler_that_takes_something_else_is_refused(tmp_path: Path, stage: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"@lane.stage(on=Found)\n{stage}\n")
    assert f"stage take of lane slips is {said}, but is called with the event and the context" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "stage",
    [
        """
        import asyncio

        @lane.stage(on=Found)
        async def take(event, context, more=None):
            context.skip("not awaited, and need not be")
            async with asyncio.TaskGroup() as group:
                group.create_task(context.head(event.data.url))
            await context.copy(event.data.url, to="file:///b")
        """,
        """
        class Ctx:
            def copy(self): ...

        ctx = Ctx()

        @lane.stage(on=Found)
        async def take(*both):
            ctx.copy()
        """,
        """
        from functools import partial

        async def anywhere(folder, event, ctx):
            await ctx.copy(event.data.url, to=folder)

        lane.stage(on=Found, name="take")(partial(anywhere, "file:///b"))
        """,
        """
        from functools import partial, wraps

        async def anywhere(ctx, event, folder):
            event.copy(folder)

        lane.stage(on=Found, name="take")(wraps(anywhere)(partial(anywhere, folder="file:///b")))
        """,
        """
        from functools import wraps

        async def swapped(ctx, event):
            event.copy()

        @lane.stage(on=Found, name="take")
        @wraps(swapped)
        async def take(event, ctx):
            await swapped(ctx, event)
        """,
        """
        exec("async def take(event, ctx): await ctx.copy(event.data.url, to='file:///b')")
        lane.stage(on=Found)(take)
        """,
    ],
)
def test_a_handler_without_a_slip_is_taken(tmp_path: Path, stage: str) -> None:
    load(tmp_path, stage)
