"""Bytes: objects in stores, read and written as streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from flowlane.errors import Damaged, Refused
from flowlane.streams.zip.entry import Entry


class ObjectInfo(msgspec.Struct, frozen=True):
    """An object as a store describes it. ``size`` is -1 where the store does not say; ``etag`` is empty
    where there is none that pins the content (a weak one pins nothing and is not given)."""

    url: str
    size: int = -1
    etag: str = ""
    modified: str = ""
    content_type: str = ""


class Body(Protocol):
    """The bytes of an object (or a range), streamed; iterate once."""

    @property
    def info(self) -> ObjectInfo:
        """The whole object's description, as the answer itself gave it."""
        ...

    @property
    def proven_length(self) -> bool:
        """Whether the transport itself tells a whole body from a cut one (a length, or chunking)."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Non-empty blocks of at most about 1 MiB.

        Raises (while iterating):
            Incomplete: the body ended before its end, and could not be taken up where it ended.
            Superseded: the object was replaced meanwhile.
        """
        ...


class Upload(Protocol):
    """One object being written; nobody can see it before ``commit`` returns.

    ``id`` names the unfinished upload, so that another process can take it up (``Store.upload(resume=)``);
    ``position`` counts the bytes that are safely in it. Leaving the context without a commit keeps what
    ``position`` counts, for a later attempt; ``abort`` discards it.
    """

    @property
    def id(self) -> str: ...
    @property
    def position(self) -> int: ...

    async def write(self, block: bytes) -> None:
        """`block` follows what was written so far; counted by ``position`` now or after ``flush``."""
        ...

    async def flush(self) -> int:
        """Everything written survives the death of this process, but for the last few MiB where the store
        keeps large parts only; returns ``position``, which is the end of a write."""
        ...

    async def commit(self) -> ObjectInfo:
        """The object appears, whole, under its URL.

        With ``overwrite=False`` an object that stands there already wins: if its bytes are the same this is
        success (an earlier attempt got through), otherwise

        Raises:
            Fenced: another object stands there; nothing was changed.
        """
        ...

    async def abort(self) -> None:
        """The unfinished upload and all it took up are gone. Aborting twice is fine."""
        ...


class Store(Protocol):
    """Where bytes live, by URL."""

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        """The object's description; ``None`` if the store says for certain that there is none.

        Raises:
            Retryable: the store did not say (5xx, throttling, no connection).
            Permanent: the store refuses (401, 403, ...).
        """
        ...

    def list(self, url: str) -> AsyncIterator[ObjectInfo]:
        """The objects that match `url`, whose last segments may hold ``* ? [...] **``, in order of URL."""
        ...

    def read(
        self,
        url: str,
        *,
        start: int = 0,
        end: int | None = None,
        etag: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Body]:
        """The bytes [start, end) of the object, pinned to `etag` where one is given.

        Raises (on entering or while iterating):
            Superseded: the object's ETag is another one.
            Incomplete: there is no such object (any more), or its body is cut.
            Retryable, Permanent: as for ``head``.
        """
        ...

    def upload(
        self, url: str, *, owner: str, resume: str = "", position: int = 0, overwrite: bool = False
    ) -> AbstractAsyncContextManager[Upload]:
        """A new upload to `url`, or the unfinished one named `resume`, taken up at exactly `position` (what
        it holds beyond is dropped); a fresh one, at 0, if it is gone or holds less than that.

        `owner` names the attempt (unit and token): no two owners ever share an upload's bytes, so whoever
        resumes takes the bytes over under its own name, and the former owner's writes and commit are refused.

        Raises:
            Permanent, Retryable, ConfigError: the target cannot be written.
        """
        ...

    async def discard(self, url: str, upload: str) -> None:
        """The unfinished upload to `url` named `upload` is gone, unless its owner is at work on it. If there
        is none, this is fine. An empty `upload` stands for all of them: those, too, whose owner died before
        it could tell anybody their names.

        Raises:
            Permanent: `upload` names none to `url`; or the store cannot be written.
            Retryable: the store did not answer.
        """
        ...


class Archive(Protocol):
    """A ZIP archive: what its directory says, and its small members."""

    @property
    def info(self) -> ObjectInfo:
        """The object that it is; what is read of it is of this version."""
        ...

    @property
    def entries(self) -> Sequence[Entry]:
        """All entries in the directory's order, those that are not read among them; an entry's place is its
        ``index``. Names are data, and may repeat."""
        ...

    def refuse(self, entry: Entry) -> None:
        """Returns if `entry` may be read with the limits and the password given.

        Raises:
            Refused: it may not; the message says why.
        """
        ...

    async def read(self, entry: Entry, *, limit: int = 1 << 20) -> bytes:
        """The content of a small member, proven by size and CRC.

        Raises:
            Refused: as ``refuse``; it has more than `limit` bytes; or its password is wrong.
            Damaged: its bytes are not what the directory says.
            Superseded: the object was replaced meanwhile.
            Retryable, Permanent: as ``Store.read``.
        """
        ...

    def read_all(
        self, entries: Iterable[Entry], *, limit: int = 1 << 20
    ) -> AsyncIterator[tuple[Entry, bytes | Damaged | Refused]]:
        """Each of `entries` once, with what ``read`` returns of it, or with the error that it raises for that
        one member, which spoils no other. Those that lie close together come by one request, and no more are
        held at a time than have some MiB together.

        Raises (while iterating):
            Superseded: the object was replaced meanwhile.
            Retryable, Permanent: as ``Store.read``.
        """
        ...
