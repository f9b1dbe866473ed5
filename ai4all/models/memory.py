"""Whether there is the memory for a model, and on which devices it goes, before it is loaded."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable

import psutil

from ai4all.backend.base import Capabilities, EngineOptions, InferenceBackend, LoadedModel
from ai4all.backend.cores import cgroup_memory_available_mb
from ai4all.backend.devices import CPU
from ai4all.errors import EngineCrashed, EngineHung, InvalidModelFile, OutOfMemory
from ai4all.models.estimate import MemoryEstimate, estimate_memory
from ai4all.models.gguf import GGUFHeader, read_header
from ai4all.models.offload import Offload, plan_offload
from ai4all.types.model import DeviceShare, ModelFile

__all__ = [
    "MemoryEstimate",
    "admit",
    "estimate_memory",
    "free_memory",
    "load_model",
    "require_memory",
]

_log = logging.getLogger(__name__)

_MIB = 1024 * 1024


def free_memory() -> int:
    """Bytes that can be had without swapping, within the limits of the control group."""
    free = int(psutil.virtual_memory().available)
    limit = cgroup_memory_available_mb()
    return free if limit is None else min(free, limit * _MIB)


def require_memory(estimate: MemoryEstimate, free: int, limit: int | None = None) -> None:
    """Make sure that the model fits into the machine's own memory.

    Args:
        estimate: What it takes.
        free: Bytes that can be had.
        limit: Bytes that the owner allows a model, or None.

    Raises:
        OutOfMemory: It does not fit; message and details have the numbers.
    """
    details = {
        name: round(n_bytes / _MIB) for name, n_bytes in estimate.to_dict().items() if n_bytes
    } | {"free": free // _MIB, "unit": "MiB"}
    if limit is not None:
        details["limit"] = limit // _MIB
    parts = (
        f"{_mib(estimate.weights_mapped + estimate.weights_copied)} weights, "
        f"{_mib(estimate.kv_cache)} KV cache, {_mib(estimate.compute)} compute buffers, "
        f"{_mib(estimate.overhead)} vocabulary and graphs"
    )
    if limit is not None and estimate.peak > limit:
        more = f", {_mib(estimate.weights_idle)} idle pages" if estimate.weights_idle else ""
        raise OutOfMemory(
            f"the model takes {_mib(estimate.peak)} MiB ({parts}{more}), more than "
            f"engine.memory_limit_mb allows: {_mib(limit)} MiB",
            details,
        )
    if estimate.needed > free:
        raise OutOfMemory(
            f"the model needs {_mib(estimate.needed)} MiB ({parts}), but {_mib(free)} MiB are "
            "free; a smaller engine.context_length needs less",
            details,
        )


def admit(
    model: ModelFile,
    options: EngineOptions,
    capabilities: Capabilities,
    replaces: LoadedModel | None = None,
) -> tuple[EngineOptions, Offload | None]:
    """Make sure, before anything is loaded, that ``model`` fits. Reads its header; may block.

    Args:
        model: What shall be loaded.
        options: The shape to run it in.
        capabilities: Of the backend that shall load it, with what is free now.
        replaces: The model that is dropped first; its memory counts as free.

    Returns:
        ``options``, with the devices, their layers, and a ``prefix_cache_mb`` that fits into what
        is left; and where the layers go. A file that cannot be read has no such plan: what is
        wrong with it is the loader's to say.

    Raises:
        DeviceUnavailable: The device that ``options`` name is not to be had.
        OutOfMemory: It does not fit.
        InvalidModelFile: It is not one that may be loaded.
    """
    try:
        header, draft = _headers(model, options.draft)
    except InvalidModelFile as error:
        if isinstance(error.__cause__, OSError):
            # A file that cannot be read at all is the loader's to complain of.
            return options, None
        # It was checked when it came. By now the check may know better.
        raise
    free, freed = free_memory(), 0
    if replaces is not None:
        on_host, freed = _held_by(replaces, options, capabilities)
        free += on_host
    plan = plan_offload(header, options, capabilities, draft=draft, freed=freed)
    estimate = plan.estimate
    limit = options.memory_limit_mb * _MIB if options.memory_limit_mb else None
    # What an integrated GPU holds is the machine's own memory, too.
    shared = estimate.device if any(gpu.kind == "igpu" for gpu in plan.choice.gpus) else 0
    require_memory(estimate, free - shared, limit)
    room = free - shared - estimate.needed
    if limit is not None:
        room = min(room, limit - estimate.peak)
    fitting = max(0, min(options.prefix_cache_mb, room // _MIB))
    return dataclasses.replace(plan.options(options), prefix_cache_mb=fitting), plan


async def load_model(
    backend: InferenceBackend,
    model: ModelFile,
    options: EngineOptions,
    progress: Callable[[float], None] | None = None,
    approve: Callable[[ModelFile, Offload], None] | None = None,
) -> LoadedModel:
    """``InferenceBackend.load``, once it is clear that the model fits, and where.

    Args:
        backend: What loads it.
        model: What shall be loaded.
        options: The shape to run it in.
        progress: Called with a share in 0..1.
        approve: Called before anything is loaded; raises where the plan will not do.

    Raises:
        DeviceUnavailable: The device that ``options`` name is not to be had.
        OutOfMemory: It does not fit; whatever was loaded before stays.
        InvalidModelFile: Its file is not one that may be loaded.
        ComputeError: The load failed.
    """
    try:
        devices = await backend.devices()
    except (EngineCrashed, EngineHung):
        # A driver that has gone may take the engine with it; the next one sees what is left.
        devices = await backend.devices()
    now = dataclasses.replace(backend.capabilities(), devices=devices)
    options, plan = await asyncio.to_thread(admit, model, options, now, backend.loaded)
    if plan is not None:
        if approve is not None:
            approve(model, plan)
        if plan.choice.gpus or plan.limited_by:
            level = logging.WARNING if plan.limited_by else logging.INFO
            _log.log(level, "%s: %s", model.model_id, plan)
    return await backend.load(model, options, progress)


def _headers(model: ModelFile, draft: ModelFile | None) -> tuple[GGUFHeader, GGUFHeader | None]:
    return read_header(model.path), None if draft is None else read_header(draft.path)


def _held_by(
    held: LoadedModel, options: EngineOptions, capabilities: Capabilities
) -> tuple[int, int]:
    """What comes back when a loaded model goes: of the machine's own memory, and of its GPUs'."""
    on_gpus = sum(share.n_layers for share in held.placement if share.device != CPU)
    of_gpus = sum(_gpu_bytes(share) for share in held.placement)
    options = dataclasses.replace(
        options, n_ctx=held.n_ctx, gpu_layers=on_gpus + 1 if on_gpus else 0
    )
    try:
        header, draft = _headers(held.file, held.draft)
    except InvalidModelFile:
        return 0, of_gpus
    features = capabilities.build_info.get("cpu_features", ())
    alone, both = (
        estimate_memory(header, options, draft=its, cpu_features=features, has_gpu=on_gpus > 0)
        for its in (None, draft)
    )
    # The placement that was read is the model's own.
    return both.needed, of_gpus + both.device - alone.device


def _gpu_bytes(share: DeviceShare) -> int:
    return 0 if share.device == CPU else share.weights + share.context + share.compute


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:,.0f}"
