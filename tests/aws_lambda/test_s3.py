"""What S3 tells is the same to a lane, whichever way it came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane import Context, Event, Lane
from flowlane.aws_lambda import Object, objects
from flowlane.ports import ObjectInfo
from tests.aws_lambda.test_wanted import JSON, bridged, s3, sns
from tests.aws_lambda.toys import Remaining, failed, function, sqs

LONG = Remaining(900)
#: A key is 1 to 1,024 bytes of UTF-8.
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


def url_of(key: str) -> str:
    """The URL by which the store lists the object."""
    return "s3://bucket/" + quote(key, safe="/!$&'()+,;=:@~")


def ways(record: dict[str, Any]) -> list[dict[str, Any]]:
    """All the ways in which a record of S3 comes to Lambda."""
    told = {"Records": [record]}
    return [
        told,
        {"Records": [{"EventSource": "aws:sns", "Sns": sns(told)}]},
        sqs(told),
        sqs(sns(told)),
        sqs(sns(sns(told))),
    ]


@given(KEYS)
def test_the_key_is_decoded_once(key: str) -> None:
    for encoded in (quote_plus(key, safe="/*-._"), quote(key), quote_plus(key, safe="")):
        for way in ways(s3(encoded, versionId="v")):
            assert objects(way) == [Object(url_of(key), '"e"', 3, "v", "created", "0A")]


@pytest.mark.parametrize(
    ("key", "other"), [("a b", ""), ("a+b", "a b"), ("a%2Bb", "a+b"), ("100%", ""), ("plain", "")]
)
def test_a_key_by_eventbridge_may_be_meant_as_it_is_or_encoded(key: str, other: str) -> None:
    for way in (bridged(key), sqs(bridged(key))):
        (found,) = objects(way)
        assert found.url == url_of(key)
        assert found.other == (url_of(other) if other else "")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ObjectCreated:Put", "created"),
        ("s3:ObjectCreated:CompleteMultipartUpload", "created"),
        ("ObjectRemoved:DeleteMarkerCreated", "removed"),
        ("LifecycleExpiration:Delete", "removed"),
        ("ObjectRestore:Completed", "restored"),
        ("ObjectRestore:Post", "other"),
        ("ObjectTagging:Put", "other"),
        ("", "other"),
    ],
)
def test_what_became_of_the_object(name: str, change: str) -> None:
    assert [found.change for found in objects(s3(name=name))] == [change]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Object Created", "created"),
        ("Object Deleted", "removed"),
        ("Object Restore Completed", "restored"),
        ("Object Tags Added", "other"),
    ],
)
def test_what_became_of_it_by_eventbridge(kind: str, change: str) -> None:
    assert [found.change for found in objects(bridged(kind=kind))] == [change]


def test_what_is_not_told_is_empty() -> None:
    gone = {"eventName": "ObjectRemoved:Delete", "s3": {"bucket": {"name": "b"}, "object": {"key": "k"}}}
    assert objects(gone) == [Object("s3://b/k", change="removed")]
    null = s3("k")
    null["s3"]["object"].update(size=None, eTag=None, versionId=None, sequencer=None)
    assert objects(null) == [Object("s3://bucket/k")]
    assert objects(s3("k", size=-2))[0].size == -1
    assert objects(s3("k", size=True)) == [Object("s3://bucket/k", '"e"', sequencer="0A")]


def test_several_and_none() -> None:
    told = {"Records": [s3("x"), s3("y")]}
    assert [found.url for found in objects(sqs(told, told, "text", {"a": 1}))] == [
        "s3://bucket/x",
        "s3://bucket/y",
    ] * 2
    nothing: list[dict[str, Any]] = [
        {},
        {"Records": []},
        {"Records": {}},
        {"flowlane": "run"},
        sns("text"),
        {"body": "{"},
    ]
    assert [objects(value) for value in nothing] == [[]] * len(nothing)


def test_wrappings_are_taken_off_so_far_and_no_further() -> None:
    value: dict[str, Any] = {"Records": [s3("k")]}
    for depth in range(5000):
        assert depth > 10 or len(objects(value)) == (depth < 5)
        value = {"Sns": value}
    assert objects(value) == []


@given(JSON)
def test_whatever_it_is_given_is_objects_or_nothing(value: Any) -> None:
    for way in (value, {"Records": [value]}, {"s3": value}, {"source": "aws.s3", "detail": value}):
        if isinstance(way, Mapping):
            assert all(isinstance(found, Object) for found in objects(way))


# --------------------------------------------------------------------------- in a lane


class Store:
    """As much of a context as ``located`` asks: a bucket of objects, by URL, with their ETags."""

    def __init__(self, **there: str) -> None:
        self._there = {url_of(key): etag for key, etag in there.items()}
        self.asked: list[str] = []

    async def head(self, url: str) -> ObjectInfo | None:
        """See ``Context.head``."""
        self.asked.append(unquote(url.removeprefix("s3://bucket/")))
        return ObjectInfo(url, etag=self._there[url]) if url in self._there else None


@pytest.mark.parametrize(
    ("there", "key", "asked"),
    [
        ({"a+b": '"e"'}, "a+b", ["a+b"]),
        ({"a b": '"e"'}, "a b", ["a+b", "a b"]),
        ({"a+b": '"e"', "a b": '"e"'}, "a+b", ["a+b"]),
        ({"a+b": '"other"', "a b": '"e"'}, "a b", ["a+b", "a b"]),
        ({"a+b": '"other"', "a b": '"another"'}, "a+b", ["a+b", "a b"]),
        ({"a+b": ""}, "a+b", ["a+b"]),
        ({"a+b": '"other"'}, "a+b", ["a+b", "a b"]),
        ({"a b": '"other"'}, "a b", ["a+b", "a b"]),
        ({}, "a+b", ["a+b", "a b"]),
    ],
)
async def test_the_key_as_it_came_goes_first_and_decoded_where_it_is_missing(
    there: dict[str, str], key: str, asked: list[str]
) -> None:
    (told,) = objects(bridged("a+b"))
    store = Store(**there)
    found = await told.located(store)  # type: ignore[arg-type]  # all of a context that it asks
    assert found == Object(url_of(key), '"e"', 3, "", "created", "0A")
    assert store.asked == asked


async def test_a_key_whose_encoding_is_known_costs_no_request() -> None:
    (told,) = objects(s3("a%2Bb"))
    store = Store()
    assert await told.located(store) == told  # type: ignore[arg-type]  # all of a context that it asks
    assert store.asked == []


def test_a_lane_finds_the_same_objects_whichever_way_they_were_told() -> None:
    seen: list[list[Object]] = []
    lane = Lane("toy")

    @lane.stage(on=lane.triggered)
    async def find(event: Event, ctx: Context) -> None:
        seen.append([await found.located(ctx) for found in objects(event)])

    record = s3("drops/a+b%2B.csv")
    for way in ways(record):
        with function(lane) as call:
            answer = call(way, LONG)
            assert answer.get("batchItemFailures", []) == []
            assert failed(call(sqs(sns({"Records": [record]})), LONG)) == []
    assert seen == [[Object("s3://bucket/drops/a%20b+.csv", '"e"', 3, "", "created", "0A")]] * len(
        ways(record)
    )
