"""What happened to blocks and results, as the coordinator and the disks saw it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

LEFT_RUNNING: Final = "left running"
"""The ``detail`` of a result that hands back what an earlier process left running."""


class Kind(enum.StrEnum):
    """Kinds of records."""

    # The coordinator's.
    ADDED = "added"
    """A block to be computed."""
    GIVEN = "given"
    """A block was assigned to a worker; once for each time that this was said."""
    KEPT = "kept"
    """A block was left to a worker that came back with it."""
    SUBMITTED = "submitted"
    """A result came and was judged; ``detail`` is the error's code, ``digest`` of its bytes."""
    DECLINED = "declined"
    """A worker handed a block back that it had not begun."""
    ABANDONED = "abandoned"
    """A worker said goodbye and left the block."""
    REQUEUED = "requeued"
    """A lease ended without a result; ``detail`` says why."""
    DELIVERED = "delivered"
    """A result was accepted, and the block is over."""
    FAILED = "failed"
    """The block was given up, and is over; ``detail`` says why."""
    FORGOT = "forgot"
    """The coordinator lost its memory of leases."""
    VIOLATION = "violation"
    """A worker said what the protocol does not allow."""

    # The worker's disk.
    OPENED = "opened"
    """A spool was opened; one record for each result in it follows, as ``FOUND``."""
    FOUND = "found"
    COMMITTED = "committed"
    NOT_COMMITTED = "not committed"
    """The disk refused a result."""
    FORGOTTEN = "forgotten"
    """A result was deleted."""
    IN_DOUBT = "in doubt"
    """The power went while a result was written or deleted; ``detail`` says which of the two."""

    # The worker's mouth and ear.

    SENT = "sent"
    """A result went out; ``detail`` is the error's code, ``digest`` of its bytes."""
    ACKNOWLEDGED = "acknowledged"
    """A ``ResultAck`` reached the worker's process."""


@dataclass(frozen=True, slots=True)
class Record:
    """One of them.

    Attributes:
        at: When, in the world's time.
        kind: What.
        worker: Who is concerned.
        block: Which block.
        digest: Of a result's bytes.
        detail: By kind.
    """

    at: float
    kind: Kind
    worker: str = ""
    block: str = ""
    digest: str = ""
    detail: str = ""

    def __str__(self) -> str:
        parts = (self.worker, self.block, self.digest[:8], self.detail)
        return " ".join([f"{self.at:.3f}", self.kind, *filter(None, parts)])
