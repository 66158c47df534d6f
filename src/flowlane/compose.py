"""The composition root: the only place where lanes, settings, plugins, backend and engine meet."""

from __future__ import annotations

import asyncio
import importlib
import sys
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from flowlane.clock import Clock, SystemClock
from flowlane.engine import Engine
from flowlane.errors import ConfigError, FlowlaneError
from flowlane.lane import Lane
from flowlane.plugins import Registry
from flowlane.ports import Backend, Connections, Environment, Notifier, Sink, Source, Store
from flowlane.settings import Settings


class OpenConnections:
    """Opens what lanes name by URI, once per URI and options, and closes all of it in the end."""

    def __init__(
        self, registry: Registry, clock: Clock, stack: AsyncExitStack, *, allow_private: bool
    ) -> None:
        self._registry = registry
        self._stack = stack
        self._opened: dict[tuple[str, str, str], Any] = {}
        self._locks: dict[tuple[str, str, str], asyncio.Lock] = {}
        self.environment = Environment(clock, self, allow_private)

    async def store(self, url: str) -> Store:
        """The store of `url`'s scheme."""
        plain, options = self._registry.split("store", url)
        scheme = plain.partition("://")[0]
        store: Store = await self._keep("store", f"{scheme}://", plain, options)
        return store

    def source(self, url: str, options: Mapping[str, Any]) -> AbstractAsyncContextManager[Source]:
        """The source at `url`, closed with its context."""
        return self._fresh("source", url, options)

    @asynccontextmanager
    async def sink(self, url: str, options: Mapping[str, Any]) -> AsyncIterator[Sink]:
        """The sink at `url`, shared by all that write to it and closed in the end."""
        plain, given = await self.options("sink", url, options)
        yield await self._keep("sink", plain, plain, given)

    def notifier(self, url: str) -> AbstractAsyncContextManager[Notifier]:
        """The notifier at `url`, closed with its context."""
        return self._fresh("notifier", url, {})

    async def secret(self, reference: str) -> str:
        """The secret named by `reference`."""
        provider = await self._keep("secrets", reference.partition("://")[0] + "://", reference, {})
        value: str = await provider.get(reference)
        return value

    @asynccontextmanager
    async def _fresh(self, kind: Any, url: str, options: Mapping[str, Any]) -> AsyncIterator[Any]:
        plain, given = await self.options(kind, url, options)
        async with self._registry.open(kind, plain, self.environment, given) as opened:
            yield opened

    async def options(self, kind: Any, url: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """`url` without its options, and these and `options` with every secret reference resolved."""
        plain, given = self._registry.split(kind, url)
        secrets = tuple(f"{scheme}://" for scheme in self._registry.schemes("secrets"))
        wanted: dict[str, Any] = {**given, **options}
        for name, value in wanted.items():
            if isinstance(value, str) and value.startswith(secrets):
                wanted[name] = await self.secret(value)
        return plain, wanted

    async def _keep(self, kind: Any, name: str, url: str, options: Mapping[str, Any]) -> Any:
        key = (kind, name, repr(sorted(options.items(), key=lambda item: item[0])))
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._opened:
                opening = self._registry.open(kind, url, self.environment, options)
                self._opened[key] = await self._stack.enter_async_context(opening)
        return self._opened[key]


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
    if told := next((lane.name for lane in lanes for stage in lane.stages if stage.policy.notify), ""):
        raise ConfigError(
            f"lane {told}: notify= is not served yet: write a stage on lane.completed or lane.failed"
        )
    async with AsyncExitStack() as stack:
        connections = OpenConnections(registry, clock, stack, allow_private=settings.allow_private_hosts)
        used = backend
        if used is None:
            plain, options = await connections.options("backend", settings.backend, {})
            used = await stack.enter_async_context(
                registry.open("backend", plain, connections.environment, options)
            )
        assert used is not None
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
            line of the user's file.
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
