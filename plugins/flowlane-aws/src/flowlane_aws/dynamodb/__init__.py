"""DynamoDB as a sink: rows that never go back, or plain batches of them."""

from flowlane_aws.dynamodb.factory import open_sink

__all__ = ["open_sink"]
