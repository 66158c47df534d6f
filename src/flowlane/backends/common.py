"""What the embedded backends have in common: the checks of a commit, copies of tallies, channels."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence

import msgspec

from flowlane.errors import ConfigError, Permanent, VersionConflict, redact
from flowlane.events import MAX_ACTIONS, SURELY_FITS, Event, Raw, encode, encode_data
from flowlane.lane import duration
from flowlane.ports import Append, ChannelBatch, ChannelRecord, Commit, Committed, Tally
from flowlane.state import Counts, RunTally, StageTally

#: A channel's records are spread over this many partitions, by their key.
PARTITIONS = 16

#: Seconds for which a consumer holds a partition whose batch it was handed; after that another one gets it.
#: Where the URI says otherwise, so many at least: stages renew their holds each second.
CHANNEL_LEASE = 30.0
SHORTEST_HOLD = 2.0

#: Bytes of data and key in one record of a channel, at most: what a Kinesis stream takes by default.
RECORD_BYTES = 1 << 20

#: A batch of a channel has so many bytes of data, at most, unless its first record has more.
BATCH_BYTES = 2 << 20

# What is put at once goes into the channel in portions of so many records and bytes, at most.
_PORTION = 2048
_PORTION_BYTES = 8 << 20

#: Seconds between two looks for what another process may have written, or what has become due.
POLL = 0.05


def held_for(uri: str, hold: str) -> float:
    """Seconds for which partitions are held, by the option `hold` of `uri`.

    Raises:
        ConfigError: it is no duration, or too short.
    """
    if not hold:
        return CHANNEL_LEASE
    try:
        seconds = duration(hold)
    except ConfigError as error:
        raise ConfigError(f"{redact(uri)}: hold={hold}: {error}") from None
    if seconds < SHORTEST_HOLD:
        raise ConfigError(f"{redact(uri)}: hold={hold} is too short: {SHORTEST_HOLD:g}s is the least")
    return seconds


def partition(key: str) -> int:
    """The partition that `key` belongs to; the same in every process and release."""
    return zlib.crc32(key.encode()) % PARTITIONS


async def portions(name: str, records: Sequence[ChannelRecord]) -> Sequence[Sequence[ChannelRecord]]:
    """`records`, to be put to the channel `name`, in portions that are stored one after another, so that
    neither the loop nor a transaction is held up by how many there are.

    Raises:
        Permanent: one of them is too large, or its key is no text.
    """
    found: list[Sequence[ChannelRecord]] = []
    start = size = 0
    for number, record in enumerate(records):
        length = record_size(name, number, record)
        size += length
        if size > _PORTION_BYTES or number - start == _PORTION:
            if number > start:
                found.append(records[start:number])
            start, size = number, length
            await asyncio.sleep(0)
    if start < len(records):
        found.append(records[start:])
    return found


def record_size(name: str, number: int, record: ChannelRecord) -> int:
    """The bytes of data and key of the `number`-th record that is put to the channel `name`.

    Raises:
        Permanent: see ``portions``.
    """
    try:
        size = len(record.data) + len(record.key.encode())
    except UnicodeEncodeError:
        raise Permanent(
            f"channel {name}: the key of record {number} is not Unicode text: put it under another one"
        ) from None
    if size > RECORD_BYTES:
        raise Permanent(
            f"channel {name}: record {number} has {size:,} bytes with its key, a channel takes "
            f"{RECORD_BYTES:,}: store the data and put its URL"
        )
    return size


def checked(work: Sequence[Commit]) -> Sequence[Commit]:
    """`work` with every payload as immutable JSON bytes; malformed commits are refused before any is applied.

    Raises:
        Permanent: a commit holds more than ``MAX_ACTIONS`` actions, names one stream twice, or appends no
            event, or one that does not belong where it is put (subject, version) or is too long.
    """
    fit: list[Commit] = []
    for commit in work:
        appends = commit.appends
        actions = len(commit.tally)
        plain = True
        for append in appends:
            stream, version, events = append.stream, append.expected, append.events
            if not events:
                raise Permanent(f"a commit appends nothing to {stream}")
            for event in events:
                version += 1
                if event.version != version or event.subject != stream:
                    raise Permanent(
                        f"event {event.id} ({event.type}) of {event.subject} version {event.version} "
                        f"cannot be version {version} of {stream}"
                    )
                data = event.data
                if type(data) is not Raw or len(data) > SURELY_FITS:
                    plain = False
            actions += len(events)
        if actions > MAX_ACTIONS:
            raise Permanent(
                f"a commit of {actions} actions was refused: the limit is {MAX_ACTIONS}, use several"
            )
        if len(appends) > 1 and _doubled(appends):
            raise Permanent(f"a commit appends twice to one stream: {[append.stream for append in appends]}")
        fit.append(commit if plain else _sealed(commit))
    return fit


def _doubled(appends: Sequence[Append]) -> bool:
    if len(appends) == 2:  # a unit's own and its only child's: most of those that are not alone
        return appends[0].stream == appends[1].stream
    return len({append.stream for append in appends}) < len(appends)


def _sealed(commit: Commit) -> Commit:
    appends = [Append(a.stream, a.expected, [_seal(event) for event in a.events]) for a in commit.appends]
    return msgspec.structs.replace(commit, appends=appends)


def _seal(event: Event) -> Event:
    if not isinstance(event.data, Raw):
        event = msgspec.structs.replace(event, data=Raw(encode_data(event.data)))
    if len(event.data) > SURELY_FITS:
        encode(event)
    return event


def counted(work: Iterable[Commit]) -> Iterable[tuple[Tally, int]]:
    """The tallies of `work`, and how often each is to be counted: small units that end alike share one."""
    tallies: dict[int, Tally] = {}
    times: dict[int, int] = {}
    for commit in work:
        for tally in commit.tally:
            known = id(tally)
            tallies[known] = tally
            times[known] = times.get(known, 0) + 1
    return zip(tallies.values(), times.values(), strict=True)


def tell(
    work: Sequence[Commit],
    answers: list[Committed | VersionConflict],
    complete: dict[tuple[str, int], RunTally],
) -> None:
    """In the `answers` to `work`, tell of each round that is `complete` now the last commit that counted in
    it, which made it so: each that is told goes and completes the run. Empties `complete`."""
    for n in range(len(work) - 1, -1, -1):
        if not complete:
            return
        if isinstance(answers[n], Committed):
            counted_in = dict.fromkeys((tally.run, tally.round) for tally in work[n].tally)
            rounds = [key for key in counted_in if key in complete]
            if rounds:
                answers[n] = Committed({key: complete.pop(key) for key in rounds})


def copy_counts(counts: Counts) -> Counts:
    """`counts` as they are now."""
    return msgspec.structs.replace(counts)


def copy_tally(tally: RunTally) -> RunTally:
    """`tally` as it is now, for somebody who keeps it while the original goes on counting."""
    stages: dict[str, StageTally] = {
        name: msgspec.structs.replace(stage, counts=copy_counts(stage.counts))
        for name, stage in tally.stages.items()
    }
    return RunTally(tally.closed, stages)


class News:
    """Something was written that receivers or consumers of this process may wait for, each for some names (of
    stages, of channels) or for whatever comes."""

    def __init__(self) -> None:
        self._count = 0
        self._latest: dict[str, int] = {}  # of each name, as the count was then
        self._latest_of_all = 0
        # In order: simulations depend on it.
        self._waiters: dict[asyncio.Future[None], Collection[str]] = {}

    def __call__(self, names: Collection[str] = ()) -> None:
        """There are news of `names`; if there are none of these, of everything."""
        self._count += 1
        if not names:
            self._latest_of_all = self._count
        for name in names:
            self._latest[name] = self._count
        for waiter, wanted in self._waiters.items():
            if not (names and wanted) or any(name in names for name in wanted):
                _wake(waiter)

    @property
    def count(self) -> int:
        """How often there were news; taken before one looks, and given to ``wait`` if one found nothing."""
        return self._count

    async def wait(self, seen: int, seconds: float, names: Collection[str] = ()) -> None:
        """Return when there are news of `names` (if there are none of these: any news) since `seen`, after
        `seconds` at the latest."""
        if seen != self._count and (
            not names or max(self._latest_of_all, *[self._latest.get(name, 0) for name in names]) > seen
        ):
            return
        # Receivers that find nothing do little else than this; an event and a timeout cost twice as much.
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _wake, waiter)
        self._waiters[waiter] = names
        try:
            await waiter
        finally:
            timer.cancel()
            del self._waiters[waiter]


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def consume(
    find: Callable[[], Awaitable[ChannelBatch | float | None]],
    give_up: Callable[[], None],
    news: News,
    wait: float,
    poll: float,
    names: Collection[str] = (),
) -> AsyncIterator[ChannelBatch]:
    """What ``Channel.consume`` promises, made of `find` and `give_up`; of new records there are `news` under
    `names`.

    `find` answers with the next batch; or in how many seconds a partition that another consumer holds becomes
    free; or with ``None``. `give_up` frees what was handed out and not settled.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + wait
    try:
        while True:
            seen = news.count
            found = await find()
            if found is not None and not isinstance(found, float):
                yield found
                end = loop.time() + wait
                continue
            left = end - loop.time()
            # What another one holds is not the end: should it die, its records come here.
            if found is None and left <= 0:
                return
            pauses = [seconds for seconds in (found, left if left > 0 else None) if seconds is not None]
            # At least a millisecond: a difference too small to move the clock would be asked for without end.
            await news.wait(seen, max(0.001, min(*pauses, poll)), names)
    finally:
        give_up()
