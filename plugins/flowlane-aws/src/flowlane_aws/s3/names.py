"""``s3://bucket/key`` URLs, the keys they name, and the keys that match a pattern.

A key is data. A URL spells it percent-encoded, once: ``s3://b/a%20b`` is the key ``a b``, ``s3://b/a%2520b``
the key ``a%20b``, and a plus is a plus. Nothing else is read into it: no path is resolved, nothing is hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from flowlane.errors import ConfigError

_MAGIC: Final = re.compile(r"[*?\[]")
_ENCODED_MAGIC: Final = re.compile("%(?:2A|3F|5B)", re.IGNORECASE)
#: What may stand in a key's URL as it is: the same as for files, so that names sort and read alike.
_SAFE: Final = "/!$&'()+,;=:@~"
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.\-/!$&'()+,;=:@~]*")
#: Bucket names, and the aliases of access points (the S3 user guide, "Bucket naming rules").
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_LONGEST: Final = 1024  # bytes of a key


class Place(NamedTuple):
    """An object's bucket and key."""

    bucket: str
    key: str

    @property
    def url(self) -> str:
        """The one URL of it."""
        return f"s3://{self.bucket}/{quote(self.key, safe=_SAFE)}"


def is_plain(key: str) -> bool:
    """Whether `key` stands in its URL as it is; such keys sort as their URLs do."""
    return _PLAIN.fullmatch(key) is not None


def place_of(url: str) -> Place:
    """The object that `url` names; ``*``, ``?`` and ``[`` stand for themselves here.

    Raises:
        ConfigError: it names none.
    """
    bucket, path = _split(url)
    key = _decoded(url, path)
    if not key:
        raise ConfigError(f"bad URL {url!a}: it names a bucket and no object: write s3://bucket/key")
    if len(key.encode()) > _LONGEST:
        raise ConfigError(f"bad URL {url!a:.200}: a key has at most {_LONGEST} bytes")
    return Place(bucket, key)


class Pattern(NamedTuple):
    """The keys of a bucket that a listing wants: those below `prefix` whose segments fit."""

    bucket: str
    prefix: str
    segments: Sequence[str]

    @classmethod
    def of(cls, url: str) -> Pattern:
        """The pattern of `url`. One that ends in a slash means everything below it, as ``**`` does.

        Raises:
            ConfigError: it has no bucket, or is not decodable.
        """
        bucket, path = _split(url)
        if not path or path.endswith("/"):
            path += "**"
        first = _MAGIC.search(path)
        prefix = _decoded(url, path[: first.start()] if first else path)
        # What is encoded is meant literally: [*] is how fnmatch spells a star that is one.
        literal = _ENCODED_MAGIC.sub(lambda match: f"[{unquote(match[0])}]", path)
        return cls(bucket, prefix, [_decoded(url, part) for part in literal.split("/")])

    def fits(self, key: str) -> bool:
        """Whether `key` is wanted: ``**`` is any number of segments, the others match one each. What ends in
        a slash is a folder's marker, and no object."""
        if key.endswith("/"):
            return False
        last = len(self.segments) - 1
        names = key.split("/")
        states = self._closed({0})
        for depth, name in enumerate(names):
            here = {i for i in states if self.segments[i] == "**" or fnmatchcase(name, self.segments[i])}
            if depth == len(names) - 1:
                return last in here
            states = self._closed(
                {
                    i if self.segments[i] == "**" else i + 1
                    for i in here
                    if i < last or self.segments[i] == "**"
                }
            )
        return False

    def _closed(self, states: set[int]) -> set[int]:
        """`states`, and those reached over a ``**`` that stands for no segment at all."""
        for i in sorted(states):
            while i < len(self.segments) - 1 and self.segments[i] == "**":
                i += 1  # noqa: PLW2901 - walks on over segments that need not be there
                states.add(i)
        return states


def _split(url: str) -> tuple[str, str]:
    scheme, separator, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme.lower() != "s3" or not separator:
        raise ConfigError(f"bad URL {url!a:.200}: an object's URL reads s3://bucket/key")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"bad URL {url!a:.200}: {bucket!a} is no bucket's name")
    return bucket, path


def _decoded(url: str, text: str) -> str:
    try:
        plain = unquote(text, errors="strict")
        plain.encode()
    except UnicodeError:
        raise ConfigError(f"bad URL {url!a:.200}: a key is UTF-8, and this is not") from None
    return plain
