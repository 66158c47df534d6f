"""Plugins: what they may register, how they fail, and what is never said of a URI."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast, get_args

import msgspec
import pytest

from flowlane import ConfigError, hookspecs
from flowlane.backends.memory import MemoryBackend
from flowlane.clock import SystemClock
from flowlane.compose import open_application
from flowlane.connections import OpenConnections
from flowlane.errors import PluginError, redact
from flowlane.hookspecs import API, Kind, Provides, hookimpl
from flowlane.lane import Lane
from flowlane.plugins import Registry
from flowlane.ports import Environment
from flowlane.settings import Settings

DOC = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()


class Opened:
    """What the factories below open; remembers what it was given."""

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        self.uri = uri
        self.options = options

    async def get(self, reference: str) -> str:
        """See ``ports.Secrets``."""
        return f"the value of {reference}"


LOG: list[str] = []


@asynccontextmanager
async def open_thing(
    uri: str, environment: Environment, *, mode: str = "", must: str
) -> AsyncIterator[Opened]:
    LOG.append(f"open {uri}")
    try:
        yield Opened(uri, {"mode": mode, "must": must})
    finally:
        LOG.append(f"close {uri}")


@asynccontextmanager
async def open_plain(uri: str, environment: Environment) -> AsyncIterator[Opened]:
    LOG.append(f"open {uri}")
    try:
        yield Opened(uri, {})
    finally:
        LOG.append(f"close {uri}")


@asynccontextmanager
async def open_broken(uri: str, environment: Environment) -> AsyncIterator[Opened]:
    LOG.append(f"open {uri}")
    raise ConfigError("it cannot be opened")
    yield


_attempts = 0


@asynccontextmanager
async def open_late(uri: str, environment: Environment) -> AsyncIterator[Opened]:
    global _attempts  # noqa: PLW0603  # how often it was tried
    _attempts += 1
    if _attempts == 1:
        raise ConfigError("not yet")
    yield Opened(uri, {})


HERE = __name__
sys.modules.setdefault(HERE, sys.modules[__name__])


def plugin(*provides: Any, api: int = API) -> Any:
    """A plugin that provides these."""

    @hookimpl
    def flowlane_provides() -> list[Any]:
        return list(provides)

    return module(flowlane_provides=flowlane_provides)


def module(**names: Any) -> ModuleType:
    """A module with these names."""
    made = ModuleType("a_plugin")
    vars(made).update(names)
    return made


def registry(*provides: Any) -> Registry:
    return Registry({"mine": plugin(*provides)})


THING = Provides("source", "thing", f"{HERE}:open_thing")
EVERY = [
    Provides(kind, "every", f"{HERE}:open_plain")
    for kind in ("store", "source", "sink", "notifier", "secrets")
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    global _attempts  # noqa: PLW0603  # see above
    _attempts = 0
    LOG.clear()


@asynccontextmanager
async def connections(*provides: Any) -> AsyncIterator[OpenConnections]:
    async with AsyncExitStack() as stack:
        yield OpenConnections(registry(*provides), SystemClock(), stack, allow_private=False)


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# --------------------------------------------------------------------------- completeness

HOOKS = sorted(name for name, value in vars(hookspecs).items() if hasattr(value, "flowlane_spec"))

#: Every hook, and the test here that shows what it is for.
TESTED = {"flowlane_provides": "test_what_a_plugin_provides_can_be_opened"}


def test_every_hook_is_documented_and_tested() -> None:
    assert sorted(TESTED) == HOOKS
    for hook, test in TESTED.items():
        assert f"### `{hook}`" in DOC
        assert test in globals()
    assert DOC.count("### `flowlane_") == len(HOOKS)


def test_everything_that_can_be_provided_is_documented() -> None:
    for field in msgspec.structs.fields(Provides):
        assert f"| `{field.name}` |" in DOC
    row = next(line for line in DOC.splitlines() if line.startswith("| `kind` |"))
    assert all(f"`{kind}`" in row for kind in get_args(Kind))


def test_the_example_of_the_documentation_registers() -> None:
    code = DOC.split("```python")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/plugins.md", "exec"), namespace)
    made = Registry({"mine": module(**namespace)})
    assert made.schemes("store") == ["mine"]


async def test_what_a_plugin_provides_can_be_opened() -> None:
    async with connections(*EVERY) as made:
        assert cast("Any", await made.store("every://host/a")).uri == "every://host/a"
        for opening in (
            made.source("every://host/b", {}),
            made.sink("every://host/c", {}),
            made.notifier("every://host/d"),
        ):
            async with opening as opened:
                assert isinstance(opened, Opened)
        assert await made.secret("every://host/e") == "the value of every://host/e"
    assert len(LOG) == 10


def test_the_built_in_ones_come_by_the_same_hook() -> None:
    known = {(row["kind"], row["scheme"]): row["plugin"] for row in Registry.load().provided()}
    assert known["backend", "memory"] == known["store", "file"] == known["secrets", "env"] == "builtin"


# --------------------------------------------------------------------------- registering


def _fails() -> Any:
    raise IndexError("list index out of range")


def _exits() -> Any:
    sys.exit(4)


def _nothing() -> list[Provides]:
    return []


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (plugin("store"), "which is no Provides(kind, scheme, path)"),
        (plugin(None), "which is no Provides(kind, scheme, path)"),
        (
            plugin(Provides("store", "x", "a:b", api=API + 1)),
            f"version {API + 1}, these are {API}: upgrade it",
        ),
        (plugin(THING, THING), "'mine' and 'mine' both open thing:// as source"),
        (module(flowlane_provides=hookimpl(_fails)), "failed to say what it provides"),
        (module(flowlane_provides=hookimpl(lambda: 7)), "failed to say what it provides"),
        (module(flowlane_provides=hookimpl(_exits)), "failed to say what it provides: SystemExit: 4"),
        (module(flowlane_provides=hookimpl(lambda: None)), "provides None: return a list of Provides"),
        (plugin(Provides(cast("Any", "shop"), "x", "a:b")), "provides the kind 'shop'; known: backend, "),
        (module(flowlane_povides=hookimpl(_nothing)), "has hooks that do not fit"),
        (module(flowlane_provides=hookimpl(lambda sdk: [])), "has hooks that do not fit"),
        (module(), "implements no hook of flowlane's"),
        (module(flowlane_provides=lambda: [THING]), "implements no hook of flowlane's"),
        ([], "'mine'"),
    ],
)
def test_a_plugin_that_does_not_fit_is_named(made: Any, said: str) -> None:
    with pytest.raises(PluginError) as caught:
        Registry({"mine": made})
    assert said in str(caught.value)
    assert "'mine'" in str(caught.value)


def test_two_plugins_for_one_scheme_are_both_named() -> None:
    with pytest.raises(
        PluginError, match="plugins 'one' and 'two' both open thing:// as source: uninstall"
    ) as e:
        Registry({"one": plugin(THING), "two": plugin(THING)})
    one_line(e.value)


def test_one_scheme_may_be_opened_as_several_kinds() -> None:
    made = registry(*EVERY)
    assert all(made.schemes(kind) == ["every"] for kind in ("store", "source", "sink", "notifier", "secrets"))
    assert made.schemes("backend") == []


def install(folder: Path, name: str, module: str, code: str, package: str = "") -> None:
    """A distribution with one entry point, as pip would leave it."""
    package = package or f"rogue-{name}"
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[flowlane]\n{name} = {module}\n")
    (folder / f"{module.partition(':')[0]}.py").write_text(textwrap.dedent(code))


def loaded(folder: Path) -> subprocess.CompletedProcess[str]:
    """The registry, loaded by a process that finds what is installed in `folder`."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + textwrap.dedent(
        """
        from flowlane.errors import PluginError
        from flowlane.plugins import Registry
        try:
            ours = ("builtin", "aws")
            print(sorted(row["plugin"] for row in Registry.load().provided() if row["plugin"] not in ours))
        except PluginError as error:
            print("refused:", error)
        """
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )


