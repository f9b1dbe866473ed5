from __future__ import annotations

import os
from pathlib import Path

import pytest
import ujson
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


def test_the_change_is_against_the_last_run_with_the_same_key(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cli("benchmark", "--json").json
    slower = FakeBackend(ScriptedGeneration(token_ms=2.0), time_scale=0.0)
    second = cli("benchmark", "--json", backend=slower).json
    assert second["previous"]["timestamp"] == first["timestamp"]
    assert second["scores"]["tokens_per_second"] == pytest.approx(500.0)
    with monkeypatch.context() as patch:
        patch.setenv("AI4ALL_ENGINE_THREADS", "7")
        assert cli("benchmark", "--json").json["previous"] is None

    table = cli("benchmark").out
    assert "+100.0 %" in table
    assert second["timestamp"] in table
    assert second["path"] in table


def test_the_machine_is_tuned_once_and_again_when_asked(
    cli: Cli, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Others on the machine that runs this must not make it search again.
    monkeypatch.setattr("ai4all.benchmark.tuning._load_now", lambda: 0.0)
    first = cli("benchmark", "--json").json["tuning"]
    assert first["is_complete"]
    assert first["threads"] >= 1
    assert first["trials"][0]["decode_tokens_per_second"] == pytest.approx(1000.0)
    assert (data_dir / "benchmarks" / "tuning.json").exists()
    again = cli("benchmark", "--json").json
    assert again["tuning"] == first
    assert again["key"]["threads"] == first["threads"]
    monkeypatch.setattr("ai4all.benchmark.tuning._load_now", lambda: 0.125)
    tuned = cli("benchmark", "--tune")
    assert "chosen: " in tuned.out
    assert "flash attention" in tuned.out
    kept = ujson.loads((data_dir / "benchmarks" / "tuning.json").read_bytes())["tunings"]
    assert [each["other_load"] for each in kept] == [0.125]


def test_a_disturbed_tuning_is_repeated_in_peace(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ai4all.benchmark.tuning._load_now", lambda: 0.9)
    first = cli("benchmark", "--json").json["tuning"]
    assert first["other_load"] == 0.9
    assert cli("benchmark", "--json").json["tuning"] == first
    monkeypatch.setattr("ai4all.benchmark.tuning._load_now", lambda: 0.0)
    assert cli("benchmark", "--json").json["tuning"]["other_load"] == 0.0


def test_what_the_owner_settled_is_not_searched_for(
    cli: Cli, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in [("THREADS", "3"), ("THREADS_BATCH", "2"), ("UBATCH", "64")]:
        monkeypatch.setenv(f"AI4ALL_ENGINE_{key}", value)
    monkeypatch.setenv("AI4ALL_ENGINE_FLASH_ATTENTION", "on")
    result = cli("benchmark", "--json").json
    assert result["tuning"] is None
    assert result["key"]["threads"] == 3
    assert not (data_dir / "benchmarks" / "tuning.json").exists()


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
