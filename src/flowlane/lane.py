"""Lanes: a named set of stages, the units they handle, and the policies they handle them under.

Declaring a lane has no effect besides the object itself: nothing is opened, scheduled or registered.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, date, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args
from urllib.parse import quote

import msgspec

from flowlane import events
from flowlane.errors import BadRecord, ConfigError, Permanent
from flowlane.events import Upcaster
from flowlane.ports import Cut, Via

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PLAIN = re.compile(r"[A-Za-z0-9_.:/+=,~-]*")
MAX_STREAM = 400
# Of SQS's MessageGroupId, which takes letters, digits and punctuation: all of ``_PLAIN``, %, @, !
_MAX_GROUP = 128


def duration(text: str | float) -> float:
    """Seconds in `text`: a number, or ``"90s"``, ``"5m"``, ``"1h"``, ``"7d"``, ``"1h30m"``.

    Raises:
        ConfigError: it is not a positive duration.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = float(text)
    else:
        parts = _DURATION.findall(str(text))
        if not parts or "".join(n + unit for n, unit in parts) != text:
            raise ConfigError(
                f"{text!r} is not a duration: write a number and a unit, such as 30s, 5m, 1h or 7d"
            )
        seconds = sum(float(n) * _SECONDS[unit] for n, unit in parts)
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{text!r} is not a duration: it must be more than nothing")
    return seconds


