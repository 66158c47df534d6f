"""Stand-ins for AWS, one of each kind a test process, emptied before every test that asks for one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import botocore.hooks
import pytest
from botocore.hooks import EVENT_ALIASES, EventAliaser
from hypothesis import HealthCheck, settings

from tests import servers

# Fewer examples than by default, where a test does not say how many: `make test` is to take minutes.
# How long an example takes is the machine's affair: one that stalls for a moment fails no test.
settings.register_profile(
    "suite", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

_MAKE = EventAliaser.__init__
_NAMES: dict[str, str] = {}


@pytest.fixture(scope="session", autouse=True)
def quick_clients() -> Iterator[None]:
    """Thousands of clients are made: what the SDK works out anew for each one (the names of its events; which
    of its handlers take keywords; of a blocking one's 10 ms, 6) is the same for all and kept."""

    def make(self: Any, emitter: Any, aliases: Any = None) -> None:
        _MAKE(self, emitter, aliases)
        if aliases is None or aliases == EVENT_ALIASES:
            self._alias_name_cache = _NAMES

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EventAliaser, "__init__", make)
        patch.setattr(botocore.hooks, "accepts_kwargs", lru_cache(1000)(botocore.hooks.accepts_kwargs))
        yield


@pytest.fixture(scope="session")
def ministack_process() -> Iterator[str]:
    with servers.server("ministack") as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def moto_process() -> Iterator[str]:
    with servers.server("moto") as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def kinesalite() -> Iterator[str]:
    """The endpoint of a kinesalite, which nobody empties: make streams of other names than other tests."""
    if not servers.has_kinesalite():
        pytest.skip("there is no kinesalite: install node and npm, then run `make setup`")
    with servers.server("kinesalite") as endpoint:
        yield endpoint


def _point(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    servers.reset(endpoint)
    for name, value in servers.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    return endpoint


@pytest.fixture
def closed() -> Iterator[str]:
    """An endpoint at which nobody answers, nor comes to: its port is taken, and not listened on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def ministack(ministack_process: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint of an empty MiniStack, which the SDK's environment points at."""
    return _point(ministack_process, monkeypatch)


@pytest.fixture
def moto(moto_process: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same of a moto server."""
    return _point(moto_process, monkeypatch)
