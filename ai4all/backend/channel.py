"""Frames between a worker and its engine process: what both ends agree on.

A frame is a four-byte length and a JSON list. The worker sends one command a frame; the engine
process sends all that it has to say at one moment in one frame, so that a drain of many events
costs one wake-up. What comes from the engine process is checked like anything else from outside:
a model file may have taken it over.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import struct
from collections.abc import Callable
from typing import Any, Final, cast

import ujson
from pydantic import TypeAdapter

from ai4all.backend.base import (
    Capabilities,
    Completion,
    Embeddings,
    EmbedRequest,
    EngineOptions,
    GenerateRequest,
    LabelScores,
    LoadedModel,
    PromptProgress,
    ScoreRequest,
    Timings,
    TokenEvent,
)
from ai4all.backend.completions import Failed, Finished
from ai4all.errors import (
    COMPUTE_ERRORS,
    Ai4allError,
    ComputeError,
    DeviceUnavailable,
    EngineBusy,
    EngineClosed,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    ModelNotFound,
)
from ai4all.types.model import DeviceInfo, ModelFile
from ai4all.types.task import Fingerprint

__all__ = [
    "CAPABILITIES",
    "COMPLETION",
    "Channel",
    "DEVICES",
    "EMBED_REQUEST",
    "ENGINE_OPTIONS",
    "FAILED",
    "FINISHED",
    "GENERATE_REQUEST",
    "LABEL_SCORES",
    "LOADED_MODEL",
    "MODEL_FILE",
    "PROMPT_PROGRESS",
    "SCORE_REQUEST",
    "TOKEN_EVENT",
    "embeddings_from_wire",
    "embeddings_to_wire",
    "error_from_wire",
    "error_to_wire",
    "shallow_dict",
]

MAX_FRAME_BYTES: Final = 64 << 20

_LENGTH = struct.Struct("!I")

# What needs no look.
_PLAIN: Final = frozenset({bool, int, float, type(None)})

CAPABILITIES = TypeAdapter(Capabilities)
COMPLETION = TypeAdapter(Completion)
DEVICES = TypeAdapter(tuple[DeviceInfo, ...])
EMBED_REQUEST = TypeAdapter(EmbedRequest)
ENGINE_OPTIONS = TypeAdapter(EngineOptions)
FAILED = TypeAdapter(Failed)
FINISHED = TypeAdapter(Finished)
GENERATE_REQUEST = TypeAdapter(GenerateRequest)
LABEL_SCORES = TypeAdapter(LabelScores)
LOADED_MODEL = TypeAdapter(LoadedModel)
MODEL_FILE = TypeAdapter(ModelFile)
PROMPT_PROGRESS = TypeAdapter(PromptProgress)
SCORE_REQUEST = TypeAdapter(ScoreRequest)
TOKEN_EVENT = TypeAdapter(TokenEvent)
_FINGERPRINT = TypeAdapter(Fingerprint)
_TIMINGS = TypeAdapter(Timings)

# ``ModelNotFound`` is the store's, not the engine's, and takes other arguments.
_ERRORS: Final[dict[str, type[Ai4allError]]] = {
    kind.__name__: kind
    for kind in (
        *(kind for kind in COMPUTE_ERRORS.values() if kind is not ModelNotFound),
        DeviceUnavailable,
        EngineBusy,
        EngineClosed,
        EngineError,
        EngineUnavailable,
    )
}


class Channel(asyncio.Protocol):
    """One end of the socket pair. Belongs to one event loop.

    Args:
        on_frame: Called with each frame's content.
        on_lost: Called once, when nothing more will come, with what broke the rules or None.
    """

    def __init__(
        self, on_frame: Callable[[Any], None], on_lost: Callable[[str | None], None]
    ) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._problem: str | None = None

    async def open(self, sock: socket.socket) -> None:
        """Take over one end of a socket pair."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=sock)

    def send(self, content: list[Any], served: int = 0) -> None:
        """Send a frame. On a channel that is lost, does nothing.

        Args:
            content: What is in it.
            served: So many loads and unloads are answered by it, which concerns channels that
                serve generations by themselves.
        """
        if self._transport is not None and not self._transport.is_closing():
            payload = ujson.dumps(content, escape_forward_slashes=False).encode("ascii")
            self._transport.write(_LENGTH.pack(len(payload)) + payload)

    def served(self) -> None:
        """Tell that a load or an unload has been served without an answer; likewise."""

    def close(self) -> None:
        """Send what is left, and close."""
        if self._transport is not None:
            self._transport.close()

    def break_off(self, problem: str) -> None:
        """Close at once, because the other end broke a rule."""
        self._problem = self._problem or problem
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way out."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Hand on every whole frame."""
        self._received += data
        while self._problem is None and len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > MAX_FRAME_BYTES:
                self.break_off(f"a frame of {length} bytes")
                return
            end = _LENGTH.size + length
            if len(self._received) < end:
                return
            payload = bytes(self._received[_LENGTH.size : end])
            del self._received[:end]
            try:
                content = ujson.loads(payload)
            except ValueError:
                self.break_off("a frame that is not JSON")
                return
            self._on_frame(content)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that nothing more will come."""
        self._on_lost(self._problem)


def shallow_dict(value: Any) -> dict[str, Any]:
    """The fields of a flat dataclass by name, its texts as UTF-8 can carry them."""
    fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
    for name, field in fields.items():
        if type(field) not in _PLAIN:
            fields[name] = _as_utf8(field)
    return fields


def _as_utf8(value: Any) -> Any:
    # Half of a surrogate pair becomes what the engine would have made of it.
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, tuple):
        return [_as_utf8(item) for item in value]
    if isinstance(value, ModelFile):
        return {**shallow_dict(value), "path": str(value.path)}
    return value


def embeddings_to_wire(embeddings: Embeddings) -> dict[str, Any]:
    """Embeddings as ``embeddings_from_wire`` reads them."""
    import numpy as np  # Only who embeds pays for it.

    vectors = np.ascontiguousarray(embeddings.vectors, dtype=np.float32)
    return {
        "shape": list(vectors.shape),
        "vectors": base64.b64encode(vectors.data).decode("ascii"),
        "prompt_tokens": embeddings.prompt_tokens,
        "timings": _TIMINGS.dump_python(embeddings.timings, mode="json"),
        "fingerprint": _FINGERPRINT.dump_python(embeddings.fingerprint, mode="json"),
    }


def embeddings_from_wire(fields: dict[str, Any]) -> Embeddings:
    """Embeddings out of another process of this machine: floats in its own byte order.

    Raises:
        LookupError: A field is missing.
        ValueError: One is not what it should be.
    """
    import numpy as np

    floats = np.frombuffer(base64.b64decode(fields["vectors"]), dtype=np.float32)
    rows, columns = fields["shape"]
    return Embeddings(
        vectors=floats.reshape(int(rows), int(columns)),
        prompt_tokens=int(fields["prompt_tokens"]),
        timings=_TIMINGS.validate_python(fields["timings"]),
        fingerprint=_FINGERPRINT.validate_python(fields["fingerprint"]),
    )


def error_to_wire(error: Exception) -> list[Any]:
    """An error as ``error_from_wire`` reads it.

    What nobody foresaw crosses by its name alone: its text may hold a prompt.
    """
    kind = type(error).__name__
    if kind not in _ERRORS:
        return [EngineCrashed.__name__, f"an unexpected {kind} in the engine process", None]
    details = error.details if isinstance(error, ComputeError) else None
    return [kind, str(error), details]


def error_from_wire(kind: str, message: str, details: dict[str, Any] | None) -> Ai4allError:
    """The error that the engine process raised.

    Raises:
        LookupError: There is no such error.
    """
    error = _ERRORS[kind]
    if issubclass(error, ComputeError):
        return error(str(message), details)
    return error(str(message))
