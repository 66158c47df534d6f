"""S3 as a store: pinned and resumed reads, and uploads in parts that appear at once."""

from flowlane_aws.s3.store import open_store

__all__ = ["open_store"]
