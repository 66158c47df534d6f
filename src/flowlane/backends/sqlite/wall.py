"""The wall clock, as the file needs it: what becomes of leases and delays when it is set.

Leases and delays end at times of the wall clock. It may be set forward: they end early by so much. It may be
set back: then whatever is not due yet would wait for longer by that step, for hours. So the file has where
the clock stood last, and a transaction that finds itself before that moves all that is not due by as much.
Being one transaction, that happens once for all processes, and also for a step while no process ran.

What holds: after any step back, an entry is received at the latest when its whole lease or delay has passed
again from then on, and what was due at once at once, both but for two seconds (``_EXACT`` twice).
"""

from __future__ import annotations

import sqlite3
from typing import Final

from flowlane.clock import Clock

# Milliseconds: how old what the file has of the clock may be, and which steps back are left alone: nobody
# waits for longer than those, and clocks are corrected by such all the time.
_EXACT: Final = 1000

_NEVER: Final = -(1 << 62)


class Wall:
    """Begins and commits the transactions of one connection, each of which has one ``moment``."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._noted = self._asked = self._noting = _NEVER
        #: When the transaction began, in milliseconds. Taken when it has the lock, for which it may have
        #: waited for long: a lease counted from before might have ended when it is given.
        self.moment = 0

    def now(self) -> int:
        """Milliseconds since 1970."""
        return int(self._clock.now().timestamp() * 1000)

    def behind(self, connection: sqlite3.Connection, now: int) -> bool:
        """Whether a transaction is needed before it is known what is due. Looked up once a second."""
        if self._asked <= now < self._asked + _EXACT:
            return False
        self._asked = now
        return now < _latest(connection) - _EXACT

    def begin(self, connection: sqlite3.Connection) -> int:
        """The moment of the transaction, which has the lock now."""
        connection.execute("BEGIN IMMEDIATE")
        self.moment = now = self.now()
        self._noting = self._noted
        if not self._noted <= now < self._noted + _EXACT:
            self._note(connection, now)
        return now

    def again(self, connection: sqlite3.Connection) -> int:
        """As ``begin``, after nothing of the transaction so far."""
        connection.execute("ROLLBACK")
        return self.begin(connection)

    def commit(self, connection: sqlite3.Connection) -> None:
        """What was begun stands."""
        connection.execute("COMMIT")
        self._noted = self._noting

    def _note(self, connection: sqlite3.Connection, now: int) -> None:
        self._noting = now
        latest = _latest(connection)
        if now < latest - _EXACT:
            connection.execute("UPDATE queue SET due = due - ? WHERE due > ?", (latest - now, now))
        elif now <= latest:
            return
        connection.execute("UPDATE clock SET latest = ?", (now,))


def _latest(connection: sqlite3.Connection) -> int:
    latest: int
    (latest,) = connection.execute("SELECT latest FROM clock").fetchone()
    return latest
