"""``--device`` and ``--gpu-layers``: what computes, what is refused, and what is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli, Finished

from ai4all.backend.base import Capabilities, EngineOptions, LoadedModel
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.cli import main
from ai4all.commands.environment import Environment
from ai4all.types.model import DeviceInfo, ModelFile

WHY = "libcuda.so.1: cannot open shared object file: No such file or directory"
CPU = DeviceInfo("CPU", "cpu", "a processor", 32_000, 30_000)
GPU = DeviceInfo("CUDA0", "gpu", "a card", 24_000, 23_000, "cuda", "0000:01:00.0")


class CudaBuild(FakeBackend):
    """A build with the CUDA backend, as it is where the driver's library is missing."""

    def __init__(self, *devices: DeviceInfo) -> None:
        super().__init__(
            ScriptedGeneration(token_ms=1.0), time_scale=0.0, devices=devices or (CPU,)
        )
        self.loads: list[EngineOptions] = []

    def capabilities(self) -> Capabilities:
        has_driver = len(self.device_list) > 1
        build = {
            "backends": ["CPU", "CUDA"] if has_driver else ["CPU"],
            "not_loaded": {} if has_driver else {"cuda": WHY},
        }
        return dataclasses.replace(super().capabilities(), build_info=build)

    async def load(
        self,
        model: ModelFile,
        options: EngineOptions,
        progress: Callable[[float], None] | None = None,
    ) -> LoadedModel:
        self.loads.append(options)
        return await super().load(model, options, progress)


class Machine:
    """Runs commands, each with engines of its own, and knows what they were asked to load."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *devices: DeviceInfo) -> None:
        self._capsys = capsys
        self.devices = devices
        self.opened: list[CudaBuild] = []
        self.placed_on: str | None = None

    def __call__(self, *arguments: str) -> Finished:
        self._capsys.readouterr()
        status = main(arguments, Environment(self._open))
        captured = self._capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    @property
    def loads(self) -> set[tuple[str, int]]:
        return {
            (options.device, options.gpu_layers)
            for backend in self.opened
            for options in backend.loads
        }

    def _open(self) -> CudaBuild:
        self.opened.append(CudaBuild(*self.devices))
        self.opened[-1].placed_on = self.placed_on
        return self.opened[-1]


@pytest.fixture
def without_driver(capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(capsys)


@pytest.fixture
def with_gpu(capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(capsys, GPU, CPU)


def commands(model: Path) -> dict[str, list[str]]:
    return {
        "generate": ["generate", "--model", str(model), "--prompt", "x", "--json"],
        "benchmark": ["benchmark", "--json"],
        "demo": ["demo", "--tasks", "1", "--json"],
        "worker": ["worker", "--coordinator", "ws://127.0.0.1:1"],
    }


@pytest.mark.parametrize("command", ["generate", "benchmark", "demo", "worker"])
def test_a_device_that_is_named_and_not_to_be_had_is_refused_in_one_line(
    without_driver: Machine, tiny_model: Path, command: str
) -> None:
    done = without_driver(*commands(tiny_model)[command], "--device", "cuda")
    assert (done.status, done.out) == (1, "")
    assert "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert f"engine.device: cuda is built in, but it could not be loaded: {WHY}; " in line
    assert line.endswith("install its driver, or set engine.allow_cpu_fallback")
    assert without_driver.loads == set()


@pytest.mark.parametrize("command", ["generate", "benchmark", "demo"])
def test_the_cpu_stands_in_where_the_owner_said_so(
    without_driver: Machine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("AI4ALL_ENGINE_ALLOW_CPU_FALLBACK", "true")
    done = without_driver(*commands(tiny_model)[command], "--device", "cuda")
    assert done.status == 0
    assert without_driver.loads == {("cpu", 0)}
    # It is not silent about it.
    assert (
        f"all on the CPU (engine.device: cuda is built in, but it could not be loaded: {WHY}"
        in (" ".join(done.err.split()))
    )


def test_auto_computes_on_the_cpu_and_says_what_is_lacking(
    without_driver: Machine, tiny_model: Path
) -> None:
    done = without_driver(*commands(tiny_model)["generate"])
    assert done.status == 0
    assert done.json["fingerprint"]["device"] == "CPU"
    said = " ".join(done.err.split())
    assert f"all on the CPU (cuda is built in, but it could not be loaded: {WHY})" in said
    # Who asks for the CPU lacks nothing.
    done = without_driver(*commands(tiny_model)["generate"], "--device", "cpu")
    assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize(
    ("command", "flags", "load"),
    [
        ("generate", ["--device", "cuda0"], ("CUDA0", 3)),
        ("generate", ["--device", "CUDA0", "--gpu-layers", "2"], ("CUDA0", 2)),
        ("generate", ["--gpu-layers", "0"], ("cpu", 0)),
        ("benchmark", ["--device", "CUDA0", "--gpu-layers", "2"], ("CUDA0", 2)),
        ("benchmark", ["--device", "cpu"], ("cpu", 0)),
        ("demo", ["--device", "cpu"], ("cpu", 0)),
    ],
)
def test_flags_reach_each_load(
    with_gpu: Machine, tiny_model: Path, command: str, flags: list[str], load: tuple[str, int]
) -> None:
    done = with_gpu(*commands(tiny_model)[command], *flags)
    assert done.status == 0
    assert with_gpu.loads == {load}


@pytest.mark.parametrize("layers", ["many", "-1", "1.5"])
def test_layers_are_a_number_or_auto(cli: Cli, tiny_model: Path, layers: str) -> None:
    done = cli(*commands(tiny_model)["generate"], "--gpu-layers", layers)
    assert (done.status, done.out) == (2, "")
    assert "--gpu-layers" in done.error_line


def test_fewer_layers_than_were_measured_are_the_owners_choice(
    with_gpu: Machine, tiny_model: Path
) -> None:
    assert with_gpu(*commands(tiny_model)["benchmark"]).status == 0
    with_gpu.placed_on = "CUDA0+CPU"
    done = with_gpu(*commands(tiny_model)["demo"], "--gpu-layers", "2")
    assert done.status == 0
    assert done.json["results"][0]["fingerprint"]["device"] == "CUDA0+CPU"


def test_a_demonstration_does_not_wait_for_a_device_that_is_taken(
    with_gpu: Machine, tiny_model: Path
) -> None:
    assert with_gpu(*commands(tiny_model)["benchmark"]).status == 0
    with_gpu.devices = (dataclasses.replace(GPU, memory_free_mb=1), CPU)
    done = with_gpu(*commands(tiny_model)["demo"])
    assert (done.status, done.out) == (1, "")
    line = done.err.splitlines()[-1]
    assert "the worker is degraded: runs on CPU, promised was CUDA0: too little memory" in line
