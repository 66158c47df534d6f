"""``http_archive``: archives published over HTTP at regular times, landed in a lake as they are.

Discovery asks for each period's archive by HEAD, from a bookmark on. A period whose archive is there becomes
a unit; one that is missing is state of the bookmark: asked for again while it is recent, a recorded permanent
gap once it is old. A server that does not answer (5xx, 429) has not said "missing".
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec

from flowlane.errors import ConfigError, Permanent, Retryable, Unauthorized
from flowlane.events import Event
from flowlane.lane import Fact, Lane, Policy, Unit, duration
from flowlane.ports import Context, ObjectInfo
from flowlane.status import LogView

#: Periods asked for at once.
PROBES = 16
#: So many times in a row may nobody answer for ``PROBES`` periods before the rest is left for another time.
MAX_SILENCE = 4
#: A bookmark is one event: beyond this it takes up no further periods. Leaves room for those in hand.
MAX_BOOKMARK = 200_000
#: ... of which an answer takes up at most so many characters.
_MAX_REASON = 200
#: Periods whose landing places are compared when a lane is declared: more than a month of hours.
_LOOK_AHEAD = 800
_DOOMSDAY = datetime.max.replace(tzinfo=UTC)


class Archive(Unit, key=("period",), type="hour"):
    """One period's archive, found."""

    period: str
    url: str
    to: str
    etag: str = ""
    size: int = -1


class ArchiveVersion(Unit, key=("period", "etag"), type="hour"):
    """One period's archive in one of its published versions (``refresh=True``)."""

    period: str
    url: str
    to: str
    etag: str = ""
    size: int = -1


class Pending(msgspec.Struct, frozen=True, omit_defaults=True):
    """A period whose archive was not there when asked for: since when, and what was answered."""

    since: str
    reason: str


class Bookmark(Fact, type="bookmark"):
    """How far the archive is covered: every period from ``start`` (of the lane, where it does not say) to
    ``next`` is a unit, pending, or a gap."""

    next: str
    pending: dict[str, Pending] = msgspec.field(default_factory=dict)
    gaps: list[tuple[str, str]] = msgspec.field(
        default_factory=list
    )  #: [first, last] periods, both inclusive, in order
    etags: dict[str, str] = msgspec.field(
        default_factory=dict
    )  #: refresh only: the version last found of each recent period
    heard: str = ""  #: the run in which the server, silent for some periods, did answer for others
    start: str = ""
    asked: str = ""  #: which template said that the gaps are gaps
    doubted: list[tuple[str, str]] = msgspec.field(
        default_factory=list
    )  #: gaps that another template said are gaps, to be asked for again; as ``gaps``


def http_archive(
    name: str,
    *,
    url: str,
    start: str | datetime,
    to: str,
    step: str = "1h",
    every: str | None = "30m",
    until: str | datetime | None = None,
    headers: Mapping[str, str] | None = None,
    max_gap: str = "7d",
    verify: Literal["content", "length"] = "content",
    refresh: bool = False,
    policy: Policy | None = None,
) -> Lane:
    """A lane that lands the archive of each period from `start` (inclusive) to `until` (exclusive).

    `url` is a ``str.format`` template over the period's beginning, the UTC datetime ``t``; so may `to` be,
    the folder they land in. A period is asked for once it is over; one that is missing for longer than
    `max_gap` is a permanent gap, unless the `url` changes: then it is asked for once more. A `start` that is
    moved later on moves what is covered. User and password of the `url` are sent, and not logged.

    ``verify="content"`` proves a ``.gz`` or ``.zst`` body by decoding it on the way through, ``"length"``
    trusts length and magic number. With `refresh`, an archive that is published again within `max_gap` is
    landed again, over the old one. Header values may be secret references.

    Raises:
        ConfigError: a template, time or duration cannot be used; said with what to write instead.
    """
    url, headers = _without_user(url, headers)
    plan = _Plan(
        url, _moment("start", start), None if until is None else _moment("until", until), step, to, max_gap
    )
    if verify not in ("content", "length"):
        raise ConfigError(f"verify={verify!r}: must be content or length")
    kind = ArchiveVersion if refresh else Archive
    lane = Lane(name, every=every, policy=policy or Policy())

    @lane.stage(on=lane.triggered, concurrency=1)
    async def find(event: Event, ctx: Context) -> AsyncIterator[Unit]:
        async with _resolved(headers, ctx) as given:
            search = _Search(plan, await ctx.recall(Bookmark), ctx, given, refresh)
            async for periods in search.chunks():
                for period, found in await search.probe(periods):
                    if found is not None:
                        yield kind(
                            period=_text(period),
                            url=plan.url(period),
                            to=plan.target(period),
                            etag=_version(found) if refresh else found.etag,
                            size=found.size,
                        )
                if search.changed:
                    yield search.bookmark()
            search.finish()

    @lane.stage(on=kind)
    async def land(event: Event, ctx: Context) -> None:
        archive = event.data
        async with _resolved(headers, ctx) as given:
            await ctx.copy(
                archive.url,
                to=archive.to,
                verify=verify,
                headers=given,
                etag=archive.etag if refresh and archive.etag.startswith('"') else "",
                overwrite=refresh,
            )

    @lane.view("hours")
    async def hours(log: LogView) -> dict[str, Any]:
        return await _coverage(plan, log)

    return lane


