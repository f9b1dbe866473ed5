"""The thread that writes to the spool's database.

All that is asked of it while one ``fsync`` runs goes into the next transaction (group commit): the
disk sets the rate of transactions, the callers how many results share one. What is asked in one
turn of the loop comes over together, so that a busy loop fills transactions also of a disk that is
faster than its turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog

from ai4all.delivery.results_file import (
    DELETE_RESULT,
    INSERT_RESULT,
    RESULT_COLUMNS,
    delete_results,
    insert_results,
    problem,
)
from ai4all.errors import SpoolError

__all__ = ["Operation", "SpoolWriter", "Statement", "Transactions", "Writer", "call_on", "settle"]

_log = structlog.get_logger(__name__)

# What is not urgent waits this long for a result to share its transaction with.
_PATIENT_S = 0.05
_MAX_BATCH = 512

# Rows of one statement. SQLite of old takes 999 values.
_MAX_ROWS = 128


Statement = tuple[str, tuple[object, ...]]
"""SQL with its values."""


@dataclass(slots=True, eq=False)
class Operation:
    """Statements that belong together, and what to call on the loop when their fate is known.

    Attributes:
        statements: What to execute, in this order.
        patience: Seconds that it may wait for company.
        loop: Where ``done`` is called.
        done: Called with None or the error; without it, nobody waits for the operation.
        error: What became of it.
    """

    statements: list[Statement]
    patience: float = 0.0
    loop: asyncio.AbstractEventLoop | None = None
    done: Callable[[SpoolError | None], None] | None = None
    error: SpoolError | None = field(default=None, init=False)

    @classmethod
    def note(cls, sql: str, values: tuple[object, ...]) -> Operation:
        """A statement that nobody waits for."""
        return cls([(sql, values)], _PATIENT_S)

    @classmethod
    def awaited(
        cls,
        statements: list[Statement],
        done: Callable[[SpoolError | None], None],
        *,
        urgent: bool,
    ) -> Operation:
        """Statements that this loop waits for; what is not urgent may wait a little for company."""
        loop = asyncio.get_running_loop()
        return cls(statements, 0.0 if urgent else _PATIENT_S, loop, done)


class Transactions:
    """Writes operations to the database, as many in one transaction as come together.

    When that is done, its heirs decide: ``Writer`` on a thread, a simulation on its own time.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection

    def _write(self, batch: list[Operation]) -> None:
        """Commit them together, or each on its own where that fails; each learns its error."""
        try:
            self._transact(batch)
        except sqlite3.Error as exc:
            if len(batch) == 1:
                batch[0].error = self._report(batch[0], exc)
                return
            # One of them may be at fault, or the disk has room for some: each on its own.
            for operation in batch:
                self._write([operation])

    def _transact(self, batch: list[Operation]) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            for sql, values in _together(batch):
                connection.execute(sql, values)
            connection.execute("COMMIT")
        except BaseException:
            # After some errors SQLite has rolled back by itself.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _report(self, operation: Operation, exc: sqlite3.Error) -> SpoolError:
        error = SpoolError(self._path, problem(exc))
        error.__cause__ = exc
        if operation.done is None:
            _log.warning("spool_note_lost", problem=error.problem)
        return error

    def _close(self) -> None:
        """Let go of the database."""
        # Closing plays the log into the database; what fails there is played next time.
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()


