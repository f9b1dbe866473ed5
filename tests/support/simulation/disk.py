"""A machine's disk: the real spool in a real SQLite file, and what a crash leaves of it.

Transactions run in one piece at a moment of virtual time. A crash in the middle of one leaves the
file as a disk without power may: what was synced before is whole, and of what was being written
each sector has arrived or has not, or the file ends early. SQLite syncs its log at each commit
when ``synchronous`` is ``FULL``; where it is not, everything since the file was opened counts as
being written, so that a spool that no longer syncs is found out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ai4all.delivery.group_commit import Operation, Transactions, settle
from ai4all.delivery.results_file import DELETE_RESULT, INSERT_RESULT
from ai4all.delivery.spool import Spool
from ai4all.errors import SpoolError
from simulation.history import Kind, Record

if TYPE_CHECKING:
    from simulation.machine import Life
    from simulation.world import World

SECTOR: Final = 512
_SYNCHRONOUS_FULL: Final = 2


@dataclass(frozen=True, slots=True)
class Files:
    """The database and its log, as bytes; None when there is no such file."""

    database: bytes | None
    log: bytes | None


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """Where the machine is to die next.

    Attributes:
        step: "commit", "forget", "begin", "ended" or "open".
        moment: "before" the transaction, "during" it, or "after" it and before anyone knows.
    """

    step: str
    moment: str


class Disk:
    """The disk of one machine.

    Attributes:
        is_full: Every transaction fails.
        errors: Transactions that are yet to fail with an error of the device.
        slowness: Factor on the time of a transaction.
    """

    def __init__(
        self, world: World, name: str, folder: Path, history: Callable[[Record], None]
    ) -> None:
        self.is_full = False
        self.errors = 0
        self.slowness = 1.0
        self.path = folder / "results.sqlite3"
        self._log_path = folder / "results.sqlite3-wal"
        self._world = world
        self._name = name
        self._rng = world.chance(f"disk/{name}")
        self._history = history
        self._at_open = Files(None, None)

    def open(self, life: Life) -> Spool:
        """Open the spool as the worker's command does.

        Raises:
            SpoolError: There is no room for a new one.
        """
        if self.is_full and not self.path.exists():
            raise SpoolError(self.path, "the disk is full")
        spool = Spool.open(
            self.path,
            clock=life.clock.wall,
            writer=lambda path, connection: VirtualWriter(self, life, path, connection),
        )
        self._at_open = self.read()
        self.tell(Kind.OPENED)
        for block_id, payload in spool.pending():
            self.tell(Kind.FOUND, block_id, digest_of(payload))
        return spool

    def latency(self) -> float:
        """How long the next transaction takes."""
        return self._rng.uniform(0.0002, 0.008) * self.slowness

    def tell(self, kind: Kind, block: str = "", digest: str = "", detail: str = "") -> None:
        """Add to the history."""
        self._history(Record(self._world.now, kind, self._name, block, digest, detail))

    def note(self, what: str) -> None:
        """Add to the trace."""
        self._world.note(self._name, what)

    def read(self) -> Files:
        """The files as they are now."""
        return Files(_bytes(self.path), _bytes(self._log_path))

    def write(self, files: Files) -> None:
        """Put files in the place of those that are here, as others."""
        for path, data in ((self.path, files.database), (self._log_path, files.log)):
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)

    def after_power_cut(self, synced: Files, written: Files) -> Files:
        """What is left where ``synced`` was safe and ``written`` was on its way."""
        rng = self._rng
        if synced.database != written.database and rng.random() < 0.5:
            # The log is played into the database only after it was synced itself.
            return Files(torn(synced.database, written.database, rng), written.log)
        return Files(synced.database, torn(synced.log, written.log, rng))

    def synced(self, connection: sqlite3.Connection, now: Files) -> Files:
        """What is safe outside of a transaction."""
        (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        return now if (synchronous, mode) == (_SYNCHRONOUS_FULL, "wal") else self._at_open


class VirtualWriter(Transactions):
    """Writes a spool's operations on virtual time, with the faults of its disk."""

    def __init__(self, disk: Disk, life: Life, path: Path, connection: sqlite3.Connection) -> None:
        super().__init__(path, FaultyConnection(connection, disk))  # type: ignore[arg-type]
        self.sqlite = connection
        self._disk = disk
        self._life = life
        self._gathered: list[Operation] = []
        self._flush_at: asyncio.TimerHandle | None = None
        life.writer = self

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be written."""
        return not self._gathered

    def put(self, operation: Operation) -> None:
        """Do this soon."""
        if self._life.is_dead:
            return
        self._gathered.append(operation)
        loop = self._life.loop
        when = loop.time() + operation.patience + self._disk.latency()
        if self._flush_at is not None:
            if self._flush_at.when() <= when:
                return
            self._flush_at.cancel()
        self._flush_at = loop.call_at(when, self._flush)

    def withdraw(self, operation: Operation) -> bool:
        """Do not do this, if there is still time."""
        if operation not in self._gathered:
            return False
        self._gathered.remove(operation)
        return True

    def stop(self, stopped: Callable[[], None] | None) -> None:
        """Do what was asked, close the database, then call ``stopped``."""
        if not self._life.is_dead:
            self._flush()
            if not self._life.is_dead:
                self._close()
        if stopped is not None:
            stopped()

    def die(self, power: bool, left: Files | None) -> None:
        """End with the process; only the files stay.

        Args:
            power: The whole machine died, so that only what was synced is left.
            left: What is left, if that is known.
        """
        if left is None:
            now = self._disk.read()
            synced = self._disk.synced(self.sqlite, now)
            left = self._disk.after_power_cut(synced, now) if power else now
        with contextlib.suppress(sqlite3.Error):
            self.sqlite.close()
        self._disk.write(left)

    def _flush(self) -> None:
        self._flush_at = None
        batch, self._gathered = self._gathered, []
        if not batch or self._life.is_dead:
            return
        disk, life = self._disk, self._life
        steps = dict.fromkeys(_step_of(operation) for operation in batch)
        point = life.crash_point
        if point is None or point.step not in steps:
            self._write(batch)
            self._tell(batch, steps)
            settle(batch)
            return
        if point.moment == "before":
            life.crash(f"before {point.step}", power=True)
            return
        before = disk.synced(self.sqlite, disk.read())
        self._write(batch)
        if point.moment == "after":
            self._tell(batch, steps)
            life.crash(f"after {point.step}", power=True)
            return
        left = disk.after_power_cut(before, disk.read())
        for operation in batch:
            for block, digest, is_new in _results_in(operation):
                disk.tell(Kind.IN_DOUBT, block, digest, "insert" if is_new else "delete")
        life.crash(f"during {point.step}", power=True, left=left)

    def _tell(self, batch: list[Operation], steps: dict[str, None]) -> None:
        failed = sum(operation.error is not None for operation in batch)
        self._disk.note(f"writes {'+'.join(steps)}" + (f", {failed} failed" if failed else ""))
        for operation in batch:
            for block, digest, is_new in _results_in(operation):
                if operation.error is None:
                    kind = Kind.COMMITTED if is_new else Kind.FORGOTTEN
                    self._disk.tell(kind, block, digest)
                elif is_new:
                    self._disk.tell(Kind.NOT_COMMITTED, block, digest)


class FaultyConnection:
    """A connection to the database whose commits fail when the disk does."""

    def __init__(self, connection: sqlite3.Connection, disk: Disk) -> None:
        self._connection = connection
        self._disk = disk

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction

    def execute(self, sql: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        if sql == "COMMIT":
            if self._disk.is_full:
                raise _sqlite_error("SQLITE_FULL", "database or disk is full")
            if self._disk.errors > 0:
                self._disk.errors -= 1
                raise _sqlite_error("SQLITE_IOERR", "disk I/O error")
        return self._connection.execute(sql, values)

    def close(self) -> None:
        self._connection.close()


def torn(synced: bytes | None, written: bytes | None, rng: random.Random) -> bytes | None:
    """A file of which ``synced`` was safe while ``written`` was being written over it."""
    if synced == written or written is None:
        return written
    old = synced or b""
    match rng.randrange(4):
        case 0:
            return synced
        case 1:
            # The file ends where it ended before, or anywhere on the way.
            longer = max(0, len(written) - len(old))
            return written[: len(old) + rng.randrange(longer + 1)] if longer else written
        case _:
            share = rng.choice((0.1, 0.5, 0.9))
            data = bytearray(written)
            for at in range(0, len(written), SECTOR):
                if rng.random() >= share:
                    # A sector that never arrived holds what was there, or nothing.
                    before = old[at : at + SECTOR].ljust(SECTOR, b"\0")
                    data[at : at + SECTOR] = before[: len(written) - at]
            return bytes(data)


def digest_of(frame: bytes) -> str:
    """The digest by which the history knows a result's frame."""
    return hashlib.sha256(frame).hexdigest()


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _sqlite_error(name: str, text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = getattr(sqlite3, name)
    error.sqlite_errorname = name
    return error


def _step_of(operation: Operation) -> str:
    sql = operation.statements[0][0]
    if sql == INSERT_RESULT:
        return "commit"
    if sql == DELETE_RESULT:
        return "forget"
    return "begin" if sql.startswith("INSERT") else "ended"


def _results_in(operation: Operation) -> list[tuple[str, str, bool]]:
    """Results that an operation adds or deletes: block, digest, whether it is new."""
    found = []
    for sql, values in operation.statements:
        if sql == INSERT_RESULT:
            assert isinstance(values[1], bytes)
            found.append((str(values[0]), digest_of(values[1]), True))
        elif sql == DELETE_RESULT:
            found.append((str(values[0]), "", False))
    return found
