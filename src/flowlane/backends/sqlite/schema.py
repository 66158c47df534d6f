"""The file: its tables, and how it is created, recognised and refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

import msgspec

from flowlane.clock import Clock
from flowlane.connectors.database import is_locked, patiently
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

# How long (seconds) the path is taken to lead to the file still.
_CHECKED: Final = 0.1

# The log has a rowid and a unique index: clustered by (stream, version) it took 1.6 times as long. ``event``
# is text, so that a group of rows is one JSON array by concatenation, and the file can be read by people.
# Units that are owed work and units that are dead have a table each: the first is asked for all the time,
# and an index over both would cost every unit that comes and goes.
# A queue entry holds its event only where that is not one of the commit which published it (NULL: the log
# has it). ``lease`` is unique per receive: rowids are used again, and a stale ack must not delete another
# entry. ``due`` is when an entry may be received: while it is leased, the end of the lease. Milliseconds on
# the wall clock: it is the one clock that processes share and that outlives a boot; ``clock`` has where it
# stood last, and ``wall`` says what becomes of leases and delays when it jumps. What a stage does is fenced
# by the log and not by its lease.
# ``grp`` is the group of an entry that belongs to one. Only the first of its group can be due: those behind
# it are due as much later as ``_BEHIND`` says, which is for ever, until its turn comes. Triggers see to that,
# so it holds for earlier builds, too, that work on the same file; see ``keep_order``.
# All of it is run at every opening: what a file of an earlier build lacks is made.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS log (
    seq INTEGER PRIMARY KEY, stream TEXT NOT NULL, version INTEGER NOT NULL, lane TEXT NOT NULL,
    run TEXT NOT NULL, event TEXT NOT NULL, UNIQUE (stream, version));
CREATE INDEX IF NOT EXISTS log_runs ON log (lane, seq) WHERE version = 1 AND stream = run;
CREATE TABLE IF NOT EXISTS open (stream TEXT PRIMARY KEY, lane TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead (lane TEXT, stream TEXT, PRIMARY KEY (lane, stream)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tally (
    run TEXT, round INTEGER, stage TEXT, closed INTEGER NOT NULL,
    found INTEGER NOT NULL, settled INTEGER NOT NULL, dead INTEGER NOT NULL, skipped INTEGER NOT NULL,
    superseded INTEGER NOT NULL, redriven INTEGER NOT NULL, records_in INTEGER NOT NULL,
    expanded INTEGER NOT NULL, records_out INTEGER NOT NULL, records_skipped INTEGER NOT NULL,
    quarantined INTEGER NOT NULL, bytes_in INTEGER NOT NULL, bytes_out INTEGER NOT NULL,
    PRIMARY KEY (run, round, stage)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS queue (
    id INTEGER PRIMARY KEY, stage TEXT NOT NULL, due INTEGER NOT NULL,
    stream TEXT NOT NULL, version INTEGER NOT NULL, attempt INTEGER NOT NULL DEFAULT 0,
    lease INTEGER NOT NULL DEFAULT 0, event TEXT, grp TEXT);
CREATE INDEX IF NOT EXISTS queue_due ON queue (stage, due);
CREATE INDEX IF NOT EXISTS queue_group ON queue (stage, grp) WHERE grp IS NOT NULL;
CREATE TABLE IF NOT EXISTS channel (
    channel TEXT, partition INTEGER, position INTEGER, key TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (channel, partition, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS consumer (
    channel TEXT, consumer TEXT, partition INTEGER, position INTEGER NOT NULL, owner TEXT NOT NULL,
    until INTEGER NOT NULL, PRIMARY KEY (channel, consumer, partition)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clock (id INTEGER PRIMARY KEY, latest INTEGER NOT NULL);
INSERT OR IGNORE INTO clock VALUES (1, 0)
"""

# Half of it tells who is behind: a clock that is set back takes its step off (see ``wall``), by decades if it
# was that wrong.
_BEHIND: Final = 1 << 60
_TRIGGERS: Final = (
    f"""CREATE TRIGGER IF NOT EXISTS queue_behind AFTER INSERT ON queue WHEN NEW.grp IS NOT NULL AND EXISTS (
        SELECT 1 FROM queue WHERE stage = NEW.stage AND grp = NEW.grp AND id < NEW.id)
    BEGIN UPDATE queue SET due = due + {_BEHIND} WHERE id = NEW.id; END""",  # noqa: S608  # a constant
    f"""CREATE TRIGGER IF NOT EXISTS queue_turn AFTER DELETE ON queue WHEN OLD.grp IS NOT NULL
    BEGIN UPDATE queue SET due = due - {_BEHIND} WHERE due >= {_BEHIND // 2} AND id = (
        SELECT min(id) FROM queue WHERE stage = OLD.stage AND grp = OLD.grp); END""",  # noqa: S608  # a constant
)

_BY_STREAM: Final = "CREATE INDEX IF NOT EXISTS queue_stream ON queue (stream)"

# An earlier build had no groups.
_GROUPLESS: Final = """
SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'queue'
AND NOT EXISTS (SELECT 1 FROM pragma_table_info('queue') WHERE name = 'grp')
"""

# An earlier build had both kinds of units in one table.
_SPLIT: Final = """
INSERT OR IGNORE INTO open SELECT stream, lane FROM units WHERE state = 'open';
INSERT OR IGNORE INTO dead SELECT lane, stream FROM units WHERE state = 'dead';
DROP TABLE units
"""


