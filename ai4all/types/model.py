"""What the worker knows about a model file and about the devices that can run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DeviceInfo", "ModelFile"]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One verified model on disk.

    Attributes:
        model_id: The name that assignments use. Data, never part of a path.
        path: The GGUF file; its name comes from the content hash.
        sha256: Lower-case hex digest of the whole file.
        size_bytes: Size of the file.
    """

    model_id: str
    path: Path
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One compute device as the engine sees it.

    Attributes:
        name: The engine's name for the device ("CPU", "CUDA0", ...).
        kind: "cpu", "gpu", "igpu" or "accel".
        description: What the driver calls it.
        memory_mb: Total memory, in MiB.
        memory_free_mb: Free memory when asked, in MiB.
    """

    name: str
    kind: str
    description: str
    memory_mb: int
    memory_free_mb: int