def kebab(name: str) -> str:
    """``OrdersFound`` as ``orders-found``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


class _UnitMeta(msgspec.StructMeta):
    """Lets ``class OrdersFound(Unit, key=("url", "etag"))`` be written on one line."""

    def __new__(  # the keywords of a class statement are its whole interface
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        key: str | tuple[str, ...] = (),
        type: str | None = None,
        schema: int = 1,
        upcasters: Mapping[int, Upcaster] | None = None,
        **options: Any,
    ) -> Any:
        options.setdefault("frozen", True)
        options.setdefault("kw_only", True)
        options.setdefault("omit_defaults", True)
        cls: Any = super().__new__(mcls, name, bases, namespace, **options)
        cls.unit_key = (key,) if isinstance(key, str) else tuple(key)
        cls.unit_type = type or kebab(name)
        cls.unit_schema = schema
        cls.unit_upcasters = dict(upcasters or {})
        if bases and bases[0] is not msgspec.Struct:
            _check_unit(cls)
        return cls


def _check_unit(cls: Any) -> None:
    names = {f.name for f in msgspec.structs.fields(cls)}
    missing = [k for k in cls.unit_key if k not in names]
    if missing:
        raise ConfigError(
            f"unit {cls.__name__} has no field {missing[0]!r} for its key: name existing fields in key="
        )
    if not _NAME.fullmatch(cls.unit_type):
        raise ConfigError(
            f"unit {cls.__name__} has the type {cls.unit_type!r}: use lower case, digits and dashes"
        )


class Unit(msgspec.Struct, metaclass=_UnitMeta):
    """A unit of work, declared with its natural key: ``class OrdersFound(Unit, key=("url", "etag"))``.

    Yielding one from a stage registers it; a unit whose key is known already is not registered again, so
    nothing is ingested twice. Keyword arguments of the class: ``key`` (field names), ``type`` (the event's
    type; the class's name in kebab case by default), ``schema`` and ``upcasters`` (payloads of schema n are
    lifted by ``upcasters[n]``, a pure function of the decoded payload, to n + 1).
    """

    if TYPE_CHECKING:
        unit_key: ClassVar[tuple[str, ...]]
        unit_type: ClassVar[str]
        unit_schema: ClassVar[int]
        unit_upcasters: ClassVar[dict[int, Upcaster]]

        def __init_subclass__(
            cls,
            *,
            key: str | tuple[str, ...] = (),
            type: str | None = None,
            schema: int = 1,
            upcasters: Mapping[int, Upcaster] | None = None,
        ) -> None: ...


def stream_of(lane: str, unit: Unit) -> str:
    """The name of `unit`'s stream: lane, type, and its key's values; different keys never share one.

    Raises:
        ConfigError: the unit has no key.
        Permanent: a key's value is not text, a whole number, a boolean or a moment.
    """
    key = unit.unit_key
    if len(key) == 1 and type(value := getattr(unit, key[0])) is int and value.bit_length() < 64:
        return f"{lane}/{unit.unit_type}/{value}"  # what ``_stream`` would make of it, for many small units
    if not key:
        raise ConfigError(
            f"unit {type(unit).__name__} has no key: declare it as class {type(unit).__name__}(Unit, key=...)"
        )
    return _stream(lane, type(unit), [getattr(unit, name) for name in key])


def _stream(lane: str, unit: type[Unit], values: Sequence[Any]) -> str:
    if len(values) == 1:
        key = _key_part(unit, 0, values[0])
    else:
        key = "@".join([_key_part(unit, n, value) for n, value in enumerate(values)])
    stream = f"{lane}/{unit.unit_type}/{key}"
    if len(stream) > MAX_STREAM:
        # "!" is in no name that was not cut: one that looks like a cut one cannot be given.
        digest = blake2b(stream.encode(), digest_size=16).hexdigest()
        stream = f"{stream[: MAX_STREAM - 33]}!{digest}"
    return stream


def group_of(unit: Unit, order: Sequence[str]) -> str:
    """The value of `unit`'s order key, which is made of the fields named in `order`, as a short text.

    Printable ASCII without spaces, never empty, the same in every process and release; different values of
    one type never share one.

    Raises:
        Permanent: a value is not text, a whole number, a boolean or a moment.
    """
    # "!" is in no key that is not empty, and in none that was not cut: see ``_stream``.
    kind = type(unit)
    group = "@".join([_key_part(kind, n, getattr(unit, name), order) for n, name in enumerate(order)]) or "!"
    return shortened(group)


def shortened(group: str) -> str:
    """`group`, or the beginning and a hash of one that is longer than a group may be."""
    if len(group) > _MAX_GROUP:
        group = f"{group[: _MAX_GROUP - 33]}!{blake2b(group.encode(), digest_size=16).hexdigest()}"
    return group


def _key_part(unit: type[Unit], number: int, value: Any, order: Sequence[str] = ()) -> str:
    """`value`, of the key's field of that number, or of the order key's if it is of `order`."""
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else quote(value, safe=":/+=,~", errors="surrogatepass")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, datetime):
        return events_time(value)
    if isinstance(value, date):
        return str(value)
    field = f"order field {order[number]!r}" if order else f"key field {unit.unit_key[number]!r}"
    raise Permanent(
        f"unit {unit.__name__} has {type(value).__name__} in its {field}: use text or whole numbers"
    )


def events_time(moment: datetime) -> str:
    """`moment` in UTC as it stands in keys: as short as it can be without loss, ``2024-01-01T00:00:00Z``."""
    utc = moment if moment.tzinfo is None else moment.astimezone(UTC)
    return utc.replace(tzinfo=None).isoformat() + "Z"


class Fact(Unit):
    """A fact of the lane itself, kept as the cumulative state of a stream of its own (a bookmark, say).

    ``key`` names fields that tell several such streams apart; without one there is a single stream. Read
    the last one with ``ctx.recall``; yield a new one from a discovery, and it is appended in the very commit
    that registers the units yielded before it.
    """


F = TypeVar("F", bound=Fact)


def fact_stream(lane: str, fact: type[F], key: dict[str, Any]) -> str:
    """The stream of the facts of type `fact` with that key.

    Raises:
        ConfigError: `key` does not name the fields that the fact's key is made of.
    """
    if set(key) != set(fact.unit_key):
        wanted = ", ".join(fact.unit_key) or "nothing"
        raise ConfigError(f"fact {fact.__name__} is told by {wanted}, not by {', '.join(key) or 'nothing'}")
    if not fact.unit_key:
        return f"{lane}/{fact.unit_type}"
    return _stream(lane, fact, [key[name] for name in fact.unit_key])


class Trigger(Unit, key=("slot",), type="run"):
    """What ``lane.triggered`` carries: the slot (or the id of the outer event) that names the run."""

    slot: str
    by: str = "schedule"
    at: str = ""
    event: Any = None


class Completed(Unit, key=("run", "round"), type="notice"):
    """What ``lane.completed`` and ``lane.failed`` carry, once each time the run comes to rest: the report."""

    run: str
    round: int
    outcome: Literal["settled", "failed"]
    report: dict[str, Any]


class Notify(Completed, key=("run", "round"), type="notify"):
    """What ``Policy.notify`` is told, by a unit of its own: neither it nor the lane's own stages on
    ``lane.completed`` and ``lane.failed`` wait for each other."""


class Dead(Unit, key=("unit", "round"), type="dead"):
    """What ``lane.dead`` carries, once per dead unit and round."""

    unit: str
    round: int
    reason: str
    stage: str = ""


@dataclass(frozen=True)
class Policy:
    """How a stage's units are handled. Durations are seconds, or text like ``"5m"``."""

    concurrency: int = 8  #: units of a stage handled at once by one worker
    retries: int = 5  #: further attempts after the first, counted anew when the unit has moved on
    timeout: float | str = 900.0  #: for one attempt
    error_budget: float = 0.01  #: share of a run's records that may be quarantined before it has failed
    quarantine: str | None = field(default=None, repr=False)
    """URI of the folder for bad records; beside the backend by default. As ``notify`` not shown: options of
    URIs may be secrets."""
    notify: str | None = field(default=None, repr=False)
    """URI of a notifier, told of every completed or failed run; of lanes, not of single stages."""
    schema: Literal["evolve", "freeze", "quarantine"] = "evolve"  #: what new columns do
    backoff: float | str = (
        1.0  #: the first retry waits a random time up to this, doubled with each further one
    )
    backoff_cap: float | str = 60.0  #: and never longer than this
    lease: float | str = 30.0  #: a delivery whose worker has fallen silent for so long is handed out again
    hops: int = 3  #: continuations in a row that may pass without the unit moving on
    batch: int = Cut().rows  #: records in a batch, at most
    batch_bytes: int = Cut().size  #: decoded bytes in a batch, at most

    def __post_init__(self) -> None:
        for name in ("timeout", "backoff", "backoff_cap", "lease"):
            object.__setattr__(self, name, duration(getattr(self, name)))
        for name, least in (
            ("concurrency", 1),
            ("retries", 0),
            ("hops", 1),
            ("batch", 1),
            ("batch_bytes", 1),
        ):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"policy {name}={value!r}: must be a whole number of at least {least}")
        share: Any = self.error_budget
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"policy error_budget={self.error_budget!r}: must be a share between 0 and 1")
        if self.schema not in ("evolve", "freeze", "quarantine"):
            raise ConfigError(f"policy schema={self.schema!r}: must be evolve, freeze or quarantine")

    @property
    def cut(self) -> Cut:
        """The cutting policy that new units of the stage record."""
        return Cut(self.batch, self.batch_bytes)

    def delay(self, attempt: int, chance: float) -> float:
        """Seconds before the attempt after number `attempt` (from 1): full jitter, doubled and capped."""
        ceiling = min(float(self.backoff_cap), float(self.backoff) * 2.0 ** min(attempt - 1, 60))
        return ceiling * chance


