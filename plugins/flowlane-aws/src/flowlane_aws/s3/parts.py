"""A multipart upload as S3 holds it: its parts, its owner, and how it becomes an object.

What the protocol leaves open is settled here, once (docs/adr/0010):

- **Whose it is.** S3 knows no owner. Whoever takes an upload over puts a *claim* into it: a part with the
  highest number there is, which never becomes part of an object. The upload belongs to who claimed it last;
  without a claim to who made it.
- **What is in it.** ``ListParts`` is the truth. What is completed is named part by part with its ETag, so
  nothing that anybody else has sent meanwhile can be in the object. Parts are numbered from 1 without a gap,
  as S3 wants them where they carry checksums (``CompletedPart`` in its service model).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from botocore.exceptions import ClientError

from flowlane.clock import Clock
from flowlane.errors import Fenced, Incomplete, Retryable
from flowlane_aws.clients import asking, code_of, status_of
from flowlane_aws.s3.bytes import Blocks, Part, crc_of
from flowlane_aws.s3.names import Place

#: The highest part number; here: the claim's.
CLAIM: Final = 10_000
#: Seconds for one part, all tries included: 8 MiB at 100 KB/s, and more for larger ones.
_PART_PATIENCE: Final = 90.0
_SLOWEST: Final = 100_000
_ABORTS: Final = 5
_GONE: Final = ("NoSuchUpload", "404")
#: What a completion or a put is answered with where another object won, or others write at this moment.
_LOST: Final = ("PreconditionFailed", "412")
_CONFLICT: Final = ("ConditionalRequestConflict", "409")


class Lost(Exception):
    """Another object stands there already. Never leaves the upload that it concerns."""


class Multipart:
    """One unfinished upload. Every method may raise ``Fenced`` once it is gone."""

    def __init__(self, client: Any, clock: Clock, place: Place, upload: str) -> None:
        self._client = client
        self._clock = clock
        self.place = place
        self.upload = upload
        self._asked = {"Bucket": place.bucket, "Key": place.key, "UploadId": upload}

    @classmethod
    async def create(cls, client: Any, clock: Clock, place: Place) -> Multipart:
        """A new one, empty."""
        async with asking(f"beginning an upload to {place.url}"):
            answer = await client.create_multipart_upload(
                Bucket=place.bucket, Key=place.key, ChecksumAlgorithm="CRC32"
            )
        return cls(client, clock, place, answer["UploadId"])

    async def claim(self, owner: str) -> str:
        """The upload is `owner`'s from now on; what ``claimant`` says while it is."""
        # Nobody else's, and not this owner's in another process either.
        blocks = [f"{owner} {self._clock.token()}".encode()]
        return (await self._send(CLAIM, blocks, crc_of(blocks))).etag

    async def look(self, after: int = 0) -> tuple[list[Part], str]:
        """Its parts beyond number `after`, in order, and who claimed it last (empty if nobody did). Where the
        parts up to `after` are one's own and known, the answer is short."""
        found: list[Part] = []
        more = True
        while more:
            parts, more = await self._page(after)
            more = more and bool(parts)
            found += parts
            after = found[-1].number if found else after
        claims = [part.etag for part in found if part.number == CLAIM]
        return [part for part in found if part.number < CLAIM], "".join(claims)

    async def send(self, number: int, blocks: Sequence[bytes]) -> Part:
        """`blocks` are part `number`, over what has that number already."""
        # Off the loop: the checksum of 8 MiB takes 3 ms and more.
        crc = await self._clock.offload(lambda: crc_of(blocks))
        return await self._send(number, blocks, crc)

    async def complete(self, parts: Sequence[Part], *, overwrite: bool) -> None:
        """The object appears, of exactly these parts.

        Raises:
            Lost: there is one already, and it is not to be overwritten.
            Incomplete: a part is no longer what was sent; or somebody else wrote at the same moment, after
                which this upload cannot be completed any more (it is aborted): begin afresh.
        """
        condition = {} if overwrite else {"IfNoneMatch": "*"}
        passing = (*_GONE, *_LOST, *_CONFLICT, "InvalidPart")
        where = self.place.url
        try:
            async with asking(f"completing the upload to {where}", passing=passing, seconds=_PART_PATIENCE):
                await self._client.complete_multipart_upload(
                    **self._asked,
                    MultipartUpload={"Parts": [_named(part) for part in parts]},
                    MpuObjectSize=sum(part.size for part in parts),
                    **condition,
                )
        except ClientError as error:
            if code_of(error) in _LOST:
                raise Lost from error
            if code_of(error) in _CONFLICT:
                await self.abort()
                raise Incomplete(f"{where}: others wrote at the same moment: starting afresh") from error
            if code_of(error) == "InvalidPart":
                await self.abort()
                raise Incomplete(f"{where}: a former attempt wrote into it: starting afresh") from error
            raise self._gone() from error

    async def abort(self) -> None:
        """It is gone, with all its parts; so it may have been before."""
        for _ in range(_ABORTS):
            try:
                async with asking(f"aborting the upload to {self.place.url}", passing=_GONE):
                    await self._client.abort_multipart_upload(**self._asked)
                # Parts that were under way may have arrived after it (API reference, AbortMultipartUpload).
                await self._page(0)
            except (ClientError, Fenced):
                return
        raise Retryable(f"aborting the upload to {self.place.url}: it is still there")

    async def _page(self, after: int) -> tuple[list[Part], bool]:
        try:
            async with asking(f"listing the parts of the upload to {self.place.url}", passing=_GONE):
                answer = await self._client.list_parts(**self._asked, PartNumberMarker=after)
        except ClientError as error:
            raise self._gone() from error
        listed = [
            Part(part["PartNumber"], part["Size"], _bare(part["ETag"]), part.get("ChecksumCRC32", ""))
            for part in answer.get("Parts", ())
        ]
        return listed, bool(answer.get("IsTruncated"))

    async def _send(self, number: int, blocks: Sequence[bytes], crc: str) -> Part:
        what = f"uploading part {number} of {self.place.url}"
        body = Blocks(blocks)
        try:
            async with asking(what, passing=_GONE, seconds=_PART_PATIENCE + body.size / _SLOWEST):
                answer = await self._client.upload_part(
                    **self._asked, PartNumber=number, Body=body, ChecksumCRC32=crc
                )
        except ClientError as error:
            raise self._gone() from error
        return Part(number, body.size, _bare(answer["ETag"]), crc)

    def _gone(self) -> Fenced:
        return Fenced(
            f"the unfinished upload of {self.place.url} was taken over or discarded by another attempt"
        )


