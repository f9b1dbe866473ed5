"""What GPUs are doing, from where their drivers tell it. Blocking; see ``gpu_monitor``."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from ai4all.backend.base import GpuFigures
from ai4all.backend.drivers import PCI_DEVICES, cards, read_text

__all__ = ["AmdProbe", "NvidiaProbe", "Probe", "bus_address"]

_MIB: Final = 1024 * 1024


class Probe(Protocol):
    """One way to ask. It lives in one thread, which it may block for as long as it takes."""

    name: str

    def read(self) -> dict[str, GpuFigures]:
        """What each card does now, by its PCI address.

        Raises:
            Exception: Whatever the driver's library raises; the card cannot be asked now.
        """


def bus_address(text: str | bytes) -> str:
    """A PCI address as the kernel writes it; libraries write the domain longer, or in capitals."""
    address = (text.decode("ascii", "replace") if isinstance(text, bytes) else text).lower()
    domain, _, rest = address.partition(":")
    return f"{domain[-4:]}:{rest}"


class NvidiaProbe:
    """NVIDIA's management library, where ``nvidia-ml-py`` is installed."""

    name = "nvidia"

    def __init__(self) -> None:
        self._library: Any = None

    def read(self) -> dict[str, GpuFigures]:
        """See ``Probe.read``."""
        if self._library is None:
            library = importlib.import_module("pynvml")
            library.nvmlInit()
            self._library = library
        nvml = self._library
        found = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            address = bus_address(nvml.nvmlDeviceGetPciInfo(handle).busId)
            found[address] = self._figures(handle)
        return found

    def _figures(self, handle: Any) -> GpuFigures:
        nvml = self._library
        ask = self._ask
        used = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / _MIB)
        total = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total / _MIB)
        return GpuFigures(
            name="",
            percent=ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            memory_used_mb=None if used is None else int(used),
            memory_mb=None if total is None else int(total),
            temperature_c=ask(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            power_w=ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000.0),
        )

    def _ask(self, question: Callable[[], float]) -> float | None:
        # A card that does not support one figure still gives the others.
        with contextlib.suppress(self._library.NVMLError):
            return float(question())
        return None


class AmdProbe:
    """What the kernel's ``amdgpu`` driver shows as files."""

    name = "amd"

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def read(self) -> dict[str, GpuFigures]:
        """See ``Probe.read``."""
        addresses = [card.address for card in cards(self._root) if card.vendor == "AMD"]
        return {each: _amd_figures(self._root / PCI_DEVICES / each) for each in addresses}


def _amd_figures(folder: Path) -> GpuFigures:
    used, total = _number(folder / "mem_info_vram_used"), _number(folder / "mem_info_vram_total")
    temperature = power = None
    for monitor in sorted(folder.glob("hwmon/hwmon*")):
        temperature = _number(monitor / "temp1_input")
        # The average where the card keeps one, else what it draws now.
        power = _number(monitor / "power1_average")
        if power is None:
            power = _number(monitor / "power1_input")
    return GpuFigures(
        name="",
        percent=_number(folder / "gpu_busy_percent"),
        memory_used_mb=None if used is None else int(used) // _MIB,
        memory_mb=None if total is None else int(total) // _MIB,
        temperature_c=None if temperature is None else temperature / 1000.0,
        power_w=None if power is None else power / 1e6,
    )


def _number(file: Path) -> float | None:
    text = read_text(file)
    with contextlib.suppress(ValueError):
        return float(int(text)) if text is not None else None
    return None
