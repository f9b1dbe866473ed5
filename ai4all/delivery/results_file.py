"""The spool's file: its schema, how it is opened, and what is done when it is damaged.

One SQLite database in WAL mode with ``synchronous=FULL``: a transaction that has returned survives
a power cut. It is locked by its one user for as long as it is open.

A damaged file is never deleted. It is copied aside, what can still be read is written into a new
file, and only a complete new file takes the old one's place; a crash between any two of these
steps leaves a state from which the next start goes on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ai4all.errors import SpoolError

__all__ = [
    "Contents",
    "DELETE_RESULT",
    "DELETE_RUNNING",
    "INSERT_RESULT",
    "INSERT_RUNNING",
    "RESULT_COLUMNS",
    "Recovery",
    "Row",
    "Running",
    "delete_results",
    "drop_old",
    "insert_results",
    "open_file",
    "problem",
]

_SCHEMA_VERSION = 3
_SCHEMA = (
    """CREATE TABLE results (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        block_id TEXT NOT NULL UNIQUE,
        payload BLOB NOT NULL,
        sha256 BLOB NOT NULL,
        committed_at REAL NOT NULL,
        days INTEGER NOT NULL DEFAULT 0
    )""",
    "CREATE TABLE days (counted_at REAL NOT NULL)",
    """CREATE TABLE running (
        block_id TEXT PRIMARY KEY,
        begun_at REAL NOT NULL,
        deadline REAL
    ) WITHOUT ROWID""",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)
# From each older version to the next one.
_MIGRATIONS = {
    # What ran under the first version has no deadline that is known, and is nobody's any more.
    1: (
        "ALTER TABLE running ADD COLUMN deadline REAL",
        "UPDATE running SET deadline = begun_at",
    ),
    2: (
        "ALTER TABLE results ADD COLUMN days INTEGER NOT NULL DEFAULT 0",
        "CREATE TABLE days (counted_at REAL NOT NULL)",
    ),
}
INSERT_RUNNING = "INSERT OR REPLACE INTO running (block_id, begun_at, deadline) VALUES (?, ?, ?)"
DELETE_RUNNING = "DELETE FROM running WHERE block_id = ?"
INSERT_RESULT = "INSERT INTO results (block_id, payload, sha256, committed_at) VALUES (?, ?, ?, ?)"
DELETE_RESULT = "DELETE FROM results WHERE block_id = ?"
RESULT_COLUMNS = 4
"""Values of one ``INSERT_RESULT``."""

_DAY_S = 86_400.0

# How long to wait for a predecessor that is on its way out.
_LOCK_WAIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Row:
    """One result: who it is for, its bytes, and when it was committed (seconds since the epoch)."""

    block_id: str
    payload: bytes
    committed_at: float

    def values(self) -> tuple[str, bytes, bytes, float]:
        """The columns of ``INSERT_RESULT``."""
        digest = hashlib.sha256(self.payload).digest()
        return (self.block_id, self.payload, digest, self.committed_at)


@dataclass(frozen=True, slots=True)
class Running:
    """A block that ran: when it was begun, and until when it is wanted from here, if that is known.

    Both are seconds since the epoch.
    """

    block_id: str
    begun_at: float
    deadline: float | None

    def values(self) -> tuple[str, float, float | None]:
        """The columns of ``INSERT_RUNNING``."""
        return (self.block_id, self.begun_at, self.deadline)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was done about a damaged file.

    Attributes:
        set_aside: Copy of the damaged file.
        damage: What was found.
        salvaged: Results that could be read in full and were kept.
        damaged: Results that could be read but do not match their hash. Others may be lost that
            could not be read at all.
    """

    set_aside: Path
    damage: str
    salvaged: int
    damaged: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds: results in commit order, and blocks that were running."""

    rows: tuple[Row, ...]
    running: tuple[Running, ...]


class _Damaged(Exception):
    """The file cannot be trusted; the text says why."""


def open_file(path: Path) -> tuple[sqlite3.Connection, Contents, Recovery | None]:
    """Open the file, create it if it is missing, recover it if it is damaged.

    Raises:
        SpoolError: It cannot be created or read, another process has it, or a newer version of
            this package wrote it.
    """
    try:
        _create(path)
        _finish_salvage(path)
        try:
            return (*_open_sound(path), None)
        except _Damaged as exc:
            recovery = _recover(path, str(exc))
            try:
                return (*_open_sound(path), recovery)
            except _Damaged as again:
                raise SpoolError(path, f"damaged again after its recovery: {again}") from again
    except sqlite3.Error as exc:
        raise SpoolError(path, problem(exc)) from exc
    except OSError as exc:
        if isinstance(exc, SpoolError):
            raise
        raise SpoolError(path, exc.strerror or str(exc)) from exc


@functools.cache
def insert_results(count: int) -> str:
    """``INSERT_RESULT`` of so many rows."""
    return INSERT_RESULT + ", (?, ?, ?, ?)" * (count - 1)


@functools.cache
def delete_results(count: int) -> str:
    """``DELETE_RESULT`` of so many rows."""
    return f"DELETE FROM results WHERE block_id IN (?{', ?' * (count - 1)})"


def problem(exc: sqlite3.Error) -> str:
    """What went wrong, for the owner of the machine."""
    match _primary_code(exc):
        case sqlite3.SQLITE_FULL:
            return "the disk is full"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return "another process has it open"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_CANTOPEN:
            return f"it cannot be written ({exc})"
        case sqlite3.SQLITE_IOERR:
            return f"the disk cannot be written or is full ({_name(exc)})"
        case _:
            return str(exc)


def _primary_code(exc: sqlite3.Error) -> int:
    # An exception of the sqlite3 module itself (misuse) has no code.
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF


def _name(exc: sqlite3.Error) -> str:
    return str(getattr(exc, "sqlite_errorname", exc))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _create(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SQLite gives the WAL the mode of the database.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
    _sync_directory(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=_LOCK_WAIT_S, isolation_level=None, check_same_thread=False
    )
    # Exclusive: no second writer, and no shared-memory file.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    return connection


def _open_sound(path: Path) -> tuple[sqlite3.Connection, Contents]:
    wal = _beside(path, "-wal")
    if path.stat().st_size == 0 and wal.exists() and wal.stat().st_size > 0:
        # SQLite would take this for a new database and drop the log.
        raise _Damaged("the database is empty but its log is not")
    connection = _connect(path)
    try:
        _prepare(connection, path)
        contents = _read(connection)
    except BaseException as exc:
        connection.close()
        if _is_damage(exc):
            raise _Damaged(str(exc)) from exc
        raise
    return connection, contents


def _is_damage(error: BaseException) -> bool:
    if isinstance(error, UnicodeDecodeError):
        # SQLite's complaint quotes what is damaged, and that is no text any more.
        return True
    if isinstance(error, sqlite3.OperationalError) and not hasattr(error, "sqlite_errorcode"):
        # The module's own complaint: a column of text holds none.
        return True
    return isinstance(error, sqlite3.Error) and _primary_code(error) in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,  # the text of the schema is damaged
    )


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _SCHEMA_VERSION:
        raise SpoolError(path, f"a newer version wrote it (schema {version}); update this worker")
    if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise SpoolError(path, "it is a database of something else")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    # Apple's fsync returns before the disk has written.
    connection.execute("PRAGMA fullfsync = ON")
    connection.execute("PRAGMA checkpoint_fullfsync = ON")
    # What was delivered is other people's text and is not to linger in free pages.
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA journal_size_limit = 4194304")
    # Also takes the lock, before anything is believed.
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA if version == 0 else _statements_from(version):
        connection.execute(statement)
    connection.execute("COMMIT")


def _statements_from(version: int) -> Iterator[str]:
    for step in range(version, _SCHEMA_VERSION):
        yield from _MIGRATIONS[step]
        yield f"PRAGMA user_version = {step + 1}"


def drop_old(connection: sqlite3.Connection, now: float, keep_days: float) -> set[str]:
    """Count one more day for every result if the last count is a day ago, and drop the old ones.

    A day is counted once however far the clock has moved. A clock that is wrong, or was, makes a
    result older by a day and never by the years between, so that it is kept for ``keep_days`` at
    least, and the longer the less often the file is opened.

    Args:
        connection: The open file.
        now: Seconds since the epoch, as far as this machine knows.
        keep_days: Days after which nobody will want a result.

    Returns:
        The blocks whose results were dropped.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        (counted_at,) = connection.execute("SELECT max(counted_at) FROM days").fetchone()
        if counted_at is None or not 0.0 <= now - counted_at < _DAY_S:
            connection.execute("DELETE FROM days")
            connection.execute("INSERT INTO days VALUES (?)", (now,))
        if counted_at is not None and now - counted_at >= _DAY_S:
            connection.execute("UPDATE results SET days = days + 1")
        old = connection.execute("SELECT block_id FROM results WHERE days > ?", (keep_days,))
        dropped = {block_id for (block_id,) in old.fetchall()}
        if dropped:
            connection.execute("DELETE FROM results WHERE days > ?", (keep_days,))
        connection.execute("COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return dropped


def _read(connection: sqlite3.Connection) -> Contents:
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise _Damaged(str(verdict))
    rows = []
    for block_id, payload, digest, committed_at in connection.execute(
        "SELECT block_id, payload, sha256, committed_at FROM results ORDER BY seq"
    ):
        if hashlib.sha256(payload).digest() != digest:
            raise _Damaged("a result does not match its hash")
        rows.append(Row(block_id, payload, committed_at))
    running = connection.execute(
        "SELECT block_id, begun_at, deadline FROM running ORDER BY begun_at"
    ).fetchall()
    return Contents(tuple(rows), tuple(Running(*columns) for columns in running))


def _recover(path: Path, damage: str) -> Recovery:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = _beside(path, f".corrupt-{stamp}")
    number = 0
    while aside.exists():
        number += 1
        aside = _beside(path, f".corrupt-{stamp}-{number}")
    _copy(path, aside)
    wal = _beside(path, "-wal")
    if wal.exists():
        _copy(wal, _beside(aside, "-wal"))
    _sync_directory(path)

    rows, running, damaged = _salvage(path)
    _write_salvaged(path, rows, running)
    _finish_salvage(path)
    return Recovery(aside, damage, len(rows), damaged)


def _copy(source: Path, target: Path) -> None:
    shutil.copy2(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def _salvage(path: Path) -> tuple[list[Row], list[Running], int]:
    """Read what can be read: from the front up to the damage, then from the back down to it."""
    found: dict[int, Row] = {}
    running: dict[str, Running] = {}
    bad: set[int] = set()
    with contextlib.closing(_connect(path)) as connection:
        # A text that is none makes its row a damaged one, and does not end the reading.
        connection.text_factory = _text
        for order in ("ASC", "DESC"):
            for seq, block_id, payload, digest, committed_at in _readable(
                connection,
                "SELECT seq, block_id, payload, sha256, committed_at"
                f" FROM results NOT INDEXED ORDER BY seq {order}",
            ):
                if _is_whole(block_id, payload, digest, committed_at):
                    found[seq] = Row(block_id, payload, committed_at)
                else:
                    bad.add(seq)
            # All columns: a file of the first version has one less.
            for block_id, begun_at, *rest in _readable(
                connection, f"SELECT * FROM running ORDER BY block_id {order}"
            ):
                deadline = rest[0] if rest else begun_at
                if isinstance(block_id, str) and isinstance(begun_at, float):
                    until = deadline if isinstance(deadline, float) else None
                    running[block_id] = Running(block_id, begun_at, until)
    # A damaged tree can show one row twice.
    unique = {found[seq].block_id: found[seq] for seq in sorted(found)}
    left = [each for block_id, each in running.items() if block_id not in unique]
    return list(unique.values()), left, len(bad)


def _readable(connection: sqlite3.Connection, query: str) -> Iterator[tuple[Any, ...]]:
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
        yield from connection.execute(query)


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _is_whole(block_id: object, payload: object, digest: object, committed_at: object) -> bool:
    return (
        isinstance(block_id, str)
        and isinstance(payload, bytes)
        and isinstance(committed_at, float)
        and hashlib.sha256(payload).digest() == digest
    )


def _write_salvaged(path: Path, rows: Iterable[Row], running: Iterable[Running]) -> None:
    unfinished = _beside(path, ".salvage-unfinished")
    unfinished.unlink(missing_ok=True)
    _create(unfinished)
    with contextlib.closing(sqlite3.connect(unfinished, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN")
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.executemany(INSERT_RESULT, (row.values() for row in rows))
        connection.executemany(INSERT_RUNNING, (each.values() for each in running))
        connection.execute("COMMIT")
    unfinished.rename(_beside(path, ".salvaged"))
    _sync_directory(path)


def _finish_salvage(path: Path) -> None:
    """Put a complete new file in the place of the damaged one, which has been copied aside."""
    salvaged = _beside(path, ".salvaged")
    if not salvaged.exists():
        return
    # The old log first: SQLite would play it into the new file.
    _beside(path, "-wal").unlink(missing_ok=True)
    _beside(path, "-shm").unlink(missing_ok=True)
    salvaged.replace(path)
    _sync_directory(path)
