"""What the embedded backends share."""

from __future__ import annotations

from flowlane.backends.common import PARTITIONS, News, partition
from flowlane.testing.units import within


async def test_news_that_came_while_one_looked_are_not_missed() -> None:
    news = News()
    seen = news.count
    news()
    await within(30, news.wait(seen, 60))


async def test_no_news_is_an_end_too() -> None:
    news = News()
    await within(30, news.wait(news.count, 0.001))


def test_a_key_has_the_same_partition_in_every_release() -> None:
    # Changing this would break the order of what stands in files already.
    assert [partition(key) for key in ("", "a", "orders/1", "\u00fc")] == [0, 3, 4, 5]
    assert {partition(str(n)) for n in range(200)} == set(range(PARTITIONS))
