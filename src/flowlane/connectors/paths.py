"""``file://`` URLs, the paths they name, and the files that match a pattern; synchronous, for a thread.

Names from data are data: a segment never becomes ``..`` and never holds a slash, however it is encoded.
"""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from flowlane.errors import ConfigError

_MAGIC: Final = frozenset("*?[")
_ENCODED_MAGIC: Final = re.compile("%(?:2A|3F|5B)", re.IGNORECASE)
#: What may stand in a path segment as it is (RFC 3986, section 3.3), without what a pattern gives a meaning.
_SAFE: Final = "/!$&'()+,;=:@~"
#: Names sorted in one go: at most about 3 ms without giving way to other threads.
_RUN: Final = 8192


def url_of(path: str | Path) -> str:
    """The one URL of `path`, which is absolute."""
    return "file://" + quote(str(path), safe=_SAFE, errors="surrogateescape")


def segments(url: str) -> list[str]:
    """The path segments of a ``file://`` URL, still encoded.

    Raises:
        ConfigError: it is no URL of a local, absolute, plain path.
    """
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    if scheme.lower() != "file" or not slash:
        raise ConfigError(f"bad URL {url!a}: a file URL reads file:///path, with an absolute path")
    if host not in ("", "localhost"):
        raise ConfigError(f"bad URL {url!a}: file://{host}/ is another host, a local file is file:///path")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    for part in parts:
        plain = unquote(part, errors="surrogateescape")
        if plain in ("..", ".") or "/" in plain or "\0" in plain:
            raise ConfigError(f"bad URL {url!a}: {part!a} is no plain name")
    return [*parts, ""] if path.endswith("/") else parts


def path_of(url: str) -> Path:
    """The path that `url` names; ``*``, ``?`` and ``[`` stand for themselves here.

    Raises:
        ConfigError: see ``segments``.
    """
    return Path("/", *(unquote(part, errors="surrogateescape") for part in segments(url)))


def split_pattern(url: str) -> tuple[Path, list[str]]:
    """The directory before the first segment with ``* ? [``, and the pattern from there on, decoded.

    A URL that ends in a slash means everything below, like ``**``; one without a pattern means itself.

    Raises:
        ConfigError: see ``segments``.
    """
    parts = segments(url) or [""]
    if not parts[-1]:
        parts[-1] = "**"
    first = next((i for i, part in enumerate(parts) if _MAGIC & set(part)), len(parts) - 1)
    directory = Path("/", *(unquote(part, errors="surrogateescape") for part in parts[:first]))
    # What is encoded is meant literally: [*] is how fnmatch spells a star that is one.
    literal = (_ENCODED_MAGIC.sub(lambda match: f"[{unquote(match[0])}]", part) for part in parts[first:])
    return directory, [unquote(part, errors="surrogateescape") for part in literal]


def matches(directory: Path, pattern: Sequence[str]) -> Iterator[os.DirEntry[str]]:
    """The files below `directory` that match `pattern`, in order of URL, as in a shell: ``**`` is any number
    of directories, a leading dot must be named, and links are not followed out of `directory`."""
    last = len(pattern) - 1
    root = os.path.realpath(directory)

    def closed(states: set[int]) -> set[int]:
        for i in sorted(states):
            while i < last and pattern[i] == "**":
                i += 1  # noqa: PLW2901 - walks on over directories that need not be there
                states.add(i)
        return states

    def walk(path: str, states: set[int]) -> Iterator[os.DirEntry[str]]:
        for entry in _sorted(path):
            here = [i for i in states if _fits(entry.name, pattern[i])]
            if entry.is_dir(follow_symlinks=False):
                below = closed(
                    {i if pattern[i] == "**" else i + 1 for i in here if i < last or pattern[i] == "**"}
                )
                if below:
                    yield from walk(entry.path, below)
            elif last in here and _inside(entry, root):
                yield entry

    return walk(str(directory), closed({0}))


def _fits(name: str, segment: str) -> bool:
    if name.startswith(".") and not segment.startswith("."):
        return False
    return segment == "**" or fnmatchcase(name, segment)


def _inside(entry: os.DirEntry[str], root: str) -> bool:
    if entry.is_symlink() and os.path.commonpath([root, os.path.realpath(entry.path)]) != root:
        return False
    return entry.is_file()


def _sorted(path: str) -> Iterator[os.DirEntry[str]]:
    """The entries of a directory so that a walk in this order is one in order of URL; none if it is gone."""
    runs = []
    try:
        with os.scandir(path) as entries:
            while run := list(islice(entries, _RUN)):
                runs.append(sorted(((_key(entry), entry) for entry in run), key=itemgetter(0)))
    except (FileNotFoundError, NotADirectoryError):
        return iter(())
    return (entry for _, entry in heapq.merge(*runs, key=itemgetter(0)))


def _key(entry: os.DirEntry[str]) -> str:
    name = quote(entry.name, safe=_SAFE, errors="surrogateescape")
    return name + "/" if entry.is_dir(follow_symlinks=False) else name
