"""Every exception this package raises on purpose.

    Ai4allError
    ├── ConfigError (ValueError)            a key or value in file, variable or flag
    ├── DataDirectoryError (OSError)        the data directory cannot be used
    │   └── DataDirectoryInUse              another process works in it
    ├── ModelError
    │   ├── ModelNotFound (LookupError)     ── code model_not_found
    │   ├── ModelSourceError (OSError)      a download that failed
    │   ├── ModelChecksumMismatch (ValueError)
    │   └── InvalidModelFile (ValueError)   not a GGUF file we accept
    ├── ComputeError                        a block that could not be computed; has a wire code
    │   ├── BadRequest (ValueError)         bad_request
    │   ├── UnsupportedTask                 unsupported_task
    │   ├── ContextOverflow (ValueError)    context_overflow
    │   ├── OutOfMemory (MemoryError)       out_of_memory
    │   ├── EngineCrashed                   engine_crashed
    │   ├── EngineHung (TimeoutError)       engine_hung
    │   ├── LoadFailed                      load_failed
    │   │   └── DeviceUnavailable           the device asked for, or promised, is not there
    │   ├── Cancelled                       cancelled
    │   ├── Preempted                       preempted
    │   ├── ShuttingDown                    shutting_down
    │   └── DeadlineExceeded (TimeoutError) deadline_exceeded
    ├── EngineError                         misuse of the engine, not a block's failure
    │   ├── EngineClosed
    │   └── EngineBusy                      the bounded queue is full
    ├── EngineUnavailable (ImportError)     the extension is not built, or cannot run here
    ├── ProtocolError
    │   ├── LocalProtocolError              our bug: an illegal call
    │   └── RemoteProtocolError             the peer's fault: a frame that breaks a rule
    ├── LinkError (ConnectionError)
    │   ├── RegistrationFailed              the coordinator refused us
    │   ├── VersionMismatch                 another major version of the protocol
    │   └── MaxReconnectsExceeded
    └── SpoolError (OSError)                results cannot be kept safely

Leaves carry fields; ``__str__`` builds the text. ``ModelNotFound`` is a ``ComputeError`` too.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ai4all.types.task import ErrorCode, ErrorInfo

__all__ = [
    "Ai4allError",
    "BadRequest",
    "COMPUTE_ERRORS",
    "Cancelled",
    "ComputeError",
    "ConfigError",
    "ContextOverflow",
    "DataDirectoryError",
    "DataDirectoryInUse",
    "DeadlineExceeded",
    "DeviceUnavailable",
    "EngineBusy",
    "EngineClosed",
    "EngineCrashed",
    "EngineError",
    "EngineHung",
    "EngineUnavailable",
    "InvalidModelFile",
    "LinkError",
    "LoadFailed",
    "LocalProtocolError",
    "MaxReconnectsExceeded",
    "ModelChecksumMismatch",
    "ModelError",
    "ModelNotFound",
    "ModelSourceError",
    "OutOfMemory",
    "Preempted",
    "ProtocolError",
    "RegistrationFailed",
    "RemoteProtocolError",
    "ShuttingDown",
    "SpoolError",
    "UnsupportedTask",
    "VersionMismatch",
]


class Ai4allError(Exception):
    """Base of every exception this package raises on purpose."""


class ConfigError(Ai4allError, ValueError):
    """A configuration key or value that cannot be used.

    Attributes:
        key: Dotted name, such as ``coordinator.url``; empty when the whole file is unreadable.
        problem: What is wrong and what would be right.
        origin: Where it was set: a file with line, a variable, a flag.
    """

    def __init__(self, key: str, problem: str, origin: str) -> None:
        super().__init__(key, problem, origin)
        self.key = key
        self.problem = problem
        self.origin = origin

    def __str__(self) -> str:
        what = f"{self.key}: {self.problem}" if self.key else self.problem
        return f"{what} (set in {self.origin})" if self.origin else what


class DataDirectoryError(Ai4allError, OSError):
    """The data directory cannot be created, read or written."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"data directory {self.path}: {self.problem}"


class DataDirectoryInUse(DataDirectoryError):
    """Another process works in the data directory.

    Attributes:
        holder: Which one, in words.
    """

    def __init__(self, path: object, holder: str) -> None:
        super().__init__(
            path, f"in use by {holder}; stop it, or name another directory with --data-dir"
        )
        self.holder = holder


# Blocks that could not be computed.