def test_an_installed_plugin_is_found(tmp_path: Path) -> None:
    install(
        tmp_path,
        "good",
        "good_plugin",
        """
        from flowlane.hookspecs import Provides, hookimpl

        @hookimpl
        def flowlane_provides():
            return [Provides("store", "good", "nowhere:open_store")]
        """,
    )
    assert loaded(tmp_path).stdout == "['good']\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import a_library_that_is_not_there", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
    ],
)
def test_an_installed_plugin_that_fails_to_load_is_named(tmp_path: Path, code: str, said: str) -> None:
    install(tmp_path, "rogue", "rogue_plugin", code)
    output = loaded(tmp_path).stdout
    assert output.startswith("refused: plugin 'rogue' (rogue_plugin) failed to load: ")
    assert said in output
    assert "upgrade or uninstall it" in output
    assert output.count("\n") == 1


def test_an_installed_plugin_may_not_take_anothers_name(tmp_path: Path) -> None:
    for n in (1, 2):
        install(tmp_path, "twin", f"twin_{n}", "", package=f"twin-{n}")
    assert loaded(tmp_path).stdout == "refused: two plugins are called 'twin': uninstall one of them\n"
    install(tmp_path / "more", "builtin", "fake_builtin", "")
    assert "two plugins are called 'builtin'" in loaded(tmp_path / "more").stdout


