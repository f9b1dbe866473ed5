"""A worker whose device goes, or was never there, as its coordinator sees it."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import pytest
from scripted_coordinator import MODELS, SEED_TYPES, Coordinator, assignment, serving, working

import ai4all.worker_recovery
from ai4all.backend.base import EngineOptions, GpuFigures, ResourceUsage
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.benchmark.speed_watch import SpeedBaseline
from ai4all.clock import Clock
from ai4all.errors import DeviceUnavailable, OutOfMemory
from ai4all.protocol.connection import LinkOptions
from ai4all.types.model import DeviceInfo, ModelFile
from ai4all.worker_health import WorkerHealth

CPU = DeviceInfo("CPU", "cpu", "a processor", 32_000, 30_000)
GPU = DeviceInfo("CUDA0", "gpu", "a card", 24_000, 23_000, "cuda", "0000:01:00.0", "nvidia 550")
TINY = MODELS["tiny"]


def beats(coordinator: Coordinator) -> list[dict[str, Any]]:
    return coordinator.of_type("Heartbeat")


def is_degraded(coordinator: Coordinator) -> bool:
    """Whether the last heartbeat says so."""
    return bool(beats(coordinator)) and "degraded" in beats(coordinator)[-1]


def capabilities(coordinator: Coordinator, index: int = -1) -> dict[str, Any]:
    found: dict[str, Any] = coordinator.of_type("Register")[index]["capabilities"]
    return found


def with_gpu(**more: Any) -> FakeBackend:
    return FakeBackend(devices=(GPU, CPU), **more)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has gone is looked for at once, and at every heartbeat."""
    monkeypatch.setattr(ai4all.worker_recovery, "_FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(ai4all.worker_recovery, "_LONGEST_DELAY_S", 0.0)


async def test_a_whole_device_is_registered_with_what_there_is_to_know() -> None:
    coordinator = Coordinator()
    async with serving(coordinator), working(coordinator, with_gpu()) as running:
        await running.until(lambda: bool(coordinator.of_type("Register")))
    found = capabilities(coordinator)
    assert (found["backend"], found["vram_mb"]) == ("cuda", 24_000)
    assert found["devices"] == [
        {
            "name": "CUDA0",
            "kind": "gpu",
            "memory_mb": 24_000,
            "memory_free_mb": 23_000,
            "driver": "nvidia 550",
        },
        {"name": "CPU", "kind": "cpu", "memory_mb": 32_000, "memory_free_mb": 30_000},
    ]
    assert "degraded" not in coordinator.of_type("Register")[0]


async def test_what_is_excluded_is_registered_as_such() -> None:
    coordinator = Coordinator()
    health = WorkerHealth(with_gpu().capabilities(), EngineOptions(device="cpu"))
    async with (
        serving(coordinator),
        working(coordinator, with_gpu(), health=health, score_for={"CPU": 0.25}.get) as running,
    ):
        await running.until(lambda: bool(coordinator.of_type("Register")))
    found = capabilities(coordinator)
    assert (found["backend"], found["vram_mb"]) == ("cpu", None)
    assert [device["name"] for device in found["devices"]] == ["CPU", "CUDA0"]
    assert coordinator.of_type("Register")[0]["benchmark_score"] == 0.25


async def test_a_device_that_goes_is_told_and_no_work_is_taken(soon: None) -> None:
    coordinator = Coordinator(heartbeat_ms=100, retry_after_ms=100)
    backend = with_gpu()
    scores = {"CUDA0": 0.9, "CPU": 0.1}
    async with (
        serving(coordinator),
        working(coordinator, backend, preload=TINY, score_for=scores.get) as running,
    ):
        coordinator.tasks.append(assignment("before"))
        await running.until(lambda: "before" in coordinator.results())
        assert not is_degraded(coordinator)

        # The driver goes, and takes the engine's process and the model in it along.
        backend.device_list = (CPU,)
        await backend.unload()
        await running.until(
            lambda: bool(beats(coordinator)) and "degraded" in beats(coordinator)[-1]
        )
        told = beats(coordinator)[-1]
        assert "CUDA0 was promised, but the engine does not see it" in told["degraded"]
        # For a coordinator of the first protocol, in its own words.
        assert told["status"]["Error"]["message"].startswith("degraded: CUDA0 was promised")
        asked = len(coordinator.of_type("RequestWork"))
        # A block that comes all the same is handed back, and never computed on the CPU.
        coordinator.tasks.clear()
        await coordinator.say(**assignment("meanwhile"))
        await running.until(lambda: "meanwhile" in coordinator.results())
        error = coordinator.results()["meanwhile"]["error"]
        assert (error["code"], error["retryable"]) == ("load_failed", True)
        count = len(beats(coordinator))
        await running.until(lambda: len(beats(coordinator)) > count + 2)
        assert len(coordinator.of_type("RequestWork")) == asked
        assert backend.calls.looks > 0
        assert backend.calls.generations == 1

        # A registration says so too, and promises nothing that is not there.
        await coordinator.sockets[-1].close()
        await running.until(lambda: len(coordinator.of_type("Register")) == 2)
        register = coordinator.of_type("Register")[-1]
        assert "CUDA0" in register["degraded"]
        assert (capabilities(coordinator)["backend"], register["benchmark_score"]) == ("cpu", 0.1)

        # The driver is back: the model is loaded again, and work goes on.
        backend.device_list = (GPU, CPU)
        coordinator.tasks.append(assignment("after"))
        await running.until(lambda: "after" in coordinator.results())
        assert coordinator.results()["after"]["fingerprint"]["device"] == "CUDA0"
        await running.until(lambda: not is_degraded(coordinator))
        assert beats(coordinator)[-1]["status"] == "Idle"
    assert {frame["type"] for frame in coordinator.frames} <= SEED_TYPES


async def test_the_cpu_computes_where_the_owner_allowed_it(soon: None) -> None:
    coordinator = Coordinator(heartbeat_ms=100)
    backend = with_gpu()
    health = WorkerHealth(backend.capabilities(), EngineOptions(allow_cpu_fallback=True))
    async with (
        serving(coordinator),
        working(coordinator, backend, preload=TINY, health=health) as running,
    ):
        await running.until(lambda: backend.loaded is not None)
        backend.device_list = (CPU,)
        await backend.unload()
        coordinator.tasks.append(assignment("slow"))
        await running.until(lambda: "slow" in coordinator.results())
        assert coordinator.results()["slow"]["fingerprint"]["device"] == "CPU"
        await running.until(
            lambda: bool(beats(coordinator)) and "degraded" in beats(coordinator)[-1]
        )
        assert beats(coordinator)[-1]["status"] == "Idle"
        # When the device is back, the model moves there by itself.
        backend.device_list = (GPU, CPU)
        await running.until(lambda: backend.loaded is not None and backend.loaded.device == "CUDA0")
        await running.until(lambda: not is_degraded(coordinator))


async def test_what_the_engine_does_behind_our_back_is_found_out() -> None:
    coordinator = Coordinator(deque([assignment("first")]), heartbeat_ms=100)
    backend = with_gpu()
    # It says nothing, and places the layers elsewhere.
    backend.placed_on = "CPU"
    async with serving(coordinator), working(coordinator, backend) as running:
        await running.until(lambda: "first" in coordinator.results())
        error = coordinator.results()["first"]["error"]
        assert error["code"] == "load_failed"
        assert "runs on CPU, promised was CUDA0" in error["message"]
        assert backend.loaded is None
        await running.until(
            lambda: bool(beats(coordinator)) and "degraded" in beats(coordinator)[-1]
        )
    assert backend.calls.generations == 0


async def test_a_device_that_its_owner_names_must_be_there() -> None:
    coordinator = Coordinator()
    with pytest.raises(DeviceUnavailable, match=r"engine\.device: cuda"):
        WorkerHealth(FakeBackend().capabilities(), EngineOptions(device="cuda"))
    async with serving(coordinator), working(coordinator) as running:
        await running.until(lambda: bool(coordinator.of_type("Register")))
    assert capabilities(coordinator)["backend"] == "cpu"


async def test_a_worker_that_has_become_slow_says_so_and_works_on() -> None:
    class Hasty(Clock):
        """A minute passes with each look."""

        now = 0.0

        def monotonic(self) -> float:
            self.now += 60.0
            return self.now

    script = ScriptedGeneration(token_ms=50.0)
    backend = with_gpu(script=script, time_scale=0.0)
    health = WorkerHealth(backend.capabilities(), EngineOptions(), clock=Hasty())
    tasks = [assignment(f"b-{i}", input={"max_tokens": 20}) for i in range(12)]
    coordinator = Coordinator(deque(tasks), heartbeat_ms=100)
    async with (
        serving(coordinator),
        working(
            coordinator,
            backend,
            health=health,
            # The benchmark measured 100 tokens per second, these come 20 in each.
            baseline_for=lambda loaded: SpeedBaseline(0.010, 0.0),
        ) as running,
    ):
        await running.until(lambda: len(coordinator.results()) == 12)
        await running.until(
            lambda: is_degraded(coordinator) and beats(coordinator)[-1]["status"] == "Idle"
        )
        told = beats(coordinator)[-1]["degraded"]
        assert told == "computes at 20% of the speed that its benchmark measured"
        coordinator.tasks.append(assignment("more"))
        await running.until(lambda: "more" in coordinator.results())
    assert all(result["success"] for result in coordinator.results().values())


async def test_heartbeats_have_the_figures_of_the_gpus() -> None:
    class Hot(FakeBackend):
        def resource_usage(self) -> ResourceUsage:
            gpu = GpuFigures("CUDA0", 97.0, 3072, 81_920, 55.0)
            return dataclasses.replace(
                super().resource_usage(), gpu_percent=97.0, gpu_memory_mb=3072, gpus=(gpu,)
            )

    coordinator = Coordinator(heartbeat_ms=100)
    async with serving(coordinator), working(coordinator, Hot(devices=(GPU, CPU))) as running:
        await running.until(lambda: bool(beats(coordinator)))
    usage = beats(coordinator)[0]["resource_usage"]
    assert (usage["gpu_percent"], usage["gpu_memory_mb"]) == (97.0, 3072)
    assert usage["gpus"] == [
        {
            "name": "CUDA0",
            "percent": 97.0,
            "memory_used_mb": 3072,
            "memory_mb": 81_920,
            "temperature_c": 55.0,
        }
    ]


async def test_other_settings_are_another_promise() -> None:
    coordinator = Coordinator(heartbeat_ms=100)
    backend = with_gpu()
    async with serving(coordinator), working(coordinator, backend, preload=TINY) as running:
        await running.until(lambda: backend.loaded is not None)
        options = running.worker._options
        link = LinkOptions(url=f"ws://127.0.0.1:{coordinator.port}")
        changed = dataclasses.replace(options, engine=EngineOptions(device="cpu"), health=None)
        running.worker.reconfigure(changed, link)
        coordinator.tasks.append(assignment("next"))
        await running.until(lambda: "next" in coordinator.results())
        assert coordinator.results()["next"]["fingerprint"]["device"] == "CPU"
        count = len(beats(coordinator))
        await running.until(lambda: len(beats(coordinator)) > count + 1)
        assert not is_degraded(coordinator)


async def test_settings_that_do_not_fit_are_not_forgotten() -> None:
    """The model runs as it did until a load succeeds, and each block tries."""
    coordinator = Coordinator(heartbeat_ms=100)
    backend = with_gpu()
    async with serving(coordinator), working(coordinator, backend, preload=TINY) as running:
        await running.until(lambda: backend.loaded is not None)
        worker = running.worker
        link = LinkOptions(url=f"ws://127.0.0.1:{coordinator.port}")
        tried: list[int] = []

        def refuse(model: ModelFile) -> EngineOptions:
            tried.append(len(tried))
            if len(tried) < 3:
                raise OutOfMemory("it does not fit")
            return engine

        engine = EngineOptions(n_ctx=64)
        changed = dataclasses.replace(worker._options, engine=engine, engine_for=refuse)
        worker.reconfigure(changed, link)
        for number in range(3):
            coordinator.tasks.append(assignment(f"b-{number}"))
            await running.until(lambda n=number: f"b-{n}" in coordinator.results())
        results = coordinator.results()
        assert [results[f"b-{n}"]["success"] for n in range(3)] == [False, False, True]
        assert results["b-2"]["fingerprint"]["n_ctx"] == 64
