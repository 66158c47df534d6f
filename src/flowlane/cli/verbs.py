"""The verbs of ``flowlane``, their arguments and options; what each does is imported when it is called."""

from __future__ import annotations

import asyncio
import difflib
import functools
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from flowlane import __version__
from flowlane.cli.loop import Left
from flowlane.cli.session import Answer, Session
from flowlane.cli.standard import standard_streams, to_nowhere

Work = Coroutine[Any, Any, Answer | None]


@contextmanager
def _read_or_not() -> Iterator[None]:
    """A reader of the help that has gone away (``| head``) is no failure; to click it is."""
    try:
        yield
    except BrokenPipeError:
        to_nowhere(sys.stdout)
        raise click.exceptions.Exit(0) from None


class _Verbs(click.Group):
    """A group whose errors are one line and an exit code, in the process and out of it."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> NoReturn:
        standard_streams()
        arguments = list(sys.argv[1:] if args is None else args)
        session = Session(arguments)
        extra["standalone_mode"] = False
        extra["obj"] = session
        try:
            code = super().main(arguments, *more, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            code = error.exit_code
        except click.exceptions.Exit as error:
            code = error.exit_code
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001  # nobody is above: it becomes a line and a code
            code = session.fail(error)
        if session.left:
            raise Left(code or 0)
        sys.exit(code or 0)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _read_or_not():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _read_or_not():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise asyncio.CancelledError from None  # click would print an empty line, whoever reads
        except EOFError as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error  # to click that is Ctrl-C

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(self.commands))}"
            raise click.UsageError(f"there is no verb {name!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="flowlane", message="%(prog)s %(version)s")
def cli(debug: bool) -> None:
    """Run lanes: event-sourced, async ingestion, as a local worker or behind AWS Lambda.

    LANE is path/to/file.py[:name] or package.module[:name]; the name defaults to `lane`. Exit codes: 0 all
    settled, 1 something is dead or over its error budget, 2 configuration.
    """


def verb(function: Callable[..., Work]) -> click.Command:
    """Make `function` a verb. It is called with the session and its arguments, outside of any loop, and
    returns the coroutine that does the work."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else.")
    @click.option("--backend", metavar="URI", help="The backend; overrides FLOWLANE_BACKEND.")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @click.pass_obj
    @functools.wraps(function)
    def command(
        session: Session, /, as_json: bool, backend: str | None, debug: bool, **arguments: Any
    ) -> int:
        session.configure(backend=backend, as_json=as_json, debug=debug)
        level = "warning" if function.__name__ == "worker" else "error"
        return session.perform(lambda: function(session, **arguments), level=level)

    return cli.command(function.__name__)(command)


_lane = click.argument("lane")


@verb
@_lane
@click.option("--event", metavar="FILE", help="A JSON file (- is stdin) as the trigger.")
def run(session: Session, lane: str, event: str | None) -> Work:
    """Trigger LANE once, drain it, print what became of it."""
    from flowlane.cli.event import read_event
    from flowlane.cli.run import run_lane

    return run_lane(session, session.lane(lane), read_event(event) if event is not None else None)


@verb
@click.argument("lanes", nargs=-1, required=True, metavar="LANE...")
def worker(session: Session, lanes: tuple[str, ...]) -> Work:
    """Run LANEs until SIGTERM: schedules, sweep and deliveries."""
    from flowlane.cli.worker import work

    return work(session, [session.lane(reference) for reference in lanes])


@verb
@_lane
@click.option("--days", type=click.IntRange(1), default=31, show_default=True, help="Days in the map.")
@click.option("--runs", type=click.IntRange(1, 1_000_000), default=5, show_default=True, help="Runs listed.")
def status(session: Session, lane: str, days: int, runs: int) -> Work:
    """Show LANE's last runs, what is open or dead, its views."""
    from flowlane.cli.status import show_status

    return show_status(session, session.lane(lane), days, runs)


@verb
@_lane
@click.argument("run", required=False)
@click.option("--limit", type=click.IntRange(1), default=10_000, show_default=True, help="Events shown.")
def trace(session: Session, lane: str, run: str | None, limit: int) -> Work:
    """Show the causal tree of a RUN of LANE (the last one)."""
    from flowlane.cli.trace import show_trace

    return show_trace(session, session.lane(lane), run or "", limit)


@verb
@_lane
@click.option("--limit", type=click.IntRange(0), default=1000, show_default=True, help="Units listed.")
def plan(session: Session, lane: str, limit: int) -> Work:
    """List units and bytes before anything moves."""
    from flowlane.cli.plan import show_plan

    return show_plan(session, session.lane(lane), limit)


@verb
@_lane
def graph(session: Session, lane: str) -> Work:
    """Print LANE's stages and units as a Mermaid flowchart."""
    from flowlane.cli.graph import show_graph

    return show_graph(session.lane(lane))


@verb
@_lane
@click.option("--limit", type=click.IntRange(0), default=1000, show_default=True, help="Units listed.")
def dead(session: Session, lane: str, limit: int) -> Work:
    """List LANE's dead units, each with its reason."""
    from flowlane.cli.dead import show_dead

    return show_dead(session, session.lane(lane), limit)


@verb
@_lane
@click.argument("units", nargs=-1, metavar="[UNIT]...")
def redrive(session: Session, lane: str, units: tuple[str, ...]) -> Work:
    """Put dead UNITs (all by default) back to work."""
    from flowlane.cli.dead import put_back

    return put_back(session, session.lane(lane), units, lane)


@verb
@_lane
def sweep(session: Session, lane: str) -> Work:
    """Queue again what no queue holds; complete what is done."""
    from flowlane.cli.dead import sweep_lane

    return sweep_lane(session, session.lane(lane))


@verb
def plugins(session: Session) -> Work:
    """List what opens which URI scheme."""
    from flowlane.cli.setup import show_plugins

    return show_plugins()


@verb
@_lane
@click.option("--template", is_flag=True, help="Make nothing: print a template that makes it.")
@click.option("--variable", "variables", metavar="NAME", multiple=True, help="One that LANE's file reads.")
def init(session: Session, lane: str, template: bool, variables: tuple[str, ...]) -> Work:
    """Create what LANE needs of its backend; say what is there."""
    from flowlane.cli.setup import prepare, show_template

    if template:
        return show_template(session, session.lane(lane), lane, variables)
    if variables:
        raise click.UsageError("--variable is a parameter of the template: add --template")
    return prepare(session, session.lane(lane))