def _named(part: Part) -> dict[str, Any]:
    checksum = {"ChecksumCRC32": part.crc} if part.crc else {}
    return {"PartNumber": part.number, "ETag": f'"{part.etag}"', **checksum}


def _bare(etag: str) -> str:
    """A part's ETag without quotes, which not every server puts around it every time."""
    return etag.strip('"')


async def uploads(client: Any, place: Place) -> list[str]:
    """S3's ids of all unfinished uploads to `place`."""
    found: list[str] = []
    asked: dict[str, str] = {}
    while True:
        async with asking(f"listing unfinished uploads to {place.url}"):
            answer = await client.list_multipart_uploads(Bucket=place.bucket, Prefix=place.key, **asked)
        # In order of their keys: the first is the shortest of those that begin alike.
        listed = [upload for upload in answer.get("Uploads", ()) if upload["Key"] == place.key]
        found += [upload["UploadId"] for upload in listed]
        if not answer.get("IsTruncated") or not listed:
            return found
        asked = {
            "KeyMarker": answer["NextKeyMarker"],
            "UploadIdMarker": answer["NextUploadIdMarker"],
        }


async def put(client: Any, clock: Clock, place: Place, blocks: Sequence[bytes], *, overwrite: bool) -> None:
    """The object appears, in one request.

    Raises:
        Lost: there is one already, and it is not to be overwritten.
    """
    crc = await clock.offload(lambda: crc_of(blocks))
    condition = {} if overwrite else {"IfNoneMatch": "*"}
    what = f"writing {place.url}"
    for turn in range(1, 6):
        body = Blocks(blocks)
        try:
            async with asking(
                what, passing=(*_LOST, *_CONFLICT), seconds=_PART_PATIENCE + body.size / _SLOWEST
            ):
                await client.put_object(
                    Bucket=place.bucket,
                    Key=place.key,
                    Body=body,
                    ChecksumCRC32=crc,
                    **condition,
                )
                return
        except ClientError as error:
            if status_of(error) == 412 or code_of(error) in _LOST:
                raise Lost from error
        # 409: others write at this moment, and nothing is decided (user guide, "Conditional writes").
        await clock.sleep(clock.random() * 0.1 * 2**turn)
    raise Retryable(f"{what}: others write it at the same time, again and again")


def sent_unhashed(params: Any, **_: Any) -> None:
    """Tells the SDK that a request carries its checksum already. Over TLS it then neither hashes nor signs
    the body, which would cost the loop 5 ms and more for each part; over plain HTTP it does."""
    if "x-amz-checksum-crc32" in params["headers"]:
        params["context"]["checksum"] = {
            "request_algorithm": {"algorithm": "crc32", "in": "header", "name": "x-amz-checksum-crc32"}
        }
