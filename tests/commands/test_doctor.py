from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
from command_line import Cli

from ai4all.backend import registry
from ai4all.backend.base import Capabilities
from ai4all.backend.drivers import Card
from ai4all.commands import doctor_devices
from ai4all.errors import EngineCrashed, EngineUnavailable
from ai4all.types.model import DeviceInfo


def statuses(report: dict[str, object]) -> dict[str, str]:
    checks = report["checks"]
    assert isinstance(checks, list)
    return {check["name"]: check["status"] for check in checks}


def test_a_fresh_machine_is_healthy_and_says_what_is_still_due(cli: Cli, data_dir: Path) -> None:
    done = cli("doctor", "--json")
    assert (done.status, done.err) == (0, "")
    assert done.json["healthy"] is True
    assert statuses(done.json)["first run"] == "warning"
    assert done.json["engine"]["engine_build"]
    assert not data_dir.exists()


def test_after_the_first_run_models_and_benchmark_are_looked_at(cli: Cli, data_dir: Path) -> None:
    cli("benchmark", "--json")
    found = statuses(cli("doctor", "--json").json)
    assert found["first run"] == found["model benchmark"] == found["benchmark"] == "ok"
    assert "benchmark" in cli("doctor").out

    (model,) = (data_dir / "models").glob("*.gguf")
    content = model.read_bytes()
    model.write_bytes(b"rubbish!" + content[8:])
    done = cli("doctor", "--json")
    assert (done.status, done.json["healthy"]) == (1, False)
    assert statuses(done.json)["model benchmark"] == "problem"
    model.unlink()
    assert statuses(cli("doctor", "--json").json)["model benchmark"] == "problem"


