"""Keys, URLs and patterns: keys are data, however odd; listings come in order of URL, however many."""

from __future__ import annotations

import re
from datetime import UTC

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlane.errors import ConfigError
from flowlane.testing.store_suite import fetch
from flowlane_aws.s3 import store as s3
from flowlane_aws.s3.names import Pattern, Place, is_plain, place_of
from tests.s3_stores import BASE, BUCKET, opened

keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


@given(keys)
def test_a_url_names_one_key(key: str) -> None:
    place = Place(BUCKET, key)
    assert place_of(place.url) == place
    assert place.url.isascii()
    assert is_plain(key) == (place.url == f"s3://{BUCKET}/{key}")


@given(keys.filter(lambda key: not key.endswith("/")))
def test_a_url_is_a_pattern_of_itself_alone(key: str) -> None:
    pattern = Pattern.of(Place(BUCKET, key).url)
    assert pattern.prefix == key
    assert pattern.fits(key)
    assert not pattern.fits(key + "x")


_SEGMENTS = ["a", "b", "ab", "*", "**", "a*", "*b", "?", "[ab]", "[!a]", ""]
_NAMES = ["a", "b", "ab", "ba", "c", ""]


def _oracle(segments: list[str]) -> re.Pattern[str]:
    """The pattern as one regular expression."""
    spelled = {"*": "[^/]*", "?": "[^/]", "[ab]": "[ab]", "[!a]": "[^a/]"}
    out = ""
    for number, segment in enumerate(segments):
        last = number == len(segments) - 1
        if segment == "**":
            out += ".*" if last else "(?:[^/]*/)*"
        else:
            out += spelled.get(segment, segment.replace("*", "[^/]*")) + ("" if last else "/")
    return re.compile(out, re.DOTALL)


@given(
    st.lists(st.sampled_from(_SEGMENTS), min_size=1, max_size=5).filter(lambda s: s[-1] != ""),
    st.lists(st.sampled_from(_NAMES), min_size=1, max_size=6),
)
def test_patterns_fit_what_the_shell_would_have_them_fit(segments: list[str], names: list[str]) -> None:
    pattern, key = Pattern.of(f"s3://{BUCKET}/{'/'.join(segments)}"), "/".join(names)
    expected = _oracle(segments).fullmatch(key) is not None and not key.endswith("/")
    assert pattern.fits(key) == expected
    assert not expected or key.startswith(pattern.prefix)


@pytest.mark.parametrize(
    ("url", "prefix"),
    [
        ("s3://b-1/2024-*.csv", "2024-"),
        ("s3://b-1/a/b[12]/c", "a/b"),
        ("s3://b-1/a%2A/*", "a*/"),
        ("s3://b-1/a/", "a/"),
        ("s3://b-1", ""),
        ("s3://b-1/**/x", ""),
    ],
)
def test_listings_ask_for_the_longest_prefix(url: str, prefix: str) -> None:
    assert Pattern.of(url).prefix == prefix


@pytest.mark.parametrize(
    "url", ["b/c", "file:///a", "s3:/b/c", "s3://", "s3://%62/c", "s3://b!/c", "s3://b-1/%FF"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^bad URL"):
        place_of(url)
    with pytest.raises(ConfigError, match=r"^bad URL"):
        Pattern.of(url)


@pytest.mark.parametrize(
    "key",
    [
        "a b",
        "a%20b",
        "a+b",
        "a%2Bb",
        "ü",
        "🎈",
        "a//b",
        "a/./b",
        "a/../b",
        "*",
        "a?b",
        "[x]",
        "#",
        "x\ty",
        '&<>"',
    ],
)
async def test_odd_keys_round_trip(ministack: str, key: str) -> None:
    url = Place(BUCKET, "deep/" + key).url
    async with opened() as store:
        async with store.upload(url, owner="one") as upload:
            await upload.write(key.encode())
            await upload.commit()
        assert [info.url async for info in store.list(BASE)] == [url]
        assert [info.url async for info in store.list(url)] == [url]
        listed = await store._client.list_objects_v2(Bucket=BUCKET)
        assert [entry["Key"] for entry in listed["Contents"]] == ["deep/" + key]
        assert await fetch(store, url) == key.encode()


@pytest.mark.parametrize("held", [3, 10_000])
async def test_long_listings_come_in_order_of_url(
    ministack: str, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """More than are held in memory, over several pages; folders' markers are no objects."""
    monkeypatch.setattr(s3, "HELD", held)
    monkeypatch.setattr(s3, "PAGE", 4)
    names = ["a", "a b", "a!b", "a&b", "a0", "b/c", "b/ü", "~", "ä", "é/x", "{", "z/z/z", "z z"]
    async with opened() as store:
        for name in [*names, "b/", "marker/"]:
            await store._client.put_object(Bucket=BUCKET, Key="deep/" + name, Body=b"x")
        urls = [info.url async for info in store.list(BASE + "**")]
        assert urls == sorted(Place(BUCKET, "deep/" + name).url for name in names)
        assert [info.url async for info in store.list(BASE + "nothing*")] == []


async def test_a_page_of_a_listing_does_not_hold_up_the_loop(ministack: str) -> None:
    """The SDK parses an answer on the loop; by default 1,000 objects take it 60 ms, most of that dates."""
    async with opened() as store:
        await store._client.put_object(Bucket=BUCKET, Key="deep/a", Body=b"x")
        answer = await store._client.list_objects_v2(Bucket=BUCKET)
        moment = answer["Contents"][0]["LastModified"]
        assert moment.tzinfo is UTC, "parsed by datetime itself, not by trying out formats"
        head = await store.head(BASE + "a")
        assert [info async for info in store.list(BASE)] == [head]
