"""What a lane is made of: units and their streams, facts, durations, policies, stages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flowlane import ConfigError, Context, Event, Fact, Lane, Permanent, Policy, Unit
from flowlane.lane import Trigger, duration, fact_stream, group_of, kebab, stream_of
from flowlane.ports import Cut


class Named(Unit, key="name"):
    """One field of text."""

    name: str


class Pair(Unit, key=("one", "two")):
    """Two fields of text: where does the one end?"""

    one: str
    two: str


class Numbered(Unit, key=("n", "on", "flag", "at")):
    """Everything else that a key may be made of."""

    n: int
    on: date = date(2024, 1, 1)
    flag: bool = False
    at: datetime = datetime(2024, 1, 1, tzinfo=UTC)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


# --------------------------------------------------------------------------- streams


def plain(stream: str) -> None:
    """A name that any log, URL, table and terminal can hold."""
    assert stream.isascii()
    assert stream.isprintable()
    assert " " not in stream
    assert len(stream) <= 400


@given(st.text(), st.text())
@example("a@b", "a%40b")
@example("a/b", "a%2Fb")
@example("%", "%25")
@example("a", "a ")
@example("é", "e\u0301")
@example("\ud800", "\ud801")
@example("x" * 400, "x" * 401)
@example("", " ")
def test_different_keys_have_different_streams(one: str, two: str) -> None:
    streams = [stream_of("toy", Named(name=name)) for name in (one, two)]
    for stream in streams:
        plain(stream)
        assert stream.startswith("toy/named/")
    assert (streams[0] == streams[1]) == (one == two)


@given(st.text(), st.text(), st.text(), st.text())
@example("a", "b@c", "a@b", "c")
@example("a@", "b", "a", "@b")
@example("", "a", "a", "")
@example("x" * 500, "y", "x" * 500, "z")
def test_what_two_fields_hold_is_never_mixed_up(a: str, b: str, c: str, d: str) -> None:
    one, two = stream_of("toy", Pair(one=a, two=b)), stream_of("toy", Pair(one=c, two=d))
    plain(one)
    assert (one == two) == ((a, b) == (c, d))


@given(st.text(min_size=350, max_size=600), st.text(max_size=20))
def test_a_name_cannot_be_made_to_look_like_a_long_one(head: str, tail: str) -> None:
    """Data decides what keys hold: even whoever knows how long names are cut cannot take one for another."""
    long = stream_of("toy", Pair(one=head, two=tail))
    front, _, back = long.rpartition("@" if "@" in long[-34:] else "!")
    forged = stream_of("toy", Pair(one=front.removeprefix("toy/pair/"), two=back))
    assert forged != long or (front.removeprefix("toy/pair/"), back) == (head, tail)


def test_a_key_that_looks_like_a_digest_is_not_taken_for_one() -> None:
    long = stream_of("toy", Pair(one="a" * 500, two="b"))
    assert len(long) == 400
    digest = long[-32:]
    forged = stream_of("toy", Pair(one="a" * (400 - 33 - len("toy/pair/")), two=digest))
    assert len(forged) == 400
    assert forged != long


moments = st.datetimes(timezones=st.just(UTC))


@given(st.integers(-(10**30), 10**30), st.dates(), st.booleans(), moments, st.data())
def test_numbers_days_and_moments_are_told_apart(
    n: int, on: date, flag: bool, at: datetime, data: Any
) -> None:
    one = Numbered(n=n, on=on, flag=flag, at=at)
    other = Numbered(
        n=data.draw(st.sampled_from([n, n + 1, -n])),
        on=on,
        flag=data.draw(st.booleans()),
        at=data.draw(st.sampled_from([at, at.replace(microsecond=at.microsecond // 2)])),
    )
    plain(stream_of("toy", one))
    assert (stream_of("toy", one) == stream_of("toy", other)) == (one == other)


def test_a_moment_is_named_in_utc() -> None:
    def name(at: datetime) -> str:
        return stream_of("toy", Numbered(n=1, at=at)).rpartition("@")[2]

    assert name(datetime(2024, 1, 1, tzinfo=UTC)) == "2024-01-01T00:00:00Z"
    assert name(datetime(2024, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))) == "2024-01-01T00:00:00Z"
    assert name(datetime(2024, 1, 1)) == "2024-01-01T00:00:00Z"  # noqa: DTZ001  # a naive one is UTC
    assert name(datetime(2024, 1, 1, microsecond=5, tzinfo=UTC)) == "2024-01-01T00:00:00.000005Z"


def test_streams_read_as_people_expect() -> None:
    assert stream_of("gh", Named(name="2024-01-01-0")) == "gh/named/2024-01-01-0"
    assert stream_of("gh", Pair(one="s3://drops/a.zip", two='"e1"')) == "gh/pair/s3://drops/a.zip@%22e1%22"
    assert stream_of("gh", Trigger(slot="2024-01-01T00:00:00Z")) == "gh/run/2024-01-01T00:00:00Z"


# --------------------------------------------------------------------------- order keys


def fits_sqs(group: str) -> None:
    """What the API reference says of MessageGroupId: 1 to 128 letters, digits and punctuation."""
    assert re.fullmatch(r"[A-Za-z0-9!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]{1,128}", group)


@given(st.text(), st.text(), st.text(), st.text())
@example("", "", "", "")
@example("a", "b@c", "a@b", "c")
@example("!", "", "", "!")
@example("x" * 128, "", "x" * 129, "")
@example("x" * 200 + "1", "", "x" * 200 + "2", "")
@example("\ud800", "", "\n", "")
def test_different_order_keys_are_different_groups(a: str, b: str, c: str, d: str) -> None:
    for order in (("one",), ("one", "two"), ("two", "one")):
        one, other = (group_of(Pair(one=x, two=y), order) for x, y in ((a, b), (c, d)))
        fits_sqs(one)
        assert (one == other) == ((a == c) if order == ("one",) else (a, b) == (c, d))


def test_a_group_reads_as_its_key() -> None:
    assert group_of(Pair(one="Smith & Co", two="eu/1"), ("two", "one")) == "eu/1@Smith%20%26%20Co"
    assert group_of(Numbered(n=7), ("n", "on")) == "7@2024-01-01"
    assert group_of(Named(name=""), ("name",)) == "!"
    assert len(group_of(Named(name="x" * 1000), ("name",))) == 128
    assert group_of(Named(name="x" * 129), ("name",)).endswith("5d71d5a54f")  # for ever


def test_an_order_key_is_of_text_or_numbers() -> None:
    with pytest.raises(Permanent, match="unit Anything has list in its order field 'n': use text or whole"):
        group_of(Anything(n=[1]), ("n",))


def test_a_stage_knows_its_order_key() -> None:
    lane = Lane("toy")
    lane.stage(on=Named, name="one", order="name")(handle)
    lane.stage(on=Pair, name="two", order=["two", "one"])(handle)
    lane.stage(on=Numbered, name="three")(handle)
    assert [stage.order for stage in lane.stages] == [("name",), ("two", "one"), ()]


class Keyless(Unit):
    """No key."""

    n: int = 0


class Anything(Unit, key="n"):
    """A key of any type."""

    n: Any


def test_a_unit_without_a_key_has_no_stream() -> None:
    with pytest.raises(ConfigError, match=r"Keyless has no key: declare it as class Keyless\(Unit, key="):
        stream_of("toy", Keyless())


@pytest.mark.parametrize("value", [None, 1.5, b"x", [1], {"a": 1}, (1,), object()])
def test_a_key_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(Permanent, match="in its key field 'n': use text or whole numbers"):
        stream_of("toy", Anything(n=value))


# --------------------------------------------------------------------------- units and facts


def test_a_unit_is_told_by_what_its_class_says() -> None:
    assert (Named.unit_type, Named.unit_key, Named.unit_schema) == ("named", ("name",), 1)
    assert Pair.unit_key == ("one", "two")
    with pytest.raises(AttributeError):
        Named(name="x").name = "y"
    with pytest.raises(TypeError):
        Named("x")


@pytest.mark.parametrize(
    ("name", "text"),
    [("OrdersFound", "orders-found"), ("Hour", "hour"), ("S3Object", "s3-object"), ("HTTPPage", "http-page")],
)
def test_a_class_name_becomes_a_type(name: str, text: str) -> None:
    assert kebab(name) == text


def declare(**keywords: Any) -> Callable[[], Any]:
    def make() -> Any:
        class Declared(Unit, **keywords):
            n: int = 0

        return Declared

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (declare(key="m"), "Declared has no field 'm' for its key"),
        (declare(key=("n", "m")), "no field 'm'"),
        (declare(key="n", type="With Space"), "has the type 'With Space'"),
        (declare(key="n", type="lane.triggered"), "has the type 'lane.triggered'"),
        (declare(key="n", type="a/b"), "has the type 'a/b'"),
    ],
)
def test_a_unit_that_cannot_be_is_refused_when_declared(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert said in one_line(caught.value)


class Mark(Fact, type="mark"):
    """One for the lane."""

    at: str = ""


class Shelf(Fact, key=("room", "name")):
    """Several, and a field without a default."""

    room: int
    name: str
    content: list[int]


def test_a_fact_has_a_stream_of_its_own() -> None:
    assert fact_stream("toy", Mark, {}) == "toy/mark"
    key = {"name": "a/b c", "room": 7}
    assert fact_stream("toy", Shelf, key) == "toy/shelf/7@a/b%20c"
    assert fact_stream("toy", Shelf, key) == stream_of("toy", Shelf(room=7, name="a/b c", content=[]))


@pytest.mark.parametrize(
    ("fact", "key"),
    [
        (Mark, {"at": "x"}),
        (Shelf, {}),
        (Shelf, {"room": 1}),
        (Shelf, {"room": 1, "name": "x", "content": []}),
    ],
)
def test_a_fact_is_asked_for_by_its_whole_key(fact: Any, key: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"fact {fact.__name__} is told by") as caught:
        fact_stream("toy", fact, key)
    one_line(caught.value)


# --------------------------------------------------------------------------- durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (5, 5.0),
        (0.25, 0.25),
        ("90s", 90.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("7d", 604800.0),
        ("2w", 1209600.0),
        ("250ms", 0.25),
        ("1.5h", 5400.0),
        ("1h30m", 5400.0),
        ("1m500ms", 60.5),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


NO_DURATIONS: tuple[Any, ...] = (
    *("", "5", "m", "5 m", " 5m", "5m ", "-5m", "5m-", "1h 30m", "5x", "0s", "1e3s", "9" * 400 + "s", "5m\n"),
    *(0, -1, True, None, float("inf"), float("nan"), []),
)


@pytest.mark.parametrize("text", NO_DURATIONS)
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(ConfigError, match="is not a duration") as caught:
        duration(text)
    assert "\n" not in str(caught.value)


@given(st.floats(0.001, 1e9))
def test_a_number_is_a_duration_in_seconds(seconds: float) -> None:
    assert duration(seconds) == seconds


# --------------------------------------------------------------------------- policies


@given(st.integers(1, 500), st.floats(0, 1, exclude_max=True), st.floats(0.001, 100), st.floats(0.001, 1000))
def test_a_delay_is_fully_jittered_doubled_and_capped(
    n: int, chance: float, backoff: float, cap: float
) -> None:
    policy = Policy(backoff=backoff, backoff_cap=cap)
    delay = policy.delay(n, chance)
    ceiling = min(cap, backoff * 2.0 ** min(n - 1, 60))
    assert 0 <= delay <= ceiling
    assert policy.delay(n, 0.0) == 0.0
    assert policy.delay(n, 0.5) == pytest.approx(ceiling / 2)
    assert policy.delay(n + 1, chance) >= delay


def test_a_policy_is_read_in_seconds() -> None:
    policy = Policy(timeout="5m", backoff="250ms", backoff_cap="1m", lease=10)
    assert (policy.timeout, policy.backoff, policy.backoff_cap, policy.lease) == (300.0, 0.25, 60.0, 10.0)
    assert Policy(batch=7, batch_bytes=9).cut == Cut(7, 9)
    assert Policy().cut == Cut()


@pytest.mark.parametrize(
    "setting",
    [
        {"concurrency": 0},
        {"concurrency": 1.5},
        {"concurrency": True},
        {"concurrency": "8"},
        {"retries": -1},
        {"hops": 0},
        {"batch": 0},
        {"batch_bytes": 0},
        {"timeout": 0},
        {"timeout": "soon"},
        {"backoff": -1},
        {"backoff_cap": None},
        {"lease": float("inf")},
        {"error_budget": -0.1},
        {"error_budget": 1.1},
        {"error_budget": "1%"},
        {"error_budget": None},
        {"error_budget": float("nan")},
        {"schema": "guess"},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Policy(**setting)
    assert repr(next(iter(setting.values()))) in one_line(caught.value)


@given(st.integers(1, 10**9), st.integers(1, 10**12))
def test_a_cutting_policy_survives_its_text(rows: int, size: int) -> None:
    assert Cut.parse(str(Cut(rows, size))) == Cut(rows, size)
    assert Cut.parse("") == Cut()


# --------------------------------------------------------------------------- stages


async def handle(event: Event, ctx: Context) -> None: ...


class Run(Unit, key="n"):
    """A name that the engine needs for itself."""

    n: int


class Notice(Unit, key="n", type="notice"):
    """So is this one."""

    n: int


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"on": "lane.nothing"}, "not 'lane.nothing'"),
        ({"on": "thing"}, "not 'thing'"),
        ({"on": None}, "not None"),
        ({"on": 7}, "not 7"),
        ({"on": []}, "not []"),
        ({"on": Named(name="x")}, "a Unit class"),
        ({"on": int}, "a Unit class"),
        ({"on": Mark}, "a Unit class"),
        ({"on": Run}, "the engine's own"),
        ({"on": Notice}, "the engine's own"),
        ({"on": Named, "concurency": 3}, "no policy 'concurency'; known: backoff"),
        ({"on": Named, "concurrency": 0}, "policy concurrency=0"),
        ({"on": Named, "name": "With Space"}, "stage name 'With Space'"),
        ({"on": Named, "name": "a/b"}, "stage name 'a/b'"),
        ({"on": Named, "name": "x" * 64}, "stage name"),
        ({"on": Pair, "name": "taken"}, "two stages are called 'taken'"),
        ({"on": Lane.triggered, "name": "again"}, "both handle 'lane.triggered'"),
        (
            {"on": Pair, "order": "three"},
            "Pair has no field 'three' for its order key: name one (or several) of",
        ),
        ({"on": Pair, "order": ("one", "three")}, "no field 'three' for its order key"),
        ({"on": Pair, "order": ["unit_key"]}, "no field 'unit_key' for its order key"),
        ({"on": Pair, "order": ""}, "no field '' for its order key"),
        ({"on": Pair, "order": 7}, "no field 7 for its order key"),
        ({"on": Pair, "order": None}, "no field None for its order key"),
        ({"on": Lane.completed, "order": "run"}, "order= is for stages on a Unit class"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_in_one_line(arguments: dict[str, Any], said: str) -> None:
    lane = Lane("toy")
    lane.stage(on=lane.triggered, name="taken")(handle)
    with pytest.raises(ConfigError) as caught:
        lane.stage(**arguments)(handle)
    text = one_line(caught.value)
    assert said in text
    assert "toy" in text or "policy" in text
    assert len(lane.stages) == 1


def test_a_unit_is_handled_by_one_stage() -> None:
    lane = Lane("toy")
    lane.stage(on=Named, name="one")(handle)
    with pytest.raises(ConfigError, match="two and one both handle 'named': a unit is settled by one stage"):
        lane.stage(on=Named, name="two")(handle)


def test_a_lambda_needs_a_name() -> None:
    lane = Lane("toy")
    with pytest.raises(ConfigError, match="stage name '<lambda>'"):
        lane.stage(on=Named)(lambda event, ctx: None)


@pytest.mark.parametrize(
    "name", ["", "Toy", "1toy", "-toy", "to y", "to/y", "tö", "x" * 64, None, 7, "toy\n"]
)
def test_a_lane_name_that_cannot_be_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="lane name"):
        Lane(name)


def test_a_lane_without_a_beginning_is_refused() -> None:
    lane = Lane("toy")
    lane.stage(on=Named)(handle)
    with pytest.raises(ConfigError, match=r"toy has no stage on lane\.triggered: nothing would ever happen"):
        lane.check()
    lane.stage(on=lane.triggered, name="find")(handle)
    lane.check()


@pytest.mark.parametrize("every", ["often", "", 0, "-1h"])
def test_a_schedule_that_is_none_is_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="is not a duration"):
        Lane("toy", every=every)


def test_a_stage_inherits_its_lanes_policy() -> None:
    lane = Lane("toy", policy=Policy(retries=9, concurrency=3))
    lane.stage(on=Named, concurrency=5, timeout="1m")(handle)
    stage = lane.stages[0]
    assert (stage.policy.retries, stage.policy.concurrency, stage.policy.timeout) == (9, 5, 60.0)
    assert (stage.name, stage.queue, stage.on, stage.counted) == ("handle", "toy/handle", "named", True)
    assert lane.stage_on("named") is stage
    assert lane.stage_on("nothing") is None


def test_the_decorator_gives_the_handler_back() -> None:
    lane = Lane("toy")
    assert lane.stage(on=Named)(handle) is handle


def test_declaring_a_lane_does_nothing_else() -> None:
    """No registry, no client, no thread: two lanes of one name do not know of each other."""
    one, two = Lane("toy"), Lane("toy")
    one.stage(on=Named)(handle)
    assert two.stages == []
    assert one.views is not two.views


def test_every_policy_field_can_be_set_on_a_stage() -> None:
    for field in fields(Policy):
        lane = Lane("toy")
        setting: dict[str, Any] = {field.name: field.default}
        lane.stage(on=Named, **setting)(handle)
        assert getattr(lane.stages[0].policy, field.name) == getattr(Policy(), field.name)
    assert "policy" in inspect.signature(Lane.stage).parameters
