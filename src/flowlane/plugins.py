"""Plugins: which scheme is opened by whom; loaded by the composition root, imported when first used."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib.metadata import entry_points
from typing import Any, get_args
from urllib.parse import parse_qsl, urlsplit

import pluggy

from flowlane import hookspecs
from flowlane.errors import ConfigError, PluginError, redact
from flowlane.hookspecs import API, Kind, Provides, hookimpl
from flowlane.ports import Environment

GROUP = "flowlane"

#: The plugin that lies beside flowlane and is installed by itself, and what it opens: said to who lacks it.
_AWS_PLUGIN = "flowlane-aws"
_AWS_SCHEMES = frozenset({"aws", "dynamodb", "s3", "secretsmanager", "sns"})


@hookimpl
def flowlane_provides() -> Sequence[Provides]:
    """The built-in connectors and backends, registered as any plugin's are."""
    return [
        Provides("backend", "memory", "flowlane.backends.memory:open_backend"),
        Provides("backend", "sqlite", "flowlane.backends.sqlite:open_backend"),
        Provides("store", "file", "flowlane.connectors.file:open_store", query="data"),
        Provides("store", "http", "flowlane.connectors.http:open_store", query="data"),
        Provides("store", "https", "flowlane.connectors.http:open_store", query="data"),
        Provides("source", "file", "flowlane.connectors.records:open_source"),
        Provides("source", "http", "flowlane.connectors.records:open_source", query="data"),
        Provides("source", "https", "flowlane.connectors.records:open_source", query="data"),
        Provides("source", "sqlite", "flowlane.connectors.sqlite:open_source"),
        Provides("sink", "file", "flowlane.connectors.records:open_sink"),
        Provides("sink", "sqlite", "flowlane.connectors.sqlite:open_sink"),
        Provides("secrets", "env", "flowlane.connectors.env:open_secrets"),
    ]