class _Plan:
    """The periods, and where each one's archive is and goes."""

    def __init__(
        self, url: str, start: datetime, until: datetime | None, step: str, to: str, max_gap: str
    ) -> None:
        self._url = url
        #: Tells templates apart, and not what is in them.
        self.template = blake2b(str(url).encode(), digest_size=8).hexdigest()
        if "://" not in str(to):
            raise ConfigError(f"to={to!r} is no URL: name a folder, as in file:///data/lake/")
        folder, mark, options = to.partition("?")
        self._to = (folder if folder.endswith("/") else folder + "/", mark + options)
        self.start = start
        self.until = until
        self.step = timedelta(seconds=duration(step))
        self.max_gap = timedelta(seconds=duration(max_gap))
        if self.step.microseconds or start.microsecond:
            raise ConfigError(f"step={step!r}, start={start}: periods begin and last whole seconds")
        if until is not None and until <= start:
            raise ConfigError(
                f"until={_text(until)} is not after start={_text(start)}: nothing would ever be landed"
            )
        try:
            second = start + self.step
        except OverflowError:
            raise ConfigError(
                f"start={_text(start)}, step={step!r}: there would be no second period before the year 10000"
            ) from None
        if self.url(start) == self.url(second):
            raise ConfigError(
                f"url={url!r} is the same for every period: put the time in, as in {{t:%Y-%m-%d}}-{{t.hour}}"
            )
        known: set[str] = set()
        period, stop = start, min(until or _DOOMSDAY, _DOOMSDAY - self.step)
        while period < stop and len(known) < _LOOK_AHEAD:
            target = self.target(period)
            if target in known:
                raise ConfigError(f"url={url!r}: archives of different periods would land in {target}")
            known.add(target)
            period += self.step

    def url(self, period: datetime) -> str:
        """The URL of the period's archive."""
        return self._format("url", self._url, period)

    def target(self, period: datetime) -> str:
        """Where the period's archive lands: `to`, and the last segment of its URL's path."""
        name = urlsplit(self.url(period)).path.rpartition("/")[2]
        if not name:
            raise ConfigError(f"url={self._url!r} ends in no file name: nothing to call the landed file")
        folder, options = self._to
        return self._format("to", folder, period) + name + options

    def last(self, now: datetime) -> datetime:
        """The first period that is not over yet at `now` (or is not wanted)."""
        periods = int((now - self.start) / self.step)
        last = self.start + max(0, periods) * self.step
        return min(last, self.until) if self.until else last

    def _format(self, what: str, template: str, period: datetime) -> str:
        try:
            return template.format(t=period)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{what}={template!r} cannot be filled in ({type(error).__name__}: {error}): "
                "it is a str.format template over the datetime t, as in {t:%Y-%m-%d}-{t.hour}"
            ) from None