Handler = Callable[..., Any]
H = TypeVar("H", bound=Handler)


@dataclass(frozen=True)
class Stage:
    """An async handler subscribed to one event type, with its policy."""

    name: str
    lane: str
    on: str
    unit: type[Unit]
    handler: Handler
    policy: Policy
    order: tuple[str, ...] = ()  #: the order key: fields of the unit
    via: Via = "queue"  #: what carries its deliveries

    @property
    def queue(self) -> str:
        """The name of the queue, or of the channel, that carries its deliveries."""
        return f"{self.lane}/{self.name}"

    @property
    def counted(self) -> bool:
        """Whether its units count in the run's tally: not the run itself, nor notices about it."""
        return self.on not in _OWN and self.on != events.LANE_NOTIFY


_OWN: Mapping[str, type[Unit]] = {
    events.LANE_TRIGGERED: Trigger,
    events.LANE_COMPLETED: Completed,
    events.LANE_FAILED: Completed,
    events.LANE_DEAD: Dead,
}

#: Unit types whose streams the engine names itself.
_RESERVED = frozenset({unit.unit_type for unit in _OWN.values()} | {Notify.unit_type})


async def _notify(event: Any, ctx: Any) -> None:
    """The stage that ``Policy.notify`` stands for; `ctx` is the engine's own."""
    await ctx.announce(event.data)


View = Callable[[Any], Awaitable[dict[str, Any]]]


