"""Stand-ins for AWS, one of each kind a test process, emptied before every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import servers

# Fewer examples than by default, where a test does not say how many: `make test` is to take minutes.
settings.register_profile("suite", max_examples=60)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def ministack_process() -> Iterator[str]:
    with servers.server("ministack") as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def moto_process() -> Iterator[str]:
    with servers.server("moto") as endpoint:
        yield endpoint


def _point(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    servers.reset(endpoint)
    for name, value in servers.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    return endpoint


@pytest.fixture
def ministack(ministack_process: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint of an empty MiniStack, which the SDK's environment points at."""
    return _point(ministack_process, monkeypatch)


@pytest.fixture
def moto(moto_process: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same of a moto server."""
    return _point(moto_process, monkeypatch)
