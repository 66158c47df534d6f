"""Records of a stream are applied by workers that are killed, while one of its shards is split."""

from pathlib import Path

import pytest

from tests.kills.channel import ChannelCampaign

pytestmark = pytest.mark.long

pytest.importorskip("flowlane_aws", reason="the plugin for AWS is not installed")


def test_every_change_is_applied_once_and_in_order_kill_after_kill(tmp_path: Path) -> None:
    campaign = ChannelCampaign(tmp_path, records=60_000, keys=1_000, seed=1)
    campaign.run(timeout=240, pause=1.0)
    assert campaign.kills > 0
    assert campaign.split
