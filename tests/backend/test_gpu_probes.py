from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_sysfs import add_amd_figures, add_card

from ai4all.backend.base import GpuFigures
from ai4all.backend.gpu_probes import AmdProbe, NvidiaProbe, bus_address


def test_an_amd_card_is_read_from_the_kernels_files(tmp_path: Path) -> None:
    folder = add_card(tmp_path, "0000:03:00.0", vendor="0x1002", driver="amdgpu")
    add_amd_figures(folder)
    add_card(tmp_path, "0000:01:00.0", vendor="0x10de", driver="nvidia")
    assert AmdProbe(tmp_path).read() == {
        "0000:03:00.0": GpuFigures("", 25.0, 2048, 8192, 61.5, 142.0)
    }


def test_an_amd_card_that_sleeps_gives_what_it_has(tmp_path: Path) -> None:
    folder = add_card(tmp_path, "0000:03:00.0", vendor="0x1002", driver="amdgpu")
    add_amd_figures(folder, gpu_busy_percent="busy?")
    (folder / "mem_info_vram_used").unlink()
    (folder / "hwmon/hwmon4/power1_average").rename(folder / "hwmon/hwmon4/power1_input")
    (folder / "hwmon/hwmon4/temp1_input").unlink()
    # Reading a folder fails as a card that is switched off does.
    (folder / "hwmon/hwmon4/temp1_input").mkdir()
    figures = AmdProbe(tmp_path).read()["0000:03:00.0"]
    assert figures == GpuFigures("", None, None, 8192, None, 142.0)


class Nvml(ModuleType):
    """As much of NVIDIA's library as is asked, with two cards; the second has no power meter."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.inits = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.inits += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=(b"00000000:01:00.0", "00000000:C1:00.0")[handle])

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=97 - handle)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=3 << 30, total=80 << 30)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 55

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise self.NVMLError("not supported")
        return 312_500


def test_nvidia_cards_are_read_through_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    probe = NvidiaProbe()
    expected = {
        "0000:01:00.0": GpuFigures("", 97.0, 3072, 81_920, 55.0, 312.5),
        "0000:c1:00.0": GpuFigures("", 96.0, 3072, 81_920, 55.0, None),
    }
    assert probe.read() == expected
    assert probe.read() == expected
    assert nvml.inits == 1


def test_the_real_library_has_what_is_asked_of_it() -> None:
    pynvml = importlib.import_module("pynvml")
    asked = {name for name in vars(Nvml) if name.startswith("nvml")} | {"NVMLError"}
    assert asked <= set(dir(pynvml))


def test_addresses_are_written_as_the_kernel_does() -> None:
    assert bus_address(b"00000000:0A:00.0") == "0000:0a:00.0"
    assert bus_address("0001:0a:00.0") == "0001:0a:00.0"
