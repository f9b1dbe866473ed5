"""What an observer of a worker sees: a screen, a demonstration, a test."""

from __future__ import annotations

from dataclasses import dataclass

from ai4all.types.task import TaskResult

__all__ = [
    "BlockAcknowledged",
    "BlockFinished",
    "BlockStarted",
    "BlockText",
    "Degraded",
    "LinkDown",
    "LinkUp",
    "WorkerEvent",
]


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The worker is registered."""

    session_id: str


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection is gone; the worker goes on and connects again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Degraded:
    """The worker is not what it was promised to be, and for another reason than before.

    ``refusing`` says that it takes no work meanwhile.
    """

    reason: str
    refusing: bool


@dataclass(frozen=True, slots=True)
class BlockStarted:
    """A block was taken."""

    block_id: str
    task_type: str
    model_id: str


@dataclass(frozen=True, slots=True)
class BlockText:
    """Text of a block that became certain."""

    block_id: str
    text: str


@dataclass(frozen=True, slots=True)
class BlockFinished:
    """A block has its result, good or bad."""

    block_id: str
    result: TaskResult


@dataclass(frozen=True, slots=True)
class BlockAcknowledged:
    """The coordinator has the result."""

    block_id: str
    accepted: bool
    error: str | None


WorkerEvent = (
    LinkUp | LinkDown | Degraded | BlockStarted | BlockText | BlockFinished | BlockAcknowledged
)
"""What an observer sees. ``BlockText`` and ``BlockFinished`` hold people's text: never log them."""
