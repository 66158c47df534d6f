"""The bytes of an object in S3, as a stream: pinned to an ETag, taken up where it broke off.

What comes is believed only if it says that it is what was asked for: status 206 and a Content-Range that
begins where the reader stands (a 200 is read from its beginning, and what was not asked for is dropped), the
ETag and the size of the object that was pinned.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError

from flowlane.clock import Clock
from flowlane.errors import Incomplete, Permanent, Retryable, Superseded
from flowlane.ports import ObjectInfo
from flowlane_aws.clients import PATIENCE, asking, status_of
from flowlane_aws.s3.names import Place

#: A body may break off this often with less than so many bytes read in between.
MAX_RESUMES: Final = 5
PROGRESS: Final = 1 << 20
#: Blocks are handed out as they come; smaller ones than this are put together, for so many seconds.
_WORTH: Final = 64 << 10
_PATIENCE: Final = 1.0

#: How a body breaks off: aiohttp's errors pass through the SDK (a payload that is cut is no botocore error).
_BROKEN: Final = (aiohttp.ClientError, BotoCoreError, OSError, TimeoutError)
_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
#: Answers to GET that are not errors here; their codes where the error has a body, and their statuses.
PASSING: Final = ("NoSuchKey", "404", "PreconditionFailed", "412", "InvalidRange", "416")


class Wanted(NamedTuple):
    """What a reader asked for: [start, end) of the object, with that ETag where one is given."""

    place: Place
    start: int
    end: int | None
    etag: str


class S3Body:
    """See ``ports.Body``. Holds one answer at a time; ``close`` gives its connection back."""

    proven_length = True  # S3 says how long an object is, and every answer what part of it

    def __init__(self, client: Any, clock: Clock, wanted: Wanted) -> None:
        self._client = client
        self._clock = clock
        self._wanted = wanted
        self._url = wanted.place.url
        self._position = wanted.start
        self._body: Any = None  # aiobotocore's StreamingBody
        self._skip = 0  # bytes of the answer before what was asked for
        self._stop = -1  # where the answer ends, in the object
        self._version = ""
        self._info = ObjectInfo(self._url, etag=wanted.etag)

    @property
    def info(self) -> ObjectInfo:
        """See ``Body.info``."""
        return self._info

    def close(self) -> None:
        """Let go of the connection; one whose body was not read to its end is closed. (A body that is not
        closed keeps its place in the pool for good.)"""
        body, self._body = self._body, None
        if body is not None:
            body.close()

    async def open(self) -> None:
        """Ask for what is wanted, from the position reached on, and take nothing for it that is not it.

        Raises:
            Superseded: it is another object now, and what it was can no longer be had.
            Incomplete: there is no object, or not as much of it; or the answer is not what was asked for.
        """
        self.close()
        try:
            await self._ask("")
        except Superseded:
            # In a bucket that keeps versions, what the reading began with may still be there.
            if not self._version or not await self._asked_again():
                raise

    async def _asked_again(self) -> bool:
        try:
            await self._ask(self._version)
        except Exception:  # noqa: BLE001  # gone, or not allowed: that it was replaced is what there is to say
            return False
        return True

    async def _ask(self, version: str) -> None:
        place, end = self._wanted.place, self._wanted.end
        asked: dict[str, str] = {"Bucket": place.bucket, "Key": place.key}
        if self._position or end is not None:
            last = "" if end is None else str(max(end - 1, self._position))
            asked["Range"] = f"bytes={self._position}-{last}"
        if self._info.etag:
            asked["IfMatch"] = self._info.etag
        if version:
            asked["VersionId"] = version
        try:
            async with asking(f"reading {self._url}", passing=PASSING):
                answer = await self._client.get_object(**asked)
        except ClientError as error:
            await self._refused(error)
            return
        self._body = answer["Body"]
        self._accept(answer)

    async def _refused(self, error: ClientError) -> None:
        status = status_of(error)
        if status == 412:
            raise Superseded(
                f"{self._url}: the object is no longer the one with ETag {self._info.etag}"
            ) from None
        if status == 404:
            raise Incomplete(f"{self._url}: the object is gone") from None
        # 416: nothing from the position on. That is an empty rest if the object ends there.
        found = await describe(self._client, self._wanted.place, self._info.etag)
        if found is None or found.size != self._position or self._info.size not in (-1, self._position):
            raise Incomplete(f"{self._url}: the object has no byte {self._position:,}") from None
        self._info, self._stop = found, self._position

    def _accept(self, answer: Any) -> None:
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        length = answer.get("ContentLength", -1)
        first, stop, total = 0, length, length
        if status == 206:
            said = answer.get("ContentRange", "")
            match = _RANGE.fullmatch(said)
            if match is None:
                raise Incomplete(f"{self._url}: status 206 with Content-Range {said[:80]!a}")
            first, stop, total = int(match[1]), int(match[2]) + 1, int(match[3])
        elif status != 200:
            raise Permanent(f"{self._url}: status {status} where 200 or 206 was expected")
        if length < 0 or not first <= stop <= total or length != stop - first:
            raise Incomplete(
                f"{self._url}: an answer of {length:,} bytes claims to be {first:,} to {stop:,} of {total:,}"
            )
        if first > self._position or (first and first != self._position):
            raise Incomplete(f"{self._url}: asked from byte {self._position:,}, answered from {first:,}")
        self._pin(info_of(self._wanted.place, answer, total))
        # Range ignored (200): what was asked for follows what must be dropped.
        self._skip, self._stop = self._position - first, stop
        self._version = str(answer.get("VersionId") or "")

    def _pin(self, found: ObjectInfo) -> None:
        pinned = self._info
        if pinned.etag and found.etag != pinned.etag:
            if not found.etag:
                raise Incomplete(f"{self._url}: the answer has no ETag, {pinned.etag} was asked for")
            raise Superseded(f"{self._url}: the object's ETag is {found.etag}, no longer {pinned.etag}")
        if pinned.size not in (-1, found.size):
            raise Incomplete(f"{self._url}: {found.size:,} bytes, {pinned.size:,} before, with one ETag")
        self._info = found

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """See ``Body.__aiter__``."""
        failures = progress = 0
        while not self._reached():
            block, over = await self._next()
            if block:
                self._position += len(block)
                progress += len(block)
                yield block
            if over and not self._reached():
                failures = 1 if progress >= PROGRESS else failures + 1
                progress = 0
                await self._resume(over, failures)

    def _reached(self) -> bool:
        """Whether all that was asked for has been handed out."""
        end = self._wanted.end
        return self._position >= (self._info.size if end is None else min(end, self._info.size))

    async def _next(self) -> tuple[bytes, str]:
        """A block, and why there is no more to come (empty while there is)."""
        parts: list[bytes] = []
        over = ""
        try:
            await self._gather(parts)
        except _BROKEN as error:
            over = (" ".join(str(error).split()) or type(error).__name__)[:200]
        if not parts and not over:
            over = "the body ended"
        block = self._cut(parts[0] if len(parts) == 1 else b"".join(parts))
        if self._stop < self._position + len(block):
            raise Incomplete(f"{self._url}: more bytes came than the answer announced")
        return block, over

    async def _gather(self, parts: list[bytes]) -> None:
        """Read a block into `parts`, less at the end or if it comes slowly; what came before an error stays
        there."""
        size, began = 0, self._clock.monotonic()
        while size < _WORTH and (not size or self._clock.monotonic() - began < _PATIENCE):
            async with asyncio.timeout(PATIENCE):
                # As it came (aiohttp's stream): the SDK's ``read`` copies it together once more.
                part, chunk_ended = await self._body.content.readchunk()
            if part:
                parts.append(part)
                size += len(part)
            elif not chunk_ended:
                return

    def _cut(self, block: bytes) -> bytes:
        """`block` without what was not asked for."""
        dropped = min(self._skip, len(block))
        self._skip -= dropped
        end = self._wanted.end
        room = len(block) if end is None else max(end - self._position, 0)
        return block[dropped : dropped + room] if dropped or room < len(block) else block

    async def _resume(self, why: str, failures: int) -> None:
        """Ask for the rest, as often as ``MAX_RESUMES`` allows after `failures` in a row."""
        where = f"{self._url}: cut at byte {self._position:,} of {self._info.size:,}: {why}"
        while failures <= MAX_RESUMES:
            await self._clock.sleep(self._clock.random() * min(0.1 * 2**failures, 3.0))
            try:
                return await self.open()
            except Incomplete:
                raise
            except Retryable as error:
                failures += 1
                where = f"{where}; then {error}"[:1000]
        raise Incomplete(f"{where}; gave up after {MAX_RESUMES} resumes without progress")


async def describe(client: Any, place: Place, etag: str = "") -> ObjectInfo | None:
    """The object at `place`, with `etag` if one is given; ``None`` if there is none.

    Raises:
        Superseded: it has another ETag.
    """
    asked = {"Bucket": place.bucket, "Key": place.key} | ({"IfMatch": etag} if etag else {})
    try:
        async with asking(f"looking for {place.url}", passing=(*PASSING, "400")):
            try:
                answer = await client.head_object(**asked)
            except ClientError as error:
                if status_of(error) != 400:
                    raise
                # An answer to HEAD has no body that could say why (a token that has expired, the wrong
                # region): the answer to GET has.
                answer = await client.get_object(**asked, Range="bytes=0-0")
                answer["Body"].close()
                return None if "ContentRange" not in answer else _by_range(place, answer)
    except ClientError as error:
        if status_of(error) == 412:
            raise Superseded(f"{place.url}: the object is no longer the one with ETag {etag}") from None
        if status_of(error) == 404:
            return None
        raise Permanent(f"looking for {place.url}: refused ({error})") from None
    return info_of(place, answer, answer["ContentLength"])


def _by_range(place: Place, answer: Any) -> ObjectInfo:
    return info_of(place, answer, int(answer["ContentRange"].rpartition("/")[2]))


def info_of(place: Place, answer: Any, size: int) -> ObjectInfo:
    """What an answer, or an entry of a listing, says of the object. Not its type: a listing does not know it,
    and one object has one description."""
    modified = answer.get("LastModified")
    return ObjectInfo(
        url=place.url,
        size=size,
        etag=answer.get("ETag") or "",
        modified=f"{modified:%Y-%m-%dT%H:%M:%SZ}" if modified is not None else "",
    )
