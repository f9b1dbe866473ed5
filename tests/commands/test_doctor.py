from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli

from ai4all.backend import registry
from ai4all.errors import EngineUnavailable


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