class ComputeError(Ai4allError):
    """A block that could not be computed, with the code that says whose fault it was."""

    code: ClassVar[ErrorCode]
    retryable: ClassVar[bool]

    def __init__(self, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message

    def info(self) -> ErrorInfo:
        """The failure in the shape the wire wants."""
        return ErrorInfo(
            code=self.code, message=self.message, retryable=self.retryable, details=self.details
        )


class BadRequest(ComputeError, ValueError):
    """The input breaks a rule; the same input would break it anywhere."""

    code = ErrorCode.BAD_REQUEST
    retryable = False


class UnsupportedTask(ComputeError):
    """This worker does not offer that task."""

    code = ErrorCode.UNSUPPORTED_TASK
    retryable = True


class ContextOverflow(ComputeError, ValueError):
    """The prompt does not fit into the context."""

    code = ErrorCode.CONTEXT_OVERFLOW
    retryable = False


class OutOfMemory(ComputeError, MemoryError):
    """There is not enough memory here for this model or request."""

    code = ErrorCode.OUT_OF_MEMORY
    retryable = True


class EngineCrashed(ComputeError):
    """The engine died while it worked on the block."""

    code = ErrorCode.ENGINE_CRASHED
    retryable = True


class EngineHung(ComputeError, TimeoutError):
    """The engine stopped making progress."""

    code = ErrorCode.ENGINE_HUNG
    retryable = True


class LoadFailed(ComputeError):
    """The model could not be loaded."""

    code = ErrorCode.LOAD_FAILED
    retryable = True


class DeviceUnavailable(LoadFailed):
    """The device that the owner asked for, or that the coordinator was promised, is not there."""


class Cancelled(ComputeError):
    """The block was cancelled on request."""

    code = ErrorCode.CANCELLED
    retryable = False


class Preempted(ComputeError):
    """The owner needed the machine."""

    code = ErrorCode.PREEMPTED
    retryable = True


class ShuttingDown(ComputeError):
    """The worker is stopping and hands the block back."""

    code = ErrorCode.SHUTTING_DOWN
    retryable = True


class DeadlineExceeded(ComputeError, TimeoutError):
    """The block's deadline passed before it was finished."""

    code = ErrorCode.DEADLINE_EXCEEDED
    retryable = True


# Models.


class ModelError(Ai4allError):
    """A model that cannot be had or used."""


class ModelNotFound(ModelError, ComputeError, LookupError):
    """No model of that name is here."""

    code = ErrorCode.MODEL_NOT_FOUND
    retryable = True

    def __init__(self, model_id: str) -> None:
        ComputeError.__init__(self, f"no model {model_id!r} here", {"model_id": model_id})
        self.model_id = model_id


class ModelSourceError(ModelError, OSError):
    """A model could not be fetched from its source."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(source, problem)
        self.source = source
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.source}: {self.problem}"


class ModelChecksumMismatch(ModelError, ValueError):
    """The bytes are not the ones that were promised."""

    def __init__(self, source: str, expected: str, actual: str) -> None:
        super().__init__(source, expected, actual)
        self.source = source
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return f"{self.source}: sha256 is {self.actual}, expected {self.expected}"


class InvalidModelFile(ModelError, ValueError):
    """The file is not a GGUF model that is safe to load."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


# The engine.


class EngineError(Ai4allError):
    """The engine was used in a way it cannot serve."""


class EngineClosed(EngineError):
    """The engine has been closed."""


class EngineBusy(EngineError):
    """The engine's bounded command queue is full; try again when something has finished."""


class EngineUnavailable(Ai4allError, ImportError):
    """No engine can run here: not built, or not for this machine."""


# The wire and the link.


class ProtocolError(Ai4allError):
    """Abstract: use one of the two below."""


class LocalProtocolError(ProtocolError):
    """An illegal call by our own side; the session is unchanged."""


class RemoteProtocolError(ProtocolError):
    """A frame that breaks a rule of the wire.

    Attributes:
        problem: What is wrong, with the path of the bad field; never the content of the frame.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class LinkError(Ai4allError, ConnectionError):
    """The link to the coordinator failed for good."""


class RegistrationFailed(LinkError):
    """The coordinator answered ``Register`` with an error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"the coordinator refused the registration: {self.code}: {self.message}"


class VersionMismatch(LinkError):
    """The coordinator speaks another major version of the protocol."""

    def __init__(self, theirs: str, ours: str) -> None:
        super().__init__(theirs, ours)
        self.theirs = theirs
        self.ours = ours

    def __str__(self) -> str:
        return (
            f"the coordinator speaks protocol {self.theirs}, this worker {self.ours}; "
            "update the older one"
        )


class MaxReconnectsExceeded(LinkError):
    """``max_reconnect_attempts`` connection attempts failed in a row."""

    def __init__(self, attempts: int, last: str) -> None:
        super().__init__(attempts, last)
        self.attempts = attempts
        self.last = last

    def __str__(self) -> str:
        return f"gave up after {self.attempts} failed connection attempts; the last: {self.last}"


class SpoolError(Ai4allError, OSError):
    """Results cannot be kept safely, so no new work may be taken."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"result spool {self.path}: {self.problem}"


COMPUTE_ERRORS: dict[ErrorCode, type[ComputeError]] = {
    cls.code: cls
    for cls in (
        BadRequest,
        UnsupportedTask,
        ModelNotFound,
        ContextOverflow,
        OutOfMemory,
        EngineCrashed,
        EngineHung,
        LoadFailed,
        Cancelled,
        Preempted,
        ShuttingDown,
        DeadlineExceeded,
    )
}
"""The one exception of each wire code. A test holds that the map is total."""
