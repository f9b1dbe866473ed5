"""The messages of the wire, in both directions, as ``docs/wire.md`` describes them.

A field that the network's first protocol names is always written, as ``null`` when it is empty;
a field that came later is left out when it is None, so that a peer that knows only the first
protocol reads frames it expects.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
)

from ai4all.types.task import ErrorInfo, Late, TaskResult, TaskType

__all__ = [
    "Assignment",
    "Cancel",
    "ClientMessage",
    "Decline",
    "DeviceSummary",
    "Drain",
    "EXTENSIONS",
    "Error",
    "ErrorDetail",
    "ErrorStatus",
    "Goodbye",
    "GpuUsage",
    "Heartbeat",
    "Message",
    "ModelSummary",
    "NoWork",
    "PROTOCOL_VERSION",
    "Progress",
    "ProtocolVersion",
    "Reconcile",
    "Register",
    "Registered",
    "RequestWork",
    "ResourceUsage",
    "ResultAck",
    "ServerMessage",
    "SubmitResult",
    "WireModel",
    "WorkerCapabilities",
    "WorkerStatus",
    "WorkingDetail",
    "WorkingStatus",
    "envelope",
    "format_timestamp",
    "parse_timestamp",
    "working",
]

EXTENSIONS: Final = ("cancel", "progress", "reconcile", "decline", "goodbye", "drain")
"""Names that ``Register`` may list; only those that ``Registered`` lists back are used."""

_RFC3339 = re.compile(
    r"(?P<year>[0-9]{4}|\+[0-9]{5,6})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})"
    r"[Tt ](?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
    r"(?:\.(?P<fraction>[0-9]+))?"
    r"(?:[Zz]|(?P<sign>[+-])(?P<offset_hours>[0-9]{2}):(?P<offset_minutes>[0-9]{2}))"
)

# As nearly everyone writes it: nothing here needs a closer look.
_USUAL = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?Z"
)


def parse_timestamp(text: str) -> datetime:
    """Read an RFC 3339 instant with any count of fraction digits.

    Digits beyond the microsecond are cut, never rounded up, so that a deadline read here is never
    later than the one that was meant. A leap second is read as the last microsecond before it,
    and a year that a ``datetime`` cannot hold (chrono writes ``+262142-…`` for its maximum) as
    the end of time.

    Returns:
        An aware ``datetime`` in UTC.

    Raises:
        ValueError: ``text`` is not such an instant.
    """
    if _USUAL.fullmatch(text) is not None:
        try:
            # The same, five times as fast; it cuts digits too.
            return datetime.fromisoformat(text)
        except ValueError:
            raise ValueError("no such day or time") from None
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError("not an RFC 3339 timestamp with an offset")
    year = int(match["year"])
    if year > datetime.max.year:
        return datetime.max.replace(tzinfo=UTC)
    second = int(match["second"])
    microsecond = int((match["fraction"] or "0")[:6].ljust(6, "0"))
    if second == 60:
        second, microsecond = 59, 999_999
    offset = timedelta()
    if match["sign"]:
        hours, minutes = int(match["offset_hours"]), int(match["offset_minutes"])
        if hours > 23 or minutes > 59:
            raise ValueError("the offset of the timestamp is out of range")
        offset = timedelta(hours=hours, minutes=minutes)
        if match["sign"] == "-":
            offset = -offset
    try:
        return datetime(
            year,
            int(match["month"]),
            int(match["day"]),
            int(match["hour"]),
            int(match["minute"]),
            second,
            microsecond,
            tzinfo=timezone(offset),
        ).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("no such day or time") from None


def format_timestamp(instant: datetime) -> str:
    """Write an aware ``datetime`` as RFC 3339 in UTC with six fraction digits and ``Z``."""
    # isoformat would drop the fraction of a whole second, strftime the zeros of an early year.
    in_utc = instant if instant.tzinfo is UTC else instant.astimezone(UTC)
    return in_utc.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _timestamp_from_wire(value: object) -> object:
    return parse_timestamp(value) if isinstance(value, str) else value


_TASK_TYPES: Final = {kind.value: kind for kind in TaskType}


def _task_type_from_wire(value: object) -> object:
    # Strict validation wants the enum itself; the wire has its name.
    return _TASK_TYPES.get(value, value) if isinstance(value, str) else value


Timestamp = Annotated[
    datetime,
    BeforeValidator(_timestamp_from_wire),
    PlainSerializer(format_timestamp, return_type=str, when_used="json"),
]
_TaskType = Annotated[TaskType, BeforeValidator(_task_type_from_wire)]
_U64 = Annotated[int, Field(ge=0, le=18_446_744_073_709_551_615)]
_Identifier = Annotated[str, Field(min_length=1, max_length=1024)]


class WireModel(BaseModel):
    """Base of everything here: immutable, strict, blind to unknown fields."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", allow_inf_nan=False, defer_build=True
    )