def _together(batch: list[Operation]) -> Iterator[tuple[str, Sequence[object]]]:
    """The statements of a batch, with all results that are new in few, and all that go.

    Python's lock changes hands twice for each statement. A block has one operation on its result at
    a time, so their order does not matter; that of the notes does.
    """
    new: list[object] = []
    gone: list[object] = []
    for operation in batch:
        for sql, values in operation.statements:
            if sql == INSERT_RESULT:
                new += values
            elif sql == DELETE_RESULT:
                gone += values
            else:
                yield sql, values
    for start in range(0, len(gone), _MAX_ROWS):
        rows = gone[start : start + _MAX_ROWS]
        yield delete_results(len(rows)), rows
    step = _MAX_ROWS * RESULT_COLUMNS
    for start in range(0, len(new), step):
        rows = new[start : start + step]
        yield insert_results(len(rows) // RESULT_COLUMNS), rows


class _Stop:
    """The last thing in a writer's queue."""

    def __init__(self, stopped: Callable[[], None] | None) -> None:
        self.stopped = stopped


class SpoolWriter(Protocol):
    """What does a spool's operations, one batch after the other."""

    def put(self, operation: Operation) -> None:
        """Do this soon. On the loop's thread."""

    def withdraw(self, operation: Operation) -> bool:
        """Do not do this, if there is still time; returns whether there was."""

    def stop(self, stopped: Callable[[], None] | None) -> None:
        """Do what was asked, close the database, then call ``stopped``, on any thread."""


class Writer(Transactions):
    """The thread that owns the database. Knows nothing of the ``Spool``, so that can be leaked."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        super().__init__(path, connection)
        self._queue: queue.SimpleQueue[list[Operation] | _Stop] = queue.SimpleQueue()
        self._gathered: list[Operation] = []
        # What will hand over what is gathered: at the end of this turn, or when patience ends.
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Daemon: what is committed is safe, and an owner that died must not keep the process.
        threading.Thread(target=self._run, name="ai4all-spool", daemon=True).start()

    def put(self, operation: Operation) -> None:
        """Do this soon. On the loop's thread."""
        self._gathered.append(operation)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._hand_over()  # Between two runs of the loop.
            return
        if loop is not self._loop:
            self._loop, self._soon, self._later = loop, None, None
        # The thread sleeps until something is due: each time that it wakes, the loop waits for it.
        if operation.patience <= 0.0:
            if self._soon is None:
                self._soon = loop.call_soon(self._hand_over)
        elif self._later is None:
            self._later = loop.call_later(operation.patience, self._lose_patience)

    def withdraw(self, operation: Operation) -> bool:
        """Do not do this, if there is still time; returns whether there was."""
        if operation not in self._gathered:
            return False
        self._gathered.remove(operation)
        return True

    def stop(self, stopped: Callable[[], None] | None) -> None:
        """Do what was asked, close the database, then call ``stopped`` on the thread."""
        self._hand_over()
        self._queue.put(_Stop(stopped))

    def _lose_patience(self) -> None:
        self._later = None
        self._hand_over()

    def _hand_over(self) -> None:
        self._soon = None
        if self._gathered:
            self._queue.put(self._gathered)
            self._gathered = []

    def _run(self) -> None:
        while True:
            batch, stop = self._next_batch()
            if batch:
                self._write(batch)
                settle(batch)
            # Nothing of the loop's may be held while the thread sleeps, least of all the spool.
            del batch
            if stop is not None:
                self._close()
                if stop.stopped is not None:
                    stop.stopped()
                return

    def _next_batch(self) -> tuple[list[Operation], _Stop | None]:
        """Wait for work, and take all that is there."""
        batch: list[Operation] = []
        item = self._queue.get()
        while True:
            if isinstance(item, _Stop):
                return batch, item
            batch += item
            if len(batch) >= _MAX_BATCH or self._queue.empty():
                return batch, None
            item = self._queue.get()


def settle(batch: list[Operation]) -> None:
    """Tell the loop what became of a batch: one wake-up for all of it."""
    loops = {operation.loop for operation in batch if operation.loop is not None}
    for loop in loops:
        mine = [operation for operation in batch if operation.loop is loop]

        def tell(mine: list[Operation] = mine) -> None:
            for operation in mine:
                if operation.done is not None:
                    operation.done(operation.error)

        call_on(loop, tell)


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Call on the loop's thread. One that is closed has nobody left who waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
