from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from ai4all.backend.base import (
    Capabilities,
    Completion,
    EngineOptions,
    GenerateRequest,
    LoadedModel,
)
from ai4all.backend.devices import Choice
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.benchmark.speed_watch import SpeedBaseline
from ai4all.clock import Clock
from ai4all.errors import DeviceUnavailable, EngineCrashed, OutOfMemory
from ai4all.models.estimate import MemoryEstimate
from ai4all.models.offload import Offload
from ai4all.types.model import DeviceInfo, ModelFile
from ai4all.worker_health import WorkerHealth

CPU = DeviceInfo("CPU", "cpu", "a processor", 32_000, 30_000)
GPU = DeviceInfo("CUDA0", "gpu", "a card", 24_000, 23_000, "cuda", "0000:01:00.0")
MODEL = ModelFile("m", Path("absent.gguf"), "a" * 64, 100)
OTHER = ModelFile("other", Path("absent.gguf"), "b" * 64, 100)
NOTHING = MemoryEstimate(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class HandClock(Clock):
    """A clock that is moved by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def sees(*devices: DeviceInfo) -> Capabilities:
    built = {"backends": ["CPU", "CUDA"]}
    return Capabilities(devices[0].backend, devices, "build", None, built)


def loaded(device: str, model: ModelFile = MODEL) -> LoadedModel:
    return LoadedModel(model, "", 512, 512, 0, 0.0, device, 2, has_chat_template=False)


def plan(n_layers: int, **more: Any) -> Offload:
    return Offload(Choice((GPU,)), n_layers, 31, NOTHING, 0, **more)


def options(**more: Any) -> EngineOptions:
    return EngineOptions(**more)


def test_all_is_well_while_the_device_computes() -> None:
    health = WorkerHealth(sees(GPU, CPU), options())
    assert health.promised == "CUDA0"
    health.approve(MODEL, plan(31))
    health.confirm(loaded("CUDA0"))
    health.look(sees(GPU, CPU), loaded("CUDA0"))
    assert (health.degraded, health.is_refusing, health.misses_device) == (None, False, False)


def test_a_machine_without_a_gpu_promises_the_cpu() -> None:
    health = WorkerHealth(sees(CPU), options())
    assert health.promised == "CPU"
    health.confirm(loaded("CPU"))
    health.look(sees(CPU), loaded("CPU"))
    assert health.degraded is None
    assert WorkerHealth(sees(GPU, CPU), options(gpu_layers=0)).promised == "CPU"
    assert WorkerHealth(sees(GPU, CPU), options(device="cpu")).promised == "CPU"


def test_a_device_that_is_named_and_absent_is_an_error_or_the_cpu_as_configured() -> None:
    with pytest.raises(DeviceUnavailable, match="the driver shows no device"):
        WorkerHealth(sees(CPU), options(device="cuda"))
    health = WorkerHealth(sees(CPU), options(device="cuda", allow_cpu_fallback=True))
    health.confirm(loaded("CPU"))
    health.look(sees(CPU), loaded("CPU"))
    assert health.degraded is not None
    assert health.degraded.endswith("computing on the CPU")
    # There is nothing to wait for.
    assert (health.is_refusing, health.misses_device) == (False, False)


def test_a_device_that_goes_is_told_and_nothing_is_computed_elsewhere() -> None:
    health = WorkerHealth(sees(GPU, CPU), options())
    health.confirm(loaded("CUDA0"))
    with capture_logs() as logs:
        health.look(sees(CPU), None)
        health.look(sees(CPU), None)
    assert [entry["event"] for entry in logs] == ["degraded"]
    assert health.is_refusing
    assert health.misses_device
    assert "CUDA0 was promised, but the engine does not see it" in str(health.refusal())
    lost = dataclasses.replace(GPU, memory_mb=0)
    assert not health.sees_device(sees(lost, CPU))
    with pytest.raises(DeviceUnavailable, match="degraded"):
        health.approve(MODEL, plan(0))
    with capture_logs() as logs:
        health.look(sees(GPU, CPU), loaded("CUDA0"))
    assert [entry["event"] for entry in logs] == ["recovered"]
    assert health.degraded is None


def test_what_really_ran_counts_and_not_what_was_asked_for() -> None:
    health = WorkerHealth(sees(GPU, CPU), options())
    with pytest.raises(DeviceUnavailable, match="runs on CPU, promised was CUDA0"):
        health.confirm(loaded("CPU"))
    assert health.is_refusing
    allowed = WorkerHealth(sees(GPU, CPU), options(allow_cpu_fallback=True))
    allowed.confirm(loaded("CPU"))
    assert allowed.degraded == "runs on CPU, promised was CUDA0"
    assert (allowed.is_refusing, allowed.misses_device) == (False, True)


def test_memory_that_others_took_is_the_devices_fault() -> None:
    health = WorkerHealth(sees(GPU, CPU), options())
    with pytest.raises(DeviceUnavailable, match="too little memory: 3 are free"):
        health.approve(MODEL, plan(0, limited_by="too little memory: 3 are free"))
    assert health.is_refusing


def test_a_model_that_is_too_large_is_not() -> None:
    health = WorkerHealth(sees(GPU, CPU), options())
    huge = plan(0, limited_by="too little memory", fits_when_empty=False)
    with pytest.raises(OutOfMemory, match="allow_cpu_fallback"):
        health.approve(MODEL, huge)
    assert health.degraded is None
    WorkerHealth(sees(GPU, CPU), options(allow_cpu_fallback=True)).approve(MODEL, huge)


def test_a_part_on_the_cpu_is_fine_unless_all_of_it_was_promised() -> None:
    health = WorkerHealth(sees(GPU, CPU), options())
    health.approve(MODEL, plan(12, limited_by="too little memory"))
    health.confirm(loaded("CUDA0+CPU"))
    assert health.degraded is None
    # Once it has run as a whole, less is less than promised.
    health.confirm(loaded("CUDA0"))
    with pytest.raises(DeviceUnavailable, match="runs in part on the CPU"):
        health.approve(MODEL, plan(12, limited_by="too little memory"))
    benchmarked = WorkerHealth(sees(GPU, CPU), options(), whole={MODEL.sha256})
    with pytest.raises(DeviceUnavailable, match="in part"):
        benchmarked.confirm(loaded("CUDA0+CPU"))
    benchmarked.confirm(loaded("CUDA0+CPU", OTHER))


def test_a_load_that_worked_before_and_fails_is_the_devices_fault() -> None:
    health = WorkerHealth(sees(GPU, CPU), options())
    health.could_not_load(MODEL, OutOfMemory("unable to allocate"))
    assert health.degraded is None
    health.confirm(loaded("CUDA0"))
    health.could_not_load(MODEL, OutOfMemory("unable to allocate"))
    assert health.degraded == "CUDA0 does not take m any more"
    health.confirm(loaded("CUDA0"))
    assert health.degraded is None


async def completions(rate: float, count: int) -> list[Completion]:
    script = ScriptedGeneration(token_ms=1000.0 / rate)
    async with FakeBackend(script, time_scale=0.0) as backend:
        await backend.load(MODEL, options())
        request = GenerateRequest(prompt="a b c d", max_tokens=20)
        return [await backend.complete(request) for _ in range(count)]


async def test_a_lasting_drop_of_speed_is_told_and_work_goes_on() -> None:
    clock = HandClock()
    health = WorkerHealth(sees(CPU), options(), clock=clock)
    slow, fast = await completions(30.0, 20), await completions(90.0, 15)
    for each in slow:
        clock.now += 10
        health.saw(each)
    assert health.degraded is None, "there was nothing to compare with"
    health.expect(SpeedBaseline(0.01, 0.0))
    with capture_logs() as logs:
        for each in slow:
            clock.now += 10
            health.saw(each)
    assert health.degraded == "computes at 30% of the speed that its benchmark measured"
    assert (health.is_refusing, health.misses_device) == (False, False)
    (entry,) = logs
    assert "ai4all-native benchmark" in entry["hint"]
    for each in fast:
        clock.now += 10
        health.saw(each)
    assert health.degraded is None
    for each in slow:
        clock.now += 10
        health.saw(each)
    assert health.degraded is not None
    # Another model has another speed.
    health.expect(None)
    assert health.degraded is None


def test_both_reasons_are_told() -> None:
    health = WorkerHealth(sees(GPU, CPU), options())
    health.confirm(loaded("CUDA0"))
    health.look(sees(CPU), None)
    health._reasons["speed"] = "slow"
    assert health.degraded is not None
    assert health.degraded.endswith("; slow")


def test_an_engine_that_dies_is_no_missing_device() -> None:
    health = WorkerHealth(sees(GPU, CPU), options())
    health.confirm(loaded("CUDA0"))
    health.could_not_load(OTHER, EngineCrashed("it died"))
    assert health.degraded is None
