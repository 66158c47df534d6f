"""The drops of ``zip_tables``: found, and looked into by ranged reads; what is in them, as units."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from heapq import nsmallest
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from flowlane.errors import Damaged, Permanent, redact
from flowlane.lane import Fact, Unit
from flowlane.ports import Archive, Context, ObjectInfo
from flowlane.recipes.manifest import (
    WHOLE,
    Contents,
    Declared,
    File,
    Whole,
    by_sidecar,
    by_whole,
    named_as_manifest,
    sorting_out,
    stem_of,
    step,
)
from flowlane.streams.zip.entry import Entry, ZipLimits

#: Units that the log is asked for at once.
ASKED: Final = 128
#: New drops that one listing of the source keeps; the next one keeps those that come after them.
HELD: Final = 20_000
#: Files whose sidecars are read before their units are found.
READS: Final = 512
#: A sidecar of more bytes is parsed in a thread.
_LONG: Final = 16 << 10
#: Members have generations of their own within their drop's, in the order of its directory: more of them than
#: a directory of ``ZipLimits.directory`` can list, and 2^39 drops fit into 64 bits.
WITHIN: Final = 1 << 24
_LONGEST_NAME: Final = 1024
_NAMES_TOLD: Final = 20
#: Manifests of folders that are held at once, if each has the most bytes that one may have.
_WHOLES: Final = 8


class Generations(Fact, type="generations"):
    """The last generation that a drop was given."""

    last: int


class Drop(Unit, key=("url", "etag"), type="drop"):
    """A zip, found. ``etag`` tells its content from any other under the same name: it is the object's ETag,
    or date and size where there is none."""

    url: str
    etag: str
    size: int = -1
    generation: int = 0


class Member(Unit, key=("url", "etag", "index"), type="member"):
    """A data file of a drop: where it lies, and for which table it is, by its manifest.

    ``fault``: why nobody will ever load it. ``manifest``: the index of the entry that could not be read when
    the drop was looked into, and is to be read now; ``guess``: it is data only if that manifest names it.
    """

    url: str
    etag: str
    index: int
    entry: Entry
    generation: int = 0
    declared: Declared | None = None
    format: str = ""
    fault: str = ""
    manifest: int = -1
    guess: bool = False


def pin(etag: str) -> str:
    """What a read is pinned by: an ETag, and nothing where there is none."""
    return etag if etag.startswith('"') else ""


@contextmanager
def final(etag: str) -> Iterator[None]:
    """What is damaged, and pinned by its ETag, stays damaged: no further attempt would find it whole."""
    try:
        yield
    except Damaged as error:
        if not pin(etag):
            raise
        raise Permanent(str(error)) from error


# ---------------------------------------------------------------------- found


async def new_drops(ctx: Context, source: str) -> list[Drop]:
    """The zips at `source` that the log does not know: the first ``HELD`` of them by date and URL."""
    found: list[tuple[str, str, Drop]] = []
    asked: list[tuple[str, str, Drop]] = []

    async def sift() -> None:
        known = await ctx.known([drop for _, _, drop in asked])
        found.extend(item for item, is_known in zip(asked, known, strict=True) if not is_known)
        asked.clear()
        if len(found) > 2 * HELD:
            found[:] = nsmallest(HELD, found, key=_when)

    async for info in _zips(ctx, source):
        etag = info.etag or f"{info.modified} {info.size}"
        asked.append((info.modified, info.url, Drop(url=info.url, etag=etag, size=info.size)))
        if len(asked) == ASKED:
            await sift()
    if asked:
        await sift()
    return [drop for _, _, drop in nsmallest(HELD, found, key=_when)]


def _when(item: tuple[str, str, Drop]) -> tuple[str, str]:
    return item[:2]


async def _zips(ctx: Context, source: str) -> AsyncIterator[ObjectInfo]:
    """The objects at `source` whose name ends in ``.zip``; the one that it names, if that is on the web."""
    if source.startswith(("http://", "https://")):
        info = await ctx.head(source)
        if info is None:
            raise Permanent(f"there is no {redact(source)}: name another zip as source=")
        yield info
        return
    last = source.rpartition("/")[2]
    named = not last or set(last) & set("*?[") or last.lower().endswith(".zip")
    async for info in ctx.list(source if named else f"{source}/"):
        if urlsplit(info.url, allow_fragments=False).path.lower().endswith(".zip"):
            yield info


# ---------------------------------------------------------------------- looked into


class Looking:
    """One look into a drop, whose archive is open."""

    def __init__(self, ctx: Context, drop: Drop, archive: Archive, limits: ZipLimits) -> None:
        self._ctx = ctx
        self._drop = drop
        self._archive = archive
        self._limits = limits
        self._wholes: dict[int, Whole | Permanent] = {}  # by index; or what is wrong with it
        self._guesses: frozenset[str] = frozenset()
        self._absent: Sequence[str] = ()  # what manifests of folders name, and is not there

    async def members(self) -> AsyncIterator[Member]:
        """The drop's data files, in the directory's order; then the log is told what was passed over, and
        what a manifest names that is not there: one manifest may serve many zips, each of which has some of
        its files, and so that is nobody's fault yet."""
        contents = await self._contents()
        files = contents.files
        for at in range(await self._registered(files), len(files), READS):
            some = files[at : at + READS]
            declared = await self._declared(some)
            for file in some:
                yield self._member(file, declared)
        await self._tell(contents)

    async def _contents(self) -> Contents:
        """What is in the archive, by its names and by the manifests of its folders."""
        contents = await self._sorted()
        paths: set[str] = set()
        stems: set[str] = set()
        names = Counter(named_as_manifest(manifest.name) for manifest in contents.wholes)
        size = 0
        for manifest in contents.wholes:
            folder = manifest.name[: -len(WHOLE)]
            size += manifest.size
            whole = await self._whole(manifest, names[named_as_manifest(manifest.name)], size)
            if whole is None:  # nobody knows what it names: any file that is nothing else
                self._guesses |= {e.name for e in contents.others if e.name.startswith(folder)}
                continue
            self._wholes[manifest.index] = whole
            if isinstance(whole, Whole):
                paths.update(folder + path for path in whole.files)
                stems.update(folder + stem for stem in whole.stems)
        if not (paths or self._guesses or stems):
            return contents
        self._absent = await self._ctx.offload(_absent, paths, self._archive.entries)
        return await self._sorted(paths | self._guesses, stems)

    async def _sorted(self, paths: Iterable[str] = (), stems: Iterable[str] = ()) -> Contents:
        steps = sorting_out(self._archive.entries, paths, stems)
        while (found := await self._ctx.offload(step, steps)) is None:
            pass
        return found

    async def _whole(self, manifest: Entry, same: int, size: int) -> Whole | Permanent | None:
        """The manifest of a folder, or what is wrong with it; ``None`` as of ``_read``. All of them are held
        at once: up to it they have `size` bytes. `same`: so many are called as it is."""
        if same > 1:
            return _several(same, manifest)
        most = _WHOLES * self._limits.manifest
        if size > most:
            return Permanent(
                f"its manifest {manifest.name!a}: up to it there are over {most:,} bytes of them"
            )
        data = await self._read(manifest)
        try:
            return None if data is None else await self._ctx.offload(Whole, data)
        except Permanent as error:
            return Permanent(f"its manifest {manifest.name!a}: {error}")

    async def _read(self, manifest: Entry) -> bytes | None:
        """A manifest's bytes; ``None`` if it is not read for what the lane may change, or is damaged: that is
        told of when a member needs it."""
        try:
            return await self._archive.read(manifest, limit=self._limits.manifest)
        except (Permanent, Damaged):
            return None

    async def _registered(self, files: Sequence[File]) -> int:
        """How many of `files` an earlier attempt has registered, in this order."""
        at = 0
        while some := files[at : at + ASKED]:
            known = await self._ctx.known([self._unit(file) for file in some])
            if not all(known):
                return at + known.index(False)
            at += len(some)
        return at

    def _unit(
        self, file: File, declared: Declared | None = None, *, fault: str = "", manifest: int = -1
    ) -> Member:
        drop, entry = self._drop, file.entry
        if len(entry.name) > _LONGEST_NAME:  # an event holds only so much
            fault = f"its name has {len(entry.name):,} characters, of at most {_LONGEST_NAME:,}"
            entry = msgspec.structs.replace(entry, name=entry.name[:100], raw=b"")
        return Member(
            url=drop.url,
            etag=drop.etag,
            index=entry.index,
            entry=entry,
            generation=drop.generation * WITHIN + min(entry.index, WITHIN - 1),
            declared=declared,
            format=file.format,
            fault=fault,
            manifest=manifest,
            guess=file.entry.name in self._guesses,
        )

    async def _declared(self, files: Sequence[File]) -> dict[int, Declared | Permanent | None]:
        """What the sidecars of `files` declare, or what is wrong with one, by its index; ``None`` as of
        ``_read``."""
        paths = {file.sidecars[0].index: file.entry.name for file in files if len(file.sidecars) == 1}
        sidecars = [file.sidecars[0] for file in files if len(file.sidecars) == 1]
        found: dict[int, Declared | Permanent | None] = {}
        async for sidecar, data in self._archive.read_all(sidecars, limit=self._limits.manifest):
            known: Declared | Permanent | None = None
            if isinstance(data, bytes):
                read = partial(_by_sidecar, data, sidecar.name, paths[sidecar.index])
                known = await self._ctx.offload(read) if len(data) > _LONG else read()
            found[sidecar.index] = known
        return found

    def _member(self, file: File, sidecars: Mapping[int, Declared | Permanent | None]) -> Member:
        """`file`, with what its manifest declares, or with why there is nothing to go by."""
        try:
            return self._by_sidecar(file, sidecars) if file.sidecars else self._by_whole(file)
        except Permanent as error:
            return self._unit(file, fault=str(error))

    def _by_sidecar(self, file: File, sidecars: Mapping[int, Declared | Permanent | None]) -> Member:
        sidecar = file.sidecars[0]
        if len(file.sidecars) > 1:
            raise _several(len(file.sidecars), sidecar)
        declared = sidecars[sidecar.index]
        if isinstance(declared, Permanent):
            return self._unit(file, fault=str(declared))
        return self._unit(file, declared, manifest=sidecar.index if declared is None else -1)

    def _by_whole(self, file: File) -> Member:
        wrong: Permanent | None = None
        for manifest in file.wholes:
            whole = self._wholes.get(manifest.index)
            if whole is None:
                return self._unit(file, manifest=manifest.index)
            if isinstance(whole, Permanent):
                wrong = wrong or whole
                continue
            found = by_whole(whole, manifest.name, file.entry.name)
            if found is not None:
                return self._unit(file, found)
        if wrong:
            raise wrong
        sidecar = f"{stem_of(file.entry.name)}.json"
        raise Permanent(f"it has no manifest: there is no {sidecar[:100]!a}, and no {WHOLE} that names it")

    async def _tell(self, contents: Contents) -> None:
        """Say in the log what was passed over, if anything was."""
        counts = {
            "directories": contents.directories,
            "litter": contents.litter,
            "others": len(contents.others),
        }
        told: dict[str, Any] = dict(counts)
        told["names"] = [entry.name[:100] for entry in contents.others[:_NAMES_TOLD]]
        if self._absent:
            told |= {
                "absent": len(self._absent),
                "absent_names": [name[:100] for name in self._absent[:_NAMES_TOLD]],
            }
        elif not any(counts.values()):
            return

        async def passed_over() -> dict[str, Any]:
            return told

        await self._ctx.step("passed-over", passed_over)


