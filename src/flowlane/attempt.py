"""One attempt at one unit: what a handler's ``Context`` does, and the commits that come of it.

An attempt knows the version of its stream's head and expects exactly that with every append: the moment
another attempt takes the unit over, everything this one still wants to commit is refused.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from flowlane import events
from flowlane.archive import connect_archive
from flowlane.completion import notice
from flowlane.deadline import Deadline, Interrupted
from flowlane.discovery import Findings
from flowlane.errors import ConfigError, Fenced, Permanent, VersionConflict
from flowlane.events import Event, Raw
from flowlane.handling import Handling, payload
from flowlane.landing import copy
from flowlane.lane import Completed, Dead, F, Stage, Unit, fact_stream, stream_of
from flowlane.notices import announce
from flowlane.ports import (
    Append,
    Archive,
    Commit,
    Committed,
    Delivery,
    ObjectInfo,
    Rows,
    Store,
    Tally,
    UnitRef,
)
from flowlane.state import Counts, Progress, Transfer, progress
from flowlane.streams.zip.entry import ZipLimits
from flowlane.transfer import Selection, load
from flowlane.turns import WAITS
from flowlane.veil import conceal

if TYPE_CHECKING:
    from flowlane.engine import Engine

R = TypeVar("R")

_MAX_STEP_RESULT = 64 * 1024
#: What the log is asked to hold of a unit's state while it goes on: its end, with its reason, must fit too.
_MAX_PROGRESS = events.MAX_EVENT_BYTES - 16 * 1024
_NO_COUNTS = Counts()
_NO_STEPS: frozenset[str] = frozenset()
_ONE_CHILD = Raw(b'{"children":1}')
#: "again": as "retried" or "continued", with the delivery that is there, which was given back for it.
Outcome = Literal["settled", "dead", "retried", "continued", "again", "conflict", "released", "failed"]
Terminal = Literal["unit.settled", "unit.skipped", "unit.superseded", "unit.dead"]
_SETTLED: tuple[Terminal, str] = ("unit.settled", "")  # how most of them end


class Attempt:
    """One handling of one delivery; the handler sees it as its ``Context``."""

    def __init__(
        self, engine: Engine, handling: Handling, delivery: Delivery, origin: Event, deadline: Deadline
    ) -> None:
        self.engine = engine
        self.handling = handling
        self.stage: Stage = handling.stage
        self.delivery = delivery
        self.origin = origin
        self.event = origin
        self.version = origin.version
        self.deadline = deadline
        # No defaults of the class: each look at one that no instance has set costs several times as much.
        self.started = False
        self.lost = False
        self.moved = False
        self.waiting = False  #: see ``waits``
        self.began = 0.0
        self.doing = ""  #: what a long effect is at before it reaches a safe point, for whoever ends it there
        self.again = -1.0  #: seconds for which the delivery is given back, once the last commit is through
        self.kind: Terminal = "unit.settled"
        self.final: Event | None = None
        #: Not a closure: it would hold the attempt, and each would wait for the garbage collector.
        self.ending: tuple[Terminal, str] | tuple[str, float, str] = _SETTLED
        self.outcome: Outcome = "released"
        self.beating: tuple[Event, asyncio.Future[Committed | VersionConflict]] | None = None
        self.unsure: Event | None = None  #: handed to the log, and nobody said what became of it
        self._progress: Progress | None = None
        self._findings: Findings | None = None
        self._ordinal = 0
        self._logged = events.EMPTY
        self._logged_at = 0.0
        self._busy = False
        self._turn: asyncio.Lock | None = None
        self._stepped = _NO_STEPS  #: the steps that the handler has had an answer from

    # ------------------------------------------------------------------ what it stands for

    @property
    def progress(self) -> Progress:
        """The unit's cumulative state, changed by this attempt and logged with its next event."""
        if self._progress is None:
            self._progress = progress(self.origin)
        return self._progress

    @property
    def lane(self) -> str:
        return self.stage.lane

    @property
    def run(self) -> str:
        return self.origin.run

    @property
    def unit(self) -> str:
        return self.origin.subject

    @property
    def attempts_left(self) -> int:
        """Attempts that the policy still allows after this one."""
        begun = self.progress.attempt if self.started else self.progress.attempt + 1
        return max(0, self.stage.policy.retries + 1 - max(begun, 1))

    @property
    def ref(self) -> UnitRef:
        """Who writes: for sinks to fence by."""
        return UnitRef(self.unit, self.progress.token, getattr(self.event.data, "generation", 0) or 0)

    def now(self) -> datetime:
        return self.engine.clock.now()

    def near_deadline(self) -> bool:
        """Whether a long effect should stop at its next safe point."""
        return self.lost or self.deadline.near(self.engine.clock.monotonic())

    def next_name(self, kind: str) -> str:
        """The name of the handler's next effect of `kind`: by order, the same on every attempt."""
        self._ordinal += 1
        return f"{kind}-{self._ordinal}"

    # ------------------------------------------------------------------ appending

    def make(self, kind: str, data: Progress | Mapping[str, int] | Raw | None) -> Event:
        """The next event of the unit's own stream."""
        engine, origin = self.engine, self.origin
        if type(data) is not Raw:
            data = events.EMPTY if data is None else Raw(events.encode_data(data))
        return Event(
            engine.next_id(),
            origin.source,
            kind,
            origin.subject,
            engine.stamp(),
            data,
            self.version + 1,
            origin.run,
            origin.round,
            self.event.id,
            self.handling.name,
            "",
            1,
            origin.traceparent,
            origin.partitionkey,
        )

    async def start(self) -> None:
        """Append ``attempt.started`` before the first effect outside; its version is the fencing token."""
        if self.started:
            return
        async with self._logs():
            if self.started:  # another effect, begun at the same time
                return
            now = self.progress
            now.attempt += 1
            now.token = self.version + 1
            try:
                await self._append(events.ATTEMPT_STARTED)
            except BaseException:
                now.attempt -= 1  # counted by whoever sees to the failure
                raise
            self.started = True

    async def record(self, kind: str, *, moved: bool) -> None:
        """Log the unit's progress; `moved` says that it is further than it has ever been.

        Raises:
            Fenced: another attempt has taken the unit over: have no further effect.
        """
        async with self._logs():
            if moved:
                self.note_move()
            await self._append(kind)

    def note_move(self) -> None:
        """The unit is further than it has ever been: its budgets of attempts and continuations begin anew."""
        self.moved = True
        self.progress.attempt = 0
        self.progress.hops = 0

    def _fenced(self) -> Fenced:
        return Fenced(f"{self.unit}: the lease of this attempt was lost; another one has the unit")

    async def _append(self, kind: str) -> None:
        own = self.make(kind, self.progress)
        if len(own.data) > _MAX_PROGRESS:
            raise Permanent(
                f"the state of {self.unit} has {len(own.data):,} bytes, the limit is {_MAX_PROGRESS:,}: "
                "let steps return URLs of what they store, or split the unit"
            )
        result = await self._commit_own(own, Commit((Append(self.unit, self.version, (own,)),)))
        if isinstance(result, VersionConflict):
            raise result

    async def _commit_own(self, own: Event, commit: Commit) -> Committed | VersionConflict:
        """Commit `own`, the next event of the stream. Should this be cut short, ``hush`` finds out."""
        self.unsure = own
        result = await self.engine.commit(commit)
        self.unsure = None
        if not isinstance(result, VersionConflict):
            self._note_logged(own)
        return result

    def _note_logged(self, own: Event) -> None:
        self.version += 1
        self._logged, self._logged_at = own.data, self.engine.clock.monotonic()

    # ------------------------------------------------------------------ signs of life

    def beat(self, now: float, silence: float) -> None:
        """Say in the log that somebody is at work here, if nothing has for `silence` seconds: whoever is
        handed the unit besides then leaves it alone. Never while another append is under way."""
        if self._busy or self.beating is not None or self.unsure is not None:
            return
        if not self.started or self.lost:
            return
        if now - self._logged_at < silence:
            return
        own = msgspec.structs.replace(self.make(events.ATTEMPT_ALIVE, None), data=self._logged)
        answer = self.engine.committer.post(Commit(appends=(Append(self.unit, self.version, (own,)),)))
        self.beating = (own, answer)
        answer.add_done_callback(lambda _: self._heard())

    def _heard(self) -> None:
        if self.beating is None or not self.beating[1].done():
            return
        (own, answer), self.beating = self.beating, None
        if answer.cancelled() or answer.exception() is not None:
            self.unsure = own
        elif isinstance(answer.result(), VersionConflict):
            self.lost = True
        else:
            self._note_logged(own)

    async def hush(self) -> None:
        """No sign of life any more; returns once it is known what became of the last one, and of an append
        that was cut short.

        Raises:
            FlowlaneError: the log is away.
        """
        self._busy = True
        if self.beating is not None:
            await asyncio.wait([self.beating[1]])
            self._heard()
        own = self.unsure
        if own is not None:
            await self.engine.committer.commit(Commit())  # what was handed in before is through
            found = await self.engine.look_up(own)
            self.unsure = None
            if isinstance(found, VersionConflict):
                self.lost = True
            elif found is not None:
                self._note_logged(own)

    @asynccontextmanager
    async def _logs(self) -> AsyncIterator[None]:
        """One append at a time, though a handler may have several effects at once.

        Raises:
            Fenced: another attempt has the unit.
        """
        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            try:
                await self.hush()
                if self.lost:
                    raise self._fenced()
                yield
            finally:
                self._busy = False

    # ------------------------------------------------------------------ discovery

    @property
    def findings(self) -> Findings:
        """What the handler has found that is not committed yet."""
        if self._findings is None:
            self._findings = Findings(self.handling.chunk)
        return self._findings

    async def flush(self) -> None:
        """Register what was found so far, fenced by a progress event on the finder's own stream."""
        findings, now = self.findings, self.progress
        if not findings:
            return
        async with self._logs():
            before = now.attempt, now.hops
            try:
                now.attempt = now.hops = 0  # it moves on, by what is found
                while findings:
                    own = self._make_counting(events.DISCOVERY_PROGRESS)
                    result = await self._commit_own(own, self._commit(own, ()))
                    if not isinstance(result, VersionConflict):
                        now.children += len(findings.children)
                        before = 0, 0
                        self.moved = True
                        break
                    findings.leave_out(result)  # of which nothing may be left: all of it was known
            finally:
                now.attempt, now.hops = before
        findings.committed()

    def _commit(
        self, own: Event, tally: tuple[Tally, ...], *, ack: Delivery | None = None, again: float = -1.0
    ) -> Commit:
        if self._findings is None:
            publish = (self.handling.publish(own, again),) if again >= 0 else ()
            return Commit((Append(own.subject, self.version, (own,)),), publish, tally, ack)
        appends, published, tallies = self._findings.actions(self, own)
        if again >= 0:
            published = (*published, self.handling.publish(own, again))
        return Commit(appends, published, tally + tallies, ack)

    # ------------------------------------------------------------------ ending

    def conclude(self, kind: Terminal, reason: str = "") -> Commit:
        """The commit that ends the unit: terminal event, tally, what was found, and the ack."""
        self.ending = (kind, reason) if reason or kind != "unit.settled" else _SETTLED
        if self._progress is None and kind == events.UNIT_SETTLED and self.origin.version == 1:
            # What its progress would be, and its tally, without making them for each of many small units.
            found = 0 if self._findings is None else len(self._findings.children)
            self.final = own = self.make(
                kind, _ONE_CHILD if found == 1 else {"children": found} if found else None
            )
            handling = self.handling
            tally = handling.settled(own.run, own.round) if handling.counted else self._final_tally(kind)
            return self._commit(own, tally, ack=self.delivery)
        if kind != events.UNIT_SKIPPED:
            self.progress.reason = reason
        self.progress.delay = 0.0
        self.final = self._make_counting(kind)
        commit = self._commit(self.final, self._final_tally(kind), ack=self.delivery)
        if kind == "unit.dead":
            commit = self._with_notice(commit, reason)
        return commit

    def renounce(self, head: Event, reason: str) -> Commit:
        """The commit that ends the unit as dead for `reason` (or the one it was to be dead for already), with
        the progress of `head`, its last event, and without anything found since."""
        self._progress = progress(head)
        self.findings.discard()
        known = self.ending[1] if len(self.ending) == 2 and self.ending[0] == "unit.dead" else ""
        return self.conclude("unit.dead", known or reason)

    def end_again(self, conflict: VersionConflict) -> Commit:
        """The attempt's last commit once more, without the children that exist already.

        Raises:
            VersionConflict: the unit itself (or a fact) has moved on.
        """
        self.findings.leave_out(conflict)
        if len(self.ending) == 3:
            return self.postpone(*self.ending)
        return self.conclude(*self.ending)

    def _final_tally(self, kind: Terminal) -> tuple[Tally, ...]:
        counts = self._progress.counts if self._progress is not None else None
        if counts is not None and self.progress.tallied is not None:
            counts = counts.since(self.progress.tallied)
        if counts == _NO_COUNTS:
            counts = None
        head, name = self.origin, self.stage.name
        if self.stage.on == events.LANE_TRIGGERED:
            return (Tally(head.run, head.round, name, counts=counts, closed=True),)
        if not self.handling.counted:
            return ()
        if counts is None and kind == events.UNIT_SETTLED:
            return self.handling.settled(head.run, head.round)
        return (
            Tally(
                head.run,
                head.round,
                name,
                0,
                1,
                int(kind == events.UNIT_DEAD),
                int(kind == events.UNIT_SKIPPED),
                int(kind == events.UNIT_SUPERSEDED),
                0,
                counts,
            ),
        )

    def _with_notice(self, commit: Commit, reason: str) -> Commit:
        handling = self.engine.handling(self.lane, events.LANE_DEAD)
        if handling is None or not (self.stage.counted or self.stage.on == events.LANE_TRIGGERED):
            return commit
        dead = Dead(unit=self.unit, round=self.origin.round, reason=reason, stage=self.stage.name)
        told = notice(self.engine, events.LANE_DEAD, dead, self.origin, handling)
        return msgspec.structs.replace(
            commit,
            appends=[*commit.appends, Append(told.subject, 0, (told,))],
            publish=[*commit.publish, handling.publish(told)],
        )

    @property
    def cut(self) -> str:
        """The cutting policy recorded in the unit's first event."""
        return self.event.cut

    def postpone(self, kind: str, delay: float, reason: str = "") -> Commit:
        """The commit that hands the unit to a later delivery, for a retry or a continuation, and registers
        what was found up to here. A stage with an order key has the same delivery again: another one would
        be behind all of its group."""
        self.ending = (kind, delay, reason)
        self.progress.reason = reason
        self.progress.delay = delay
        self.final = self._make_counting(kind)
        if self.handling.order:
            self.again, self.outcome = delay, "again"
            return self._commit(self.final, ())
        return self._commit(self.final, (), ack=self.delivery, again=delay)

    def _make_counting(self, kind: str) -> Event:
        """The next event of the stream, which counts the children committed with it."""
        found = len(self.findings.children)
        self.progress.children += found
        try:
            return self.make(kind, self.progress)
        finally:
            self.progress.children -= found

    # ------------------------------------------------------------------ the rest of the context

    async def head(self, url: str, *, headers: Mapping[str, str] | None = None) -> ObjectInfo | None:
        store: Store = await self.engine.connections.store(url)
        return await store.head(url, headers=headers)

    async def list(self, url: str) -> AsyncIterator[ObjectInfo]:
        store: Store = await self.engine.connections.store(url)
        async for found in store.list(url):
            yield found

    async def recall(self, fact: type[F], **key: Any) -> F | None:
        stream = fact_stream(self.lane, fact, key)
        head = (await self.engine.backend.last([stream])).get(stream)
        self.findings.recalled(stream, head.version if head else 0)
        return None if head is None else payload(head, fact)

    def archive(
        self, url: str, *, etag: str = "", limits: ZipLimits | None = None, password: str | None = None
    ) -> AbstractAsyncContextManager[Archive]:
        engine = self.engine
        return connect_archive(
            engine.connections, engine.clock, url, etag=etag, limits=limits, password=password
        )

    async def known(self, units: Sequence[Unit]) -> Sequence[bool]:
        streams = [stream_of(self.lane, unit) for unit in units]
        heads = await self.engine.backend.last(streams)
        return [stream in heads for stream in streams]

    async def offload(self, function: Callable[..., R], *args: Any) -> R:
        return await self.engine.clock.offload(partial(function, *args))

    @asynccontextmanager
    async def turn(self, name: str, most: int) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            with self.waits():
                await stack.enter_async_context(self.engine.turns.of(f"{self.lane}/{name}", most))
            yield

    @contextmanager
    def waits(self) -> Iterator[None]:
        """See ``turns.waiting``: what comes behind it begins then."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
            self.began = self.engine.clock.monotonic()

    def rows(self, url: str, **options: Any) -> Rows:
        return Selection(url, options)

    async def load(self, rows: Rows, *, to: str, **options: Any) -> Counts:
        if not isinstance(rows, Selection):
            raise ConfigError(f"load takes what ctx.rows() gives, not {rows!r:.60}")
        WAITS.set(self.waits)  # for sources: nothing else that is opened for a handler waits for others
        return await load(self, rows, to, options)

    async def copy(  # the parameters are the promise of the port
        self,
        url: str,
        *,
        to: str,
        verify: Literal["content", "length"] = "content",
        headers: Mapping[str, str] | None = None,
        etag: str = "",
        overwrite: bool = False,
    ) -> ObjectInfo:
        return await copy(self, url, to, verify, headers, etag, overwrite)

    async def step(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        steps = self.progress.steps
        if name in self._stepped:
            raise Permanent(f"stage {self.stage.name} has two steps called {name!r}: number them, say")
        if name in steps:
            self._stepped |= {name}
            return steps[name]
        if self.lost:
            raise self._fenced()
        if self.moved and self.near_deadline():
            raise Interrupted(f"the deadline is near, before step {name!r}")
        await self.start()
        keyword = {}
        if "idempotency_key" in inspect.signature(function).parameters:
            keyword["idempotency_key"] = f"{self.unit}#{self.origin.round}/{name}"
        answer = function(*args, **keyword)
        if not inspect.isawaitable(answer):
            raise Permanent(f"step {name!r} was given a function that is not async: write `async def`")
        result = await answer
        try:
            encoded = events.encode_data(result)
        except (TypeError, UnicodeEncodeError, msgspec.EncodeError) as error:
            raise Permanent(
                f"step {name!r} returned what JSON cannot hold ({error}): return plain values"
            ) from None
        if len(encoded) > _MAX_STEP_RESULT:
            raise Permanent(
                f"step {name!r} returned {len(encoded):,} bytes, the limit is {_MAX_STEP_RESULT:,}: "
                "store it, and return its URL"
            )
        # What an attempt that comes after a crash will read: 1 as a key is "1" there, and a tuple a list.
        steps[name] = msgspec.json.decode(encoded)
        try:
            await self.record(events.STEP_DONE, moved=True)
        except Permanent:
            del steps[name]  # all of them together are too long: the unit's end must not be
            raise
        self._stepped |= {name}
        return steps[name]

    async def announce(self, told: Completed) -> None:
        """See ``notices``; for the stage of ``Policy.notify``, not for handlers."""
        await announce(self, told)

    async def secret(self, reference: str, *, fresh: bool = False) -> str:
        return await self.engine.connections.secret(reference, fresh=fresh)

    def skip(self, reason: str) -> None:
        self.progress.reason = conceal(reason)
        self.kind = "unit.skipped"

    def transfer(self, name: str) -> Transfer:
        """How far the effect called `name` has come, by the log."""
        return self.progress.transfers.get(name, Transfer())
