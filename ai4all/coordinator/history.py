"""What happened at a coordinator, one event at a time."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "EventKind"]


class EventKind(enum.StrEnum):
    """Kinds of events. Those about a block come from the ledger, the others from the server."""

    # A block's life. It ends exactly once: with DELIVERED or with FAILED.
    ASSIGNED = "assigned"
    """Given to a worker."""
    KEPT = "kept"
    """Given back to the worker that came back and still had it."""
    REQUEUED = "requeued"
    """Taken from a worker, or handed back; ``detail`` says why."""
    DELIVERED = "delivered"
    """Its result was accepted."""
    FAILED = "failed"
    """It will not be computed; ``detail`` says why."""
    REPEATED = "repeated"
    """A result came again, and was answered as the first time."""
    REFUSED = "refused"
    """A result was not accepted; ``detail`` says why."""
    WITHDRAWN = "withdrawn"
    """A worker holds it and need not."""

    # A worker's life.
    REGISTERED = "registered"
    HEARTBEAT = "heartbeat"
    PROGRESS = "progress"
    NO_WORK = "no_work"
    GOODBYE = "goodbye"
    DISCONNECTED = "disconnected"
    VIOLATION = "violation"
    """A frame that the protocol does not allow; ``detail`` says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: What.
        at: When, in seconds of the monotonic clock.
        worker_id: The worker concerned; None when there is none.
        block_id: The block concerned; None when there is none.
        detail: For people.
        data: More, by kind: ``message`` is the frame of a heartbeat or a progress, ``outcome``
            what a block ended with.
    """

    kind: EventKind
    at: float
    worker_id: str | None = None
    block_id: str | None = None
    detail: str = ""
    data: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
