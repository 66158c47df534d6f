"""Virtual time: a clock and a seeded event loop on which hours pass in milliseconds, the same way every time.

::

    result = run(main, seed=7)  # asyncio.run on virtual time

The loop never waits: when nothing is ready, time jumps to the next timer. What is ready runs in an order
that the seed decides, so that a thousand seeds are a thousand interleavings. Groups of tasks can share a
``Fate``: frozen, they stand still as under SIGSTOP; dead, not even their ``finally`` blocks run again.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import heapq
import random
import types
from asyncio import events
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

T = TypeVar("T")

#: Callbacks that may run without time moving on before that counts as a loop without end.
_STANDSTILL = 1_000_000


class Deadlock(RuntimeError):
    """Nothing is ready, no timer is set, and what was to be run has not ended: it never will."""


class SimulatedDeath(BaseException):
    """Whoever runs or calls is dead. Who catches it goes on in vain: whatever it calls is refused so, too."""


class Fate:
    """What has become of a group of tasks: those begun while ``FATE`` is set to it, and all they begin.

    ``fuse``: die at the beginning of the so-many-th callback from now (0: never); ``blown`` is then called.
    """

    __slots__ = ("blown", "dead", "frozen", "fuse", "name", "parked", "tasks")

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.dead = False
        self.fuse = 0
        self.blown: Callable[[], None] = lambda: None
        self.parked: list[asyncio.Handle] = []
        self.tasks: list[asyncio.Task[Any]] = []

    def bury(self) -> None:
        """Unwind the tasks of the dead, so that no memory and no warning is left of them. Their ``finally``
        blocks run now, in vain: whatever they await is refused. To be called by somebody who is alive."""
        assert self.dead
        for task in self.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # what else tells asyncio that it is meant
            with suppress(BaseException):
                while True:  # each time it awaits something else on its way out
                    task.get_coro().throw(SimulatedDeath(self.name))
        self.tasks.clear()
        self.parked.clear()


#: The fate that what runs now shares; none for the simulation itself.
FATE: ContextVar[Fate | None] = ContextVar("flowlane_fate", default=None)


@types.coroutine
def turn() -> Generator[None, None, None]:
    """Let others have a turn: ``asyncio.sleep(0)``, which a simulation does at each call of a port."""
    yield


class _Task(asyncio.Task[T]):
    """Sets of tasks are iterated in the order of this hash, the same in every process."""

    def __init__(self, number: int, coro: Any, loop: VirtualLoop, context: Context | None) -> None:
        self.number = number
        super().__init__(coro, loop=loop, context=context)

    def __hash__(self) -> int:
        return self.number


class _Future(asyncio.Future[T]):
    number: int

    def __hash__(self) -> int:
        return self.number


class _Handle(asyncio.Handle):
    """As asyncio makes it outside of debug mode, without asking the loop for that."""

    __slots__ = ()

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: VirtualLoop,
        context: Context | None,
    ) -> None:
        self._context = copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class _Timer(asyncio.TimerHandle):
    __slots__ = ()

    def cancel(self) -> None:
        """As in asyncio, but the loop is not told: it sees when it comes to it."""
        self._cancelled = True
        self._callback = self._args = None  # type: ignore[assignment]  # as asyncio does


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without I/O, threads, waiting and debug mode. Overrides ``_run_once``, what a callback
    passes on its way there (a simulation spends a third of its time on that), and uses a few more private
    names of asyncio; a test guards them on every Python version.

    ``complaints`` collects what asyncio would log: exceptions that nobody retrieved, and their like.
    ``run`` calls ``at_end`` when all is over. The garbage collector does not know structs with ``gc=False``:
    what they hold that holds them must let go there, or worlds would stay in memory, seed upon seed.
    """

    def __init__(self, seed: int | random.Random = 0) -> None:
        super().__init__()
        self.rng = seed if isinstance(seed, random.Random) else random.Random(seed)
        self.steps = 0
        self.complaints: list[str] = []
        self.at_end: list[Callable[[], object]] = []
        self._timers: list[tuple[float, asyncio.TimerHandle]] = []
        self._virtual = 0.0
        self._moved_at = 0
        self._made = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._fates: dict[int, Fate | None] = {}
        self.get_debug = bool  # type: ignore[method-assign]  # False; every handle asks for it, twice
        self.set_task_factory(self._make_task)
        self.set_exception_handler(lambda loop, context: self._complain(context))

    def trace(self, what: str) -> None:
        """Enter `what` happened now into the run's hash."""
        self._digest.update(f"{self._virtual:.6f} {what}\n".encode())

    @property
    def hash(self) -> str:
        """The hash of everything traced; equal for equal seeds."""
        return self._digest.hexdigest()

    # ------------------------------------------------------------------ asyncio's side

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._virtual

    def call_soon(  # type: ignore[override]  # which arguments fit is asyncio's to say
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """As in asyncio."""
        if self._closed:  # type: ignore[attr-defined]  # see the class
            raise RuntimeError("the loop is closed")
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]  # see the class
        return handle

    def call_later(  # type: ignore[override]  # as above
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As in asyncio."""
        return self.call_at(self._virtual + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # as above
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As in asyncio; timers for the same moment go off in an order of the seed's."""
        if self._closed:  # type: ignore[attr-defined]  # see the class
            raise RuntimeError("the loop is closed")
        when += self.rng.random() * 1e-6
        timer = _Timer(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, timer))
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        """As in asyncio."""
        self._made += 1
        future: _Future[Any] = _Future(loop=self)
        future.number = self._made
        return future

    def close(self) -> None:
        """As in asyncio; what was still to happen never will."""
        super().close()
        self._timers.clear()
        self._fates.clear()

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        context: Context | None = None,
        **_: Any,
    ) -> asyncio.Task[T]:
        self._made += 1
        task: asyncio.Task[T] = _Task(self._made, coro, self, context)
        fate = FATE.get() if context is None else context.get(FATE)
        if fate is not None:
            if len(fate.tasks) > 500:
                fate.tasks = [known for known in fate.tasks if not known.done()]
            fate.tasks.append(task)
        return task

    def _complain(self, context: dict[str, Any]) -> None:
        self.complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    def run_in_executor(self, *_: Any) -> Any:  # type: ignore[override]  # it is never run
        """Refused: threads know no virtual time."""
        raise RuntimeError("there are no threads in virtual time: use clock.offload")

    def _process_events(self, event_list: Any) -> None: ...

    def _write_to_self(self) -> None: ...

    def _asyncgen_firstiter_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        self._fates[id(agen)] = FATE.get()

    def _asyncgen_finalizer_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        fate = self._fates.pop(id(agen), None)
        if self.is_closed() or (fate is not None and fate.dead):
            return  # nobody is left to finish it
        context = copy_context()
        context.run(FATE.set, fate)
        self.call_soon(lambda: self.create_task(agen.aclose()), context=context)

    def _run_once(self) -> None:
        """Everything, until the loop is to stop: what asyncio asks between two turns is asked here."""
        timers, pop = self._timers, heapq.heappop
        ready = self._ready  # type: ignore[attr-defined]  # see the class
        while True:
            while timers and timers[0][1].cancelled():
                pop(timers)
            if not ready and not self._stopping:  # type: ignore[attr-defined]  # see the class
                if not timers:
                    raise Deadlock("nothing will ever happen again: " + self._waiting())
                self._virtual = max(self._virtual, timers[0][0])
                self._moved_at = self.steps
            while timers and timers[0][0] <= self._virtual:
                ready.append(pop(timers)[1])
            batch = list(ready)
            ready.clear()
            if len(batch) > 1:
                self._shuffle(batch)
            for handle in batch:
                if not handle._cancelled:
                    self.steps += 1
                    fate = handle._context.get(FATE)
                    if fate is None or self._goes_on(fate, handle):
                        handle._run()
            if self.steps - self._moved_at > _STANDSTILL:
                raise Deadlock(f"{_STANDSTILL:,} callbacks and not a moment passed: " + self._waiting())
            if self._stopping:  # type: ignore[attr-defined]  # see the class
                return

    def _shuffle(self, batch: list[asyncio.Handle]) -> None:
        """``rng.shuffle(batch)``, drawing the same, for batches that mostly hold two or three."""
        draw = self.rng.getrandbits
        for last in range(len(batch) - 1, 0, -1):
            bits = (last + 1).bit_length()
            chosen = draw(bits)
            while chosen > last:
                chosen = draw(bits)
            batch[last], batch[chosen] = batch[chosen], batch[last]

    @staticmethod
    def _goes_on(fate: Fate, handle: asyncio.Handle) -> bool:
        """Whether `handle` runs now, by the fate that it shares."""
        if fate.fuse and not fate.frozen and not fate.dead:
            fate.fuse -= 1
            if not fate.fuse:
                fate.dead = True
                fate.blown()
        if fate.dead:
            return False
        if fate.frozen:
            fate.parked.append(handle)
        return not fate.frozen

    def _waiting(self) -> str:
        return "; ".join(sorted(str(task.get_coro()) for task in asyncio.all_tasks(self)))[:2000]

    # ------------------------------------------------------------------ fates

    def thaw(self, fate: Fate) -> None:
        """What was frozen goes on, where it stood and as if nothing had been."""
        fate.frozen = False
        self._ready.extend(fate.parked)  # type: ignore[attr-defined]  # see the class
        fate.parked.clear()


