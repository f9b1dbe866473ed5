"""What a session tells its owner. Plain facts; what to do about them is the worker's business."""

from __future__ import annotations

from dataclasses import dataclass

from ai4all.errors import ComputeError
from ai4all.protocol.messages import Assignment

__all__ = [
    "AssignmentUnfit",
    "BadFrame",
    "BlockCancelled",
    "CloseLink",
    "CoordinatorError",
    "Drained",
    "DuplicateAssignment",
    "HeartbeatDue",
    "RegistrationRefused",
    "ResultAcknowledged",
    "SessionEnded",
    "SessionEvent",
    "SessionStarted",
    "UnknownFrame",
    "VersionRefused",
    "WorkAssigned",
    "WorkDue",
]


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """``Registered`` came. ``heartbeat_interval`` is in seconds, as it will be kept."""

    session_id: str
    extensions: frozenset[str]
    heartbeat_interval: float


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """The connection is gone. Blocks run on; ``code`` is None when no close frame came."""

    code: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class RegistrationRefused:
    """The coordinator answered ``Register`` with an error."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class VersionRefused:
    """The coordinator speaks another major version."""

    theirs: str
    ours: str


@dataclass(frozen=True, slots=True)
class CloseLink:
    """The shell is to close the connection with this code and reason."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkAssigned:
    """A block to compute. It counts as active until its result or refusal is sent."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class AssignmentUnfit:
    """A block that cannot even be read, to be answered with ``error``. It counts as active."""

    block_id: str
    error: ComputeError


@dataclass(frozen=True, slots=True)
class DuplicateAssignment:
    """A block that runs already, or whose result waits for its acknowledgement.

    Attributes:
        block_id: The block.
        resent: Whether its result was at hand and was sent again.
    """

    block_id: str
    resent: bool


@dataclass(frozen=True, slots=True)
class WorkDue:
    """Work may be asked for again: the wait is over, or an answer never came."""


@dataclass(frozen=True, slots=True)
class HeartbeatDue:
    """A heartbeat should go out now; only the worker knows its status."""


@dataclass(frozen=True, slots=True)
class ResultAcknowledged:
    """The coordinator has the result; the spool may forget it."""

    block_id: str
    accepted: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class CoordinatorError:
    """A complaint in a running session."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class BlockCancelled:
    """The result of a block that runs here is no longer wanted."""

    block_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drained:
    """The coordinator wants no more requests for work on this connection."""

    reason: str


@dataclass(frozen=True, slots=True)
class UnknownFrame:
    """A type that this side does not know; reported once for each."""

    type: str


@dataclass(frozen=True, slots=True)
class BadFrame:
    """A frame that breaks a rule. It changed nothing."""

    problem: str


SessionEvent = (
    SessionStarted
    | SessionEnded
    | RegistrationRefused
    | VersionRefused
    | CloseLink
    | WorkAssigned
    | AssignmentUnfit
    | DuplicateAssignment
    | WorkDue
    | HeartbeatDue
    | ResultAcknowledged
    | CoordinatorError
    | BlockCancelled
    | Drained
    | UnknownFrame
    | BadFrame
)