def _fitted(plan: _Plan, mark: Bookmark | None) -> Bookmark:
    """`mark` as the plan's start and template, which may have been changed since, let it stand. What lies
    before the start is forgotten; if the start is moved back, it is found known, or asked for again."""
    start = _text(plan.start)
    if mark is None:
        return Bookmark(next=start, start=start, asked=plan.template)
    began = _parse(mark.start or start)
    if plan.until is not None and plan.until < began:
        return Bookmark(next=start, start=start, asked=plan.template)  # apart from what is covered
    if mark.asked not in ("", plan.template):
        mark = msgspec.structs.replace(mark, gaps=[], doubted=sorted(mark.doubted + mark.gaps))
    mark = msgspec.structs.replace(mark, asked=plan.template)
    if began > plan.start:
        return mark
    return msgspec.structs.replace(
        mark,
        next=_text(max(_parse(mark.next), plan.start)),
        start=start,
        pending={text: item for text, item in mark.pending.items() if _parse(text) >= plan.start},
        etags={text: etag for text, etag in mark.etags.items() if _parse(text) >= plan.start},
        gaps=_from(plan.start, mark.gaps),
        doubted=_from(plan.start, mark.doubted),
    )


def _from(start: datetime, ranges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What of `ranges` does not lie before `start`."""
    return [(max(first, _text(start)), last) for first, last in ranges if _parse(last) >= start]


class _Search:
    """One walk from the bookmark to now; the bookmark it leaves behind never passes a pending period."""

    def __init__(
        self, plan: _Plan, mark: Bookmark | None, ctx: Context, headers: dict[str, str] | None, refresh: bool
    ) -> None:
        self._plan = plan
        self._ctx = ctx
        self._headers = headers
        self._refresh = refresh
        fitted = _fitted(plan, mark)
        self._start, self._next = _parse(fitted.start), _parse(fitted.next)
        self._pending = dict(fitted.pending)
        self._gaps = list(fitted.gaps)
        self._doubted = list(fitted.doubted)
        self._etags = dict(fitted.etags)
        self._heard = fitted.heard
        self._answers = 0
        self._silent: list[Retryable | Permanent] = []
        self._silence = 0  # how many times in a row nobody answered
        self._full = False
        self.changed = False

    async def chunks(self) -> AsyncIterator[list[datetime]]:
        """What to ask for: pending periods, those after the bookmark, then those before it, if the start was
        moved back, and gaps that are doubted. A server that is down is not asked for years of hours."""
        again = sorted(_parse(text) for text in {**self._pending, **(self._etags if self._refresh else {})})
        for i in range(0, len(again), PROBES):
            yield again[i : i + PROBES]
        self._silence = 0
        start, step = self._plan.start, self._plan.step
        last = self._plan.last(self._ctx.now())
        while self._next < last and self._goes_on():
            count = min(PROBES, -((self._next - last) // step))
            yield [self._next + n * step for n in range(count)]
        while self._start > start and self._goes_on():
            count = -((start - self._start) // step)  # of periods before what is covered
            yield [start + n * step for n in range(max(count - PROBES, 0), count)]
        while self._doubted and self._goes_on():
            first, last = map(_parse, self._doubted[0])
            periods = [first + n * step for n in range(min(PROBES, (last - first) // step + 1))]
            rest = periods[-1] + step
            self._doubted[:1] = [(_text(rest), _text(last))] if rest <= last else []
            self.changed = True
            yield periods

    def _goes_on(self) -> bool:
        """Whether to ask for more: somebody answers, and the bookmark has room."""
        if self._silence >= (MAX_SILENCE if self._is_heard() else 1):
            return False
        self._full = len(msgspec.json.encode(self._mark())) > MAX_BOOKMARK
        return not self._full

    async def probe(self, periods: list[datetime]) -> list[tuple[datetime, ObjectInfo | None]]:
        """Ask for all of `periods`, and note the answers in order."""
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(self._head(period)) for period in periods]
        answers = dict(zip(periods, [task.result() for task in asked], strict=True))
        mute = all(isinstance(answer, Retryable) for answer in answers.values())
        self._silence = self._silence + 1 if mute else 0
        known = await self._known([p for p, answer in answers.items() if not isinstance(answer, ObjectInfo)])
        found = [(period, self._note(period, answers[period], period in known)) for period in periods]
        if self._silent and self._answers and self._heard != self._ctx.run:
            self._heard = self._ctx.run  # the next attempt asks only for the silent ones
            self.changed = True
        return found

    async def _known(self, periods: list[datetime]) -> set[datetime]:
        """Which of `periods` are units, though the bookmark may not say so: an attempt that found them ended
        before its bookmark was kept. One with a version in its key cannot be asked for."""
        if self._refresh or not periods:
            return set()
        plan = self._plan
        units = [Archive(period=_text(p), url=plan.url(p), to=plan.target(p)) for p in periods]
        known = await self._ctx.known(units)
        return {period for period, is_known in zip(periods, known, strict=True) if is_known}

    async def _head(self, period: datetime) -> ObjectInfo | Retryable | Permanent | None:
        try:
            return await self._ctx.head(self._plan.url(period), headers=self._headers)
        except (Retryable, Permanent) as error:
            return error

    def _note(
        self, period: datetime, answer: ObjectInfo | Retryable | Permanent | None, known: bool
    ) -> ObjectInfo | None:
        text = _text(period)
        if period >= self._next:
            self._next = period + self._plan.step
            self.changed = True
        elif period < self._start:
            self._start = period
            self.changed = True
        if known:  # neither waited for nor missing, whatever its source says now
            self._answers += answer is None
            self.changed |= self._pending.pop(text, None) is not None
            return None
        if isinstance(answer, Retryable | Permanent):
            self._silent.append(answer)
            self._wait(text, str(answer)[:_MAX_REASON])
            return None
        self._answers += 1
        if answer is None:
            self._missing(period, text)
            return None
        self.changed |= self._pending.pop(text, None) is not None
        return answer if self._is_new(period, text, answer) else None

    def _is_new(self, period: datetime, text: str, found: ObjectInfo) -> bool:
        if not self._refresh:
            return True
        known, version = self._etags.get(text), _version(found)
        if self._ctx.now() - period > self._plan.max_gap + self._plan.step:
            self.changed |= self._etags.pop(text, None) is not None
        elif known != version:
            self._etags[text] = version
            self.changed = True
        return known is None or known != version

    def _missing(self, period: datetime, text: str) -> None:
        recent = self._ctx.now() - (period + self._plan.step) <= self._plan.max_gap
        if text in self._etags:  # it was found before it was taken away: a unit, whatever its source says now
            self.changed |= not recent and self._etags.pop(text, None) is not None
            return
        if recent:
            self._wait(text, "404: not published (yet)")
            return
        self._pending.pop(text, None)
        self._add_gap(period)
        self.changed = True

    def _wait(self, text: str, reason: str) -> None:
        if text in self._etags:
            return
        known = self._pending.get(text)
        if known is None or known.reason != reason:
            since = known.since if known else _text(self._ctx.now())
            self._pending[text] = Pending(since, reason)
            self.changed = True

    def _add_gap(self, period: datetime) -> None:
        """Add to the ranges, joined where they touch: 55 missing hours are one range."""
        step = self._plan.step
        ranges = sorted([(_parse(a), _parse(b)) for a, b in self._gaps] + [(period, period)])
        joined = [ranges[0]]
        for first, last in ranges[1:]:
            if first <= joined[-1][1] + step:
                joined[-1] = (joined[-1][0], max(joined[-1][1], last))
            else:
                joined.append((first, last))
        self._gaps = [(_text(a), _text(b)) for a, b in joined]

    def bookmark(self) -> Bookmark:
        """The bookmark as it stands now, to be kept."""
        self.changed = False
        return self._mark()

    def _mark(self) -> Bookmark:
        return Bookmark(
            next=_text(self._next),
            pending=dict(self._pending),
            gaps=list(self._gaps),
            etags=dict(self._etags),
            heard=self._heard,
            start=_text(self._start),
            asked=self._plan.template,
            doubted=list(self._doubted),
        )

    def _is_heard(self) -> bool:
        return self._heard == self._ctx.run or self._answers > 0

    def finish(self) -> None:
        """Raises:
        Retryable: the server did not answer for some periods and the policy allows to ask again; or it
            answered for none at all.
        Permanent: it refuses to answer, for all of them; or more periods wait than the bookmark can hold.
        """
        passing = [error for error in self._silent if isinstance(error, Retryable)]
        if passing and (self._ctx.attempts_left or not self._is_heard()):
            delay = max(error.delay or 0.0 for error in passing) or None
            raise Retryable(f"no answer for {len(passing)} periods: {passing[0]}", delay=delay)
        if self._silent and not self._is_heard():
            raise self._silent[0]
        if self._full:
            raise Permanent(
                f"the bookmark is full, with {len(self._pending):,} periods pending (see flowlane status) "
                f"and {len(self._etags):,} watched for a refresh, and passes no other period: shorten "
                "max_gap, or move start"
            )


def _without_user(url: str, headers: Mapping[str, str] | None) -> tuple[str, Mapping[str, str] | None]:
    """`url` without user and password, which are no business of the log, and headers that say the same."""
    scheme, separator, rest = str(url).partition("://")
    place = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" not in place:
        return url, headers
    user, _, host = place.rpartition("@")
    if not user or "{" in user or "}" in user:
        raise ConfigError("url= names a user that is a template: put it into headers= as Authorization")
    name, _, password = user.partition(":")
    basic = b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()
    given = dict(headers or {})
    if "authorization" not in map(str.lower, given):
        given["Authorization"] = f"Basic {basic}"
    return f"{scheme}{separator}{host}{rest[len(place) :]}", given


def _version(found: ObjectInfo) -> str:
    """What tells a published version from the next one: the ETag, which pins it too, or the best there is."""
    return found.etag or (f"{found.modified} {found.size}" if found.modified or found.size >= 0 else "")


@asynccontextmanager
async def _resolved(headers: Mapping[str, str] | None, ctx: Context) -> AsyncIterator[dict[str, str] | None]:
    """`headers` with their secrets. What is refused for good in here is tried again, by the policy, if one of
    them has been rotated: servers have more than one status for those that they do not know any more."""
    given = await _resolve(headers, ctx)
    try:
        yield given
    except Permanent as error:
        renewed = given
        with suppress(ConfigError, Retryable):  # the refusal is what is told of
            renewed = await _resolve(headers, ctx, fresh=True)
        if renewed != given:
            raise Unauthorized(f"{error} (a secret in headers= has changed since)") from None
        raise


async def _resolve(
    headers: Mapping[str, str] | None, ctx: Context, *, fresh: bool = False
) -> dict[str, str] | None:
    if not headers:
        return None
    return {
        name: await ctx.secret(value, fresh=fresh)
        if value.startswith(("env://", "secretsmanager://"))
        else value
        for name, value in headers.items()
    }


async def _coverage(plan: _Plan, log: LogView) -> dict[str, Any]:
    """The map that ``flowlane status`` shows."""
    mark = _fitted(plan, await log.recall(Bookmark))
    start, following = _parse(mark.start), _parse(mark.next)
    gaps, pending = sorted(mark.gaps + mark.doubted), mark.pending
    missing = sum(int((_parse(b) - _parse(a)) / plan.step) + 1 for a, b in gaps)
    dead = {unit.rpartition("hour/")[2]: reason async for unit, reason in log.dead() if "/hour/" in unit}
    loading = [unit.rpartition("hour/")[2] async for unit in log.open() if "/hour/" in unit]
    passed = int((following - start) / plan.step)
    # Of a period's versions, any one; and what lies before a start that was moved on is not counted at all.
    unsettled = {unit.partition("@")[0] for unit in (*dead, *loading)}
    unsettled = {period for period in unsettled if period >= mark.start}
    return {
        "start": _text(start),
        "next": _text(following),
        "step": plan.step.total_seconds(),
        "bookmark": min([_text(following), *pending]),
        "covered": passed - missing - len(pending) - len(unsettled),
        "landing": loading,
        "pending": {period: item.reason for period, item in sorted(pending.items())},
        "missing": [list(gap) for gap in gaps],
        "dead": dead,
    }


def _moment(what: str, value: str | datetime) -> datetime:
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{what}={value!r} is no time: write it as 2024-01-01T00 (UTC)") from None


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _parse(text: str) -> datetime:
    return datetime.fromisoformat(text)