@dataclass
class Lane:
    """A named set of stages and its trigger: the unit of deployment.

    ``every`` is the schedule (``"30m"``; none: only when triggered from outside), ``policy`` the default of
    its stages, ``options`` whatever a recipe wants shown by ``flowlane graph`` and ``plan``.
    """

    name: str
    every: str | None = None
    policy: Policy = field(default_factory=Policy)
    stages: list[Stage] = field(default_factory=list, init=False)
    views: dict[str, View] = field(default_factory=dict, init=False)

    triggered = events.LANE_TRIGGERED
    completed = events.LANE_COMPLETED
    failed = events.LANE_FAILED
    dead = events.LANE_DEAD

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(str(self.name)):
            raise ConfigError(f"lane name {self.name!r}: use lower case letters, digits, dashes; at most 63")
        if self.every is not None:
            duration(self.every)
        if self.policy.notify:
            # No record goes through it: what others may lose of theirs is not for it to say.
            policy = replace(self.policy, error_budget=0.0)
            self._add(Stage("notify", self.name, events.LANE_NOTIFY, Notify, _notify, policy))

    def stage(
        self,
        *,
        on: Any,
        name: str | None = None,
        order: str | Sequence[str] = (),
        via: Via = "queue",
        **policy: Any,
    ) -> Callable[[H], H]:
        """Subscribe the decorated ``async def handler(event, ctx)`` to units of the type `on`, or to
        ``lane.triggered``, ``completed``, ``failed`` or ``dead``. Keywords override the lane's policy.

        The handler may be a coroutine, or an async generator that yields the units it finds. ``order`` names
        the field (or fields) of the unit that are its order key: units with the same value are handled one
        after the other, in the order in which they were registered; others beside them. ``via="channel"``
        has them carried by the backend's ordered channel instead of its queue, by their order key.

        Raises:
            ConfigError: the type has a stage already, a keyword is no part of the policy, the unit has no
                field that ``order`` names, or a channel is wanted without an order key.
        """
        unit: Any = _OWN.get(on) if isinstance(on, str) else on
        if unit is None or not (isinstance(unit, type) and issubclass(unit, Unit)) or issubclass(unit, Fact):
            raise ConfigError(
                f"lane {self.name}: a stage is subscribed to a Unit class or to lane.triggered, not {on!r}"
            )
        kind = on if isinstance(on, str) else unit.unit_type
        if not isinstance(on, str) and kind in _RESERVED:
            raise ConfigError(
                f"lane {self.name}: unit {unit.__name__} has the type {kind!r}, "
                "whose streams are the engine's own: rename the class or give it a type="
            )
        key = self._order_key(on, unit, order)
        self._check_via(on, key, via)
        known = {f.name for f in fields(Policy)}
        unknown = sorted(set(policy) - known)
        if unknown:
            raise ConfigError(
                f"lane {self.name}: no policy {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        if policy.get("notify"):
            raise ConfigError(
                f"lane {self.name}: notify= is for whole lanes: Lane(..., policy=Policy(notify=...))"
            )

        def register(handler: H) -> H:
            stage = Stage(
                name=name or handler.__name__.replace("_", "-"),
                lane=self.name,
                on=kind,
                unit=unit,
                handler=handler,
                policy=replace(self.policy, **policy),
                order=key,
                via=via,
            )
            self._add(stage)
            return handler

        return register

    def _order_key(self, on: Any, unit: type[Unit], order: str | Sequence[str]) -> tuple[str, ...]:
        key = tuple(order) if isinstance(order, tuple | list) else (order,)
        if key and isinstance(on, str):
            raise ConfigError(
                f"lane {self.name}: order= is for stages on a Unit class, and {on} is none: leave it out"
            )
        known = unit.__struct_fields__
        for name in key:
            if name not in known:
                raise ConfigError(
                    f"lane {self.name}: unit {unit.__name__} has no field {name!r} for its order key: "
                    f"name one (or several) of {', '.join(known) or 'its fields, once it has some'} in order="
                )
        return key

    def _check_via(self, on: Any, order: tuple[str, ...], via: str) -> None:
        if via not in get_args(Via):
            raise ConfigError(f'lane {self.name}: via={via!r}: write via="queue" or via="channel"')
        if via == "channel" and not order:
            what = f"{on} is none: leave it out" if isinstance(on, str) else "name its field in order="
            raise ConfigError(
                f'lane {self.name}: via="channel" is for stages on a Unit class with an order key, by which '
                f"the channel keeps their order: {what}"
            )

    def _add(self, stage: Stage) -> None:
        for other in self.stages:
            if other.on == stage.on:
                raise ConfigError(
                    f"lane {self.name}: {stage.name} and {other.name} both handle {stage.on!r}: "
                    "a unit is settled by one stage; let the first yield another unit for the second"
                )
            if other.name == stage.name and other.on == events.LANE_NOTIFY:
                raise ConfigError(
                    f"lane {self.name}: the policy's notify= makes a stage {stage.name!r}: give yours a name="
                )
            if other.name == stage.name:
                raise ConfigError(f"lane {self.name}: two stages are called {stage.name!r}: give one a name=")
        if not _NAME.fullmatch(stage.name):
            raise ConfigError(f"lane {self.name}: stage name {stage.name!r}: use lower case, digits, dashes")
        self.stages.append(stage)

    def view(self, name: str) -> Callable[[View], View]:
        """Register an ``async def view(ctx) -> dict`` that ``flowlane status`` shows under `name`."""

        def register(view: View) -> View:
            self.views[name] = view
            return view

        return register

    def stage_on(self, kind: str) -> Stage | None:
        """The stage subscribed to events of type `kind`."""
        return next((s for s in self.stages if s.on == kind), None)

    def check(self) -> None:
        """Raises:
        ConfigError: the lane cannot run: it has no stage on ``lane.triggered``.
        """
        if self.stage_on(self.triggered) is None:
            raise ConfigError(f"lane {self.name} has no stage on lane.triggered: nothing would ever happen")


__all__ = [
    "BadRecord",
    "Completed",
    "Dead",
    "Fact",
    "Lane",
    "Notify",
    "Policy",
    "Stage",
    "Trigger",
    "Unit",
    "duration",
    "stream_of",
]
