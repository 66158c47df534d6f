"""What a commit has to do with channels, as tests: events put to one along with it, and acks of deliveries
that no queue has brought. Subclass as ``backend_suite`` says, with the same fixtures; a backend whose
channels have to be made makes ``CHANNEL``, and says with ``QUIET`` how long one is read that has no more
records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

import msgspec
import pytest

from flowlane import events
from flowlane.errors import Permanent, VersionConflict
from flowlane.events import MAX_EVENT_BYTES, Event
from flowlane.ports import Append, Backend, Commit, Publish, Tally
from flowlane.testing.backend_model import Opener
from flowlane.testing.backend_suite import KEPT, LONG_PATIENCE, PATIENCE, Suite, index
from flowlane.testing.units import LANE, RUN, append, applied, following, found, within

#: The channel that the suite publishes to.
CHANNEL = f"{LANE}/apply"


class Brought:
    """A delivery that something else than the backend has brought."""

    def __init__(self, event: Event) -> None:
        self.event = self.head = event
        self.stage = CHANNEL
        self.attempt = 1
        self.acks = 0

    async def ack(self) -> None:
        """Counts it."""
        self.acks += 1

    async def nack(self, *, delay: float = 0) -> None:
        """Nothing."""

    async def extend(self, seconds: float) -> bool:
        """Held."""
        return True


def change(name: str) -> Event:
    """The first event of the unit `name`, of the group that its first letter names."""
    return msgspec.structs.replace(found(name, stage="apply"), partitionkey=name[0])


def put(*changes: Event, repeat: bool = False) -> list[Publish]:
    """They are published to the channel."""
    return [Publish(each, CHANNEL, repeat=repeat, group=each.partitionkey, via="channel") for each in changes]


def register(*changes: Event) -> Commit:
    """They begin their streams and are put to the channel."""
    return Commit([append(each) for each in changes], put(*changes))


class CarriedSuite(Suite):
    """See the module."""

    #: Seconds without a record after which a channel counts as read to its end.
    QUIET: ClassVar[float] = 0.0

    async def carried(self, backend: Backend, consumer: str = "c") -> dict[str, list[Event]]:
        """What the channel has, by key; each batch settled."""
        seen: dict[str, list[Event]] = {}
        async for batch in backend.channel(CHANNEL).consume(consumer, wait=self.QUIET):
            for record in batch.records:
                seen.setdefault(record.key, []).append(events.decode(record.data))
            await batch.settle()
        return seen

    async def test_what_a_commit_publishes_is_in_the_channel_under_its_group(self, backend: Backend) -> None:
        a1, a2, b1 = change("a1"), change("a2"), change("b1")
        await applied(backend, register(a1, b1), register(a2))
        assert await self.carried(backend) == {"a": [a1, a2], "b": [b1]}
        assert await backend.receive([CHANNEL], 9, lease=KEPT) == [], "and in no queue"

    async def test_the_order_of_a_group_is_that_of_the_commits(self, backend: Backend) -> None:
        changes = [change(f"{group}{n}") for n in range(24) for group in "ab"]
        for at in range(0, 48, 12):
            await applied(backend, *(register(*changes[n : n + 3]) for n in range(at, at + 12, 3)))
        expected = {group: [each for each in changes if each.partitionkey == group] for group in "ab"}
        assert await self.carried(backend) == expected

    async def test_a_commit_in_conflict_puts_nothing(self, backend: Backend) -> None:
        a1 = change("a1")
        await applied(backend, register(a1))
        answers = await backend.commit([register(change("a1")), register(change("a2"), change("a1"))])
        assert [type(answer) for answer in answers] == [VersionConflict] * 2
        assert await self.carried(backend) == {"a": [a1]}

    async def test_a_commit_that_is_refused_puts_nothing(self, backend: Backend) -> None:
        long = msgspec.structs.replace(change("a2"), data=msgspec.Raw(b'"%s"' % (b"x" * MAX_EVENT_BYTES)))
        with pytest.raises(Permanent):
            await backend.commit([register(change("a1")), register(long)])
        with pytest.raises(Permanent):
            await backend.commit([Commit((append(change("a3")),), put(long))])
        assert await backend.last([f"{LANE}/a1", f"{LANE}/a2", f"{LANE}/a3"]) == {}
        assert await self.carried(backend) == {}

    async def test_a_reminder_is_put_again(self, backend: Backend) -> None:
        a1 = change("a1")
        await applied(backend, register(a1))
        await applied(backend, Commit((), put(a1, repeat=True)))
        assert await self.carried(backend) == {"a": [a1, a1]}

    async def test_a_channel_keeps_nothing_of_its_unit_from_the_queue(self, backend: Backend) -> None:
        """What a channel carries does not count as queued: the unit may have been a queue's before."""
        event = found("a1")
        await applied(backend, Commit((append(event),), put(event)))
        await applied(backend, Commit((), (Publish(event, "load", repeat=True),)))
        assert [each.event for each in await self.receive(backend)] == [event]

    async def test_an_ack_of_what_another_has_brought_follows_its_commit(self, backend: Backend) -> None:
        a1 = change("a1")
        await applied(backend, register(a1))
        first, late = Brought(a1), Brought(a1)
        tally = (Tally(RUN, 0, "apply", settled=1),)
        await applied(backend, Commit((append(following(a1)),), (), tally, first))
        assert (first.acks, await index(backend, "open")) == (1, set())
        (answer,) = await backend.commit([Commit((append(following(a1)),), (), tally, late)])
        assert isinstance(answer, VersionConflict)
        assert late.acks == 0

    async def test_what_is_put_wakes_who_waits_for_it(self, backend: Backend) -> None:
        iterator = backend.channel(CHANNEL).consume("c", wait=2 * PATIENCE)
        waiting = asyncio.ensure_future(anext(iterator))
        await asyncio.sleep(0)
        await applied(backend, register(change("a1")))
        assert [record.key for record in (await within(PATIENCE, waiting)).records] == ["a"]
        await iterator.aclose()  # type: ignore[attr-defined]

    async def test_many_who_commit_at_once_keep_the_order_of_each_group(self, opener: Opener) -> None:
        """Each of them follows the unit before in a stream of its group: versions tell the order."""
        async with opener() as one, opener() as two:
            backends: Sequence[Backend] = (one, two) if self.persistent else (one, one)

            async def follow(backend: Backend, group: str) -> None:
                for _ in range(8):
                    done = False
                    while not done:
                        head = (await backend.last([f"{LANE}/{group}"])).get(f"{LANE}/{group}")
                        event = following(head) if head else change(group)
                        commit = Commit((Append(event.subject, event.version - 1, (event,)),), put(event))
                        (answer,) = await backend.commit([commit])
                        done = not isinstance(answer, VersionConflict)

            await within(
                LONG_PATIENCE, asyncio.gather(*(follow(b, group) for b in backends for group in "abc"))
            )
            seen = await self.carried(one)
        assert {key: [event.version for event in seen[key]] for key in seen} == {
            group: list(range(1, 17)) for group in "abc"
        }
