"""Queues on SQS: one for each stage, and one for what it gave up."""

from flowlane_aws.queue.queue import Queues

__all__ = ["Queues"]
