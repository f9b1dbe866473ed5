"""How many layers of a model go to the GPU: as many as fit into what is free there.

The engine spreads layers over several GPUs in proportion to their free memory, each of which needs
its own compute buffer; the one with the least left decides how many fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ai4all.backend.base import Capabilities, EngineOptions
from ai4all.backend.devices import Choice, choose_devices, device_label
from ai4all.errors import OutOfMemory
from ai4all.models.estimate import MemoryEstimate, estimate_memory, layers_of
from ai4all.models.gguf import GGUFHeader
from ai4all.types.model import DeviceInfo

__all__ = ["MARGIN_MIB", "Offload", "plan_offload"]

_MIB: Final = 1024 * 1024

MARGIN_MIB: Final = 512
"""What stays free on each GPU: the driver's own buffers, and the screen."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Where a model's layers shall go, and what that takes.

    Attributes:
        choice: The devices.
        n_layers: Layers for the GPUs, the output counting as one.
        n_all: Layers that there are, the output counting as one.
        estimate: What it takes.
        free: Bytes free on the GPUs together.
        limited_by: Why not more layers go there; None when all do, or nothing is to.
        fits_when_empty: Whether some of the layers would go there if nobody else used them.
    """

    choice: Choice
    n_layers: int
    n_all: int
    estimate: MemoryEstimate
    free: int
    limited_by: str | None = None
    fits_when_empty: bool = True

    @property
    def label(self) -> str:
        """The label that a load so will have: "CPU", "CUDA0", "CUDA0+CPU"."""
        # The output goes first: alone on a GPU, it leaves every layer of the model's own.
        gpus = [gpu.name for gpu in self.choice.gpus] if self.n_layers > 1 else []
        return device_label(gpus, whole=self.n_layers >= self.n_all)

    def options(self, options: EngineOptions) -> EngineOptions:
        """``options`` that say exactly this, so that a later load cannot differ from it."""
        names = ",".join(self.choice.names) if self.n_layers else "cpu"
        return dataclasses.replace(options, device=names, gpu_layers=self.n_layers)

    def __str__(self) -> str:
        estimate = self.estimate
        if not self.n_layers:
            why = f" ({self.limited_by})" if self.limited_by else ""
            return f"all on the CPU{why}: {_mib(estimate.needed)} MiB"
        names = " and ".join(self.choice.names)
        text = (
            f"{self.n_layers} of {self.n_all} layers on {names}: "
            f"{_mib(estimate.device_weights)} MiB weights, {_mib(estimate.device_kv)} KV cache, "
            f"{_mib(estimate.device_compute)} compute buffers of {_mib(self.free)} free; "
            f"{_mib(estimate.needed)} MiB on the CPU's side"
        )
        return f"{text} ({self.limited_by})" if self.limited_by else text

    def to_dict(self) -> dict[str, Any]:
        """The plan as ``--json`` prints it, sizes in bytes."""
        return {
            "device": self.label,
            "gpu_layers": self.n_layers,
            "layers": self.n_all,
            "free": self.free,
            "limited_by": self.limited_by,
            "estimate": self.estimate.to_dict(),
        }


def plan_offload(
    header: GGUFHeader,
    options: EngineOptions,
    capabilities: Capabilities,
    *,
    draft: GGUFHeader | None = None,
    margin_mib: int = MARGIN_MIB,
    freed: int = 0,
) -> Offload:
    """Choose the devices, and how many layers they take.

    ``options.gpu_layers`` is kept where it names a number; else as many go as fit.

    Args:
        header: Of the model's file.
        options: What is asked for.
        capabilities: Of the backend, with what is free now.
        draft: Of the draft model's file; it goes where any layer goes, as a whole.
        margin_mib: What stays free on each GPU.
        freed: Bytes on the GPUs that the model before gives back.

    Raises:
        DeviceUnavailable: The device that ``options`` name is not to be had.
        OutOfMemory: It is, and holds not even one layer; or not the number asked for.
    """
    choice = choose_devices(
        capabilities.devices,
        options.device,
        build=capabilities.build_info,
        allow_cpu_fallback=options.allow_cpu_fallback,
    )
    n_all = layers_of(header)
    features = capabilities.build_info.get("cpu_features", ())

    def estimate(n_layers: int) -> MemoryEstimate:
        asked = dataclasses.replace(options, gpu_layers=n_layers)
        return estimate_memory(
            header, asked, draft=draft, cpu_features=features, has_gpu=bool(choice.gpus)
        )

    if not choice.gpus or options.gpu_layers == 0:
        why = choice.fell_back or (None if options.gpu_layers == 0 else choice.lacking)
        return Offload(choice, 0, n_all, estimate(0), 0, why)
    free = sum(gpu.memory_free_mb for gpu in choice.gpus) * _MIB + freed
    room = _room(choice.gpus, freed, estimate(n_all).device_compute + margin_mib * _MIB)
    fitting = _most_that_fit(estimate, n_all, room)
    if options.gpu_layers > 0:
        asked = min(options.gpu_layers, n_all)
        # The margin is for what is chosen here; who names a number has chosen himself.
        bare = _room(choice.gpus, freed, estimate(asked).device_compute)
        if asked > fitting and _held(estimate(asked)) > bare:
            raise OutOfMemory(
                f"{asked} layers need {_mib(estimate(asked).device)} MiB on "
                f"{' and '.join(choice.names)}, but {_mib(free)} MiB are free there; "
                "a smaller engine.gpu_layers needs less, and auto takes what fits",
                {"needed": estimate(asked).device // _MIB, "free": free // _MIB, "unit": "MiB"},
            )
        return Offload(choice, asked, n_all, estimate(asked), free)
    if fitting == n_all:
        return Offload(choice, n_all, n_all, estimate(n_all), free)
    limited = (
        f"too little memory: all {n_all} layers need {_mib(estimate(n_all).device)} MiB and a "
        f"margin of {margin_mib}, {_mib(free)} are free"
    )
    # The output alone is not worth the way there and back.
    fitting = fitting if fitting > 1 else 0
    if not fitting and options.device != "auto" and not options.allow_cpu_fallback:
        raise OutOfMemory(
            f"not one layer fits on {' and '.join(choice.names)}; {limited}; free some, or set "
            "engine.allow_cpu_fallback",
            {"needed": estimate(2).device // _MIB, "free": free // _MIB, "unit": "MiB"},
        )
    empty = [dataclasses.replace(gpu, memory_free_mb=gpu.memory_mb) for gpu in choice.gpus]
    roomy = _room(empty, 0, estimate(n_all).device_compute + margin_mib * _MIB)
    fits_when_empty = _held(estimate(2)) <= roomy
    return Offload(choice, fitting, n_all, estimate(fitting), free, limited, fits_when_empty)


def _room(gpus: Sequence[DeviceInfo], freed: int, reserve: int) -> int:
    """Bytes for weights and caches on all together, spread in proportion to what is free."""
    total = sum(gpu.memory_free_mb for gpu in gpus) * _MIB
    if total <= 0:
        return max(0, freed - reserve)
    shares = [gpu.memory_free_mb * _MIB / total for gpu in gpus if gpu.memory_free_mb > 0]
    whole = total + freed
    return int(min(whole - reserve / share for share in shares))


def _held(estimate: MemoryEstimate) -> int:
    return estimate.device_weights + estimate.device_kv


def _most_that_fit(estimate: Callable[[int], MemoryEstimate], n_all: int, room: int) -> int:
    low, high = 0, n_all
    while low < high:
        middle = (low + high + 1) // 2
        if _held(estimate(middle)) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:,.0f}"
