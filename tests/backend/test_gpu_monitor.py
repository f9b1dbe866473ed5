from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest

from ai4all.backend.base import GpuFigures
from ai4all.backend.gpu_monitor import GpuMonitor, GpusInUse
from ai4all.types.model import DeviceInfo

CPU = DeviceInfo("CPU", "cpu", "", 1, 1)
GPU = DeviceInfo("CUDA0", "gpu", "", 1, 1, "cuda", "0000:01:00.0")
OTHER = DeviceInfo("CUDA1", "gpu", "", 1, 1, "cuda", "0000:02:00.0")
UNPLACED = DeviceInfo("Vulkan0", "gpu", "", 1, 1, "vulkan")


class Probe:
    """Answers as it is told, in the monitor's thread."""

    name = "scripted"

    def __init__(self) -> None:
        self.reads = 0
        self.answer: Callable[[], dict[str, GpuFigures]] = dict
        self.gate = threading.Event()
        self.gate.set()

    def read(self) -> dict[str, GpuFigures]:
        self.reads += 1
        self.gate.wait(30)
        return self.answer()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def busy(percent: float, used: int) -> GpuFigures:
    return GpuFigures("", percent, used, 8192)


def test_figures_come_under_the_engines_names() -> None:
    probe = Probe()
    probe.answer = lambda: {"0000:01:00.0": busy(50, 100), "0000:02:00.0": busy(90, 200)}
    monitor = GpuMonitor([lambda: probe], interval=0.001)
    eventually(lambda: bool(monitor.figures([GPU]).each))
    both = monitor.figures([OTHER, GPU, CPU])
    assert [figures.name for figures in both.each] == ["CUDA1", "CUDA0"]
    assert (both.percent, both.memory_used_mb) == (70.0, 300)
    # With two cards, a device that does not say where it sits could be either.
    assert monitor.figures([UNPLACED]).each == ()
    probe.answer = lambda: {"0000:01:00.0": busy(10, 1)}
    eventually(lambda: monitor.figures([UNPLACED]).percent == 10)
    monitor.close()


def test_nothing_is_asked_where_no_gpu_is_in_use() -> None:
    probe = Probe()
    monitor = GpuMonitor([lambda: probe], interval=0.001)
    before = threading.active_count()
    assert monitor.figures([CPU]) == GpusInUse()
    assert (threading.active_count(), probe.reads) == (before, 0)
    assert (GpusInUse().percent, GpusInUse().memory_used_mb) == (None, None)
    monitor.close()


def test_a_probe_that_hangs_costs_its_figures_and_never_a_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, probe, other = Clock(), Probe(), Probe()
    probe.answer = lambda: {"0000:01:00.0": busy(50, 100)}
    other.answer = lambda: {"0000:02:00.0": busy(20, 30)}
    monitor = GpuMonitor([lambda: probe, lambda: other], interval=0.001, patience=5, clock=clock)
    eventually(lambda: len(monitor.figures([GPU, OTHER]).each) == 2)
    probe.gate.clear()
    reads = probe.reads
    eventually(lambda: probe.reads > reads)
    clock.now += 6
    reads = other.reads
    eventually(lambda: other.reads > reads + 1)
    with caplog.at_level(logging.WARNING):
        assert [figures.name for figures in monitor.figures([GPU, OTHER]).each] == ["CUDA1"]
        assert [figures.name for figures in monitor.figures([GPU, OTHER]).each] == ["CUDA1"]
    assert [record.getMessage() for record in caplog.records] == [
        "the scripted driver does not answer; its figures are left out"
    ]
    # It was late, not dead.
    probe.gate.set()
    eventually(lambda: len(monitor.figures([GPU, OTHER]).each) == 2)
    monitor.close()


def test_a_probe_that_hangs_from_the_start_runs_out_too(caplog: pytest.LogCaptureFixture) -> None:
    clock, probe = Clock(), Probe()
    probe.gate.clear()
    monitor = GpuMonitor([lambda: probe], interval=1, patience=5, clock=clock)
    assert monitor.figures([GPU]).each == ()
    eventually(lambda: probe.reads == 1)
    clock.now += 7
    with caplog.at_level(logging.WARNING):
        assert monitor.figures([GPU]).each == ()
    assert "does not answer" in caplog.text
    monitor.close()
    probe.gate.set()


def test_a_probe_that_fails_again_and_again_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> dict[str, GpuFigures]:
        raise OSError("the driver\nhas gone")

    probe = Probe()
    probe.answer = fail
    monitor = GpuMonitor([lambda: probe], interval=0.001)
    with caplog.at_level(logging.INFO):
        assert monitor.figures([GPU]).each == ()
        eventually(lambda: bool(caplog.records))
        assert monitor.figures([GPU]).each == ()
    assert caplog.messages == ["no scripted figures: OSError: the driver has gone"]
    assert probe.reads == 3
    monitor.close()


def test_a_library_that_is_not_installed_is_asked_once() -> None:
    def absent() -> dict[str, GpuFigures]:
        raise ModuleNotFoundError("pynvml")

    probe = Probe()
    probe.answer = absent
    monitor = GpuMonitor([lambda: probe], interval=0.001)
    monitor.figures([GPU])
    eventually(lambda: probe.reads == 1)
    time.sleep(0.02)
    assert (probe.reads, monitor.figures([GPU]).each) == (1, ())
    monitor.close()
