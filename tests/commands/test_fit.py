from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ujson
from command_line import Cli, Finished
from tiny_gguf import Q8_0, write_tiny_gguf

from ai4all.backend.native import NativeBackend
from ai4all.cli import main
from ai4all.commands.environment import Environment
from ai4all.models.gguf import read_header
from ai4all.models.store import ModelStore

Fit = Callable[..., Finished]


@pytest.fixture
def native(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> Fit:
    """The command line over the real engine, with the tiny model as ``mine``."""
    # Letters are tokens to the tiny model, and the benchmark's long prompt has thousands.
    monkeypatch.setenv("AI4ALL_ENGINE_CONTEXT_LENGTH", "8192")
    monkeypatch.setenv("AI4ALL_ENGINE_THREADS", "1")

    def run(*arguments: str) -> Finished:
        capsys.readouterr()
        status = main(arguments, Environment(NativeBackend))
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    assert run("models", "pull", "mine", f"file:{tiny_model}").status == 0
    return run


def fit(native: Fit, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    """Fit with speeds as if fewer bytes were faster in proportion, whatever this machine does."""
    from ai4all.commands import fit as module

    measure = module.measure_encodings

    async def by_size(*arguments: Any, **more: Any) -> Any:
        rows = await measure(*arguments, **more)
        for row in rows:
            object.__setattr__(row, "tokens_per_second", 1e9 / row.size_bytes)
        return rows

    monkeypatch.setattr(module, "measure_encodings", by_size)
    return native("models", "fit", "mine", "--types", "q8_0", "--rounds", "1", *flags)


def test_the_winner_is_kept_beside_the_original(
    native: Fit, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, data_dir: Path
) -> None:
    done = fit(native, monkeypatch, "--json", "--max-perplexity-increase", "50")
    assert done.status == 0, done.err
    result = done.json
    assert (result["chosen"], result["in_use"]) == ("Q8_0", False)
    original, (candidate,) = result["original"], result["candidates"]
    assert original["sha256"] == hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    assert candidate["size_bytes"] < original["size_bytes"] / 2
    assert candidate["perplexity"] == pytest.approx(original["perplexity"], rel=0.1)
    assert candidate["perplexity"] != original["perplexity"]
    assert min(original["prompt_tokens_per_second"], candidate["decode_tokens_per_second"]) > 0

    fitted = result["fitted"]
    assert fitted["model_id"] == "mine.fit-q8_0"
    assert fitted["fitted_from"] == original["sha256"]
    path = Path(fitted["path"])
    assert fitted["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_header(path).quantization == "Q8_0"
    rows = {row["model_id"]: row for row in native("models", "list", "--json").json["models"]}
    assert rows["mine.fit-q8_0"]["fitted_from"] == rows["mine"]["sha256"]
    assert not list((data_dir / "models").glob(".fit-*"))

    flags = ["--prompt", "the sea", "--max-tokens", "4", "--json"]
    ran = native("generate", "--model", "mine.fit-q8_0", *flags).json
    assert ran["fingerprint"]["model_sha256"] == fitted["sha256"]
    ran = native("generate", "--model", "mine", *flags).json
    assert ran["fingerprint"]["model_sha256"] == original["sha256"]


def test_the_table_says_what_changed(native: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done = fit(native, monkeypatch, "--use", "--max-perplexity-increase", "50")
    assert "F32 (as it came)" in done.out
    assert "Q8_0 (chosen)" in done.out
    for heading in ("size", "perplexity", "prompt tok/s", "decode tok/s"):
        assert heading in done.out
    assert "kept as mine.fit-q8_0" in done.out
    assert "models remove mine.fit-q8_0" in done.out


def test_a_loss_beyond_the_bound_keeps_nothing(
    native: Fit, monkeypatch: pytest.MonkeyPatch, data_dir: Path
) -> None:
    from ai4all.benchmark.perplexity import Perplexity

    values = iter([10.0, 10.2])

    async def scripted(_: object) -> Perplexity:
        return Perplexity(next(values), 100)

    monkeypatch.setattr("ai4all.benchmark.fit.perplexity", scripted)
    done = fit(native, monkeypatch, "--json", "--max-perplexity-increase", "1", "--use")
    assert (done.json["chosen"], done.json["fitted"]) == ("F32", None)
    assert [row["model_id"] for row in native("models", "list", "--json").json["models"]] == [
        "mine"
    ]
    assert ujson.loads((data_dir / "models" / "index.json").read_bytes())["preferred"] == {}
    assert not list((data_dir / "models").glob(".fit-*"))


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["mine", "--types", "Q3"], 2, "Q3"),
        (["mine", "--types", ","], 2, "--types"),
        (["absent"], 1, "absent"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(
    native: Fit, arguments: list[str], status: int, part: str
) -> None:
    done = native("models", "fit", *arguments)
    assert (done.status, done.out) == (status, "")
    assert part in done.error_line


def test_the_demo_computes_with_the_fitted_file_once_it_is_in_use(
    cli: Cli, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cli("demo", "--tasks", "1", "--json").json
    store = ModelStore(data_dir)
    original = store.get("benchmark")
    write_tiny_gguf(store.fitting_path(original, "Q8_0"), weight_type=Q8_0)
    fitted = store.keep_fitted("benchmark.fit-q8_0", original, "Q8_0")

    def ran_with() -> str:
        done = cli("demo", "--tasks", "1", "--json").json
        (result,) = done["results"]
        assert result["accepted"]
        assert done["model"]["sha256"] == result["fingerprint"]["model_sha256"]
        return str(done["model"]["sha256"])

    assert before["model"]["sha256"] == ran_with() == original.sha256
    with monkeypatch.context() as patch:
        patch.setenv("AI4ALL_MODELS_USE_FITTED", "true")
        assert ran_with() == fitted.sha256
    store.prefer(original.sha256, fitted.sha256)
    assert ran_with() == fitted.sha256
