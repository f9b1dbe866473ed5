"""What the worker says about itself when it registers."""

from __future__ import annotations

import psutil
import structlog

from ai4all import __version__
from ai4all.backend.base import EngineOptions, InferenceBackend
from ai4all.blocks import ModelSource
from ai4all.errors import ModelError
from ai4all.protocol.messages import DeviceSummary, ModelSummary, WorkerCapabilities
from ai4all.tasks import OFFERED

__all__ = ["describe_worker"]

_log = structlog.get_logger(__name__)


def describe_worker(
    backend: InferenceBackend,
    models: ModelSource,
    engine: EngineOptions,
    *,
    benchmark_score: float | None,
    max_concurrent_tasks: int,
) -> WorkerCapabilities:
    """Describe this worker as it is now: what it has, and no task that it does not do.

    The context length is known once it is configured or a model is loaded.
    """
    capabilities = backend.capabilities()
    loaded = backend.loaded
    n_ctx = engine.n_ctx or (loaded.n_ctx if loaded is not None else 0)
    try:
        files = list(models.list())
    except (ModelError, OSError) as exc:
        # Blocks say for themselves which model they need, and are answered then.
        _log.warning("models_not_listed", error=str(exc))
        files = []
    return WorkerCapabilities(
        backend=capabilities.backend,
        supported_tasks=list(OFFERED),
        supports_training=False,
        vram_mb=capabilities.vram_mb,
        memory_mb=psutil.virtual_memory().total // (1024 * 1024),
        compute_score=benchmark_score or 0.0,
        max_concurrent_tasks=max_concurrent_tasks,
        max_context_length=n_ctx or None,
        models=[
            ModelSummary(model_id=file.model_id, sha256=file.sha256, size_bytes=file.size_bytes)
            for file in files
        ],
        devices=[
            DeviceSummary(name=device.name, kind=device.kind, memory_mb=device.memory_mb)
            for device in capabilities.devices
        ],
        worker_version=__version__,
        engine_build=capabilities.engine_build,
    )
