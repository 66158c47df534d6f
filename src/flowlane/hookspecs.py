"""All hooks of flowlane, in one file. A plugin implements them and registers under the entry-point group
``flowlane``::

    # pyproject.toml of the plugin
    [project.entry-points.flowlane]
    aws = "flowlane_aws.plugin"

    # flowlane_aws/plugin.py (imports no SDK)
    from flowlane.hookspecs import Provides, hookimpl

    @hookimpl
    def flowlane_provides():
        return [Provides("store", "s3", "flowlane_aws.s3.store:open_store")]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import pluggy

#: The version of these hooks; a plugin made for another one is refused with a message that says so.
API = 1

Kind = Literal["backend", "store", "source", "sink", "notifier", "secrets"]

hookspec = pluggy.HookspecMarker("flowlane")
hookimpl = pluggy.HookimplMarker("flowlane")


class Provides(msgspec.Struct, frozen=True):
    """URIs of `scheme` are opened as `kind` by the factory at the dotted `path` (``module:attribute``).

    The module is imported when the first such URI is opened. The factory's convention is that of
    ``ports.Environment``. ``query="data"``: the query belongs to the URI (as in HTTP) and holds no options.
    """

    kind: Kind
    scheme: str
    path: str
    query: Literal["options", "data"] = "options"
    api: int = API


@hookspec
def flowlane_provides() -> Sequence[Provides]:  # type: ignore[empty-body]  # pluggy collects the plugins' answers
    """What the plugin opens, by kind and scheme; called once by the composition root."""
