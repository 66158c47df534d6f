"""Landing: object -> upload; proven, resumable, fenced.

The bytes are stored untouched and become visible only when they are known to be whole. Where the source can
be pinned (an ETag), what was uploaded before a crash or a deadline is kept and gone on from.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

import msgspec

from flowlane import events
from flowlane.blocks import ENOUGH, gathered
from flowlane.deadline import Interrupted
from flowlane.errors import (
    ConfigError,
    Damaged,
    Fenced,
    FlowlaneError,
    Incomplete,
    Permanent,
    Retryable,
    Superseded,
    VersionConflict,
    redact,
)
from flowlane.ports import Body, ObjectInfo, Store, Upload
from flowlane.state import Counts, Position, Transfer
from flowlane.streams.inflate import prove
from flowlane.streams.members import inflater
from flowlane.streams.preview import is_page

if TYPE_CHECKING:
    from flowlane.attempt import Attempt

logger = logging.getLogger("flowlane")

#: The token of a unit's first attempt: nobody has tried before.
_FIRST = 2

#: Bytes that are proven by one hop into a thread. More than a hop is worth by itself: while the thread
#: decodes, the loop takes up to 512 KiB from the socket in small bits, each at the price of a large one, and
#: both wait for Python's lock. That is half of each 1 MiB, but a sixteenth of each 8 MiB: a tenth of the CPU.
#: The copies that are under way in a process share it, as far as it is worth a hop for each.
_LIST = 8 << 20


async def copy(  # the parameters are the promise of ``Context.copy``
    attempt: Attempt,
    url: str,
    to: str,
    verify: str,
    headers: Mapping[str, str] | None,
    etag: str,
    overwrite: bool,
) -> ObjectInfo:
    """See ``ports.Context.copy``."""
    if verify not in ("content", "length"):
        raise ConfigError(f"verify={verify!r}: must be content or length")
    name = attempt.next_name("copy")
    state = attempt.transfer(name)
    if state.done:
        return ObjectInfo(to, size=state.position.offset, etag=state.etag)
    await attempt.start()
    source = await attempt.engine.connections.store(url)
    target = await attempt.engine.connections.store(to)
    landed = await _landed(attempt, name, state, target, to)
    if landed is not None:
        _done(attempt, name, state.whole, state.etag)
        await tidy(attempt, target, to)
        return landed
    owner = f"{attempt.unit}#{attempt.progress.token}"
    resume, position = (state.upload, state.position.offset) if state.etag else ("", 0)
    if not resume:  # where nothing tells whether the source is still the same, what is there is of no use
        await tidy(attempt, target, to)
    async with target.upload(
        to, owner=owner, resume=resume, position=position, overwrite=overwrite
    ) as upload:
        if upload.position != position or not position:
            state = Transfer(high=state.high)
        work = _Copy(attempt, name, state, upload, url, to, verify == "content")
        try:
            await work.log(events.UPLOAD_OPENED)
        except FlowlaneError:
            if not upload.position:  # nobody knows of it, and nothing is in it
                with suppress(FlowlaneError):
                    await upload.abort()
            raise
        try:
            await work.run(source, headers, etag)
            landed = await work.publish()
        except Fenced as error:
            if isinstance(error, VersionConflict) or attempt.lost:
                raise
            if work.whole and not overwrite and await target.head(to) is not None:
                raise  # another object stands there
            raise work.robbed(error) from error
        except Superseded:
            await tidy(attempt, target, to)
            raise
    await tidy(attempt, target, to)
    return landed


async def tidy(attempt: Attempt, target: Store, to: str) -> None:
    """Leave no unfinished upload of earlier attempts: one that died between making its upload and logging it
    could tell nobody. Should another be at work there all the same, it finds so, and begins afresh."""
    if attempt.progress.token > _FIRST:
        try:
            await target.discard(to, "")
        except FlowlaneError as error:
            logger.warning("%s: unfinished uploads to %s are left: %s", attempt.unit, redact(to), error)


async def give_up(attempt: Attempt, to: str, upload: str) -> None:
    """Nobody will go on with `upload`, an unfinished one to `to`, nor with those of earlier attempts."""
    try:
        target = await attempt.engine.connections.store(to)
        if upload:
            await target.discard(to, upload)
    except FlowlaneError as error:
        logger.warning("%s: an unfinished upload to %s is left: %s", attempt.unit, redact(to), error)
    else:
        await tidy(attempt, target, to)


#: How files begin: gzip (RFC 1952, 2.3.1); Zstandard, with a frame or one to be skipped (RFC 8878, 3.1); zip,
#: with a member, or none (APPNOTE 4.3.7 and 4.3.16).
_MAGIC = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))),
    ".zip": (b"PK",),
}
#: Bytes by which an object is known: a page may begin with white space.
_BEGINNING = 64 << 10
#: Of these, only what they are not can be told.
_TEXT = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")


class _Copy:
    """One object on its way through one upload: every block proven, counted and checksummed as it passes."""

    def __init__(
        self, attempt: Attempt, name: str, state: Transfer, upload: Upload, url: str, to: str, decode: bool
    ) -> None:
        self.attempt = attempt
        self.name = name
        self.state = state
        self.upload = upload
        self.url = url
        self.to = to
        self.where = redact(url)
        self.prover = prove(url.partition("?")[0]) if decode else None
        self.offset = 0
        self.crc = 0
        self.whole = False  # read to its end, and proven
        self._crc32 = inflater().crc32
        self._written: deque[Position] = deque()  # where each write ended, since the last mark
        self.logged_at = attempt.engine.clock.monotonic()

    async def log(self, kind: str) -> None:
        """Append the upload's state; moved on means further than any attempt before."""
        self.state = msgspec.structs.replace(self.state, upload=self.upload.id, to=self.to)
        self.attempt.progress.transfers[self.name] = self.state
        await self.attempt.record(kind, moved=False)
        self.logged_at = self.attempt.engine.clock.monotonic()

    async def run(self, source: Store, headers: Mapping[str, str] | None, etag: str) -> None:
        """Move the bytes into the upload, and prove them whole."""
        goal = self.state.position.offset
        if self.prover is None:
            self.offset, self.crc = goal, self.state.position.crc
        pin = self.state.etag or etag
        try:
            async with source.read(self.url, start=self.offset, etag=pin, headers=headers) as body:
                self.state = msgspec.structs.replace(self.state, etag=body.info.etag)
                if self.prover is None and not body.proven_length:
                    raise Permanent(
                        f"{self.where}: neither a length nor a checksum tells whether it is whole"
                    )
                await self._pass_on(body, goal)
            self._prove()
            self.whole = True
        except (Damaged, Permanent, ConfigError):
            await self._discard()
            raise
        except Superseded:
            await self._discard()
            if etag:
                raise
            raise Incomplete(f"{self.where} was replaced while it was being read: starting afresh") from None
        except Retryable:
            await self._keep()
            raise

    async def _pass_on(self, body: Body, goal: int) -> None:
        clock = self.attempt.engine.clock
        rhythm = float(self.attempt.stage.policy.lease) / 3
        with self._share() as enough:
            async with aclosing(gathered(body, clock, enough)) as lists:
                async for blocks in lists:
                    if not self.offset:
                        check_magic(self.where, beginning(blocks))
                    await self._take(blocks, goal)
                    if self.attempt.near_deadline():
                        await self._pause(goal)
                    if clock.monotonic() - self.logged_at > rhythm:
                        if self.offset > goal:
                            await self._mark()
                        # On the way to the goal, too: somebody is at work.
                        await self.log(events.BATCH_WRITTEN)

    @contextmanager
    def _share(self) -> Iterator[int]:
        """Bytes that this copy may take at once, being one of those under way."""
        engine = self.attempt.engine
        engine.copies += 1
        try:
            yield max(ENOUGH, _LIST // engine.copies)
        finally:
            engine.copies -= 1

    async def _take(self, blocks: list[bytes], goal: int) -> None:
        """Blocks pass: those before `goal`, which a resumed upload holds already, by the decoder alone."""
        known, fresh = _split(blocks, goal - self.offset)
        if known:
            await self._digest(known)
            if self.offset == goal and self.crc != self.state.position.crc:
                raise Superseded(f"{self.where}: its first {goal:,} bytes are not those read before")
        if fresh:
            for block, end in zip(fresh, await self._digest(fresh), strict=True):
                await self.upload.write(block)
                if self.state.etag:  # nobody goes on in the middle of what is not pinned, see ``_mark``
                    self._written.append(end)

    async def _pause(self, goal: int) -> NoReturn:
        if self.offset <= goal:
            raise Interrupted(
                f"{self.offset:,} of the {goal:,} bytes of {self.where} that have landed so far were "
                'decoded once more: give it more time, or verify="length"'
            )
        await self._keep()
        raise Interrupted(f"{self.offset:,} bytes of {self.where} have landed so far")

    async def _digest(self, blocks: list[bytes]) -> list[Position]:
        """Where each of `blocks` ends; all of them decoded and checksummed."""
        if self.prover is None:
            ends = self._follow(blocks)
        else:
            with self._refuted():
                ends = await self.attempt.engine.clock.offload(lambda: self._follow(blocks))
        self.offset, self.crc = ends[-1].offset, ends[-1].crc
        return ends

    def _follow(self, blocks: list[bytes]) -> list[Position]:
        offset, crc = self.offset, self.crc
        ends: list[Position] = []
        for block in blocks:
            if self.prover is not None:
                self.prover.feed(block)
            offset, crc = offset + len(block), self._crc32(block, crc)
            ends.append(Position(offset, 0, crc))
        return ends

    def _prove(self) -> None:
        if not self.offset:
            raise Damaged(f"{self.where}: the body is empty")
        if self.prover is not None:
            with self._refuted():
                self.prover.close()

    @contextmanager
    def _refuted(self) -> Iterator[None]:
        """Whatever decoding refutes cannot be built upon, and is said with where it came from."""
        try:
            yield
        except Incomplete as error:
            raise Damaged(f"{self.where}: {error}") from None

    async def _keep(self) -> None:
        """What is uploaded so far survives this attempt, if the source can be pinned to go on from there."""
        if not self.state.etag:
            await self._discard()
            return
        await self._mark()

    async def _mark(self) -> None:
        """Whoever comes next may go on from here, if the source can be pinned."""
        if not self.state.etag:
            return
        flushed = await self.upload.flush()
        # Not all of it, where a store keeps large parts only; but up to the end of some write.
        while self._written and self._written[0].offset < flushed:
            self._written.popleft()
        if self._written and self._written[0].offset == flushed:
            if flushed > self.state.high:
                self.attempt.note_move()
            high = max(self.state.high, flushed)
            self.state = msgspec.structs.replace(self.state, position=self._written[0], high=high)
        self.attempt.progress.transfers[self.name] = self.state

    async def _discard(self) -> None:
        await self.upload.abort()
        self.state = Transfer(high=self.state.high)
        self.attempt.progress.transfers[self.name] = self.state

    def robbed(self, error: Fenced) -> Incomplete:
        """A former attempt, come back to life, has taken the upload over. It gets no further, since the log
        refuses it; and if it is this attempt that has been overtaken, the log refuses its next word."""
        self.state = Transfer(high=self.state.high)
        self.attempt.progress.transfers[self.name] = self.state
        return Incomplete(f"{error}: starting afresh")

    async def publish(self) -> ObjectInfo:
        """Make the object visible, whole."""
        # The log first: it refuses whoever has been overtaken, and it tells the next attempt, should this one
        # die in between, by what to know the object for its own.
        whole = Position(self.offset, 0, self.crc)
        await self._mark()
        self.state = msgspec.structs.replace(self.state, whole=whole)
        await self.log(events.BATCH_WRITTEN)
        landed = await self.upload.commit()
        _done(self.attempt, self.name, whole, self.state.etag)
        return landed


def beginning(blocks: list[bytes]) -> bytes:
    """As much of `blocks` as an object is known by; they may be several MiB, and this is done on the loop."""
    held = bytearray()
    for block in blocks:
        held += block[: _BEGINNING - len(held)]
        if len(held) == _BEGINNING:
            break
    return bytes(held)


def _split(blocks: list[bytes], count: int) -> tuple[list[bytes], list[bytes]]:
    """The first `count` bytes (all there are, none if negative), and the rest."""
    if count <= 0:
        return [], blocks
    first: list[bytes] = []
    for number, block in enumerate(blocks):
        if count < len(block):
            return [*first, block[:count]] if count else first, [block[count:], *blocks[number + 1 :]]
        first.append(block)
        count -= len(block)
    return first, []


def _done(attempt: Attempt, name: str, whole: Position, etag: str) -> None:
    moved = Counts(bytes_in=whole.offset, bytes_out=whole.offset)
    attempt.progress.counts.add(moved)
    attempt.progress.transfers[name] = Transfer(position=whole, etag=etag, done=True, counts=moved)


async def _landed(attempt: Attempt, name: str, state: Transfer, target: Store, to: str) -> ObjectInfo | None:
    """The object under `to`, if it is the one that an earlier attempt had proven and was about to show. It is
    read for that, if need be over several continuations."""
    whole = state.whole
    if not whole.offset:
        return None
    found = await target.head(to)
    if found is None or found.size not in (-1, whole.offset):
        return None
    begin = state.kept if found.etag and found.etag == state.standing else Position()
    length, crc = begin.offset, begin.crc
    async with target.read(to, start=length, etag=found.etag) as body:
        async for block in body:
            crc = inflater().crc32(block, crc)
            length += len(block)
            if attempt.near_deadline():
                if found.etag:
                    attempt.note_move()
                    kept = Position(length, 0, crc)
                    state = msgspec.structs.replace(state, kept=kept, standing=found.etag)
                    attempt.progress.transfers[name] = state
                raise Interrupted(f"{length:,} bytes of {redact(to)} were compared so far")
    return found if (length, crc) == (whole.offset, whole.crc) else None


def check_magic(where: str, block: bytes) -> None:
    """Raises:
    Damaged: the body does not begin as a file of its name's kind does (an error page, say).
    """
    name = where.lower()
    if name.endswith(_TEXT) and is_page(block):
        raise Damaged(f"{where} is a web page: it begins with {bytes(block[:40])!r}")
    for suffix, magics in _MAGIC.items():
        if name.endswith(suffix) and not any(m.startswith(block[: len(m)]) for m in magics):
            raise Damaged(f"{where} is not a {suffix} file: it begins with {bytes(block[:40])!r}")
