"""Who takes and asks for what: the edges of ``plan``."""

from __future__ import annotations

import pytest

from flowlane.shards.balance import View, plan
from flowlane.shards.leases import Lease

HOLD = 30.0


def view(
    shard: str,
    owner: str = "",
    still: float = 0.0,
    pending: float | None = None,
    wanted: str = "",
    asked: float | None = None,
) -> View:
    return View(shard, Lease(owner, wanted=wanted), still, pending, asked)


def test_what_is_free_everybody_takes_its_share() -> None:
    free = [view(f"s{n}") for n in range(4)]
    assert plan("me", free, HOLD).take == ["s0", "s1", "s2", "s3"]
    assert plan("me", [*free, view("x", "other"), view("y", "other")], HOLD).take == ["s0", "s1", "s2"]


def test_what_nobody_takes_is_anybodys() -> None:
    views = [view("mine", "me"), view("theirs", "other"), view("a", still=9.9), view("b", still=10.0)]
    assert plan("me", [*views[:2], views[2]], HOLD).take == ["a"]
    views = [view("m1", "me"), view("m2", "me"), view("theirs", "other"), views[2], views[3]]
    assert plan("me", views, HOLD).take == ["a", "b"]
    views.insert(0, view("m3", "me"))
    assert plan("me", views, HOLD).take == ["b"]


@pytest.mark.parametrize(
    ("still", "pending", "asked", "taken"),
    [
        (29.9, 29.0, None, False),
        (30.0, 10.0, None, True),
        (30.0, 9.9, None, False),
        (1e6, None, None, False),
        (30.0, None, 29.9, False),
        (30.0, None, 30.0, True),
    ],
)
def test_who_should_have_been_heard_of_has_vanished(
    still: float, pending: float | None, asked: float | None, taken: bool
) -> None:
    wanted = "me" if asked is not None else ""
    views = [view("theirs", "other", still, pending, wanted, asked), view("mine", "me")]
    assert list(plan("me", views, HOLD).take) == (["theirs"] if taken else [])


def test_who_vanished_loses_all_that_stands_still() -> None:
    views = [view("a", "gone", 30.0, 10.0), view("b", "gone", 31.0), view("c", "gone", 29.0)]
    assert plan("me", views, HOLD).take == ["a", "b"]


def test_half_of_the_difference_is_asked_for() -> None:
    views = [view(f"s{n}", "other") for n in range(5)]
    assert len(plan("me", views, HOLD).ask) == 2
    assert plan("me", [view("a", "one"), view("b", "two")], HOLD).ask == []
    uneven = [view("a", "one"), view("b", "one"), view("c", "two")]
    (asked,) = plan("me", uneven, HOLD).ask
    assert asked in ("a", "b")


def test_what_somebody_asks_for_is_as_good_as_gone() -> None:
    views = [view("a", "one", wanted="two", asked=1.0), view("b", "one")]
    assert plan("me", views, HOLD).ask == []


def test_who_starves_asks_for_what_waits_and_does_not_move() -> None:
    views = [view("a", "one", still=10.0, pending=0.0), view("mine", "me")]
    assert plan("me", views, HOLD).ask == []
    assert plan("me", views, HOLD, starving=True).ask == ["a"]
    assert plan("me", [view("a", "one", 9.9, 0.0), views[1]], HOLD, starving=True).ask == []
    assert plan("me", [view("a", "one", 10.0), views[1]], HOLD, starving=True).ask == []
