"""Part files: how an object of the file store grows out of sight, and appears at once. Synchronous, for a
thread.

A part lies next to its target, is hidden, and belongs to one owner, who holds a lock on it for as long as he
has it open. Whoever takes it over renames it if the lock is free (its owner is dead), and copies it if not:
a paused owner may wake up with the file still open, and what he writes then must not end up in the object.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from flowlane.errors import Fenced, Permanent

_COPY: Final = 8 << 20
_COMPARE: Final = 1 << 20
_NAME: Final = re.compile(r"\.(.+)\.[0-9a-f]{24}\.part", re.DOTALL)
_NO_LINKS: Final = frozenset({"EPERM", "EOPNOTSUPP", "ENOTSUP", "ENOSYS"})


def part_name(target: Path, owner: str) -> str:
    """The name of `owner`'s part of `target`; within the 255 bytes of a name, however long the target's."""
    stem = os.fsencode(target.name)[:200].decode("utf-8", "ignore") or "_"
    digest = hashlib.sha256(os.fsencode(target) + b"\0" + owner.encode()).hexdigest()[:24]
    return f".{stem}.{digest}.part"


def is_part(name: str) -> bool:
    """Whether `name` is that of a part file."""
    return _NAME.fullmatch(name) is not None


def is_part_of(name: str, target: Path) -> bool:
    """Whether `name` can be that of somebody's part of `target`; as it may come from anywhere, nothing else
    may be opened by it."""
    mine, theirs = _NAME.fullmatch(part_name(target, "")), _NAME.fullmatch(name)
    return bool(mine and theirs and "/" not in name and mine[1] == theirs[1])


class _Source(NamedTuple):
    """The part that is being copied from: its open file, its path, and how much of it."""

    file: int
    path: Path
    size: int


class Part:
    """An open part file. Every method may raise ``OSError``, or ``Fenced`` once it was taken over."""

    def __init__(self, path: Path, target: Path, descriptor: int) -> None:
        self.path = path
        self.target = target
        self._file = descriptor
        self.size = os.fstat(descriptor).st_size
        self._source = _Source(-1, path, 0)

    @classmethod
    def create(cls, target: Path, owner: str) -> Part:
        """An empty part; directories are made as needed. A part of that owner that lies there is dropped."""
        make_directory(target.parent)
        path = target.parent / part_name(target, owner)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if _lock(descriptor) is False:
                raise Fenced(f"{path.name} was taken over as it was made")
            return cls(path, target, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def take_over(cls, target: Path, owner: str, name: str, position: int) -> Part:
        """The first `position` bytes of the part called `name`, as `owner`'s own once ``catch_up`` is
        through, or an empty part if they are gone. The part called `name` is no more."""
        old = target.parent / name
        try:
            descriptor = os.open(old, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return cls.create(target, owner)
        try:
            alone = _lock(descriptor)
            found = os.fstat(descriptor)
            enough = 0 < position <= found.st_size and _same(descriptor, old)
            # A part with a second name is an object already: its owner died between link and unlink.
            if enough and alone and found.st_nlink == 1:
                path = target.parent / part_name(target, owner)
                os.ftruncate(descriptor, position)
                old.replace(path)
                return cls(path, target, descriptor)
            part = cls.create(target, owner)
        except BaseException:
            os.close(descriptor)
            raise
        part._source = _Source(descriptor, old, position if enough else 0)
        return part

    def catch_up(self) -> bool:
        """Copy some of what is taken over; whether more is to come. If somebody else took the old part over
        meanwhile, nothing is known of the bytes copied, and the part is empty again."""
        source = self._source
        if source.file < 0:
            return False
        block = os.pread(source.file, min(_COPY, source.size - self.size), self.size)
        if block:
            self.write([block])
            return True
        if source.path != self.path:
            if self.size < source.size or not _same(source.file, source.path):
                os.ftruncate(self._file, 0)
                self.size = 0
            source.path.unlink(missing_ok=True)
        os.close(source.file)
        self._source = _Source(-1, self.path, 0)
        return False

    def write(self, blocks: Sequence[bytes]) -> None:
        """`blocks` follow what is there."""
        self._check()
        for block in blocks:
            view = memoryview(block)
            while view:
                count = os.pwrite(self._file, view, self.size)
                self.size += count
                view = view[count:]

    def sync(self) -> int:
        """Everything written is on the disk; returns its size."""
        os.fsync(self._file)
        self._check()
        return self.size

    def publish(self, *, overwrite: bool) -> None:
        """The part becomes the object, unless there is one already (see ``Upload.commit``)."""
        self.sync()
        if overwrite:
            self._claim(lambda: self.path.replace(self.target))
        else:
            try:
                self._claim(self._link)
            except FileExistsError:
                self._compare()
            self.path.unlink(missing_ok=True)
        sync_directory(self.target.parent)

    def _claim(self, act: Callable[[], object]) -> None:
        self._check()
        try:
            act()
        except FileNotFoundError:
            raise self._fenced() from None

    def _link(self) -> None:
        try:
            os.link(self.path, self.target)
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) not in _NO_LINKS:
                raise
            # No hard links here (FAT, some network mounts): two writers that get through this check at the
            # same moment both succeed, and the object is the one's or the other's, whole.
            if self.target.exists():
                raise FileExistsError(self.target) from None
            self.path.rename(self.target)

    def _compare(self) -> None:
        """Return if the object holds what the part does: an earlier attempt got through."""
        if not self.target.is_file():  # nor is a pipe opened, which would wait for its writer
            raise Permanent(f"{self.target} exists already and is no regular file: choose another name")
        with self.target.open("rb") as other:
            same = os.fstat(other.fileno()).st_size == self.size
            position = 0
            while same and position < self.size:
                block = os.pread(self._file, _COMPARE, position)
                same = bool(block) and other.read(len(block)) == block
                position += len(block)
        if not same:
            raise Fenced(
                f"{self.target} exists already with another content; nothing was changed: move it away and "
                "redrive, or choose another folder"
            )

    def abort(self) -> None:
        """The part is gone, if it is still this owner's."""
        if _same(self._file, self.path):
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file, and so of its lock. Closing twice is fine."""
        for descriptor in (self._file, self._source.file):
            if descriptor >= 0:
                os.close(descriptor)
        self._file, self._source = -1, _Source(-1, self.path, 0)

    def _check(self) -> None:
        if not _same(self._file, self.path):
            raise self._fenced()

    def _fenced(self) -> Fenced:
        return Fenced(
            f"the unfinished upload of {self.target} was taken over or discarded by another attempt"
        )


def discard(path: Path) -> None:
    """Remove the part at `path`, if there is one, unless its owner is alive."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if _lock(descriptor) and _same(descriptor, path):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def discard_all(target: Path) -> None:
    """Remove every part of `target`, but for those whose owners are alive."""
    with suppress(FileNotFoundError), os.scandir(target.parent) as entries:
        for entry in entries:
            # A name that was cut may be that of another target's part; its own lock protects it, too.
            if is_part_of(entry.name, target):
                discard(Path(entry.path))


def make_directory(path: Path) -> None:
    """`path` and what is above it exist, also after a power loss."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """The names in `path` are on the disk, where the file system can tell."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the file is ours alone; ``None`` where the file system has no locks, and nobody can be known to
    be dead."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether `path` is (still) the name of the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