def _absent(paths: set[str], entries: Sequence[Entry]) -> list[str]:
    """Those of `paths` that no entry is called as."""
    return sorted(paths.difference(entry.name for entry in entries))


def _several(count: int, manifest: Entry) -> Permanent:
    return Permanent(f"there are {count} manifests {manifest.name!a}: leave one of them")


def _by_sidecar(data: bytes, sidecar: str, path: str) -> Declared | Permanent:
    try:
        return by_sidecar(data, sidecar, path)
    except Permanent as error:
        return Permanent(str(error))  # not the one raised, whose traceback holds the data


async def read_manifest(archive: Archive, member: Member, limits: ZipLimits) -> Declared | None:
    """What the manifest of `member` that could not be read before declares now; ``None`` if it does not name
    it, and only that would make it data.

    Raises:
        Permanent: it is refused still, or declares nothing that can be used.
        Damaged: it is damaged.
    """
    manifest, path = archive.entries[member.manifest], member.entry.name
    data = await archive.read(manifest, limit=limits.manifest)
    if stem_of(manifest.name) == stem_of(path):
        return by_sidecar(data, manifest.name, path)
    found = by_whole(Whole(data), manifest.name, path)
    if found is None and not member.guess:
        raise Permanent(f"it has no manifest: {manifest.name!a} does not name it")
    return found