class ProtocolVersion(WireModel):
    """Version of the protocol. Another ``major`` cannot be talked to; a higher ``minor`` can."""

    major: _U64
    minor: _U64
    patch: _U64

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


PROTOCOL_VERSION: Final = ProtocolVersion(major=1, minor=0, patch=0)


_OUR_VERSION = PROTOCOL_VERSION.model_dump_json()


def envelope(frame_id: str | UUID, written_at: datetime) -> str:
    """What every frame we send carries besides its message: JSON without the braces.

    Args:
        frame_id: A UUID 4, unique to the frame.
        written_at: When that was.
    """
    written = format_timestamp(written_at)
    return f'"id":"{frame_id}","timestamp":"{written}","version":{_OUR_VERSION}'


class Message(WireModel):
    """Base of all messages: the envelope's fields, each optional on receipt."""

    id: str | None = None
    timestamp: Timestamp | None = None
    version: ProtocolVersion | None = None


# What the worker says about itself.


class ModelSummary(WireModel):
    """A model that the worker has on disk."""

    model_id: _Identifier
    sha256: str
    size_bytes: _U64


class DeviceSummary(WireModel):
    """A device of the worker.

    Attributes:
        name: The engine's name for it.
        kind: "cpu", "gpu", "igpu" or "accel".
        memory_mb: Its memory, in MiB.
        memory_free_mb: What of it was free when it was last looked at.
        driver: Name and version of its driver.
        unused: Why it does not compute; None for one that does.
    """

    name: str
    kind: str
    memory_mb: _U64
    memory_free_mb: Late[_U64] = None
    driver: Late[str] = None
    unused: Late[str] = None


class GpuUsage(WireModel):
    """What one GPU in use does now, whoever uses it.

    ``percent`` is the share of time that it is busy, 0 to 100; memory is in MiB.
    """

    name: str
    percent: Late[float] = None
    memory_used_mb: Late[_U64] = None
    memory_mb: Late[_U64] = None
    temperature_c: Late[float] = None
    power_w: Late[float] = None


class WorkerCapabilities(WireModel):
    """What the worker can do.

    Attributes:
        backend: "cpu", "cuda", "rocm", "vulkan" or "metal".
        supported_tasks: What is truly offered, nothing more.
        supports_training: Always False for this worker.
        vram_mb: Memory of the device in use, in MiB; None on a CPU.
        memory_mb: Memory of the machine, in MiB.
        compute_score: The benchmark's composite score, 0 when there is none.
        max_concurrent_tasks: Blocks that the worker takes at once.
        max_context_length: Longest context of one sequence, in tokens.
        models: What is on disk and ready to load.
        devices: What can compute, what does so first.
        worker_version: Version of this package.
        engine_build: One line that names the engine's commit, backend and CPU features.
    """

    backend: str
    supported_tasks: list[_TaskType]
    supports_training: bool
    vram_mb: _U64 | None = None
    memory_mb: _U64
    compute_score: float
    max_concurrent_tasks: Late[Annotated[int, Field(ge=1, le=1024)]] = None
    max_context_length: Late[_U64] = None
    models: Late[list[ModelSummary]] = None
    devices: Late[list[DeviceSummary]] = None
    worker_version: Late[str] = None
    engine_build: Late[str] = None


class ResourceUsage(WireModel):
    """What the worker's process and devices use now.

    ``cpu_percent`` and ``gpu_percent`` are shares of the whole machine, 0 to 100; memory is in
    MiB. ``gpus`` has the figures of each GPU in use.
    """

    cpu_percent: float
    memory_mb: _U64
    gpu_percent: float | None = None
    gpu_memory_mb: _U64 | None = None
    active_threads: _U64
    gpus: Late[list[GpuUsage]] = None


class WorkingDetail(WireModel):
    """The block at work, and the share of it that is done, 0 to 1."""

    block_id: _Identifier
    progress: float = Field(ge=0.0, le=1.0)


class WorkingStatus(WireModel):
    """``{"Working": {...}}``: serde tags this enum externally."""

    Working: WorkingDetail


class ErrorDetail(WireModel):
    """Why the worker cannot work."""

    message: str


class ErrorStatus(WireModel):
    """``{"Error": {...}}``."""

    Error: ErrorDetail


