"""What this plugin opens; imports no SDK."""

from __future__ import annotations

from collections.abc import Sequence

from flowlane.hookspecs import Provides, hookimpl


@hookimpl
def flowlane_provides() -> Sequence[Provides]:
    """The backend and the connectors for AWS."""
    return []
