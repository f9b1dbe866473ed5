"""The draft model that the settings name: found, checked, and given to what computes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Cli
from tiny_gguf import write_tiny_gguf

from ai4all.backend.base import EngineOptions, LoadedModel
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.commands.drafting import Drafting
from ai4all.types.model import ModelFile


class Recording(FakeBackend):
    """Knows the draft model of each load, also when it is closed."""

    def __init__(self) -> None:
        super().__init__(ScriptedGeneration(token_ms=1.0), time_scale=0.0)
        self.drafts: list[ModelFile | None] = []

    async def load(
        self,
        model: ModelFile,
        options: EngineOptions,
        progress: Callable[[float], None] | None = None,
    ) -> LoadedModel:
        self.drafts.append(options.draft)
        return await super().load(model, options, progress)


def file_of(path: Path, model_id: str = "m") -> ModelFile:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ModelFile(model_id, path, digest, path.stat().st_size)


@pytest.fixture
def smaller(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "smaller.gguf", seed=1, n_layers=1)


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "stranger.gguf", renamed={300: "nowhere"})


@pytest.mark.parametrize("by", ["id", "path"])
def test_generate_loads_it_too(
    cli: Cli, tiny_model: Path, smaller: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    assert cli("models", "pull", "small", f"file:{smaller}").status == 0
    monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", "small" if by == "id" else str(smaller))
    backend = Recording()
    done = cli("generate", "--model", str(tiny_model), "--prompt", "x", "--json", backend=backend)
    assert (done.status, done.err) == (0, "")
    (draft,) = backend.drafts
    assert draft is not None
    assert draft.sha256 == file_of(smaller).sha256


def test_none_is_the_default(cli: Cli, tiny_model: Path) -> None:
    backend = Recording()
    assert cli("generate", "--model", str(tiny_model), "--prompt", "x", backend=backend).status == 0
    assert backend.drafts == [None]


def test_blocks_are_computed_with_it(
    cli: Cli, smaller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("demo", "--json").status == 0
    monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", str(smaller))
    backend = Recording()
    assert cli("demo", "--json", backend=backend).status == 0
    (draft,) = backend.drafts
    assert draft is not None
    assert draft.path == smaller
    # The file of a path is nothing that blocks can ask for.
    listed = cli("models", "list", "--json").json
    assert [row["model_id"] for row in listed["models"]] == ["benchmark"]


def test_runs_with_and_without_it_are_not_compared(
    cli: Cli, smaller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cli("benchmark", "--json").json
    assert first["key"]["draft_model_sha256"] is None
    monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", str(smaller))
    drafted = cli("benchmark", "--json").json
    assert drafted["key"]["draft_model_sha256"] == file_of(smaller).sha256
    assert drafted["previous"] is None
    assert cli("benchmark", "--json").json["previous"]["timestamp"] == drafted["timestamp"]


def test_the_first_run_is_followed_by_one_with_it(
    cli: Cli, smaller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", str(smaller))
    assert cli("benchmark", "--json").json["key"]["draft_model_sha256"] == file_of(smaller).sha256


@pytest.mark.parametrize("command", ["generate", "demo", "benchmark"])
def test_a_name_that_is_none_fails_first(
    cli: Cli, data_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", "smalll")
    more = ["--model", str(tiny_model), "--prompt", "x"] if command == "generate" else []
    done = cli(command, *more)
    assert done.status != 0
    assert "engine.draft_model: there is no model or file 'smalll'" in done.error_line
    assert "AI4ALL_ENGINE_DRAFT_MODEL" in done.error_line
    assert not (data_dir / ".initialized").exists()


def test_one_that_does_not_serve_is_refused(
    cli: Cli, tiny_model: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", str(stranger))
    line = cli("generate", "--model", str(tiny_model), "--prompt", "x").error_line
    assert "engine.draft_model: stranger cannot draft for tiny: its token 300 is 'nowhere'" in line
    monkeypatch.setenv("AI4ALL_ENGINE_DRAFT_MODEL", str(tiny_model))
    line = cli("generate", "--model", str(tiny_model), "--prompt", "x").error_line
    assert "tiny cannot draft for tiny: it is that model" in line


def test_other_models_do_without_one_that_does_not_serve_them(
    tiny_model: Path, smaller: Path, stranger: Path, tmp_path: Path
) -> None:
    draft = file_of(smaller)
    drafting = Drafting(draft)
    options = EngineOptions(n_ctx=512)
    assert drafting.options_for(options, file_of(tiny_model)).draft == draft
    assert drafting.options_for(options, file_of(stranger)) == options
    # The draft model is a model like any other, and blocks may ask for it.
    assert drafting.options_for(options, draft) == options
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    assert drafting.options_for(options, file_of(broken)) == options
    assert Drafting().options_for(options, file_of(tiny_model)) == options