def test_a_model_that_does_not_fit_is_pointed_out(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("benchmark", "--json")

    def finding() -> dict[str, str]:
        checks: list[dict[str, str]] = cli("doctor", "--json").json["checks"]
        return next(check for check in checks if check["name"] == "model benchmark")

    assert "MiB of memory when loaded" in finding()["detail"]
    monkeypatch.setenv("AI4ALL_ENGINE_MEMORY_LIMIT_MB", "1")
    assert finding()["status"] == "warning"
    assert "memory_limit_mb" in finding()["detail"]


def test_without_an_engine_it_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> object:
        raise EngineUnavailable("not built here")

    monkeypatch.setattr(registry, "_native", unavailable)
    done = cli("doctor", "--json")
    assert done.status == 1
    assert done.json["engine"] is None
    assert statuses(done.json)["backend native"] == "problem"
    assert "not built here" in cli("doctor").out
    assert "no engine" in cli("--version").out


def test_a_wrong_configuration_is_a_finding(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[engine]\nthread = 1\n")
    done = cli("doctor", "--config", str(tmp_path / "x.toml"), "--json")
    assert done.status == 1
    assert statuses(done.json)["configuration"] == "problem"


def test_a_data_directory_that_is_a_file_is_a_finding(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = cli("doctor", "--data-dir", str(tmp_path / "file"), "--json")
    assert done.status == 1
    assert statuses(done.json)["data directory"] == "problem"


CPU = DeviceInfo("CPU", "cpu", "a processor", 32_000, 30_000)
GPU = DeviceInfo("CUDA0", "gpu", "a card", 24_000, 23_000, "cuda", "0000:01:00.0", "nvidia 550.54")
CARD = Card("0000:01:00.0", "NVIDIA", "nvidia 550.54")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put another machine in place of this one: its devices, its build, its slots."""

    def put(
        *devices: DeviceInfo,
        built: Sequence[str] = ("CPU",),
        not_loaded: Mapping[str, str] = MappingProxyType({}),
        in_slots: Sequence[Card] = (),
    ) -> None:
        build = {"backends": [*built], "not_loaded": dict(not_loaded)}
        found = Capabilities(devices[0].backend, devices, "a build", None, build)
        monkeypatch.setattr(registry, "ask_capabilities", lambda: found)
        monkeypatch.setattr(doctor_devices, "cards", lambda: list(in_slots))

    return put


Machine = Callable[..., None]


def test_a_machine_without_a_gpu(cli: Cli, machine: Machine) -> None:
    machine(CPU)
    done = cli("doctor", "--json")
    assert (done.status, done.json["healthy"]) == (0, True)
    (device,) = done.json["devices"]
    assert device["name"] == "CPU"
    assert (device["memory_mb"], device["memory_free_mb"]) == (32_000, 30_000)
    assert (device["used"], device["unused"], device["driver"]) == (True, None, None)
    found = statuses(done.json)
    assert found["device CPU"] == found["device choice"] == found["target cuda"] == "ok"
    assert "30,000 of 32,000 MiB free" in cli("doctor").out


def test_a_machine_with_a_gpu(cli: Cli, machine: Machine) -> None:
    machine(GPU, CPU, built=("CPU", "CUDA"), in_slots=[CARD])
    cli("benchmark", "--json")
    done = cli("doctor", "--json")
    assert done.status == 0
    gpu, cpu = done.json["devices"]
    assert (gpu["name"], gpu["driver"], gpu["used"]) == ("CUDA0", "nvidia 550.54", True)
    assert cpu["used"] is True
    details = {check["name"]: check["detail"] for check in done.json["checks"]}
    assert details["device CUDA0"] == "a card, 23,000 of 24,000 MiB free, nvidia 550.54"
    assert details["device choice"] == "CUDA0 computes (engine.device = auto)"
    # The estimate is shown, for each model.
    assert "3 of 3 layers on CUDA0: " in details["model benchmark"]
    assert "of 23,000 free" in details["model benchmark"]


def test_a_gpu_that_its_owner_excludes(
    cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(GPU, CPU, built=("CPU", "CUDA"), in_slots=[CARD])
    monkeypatch.setenv("AI4ALL_ENGINE_DEVICE", "cpu")
    done = cli("doctor", "--json")
    assert done.status == 0
    gpu = done.json["devices"][0]
    assert (gpu["used"], gpu["unused"]) == (False, "excluded by engine.device = cpu")
    monkeypatch.setenv("AI4ALL_ENGINE_DEVICE", "auto")
    monkeypatch.setenv("AI4ALL_ENGINE_GPU_LAYERS", "0")
    gpu = cli("doctor", "--json").json["devices"][0]
    assert (gpu["used"], gpu["unused"]) == (False, "engine.gpu_layers is 0")


def test_a_gpu_that_is_full(cli: Cli, machine: Machine) -> None:
    machine(dataclasses.replace(GPU, memory_free_mb=100), CPU, built=("CPU", "CUDA"))
    cli("benchmark", "--json")
    done = cli("doctor", "--json")
    assert done.status == 0
    (check,) = (c for c in done.json["checks"] if c["name"] == "model benchmark")
    assert check["status"] == "warning"
    assert "too little memory: all 3 layers need" in check["detail"]


def test_a_cuda_build_on_a_machine_without_the_drivers_library(
    cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "libcuda.so.1: cannot open shared object file: No such file or directory"
    machine(CPU, not_loaded={"cuda": why})
    done = cli("doctor", "--json")
    # It can work, on the CPU, and says so.
    assert done.status == 0
    found = statuses(done.json)
    assert found["target cuda"] == found["device choice"] == "warning"
    details = {check["name"]: check["detail"] for check in done.json["checks"]}
    assert details["target cuda"] == f"cuda is built in, but it could not be loaded: {why}"
    assert details["device choice"] == f"{details['target cuda']}; CPU computes"
    assert done.json["engine"]["not_loaded"] == {"cuda": why}
    monkeypatch.setenv("AI4ALL_ENGINE_DEVICE", "cuda")
    done = cli("doctor", "--json")
    assert (done.status, statuses(done.json)["device choice"]) == (1, "problem")
    monkeypatch.setenv("AI4ALL_ENGINE_ALLOW_CPU_FALLBACK", "true")
    done = cli("doctor", "--json")
    assert (done.status, statuses(done.json)["device choice"]) == (0, "warning")


def test_a_cuda_build_without_a_device(
    cli: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(CPU, built=("CPU", "CUDA"), in_slots=[dataclasses.replace(CARD, driver=None)])
    done = cli("doctor", "--json")
    # It can work, on the CPU, and says so.
    assert done.status == 0
    found = statuses(done.json)
    assert found["target cuda"] == found["device choice"] == found["card 0000:01:00.0"] == "warning"
    details = {check["name"]: check["detail"] for check in done.json["checks"]}
    assert details["device choice"].endswith("the driver shows no device; CPU computes")
    assert "no driver has taken it" in details["card 0000:01:00.0"]
    assert done.json["devices"][1]["unused"] == "no driver has taken it; install the vendor's"
    # Asked for by name, it keeps the worker from working.
    monkeypatch.setenv("AI4ALL_ENGINE_DEVICE", "cuda")
    done = cli("doctor", "--json")
    assert (done.status, statuses(done.json)["device choice"]) == (1, "problem")
    # Unless the owner has said what then.
    monkeypatch.setenv("AI4ALL_ENGINE_ALLOW_CPU_FALLBACK", "true")
    done = cli("doctor", "--json")
    assert (done.status, statuses(done.json)["device choice"]) == (0, "warning")


def test_a_card_that_the_build_cannot_use(cli: Cli, machine: Machine) -> None:
    amd = Card("0000:03:00.0", "AMD", "amdgpu of Linux 6.1")
    intel = Card("0000:00:02.0", "Intel", "i915 of Linux 6.1")
    machine(CPU, in_slots=[CARD, amd, intel])
    done = cli("doctor", "--json")
    assert done.status == 0
    found = statuses(done.json)
    cards = [found[f"card {card.address}"] for card in (CARD, amd, intel)]
    assert cards == ["warning", "warning", "ok"]
    reasons = {device["address"]: device["unused"] for device in done.json["devices"]}
    assert "cmake.define.GGML_CUDA=ON" in reasons[CARD.address]
    assert "cmake.define.GGML_HIP=ON" in reasons[amd.address]


def test_a_driver_that_does_not_answer(cli: Cli, machine: Machine) -> None:
    lost = dataclasses.replace(GPU, memory_mb=0, memory_free_mb=0)
    machine(lost, CPU, built=("CPU", "CUDA"), in_slots=[CARD])
    done = cli("doctor", "--json")
    assert statuses(done.json)["device CUDA0"] == "warning"
    assert "does not answer" in done.json["devices"][0]["unused"]


def test_an_engine_that_dies_of_the_question(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> Capabilities:
        raise EngineCrashed("the engine process died of SIGABRT before it was ready")

    monkeypatch.setattr(registry, "ask_capabilities", die)
    done = cli("doctor", "--json")
    assert (done.status, done.json["devices"], done.json["engine"]) == (1, [], None)
    assert statuses(done.json)["engine"] == "problem"
