"""Which devices shall compute, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from ai4all.errors import DeviceUnavailable
from ai4all.types.model import DeviceInfo

__all__ = [
    "CPU",
    "Choice",
    "TARGETS",
    "Target",
    "backend_of",
    "choose_devices",
    "device_label",
    "gpus_in",
    "how_to_build",
    "target_of",
]

_NO_BUILD: Final[Mapping[str, Any]] = MappingProxyType({})

CPU = "CPU"
"""The engine's name for the processor."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of hardware that the engine can be built for.

    Attributes:
        name: As in capabilities and ``engine.device``.
        keys: What the engine calls its backend, and the devices of it begin with.
        option: How to get it into a build; empty for the CPU.
    """

    name: str
    keys: tuple[str, ...]
    option: str

    def is_built(self, build: Mapping[str, Any]) -> bool:
        """Whether it is in the build that says ``build`` of itself."""
        return self.is_loaded(build) or self.why_not_loaded(build) is not None

    def is_loaded(self, build: Mapping[str, Any]) -> bool:
        """Whether the engine has its backend."""
        return any(key in build.get("backends", ()) for key in self.keys)

    def why_not_loaded(self, build: Mapping[str, Any]) -> str | None:
        """What the loader said of its library, where that is one of its own and was refused."""
        refused: Mapping[str, str] = build.get("not_loaded", {})
        return next((refused[k.lower()] for k in self.keys if k.lower() in refused), None)

    def missing(self, build: Mapping[str, Any]) -> str:
        """Why there is no device of it."""
        refused = self.why_not_loaded(build)
        if refused is not None:
            return f"{self.name} is built in, but it could not be loaded: {refused}"
        if self.is_loaded(build):
            return f"{self.name} is built in, but the driver shows no device"
        return f"{self.name} is not in this build; rebuild with `{how_to_build(self)}`"


TARGETS: tuple[Target, ...] = (
    Target("cpu", ("CPU",), ""),
    Target("cuda", ("CUDA",), "GGML_CUDA"),
    Target("rocm", ("HIP", "ROCm"), "GGML_HIP"),
    Target("vulkan", ("Vulkan",), "GGML_VULKAN"),
    Target("metal", ("MTL", "Metal"), "GGML_METAL"),
)
"""Every hardware target, the CPU first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What shall compute.

    Attributes:
        gpus: The GPUs that layers go to; without one, the CPU computes all.
        unused: Why not, by the name of each device that is left out.
        fell_back: Why the CPU stands in for what was asked for, or None.
        lacking: What the build could compute on, were it here; None when there is nothing to say.
    """

    gpus: tuple[DeviceInfo, ...]
    unused: Mapping[str, str] = field(default_factory=dict)
    fell_back: str | None = None
    lacking: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what computes: those of the GPUs, or the CPU's."""
        return tuple(device.name for device in self.gpus) or (CPU,)