# --------------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nothing://x?must=1", "has scheme 'nothing': as source, flowlane opens thing://"),
        ("/some/path", "has no scheme: as source, flowlane opens thing://"),
        ("s3://drops/a.csv", "flowlane opens thing://; s3:// comes with the plugin flowlane-aws: install it"),
        ("s3", "has no scheme: as source, flowlane opens thing://"),
        ("", "has no scheme"),
        ("thing:/x", "has no scheme"),
        ("thing://x?must=1&much=2", "unknown option 'much'; known: mode, must"),
        ("thing://x", "the option 'must' is missing"),
        ("thing://x?must=1&must=2", "option 'must' is given twice"),
    ],
)
async def test_a_uri_that_cannot_be_opened_is_refused_in_one_line(uri: str, said: str) -> None:
    async with connections(THING) as made:
        with pytest.raises(ConfigError) as caught:
            async with made.source(uri, {}):
                pass
    assert said in one_line(caught.value)
    assert LOG == []


async def test_options_come_from_the_query_and_the_call() -> None:
    async with connections(THING) as made:
        async with made.source("thing://x/y?must=a%26b&mode=", {}) as opened:
            assert cast("Any", opened).options == {"mode": "", "must": "a&b"}
            assert cast("Any", opened).uri == "thing://x/y"
        async with made.source("thing://x?must=1", {"must": "2", "mode": "m"}) as opened:
            assert cast("Any", opened).options == {"mode": "m", "must": "2"}


async def test_a_query_that_is_data_stays_in_the_uri() -> None:
    data = Provides("store", "web", f"{HERE}:open_plain", query="data")
    async with connections(data) as made:
        assert cast("Any", await made.store("web://x?a=1&a=2")).uri == "web://x?a=1&a=2"


async def test_a_question_mark_in_a_file_url_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a1.csv").write_text("x")
    (tmp_path / "a22.csv").write_text("x")
    async with AsyncExitStack() as stack:
        made = OpenConnections(Registry.load(), SystemClock(), stack, allow_private=False)
        url = f"{tmp_path.as_uri()}/a?.csv"
        assert [found.url.rpartition("/")[2] async for found in (await made.store(url)).list(url)] == [
            "a1.csv"
        ]


async def test_secret_references_in_options_are_resolved() -> None:
    uri = "thing://x?must=every%3A%2F%2Fpassword"
    async with connections(THING, *EVERY) as made, made.source(uri, {"mode": "every://mode"}) as opened:
        options = cast("Any", opened).options
    assert options == {"must": "the value of every://password", "mode": "the value of every://mode"}


async def test_secret_references_in_the_backends_options_are_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOW_SAFE", "perhaps")
    lane = _lane()
    settings = Settings(backend="sqlite:///x.db?synchronous=env%3A%2F%2FHOW_SAFE")
    with pytest.raises(ConfigError, match=r"synchronous=\*\*\* is neither") as caught:
        async with open_application([lane], settings):
            pass
    assert "perhaps" not in repr(caught.value)


@pytest.mark.parametrize("path", ["no_such_module_of_ours:x", f"{HERE}:no_such_name", "json"])
def test_a_factory_that_cannot_be_imported_is_named(path: str) -> None:
    made = registry(Provides("source", "bad", path))
    with pytest.raises(PluginError) as caught:
        made.open("source", "bad://x", cast("Any", None), {})
    text = one_line(caught.value)
    assert text.startswith("plugin 'mine' cannot open bad:// as source: ")
    assert path in text


def of_one_argument(uri: str) -> None:
    """No factory: it takes no environment."""


def opens_nothing(uri: str, environment: Any) -> int:
    """No factory: what it returns cannot be entered."""
    return 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("HERE", "is no factory(uri, environment, *, ...) ("),
        ("of_one_argument", "is no factory(uri, environment, *, ...) (too many positional arguments)"),
        ("opens_nothing", "returns no async context manager"),
    ],
)
def test_a_factory_that_is_none_is_named(name: str, said: str) -> None:
    made = registry(Provides("source", "bad", f"{HERE}:{name}"))
    with pytest.raises(PluginError) as caught:
        made.open("source", "bad://x", cast("Any", None), {})
    text = one_line(caught.value)
    assert text.startswith(f"plugin 'mine' cannot open bad:// as source: {HERE}:{name} {said}")


def test_entry_points_that_cannot_be_read_are_one_error(tmp_path: Path) -> None:
    install(tmp_path, "good", "good_plugin", "")
    (points,) = tmp_path.rglob("entry_points.txt")
    points.write_bytes(b"\xff\xfe")
    assert loaded(tmp_path).stdout.startswith(
        "refused: the entry points of a package cannot be read ('utf-8' codec"
    )


