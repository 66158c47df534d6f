"""What this plugin opens; imports no SDK."""

from __future__ import annotations

from collections.abc import Sequence

from flowlane.hookspecs import Provides, hookimpl


@hookimpl
def flowlane_provides() -> Sequence[Provides]:
    """The backend and the connectors for AWS."""
    return [
        Provides("backend", "aws", "flowlane_aws.backend:open_backend"),
        Provides("store", "s3", "flowlane_aws.s3:open_store", query="data"),
        Provides("source", "s3", "flowlane.connectors.records:open_source"),
        Provides("sink", "s3", "flowlane.connectors.records:open_sink"),
        Provides("sink", "dynamodb", "flowlane_aws.dynamodb:open_sink"),
        Provides("notifier", "sns", "flowlane_aws.sns:open_notifier"),
        Provides("secrets", "secretsmanager", "flowlane_aws.secrets:open_secrets"),
    ]