class Registry:
    """Who opens what; made by ``load`` or, in tests, from a list of plugins."""

    def __init__(self, plugins: Mapping[str, Any]) -> None:
        """Register `plugins` by name, in order.

        Raises:
            PluginError: a plugin's hook fails, answers nonsense, or provides what another one provides.
        """
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._table: dict[tuple[str, str], tuple[Provides, str]] = {}
        self._known: dict[str, tuple[Any, dict[str, inspect.Parameter]]] = {}  # factories' options, by path
        for name, plugin in plugins.items():
            try:
                self._manager.register(plugin, name=name)
                self._manager.check_pending()
            except Exception as error:
                raise PluginError(f"plugin {name!r} has hooks that do not fit: {error}") from error
            self._take(name, plugin)

    @classmethod
    def load(cls) -> Registry:
        """The built-in plugin and every installed one.

        Raises:
            PluginError: one fails to load; it is named, with what to do.
        """
        plugins: dict[str, Any] = {"builtin": sys.modules[__name__]}
        try:
            entries = entry_points(group=GROUP)
        except ValueError as error:
            raise PluginError(
                f"the entry points of a package cannot be read ({error}): install it anew"
            ) from error
        for entry in entries:
            if entry.name in plugins:
                raise PluginError(f"two plugins are called {entry.name!r}: uninstall one of them")
            try:
                plugins[entry.name] = entry.load()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise PluginError(
                    f"plugin {entry.name!r} ({entry.value}) failed to load: {type(error).__name__}: {error}; "
                    "upgrade or uninstall it"
                ) from error
        return cls(plugins)

    def _take(self, name: str, plugin: Any) -> None:
        try:
            others = [p for n, p in self._manager.list_name_plugin() if n != name]
            caller = self._manager.subset_hook_caller("flowlane_provides", remove_plugins=others)
            given = caller()
            answers = [item for answer in given for item in answer]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise PluginError(
                f"plugin {name!r} failed to say what it provides: {type(error).__name__}: {error}"
            ) from error
        if not caller.get_hookimpls():
            raise PluginError(
                f"plugin {name!r} implements no hook of flowlane's: point its entry point at the module that "
                "has flowlane_provides"
            )
        if len(given) < len(caller.get_hookimpls()):  # pluggy drops None
            raise PluginError(f"plugin {name!r} provides None: return a list of Provides(kind, scheme, path)")
        for item in answers:
            if not isinstance(item, Provides):
                raise PluginError(
                    f"plugin {name!r} provides {item!r}, which is no Provides(kind, scheme, path)"
                )
            if item.api != API:
                raise PluginError(
                    f"plugin {name!r} is made for hooks of version {item.api}, these are {API}: upgrade it"
                )
            if item.kind not in get_args(Kind):
                raise PluginError(
                    f"plugin {name!r} provides the kind {item.kind!r}; known: {', '.join(get_args(Kind))}"
                )
            key = (item.kind, item.scheme)
            if key in self._table:
                raise PluginError(
                    f"plugins {self._table[key][1]!r} and {name!r} both open "
                    f"{item.scheme}:// as {item.kind}: "
                    "uninstall one of them"
                )
            self._table[key] = (item, name)

    def provided(self) -> list[dict[str, str]]:
        """What is provided and by whom, as rows for ``flowlane plugins``."""
        return [
            {"kind": item.kind, "scheme": item.scheme, "plugin": name, "path": item.path}
            for item, name in self._table.values()
        ]

    def schemes(self, kind: Kind) -> list[str]:
        """The schemes that can be opened as `kind`."""
        return sorted(scheme for known, scheme in self._table if known == kind)

    def split(self, kind: Kind, uri: str) -> tuple[str, dict[str, str]]:
        """`uri` without its options, and the options.

        Raises:
            ConfigError: nothing opens its scheme as `kind`, or an option is given twice.
        """
        item, _ = self._find(kind, uri)
        if item.query == "data":
            return uri, {}
        parts = urlsplit(uri)
        options: dict[str, str] = {}
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name in options:
                raise ConfigError(f"{redact(uri)}: option {name!r} is given twice")
            options[name] = value
        return uri.partition("?")[0] if parts.query else uri, options

    def open(
        self, kind: Kind, uri: str, environment: Environment, options: Mapping[str, Any]
    ) -> AbstractAsyncContextManager[Any]:
        """Whatever opens `uri` (its options already split off) as `kind`, not entered yet.

        Raises:
            ConfigError: an option is unknown (the message names the known ones) or missing.
            PluginError: the plugin's module fails to import.
        """
        item, name = self._find(kind, uri)
        factory = self._factory(item, name)
        made, known = self._known.get(item.path, (None, {}))
        if made is not factory:
            parameters = _signature(item, name, factory).parameters.values()
            known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
            self._known[item.path] = factory, known
        for option in options:
            if option not in known:
                listed = ", ".join(sorted(known)) or "none"
                raise ConfigError(f"{redact(uri)}: unknown option {option!r}; known: {listed}")
        for parameter in known.values():
            if parameter.default is parameter.empty and parameter.name not in options:
                raise ConfigError(f"{redact(uri)}: the option {parameter.name!r} is missing")
        opened: AbstractAsyncContextManager[Any] = factory(uri, environment, **options)
        if not hasattr(opened, "__aenter__"):
            raise _misfit(item, name, "returns no async context manager")
        return opened

    def _find(self, kind: Kind, uri: str) -> tuple[Provides, str]:
        scheme, separator, _ = uri.partition("://")
        found = self._table.get((kind, scheme)) if separator else None
        if found is None:
            what = f"scheme {scheme!r}" if separator else "no scheme"
            opened = ", ".join(f"{known}://" for known in self.schemes(kind))
            opened = opened or "nothing: install the plugin that does"
            if separator and self._lacks_aws(scheme):
                opened += f"; {scheme}:// comes with the plugin {_AWS_PLUGIN}: install it"
            raise ConfigError(f"{redact(uri)!r} has {what}: as {kind}, flowlane opens {opened}")
        return found

    def _lacks_aws(self, scheme: str) -> bool:
        """Whether the plugin for AWS would open `scheme`, and is not there."""
        return scheme in _AWS_SCHEMES and not any(known == scheme for _, known in self._table)

    def _factory(self, item: Provides, name: str) -> Callable[..., AbstractAsyncContextManager[Any]]:
        module, _, attribute = item.path.partition(":")
        try:
            factory: Callable[..., AbstractAsyncContextManager[Any]] = getattr(
                importlib.import_module(module), attribute
            )
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise _misfit(item, name, f"fails to import ({type(error).__name__}: {error})") from error
        return factory


def _signature(item: Provides, name: str, factory: Any) -> inspect.Signature:
    """What the factory takes: the URI, the environment, and its options by keyword."""
    try:
        signature = inspect.signature(factory)
        signature.bind_partial("", None)
    except (TypeError, ValueError) as error:
        raise _misfit(item, name, f"is no factory(uri, environment, *, ...) ({error})") from error
    return signature


def _misfit(item: Provides, name: str, why: str) -> PluginError:
    return PluginError(f"plugin {name!r} cannot open {item.scheme}:// as {item.kind}: {item.path} {why}")
