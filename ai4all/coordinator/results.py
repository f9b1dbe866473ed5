"""What came of the tasks, as JSON Lines: one object a block, written as it ends.

Beside the results lies a journal of who was given what, until the work is done: a coordinator
that is started again on the same files goes on where it was, and takes the results of blocks that
were under way.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TextIO

import structlog
import ujson
from pydantic import ValidationError

from ai4all.coordinator.ledger import Outcome
from ai4all.types.task import TaskResult

__all__ = ["ResultsFile", "digest_of", "record_of"]

_log = structlog.get_logger(__name__)


def record_of(outcome: Outcome) -> dict[str, object]:
    """The line of an outcome: ``block_id``, ``accepted``, ``worker_id`` and ``result``."""
    return {
        "block_id": outcome.block_id,
        "accepted": outcome.accepted,
        "worker_id": outcome.worker_id,
        "result": outcome.result.model_dump(mode="json"),
    }


def digest_of(result: TaskResult) -> str:
    """Equal results have equal digests."""
    return hashlib.sha256(_dump(result.model_dump(mode="json")).encode()).hexdigest()


def _dump(value: object) -> str:
    return ujson.dumps(value, ensure_ascii=False, escape_forward_slashes=False)


class ResultsFile:
    """A results file and its journal, open for writing.

    Args:
        path: The results; added to if they are there.

    Attributes:
        outcomes: How blocks ended in earlier runs.
        given: Blocks with the workers they were given to in earlier runs, oldest first.

    Raises:
        OSError: A file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal_path = path.with_name(path.name + ".assigned")
        self.outcomes = [o for line in _lines(path) if (o := _read_outcome(line, path)) is not None]
        self.given = [
            pair for line in _lines(self._journal_path) if (pair := _read_pair(line)) is not None
        ]
        self._results = _open(path)
        try:
            self._journal = _open(self._journal_path)
        except BaseException:
            self._results.close()
            raise

    def assigned(self, block_id: str, worker_id: str) -> None:
        """Note that a worker is about to be given a block."""
        _write(self._journal, [block_id, worker_id])

    def ended(self, outcome: Outcome) -> None:
        """Write how a block ended.

        Raises:
            OSError: It could not be written.
        """
        _write(self._results, record_of(outcome))

    def close(self, *, finished: bool) -> None:
        """Close; the journal goes when there is nothing left to be done."""
        self._results.close()
        self._journal.close()
        if finished:
            self._journal_path.unlink(missing_ok=True)


def _open(path: Path) -> TextIO:
    file = path.open("a+b")
    try:
        # A crash may have cut the last line short; what follows must not be glued to it.
        end = file.seek(0, 2)
        if end > 0:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
    finally:
        file.close()
    return path.open("a", encoding="utf-8")


def _write(file: TextIO, value: object) -> None:
    file.write(_dump(value) + "\n")
    file.flush()


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.split("\n") if line.strip()]


def _read_outcome(line: str, path: Path) -> Outcome | None:
    try:
        record = ujson.loads(line)
        return Outcome(
            block_id=str(record["block_id"]),
            accepted=bool(record["accepted"]),
            worker_id=record["worker_id"],
            result=TaskResult.model_validate(record["result"], strict=False),
        )
    except (ValueError, KeyError, TypeError, ValidationError):
        _log.warning("results_line_unreadable", path=str(path))
        return None


def _read_pair(line: str) -> tuple[str, str] | None:
    try:
        block_id, worker_id = ujson.loads(line)
    except (ValueError, TypeError):
        return None
    return str(block_id), str(worker_id)
