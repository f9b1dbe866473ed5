"""One worker's connection as a coordinator sees it, and what may be said on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from websockets.asyncio.server import ServerConnection

from ai4all.errors import RemoteProtocolError
from ai4all.protocol.codec import ForeignVersion, Limits, UnknownMessage, decode_client_message
from ai4all.protocol.messages import (
    EXTENSIONS,
    ClientMessage,
    Heartbeat,
    Register,
    RequestWork,
    SubmitResult,
    WorkerCapabilities,
    WorkerStatus,
)

__all__ = ["Violation", "WorkerLink", "read_frame"]

_SEED_TYPES: Final = (Register, Heartbeat, RequestWork, SubmitResult)


@dataclass(slots=True, eq=False)
class WorkerLink:
    """One registered connection.

    Attributes:
        worker_id: Who it is.
        session_id: Which connection of his.
        capabilities: What he said that he can do.
        benchmark_score: What he said that he scored.
        extensions: What both sides speak.
        last_heard: When the last valid frame came, by the monotonic clock.
        status: What the last heartbeat said.
        heartbeats: How many came.
    """

    socket: ServerConnection = field(repr=False)
    worker_id: str
    session_id: str
    capabilities: WorkerCapabilities
    benchmark_score: float | None
    extensions: frozenset[str]
    last_heard: float
    status: WorkerStatus | None = None
    heartbeats: int = 0
    replaced: bool = False


class Violation(Exception):
    """A frame that is not allowed: the code and the text of the ``Error`` that answers it."""

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(code, problem)
        self.code = code
        self.problem = problem


def read_frame(
    frame: str | bytes, link: WorkerLink | None, limits: Limits, *, strict_seed: bool
) -> ClientMessage:
    """Read what came on a connection.

    Args:
        frame: The frame.
        link: The registered connection; None before ``Register``.
        limits: What a frame may be before it is parsed.
        strict_seed: Only the first protocol's types are known.

    Raises:
        Violation: It cannot be read, or may not be said here.
    """
    if isinstance(frame, bytes):
        raise Violation("bad_frame", "a binary message")
    try:
        message = decode_client_message(frame, limits)
    except RemoteProtocolError as exc:
        raise Violation("bad_frame", exc.problem) from None
    if isinstance(message, ForeignVersion):
        raise Violation("version_mismatch", f"protocol {message.theirs}")
    if isinstance(message, UnknownMessage) or (
        strict_seed and not isinstance(message, _SEED_TYPES)
    ):
        raise Violation("bad_frame", f"unknown type {message.type!r}")
    if isinstance(message, Register) != (link is None):
        code = "not_registered" if link is None else "bad_frame"
        raise Violation(code, f"{message.type} {'before' if link is None else 'after'} Register")
    if link is not None:
        _check_speaker(message, link)
    return message


def _check_speaker(message: ClientMessage, link: WorkerLink) -> None:
    if message.worker_id != link.worker_id:
        raise Violation("bad_frame", f"{message.type} in another worker's name")
    extension = message.type.lower()
    if extension in EXTENSIONS and extension not in link.extensions:
        raise Violation("bad_frame", f"{message.type} without its extension")
