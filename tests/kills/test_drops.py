"""kill -9 of whoever loads drops of the same tables: the tables are as loaded in order, and once."""

from pathlib import Path

import pytest

from tests.kills.drops import DropsCampaign

pytestmark = pytest.mark.long


def test_drops_out_of_order_and_doubled_under_kills(tmp_path: Path) -> None:
    campaign = DropsCampaign(tmp_path, seed=1)
    campaign.run(kills=12, seconds=200)
    assert sum(campaign.hits.values()) >= 12, (campaign.hits, campaign.misses)
    assert all(campaign.hits[phase] >= 2 for phase in ("effect", "commit", "ack")), campaign.hits
    assert campaign.doubled > 0
    assert campaign.inversions > 0, "no drop was loaded before an older one: nothing was shown"
