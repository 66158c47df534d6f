"""kill -9 at the worst moments: nothing lost, nothing doubled, the bookmark right."""

from pathlib import Path

import pytest

from tests.kills.campaign import Campaign

pytestmark = pytest.mark.long


def test_two_workers_on_one_file_survive_fifty_kills(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, hours=2400, seed=1)
    campaign.run(kills=50, seconds=200)
    assert sum(campaign.hits.values()) >= 50, (campaign.hits, campaign.misses)
    assert all(campaign.hits[phase] >= 5 for phase in ("effect", "commit", "ack")), campaign.hits
