"""Names: deterministic, fit for AWS, and never the same for two things."""

from __future__ import annotations

import re
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane.errors import ConfigError
from flowlane.ports import Connections, Environment
from flowlane.testing.manual import ManualClock
from flowlane_aws.backend import open_backend
from flowlane_aws.names import Names, checked

_part = st.text(alphabet="ab-_9", min_size=1, max_size=4)
_stages = st.one_of(
    st.builds(lambda lane, stage: f"l{lane}/s{stage}", _part, _part),
    st.sampled_from(
        ["a/dead", "a-b/dead", "b/c", "a/b-c", "a-b/c", "a-b", "load", "a" * 63 + "/" + "b" * 63]
    ),
    st.text(min_size=1, max_size=100),
)


@given(st.lists(_stages, min_size=2, max_size=8, unique=True))
def test_stages_never_share_a_queue(stages: list[str]) -> None:
    names = Names("prod")
    every = [
        name
        for stage in stages
        for ordered in (False, True)
        for name in (names.queue(stage, ordered=ordered), names.dead(stage, ordered=ordered))
    ]
    assert len(set(every)) == len(every)
    for name in every:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,75}(\.fifo)?", name)
        assert name.startswith("prod-")


_backends = st.sampled_from(["a", "a-b", "a-b-a", "b"])
_dashed = st.from_regex(r"[ab](-[ab]){0,3}/[ab]", fullmatch=True)


@given(st.lists(st.tuples(_backends, _dashed), min_size=2, max_size=8, unique=True))
def test_backends_never_share_a_queue(stages: list[tuple[str, str]]) -> None:
    every = [name for own, stage in stages for name in (Names(own).queue(stage), Names(own).dead(stage))]
    assert len(set(every)) == len(every)


def test_a_queue_is_known_from_another_backend_s() -> None:
    names = Names("a")
    for stage in ("lane/load", "lane/dead", "my-lane/load", "l" * 60 + "/" + "s" * 60):
        for ordered in (False, True):
            assert names.has_queue(names.queue(stage, ordered=ordered))
            assert names.has_queue(names.dead(stage, ordered=ordered))
            assert not names.has_queue(Names("a-b").queue("lane/load", ordered=ordered))
            assert not names.has_queue(Names("a-b").dead("lane/load", ordered=ordered))


_channels = st.one_of(
    st.text(min_size=1, max_size=200),
    st.sampled_from(
        ["a/b", "a-b", "a.b", "a_b", "a/b/c", "a/b-c", "a-b/c", "A/b", "a" * 63 + "/" + "b" * 63]
    ),
)


@given(st.lists(_channels, min_size=2, max_size=8, unique=True))
def test_channels_never_share_a_stream(channels: list[str]) -> None:
    streams = [Names("prod").stream(channel) for channel in channels]
    assert len(set(streams)) == len(streams)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", stream) for stream in streams)


def test_plain_names_are_plain() -> None:
    names = Names("prod")
    assert names.log == "prod-log"
    assert names.queue("gharchive/land") == "prod-gharchive-land"
    assert names.dead("gharchive/land", ordered=True) == "prod-gharchive-land-dead.fifo"
    assert names.stream("changes") == "prod-changes"
    assert names.stream("gharchive/land") == "prod-gharchive.land"
    other = Names("prod", "mine", "eu")
    assert (other.log, other.queue("a/b"), other.stream("c")) == ("mine", "eu-a-b", "prod-c")


@pytest.mark.parametrize(
    "names",
    [Names("a b"), Names(""), Names("x" * 41), Names("a", table="a/b"), Names("a", queue_prefix="x" * 60)],
)
def test_what_aws_takes_for_no_name_is_refused(names: Names) -> None:
    with pytest.raises(ConfigError):
        checked(names)


@pytest.mark.parametrize("hold", ["0", "soon", "-3s"])
async def test_a_hold_that_is_no_duration_is_refused_by_its_name(hold: str) -> None:
    environment = Environment(ManualClock(), cast(Connections, None))
    with pytest.raises(ConfigError, match=f"aws://x: hold={hold}: '{hold}' is not a duration"):
        async with open_backend("aws://x", environment, hold=hold):
            pass