async def test_a_store_is_opened_once_and_closed_in_the_end() -> None:
    async with connections(*EVERY) as made:
        one = await made.store("every://host/a")
        assert await made.store("every://other/b") is one
        assert LOG == ["open every://host/a"]
        async with made.source("every://host/c", {}) as source:
            assert source is not None
        assert LOG[1:] == ["open every://host/c", "close every://host/c"]
    assert LOG[3:] == ["close every://host/a"]


async def test_what_failed_to_open_can_be_tried_again() -> None:
    late = Provides("store", "late", f"{HERE}:open_late")
    async with connections(late) as made:
        with pytest.raises(ConfigError, match="not yet"):
            await made.store("late://x")
        assert await made.store("late://x") is not None
        assert _attempts == 2


def _lane() -> Lane:
    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    async def find(event: Any, ctx: Any) -> None: ...

    return lane


def test_nothing_is_imported_before_its_scheme_is_opened(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import asyncio, sys
        from flowlane import Lane
        from flowlane.compose import open_application
        from flowlane.settings import Settings
        lane = Lane("toy")
        @lane.stage(on=lane.triggered)
        async def find(event, ctx): ...
        async def main():
            async with open_application([lane], Settings(backend="memory://")) as app:
                heavy = {"aiohttp", "sqlite3", "yarl", "rich", "click", "isal", "boto3"}
                print(sorted(heavy & set(sys.modules)))
                print("flowlane.backends.sqlite" in sys.modules, "flowlane.connectors.file" in sys.modules)
        asyncio.run(main())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines() == ["[]", "False False"]


# --------------------------------------------------------------------------- redaction

CANARY = "hunter2"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (f"postgresql://me:{CANARY}@db.example:5432/shop?table=t", "postgresql://db.example:5432/shop"),
        (f"postgresql://me:a/{CANARY}@db.example/shop", None),
        (f"postgresql://me:a?{CANARY}@db.example/shop", None),
        (f"postgresql://me:a#{CANARY}@db.example/shop", None),
        (f"postgresql://me:a@{CANARY}@db.example/shop", "postgresql://db.example/shop"),
        (f"postgresql://me:[{CANARY}@db.example/shop", None),
        (f"https://host/path?token={CANARY}", "https://host/path"),
        (f"https://host/path?a=1#{CANARY}", "https://host/path"),
        (f"me:{CANARY}@db.example/shop", "db.example/shop"),
        (f"/some/path?password={CANARY}", "/some/path"),
        (f"smtp://me:{CANARY}@mail:25?to=a@b.c", "smtp://mail:25"),
        ("sqlite:////tmp/a.db?key=id", "sqlite:////tmp/a.db"),
        ("file:///lake/a@b/c.csv", "file:///lake/a@b/c.csv"),
        ("s3://bucket/a/b.gz", "s3://bucket/a/b.gz"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x"),
        ("memory://", "memory://"),
        ("", ""),
    ],
)
def test_a_uri_is_said_without_what_may_be_secret(uri: str, said: str | None) -> None:
    shown = redact(uri)
    assert CANARY not in shown
    if said is not None:
        assert shown == said


@pytest.mark.parametrize(
    "uri",
    [
        f"nothing://me:{CANARY}@host/x?password={CANARY}",
        f"thing://me:{CANARY}@host/x?password={CANARY}",
        f"thing://me:{CANARY}@host/x",
        f"thing://me:{CANARY}@host/x?must={CANARY}&must={CANARY}",
        f"thing://me:a/{CANARY}@host/x",
        f"me:{CANARY}@host/x",
    ],
)
async def test_no_message_says_a_password(uri: str) -> None:
    async with connections(THING) as made:
        for opening in (made.source(uri, {}), made.sink(uri, {}), made.notifier(uri)):
            with pytest.raises(ConfigError) as caught:
                async with opening:
                    pass
            assert CANARY not in str(caught.value)
            assert CANARY not in repr(caught.value)
        with pytest.raises(ConfigError) as caught:
            await made.store(uri)
        assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "backend",
    [
        f"memory://me:{CANARY}@host/x",
        f"sqlite:///x.db?synchronous={CANARY}",
        f"sqlite:///x.db?busy_timeout={CANARY}",
        f"sqlite://me:{CANARY}@host/x.db",
        f"aws://me:{CANARY}@name?region={CANARY}",
        f"sqlite:///x.db?password={CANARY}",
    ],
)
async def test_no_message_of_a_backend_says_a_password(backend: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with open_application([_lane()], Settings(backend=backend)):
            pass
    assert "synchronous" in backend or "busy_timeout" in backend or CANARY not in one_line(caught.value)


async def test_a_backend_can_be_given_instead_of_named() -> None:
    backend = MemoryBackend(SystemClock())
    async with open_application([_lane()], Settings(backend="nothing://at-all"), backend=backend) as app:
        assert app.backend is backend
