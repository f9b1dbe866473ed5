"""What this build and this machine can run, and why not the rest."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ai4all.backend.base import InferenceBackend
from ai4all.errors import EngineUnavailable

__all__ = ["BackendStatus", "TargetStatus", "build_info", "describe", "open_backend", "targets"]

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


# The engine's names for its backends, and how to get each into the build.
_TARGETS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("cpu", ("CPU",), ""),
    ("cuda", ("CUDA",), "GGML_CUDA"),
    ("rocm", ("HIP", "ROCm"), "GGML_HIP"),
    ("vulkan", ("Vulkan",), "GGML_VULKAN"),
    ("metal", ("MTL", "Metal"), "GGML_METAL"),
)


def _native() -> Any:
    try:
        return importlib.import_module("ai4all.backend.native")
    except ImportError as error:
        missing = getattr(error, "name", None) in ("ai4all._engine", "_engine") or "_engine" in str(
            error
        )
        detail = _BUILD_HINT if missing and "cannot open" not in str(error) else str(error)
        raise EngineUnavailable(detail) from error


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


def targets() -> list[TargetStatus]:
    """Every hardware target of the engine: built in or not, with a device or not.

    Raises:
        EngineUnavailable: There is no extension to ask.
    """
    info = build_info()
    built = set(info["backends"])
    not_loaded: dict[str, str] = info.get("not_loaded", {})
    present = {device["backend"] for device in _native().engine_devices()}
    result = []
    for name, keys, option in _TARGETS:
        why = next((not_loaded[key.lower()] for key in keys if key.lower() in not_loaded), None)
        if why is not None:
            why = f"built in, but it could not be loaded: {why}"
            result.append(TargetStatus(name, built=True, available=False, reason=why))
        elif not built.intersection(keys):
            how = f"not in this build; rebuild with `pip install . -C cmake.define.{option}=ON`"
            result.append(TargetStatus(name, built=False, available=False, reason=how))
        elif not present.intersection(keys):
            why = "built in, but the driver shows no device"
            result.append(TargetStatus(name, built=True, available=False, reason=why))
        else:
            result.append(TargetStatus(name, built=True, available=True, reason=""))
    return result
