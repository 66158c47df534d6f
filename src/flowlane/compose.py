"""The composition root: the only place where lanes, settings, plugins, backend and engine meet."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from flowlane.clock import Clock, SystemClock
from flowlane.connections import OpenConnections
from flowlane.engine import Engine
from flowlane.errors import ConfigError, FlowlaneError
from flowlane.lane import Lane
from flowlane.plugins import Registry
from flowlane.ports import Backend, Connections
from flowlane.settings import Settings
from flowlane.slips import check_handlers
from flowlane.veil import concealing


class Application:
    """A lane set, opened: what the worker, the Lambda handler and the command line work with."""

    def __init__(
        self, lanes: Sequence[Lane], settings: Settings, registry: Registry, backend: Backend, engine: Engine
    ) -> None:
        self.lanes = list(lanes)
        self.settings = settings
        self.registry = registry
        self.backend = backend
        self.engine = engine

    @property
    def clock(self) -> Clock:
        """The clock that everything of this application goes by."""
        return self.engine.clock

    @property
    def connections(self) -> Connections:
        """What the lanes read from and write to."""
        return self.engine.connections


@asynccontextmanager
async def open_application(
    lanes: Sequence[Lane],
    settings: Settings,
    *,
    clock: Clock | None = None,
    registry: Registry | None = None,
    backend: Backend | None = None,
) -> AsyncIterator[Application]:
    """Open `lanes` against the backend that `settings` name (or against `backend`).

    Raises:
        ConfigError: a lane, setting, plugin or URI is wrong; nothing was started.
    """
    names = [lane.name for lane in lanes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two lanes are called {name!r}: their streams would mix; rename one")
    clock = clock or SystemClock()
    registry = registry or Registry.load()
    for lane in lanes:
        if lane.policy.notify:  # that nothing opens it is said now, not when a run has ended
            registry.split("notifier", lane.policy.notify)
    async with AsyncExitStack() as stack:
        for name in ("flowlane", "asyncio"):  # the loop tells of errors that nobody waits for
            stack.enter_context(concealing(logging.getLogger(name)))
        connections = OpenConnections(registry, clock, stack, allow_private=settings.allow_private_hosts)
        used = backend
        if used is None:
            used = await stack.enter_async_context(connections.backend(settings.backend))
        engine = Engine(lanes, used, connections, clock, quarantine=_quarantine(settings))
        yield Application(lanes, settings, registry, used, engine)


def _quarantine(settings: Settings) -> str:
    """Beside an embedded database; wherever the policy says with any other backend."""
    scheme, _, path = settings.backend.partition("?")[0].partition(":///")
    if scheme == "sqlite" and path:
        return (Path(path).absolute().parent / "quarantine").as_uri()
    return (Path(".flowlane").absolute() / "quarantine").as_uri() if scheme.startswith("memory") else ""


def load_lane(reference: str) -> Lane:
    """The lane that `reference` names: ``path/to/file.py[:name]`` or ``package.module[:name]``.

    Raises:
        ConfigError: there is no such file, module or name, or importing it raised: in one line, with the
            line of the user's file; or the lane cannot do what it says.
    """
    place, _, name = reference.partition(":") if reference[1:3] != ":\\" else (reference, "", "")
    if not place.strip("."):
        raise ConfigError(
            f"{reference!r} names no lane: give path/to/file.py[:name] or package.module[:name]"
        )
    name = name or "lane"
    is_file = place.endswith(".py") or "/" in place or Path(place).is_file()
    module = _import_file(Path(place)) if is_file else _import_module(place)
    lane = getattr(module, name, None)
    if not isinstance(lane, Lane):
        lanes = [key for key, value in vars(module).items() if isinstance(value, Lane)]
        hint = (
            f"it has {', '.join(lanes)}: write {place}:{lanes[0]}"
            if lanes
            else "define lane = Lane(...) there"
        )
        raise ConfigError(f"{place} has no lane called {name!r}: {hint}")
    lane.check()
    check_handlers(lane)
    return lane


_EXITED = "ended the process while it was loaded: take sys.exit() (or argument parsing) out of the lane file"


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            f"there is no lane file {path}: give path/to/file.py[:name] or package.module[:name]"
        )
    spec = spec_from_file_location(f"flowlane_lane_{path.stem}", path)
    if spec is None:
        raise ConfigError(f"{path} is no lane file: its name must end in .py")
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise  # the user's, not the file's
    except FlowlaneError as error:
        raise ConfigError(f"{path}{_line(error, path)}: {error}") from error
    except SystemExit as error:
        raise ConfigError(f"{path}{_line(error, path)} {_EXITED}") from error
    except BaseException as error:
        raise ConfigError(f"{path}{_line(error, path)} raised {_said(error)}") from error
    finally:
        sys.path.remove(str(path.parent.absolute()))
    return module


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except FlowlaneError as error:
        raise ConfigError(f"{name}: {error}") from error
    except SystemExit as error:
        raise ConfigError(f"{name} {_EXITED}") from error
    except BaseException as error:
        raise ConfigError(f"importing {name} raised {_said(error)}") from error
    finally:
        sys.path.remove(str(Path.cwd()))


def _said(error: BaseException) -> str:
    """The error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _line(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    return f", line {lines[-1]}" if lines else ""