WorkerStatus = Literal["Idle", "Benchmarking"] | WorkingStatus | ErrorStatus
"""``"Idle"``, ``"Benchmarking"``, or an object with the variant's name as its one key."""


def working(block_id: str, progress: float) -> WorkingStatus:
    """The status of a worker that computes ``block_id``; ``progress`` is held in 0..1."""
    return WorkingStatus(
        Working=WorkingDetail(block_id=block_id, progress=min(1.0, max(0.0, progress)))
    )


# Worker to coordinator.


class Register(Message):
    """The first message on every connection.

    ``degraded`` says why the worker is not what it was promised to be; without a reason, it is.
    """

    type: Literal["Register"] = "Register"
    worker_id: _Identifier
    capabilities: WorkerCapabilities
    benchmark_score: float | None = None
    extensions: Late[list[str]] = None
    degraded: Late[str] = None


class Heartbeat(Message):
    """A sign of life, sent on time whatever the engine does.

    ``status`` names one block, as the first protocol can; ``active_blocks`` lists them all.
    ``degraded`` is as in ``Register``.
    """

    type: Literal["Heartbeat"] = "Heartbeat"
    worker_id: _Identifier
    status: WorkerStatus
    resource_usage: ResourceUsage
    active_blocks: Late[list[_Identifier]] = None
    degraded: Late[str] = None


class RequestWork(Message):
    """A request for one block."""

    type: Literal["RequestWork"] = "RequestWork"
    worker_id: _Identifier


class SubmitResult(Message):
    """What became of a block. ``block_id`` is the key by which a coordinator drops repeats."""

    type: Literal["SubmitResult"] = "SubmitResult"
    worker_id: _Identifier
    block_id: _Identifier
    result: TaskResult


class Decline(Message):
    """Extension ``decline``: a block that was not begun, and why."""

    type: Literal["Decline"] = "Decline"
    worker_id: _Identifier
    block_id: _Identifier
    error: ErrorInfo


class Goodbye(Message):
    """Extension ``goodbye``: the worker leaves on purpose; ``abandoned`` blocks may be requeued."""

    type: Literal["Goodbye"] = "Goodbye"
    worker_id: _Identifier
    reason: str
    abandoned: list[_Identifier]


class Progress(Message):
    """Extension ``progress``: text that became certain since the message before.

    ``sequence`` counts up from 0 within a block; ``completion_tokens`` counts all so far.
    """

    type: Literal["Progress"] = "Progress"
    worker_id: _Identifier
    block_id: _Identifier
    sequence: _U64
    text: str
    completion_tokens: _U64


class Reconcile(Message):
    """Extension ``reconcile``: after a reconnect, what the worker still holds."""

    type: Literal["Reconcile"] = "Reconcile"
    worker_id: _Identifier
    running: list[_Identifier]
    unacknowledged: list[_Identifier]


# Coordinator to worker.


class Registered(Message):
    """The answer to ``Register``: the session may begin."""

    type: Literal["Registered"] = "Registered"
    session_id: str
    heartbeat_interval_ms: _U64
    extensions: Late[list[str]] = None


class Assignment(Message):
    """A block to compute. ``input`` is checked against its task's model by who computes it."""

    type: Literal["Assignment"] = "Assignment"
    block_id: _Identifier
    task_type: _TaskType
    input: dict[str, Any]
    deadline: Timestamp
    model_id: str = Field(max_length=1024)


class NoWork(Message):
    """There is nothing to do; ask again after ``retry_after_ms``."""

    type: Literal["NoWork"] = "NoWork"
    retry_after_ms: _U64


class ResultAck(Message):
    """The coordinator has the result of a block; the worker need not keep it."""

    type: Literal["ResultAck"] = "ResultAck"
    block_id: _Identifier
    accepted: bool
    error: str | None = None


class Error(Message):
    """A complaint. In answer to ``Register`` it is a refusal."""

    type: Literal["Error"] = "Error"
    code: str
    message: str


class Cancel(Message):
    """Extension ``cancel``: the result of a block is no longer wanted."""

    type: Literal["Cancel"] = "Cancel"
    block_id: _Identifier
    reason: str | None = None


class Drain(Message):
    """Extension ``drain``: finish what runs, ask for nothing more."""

    type: Literal["Drain"] = "Drain"
    reason: str | None = None


ClientMessage = Annotated[
    Register | Heartbeat | RequestWork | SubmitResult | Decline | Goodbye | Progress | Reconcile,
    Field(discriminator="type"),
]
"""Everything that a worker says."""

ServerMessage = Annotated[
    Registered | Assignment | NoWork | ResultAck | Error | Cancel | Drain,
    Field(discriminator="type"),
]
"""Everything that a coordinator says."""