class Settings(msgspec.Struct, frozen=True):
    """How the file is opened: its absolute path, as the process may change its directory; ``busy_timeout`` in
    seconds."""

    path: Path
    synchronous: str = "NORMAL"
    busy_timeout: float = 30.0


class Identity:
    """Which file lay under the path when it was opened.

    SQLite goes on in a file that was removed or replaced, and all that it writes there is lost when the
    process ends; so whoever uses the file asks here as well. For any thread.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self._number: tuple[int, int] | None = None
        self._number = self._look()
        self._gone = self._number is None
        self._checked = clock.monotonic()

    def check(self, *, now: bool = False) -> None:
        """The file is still there, as of a tenth of a second ago at the earliest, or as of `now`.

        Raises:
            ConfigError: it is not; from then on, whatever is put under the path.
        """
        moment = self._clock.monotonic()
        if self._gone or now or not self._checked <= moment < self._checked + _CHECKED:
            self._gone = self._gone or self._look() != self._number
            if self._gone:
                raise ConfigError(
                    f"{self._path}: was removed or replaced while it was in use, what came since is lost: "
                    "stop all that use it, put it back or restore a backup, and start again"
                )
            self._checked = moment

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:  # that it cannot be looked at now does not mean that it is gone
            return self._number
        return found.st_dev, found.st_ino


def damaged(path: Path, error: Exception | str) -> ConfigError:
    """What stands in the file cannot have been written by flowlane."""
    return ConfigError(f"{path}: {error}: put it aside and restore a backup, or name another file")


def failure(error: Exception, path: Path) -> FlowlaneError:
    """What the sqlite3 module says, as one of flowlane's errors; those that are pass unchanged."""
    if isinstance(error, FlowlaneError):
        return error
    if isinstance(error, sqlite3.OperationalError):
        if str(error).startswith("Could not decode to UTF-8"):  # Python's: it has no code to know it by
            return damaged(path, "holds text that is not UTF-8")
        # Locked for longer than the busy timeout, disk full, I/O error: another time it may go.
        return Retryable(f"{path}: {error}")
    if type(error) is sqlite3.DatabaseError:
        return damaged(path, error)
    if isinstance(error, msgspec.DecodeError):
        return damaged(path, f"holds an event that cannot be read ({error})")
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
        # SQLite shall not wait itself before all is done: where others create or recover the file it does
        # not, and elsewhere it would begin anew in every statement.
        connection = _connected(settings, 0)
        patiently(lambda c=connection: _prepared(c, settings), settings.busy_timeout)  # type: ignore[misc]
        connection.execute(f"PRAGMA busy_timeout = {int(settings.busy_timeout * 1000)}")
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise _refusal(error, settings) from None
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    return connection


def connect_reader(settings: Settings) -> sqlite3.Connection:
    """A connection that cannot write, for any one thread at a time; the file exists."""
    connection = _connected(settings, settings.busy_timeout)
    _tune(connection, settings)
    connection.execute("PRAGMA query_only = 1")
    return connection


def keep_order(connection: sqlite3.Connection) -> None:
    """From now on the queue keeps the order within groups. For each transaction that publishes to one: a file
    without groups has no triggers, which would cost each of its entries half a microsecond."""
    for statement in _TRIGGERS:
        connection.execute(statement)


def find_by_stream(connection: sqlite3.Connection) -> None:
    """From now on what the queue has of a stream is found without going through all of it. For each
    transaction that reminds of units: where no sweep has had to, it would cost each entry a microsecond."""
    connection.execute(_BY_STREAM)


def _connected(settings: Settings, timeout: float) -> sqlite3.Connection:
    return sqlite3.connect(
        settings.path, timeout=timeout, isolation_level=None, check_same_thread=False, cached_statements=256
    )


def _tune(connection: sqlite3.Connection, settings: Settings) -> None:
    connection.execute(f"PRAGMA synchronous = {settings.synchronous}")
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    connection.execute("PRAGMA cache_size = -32000")
    connection.execute("PRAGMA temp_store = MEMORY")


def _prepared(connection: sqlite3.Connection, settings: Settings) -> None:
    _tune(connection, settings)
    _recognise(connection, settings.path)


def _recognise(connection: sqlite3.Connection, path: Path) -> None:
    if not _is_ours(connection, path):
        # Outside of any transaction, and before there is anything to lose.
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise ConfigError(f"{path}: no write-ahead log is possible there: name a file on a local disk")
    connection.execute("BEGIN IMMEDIATE")  # even if there is nothing to create: proves that we may write
    try:
        ours = _is_ours(connection, path)  # another process may have been faster
        if ours and connection.execute(_GROUPLESS).fetchone():
            connection.execute("ALTER TABLE queue ADD COLUMN grp TEXT")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        if ours and connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'units'").fetchone():
            for statement in _SPLIT.split(";"):
                connection.execute(statement)
        if not ours:
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


def _refusal(error: sqlite3.Error, settings: Settings) -> ConfigError:
    path = settings.path
    if path.is_dir():
        return ConfigError(f"{path}: is a directory: name a file in it")
    if type(error) is sqlite3.DatabaseError:
        return ConfigError(
            f"{path}: is not a database, or damaged ({error}): restore a backup or name another file"
        )
    if is_locked(error):
        return ConfigError(
            f"{path}: another process has held its lock for {settings.busy_timeout:g} s: "
            "end that process, or wait longer with busy_timeout=SECONDS"
        )
    return ConfigError(
        f"{path}: cannot be opened for writing ({error}): check its permissions or name another file"
    )
