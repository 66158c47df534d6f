"""The file: its tables, and how it is created, recognised and refused."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from flowlane.errors import ConfigError, FlowlaneError, Permanent, Retryable

APPLICATION: Final = 0x666C6F77  # "flow"
VERSION: Final = 1

#: What binding a value raises that SQLite cannot hold, such as an integer of more than 64 bits.
UNFIT: Final = (
    OverflowError,
    UnicodeError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    sqlite3.DataError,
)

# The log has a rowid and a unique index: clustered by (stream, version) it took 1.6 times as long. ``event``
# is text, so that a group of rows is one JSON array by concatenation, and the file can be read by people.
# A queue entry holds its event only where that is not one of the commit which published it (NULL: the log
# has it). ``lease`` is unique per receive: rowids are used again, and a stale ack must not delete another
# entry. ``due`` is when an entry may be received: while it is leased, the end of the lease. Milliseconds on
# the wall clock: it is the one clock that processes share and that outlives a boot. Where it jumps, leases
# end early or late; that is all, because what a stage does is fenced by the log and not by its lease.
_SCHEMA: Final = """
CREATE TABLE log (
    seq INTEGER PRIMARY KEY, stream TEXT NOT NULL, version INTEGER NOT NULL, lane TEXT NOT NULL,
    run TEXT NOT NULL, event TEXT NOT NULL, UNIQUE (stream, version));
CREATE INDEX log_runs ON log (lane, seq) WHERE version = 1 AND stream = run;
CREATE TABLE units (stream TEXT PRIMARY KEY, lane TEXT NOT NULL, state TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX units_dead ON units (lane, stream) WHERE state = 'dead';
CREATE TABLE tally (
    run TEXT, round INTEGER, stage TEXT, closed INTEGER NOT NULL,
    found INTEGER NOT NULL, settled INTEGER NOT NULL, dead INTEGER NOT NULL, skipped INTEGER NOT NULL,
    superseded INTEGER NOT NULL, redriven INTEGER NOT NULL, records_in INTEGER NOT NULL,
    expanded INTEGER NOT NULL, records_out INTEGER NOT NULL, records_skipped INTEGER NOT NULL,
    quarantined INTEGER NOT NULL, bytes_in INTEGER NOT NULL, bytes_out INTEGER NOT NULL,
    PRIMARY KEY (run, round, stage)) WITHOUT ROWID;
CREATE TABLE queue (
    id INTEGER PRIMARY KEY, stage TEXT NOT NULL, due INTEGER NOT NULL,
    stream TEXT NOT NULL, version INTEGER NOT NULL, attempt INTEGER NOT NULL DEFAULT 0,
    lease INTEGER NOT NULL DEFAULT 0, event TEXT);
CREATE INDEX queue_due ON queue (stage, due);
CREATE INDEX queue_stream ON queue (stream);
CREATE TABLE channel (
    channel TEXT, partition INTEGER, position INTEGER, key TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (channel, partition, position)) WITHOUT ROWID;
CREATE TABLE consumer (
    channel TEXT, consumer TEXT, partition INTEGER, position INTEGER NOT NULL, owner TEXT NOT NULL,
    until INTEGER NOT NULL, PRIMARY KEY (channel, consumer, partition)) WITHOUT ROWID;
"""


class Settings(msgspec.Struct, frozen=True):
    """How the file is opened; ``busy_timeout`` in seconds."""

    path: Path
    synchronous: str = "NORMAL"
    busy_timeout: float = 30.0


def failure(error: Exception, path: Path) -> FlowlaneError:
    """What the sqlite3 module says, as one of flowlane's errors."""
    if isinstance(error, sqlite3.OperationalError):
        # Locked for longer than the busy timeout, disk full, I/O error: another time it may go.
        return Retryable(f"{path}: {error}")
    if type(error) is sqlite3.DatabaseError:
        return ConfigError(f"{path}: {error}: put it aside and restore a backup, or name another file")
    if isinstance(error, UNFIT):
        return Permanent(f"{path}: a value does not fit into the file: {error}")
    return Retryable(f"{path}: {type(error).__name__}: {error}")


def connect(settings: Settings) -> sqlite3.Connection:
    """The connection that writes; the file is there, ours and writable when this returns.

    Raises:
        ConfigError: the file cannot be created or written, or is not a flowlane file of this release.
    """
    path = settings.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: its directory cannot be made ({error.strerror}): name another path"
        ) from None
    connection: sqlite3.Connection | None = None
    try:
        connection = _open(settings)
        _patiently(lambda c=connection: _recognise(c, path), settings.busy_timeout)  # type: ignore[misc]
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise _refusal(error, path) from None
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    return connection


def connect_reader(settings: Settings) -> sqlite3.Connection:
    """A connection that cannot write, for any one thread at a time; the file exists."""
    connection = _open(settings)
    connection.execute("PRAGMA query_only = 1")
    return connection


def _open(settings: Settings) -> sqlite3.Connection:
    connection = sqlite3.connect(
        settings.path,
        timeout=settings.busy_timeout,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )
    connection.execute(f"PRAGMA synchronous = {settings.synchronous}")
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    connection.execute("PRAGMA cache_size = -32000")
    connection.execute("PRAGMA temp_store = MEMORY")
    return connection


def _recognise(connection: sqlite3.Connection, path: Path) -> None:
    if not _is_ours(connection, path):
        # Outside of any transaction, and before there is anything to lose.
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise ConfigError(f"{path}: no write-ahead log is possible there: name a file on a local disk")
    connection.execute("BEGIN IMMEDIATE")  # even if there is nothing to create: proves that we may write
    try:
        if not _is_ours(connection, path):  # another process may have been faster
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is one of this release; False if it is empty, refused if it is anything else."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == APPLICATION and version == VERSION:
        return True
    if application == APPLICATION:
        raise ConfigError(
            f"{path}: has schema {version} of flowlane, this release knows {VERSION}: "
            "upgrade flowlane, or name another file"
        )
    if tables or application or version:
        raise ConfigError(f"{path}: is the database of another application: name another file")
    return False


def _patiently(step: Callable[[], None], seconds: float) -> None:
    """`step`, again and again while other processes create or recover the same file: SQLite does not wait
    for those by itself."""
    pause = threading.Event()
    for left in range(int(seconds / 0.05), -1, -1):
        try:
            step()
            return
        except sqlite3.OperationalError as error:
            if not left or error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
        pause.wait(0.05)


def _refusal(error: sqlite3.Error, path: Path) -> ConfigError:
    if path.is_dir():
        return ConfigError(f"{path}: is a directory: name a file in it")
    if type(error) is sqlite3.DatabaseError:
        return ConfigError(
            f"{path}: is not a database, or damaged ({error}): restore a backup or name another file"
        )
    return ConfigError(
        f"{path}: cannot be opened for writing ({error}): check its permissions or name another file"
    )
