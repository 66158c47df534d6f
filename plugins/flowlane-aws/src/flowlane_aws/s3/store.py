"""``s3://`` as a store: objects are listed, read by ranges, and written by multipart uploads.

Region, endpoint and credentials are the SDK's own settings (``AWS_REGION``, ``AWS_ENDPOINT_URL``, profiles,
roles). A bucket in another region is found by the SDK itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Final

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import ConfigError, Fenced
from flowlane.ports import Body, Environment, ObjectInfo, Upload
from flowlane_aws.clients import asking, open_client, status_of
from flowlane_aws.s3.body import S3Body, Wanted, describe, info_of
from flowlane_aws.s3.names import Pattern, Place, is_plain, place_of
from flowlane_aws.s3.parts import Multipart, sent_unhashed, uploads
from flowlane_aws.s3.upload import S3Upload, UploadId

#: Objects that a listing holds in memory to bring them into order.
HELD: Final = 10_000
#: Objects in one answer to a listing: as many as S3 gives.
PAGE: Final = 1000
#: Requests at once: each upload sends 4 parts side by side, each read holds one.
_CONNECTIONS: Final = 64


@asynccontextmanager
async def open_store(uri: str, environment: Environment) -> AsyncIterator[S3Store]:
    """The store of all buckets that the credentials reach. A ``?`` in a URL belongs to a pattern: there are
    no options.

    Raises:
        ConfigError: there is no region.
    """
    async with open_client("s3", connections=_CONNECTIONS) as client:
        client.meta.events.register("before-call.s3", sent_unhashed)
        yield S3Store(client, environment.clock)


class S3Store:
    """See ``ports.Store``; `headers` mean nothing to S3."""

    def __init__(self, client: Any, clock: Clock) -> None:
        self._client = client
        self._clock = clock
        self._buckets: set[str] = set()  # known to exist

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """See ``Store.head``.

        Raises:
            ConfigError: there is no such bucket, or it is not allowed.
        """
        place = place_of(url)
        found = await describe(self._client, place)
        if found is None and place.bucket not in self._buckets:
            await self._look_for(place.bucket)
        self._buckets.add(place.bucket)
        return found

    async def _look_for(self, bucket: str) -> None:
        """An answer to HEAD has no body: it does not say whether object or bucket is missing."""
        try:
            async with asking(f"looking for bucket {bucket}", passing=("404", "403")):
                await self._client.head_bucket(Bucket=bucket)
        except ClientError as error:
            if status_of(error) == 404:
                raise ConfigError(
                    f"s3://{bucket}/: there is no such bucket: create it, or check the name and the account"
                ) from None

    async def list(self, url: str) -> AsyncIterator[ObjectInfo]:
        """See ``Store.list``. Asks for what begins as the pattern does, up to its first ``* ? [``; a URL that
        ends in a slash means everything below it.

        S3 lists in order of key, which is that of URLs but for keys that are encoded in them. What is too
        much to be held and sorted is listed twice: for these, and then for the others, merged.
        """
        pattern = Pattern.of(url)
        held: list[ObjectInfo] = []
        odd: list[ObjectInfo] = []
        async for info, plain in self._matching(pattern):
            if len(held) <= HELD:
                held.append(info)
            if not plain:
                odd.append(info)
        if len(held) <= HELD:
            for info in sorted(held, key=_url):
                yield info
            return
        held.clear()
        odd.sort(key=_url, reverse=True)
        async for info, plain in self._matching(pattern):
            while odd and odd[-1].url < info.url and plain:
                yield odd.pop()
            if plain:
                yield info
        while odd:
            yield odd.pop()

    async def _matching(self, pattern: Pattern) -> AsyncIterator[tuple[ObjectInfo, bool]]:
        """What fits, in order of key, and whether its key is also its URL."""
        asked: dict[str, Any] = {"Bucket": pattern.bucket, "Prefix": pattern.prefix, "MaxKeys": PAGE}
        while True:
            async with asking(f"listing s3://{pattern.bucket}/{pattern.prefix}"):
                answer = await self._client.list_objects_v2(**asked)
            for entry in answer.get("Contents", ()):
                if pattern.fits(entry["Key"]):
                    place = Place(pattern.bucket, entry["Key"])
                    yield info_of(place, entry, entry["Size"]), is_plain(place.key)
            if not answer.get("IsTruncated"):
                return
            asked["ContinuationToken"] = answer["NextContinuationToken"]

    def read(
        self,
        url: str,
        *,
        start: int = 0,
        end: int | None = None,
        etag: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Body]:
        """See ``Store.read``."""
        return self._read(Wanted(place_of(url), start, end, etag))

    @asynccontextmanager
    async def _read(self, wanted: Wanted) -> AsyncIterator[Body]:
        body = S3Body(self._client, self._clock, wanted)
        try:
            await body.open()
            yield body
        finally:
            body.close()

    @asynccontextmanager
    async def upload(
        self, url: str, *, owner: str, resume: str = "", position: int = 0, overwrite: bool = False
    ) -> AsyncIterator[Upload]:
        """See ``Store.upload``. `position` must be one that the upload had."""
        place = place_of(url)
        if place.key.endswith("/"):
            raise ConfigError(f"cannot write {url}: it names a folder")
        failed: BaseException | None = None
        async with asyncio.TaskGroup() as tasks:
            upload = S3Upload(self._client, self._clock, place, tasks, overwrite=overwrite)
            try:
                await upload.open(owner, resume, position)
                yield upload
            except BaseException as error:  # noqa: BLE001  # raised below, not inside of a group
                failed = error
            finally:
                upload.close()
        if failed is not None:
            raise failed

    async def discard(self, url: str, upload: str) -> None:
        """See ``Store.discard``. S3 cannot tell whether an owner is at work: one that is finds its upload
        gone, and begins afresh."""
        place = place_of(url)
        names = [UploadId.parse(place, upload).upload] if upload else await uploads(self._client, place)
        for name in names:
            with suppress(Fenced):  # gone already
                await Multipart(self._client, self._clock, place, name).abort()


def _url(info: ObjectInfo) -> str:
    return info.url
