from __future__ import annotations

import os

import psutil
import pytest

from ai4all.benchmark import hardware
from ai4all.benchmark.hardware import HardwareInfo
from ai4all.types.model import DeviceInfo


def test_detect_tells_what_this_machine_tells() -> None:
    device = DeviceInfo("GPU0", "gpu", "a card", 24_000, 20_000)
    info = HardwareInfo.detect([device])
    assert info.logical_cores == psutil.cpu_count()
    assert info.usable_cores is not None
    assert 0 < info.usable_cores <= (os.cpu_count() or 1)
    assert info.memory_total_mb is not None
    assert info.memory_available_mb is not None
    assert 0 < info.memory_available_mb <= info.memory_total_mb
    assert [d.name for d in info.devices] == ["GPU0"]
    assert HardwareInfo.model_validate(info.model_dump(mode="json")) == info


def test_a_machine_that_tells_nothing_gives_empty_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(hardware.psutil, "virtual_memory", refuse)
    monkeypatch.setattr(hardware.psutil, "cpu_count", refuse)
    monkeypatch.setattr(hardware, "_cpuinfo", refuse)
    monkeypatch.setattr(hardware, "_sysctl", refuse)
    info = HardwareInfo.detect()
    assert info.cpu_model is None
    assert info.memory_total_mb is None
    assert info.logical_cores is None
    assert info.cpu_features == []
