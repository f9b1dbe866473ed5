"""What this build and this machine can run, and why not the rest."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ai4all.backend.base import Capabilities, InferenceBackend
from ai4all.backend.devices import TARGETS
from ai4all.errors import EngineUnavailable

__all__ = [
    "BackendStatus",
    "TargetStatus",
    "ask_capabilities",
    "build_info",
    "capabilities",
    "describe",
    "open_backend",
    "targets",
]

_BUILD_HINT = (
    "the native extension is not built; install the package with `pip install .`, "
    "or an editable one with `pip install --no-build-isolation -e .`"
)


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One way to compute: whether it can be opened, and if not, why."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class TargetStatus:
    """One hardware target: whether it is built in, whether a device is here, and if not, why."""

    name: str
    built: bool
    available: bool
    reason: str


# A library of a driver that the dynamic linker looked for, and what brings it.
_DRIVER_LIBRARIES = {
    "libcuda.so": "NVIDIA's driver",
    "libamdhip64.so": "ROCm's runtime",
    "libvulkan.so": "the Vulkan loader",
}


def _native() -> Any:
    try:
        return importlib.import_module("ai4all.backend.native")
    except ImportError as error:
        raise EngineUnavailable(_why_not(error)) from error


def _why_not(error: ImportError) -> str:
    text = str(error)
    if "cannot open" in text:
        # The extension is there; a library that it was linked with is not.
        for library, owner in _DRIVER_LIBRARIES.items():
            if library in text:
                return f"{text}; this build needs {owner}, which is not installed here"
        return text
    missing = getattr(error, "name", None) in ("ai4all._engine", "_engine") or "_engine" in text
    return _BUILD_HINT if missing else text


def _open_native() -> InferenceBackend:
    backend: InferenceBackend = _native().NativeBackend()
    return backend


def _open_isolated() -> InferenceBackend:
    # The extension is for the engine process alone to load.
    from ai4all.backend.isolated import IsolatedBackend

    return IsolatedBackend()


_FACTORIES: dict[str, Callable[[], InferenceBackend]] = {
    "isolated": _open_isolated,
    "native": _open_native,
}


def open_backend(name: str = "native") -> InferenceBackend:
    """Open a backend by name.

    Raises:
        EngineUnavailable: No such backend, or it cannot run here.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        raise EngineUnavailable(f"no backend {name!r}; there are: {', '.join(sorted(_FACTORIES))}")
    return factory()


def describe() -> list[BackendStatus]:
    """Every backend, and why one cannot be opened."""
    result = []
    for name in sorted(_FACTORIES):
        try:
            _native()
        except EngineUnavailable as error:
            result.append(BackendStatus(name, available=False, reason=str(error)))
        else:
            result.append(BackendStatus(name, available=True, reason=""))
    return result


def build_info() -> dict[str, Any]:
    """How the extension was built.

    Raises:
        EngineUnavailable: There is none.
    """
    info: dict[str, Any] = _native().engine_build_info()
    info["engine_build"] = _native().engine_build_line()
    return info


def capabilities() -> Capabilities:
    """What the engine can do here, asked in this process.

    Raises:
        EngineUnavailable: There is no extension to ask.
    """
    found: Capabilities = _native().engine_capabilities()
    return found


def ask_capabilities() -> Capabilities:
    """The same, asked in a process of its own: a driver may hang, or end whoever asks it.

    Raises:
        EngineUnavailable: No engine can run here.
        EngineCrashed: It died of the question.
        EngineHung: It did not answer.
    """
    return asyncio.run(_ask())


async def _ask() -> Capabilities:
    async with _open_isolated() as backend:
        return backend.capabilities()


def targets(found: Capabilities) -> list[TargetStatus]:
    """Every hardware target of the engine: built in or not, with a device or not."""
    build = found.build_info
    present = {device.backend for device in found.devices}
    return [
        TargetStatus(
            target.name,
            built=target.is_built(build),
            available=target.name in present,
            reason="" if target.name in present else target.missing(build),
        )
        for target in TARGETS
    ]
