"""One object on its way into S3: collected into parts, which are sent side by side, and shown at once.

Parts end where a ``write`` ended: at ``flush`` once there are 5 MiB (S3 takes no smaller one in the middle of
an object), and else once there is a full part. So ``position`` is always the end of an earlier write.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

from flowlane.clock import Clock
from flowlane.connectors.hop import hop
from flowlane.errors import Fenced, Permanent, Retryable, Superseded
from flowlane.ports import ObjectInfo
from flowlane_aws.s3.body import S3Body, Wanted, describe
from flowlane_aws.s3.bytes import SMALLEST, Comparison, Part, composite, crc_of, pin_of, taken
from flowlane_aws.s3.names import Place
from flowlane_aws.s3.parts import CLAIM, Lost, Multipart, put

#: Bytes of a part, and how many are on their way at once; later parts are larger, see ``part_size``.
PART: Final = 8 << 20
AT_ONCE: Final = 4
#: Seconds for which an upload is taken to be one's own without asking: who has slept longer asks first.
_TRUST: Final = 10.0


def part_size(number: int) -> int:
    """The bytes at which part `number` is full: 8 MiB for the first 1,000 parts, then 8 MiB more every 64
    parts, so that the numbers last for 4.8 TiB and no part is ever larger than what is needed for that."""
    return PART * (1 + max(0, number - 1000) // 64)


class UploadId(NamedTuple):
    """What names an unfinished upload: to which object, S3's own id, and a pin of the parts that hold the
    first ``position`` bytes, by which whoever takes it up knows them again."""

    to: str
    position: int
    pin: str
    upload: str

    @classmethod
    def parse(cls, place: Place, text: str) -> UploadId:
        """The inverse of ``str``.

        Raises:
            Permanent: it names no upload to `place`.
        """
        to, _, rest = text.partition(".")
        position, _, rest = rest.partition(".")
        pin, _, upload = rest.partition(".")
        if to != _name(place) or not (position.isascii() and position.isdigit()) or not upload:
            raise Permanent(f"{text[:200]!a} is no unfinished upload to {place.url}")
        return cls(to, int(position), pin, upload)

    def __str__(self) -> str:
        return f"{self.to}.{self.position}.{self.pin}.{self.upload}"


def _name(place: Place) -> str:
    return hashlib.blake2b(f"{place.bucket}/{place.key}".encode(), digest_size=6).hexdigest()


class S3Upload:
    """See ``ports.Upload``; made by ``S3Store.upload``, which owns its tasks."""

    def __init__(
        self, client: Any, clock: Clock, place: Place, tasks: asyncio.TaskGroup, *, overwrite: bool
    ) -> None:
        self._client = client
        self._clock = clock
        self._place = place
        self._tasks = tasks
        self._overwrite = overwrite
        self._multipart = Multipart(client, clock, place, "")
        self._claim = ""
        self._seen = clock.monotonic()  # when it was last known to be ours
        self._alone = False  # whether the upload is gone, since one request will do
        self._parts: dict[int, Part | None] = {}  # by number, in order; None: on its way
        self._sending: dict[asyncio.Task[None], int] = {}  # and the bytes of each
        self._next = 1
        self._blocks: list[bytes] = []
        self._held = 0
        self._position = 0
        self._pinned = (0, pin_of(()))
        self._error: Exception | None = None
        self._done: ObjectInfo | None = None

    @property
    def id(self) -> str:
        """See ``Upload.id``. It changes with ``position``; a former one names the same upload."""
        return str(UploadId(_name(self._place), *self._pinned, self._multipart.upload))

    @property
    def position(self) -> int:
        """See ``Upload``: the bytes in parts that S3 has confirmed, as of the last ``flush``."""
        return self._position

    async def open(self, owner: str, resume: str, position: int) -> None:
        """Take over `position` bytes of the upload called `resume`, or begin a new one."""
        if resume:
            found = UploadId.parse(self._place, resume)
            self._multipart = Multipart(self._client, self._clock, self._place, found.upload)
            try:
                if await self._take_over(owner, found, position):
                    return
                await self._multipart.abort()  # of no use to anybody
            except Fenced:
                pass  # gone
        self._claim = ""
        self._multipart = await Multipart.create(self._client, self._clock, self._place)
        self._seen = self._clock.monotonic()

    async def _take_over(self, owner: str, found: UploadId, position: int) -> bool:
        parts, _ = await self._multipart.look()
        if position and not taken(parts, position):
            return False
        # First the claim, then the look that counts: what is seen then was written by nobody who will still
        # believe it to be his when he asks.
        self._claim = await self._multipart.claim(owner)
        parts, claim = await self._multipart.look()
        if claim != self._claim:
            raise self._taken_over()
        parts = taken(parts, position)
        if position and not parts:
            return False
        if found.position == position and pin_of(parts) != found.pin:
            return False
        self._parts = {part.number: part for part in parts}
        self._next = len(parts) + 1
        self._settle_position()
        self._seen = self._clock.monotonic()
        return True

    async def write(self, block: bytes) -> None:
        """See ``Upload.write``. Waits while as much is on its way as may be.

        Raises:
            Fenced: somebody else has taken the upload over, or discarded it.
            Retryable: a part could not be sent; the upload cannot go on in this attempt.
        """
        self._check()
        self._blocks.append(block)
        self._held += len(block)
        if self._held >= part_size(self._next):
            await self._cut()

    async def flush(self) -> int:
        """See ``Upload.flush``: all but the last bytes, if they are less than 5 MiB.

        Raises:
            Fenced, Retryable: as for ``write``.
        """
        self._check()
        if self._held >= SMALLEST:
            await self._make_sure()
            await self._cut()
        await self._arrive(0)
        self._settle_position()
        return self._position

    async def commit(self) -> ObjectInfo:
        """See ``Upload.commit``. Repeatable."""
        if self._done is None:
            self._done = await self._show()
            self._position = self._done.size
        return self._done

    async def abort(self) -> None:
        """See ``Upload.abort``; what was committed stays, and what somebody else has taken over."""
        self.close()
        self._blocks, self._held, self._position = [], 0, 0
        try:
            if self._done is None:
                await self._make_sure()
                await self._multipart.abort()
        except Fenced:
            return  # gone already, or another's

    def close(self) -> None:
        """Nothing more is sent; what was sent stays."""
        for task in self._sending:
            task.cancel()
        self._sending.clear()

    # ------------------------------------------------------------------ parts

    async def _cut(self) -> None:
        """What is held becomes a part, and is sent."""
        if self._next >= CLAIM:
            raise Permanent(f"{self._place.url}: too large an object: S3 takes 10,000 parts")
        if self._clock.monotonic() - self._seen > _TRUST:
            await self._make_sure()
        await self._arrive(max(0, AT_ONCE * PART - self._held))
        number, blocks, size = self._next, self._blocks, self._held
        self._next, self._blocks, self._held = number + 1, [], 0
        self._parts[number] = None
        task = self._tasks.create_task(self._send(number, blocks), name=f"flowlane-s3-part-{number}")
        self._sending[task] = size

    async def _send(self, number: int, blocks: Sequence[bytes]) -> None:
        try:
            self._parts[number] = await self._multipart.send(number, blocks)
        except Exception as error:  # noqa: BLE001  # raised by the next write, flush or commit
            self._error = self._error or error

    async def _arrive(self, most: int) -> None:
        """Wait until at most `most` bytes are on their way."""
        while sum(self._sending.values()) > most:
            done, _ = await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del self._sending[task]
        self._check()

    async def _make_sure(self) -> None:
        """Raises:
        Fenced: it is not ours any more.
        """
        _, claim = await self._multipart.look(len(self._confirmed()))
        if claim != self._claim:
            self._error = self._taken_over()
            raise self._error
        self._seen = self._clock.monotonic()

    def _taken_over(self) -> Fenced:
        return Fenced(f"the unfinished upload of {self._place.url} was taken over by another attempt")

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _confirmed(self) -> list[Part]:
        """The parts that S3 has, up to the first that it does not have (yet)."""
        return [part for part in takewhile(lambda part: part is not None, self._parts.values()) if part]

    def _settle_position(self) -> None:
        safe = list(takewhile(lambda part: part.size >= SMALLEST, self._confirmed()))
        self._position = sum(part.size for part in safe)
        self._pinned = (self._position, pin_of(safe))

    # ------------------------------------------------------------------ the object

    async def _show(self) -> ObjectInfo:
        """Make the object visible, or find that it is so already."""
        self._check()
        whole: list[Part] | None = None
        try:
            if not self._parts:
                whole = await self._clock.offload(self._as_one)
                await self._put()
            else:
                if self._held:
                    await self._cut()
                await self._arrive(0)
                whole = self._confirmed()
                await self._make_sure()
                await self._multipart.complete(whole, overwrite=self._overwrite)
        except (Lost, Fenced) as error:
            if whole is None:
                raise
            return await self._already(whole, error)
        found = await describe(self._client, self._place)
        return found or ObjectInfo(self._place.url, size=sum(part.size for part in whole))

    async def _put(self) -> None:
        """A small object takes one request; the upload, which nothing is in, goes first: should this process
        die in between, nothing is left behind."""
        if not self._alone:
            await self._make_sure()
            await self._multipart.abort()
            self._alone = True
        await put(self._client, self._clock, self._place, self._blocks, overwrite=self._overwrite)

    def _as_one(self) -> list[Part]:
        return [Part(1, self._held, "", crc_of(self._blocks))] if self._held else []

    async def _already(self, whole: Sequence[Part], error: Lost | Fenced) -> ObjectInfo:
        """The object that stands there, if it has the same bytes: an earlier attempt got through, or this
        one, whose answer was lost and whose upload is gone since."""
        found = await describe(self._client, self._place)
        if found is not None and await self._is(found, whole):
            if isinstance(error, Lost):
                await self._multipart.abort()  # still ours, and nobody will come back to it
            return found
        if isinstance(error, Fenced):
            raise error
        if found is None:
            raise Retryable(f"{self._place.url}: an object that stood there is gone again") from error
        raise Fenced(
            f"{self._place.url} exists already with another content; nothing was changed: move it away and "
            "redrive, or choose another folder"
        ) from error

    async def _is(self, found: ObjectInfo, whole: Sequence[Part]) -> bool:
        if found.size != sum(part.size for part in whole):
            return False
        if not found.size or found.etag == composite(whole):
            return True
        comparison = Comparison(whole)
        body = S3Body(self._client, self._clock, Wanted(self._place, 0, None, found.etag))
        try:
            await body.open()
            async for block in body:
                await hop(self._clock, comparison.feed, block)
                if not comparison.same:
                    return False
        except Superseded:
            raise Retryable(f"{self._place.url} is being replaced by others: it is looked at again") from None
        finally:
            body.close()
        return comparison.close()
