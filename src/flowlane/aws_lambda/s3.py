"""What S3 tells of its objects, the same whichever way it came: ``objects(event)``, without I/O.

S3 tells a bucket's notifications by records (to Lambda itself, to SNS and SQS, and through both of these) and
by EventBridge events; keys are URL-encoded in the first (S3 user guide, "Event message structure") and come
raw in the second, which is nowhere promised: ``Object.located`` finds out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal
from urllib.parse import quote, unquote_plus

import msgspec

from flowlane.events import Event
from flowlane.ports import Context, ObjectInfo

Change = Literal["created", "removed", "restored", "other"]

_BY_RECORD: Final[Mapping[str, Change]] = {
    "ObjectCreated": "created",
    "ObjectRemoved": "removed",
    "LifecycleExpiration": "removed",
    "ObjectRestore:Completed": "restored",
}
_BY_BRIDGE: Final[Mapping[str, Change]] = {
    "Object Created": "created",
    "Object Deleted": "removed",
    "Object Restore Completed": "restored",
}
#: What stands in a key's URL as it is: an object has one URL only, so that it is one unit.
_PLAIN: Final = "/!$&'()+,;=:@~"
#: S3 in SNS in SQS in Lambda's own envelope is four; more is no way that AWS offers.
_NESTED: Final = 6


class Object(msgspec.Struct, frozen=True):
    """An object that S3 told of. ``url`` (``s3://bucket/key``) and ``etag`` (in quotes) are as the store has
    them, so that the same object is the same unit whether it was listed or told of.

    What S3 did not tell is empty (a ``size``: -1): a removed object has neither ETag nor size, one in a
    bucket without versions no ``version``. ``change`` says what became of it; ``sequencer`` orders the
    changes of one key (right-padded with zeros to one length, then as text). ``other`` is the URL under
    which it is if there is none under ``url``: see ``located``.
    """

    url: str
    etag: str = ""
    size: int = -1
    version: str = ""
    change: Change = "created"
    sequencer: str = ""
    other: str = ""

    async def located(self, ctx: Context) -> Object:
        """This object under the URL that it has. The store is asked only where the key may be meant encoded:
        the key as it came goes first, decoded it is tried where that is missing, or is another object by its
        ETag. If neither is there (any more), ``url`` stays: whoever reads it is told.

        Raises:
            Retryable, Permanent: as ``ctx.head``.
        """
        if not self.other:
            return self
        found = await ctx.head(self.url)
        if found is not None and self._is(found):
            return msgspec.structs.replace(self, other="")
        decoded = await ctx.head(self.other)
        if decoded is not None and (found is None or self._is(decoded)):
            return msgspec.structs.replace(self, url=self.other, other="")
        return msgspec.structs.replace(self, other="")

    def _is(self, found: ObjectInfo) -> bool:
        return not (self.etag and found.etag) or self.etag.strip('"') == found.etag.strip('"')


def objects(event: Event | Mapping[str, Any]) -> list[Object]:
    """The objects that `event` tells of, in its order; none if it is about anything else (a schedule, say).

    `event` is what a stage on ``lane.triggered`` is given, its ``event.data.event``, or any Lambda event,
    with S3's own in SNS, in SQS, or in both.
    """
    outer = getattr(event.data, "event", None) if isinstance(event, Event) else event
    return [found for record in s3_records(outer) if (found := told(record)) is not None]


def s3_records(value: Any, depth: int = _NESTED) -> Iterator[Mapping[str, Any]]:
    """S3's own records and EventBridge events anywhere in `value`."""
    if depth == 0:
        return
    if isinstance(value, str):
        yield from s3_records(_json(value), depth)
    elif isinstance(value, Mapping):
        if isinstance(value.get("s3"), Mapping) or value.get("source") == "aws.s3":
            yield value
        elif isinstance(records := value.get("Records"), list):
            for record in records:
                yield from s3_records(record, depth - 1)
        else:
            for name in ("body", "Sns", "Message"):
                if isinstance(value.get(name), str | Mapping):
                    yield from s3_records(value[name], depth - 1)


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):  # of msgspec (its DecodeError) and of Unicode
        return None


def told(record: Mapping[str, Any]) -> Object | None:
    """The object that S3's `record` (or its EventBridge event) is about; ``None`` if it names none."""
    if record.get("source") == "aws.s3":
        return _of_bridge(record)
    return _of_record(record)


def _of_record(record: Mapping[str, Any]) -> Object | None:
    about, name = _mapping(record, "s3"), _text(record, "eventName").removeprefix("s3:")
    bucket, inner = _text(_mapping(about, "bucket"), "name"), _mapping(about, "object")
    key = unquote_plus(_text(inner, "key"))
    if not bucket or not key:
        return None
    change = _BY_RECORD.get(name) or _BY_RECORD.get(name.partition(":")[0], "other")
    return _object(bucket, key, inner, ("eTag", "versionId"), change)


def _of_bridge(event: Mapping[str, Any]) -> Object | None:
    about = _mapping(event, "detail")
    bucket, inner = _text(_mapping(about, "bucket"), "name"), _mapping(about, "object")
    key = _text(inner, "key")
    if not bucket or not key:
        return None
    change = _BY_BRIDGE.get(_text(event, "detail-type"), "other")
    found = _object(bucket, key, inner, ("etag", "version-id"), change)
    decoded = unquote_plus(key)
    other = "" if decoded == key else _url(bucket, decoded)
    return msgspec.structs.replace(found, other=other)


def _object(
    bucket: str, key: str, inner: Mapping[str, Any], names: tuple[str, str], change: Change
) -> Object:
    etag, size = _text(inner, names[0]).strip('"'), inner.get("size")
    return Object(
        _url(bucket, key),
        f'"{etag}"' if etag else "",
        size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else -1,
        _text(inner, names[1]),
        change,
        _text(inner, "sequencer"),
    )


def _url(bucket: str, key: str) -> str:
    return f"s3://{bucket}/{quote(key, safe=_PLAIN, errors='surrogatepass')}"


def _mapping(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    return found if isinstance(found, str) else ""
