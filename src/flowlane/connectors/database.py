"""One connection to a SQLite file: used by one at a time, off the loop, its errors typed."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote, unquote, urlsplit

from flowlane.clock import Clock
from flowlane.connectors.hop import hop
from flowlane.errors import ConfigError, FlowlaneError, Permanent, Retryable

T = TypeVar("T")

#: How long a transaction waits for those of other connections, in seconds.
PATIENCE: Final = 30.0
#: Between two looks at a file that is in the making, in seconds.
_PAUSE: Final = 0.01

#: What refuses a single row: its values, or a constraint of the table.
UNFIT: Final = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError, ValueError, TypeError)

#: The generation that a row was written by; in every table that is upserted into.
GENERATION: Final = "_flowlane_generation"

#: The application id of a backend's file (``backends.sqlite.schema``), which holds no tables of others.
_BACKEND: Final = 0x666C6F77

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}", re.ASCII)
_RESERVED: Final = ("_flowlane", "sqlite_")

# Result codes (sqlite.org/rescode.html, "Primary Result Codes").
_PASSING: Final = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_SCHEMA,
}
_NO_FILE: Final = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_CORRUPT,
}


def path_of(uri: str) -> Path:
    """The file of ``sqlite:///relative/path`` or ``sqlite:////absolute/path``.

    Raises:
        ConfigError: it names none.
    """
    parts = urlsplit(uri)
    # What urlsplit takes for a fragment belongs to the name: the file before the # would be another one.
    path = unquote(uri.partition("?")[0].partition("://")[2][1:])
    if parts.scheme != "sqlite" or parts.netloc or not path or path == ":memory:" or "\0" in path:
        raise ConfigError(f"{uri}: write sqlite:///relative/path or sqlite:////absolute/path of a file")
    return Path(path)


def plain(name: str) -> bool:
    """Whether `name` may become an identifier: any database would take it, and it is none of flowlane's."""
    return _NAME.fullmatch(name) is not None and not name.lower().startswith(_RESERVED)


def quoted(name: str, what: str, error: type[FlowlaneError] = Permanent) -> str:
    """`name` as an identifier in SQL.

    Raises:
        FlowlaneError: as `error` says: it is not ``plain``.
    """
    if not plain(name):
        raise error(
            f"the {what} {name[:80]!a} is no plain name: letters, digits and underscores, 63 at most, "
            "not beginning with a digit or _flowlane: rename it"
        )
    return f'"{name}"'


def escaped(name: str) -> str:
    """The name of a column that is there: its maker may have called it anything."""
    return '"' + name.replace('"', '""') + '"'


def folded(name: str) -> str:
    """What two names of one column have in common: to SQLite only the letters of ASCII have no case."""
    return name.lower() if name.isascii() else "".join(c.lower() if c.isascii() else c for c in name)


class Database:
    """See the module. ``close`` it when done."""

    def __init__(self, clock: Clock, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._clock = clock
        self._connection = connection
        self._free = asyncio.Lock()

    @classmethod
    async def open(cls, clock: Clock, path: Path, *, write: bool) -> Database:
        """The database in the file `path`, which is made (with its folder) if it is to be written to.

        Raises:
            ConfigError: there is no such file, it cannot be opened or made, or belongs to something else.
        """
        made: list[sqlite3.Connection] = []
        try:
            await hop(clock, lambda: made.append(_connect(path, write)))
        except BaseException:
            for connection in made:  # cancelled, but by then it was there
                await hop(clock, connection.close)
            raise
        return cls(clock, path, made[0])

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns; where it raises, the transaction that it began is undone. A cancellation waits
        for it, so that nobody finds a transaction half done.

        Raises:
            Retryable: the file is locked for too long, or the disk is full.
            ConfigError: the file is damaged, gone or not to be written to.
            Permanent: SQLite refuses what is asked.
        """
        async with self._free:
            return await hop(self._clock, self._guarded, work)

    async def close(self) -> None:
        """Let go of the file."""
        async with self._free:
            await hop(self._clock, self._connection.close)

    def _guarded(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return work(self._connection)
        except BaseException as error:
            if self._connection.in_transaction:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise failure(error, self.path) from None
            raise


def patiently(step: Callable[[], None], seconds: float) -> None:
    """Do `step`, again and again for so long while other connections write, make or recover the same file.

    Raises:
        sqlite3.OperationalError: they still do.
    """
    pause = threading.Event()
    for left in range(int(seconds / _PAUSE), -1, -1):
        try:
            step()
            return
        except sqlite3.OperationalError as error:
            if not left or not is_locked(error):
                raise
        pause.wait(_PAUSE)


def is_locked(error: sqlite3.Error) -> bool:
    """Whether `error` says that another connection is in the way."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def failure(error: sqlite3.Error, path: Path) -> FlowlaneError:
    """What the sqlite3 module says, as one of flowlane's errors."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_BUSY:  # not LOCKED, which is this connection's own doing, and not waited for
        return Retryable(
            f"{path}: {error}: another connection has been in the way for {PATIENCE:g} s: end that one"
        )
    if code in _PASSING:
        return Retryable(f"{path}: {error}")
    if code in _NO_FILE:
        return ConfigError(f"{path}: {error}: name another file, or repair this one")
    return Permanent(f"{path}: {error}")


def _connect(path: Path, write: bool) -> sqlite3.Connection:
    if write:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path}: its folder cannot be made ({error.strerror})") from None
    elif not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode={'rwc' if write else 'rw'}",
            uri=True,
            timeout=0,  # where others make or recover the file, SQLite itself does not wait
            isolation_level=None,
            check_same_thread=False,  # one thread at a time, but not always the same one
        )
        patiently(partial(_prepare, connection, path, write), PATIENCE)
        connection.execute(f"PRAGMA busy_timeout = {int(PATIENCE * 1000)}")
    except BaseException as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.Error):
            raise failure(error, path) from None
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, write: bool) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application == _BACKEND and write:
        raise ConfigError(f"{path}: is the file of a flowlane backend: name another one for tables")
    if write:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    else:
        connection.execute("PRAGMA query_only = 1")
