"""The errors of flowlane, as one small tree; code branches on the class, never on text.

::

    FlowlaneError
    ├── ConfigError           the user's settings, lane, URI or file are wrong: exit code 2, one line
    │   └── PluginError       a plugin failed to load or collides with another; names the plugin
    ├── Retryable             may go right later: retried by the stage's policy, then the unit is dead
    │   ├── Unauthorized      the credentials were refused: their secrets are fetched anew before that
    │   └── Incomplete        a body ended before its end
    │       └── Damaged       the whole body is there, and is not what it claims to be: begin afresh
    ├── Permanent             will not go right by itself: the unit is dead at once, with the reason
    │   ├── Refused           an archive or an entry of one that is not read: the message says why
    │   └── BadRecord         one record is bad: it goes to quarantine, the rest goes on
    ├── Superseded            the object read is no longer the one that was registered
    └── Fenced                another attempt has taken the unit over; whatever this one does is refused
        └── VersionConflict   the log's answer to an append whose expected version is not the head

Unknown exceptions count as ``Retryable`` until the stage's budget is spent. Every message says what
went wrong, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit


class FlowlaneError(Exception):
    """Root of the tree; ``str(error)`` is one line fit for a user."""


class ConfigError(FlowlaneError):
    """A setting, lane, URI or file is wrong; nothing was started or changed."""


class PluginError(ConfigError):
    """A plugin failed to load, or registers what another one has registered already."""


class Retryable(FlowlaneError):
    """The same call may succeed later. ``delay`` (seconds) is the least to wait, e.g. a Retry-After."""

    def __init__(self, message: str, *, delay: float | None = None) -> None:
        super().__init__(message)
        self.delay = delay


class Unauthorized(Retryable):
    """The other side refuses the credentials, which may have been rotated since they were fetched.

    Raised by whoever opens something, or by what was opened. Where they came by secret reference, they are
    fetched anew: opening is tried again at once, anything else by the stage's policy.
    """


class Incomplete(Retryable):
    """A body that ended before its end; what came so far may be built upon."""


class Damaged(Incomplete):
    """A body that decoding refutes: truncated at its source, corrupt, or not of the kind its name promises.

    Nothing of it may be built upon.
    """


class Permanent(FlowlaneError):
    """No retry will help; the unit ends dead and waits for ``redrive``."""


class Refused(Permanent):
    """An entry of an archive (or an archive, beyond its limits) that is not read, for a reason that will not
    pass by itself: an unsafe name, a method that nobody here knows, a bomb. Its other entries are."""


class BadRecord(Permanent):
    """Raised by a ``map`` function (or a parser) to quarantine one record; the others go on."""


class Superseded(FlowlaneError):
    """The object was replaced since it was registered (its ETag changed); the unit settles as superseded."""


class Fenced(FlowlaneError):
    """This attempt has been overtaken; a sink, a store or the log refused its write. Nothing was applied."""


class VersionConflict(Fenced):
    """An append expected a version that is not the stream's head; nothing of its commit was applied.

    ``heads`` maps each conflicting stream to the head version found (0: the stream does not exist).
    """

    def __init__(self, heads: Mapping[str, int]) -> None:
        super().__init__("version conflict on " + ", ".join(f"{s} (head {v})" for s, v in heads.items()))
        self.heads = dict(heads)


def redact(uri: str) -> str:
    """`uri` fit for messages: without user, password and query, any of which may hold a secret."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri.partition("?")[0].rpartition("@")[2]
    try:
        parts = urlsplit(uri, allow_fragments=False)  # a file's name may hold a number sign
        _ = parts.port  # a password with a character that should be encoded ends the host in its middle
    except ValueError:
        return f"{scheme.rpartition('@')[2]}://..."
    if not parts.scheme:
        return f"{rest.partition('?')[0].rpartition('@')[2]}"
    host = parts.netloc.rpartition("@")[2]
    # Not by urlunsplit: it makes sqlite:/path of sqlite:///path.
    return f"{parts.scheme}://{host}{parts.path}"
