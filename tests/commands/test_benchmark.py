from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Cli

from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.benchmark.scores import composite_score


def test_the_first_benchmark_sets_the_machine_up(cli: Cli, data_dir: Path) -> None:
    done = cli("benchmark", "--json")
    assert done.status == 0
    result = done.json
    scores = result["scores"]
    assert scores["composite"] == pytest.approx(
        composite_score(scores["tokens_per_second"], scores["time_to_first_token_ms"])
    )
    assert scores["memory_efficiency"] > 0.0
    assert (result["model"], result["backend"]) == ("benchmark", "cpu")
    assert result["hardware"]["logical_cores"] >= 1
    assert result["timestamp"].endswith("Z")
    assert result["previous"] is None
    assert Path(result["path"]).is_relative_to(data_dir)
    assert (data_dir / ".initialized").exists()


def test_the_change_is_against_the_last_run_with_the_same_key(cli: Cli) -> None:
    first = cli("benchmark", "--json").json
    slower = FakeBackend(ScriptedGeneration(token_ms=2.0), time_scale=0.0)
    second = cli("benchmark", "--json", backend=slower).json
    assert second["previous"]["timestamp"] == first["timestamp"]
    assert second["scores"]["tokens_per_second"] == pytest.approx(500.0)
    other = FakeBackend(ScriptedGeneration(token_ms=1.0), time_scale=0.0, threads=7)
    assert cli("benchmark", "--json", backend=other).json["previous"] is None

    table = cli("benchmark").out
    assert "+100.0 %" in table
    assert second["timestamp"] in table
    assert second["path"] in table


def test_another_model_can_be_measured(cli: Cli, tiny_model: Path) -> None:
    assert cli("benchmark", "--json").status == 0
    done = cli("benchmark", "--model", str(tiny_model), "--json")
    assert done.json["model"] == "tiny"


def test_a_full_disk_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("benchmark", "--json").status == 0

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = cli("benchmark", "--json")
    assert (done.status, done.out) == (1, "")
    assert "No space left" in done.error_line


@pytest.mark.parametrize("command", ["benchmark", "demo"])
def test_a_data_directory_that_is_a_file_is_one_line(
    cli: Cli, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("")
    done = cli(command, "--data-dir", str(tmp_path / "file"), "--json")
    assert (done.status, done.out) == (1, "")
    assert "not a directory" in done.error_line
