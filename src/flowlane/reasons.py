"""What becomes of a unit goes by one error, and what is said of it is one line: its reason."""

from __future__ import annotations

import re
from pathlib import Path
from sysconfig import get_path
from traceback import walk_tb
from typing import Final

from flowlane.deadline import Interrupted
from flowlane.errors import ConfigError, Fenced, Permanent, Retryable, Superseded
from flowlane.veil import conceal

#: Of several errors at once the first of these kinds says what becomes of the unit.
_DECISIVE: Final = (Fenced, ConfigError, Permanent, Superseded, Retryable, Interrupted)
#: Where libraries lie, and what lies nowhere (``<string>``).
_LIBRARIES: Final = (*{get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}, "<")
#: The modules of flowlane and its plugins; those of lane files are called ``flowlane_lane_*`` (``compose``).
_OURS: Final = re.compile(r"flowlane(?!_lane_)(_\w+)?(\.|$)")


def leaf(error: BaseException) -> BaseException:
    """What a group of errors (of a handler's ``TaskGroup``) comes down to: the one that decides most, or the
    first where none is known."""
    while isinstance(error, BaseExceptionGroup):
        known = [found for kind in _DECISIVE if (found := error.subgroup(kind)) is not None]
        error = (known[0] if known else error).exceptions[0]
    if isinstance(error, SystemExit):  # of one unit's code: no reason for all the others to end
        said = f"the stage called sys.exit({error.code!r}) in the middle of its work"
        return Permanent(f"{said}: raise Permanent(...) there")
    return error


def describe(error: BaseException) -> str:
    """`error` as one line for the log: typed errors speak for themselves, others say their type too, where
    in the user's code they were raised, and what was noted on their way."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001  # of the user's own making
        said = ""
    # Text that UTF-8 cannot hold, such as a file's undecodable name, would make the event that tells of it
    # impossible, and its unit with it.
    said = conceal(said.encode("utf-8", "backslashreplace").decode())
    text = " ".join(said.split()) or type(error).__name__
    if not isinstance(error, Permanent | Retryable | ConfigError | Superseded | Fenced | Interrupted):
        text = f"{type(error).__name__}: {text[:900]}{_place(error)}"
    return text[:1000]


def _place(error: BaseException) -> str:
    """The innermost line that is neither flowlane's nor a library's, by the name of its file, and the notes
    of `error`; empty if nothing is known."""
    place = ""
    for frame, line in walk_tb(error.__traceback__):
        code, module = frame.f_code, str(frame.f_globals.get("__name__"))
        if not code.co_filename.startswith(_LIBRARIES) and not _OURS.match(module):
            place = f"{Path(code.co_filename).name}, line {line}, in {code.co_name}"
    known = "; ".join(filter(None, [place, *map(str, getattr(error, "__notes__", ()))]))
    said = conceal(known.encode("utf-8", "backslashreplace").decode())
    return f" ({' '.join(said.split())})" if said else ""
