"""Workers and a Lambda function share queues, log and lake on AWS, and are killed all the time."""

from pathlib import Path

import pytest

from tests.kills.aws import AwsCampaign
from tests.kills.aws_drops import AwsDrops

pytestmark = pytest.mark.long

pytest.importorskip("awslambdaric", reason="awslambdaric is not installed (it has wheels for Linux only)")


def test_three_workers_and_a_function_survive_kill_after_kill(tmp_path: Path) -> None:
    campaign = AwsCampaign(tmp_path, hours=24, seed=1)
    campaign.run(seconds=5)
    assert campaign.killed.total() == 5
    assert campaign.done_by_function > 0


def test_drops_are_loaded_in_effect_in_order_kill_after_kill(tmp_path: Path) -> None:
    campaign = AwsDrops(tmp_path, seed=1)
    campaign.run(seconds=5)
    assert campaign.killed.total() == 5
    assert campaign.done_by_function > 0
