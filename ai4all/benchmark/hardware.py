"""What machine this is, as far as it lets itself be asked. Every probe may come back empty."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import psutil
from pydantic import BaseModel, ConfigDict

from ai4all.backend.cores import cgroup_memory_limit_mb, usable_cores
from ai4all.types.model import DeviceInfo

__all__ = ["Device", "HardwareInfo"]

_T = TypeVar("_T")

_MIB = 1024 * 1024

# The features that inference kernels are chosen by; the other hundred flags tell nothing here.
_FEATURES = frozenset(
    {"sse3", "ssse3", "sse4_1", "sse4_2", "avx", "avx2", "avx_vnni", "f16c", "fma", "bmi2"}
    | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni"}
    | {"avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
    | {"neon", "asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve", "sve2", "sme"}
)


class Device(BaseModel):
    """A compute device, as the engine named it. Memory in MiB."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    kind: str
    description: str
    memory_mb: int


class HardwareInfo(BaseModel):
    """The machine a benchmark ran on.

    Attributes:
        cpu_model: What the processor calls itself.
        cpu_features: Instruction sets that matter to inference, sorted.
        physical_cores: Cores of the machine.
        logical_cores: Hardware threads of the machine.
        usable_cores: Hardware threads that this process may use: affinity and cgroup quota count.
        memory_total_mb: Memory of the machine, or of the cgroup where that is less, in MiB.
        memory_available_mb: What could be had without swapping, in MiB.
        os: Name and release.
        architecture: "x86_64", "aarch64", "arm64", ...
        devices: What the engine can compute on.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    cpu_model: str | None = None
    cpu_features: list[str] = []
    physical_cores: int | None = None
    logical_cores: int | None = None
    usable_cores: float | None = None
    memory_total_mb: int | None = None
    memory_available_mb: int | None = None
    os: str | None = None
    architecture: str | None = None
    devices: list[Device] = []

    @classmethod
    def detect(cls, devices: Iterable[DeviceInfo] = ()) -> HardwareInfo:
        """Ask the machine. Never raises: what cannot be learnt stays None or empty.

        Args:
            devices: What the backend's ``capabilities()`` lists.
        """
        memory = _probe(psutil.virtual_memory)
        total = memory.total // _MIB if memory is not None else None
        limit = cgroup_memory_limit_mb()
        if total is not None and limit is not None:
            total = min(total, limit)
        available = memory.available // _MIB if memory is not None else None
        if available is not None and total is not None:
            available = min(available, total)
        return cls(
            cpu_model=_probe(_cpu_model),
            cpu_features=_probe(_cpu_features) or [],
            physical_cores=_probe(lambda: psutil.cpu_count(logical=False)),
            logical_cores=_probe(lambda: psutil.cpu_count(logical=True)),
            usable_cores=_probe(usable_cores),
            memory_total_mb=total,
            memory_available_mb=available,
            os=_probe(lambda: f"{platform.system()} {platform.release()}".strip()) or None,
            architecture=_probe(platform.machine) or None,
            devices=[
                Device(
                    name=device.name,
                    kind=device.kind,
                    description=device.description,
                    memory_mb=device.memory_mb,
                )
                for device in devices
            ],
        )


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string")
    for key, value in _cpuinfo():
        if key in ("model name", "Model", "cpu model", "Hardware"):
            return value
    return platform.processor() or None


def _cpu_features() -> list[str]:
    if sys.platform == "darwin":
        # One line of names on Intel; Apple silicon has a key for each, all of one family.
        flags = (
            (_sysctl("machdep.cpu.features") or "")
            + " "
            + (_sysctl("machdep.cpu.leaf7_features") or "")
        )
        found = {flag.lower().replace("avx1.0", "avx") for flag in flags.split()}
        if platform.machine() == "arm64":
            found |= {"neon", "asimd"}
        return sorted(found & _FEATURES)
    for key, value in _cpuinfo():
        if key in ("flags", "Features"):
            return sorted(set(value.split()) & _FEATURES)
    return []


def _cpuinfo() -> Iterator[tuple[str, str]]:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, colon, value = line.partition(":")
            if colon and value.strip():
                yield key.strip(), value.strip()


def _sysctl(name: str) -> str | None:
    done = subprocess.run(
        ["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
    )
    return done.stdout.strip() or None


def _probe(ask: Callable[[], _T]) -> _T | None:
    try:
        return ask()
    except (OSError, ValueError, RuntimeError, psutil.Error, subprocess.SubprocessError):
        return None
