"""What the worker knows about a model file and about the devices that can run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DeviceInfo", "DeviceShare", "ModelFile"]


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
        memory_mb: Total memory, in MiB; 0 when the driver does not say.
        memory_free_mb: Free memory when asked, in MiB.
        backend: "cpu", "cuda", "rocm", "vulkan" or "metal".
        address: Where it sits on the bus ("0000:01:00.0"); empty when the driver does not say.
        driver: Version of its driver, or None when that cannot be told.
    """

    name: str
    kind: str
    description: str
    memory_mb: int
    memory_free_mb: int
    backend: str = "cpu"
    address: str = ""
    driver: str | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether layers can be offloaded to it."""
        return self.kind in ("gpu", "igpu")


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What one device holds of a loaded model, in bytes as they were allocated.

    Attributes:
        device: Its name.
        n_layers: The model's own layers there; the output is not counted.
        weights: Weights.
        context: Caches.
        compute: Buffers of the graphs.
    """

    device: str
    n_layers: int
    weights: int
    context: int
    compute: int