def choose_devices(
    devices: Sequence[DeviceInfo],
    wanted: str,
    *,
    build: Mapping[str, Any] = _NO_BUILD,
    allow_cpu_fallback: bool = False,
) -> Choice:
    """Find the devices that ``wanted`` means.

    "auto" takes what llama.cpp would: every discrete GPU, or the integrated ones where there is
    no other, no card twice; without any, the CPU.

    Args:
        devices: What the engine sees.
        wanted: As ``EngineOptions.device``.
        build: What the build says of itself, to tell a driver that shows no device from a build
            that has no use for one.
        allow_cpu_fallback: Take the CPU where ``wanted`` is not to be had.

    Raises:
        DeviceUnavailable: It is not to be had; says why.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()] or ["auto"]
    gpus = [device for device in devices if device.is_gpu]
    if names == ["auto"]:
        chosen, unused = _usual(gpus)
    elif len(names) == 1 and names[0].lower() == "cpu":
        chosen, unused = [], {}
    else:
        try:
            chosen = _named(gpus, names, build)
            unused = {}
        except DeviceUnavailable as error:
            if not allow_cpu_fallback:
                raise
            return Choice((), _excluded(gpus, (), wanted), str(error))
    unused = unused | _excluded(gpus, chosen, wanted, but=unused)
    lacking = None
    if names == ["auto"] and not chosen:
        built_in = [target for target in TARGETS[1:] if target.is_built(build)]
        lacking = " and ".join(target.missing(build) for target in built_in) or None
    return Choice(tuple(chosen), unused, lacking=lacking)


def _usual(gpus: Sequence[DeviceInfo]) -> tuple[list[DeviceInfo], dict[str, str]]:
    unused: dict[str, str] = {}
    chosen: list[DeviceInfo] = []
    # Discrete ones first: with one of them at work, the others would only slow it down.
    for device in sorted(gpus, key=lambda each: each.kind == "igpu"):
        same = next((c for c in chosen if c.address and c.address == device.address), None)
        if device.memory_mb == 0:
            unused[device.name] = "its driver does not answer: no memory is reported"
        elif same is not None:
            unused[device.name] = f"the same card as {same.name}"
        elif device.kind == "igpu" and chosen and chosen[0].kind == "gpu":
            unused[device.name] = f"integrated, and {chosen[0].name} is here"
        else:
            chosen.append(device)
    return chosen, unused


def _named(
    gpus: Sequence[DeviceInfo], names: Sequence[str], build: Mapping[str, Any]
) -> list[DeviceInfo]:
    chosen: list[DeviceInfo] = []
    for name in names:
        found = [gpu for gpu in gpus if name.lower() in (gpu.name.lower(), gpu.backend)]
        usable = [gpu for gpu in found if gpu.memory_mb > 0]
        if found and not usable:
            raise DeviceUnavailable(
                f"engine.device: {name} is here, but its driver does not answer; "
                "look at the driver, or set engine.allow_cpu_fallback"
            )
        if not usable:
            raise DeviceUnavailable(f"engine.device: {_missing(name, gpus, build)}")
        chosen += [gpu for gpu in usable if gpu not in chosen]
    return chosen


def _missing(name: str, gpus: Sequence[DeviceInfo], build: Mapping[str, Any]) -> str:
    target = target_of(name)
    if target is None or not target.option or any(gpu.backend == target.name for gpu in gpus):
        here = ", ".join([CPU, *(gpu.name for gpu in gpus)])
        return f"there is no device {name!r}; here are: {here}"
    which = "" if name.lower() == target.name else f"{name}: "
    fix = "or" if not target.is_built(build) else "install its driver, or"
    return f"{which}{target.missing(build)}; {fix} set engine.allow_cpu_fallback"


def how_to_build(target: Target) -> str:
    """The command that builds the engine for a target."""
    return f"pip install . -C cmake.define.{target.option}=ON"


def target_of(name: str) -> Target | None:
    """The target that a backend's or a device's name belongs to ("cuda", "CUDA0")."""
    for target in TARGETS:
        if name.lower() == target.name:
            return target
        for key in target.keys:
            rest = name[len(key) :]
            if name.lower().startswith(key.lower()) and (not rest or rest.isdecimal()):
                return target
    return None


def _excluded(
    gpus: Sequence[DeviceInfo],
    chosen: Sequence[DeviceInfo],
    wanted: str,
    *,
    but: Mapping[str, str] | None = None,
) -> dict[str, str]:
    left = (gpu.name for gpu in gpus if gpu not in chosen and gpu.name not in (but or {}))
    return dict.fromkeys(left, f"excluded by engine.device = {wanted}")


def backend_of(label: str) -> str:
    """The backend of a device's name, or of the first in a label such as ``CUDA0+CPU``."""
    first = label.partition("+")[0]
    target = target_of(first)
    return target.name if target is not None else "cpu"


def gpus_in(label: str) -> tuple[str, ...]:
    """The GPUs in a label such as ``CUDA0+CPU``."""
    return tuple(name for name in label.split("+") if name and name != CPU)


def device_label(gpus: Sequence[str], *, whole: bool) -> str:
    """The label of a model whose layers are on ``gpus``, all of them or with some on the CPU."""
    return "+".join(gpus if gpus and whole else (*gpus, CPU))
