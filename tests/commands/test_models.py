from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from command_line import Cli
from tiny_gguf import write_tiny_gguf


def test_a_model_is_pulled_listed_verified_and_removed(
    cli: Cli, tiny_model: Path, data_dir: Path
) -> None:
    sha256 = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    pulled = cli("models", "pull", "mine", f"file:{tiny_model}", "--sha256", sha256, "--json")
    assert (pulled.status, pulled.err) == (0, "")
    assert pulled.json["sha256"] == sha256
    path = Path(pulled.json["path"])
    assert path.is_relative_to(data_dir)

    (row,) = cli("models", "list", "--json").json["models"]
    assert (row["model_id"], row["sha256"], row["present"]) == ("mine", sha256, True)
    # Weights, cache, buffers and vocabulary of a model of two thirds of a megabyte.
    assert tiny_model.stat().st_size < row["memory"]["needed"] < 64 << 20
    assert row["memory"]["peak"] >= row["memory"]["needed"]
    assert "mine" in cli("models", "list").out

    verified = cli("models", "verify", "--json")
    assert verified.status == 0
    assert verified.json == {"models": [{"model_id": "mine", "ok": True, "problem": None}]}

    removed = cli("models", "remove", "mine", "--json")
    assert (removed.status, removed.json) == (0, {"removed": "mine"})
    assert not path.exists()
    assert cli("models", "list", "--json").json == {"models": []}


def test_the_memory_of_a_model_counts_the_draft_model_of_the_settings(
    cli: Cli, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = write_tiny_gguf(tmp_path / "deep.gguf", n_layers=32)
    cli("models", "pull", "mine", f"file:{tiny_model}")
    cli("models", "pull", "deep", f"file:{deep}")

    def needed() -> dict[str, int]:
        rows = cli("models", "list", "--json").json["models"]
        return {row["model_id"]: row["memory"]["needed"] for row in rows}

    before = needed()
    for name in ("deep", str(deep)):
        monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", name)
        assert needed()["mine"] - before["mine"] > deep.stat().st_size
    # No model drafts for itself.
    monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", "deep")
    assert needed()["deep"] == before["deep"]
    monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", "absent")
    assert needed() == before


def test_a_changed_file_fails_the_verification(cli: Cli, tiny_model: Path) -> None:
    pulled = cli("models", "pull", "mine", f"file:{tiny_model}", "--json")
    path = Path(pulled.json["path"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = cli("models", "verify", "mine", "--json")
    assert done.status == 1
    assert done.json["models"][0]["ok"] is False
    assert "sha256" in done.json["models"][0]["problem"]
    path.unlink()
    assert "missing" in cli("models", "verify").out
    (row,) = cli("models", "list", "--json").json["models"]
    assert (row["present"], row["memory"]) == (False, None)


def test_what_cannot_be_had_is_one_line(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    for arguments, part in [
        (["pull", "x", "nonsense"], "nonsense"),
        (["pull", "x", f"file:{tmp_path}/absent"], "absent"),
        (["pull", "x", f"file:{tiny_model}", "--sha256", "00" * 32], "sha256"),
        (["verify", "absent"], "absent"),
        (["remove", "absent"], "absent"),
    ]:
        done = cli("models", *arguments, "--json")
        assert (done.status, done.out) == (1, "")
        assert part in done.error_line
