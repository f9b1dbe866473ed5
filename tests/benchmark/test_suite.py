from __future__ import annotations

import re
from pathlib import Path

import pytest

from ai4all.backend.base import EngineOptions, GenerateRequest
from ai4all.backend.fake import FakeBackend, ScriptedGeneration
from ai4all.benchmark.scores import composite_score
from ai4all.benchmark.store import BenchmarkStore
from ai4all.benchmark.suite import BenchmarkProgress, BenchmarkSuite, benchmark_prompts
from ai4all.errors import ContextOverflow, EngineClosed, EngineCrashed
from ai4all.types.model import ModelFile

MODEL = ModelFile("benchmark", Path("absent.gguf"), "cd" * 32, 1)


def script(request: GenerateRequest, number: int) -> ScriptedGeneration:
    # The warm-up is so slow that it would show in every figure.
    prompt_ms = [90_000.0, 10.0, 20.0, 60.0][number]
    return ScriptedGeneration(prompt_ms=prompt_ms, token_ms=10.0)


async def test_the_suite_measures_three_prompts_and_no_warm_up(tmp_path: Path) -> None:
    backend = FakeBackend(script, time_scale=0.0, memory_mb=300)
    await backend.load(MODEL, EngineOptions(threads=3))
    store = BenchmarkStore(tmp_path)
    result = await BenchmarkSuite(store).run(backend)

    assert [row.name for row in result.prompts] == ["short", "medium", "long"]
    assert [row.completion_tokens for row in result.prompts] == [100, 100, 100]
    assert [row.time_to_first_token_ms for row in result.prompts] == [20.0, 30.0, 70.0]
    assert result.scores.tokens_per_second == pytest.approx(300 / 3.090)
    assert result.scores.time_to_first_token_ms == pytest.approx(40.0)
    assert result.scores.memory_efficiency == 1.0
    assert result.scores.composite == composite_score(
        result.scores.tokens_per_second, result.scores.time_to_first_token_ms
    )
    assert (result.model, result.backend) == ("benchmark", "cpu")
    assert (result.key.model_sha256, result.key.threads) == (MODEL.sha256, 3)
    assert [device.name for device in result.hardware.devices] == ["CPU"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", result.timestamp)
    assert store.latest(result.key) == result


async def test_the_prompts_are_sent_greedy_and_to_the_full_length() -> None:
    backend = FakeBackend(ScriptedGeneration(tokens=("a", "b"), token_ms=1.0), time_scale=0.0)
    await backend.load(MODEL, EngineOptions())
    result = await BenchmarkSuite().run(backend)
    # The scripted answer ends after two tokens; only ignore_eos goes on to a hundred.
    assert [row.completion_tokens for row in result.prompts] == [100, 100, 100]
    measured = backend.calls.requests[1:]
    assert [request.prompt for request in measured] == [text for _, text in benchmark_prompts()]
    assert {(r.temperature, r.repetition_penalty, r.max_tokens) for r in measured} == {
        (0.0, 1.0, 100)
    }


async def test_a_prompt_that_does_not_fit_is_measured_as_far_as_it_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = FakeBackend(ScriptedGeneration(token_ms=1.0), time_scale=0.0)
    # Two cuts would leave room for the prompt and sixteen tokens.
    await backend.load(MODEL, EngineOptions(n_ctx=450))
    result = await BenchmarkSuite().run(backend)
    assert [row.name for row in result.prompts] == ["short", "medium", "long"]
    assert [row.completion_tokens for row in result.prompts] == [100, 100, 100]
    assert 256 < result.prompts[2].prompt_tokens <= 350
    assert f"its first {result.prompts[2].prompt_tokens} tokens" in caplog.text
    await backend.load(MODEL, EngineOptions(n_ctx=2))
    with pytest.raises(ContextOverflow):
        await BenchmarkSuite().run(backend)


async def test_progress_counts_up_to_the_end() -> None:
    backend = FakeBackend(ScriptedGeneration(token_ms=1.0), time_scale=0.0)
    await backend.load(MODEL, EngineOptions())
    seen: list[BenchmarkProgress] = []
    await BenchmarkSuite().run(backend, seen.append)
    done = [step.tokens_done for step in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 300)
    assert {step.tokens_total for step in seen} == {300}
    stages = list(dict.fromkeys(step.stage for step in seen))
    assert stages == ["warm-up", "short", "medium", "long"]


async def test_without_a_model_there_is_nothing_to_measure() -> None:
    with pytest.raises(EngineClosed):
        await BenchmarkSuite().run(FakeBackend())


async def test_a_failed_run_keeps_nothing(tmp_path: Path) -> None:
    fine = ScriptedGeneration(token_ms=1.0)
    scripts = [fine, fine, ScriptedGeneration(error=EngineCrashed("boom"), error_at=5)]
    backend = FakeBackend(scripts, time_scale=0.0)
    await backend.load(MODEL, EngineOptions())
    with pytest.raises(EngineCrashed):
        await BenchmarkSuite(BenchmarkStore(tmp_path)).run(backend)
    assert BenchmarkStore(tmp_path).latest() is None


def test_the_prompts_are_short_medium_and_about_750_words() -> None:
    prompts = dict(benchmark_prompts())
    assert prompts["short"] == "Hello, world!"
    assert prompts["medium"] == "Explain quantum computing in simple terms."
    assert 700 <= len(prompts["long"].split()) <= 800
