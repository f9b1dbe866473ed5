"""What the worker says about itself when it registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import psutil
import structlog

from ai4all import __version__
from ai4all.backend.base import EngineOptions, InferenceBackend
from ai4all.backend.base import ResourceUsage as Usage
from ai4all.backend.devices import CPU, backend_of, choose_devices, gpus_in
from ai4all.blocks import ModelSource
from ai4all.errors import DeviceUnavailable, ModelError
from ai4all.protocol.messages import (
    DeviceSummary,
    GpuUsage,
    ModelSummary,
    ResourceUsage,
    WorkerCapabilities,
)
from ai4all.tasks import OFFERED
from ai4all.types.model import DeviceInfo
from ai4all.worker_health import WorkerHealth

__all__ = ["describe_usage", "describe_worker", "device_in_use"]

_log = structlog.get_logger(__name__)


def describe_worker(
    backend: InferenceBackend,
    models: ModelSource,
    engine: EngineOptions,
    health: WorkerHealth,
    *,
    benchmark_score: float | None,
    max_concurrent_tasks: int,
) -> WorkerCapabilities:
    """Describe this worker as it is now: what it has, and no task that it does not do.

    The context length is known once it is configured or a model is loaded.
    """
    capabilities = backend.capabilities()
    loaded = backend.loaded
    label = device_in_use(backend, health)
    gpus = gpus_in(label)
    in_use = [d for d in capabilities.devices if d.name in gpus or (not gpus and d.name == CPU)]
    n_ctx = engine.n_ctx or (loaded.n_ctx if loaded is not None else 0)
    try:
        files = list(models.list())
    except (ModelError, OSError) as exc:
        # Blocks say for themselves which model they need, and are answered then.
        _log.warning("models_not_listed", error=str(exc))
        files = []
    return WorkerCapabilities(
        backend=backend_of(label),
        supported_tasks=list(OFFERED),
        supports_training=False,
        vram_mb=sum(device.memory_mb for device in in_use if device.is_gpu) or None,
        memory_mb=psutil.virtual_memory().total // (1024 * 1024),
        compute_score=benchmark_score or 0.0,
        max_concurrent_tasks=max_concurrent_tasks,
        max_context_length=n_ctx or None,
        models=[
            ModelSummary(model_id=file.model_id, sha256=file.sha256, size_bytes=file.size_bytes)
            for file in files
        ],
        devices=_summaries(capabilities.devices, in_use, engine),
        worker_version=__version__,
        engine_build=capabilities.engine_build,
    )


def device_in_use(backend: InferenceBackend, health: WorkerHealth) -> str:
    """The label of what computes now, or will when a model is loaded."""
    if backend.loaded is not None:
        return backend.loaded.device
    return health.promised if health.sees_device(backend.capabilities()) else CPU


def _summaries(
    devices: Sequence[DeviceInfo], in_use: Sequence[DeviceInfo], engine: EngineOptions
) -> list[DeviceSummary]:
    try:
        unused = choose_devices(devices, engine.device).unused
    except DeviceUnavailable:
        unused = {}
    return [
        DeviceSummary(
            name=device.name,
            kind=device.kind,
            memory_mb=device.memory_mb,
            memory_free_mb=device.memory_free_mb,
            driver=device.driver,
            unused=unused.get(device.name),
        )
        # What computes comes first.
        for device in sorted(devices, key=lambda each: each not in in_use)
    ]


def describe_usage(usage: Usage) -> ResourceUsage:
    """What a heartbeat says of a backend's figures."""
    return ResourceUsage(
        cpu_percent=usage.cpu_percent,
        memory_mb=usage.memory_mb,
        gpu_percent=usage.gpu_percent,
        gpu_memory_mb=usage.gpu_memory_mb,
        active_threads=usage.active_threads,
        gpus=[GpuUsage(**asdict(gpu)) for gpu in usage.gpus] or None,
    )