class VirtualClock:
    """See ``clock.Clock``: the time of the loop that runs, seen by one process.

    ``offset`` (seconds) puts its wall clock off, and may be changed while it runs; its monotonic clock begins
    anywhere and knows nothing of that.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        rng: random.Random | None = None,
        *,
        epoch: datetime = datetime(2024, 1, 2, tzinfo=UTC),
        offset: float = 0.0,
    ) -> None:
        self._loop = loop
        self._rng = rng or random.Random(loop.rng.getrandbits(64))
        self._epoch = epoch
        self._base = float(self._rng.randrange(100_000))
        self.offset = offset

    def now(self) -> datetime:
        """See ``Clock.now``."""
        return self._epoch + timedelta(seconds=self._loop.time() + self.offset)

    def monotonic(self) -> float:
        """See ``Clock.monotonic``."""
        return self._loop.time() + self._base

    def random(self) -> float:
        """See ``Clock.random``; by the seed."""
        return self._rng.random()

    def token(self) -> str:
        """See ``Clock.token``; by the seed."""
        return f"{self._rng.getrandbits(64):016x}"

    async def sleep(self, seconds: float) -> None:
        """See ``Clock.sleep``; takes no time at all."""
        await asyncio.sleep(seconds)

    async def offload(self, work: Callable[[], T], *, waits: bool = False) -> T:
        """Run `work` here and now: there are no threads. Others get a turn before it."""
        await turn()
        return work()


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]], *, seed: int = 0) -> T:
    """The result of ``main(loop)``, run to its end in virtual time; what it leaves running dies with it.

    Raises:
        Deadlock: it cannot end.
    """
    loop = VirtualLoop(seed)
    before = events._get_running_loop()
    events._set_running_loop(None)  # a test that runs on a loop of its own may still simulate
    rest = Fate("the rest")
    collecting = gc.isenabled()
    gc.disable()  # so that nothing is finalised at a moment that the seed does not decide
    try:
        return loop.run_until_complete(main(loop))
    finally:
        rest.dead = True
        rest.tasks = sorted((t for t in asyncio.all_tasks(loop) if isinstance(t, _Task)), key=hash)
        loop.close()
        rest.bury()
        for let_go in loop.at_end:
            let_go()
        events._set_running_loop(before)
        if collecting:  # not before all is garbage: what a collection finds in use, later ones look at again
            gc.enable()
